"""What the pages read of the workspace: checked, cached by path and time, never written.

A damaged artifact is a problem to show, not an error that hides the others.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import streamlit as st
from pydantic import BaseModel, Field, ValidationError

from resa_lens.app.listing import Artifact as Artifact
from resa_lens.app.listing import Listing as Listing
from resa_lens.app.listing import scan as scan
from resa_lens.app.listing import state as state
from resa_lens.errors import BadInputError
from resa_lens.hookpoints import describe_layer
from resa_lens.layers import MixtureFit, read_table
from resa_lens.resources import data_path
from resa_lens.stats import Interval, PairedComparison, compare_paired

DEMO = "resa-lens demo"
PAPER_TABLE = "paper/table6_hookpoints.csv"
PAPER_MODELS = "paper/tables3_4_5_models.csv"
PAPER_LAYERS = 28

Stored = TypeVar("Stored", bound=BaseModel)


class LayerCounts(BaseModel):
    """Features of one layer under each rule."""

    layer: int
    all: int
    any: int
    either: int


class Counts(BaseModel):
    """Results of a counts manifest."""

    layers: list[LayerCounts] = Field(min_length=1)
    site: str
    model: str
    n_layers: int

    def table(self, rule: str) -> dict[int, int]:
        """{0-based layer: features} under a rule."""
        return {row.layer: int(getattr(row, rule)) for row in self.layers}


class LayerQuality(BaseModel):
    """An SAE on held-out sequences."""

    layer: int
    fvu: float
    l0: float | None = None
    dead_share: float | None = None


class Saes(BaseModel):
    """Results of an SAE manifest."""

    layers: list[LayerQuality] = Field(min_length=1)


class StoredRecommendation(BaseModel):
    """recommendation.json, as `layers.selectors.Recommendation.to_dict` writes it."""

    selector: str
    recommended: list[int] = Field(min_length=1)
    verdict: str
    reason: str
    next_step: str
    n_layers: int
    fit: MixtureFit | None = None


class StoredScore(BaseModel):
    """Accuracy over some questions, 0 to 1."""

    accuracy: float
    n: int
    ci: tuple[float, float]

    def point(self) -> tuple[float, Interval, int]:
        """As `plots.scores_figure` takes it."""
        return self.accuracy, self.ci, self.n


class Scores(StoredScore):
    """results.json of an evaluation."""

    by_task: dict[str, StoredScore]
    by_level: dict[int, StoredScore]

    def groups(self) -> dict[str, tuple[float, Interval, int]]:
        """All questions, then by level, then by family."""
        found = {"all": self.point()}
        found |= {f"level {level}": self.by_level[level].point() for level in sorted(self.by_level)}
        return found | {name: self.by_task[name].point() for name in sorted(self.by_task)}


class AdapterResults(BaseModel):
    """Results of an adapter's manifest."""

    layer: int | None
    """None where texts were imitated in place of SAE-Tuning."""
    site: str | None
    n_layers: int

    def what(self, control: str | None) -> str:
        """Say what the adapter was made with."""
        if self.layer is None:
            return f"Fine-tuned in place of SAE-Tuning: {control}"
        place = f"{describe_layer(self.layer, self.n_layers)}, site {self.site}"
        if control:
            return f"Tuned with the control {control} in the SAE's place: {place}"
        return f"Tuned through the SAE of {place}"


@dataclass(frozen=True)
class Tuning:
    """An adapter with its scores before and after, on the same questions."""

    adapter: Artifact
    base: Artifact
    tuned: Artifact


def checked(kind: type[Stored], values: Any, where: Path) -> Stored:
    """Read stored values.

    Raises:
        BadInputError: they are not what this version writes.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise BadInputError(
            f"{where} is damaged or of another version, at {place or 'its top'}; remove its "
            f"folder and make it again, for example with: {DEMO}"
        ) from error


def read(kind: type[Stored], file: Path) -> Stored:
    """Read a stored JSON file, once for each state of it.

    Raises:
        BadInputError: missing, damaged, or not what this version writes.
    """
    try:
        text = _text(str(file), state(file))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(
            f"{file} is missing or unreadable; make it again, for example with: {DEMO}"
        ) from error
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise BadInputError(
            f"{file} is damaged or of another version; remove its folder and make it again, for "
            f"example with: {DEMO}"
        ) from error


@st.cache_data(show_spinner=False, max_entries=200)
def _text(file: str, changed: int) -> str:
    return Path(file).read_text()


def recommendations(listing: Listing, counts: Artifact) -> list[Artifact]:
    """The recommendations made of a counts run, the newest first."""
    return [
        a
        for a in listing.of("recommendation")
        if a.manifest.config.get("counts") == counts.relative
    ]


def saes_of(listing: Listing, counts: Artifact) -> Artifact | None:
    """The SAEs that were counted, where they lie in the workspace."""
    found = listing.at(str(counts.manifest.config.get("saes", "")))
    return found if found and found.manifest.kind == "saes" else None


def activity_of(listing: Listing, saes: str) -> Artifact | None:
    """The newest activity of these SAEs: what a link to their features names."""
    return next((a for a in listing.of("activity") if saes in a.manifest.parents), None)


def tunings(listing: Listing, weights: str) -> list[Tuning]:
    """The adapters of a model (by the hash of its weights) that were scored, the newest first."""
    evals = listing.of("eval")
    found = []
    for adapter in listing.of("adapter"):
        if adapter.weights != weights:
            continue
        for tuned in evals:
            # By name: a workspace may have been moved since.
            if Path(str(tuned.manifest.results.get("model", ""))).name != adapter.path.name:
                continue
            same = [b for b in evals if b.weights == weights and _asked(b) == _asked(tuned)]
            if same:
                found.append(Tuning(adapter, same[0], tuned))
                break
    return found


def _asked(run: Artifact) -> tuple[Any, ...]:
    config = run.manifest.config
    return config.get("questions"), config.get("eval"), config.get("source")


def comparison(tuning: Tuning) -> PairedComparison:
    """Compare the answers before and after, question by question.

    Raises:
        BadInputError: the samples are missing, damaged, or of different questions.
    """
    files = [run.path / "samples.parquet" for run in (tuning.base, tuning.tuned)]
    try:
        return _comparison([str(file) for file in files], [state(file) for file in files])
    except (OSError, pa.ArrowException, KeyError) as error:
        raise BadInputError(
            f"{files[0]} or {files[1]} is missing or damaged; score again, for example with: {DEMO}"
        ) from error


@st.cache_data(show_spinner=False, max_entries=100)
def _comparison(files: Sequence[str], changed: Sequence[int]) -> PairedComparison:
    base, tuned = (_correct(Path(file)) for file in files)
    if base.keys() != tuned.keys():
        raise BadInputError(f"{files[0]} and {files[1]} answer different questions")
    ids = sorted(base)
    return compare_paired([base[i] for i in ids], [tuned[i] for i in ids])


def _correct(file: Path) -> dict[str, float]:
    """{question: share of right answers}."""
    rows = pq.read_table(file, columns=["id", "correct"])
    rows = rows.set_column(1, "correct", rows["correct"].cast(pa.float64()))
    means = rows.group_by("id").aggregate([("correct", "mean")])
    return dict(zip(means["id"].to_pylist(), means["correct_mean"].to_pylist(), strict=True))


@st.cache_data(show_spinner=False, max_entries=200)
def fitted(
    layers: tuple[int, ...], values: tuple[float, ...], recipe: str, seed: int
) -> MixtureFit:
    """Fit a mixture over layers, once for each profile."""
    from resa_lens.layers.mixture import fit_mixture

    return fit_mixture(dict(zip(layers, values, strict=True)), recipe=recipe, seed=seed)


@dataclass(frozen=True)
class PaperTable:
    """The paper's Table 6: one model a layer, and the feature counts."""

    counts: dict[int, float]
    """{0-based layer: features}."""
    scores: dict[int, float]
    """{0-based layer: mean of six benchmarks, %}."""
    base: float | None
    """The untuned model's mean, Table 3."""


@st.cache_data(show_spinner=False)
def paper_table() -> PaperTable:
    """Read the paper's table.

    Raises:
        BadInputError: this installation lacks it.
    """
    file = data_path(PAPER_TABLE)
    with data_path(PAPER_MODELS).open(newline="", encoding="utf-8") as handle:
        first = next(csv.DictReader(handle))
    return PaperTable(
        read_table(file, "feature_count"), read_table(file, "average"), float(first["average"])
    )
