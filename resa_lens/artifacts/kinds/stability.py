"""Whether a recommendation returns with other prompts, rules and SAE seeds."""

from __future__ import annotations

from pydantic import BaseModel

from resa_lens.artifacts.artifact import Artifact, Kind


class Results(BaseModel):
    """Results of the manifest."""

    verdict: str
    reason: str
    tables: int
    site: str
    model: str
    n_layers: int


class Table(BaseModel):
    """The recommendation of one table."""

    name: str
    factors: dict[str, str]
    """What it was made with."""
    n: float
    verdict: str
    recommended: list[int]
    selector: str
    reason: str


class Pair(BaseModel):
    """Two tables compared."""

    a: str
    b: str
    differ: list[str]
    spearman: float | None
    spearman_p: float | None
    alignment: float | None
    alignment_p: float | None
    same_first: bool | None


class FactorAgreement(BaseModel):
    """Pairs that differ in one factor alone, or between blocks."""

    factor: str
    pairs: int
    spearman: float | None
    spearman_p: float | None
    answered: int
    same_first: int
    chance: float
    draws: int


class LayerTables(BaseModel):
    """How many tables recommend a layer."""

    layer: int
    tables: int


class StabilityReport(BaseModel):
    """stability.json, as `layers.stability.Stability.to_dict` writes it."""

    tables: list[Table]
    pairs: list[Pair]
    factors: list[FactorAgreement]
    between: FactorAgreement | None
    blocks: int
    layers: list[int]
    first: list[LayerTables]
    recommended: list[LayerTables]
    verdict: str
    reason: str
    next_step: str


class Stability(Kind):
    """A stability report."""

    name = "stability"
    folder = "stability"
    title, titles = "stability", "stability reports"
    column = "Judged"
    command = ("stability",)
    recipe = 2  # a trend over the layers has a verdict of its own
    Results = Results
    files = {"stability.json": StabilityReport}  # noqa: RUF012 - declared once, never changed

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say what was varied, and the verdict."""
        results: Results = artifact.results
        return (
            f"Recommendations for {results.model} with other prompts, counting rules and SAE "
            f"seeds: {results.verdict}."
        )

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the verdict."""
        return artifact.results.verdict
