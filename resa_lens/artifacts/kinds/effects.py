"""What ablating each layer's counted features does to the loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, RootModel

from resa_lens.artifacts.artifact import Artifact, Kind


class LayerEffect(BaseModel):
    """The change of the loss beyond that with random features of equal mass, nats."""

    value: float
    se: float
    n: int
    """Documents."""
    control: float
    target: float
    p_value: float
    features: int
    controls: int
    """Random sets."""


class Results(BaseModel):
    """Results of the manifest."""

    layers: dict[int, LayerEffect]
    """By 0-based layer."""
    rule: str
    """That counts the features."""
    site: str
    model: str = "a model"


class Settings(BaseModel):
    """Configuration of the manifest."""

    features: str = ""
    """Key of the features that were ablated: see `features_key`."""


class LayerEffects(RootModel[dict[int, LayerEffect]]):
    """effects.json: by 0-based layer."""


class Effects(Kind):
    """Causal effects of layers."""

    name = "effects"
    folder = "effects"
    title, titles = "layer effects", "layer effects"
    column = "Judged"
    Results = Results
    Settings = Settings
    files = {"effects.json": LayerEffects}  # noqa: RUF012 - declared once, never changed

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say what was measured."""
        return f"What each layer's counted features do to the loss of {artifact.results.model}."

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the site."""
        return artifact.results.site


def features_key(features: Mapping[int, Sequence[int]]) -> str:
    """Return 8 hex digits that stand for the ablated features of each 0-based layer."""
    text = json.dumps({str(k): list(v) for k, v in features.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
