"""What the page of features reads: the runs of one set of SAEs, and one feature's facts.

Files are opened once for each state of them; a feature is read from the row groups that hold it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import streamlit as st
from pydantic import BaseModel

from resa_lens.app import data, stages
from resa_lens.app.data import Artifact, Listing, state
from resa_lens.app.features_stored import (
    ActivityResults,
    CountedFeatures,
    LayerEffects,
    StoredVerdict,
    Verdicts,
)
from resa_lens.errors import BadInputError
from resa_lens.pipeline.feature_files import (
    DOCUMENT_SCHEMA,
    DOCUMENTS,
    EXAMPLE_SCHEMA,
    EXAMPLES,
    FEATURE_SCHEMA,
    FEATURES,
    SCORE_SCHEMA,
    Groups,
    edges_of,
    open_groups,
)
from resa_lens.prompts import PHASES
from resa_lens.workspace import digest

SCORES = "scores.parquet"
Stored = TypeVar("Stored", bound=BaseModel)


@dataclass(frozen=True)
class Source:
    """One set of SAEs: the activity of their features, and what else was measured of them."""

    key: str
    """Workspace-relative path of the activity run; of the counts where there is none."""
    saes: str
    model: str
    site: str
    n_layers: int
    latents: dict[int, int]
    """By measured layer, 0-based; 0 where that is unknown."""
    tokens: dict[str, int]
    """Of each phase; empty without an activity run."""
    documents: int
    activity: Artifact | None
    counts: Artifact | None
    verdicts: Artifact | None
    scores: tuple[Artifact, ...]
    ablations: tuple[Artifact, ...]
    attributions: tuple[Artifact, ...]
    effects: tuple[Artifact, ...]

    @property
    def layers(self) -> list[int]:
        """0-based."""
        return sorted(self.latents)

    def file(self, name: str) -> Path | None:
        """A table of the activity run."""
        return self.activity.path / name if self.activity else None


def sources(listing: Listing) -> tuple[list[Source], list[str]]:
    """Return the sets of features, those with activity first, and what cannot be read."""
    found: list[Source] = []
    problems: list[str] = []
    for run in listing.of("activity"):
        try:
            held = data.checked(ActivityResults, run.manifest.results, run.path)
        except BadInputError as error:
            problems.append(str(error))
            continue
        latents = {row.layer: row.latents for row in held.layers}
        saes = str(run.manifest.config.get("saes", ""))
        found.append(_source(listing, run.relative, saes, held, latents, run))
    known = {source.saes for source in found}
    for run in listing.of("counts"):
        saes = str(run.manifest.config.get("saes", ""))
        if saes in known:
            continue
        known.add(saes)
        try:
            counts = data.checked(data.Counts, run.manifest.results, run.path)
        except BadInputError as error:
            problems.append(str(error))
            continue
        latents = {row.layer: 0 for row in counts.layers}
        found.append(_source(listing, run.relative, saes, counts, latents, None))
    return found, problems


def _source(
    listing: Listing,
    key: str,
    saes: str,
    held: ActivityResults | data.Counts,
    latents: dict[int, int],
    activity: Artifact | None,
) -> Source:
    def of(kind: str) -> list[Artifact]:
        return [a for a in listing.of(kind) if saes in a.manifest.parents]

    counts, verdicts = of("counts"), of("falsification")
    tested = [a.manifest.config.get("counts") for a in verdicts]
    # The newest counts whose features were tested, else the newest.
    chosen = next((a for a in counts if a.relative in tested), next(iter(counts), None))
    same = [a for a in verdicts if chosen and a.manifest.config.get("counts") == chosen.relative]
    return Source(
        key=key,
        saes=saes,
        model=held.model,
        site=held.site,
        n_layers=held.n_layers,
        latents=latents,
        tokens=held.tokens if isinstance(held, ActivityResults) else {},
        documents=held.documents if isinstance(held, ActivityResults) else 0,
        activity=activity,
        counts=chosen,
        verdicts=next(iter(same), None),
        scores=tuple(of("scores")),
        ablations=tuple(of("ablation")),
        attributions=tuple(of("attribution")),
        effects=tuple(of("effects")),
    )


def command(listing: Listing, source: Source, name: str, *arguments: str) -> str:
    """Return a command about these SAEs, to be copied to a shell."""
    words = ["resa-lens", name, "--model", source.model, *arguments]
    if (listing.root / source.saes).is_dir():
        words += ["--saes", str(listing.root / source.saes)]
    if source.site != "mlp_out":
        words += ["--site", source.site]
    return shlex.join([*words, *stages.workspace_option(listing)])


def same_activity(source: Source) -> list[str]:
    """Return the options with which `resa-lens activity` reads this run and measures nothing."""
    if source.activity is None:
        return []
    config = source.activity.manifest.config
    kept, corpus = mapping(config.get("activity")), mapping(config.get("corpus"))
    answered = config.get("generations")
    count, longest = answered if isinstance(answered, list) and len(answered) == 2 else (None, None)
    given = {
        "--layers": ",".join(map(str, source.layers)),
        "--text-tokens": config.get("tokens"),
        "--examples": kept.get("examples"),
        "--threshold": kept.get("threshold") or None,
        "--generations": count,
        "--max-new-tokens": longest,
        "--data": corpus.get("source"),
        "--seed": corpus.get("seed"),
    }
    return [str(word) for pair in given.items() if pair[1] is not None for word in pair]


def mapping(value: Any) -> dict[str, Any]:
    """Return a part of a manifest's configuration; empty where it is not what this version writes.

    What a manifest is made with is not checked when it is read: only its results are.
    """
    return value if isinstance(value, dict) else {}


# Files, each opened once for each state of it


def changed(file: Path) -> int:
    """Return a file's state, for caches.

    Raises:
        BadInputError: it is missing or unreadable.
    """
    try:
        return state(file)
    except OSError as error:
        raise BadInputError(f"{file} is missing or unreadable; make it again") from error


def stored(kind: type[Stored], file: Path) -> Stored:
    """Read a JSON file of a workspace; not to be changed, for all sessions share it.

    Raises:
        BadInputError: missing, damaged, or not what this version writes.
    """
    return _stored(kind.__name__, str(file), changed(file), _kind=kind)


@st.cache_resource(show_spinner=False, max_entries=200)
def _stored(name: str, file: str, state: int, _kind: type[Any]) -> Any:
    return data.read(_kind, Path(file))


_SCHEMAS = {FEATURES: FEATURE_SCHEMA, EXAMPLES: EXAMPLE_SCHEMA, SCORES: SCORE_SCHEMA}


def opened(file: Path) -> Groups:
    """Return a table's row groups.

    Raises:
        BadInputError: missing, damaged, or not what this version writes.
    """
    return _opened(str(file), changed(file))


@st.cache_resource(show_spinner=False, max_entries=30)
def _opened(file: str, state: int) -> Groups:
    return open_groups(Path(file), _SCHEMAS[Path(file).name])


# One feature


@dataclass(frozen=True)
class Activity:
    """A feature's row of features.parquet."""

    row: dict[str, Any]
    edges: tuple[float, ...]
    """Of the histogram's bins."""

    @property
    def ci(self) -> tuple[float, float]:
        """95 % interval of the density over all tokens, documents being the units."""
        half = 1.96 * self.row["density_se"]
        return max(0.0, self.row["density"] - half), min(1.0, self.row["density"] + half)

    @property
    def most(self) -> str:
        """The phase in which it is densest."""
        return max(PHASES, key=lambda phase: self.row[f"density_{phase}"])


def activity(source: Source, layer: int, feature: int) -> Activity | None:
    """Return a feature's figures; None where it fired on none of the documents.

    Raises:
        BadInputError: the table is missing or damaged.
    """
    file = source.file(FEATURES)
    if file is None:
        return None
    groups = opened(file)
    rows = groups.find(layer, feature)[:1]
    _whole(rows, FEATURE_SCHEMA.names[: FEATURE_SCHEMA.get_field_index("histogram")], file)
    return Activity(rows[0], tuple(edges_of(groups.schema, file))) if rows else None


def _whole(rows: Sequence[dict[str, Any]], names: Sequence[str], file: Path) -> None:
    """Raise BadInputError where a row lacks a value that our writer always gives."""
    for row in rows:
        for name in names:
            if row[name] is None:
                raise BadInputError(f"{file} has a row without {name}; --force makes it anew")


def examples(source: Source, layer: int, feature: int) -> list[dict[str, Any]]:
    """Return a feature's strongest documents, the strongest first.

    Raises:
        BadInputError: the table is missing or damaged.
    """
    file = source.file(EXAMPLES)
    if file is None:
        return []
    rows = opened(file).find(layer, feature)
    _whole(rows, EXAMPLE_SCHEMA.names, file)
    return sorted(rows, key=lambda row: row["rank"])


def phases_of(source: Source, numbers: Sequence[int]) -> dict[int, list[str]]:
    """Return the phase of every token of some documents.

    Raises:
        BadInputError: the table is missing or damaged.
    """
    file = source.file(DOCUMENTS)
    if file is None:
        return {}
    held = _documents(str(file), changed(file))
    rows = held.filter(pc.field("document").isin(sorted(set(numbers)))).to_pylist()
    try:
        return {row["document"]: [PHASES[phase] for phase in row["phases"]] for row in rows}
    except (IndexError, TypeError) as error:
        raise BadInputError(f"{file} names a phase that this version does not know") from error


@st.cache_resource(show_spinner=False, max_entries=4)
def _documents(file: str, state: int) -> pa.Table:
    names = ["document", "phases"]
    try:
        held = pq.read_table(file, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(f"{file} is missing or damaged; --force makes it anew") from error
    if held.schema.types != [DOCUMENT_SCHEMA.field(name).type for name in names]:
        raise BadInputError(f"{file} is of another version or program; --force makes it anew")
    return held


def scores_of(run: Artifact, layer: int, feature: int) -> list[dict[str, Any]]:
    """Return a feature's rows of a scores run.

    Raises:
        BadInputError: the table is missing or damaged.
    """
    return opened(run.path / SCORES).find(layer, feature)


def verdict_of(source: Source, layer: int, feature: int) -> StoredVerdict | None:
    """Return the verdict on a feature; None where it was not tested.

    Raises:
        BadInputError: the file is missing or damaged.
    """
    if source.verdicts is None:
        return None
    return stored(Verdicts, source.verdicts.path / "verdicts.json").of(layer, feature)


def ablations_of(source: Source, layer: int, feature: int) -> list[Artifact]:
    """Return the ablations that took this feature away, the fewest others with it first."""
    found: list[tuple[int, Artifact]] = []
    for run in source.ablations:
        config = mapping(run.manifest.config.get("ablation"))
        listed = config.get("features")
        here = mapping(config.get("point")).get("layer") == layer
        if here and isinstance(listed, list) and feature in listed:
            found.append((len(listed), run))
    return [run for _, run in sorted(found, key=lambda item: item[0])]


def attributions_of(source: Source, layer: int) -> list[Artifact]:
    """Return the attributions of a layer's features."""
    return [a for a in source.attributions if a.manifest.config.get("layer") == layer]


def effects_of(source: Source, layer: int, feature: int) -> list[LayerEffects]:
    """Return the causal effects of the counted features among which this one is.

    Raises:
        BadInputError: the counts or the effects are damaged.
    """
    if source.counts is None:
        return []
    counted = stored(CountedFeatures, source.counts.path / "features.json")
    rules = counted.rules_of(layer, feature)
    found = []
    for run in source.effects:
        held = data.checked(LayerEffects, run.manifest.results, run.path)
        listed = {str(row.layer): row.features.get(held.rule) for row in counted.layers}
        # Effects keep a digest of the features that were taken away: others are not these.
        if held.rule in rules and run.manifest.config.get("features") == digest(listed):
            found.append(held)
    return found
