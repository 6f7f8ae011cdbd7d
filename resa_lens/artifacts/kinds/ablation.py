"""Features changed while the model answers: dose and response, beside random features."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from resa_lens.artifacts.artifact import Artifact, Kind
from resa_lens.models.hookpoints import list_layers

_OPEN = with_config(ConfigDict(extra="allow"))
"""Rows keep what is not named here."""


class Results(BaseModel):
    """Results of the manifest; differences of the accuracy, shares of 1."""

    layer: int
    site: str
    effect: float
    control: float
    """Of random features, on average."""
    p_value: float


class Place(BaseModel):
    """Where features were changed."""

    layer: int


class Change(BaseModel):
    """Which features were changed, and where."""

    point: Place
    features: list[int]


class Settings(BaseModel):
    """Configuration of the manifest."""

    ablation: Change


@_OPEN
class Difference(TypedDict):
    """Of the accuracy, beside another arm on the same questions."""

    difference: float
    ci: tuple[float, float]
    p_value: float


@_OPEN
class Controls(TypedDict):
    """Random features at one strength."""

    effect: Difference
    beyond: Difference
    each: list[float]


@_OPEN
class Dose(TypedDict):
    """One strength, as the figure of dose and response takes it."""

    strength: float
    accuracy: float
    effect: Difference
    control: Controls | None


class AblationResults(BaseModel):
    """results.json; differences of the accuracy, shares of 1."""

    layer: int
    features: list[int]
    rule: str | None
    """That counts the features; None where they were named."""
    kind: str
    strength: float
    effect: float
    effect_ci: tuple[float, float]
    effect_p_value: float
    beyond: float
    """What the features do beyond random ones."""
    beyond_ci: tuple[float, float]
    p_value: float
    n: int
    note: str
    doses: list[Dose]
    controls: list[dict[str, Any]]
    """The random sets."""
    warnings: list[str] = Field(default_factory=list)


class Ablation(Kind):
    """An ablation."""

    name = "ablation"
    folder = "ablations"
    title, titles = "ablation", "ablations"
    column = "Judged"
    command = ("ablate",)
    recipe = 3  # questions that do not fit the context are not asked
    lighter = "A smaller --batch-size goes on with what is kept."
    Results = Results
    Settings = Settings
    files = {"results.json": AblationResults}  # noqa: RUF012 - declared once, never changed

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say what the answers become, and what random features make of them."""
        results: Results = artifact.results
        return (
            f"Features at {results.site}, layer {results.layer} (0-based), changed while the model "
            f"answers: accuracy {100 * results.effect:+.1f} points, random features "
            f"{100 * results.control:+.1f} on average (p = {results.p_value:.2g})."
        )

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the layer."""
        return list_layers([artifact.results.layer], one_based=one_based)
