"""How often, how strongly and where the features of SAEs fire."""

from __future__ import annotations

from pydantic import BaseModel, Field

from resa_lens.artifacts.artifact import Artifact, Kind
from resa_lens.artifacts.feature_tables import (
    DOCUMENT_SCHEMA,
    DOCUMENTS,
    EXAMPLE_SCHEMA,
    EXAMPLES,
    FEATURE_SCHEMA,
    FEATURES,
)


class MeasuredLayer(BaseModel):
    """The SAE of one layer."""

    layer: int
    latents: int


class Results(BaseModel):
    """Results of the manifest."""

    layers: list[MeasuredLayer] = Field(min_length=1)
    tokens: dict[str, int]
    """By phase."""
    documents: int
    site: str
    model: str
    n_layers: int


class Measurement(BaseModel):
    """How features were measured."""

    examples: int | None = None
    threshold: float | None = None


class Corpus(BaseModel):
    """Where the documents come from."""

    source: str | None = None
    seed: int | None = None


class Settings(BaseModel):
    """Configuration of the manifest."""

    activity: Measurement = Field(default_factory=Measurement)
    corpus: Corpus = Field(default_factory=Corpus)
    tokens: int | None = None
    generations: tuple[int, int] | None = None
    """How many documents the model wrote itself, and how long they may be; None of a corpus."""


class Activity(Kind):
    """An activity run."""

    name = "activity"
    folder = "activity"
    title, titles = "activity", "activity runs"
    column = "Measured"
    command = ("activity",)
    recipe = 3  # the lens over the whole vocabulary, as a histogram
    lighter = "A smaller --memory-limit goes on with what is kept; fewer --examples begin anew."
    Results = Results
    Settings = Settings
    files = {  # noqa: RUF012 - declared once, never changed
        FEATURES: FEATURE_SCHEMA,
        EXAMPLES: EXAMPLE_SCHEMA,
        DOCUMENTS: DOCUMENT_SCHEMA,
    }

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say how much text it was measured on."""
        results: Results = artifact.results
        return (
            f"How often and how strongly each feature of {results.model} fires, in which phase, "
            f"with examples: {sum(results.tokens.values()):,} tokens of {results.documents:,} "
            "documents."
        )

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the length of the text."""
        return f"{sum(artifact.results.tokens.values()):,} tokens"
