"""What features do to a measure of the model, by gradient and by patching."""

from __future__ import annotations

from pydantic import BaseModel, Field

from resa_lens.artifacts.artifact import Artifact, Kind
from resa_lens.models.hookpoints import list_layers


class Agreement(BaseModel):
    """How far the gradient says what patching finds, over features."""

    spearman: float | None
    """None with fewer than three features."""
    p_value: float | None
    n: int
    """Features."""


class Results(BaseModel):
    """Results of the manifest."""

    layer: int
    site: str
    agreement: Agreement
    documents: int


class Settings(BaseModel):
    """Configuration of the manifest."""

    layer: int


class AttributedFeature(BaseModel):
    """What one feature does to the measure, in nats."""

    feature: int
    active: int
    """Tokens where it is active."""
    documents: int
    gradient: float
    patching: float
    ci: tuple[float, float]
    p_value: float
    p_corrected: float


class AttributionResults(BaseModel):
    """results.json."""

    layer: int
    metric: str
    effects: list[AttributedFeature]
    documents: int
    loss: float
    warnings: list[str] = Field(default_factory=list)


class Attribution(Kind):
    """An attribution."""

    name = "attribution"
    folder = "attributions"
    title, titles = "attribution", "attributions"
    column = "Judged"
    command = ("attribute",)
    lighter = "Fewer --text-tokens, or --dtype bfloat16, take less memory."
    Results = Results
    Settings = Settings
    files = {"results.json": AttributionResults}  # noqa: RUF012 - declared once, never changed

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say where, and how far the two measures agree."""
        results: Results = artifact.results
        rho = results.agreement.spearman
        agree = (
            "too few features to compare the two"
            if rho is None
            else f"the two agree with a rank correlation of {rho:.2f}"
        )
        return (
            f"Features at {results.site}, layer {results.layer} (0-based), weighed by gradient x "
            f"activation and by patching; {agree} (n = {results.agreement.n})."
        )

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the layer."""
        return list_layers([artifact.results.layer], one_based=one_based)
