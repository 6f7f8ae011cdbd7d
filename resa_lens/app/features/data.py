"""What the page of features reads: the runs of one set of SAEs, and one feature's facts.

Files are opened once for each state of them; a feature is read from the row groups that hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import streamlit as st

from resa_lens.app import data
from resa_lens.artifacts.artifact import Artifact, Kind
from resa_lens.artifacts.commands import line, workspace_option
from resa_lens.artifacts.feature_tables import (
    DOCUMENTS,
    EXAMPLES,
    FEATURE_SCHEMA,
    FEATURES,
    Groups,
    edges_of,
    examples_of,
    open_groups,
)
from resa_lens.artifacts.kinds.ablation import Ablation
from resa_lens.artifacts.kinds.activity import Activity as ActivityRun
from resa_lens.artifacts.kinds.attribution import Attribution
from resa_lens.artifacts.kinds.counts import Counts, Features
from resa_lens.artifacts.kinds.effects import Effects, features_key
from resa_lens.artifacts.kinds.effects import Results as EffectResults
from resa_lens.artifacts.kinds.falsification import Falsification, Verdict, Verdicts
from resa_lens.artifacts.kinds.scores import Scores
from resa_lens.artifacts.listing import Listing, is_parent
from resa_lens.artifacts.notes import saes_key
from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import describe_layer, parse_feature
from resa_lens.texts.prompts import PHASES

SCORES = "scores.parquet"


@dataclass(frozen=True)
class Source:
    """One set of SAEs: the activity of their features, and what else was measured of them."""

    key: str
    """Workspace-relative path of the activity run; of the counts where there is none."""
    saes: str
    notes_key: str
    """What a file of notes calls these SAEs."""
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

    @property
    def artifacts(self) -> list[Artifact]:
        """All that is read of them."""
        single = (a for a in (self.activity, self.counts, self.verdicts) if a)
        return [*single, *self.scores, *self.ablations, *self.attributions, *self.effects]

    def counted(self) -> Features:
        """Return the features that the rules name; none where nothing was counted.

        Raises:
            BadInputError: the counts are missing or damaged.
        """
        if self.counts is None:
            return Features(layers=[])
        return data.read(self.counts, "features.json", Features)

    def judged(self) -> Verdicts | None:
        """Return the verdicts on counted features; None where none was tested.

        Raises:
            BadInputError: the file is missing or damaged.
        """
        return self.verdicts and data.read(self.verdicts, "verdicts.json", Verdicts)


HASHES: data.Hashes = {
    **data.HASHES,
    Source: lambda source: [data.version(artifact) for artifact in source.artifacts],
}
"""Of streamlit's caches, as `data.HASHES`."""


def sources(listing: Listing) -> list[Source]:
    """Return the sets of features, those with activity first."""
    runs = listing.of(ActivityRun)
    known = {data.saes_path(run) for run in runs}
    for counts in listing.of(Counts):
        if (saes := data.saes_path(counts)) not in known:
            known.add(saes)
            runs.append(counts)
    return [_source(listing, run) for run in runs]


def _source(listing: Listing, run: Artifact) -> Source:
    saes, results = data.saes_path(run), run.results

    def of(kind: type[Kind]) -> tuple[Artifact, ...]:
        return tuple(a for a in listing.of(kind) if saes in a.manifest.parents)

    measured = run.kind is ActivityRun
    # The newest counts whose features were tested, else the newest.
    tests = {counts.relative: listing.made_of(counts, Falsification) for counts in of(Counts)}
    counts = next((a for a in of(Counts) if tests[a.relative]), next(iter(of(Counts)), None))
    return Source(
        key=run.relative,
        saes=saes,
        notes_key=saes_key(listing.at(saes), saes),
        model=results.model,
        site=results.site,
        n_layers=results.n_layers,
        latents={row.layer: row.latents if measured else 0 for row in results.layers},
        tokens=results.tokens if measured else {},
        documents=results.documents if measured else 0,
        activity=run if measured else None,
        counts=counts,
        verdicts=next(iter(tests[counts.relative]), None) if counts else None,
        scores=of(Scores),
        ablations=of(Ablation),
        attributions=of(Attribution),
        effects=of(Effects),
    )


def place_of(text: str, source: Source) -> tuple[int, int]:
    """Read LAYER:FEATURE, the layer 0-based or as in 13th.

    Raises:
        BadInputError: it has no such form, or there is no such layer or feature.
    """
    layer, feature = parse_feature(text, source.n_layers)
    latents = source.latents.get(layer, 0)
    if latents and feature >= latents:
        raise BadInputError(
            f"feature {feature} at {describe_layer(layer, source.n_layers)} is out of range: its "
            f"SAE has latents 0 to {latents - 1}"
        )
    return layer, feature


def command(listing: Listing, source: Source, name: str, *arguments: str) -> str:
    """Return a command about these SAEs, to be copied to a shell."""
    words = [name, "--model", source.model, *arguments]
    if (listing.root / source.saes).is_dir():
        words += ["--saes", str(listing.root / source.saes)]
    if source.site != "mlp_out":
        words += ["--site", source.site]
    return line(*words, *workspace_option(listing))


def same_activity(source: Source) -> list[str]:
    """Return the options with which `resa-lens activity` reads this run and measures nothing."""
    if source.activity is None:
        return []
    settings = source.activity.settings
    count, longest = settings.generations or (None, None)
    options = {
        "--layers": ",".join(map(str, source.layers)),
        "--text-tokens": settings.tokens,
        "--examples": settings.activity.examples,
        "--threshold": settings.activity.threshold or None,
        "--generations": count,
        "--max-new-tokens": longest,
        "--data": settings.corpus.source,
        "--seed": settings.corpus.seed,
    }
    return [str(word) for pair in options.items() if pair[1] is not None for word in pair]


@st.cache_resource(show_spinner=False, max_entries=30, hash_funcs=HASHES)
def opened(run: Artifact, name: str) -> Groups:
    """Return a table's row groups, once for each state of the file.

    Raises:
        BadInputError: missing, changed, damaged, or not what this version writes.
    """
    return open_groups(run.file(name), run.kind.files[name])


# One feature


@dataclass(frozen=True)
class Activity:
    """A feature's row of features.parquet."""

    row: dict[str, Any]
    edges: tuple[float, ...]
    """Of the histogram's bins."""


def activity(source: Source, layer: int, feature: int) -> Activity | None:
    """Return a feature's figures; None where it fired on none of the documents.

    Raises:
        BadInputError: the table is missing or damaged.
    """
    if source.activity is None:
        return None
    groups = opened(source.activity, FEATURES)
    rows = groups.find(layer, feature)[:1]
    names = FEATURE_SCHEMA.names[: FEATURE_SCHEMA.get_field_index("histogram")]
    _check_whole(rows, names, groups.file)
    return Activity(rows[0], tuple(edges_of(groups.schema, groups.file))) if rows else None


def _check_whole(rows: Sequence[dict[str, Any]], names: Sequence[str], file: Path) -> None:
    """Raise BadInputError where a row lacks a value that our writer always gives."""
    for row in rows:
        for name in names:
            if row[name] is None:
                raise BadInputError(f"{file} has a row without {name}; --force makes it anew")


def examples(source: Source, layer: int, feature: int) -> list[dict[str, Any]]:
    """Return places at which a feature fires, the strongest first, then those drawn.

    Raises:
        BadInputError: the table is missing or damaged.
    """
    if source.activity is None:
        return []
    groups = opened(source.activity, EXAMPLES)
    rows = examples_of(groups, layer, feature)
    _check_whole(rows, groups.schema.names, groups.file)
    return rows


def phases_of(source: Source, numbers: Sequence[int]) -> dict[int, list[str]]:
    """Return the phase of every token of some documents.

    Raises:
        BadInputError: the table is missing or damaged.
    """
    if source.activity is None:
        return {}
    rows = _phases(source.activity)
    rows = rows.filter(pa.array(np.isin(rows["document"].to_numpy(), list(set(numbers)))))
    try:
        return {
            row["document"]: [PHASES[phase] for phase in row["phases"]] for row in rows.to_pylist()
        }
    except (IndexError, TypeError) as error:
        file = source.activity.path / DOCUMENTS
        raise BadInputError(f"{file} names a phase that this version does not know") from error


def document_of(source: Source, number: int) -> tuple[list[int], list[str]]:
    """Return the tokens of a document of the activity run, and the phase of each.

    Raises:
        BadInputError: the table is missing or damaged, or has no such document.
    """
    if source.activity is None:
        raise BadInputError("activity was not measured here, so there are no documents")
    groups = opened(source.activity, DOCUMENTS)
    for group in range(groups.metadata.num_row_groups):
        if number in groups.read([group], ["document"])["document"].to_numpy():
            rows = groups.read([group], ["document", "ids"]).to_pylist()
            ids = next(row["ids"] for row in rows if row["document"] == number)
            return ids, phases_of(source, [number])[number]
    raise BadInputError(f"{groups.file} has no document {number}; --force makes it anew")


@st.cache_resource(show_spinner=False, max_entries=4, hash_funcs=HASHES)
def _phases(run: Artifact) -> pa.Table:
    groups = opened(run, DOCUMENTS)
    return groups.read(range(groups.metadata.num_row_groups), ["document", "phases"])


def verdict_of(source: Source, layer: int, feature: int) -> Verdict | None:
    """Return the verdict on a feature; None where it was not tested.

    Raises:
        BadInputError: the file is missing or damaged.
    """
    judged = source.judged()
    return judged and judged.of(layer, feature)


def effects_of(source: Source, layer: int, feature: int) -> list[EffectResults]:
    """Return the causal effects of the counted features among which this one is.

    Raises:
        BadInputError: the counts are missing or damaged.
    """
    counted, kept = source.counted(), []
    for run in source.effects:
        rule = run.results.rule
        if source.counts is None or rule not in counted.rules_of(layer, feature):
            continue
        # An older run names the ablated features by a key, and not the counts.
        key = features_key({row.layer: row.features.get(rule, []) for row in counted.layers})
        if is_parent(source.counts, run) or run.settings.features == key:
            kept.append(run.results)
    return kept
