"""A model with its adapters merged into the weights."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from resa_lens.artifacts.artifact import Artifact, Kind


class Results(BaseModel):
    """Results of the manifest."""

    rounding: dict[str, Any] = Field(default_factory=dict)
    """What storing the weights in their dtype changes."""
    notes: list[str] = Field(default_factory=list)


class Settings(BaseModel):
    """Configuration of the manifest."""

    base: str = "a model"
    adapters: list[dict[str, Any]] = Field(default_factory=list)
    dtype: str = "float32"


class MergedModel(Kind):
    """A merged model, in the layout of transformers."""

    name = "model"
    folder = "models"
    by_model = False
    title, titles = "model", "models"
    column = "Model"
    command = ("merge",)
    lighter = "Use a machine with more memory: all weights are held in float32."
    Results = Results
    Settings = Settings

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say what was merged into what."""
        settings: Settings = artifact.settings
        count = len(settings.adapters)
        return f"{settings.base} with {count} adapter(s) merged into it, as {settings.dtype}."

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the dtype."""
        return artifact.settings.dtype
