"""Tunings at every layer, with several seeds and controls, each scored."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from resa_lens.artifacts.artifact import Artifact, Kind
from resa_lens.artifacts.kinds.insertion import LayerInsertion

SWEEP, ANSWERS, SCORES = "sweep.json", "answers.parquet", "scores.csv"
Interval = tuple[float, float]
_OPEN = with_config(ConfigDict(extra="allow"))
"""Rows keep what is not named here."""


class Results(BaseModel):
    """Results of the manifest."""

    model: str
    """That was tuned."""
    source: str
    """Whose SAEs it was tuned through."""
    site: str
    preset: str
    n_layers: int
    failed: dict[str, str] = Field(default_factory=dict)
    """Jobs that are left out, with the reason."""
    start: list[LayerInsertion] | None = None
    """What each layer's SAE does when it is inserted and nothing is tuned; None where that was not
    looked at."""


class Job(BaseModel):
    """One tuning."""

    name: str
    layer: int | None
    seed: int
    control: str | None


class Plan(BaseModel):
    """What was to be tuned."""

    layers: list[int]
    controls: list[str] = Field(default_factory=list)


class Settings(BaseModel):
    """Configuration of the manifest."""

    sweep: Plan
    jobs: list[Job]
    target: str
    """Slug of the model that was tuned."""
    source: str
    """Slug of the model whose SAEs it was tuned through."""
    questions: str
    """Digest of the questions: runs are paired where it is the same."""


@_OPEN
class Score(TypedDict):
    """Accuracy of the base model."""

    accuracy: float
    n: int
    ci: Interval


@_OPEN
class JobRow(TypedDict):
    """One run."""

    name: str
    layer: int | None
    seed: int
    control: str | None
    accuracy: float
    n: int


@_OPEN
class LayerRow(TypedDict):
    """A layer: mean over seeds, and its difference to the base model."""

    layer: int
    accuracy: float
    difference: float
    ci: Interval
    simultaneous_ci: Interval
    p_value: float
    adjusted_p: float
    seeds: int


@_OPEN
class PairRow(TypedDict):
    """The SAE minus a control in its place."""

    difference: float
    ci: Interval
    p_value: float
    adjusted_p: float


@_OPEN
class ControlRow(TypedDict):
    """A control, with its difference to the base model and to the SAE at its layer."""

    control: str
    layer: int | None
    accuracy: float
    difference: float
    ci: Interval
    p_value: float
    adjusted_p: float
    seeds: int
    sae_minus_control: PairRow | None


@_OPEN
class AnovaRow(TypedDict):
    """F test of layers against seeds."""

    f_statistic: float | None
    p_value: float | None
    df_between: int
    df_within: int


@_OPEN
class EffectRow(TypedDict):
    """The layer effect."""

    anova: AnovaRow | None
    run_p: float | None
    question_p: float | None


@_OPEN
class CorrelationRow(TypedDict):
    """Counts with scores, over layers."""

    rho: float
    p_value: float
    ci: Interval
    n: int


@_OPEN
class SelectorRow(TypedDict):
    """A selector's layer, held against the sweep; points."""

    selector: str
    layer: int
    score: float
    regret: float
    ci: Interval | None
    gain: float
    gain_ci: Interval | None
    as_good: float


@_OPEN
class RegretRows(TypedDict):
    """All selectors, and a layer at random."""

    selectors: list[SelectorRow]
    random: float
    random_ci: Interval | None


@_OPEN
class PowerRow(TypedDict):
    """The smallest differences that the sweep sees."""

    one_layer: float
    any_layer: float


class SweepTables(BaseModel):
    """sweep.json: what a sweep says, as plain values."""

    n: int
    """Questions."""
    n_layers: int
    """Of the model."""
    base: Score
    jobs: list[JobRow]
    layers: list[LayerRow] = Field(min_length=1)
    """Mean over seeds by layer, its difference to the base model, intervals, p-values."""
    controls: list[ControlRow]
    """The same for each control, and its difference to the SAE at its layer."""
    effect: EffectRow | None
    """The layer effect: F test of runs against seeds, permutations; None with one layer."""
    correlations: dict[str, CorrelationRow]
    """By counting rule: of the layers' scores with their counts; empty below four layers."""
    regrets: RegretRows
    """Every selector's regret, and a layer at random."""
    reasons: dict[str, str]
    """Why each selector chose its layer."""
    power: PowerRow
    """What this sweep could have seen."""
    counts: dict[str, dict[int, float]]
    """By rule and 0-based layer."""
    fvu: dict[int, float]
    """Of the SAEs, by 0-based layer."""
    failed: dict[str, str]
    """Jobs that are left out, with the reason."""

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that the command line promises, and the rest."""
        scores = [
            {key: job[key] for key in ("layer", "seed", "accuracy", "n")}
            for job in self.jobs
            if job["control"] is None
        ]
        names = ("selector", "layer", "regret", "ci", "gain", "gain_ci", "as_good")
        selectors = [{key: row[key] for key in names} for row in self.regrets["selectors"]]
        return {**self.model_dump(), "scores": scores, "selectors": selectors}


class Sweep(Kind):
    """A sweep."""

    name = "sweep"
    folder = "sweeps"
    by_model = False
    title, titles = "sweep", "sweeps"
    column = "Swept"
    command = ("sweep", "--layers", "all", "--seeds", "3")
    recipe = 4  # the mixture tells lumps from trends; 3: too long questions are not asked
    Results = Results
    Settings = Settings
    files = {SWEEP: SweepTables, ANSWERS: None, SCORES: None}  # noqa: RUF012 - declared once

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say how many tunings there are, and through whose SAEs."""
        results: Results = artifact.results
        jobs: list[Job] = artifact.settings.jobs
        layers = {job.layer for job in jobs} - {None}
        return (
            f"{len(jobs)} tunings of {results.model} at {len(layers)} layers with SAEs of "
            f"{results.source}, preset {results.preset}, each scored."
        )

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Say how many tunings there are."""
        return f"{len(artifact.settings.jobs)} tunings"
