"""Layers to tune, recommended from counts by a selector, with a verdict."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, field_validator

from resa_lens.artifacts.artifact import Artifact, Kind
from resa_lens.models.hookpoints import describe_layer, list_layers

Effect = float | tuple[float, float] | tuple[float, float, float]
"""Of a layer: a value, its standard error, and that error's degrees of freedom."""


class Results(BaseModel):
    """Results of the manifest."""

    recommended: list[int] = Field(min_length=1)
    """0-based, the best first."""
    selector: str
    """That decided: "middle" where the one asked for found no support."""
    verdict: str
    reason: str
    site: str
    model: str
    n_layers: int


class Settings(BaseModel):
    """Configuration of the manifest."""

    rule: str
    """Of the counts that the selector read."""
    selector: str
    """That was asked for."""
    recipe: str
    causal: dict[int, Effect] = Field(default_factory=dict)
    """Of ablating each layer's counted features, where the selector reads that."""
    insertion: dict[int, Effect] = Field(default_factory=dict)
    """Of inserting each layer's SAE, where the selector reads that."""
    gradient: dict[int, Effect] = Field(default_factory=dict)
    """Gradient energy of fresh adapters by layer, where the selector reads that."""
    change: dict[int, Effect] = Field(default_factory=dict)
    """Change of activations to the target by layer, where the selector reads that."""


class LayerFeatures(BaseModel):
    """The features of one layer."""

    layer: int
    features: float


class StoredRecommendation(BaseModel):
    """recommendation.json, as `layers.selectors.Recommendation.to_dict` writes it."""

    selector: str
    requested: str
    layers: list[LayerFeatures]
    recommended: list[int] = Field(min_length=1)
    verdict: str
    reason: str
    next_step: str
    n_layers: int
    fit: Any = None
    """A `layers.MixtureFit`; None where no mixture was fitted."""

    @field_validator("fit")
    @classmethod
    def _fit(cls, value: Any) -> Any:
        # Scipy comes with it: only who reads a recommendation waits for that.
        from resa_lens.layers import MixtureFit

        return value if value is None else TypeAdapter(MixtureFit).validate_python(value)


class Recommendation(Kind):
    """A recommendation."""

    name = "recommendation"
    folder = "recommendations"
    title, titles = "recommendation", "recommendations"
    column = "Judged"
    command = ("recommend-layers",)
    recipe = 2  # a trend over the layers has a verdict of its own, and K = 2 more starts
    Results = Results
    Settings = Settings
    files = {"recommendation.json": StoredRecommendation}  # noqa: RUF012 - declared once

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say which layers are recommended, and how far that is supported."""
        results: Results = artifact.results
        layers = "; ".join(describe_layer(n, results.n_layers) for n in results.recommended)
        return f"Layers of {results.model} to tune: {layers}. Verdict: {results.verdict}."

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the layers."""
        return list_layers(artifact.results.recommended, one_based=one_based)
