"""How much each expert of a mixture is used, by phase and at the tags."""

from __future__ import annotations

from pydantic import BaseModel, Field

from resa_lens.artifacts.artifact import Artifact, Kind
from resa_lens.models.hookpoints import list_layers


class RouterRow(BaseModel):
    """One layer's router."""

    layer: int
    name: str
    experts: int
    k: int
    rule: str | None
    """None where no known rule reproduces the router."""
    error: float
    """Largest difference of a weight under the rule."""
    shared: bool
    predicted_by_token: float
    """Share of the slots that the token alone predicts."""
    least: float
    """Use of the least used expert, 1 where all are used evenly."""
    most: float


class ExpertUse(BaseModel):
    """One expert's use, by phase, tag and "all"."""

    use: dict[str, float]
    error: dict[str, float]
    """Standard error over documents."""
    mass: dict[str, float]


class ExpertRow(BaseModel):
    """One expert."""

    layer: int
    expert: int
    scores: ExpertUse


class Results(BaseModel):
    """Results of the manifest."""

    model: str
    layers: list[int] = Field(min_length=1)
    """That have experts, 0-based."""
    n_layers: int
    experts: int
    """Of a layer."""
    k: int
    documents: int
    tokens: int


class RoutingResults(BaseModel):
    """routing.json."""

    routers: list[RouterRow]
    experts: list[ExpertRow]
    documents: dict[str, int]
    """By phase, tag and "all": those that have such tokens."""
    tokens: dict[str, int]
    unit: str


class Routing(Kind):
    """A map of the experts' use."""

    name = "routing"
    folder = "routings"
    title, titles = "map of experts", "maps of experts"
    column = "Measured"
    command = ("experts", "measure")
    lighter = "Fewer --text-tokens, or --dtype bfloat16, take less memory."
    Results = Results
    files = {"routing.json": RoutingResults}  # noqa: RUF012 - declared once, never changed

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say how large the mixture is and on what it was looked at."""
        results: Results = artifact.results
        return (
            f"Use of {len(results.layers)} x {results.experts} experts of {results.model}, "
            f"{results.k} a token, over {results.documents} documents."
        )

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the layers."""
        return list_layers(artifact.results.layers, one_based=one_based)
