"""Sparse autoencoders of a model, one a layer."""

from __future__ import annotations

from pydantic import BaseModel, Field, RootModel

from resa_lens.artifacts.artifact import Artifact, Kind


class LayerQuality(BaseModel):
    """The SAE of one layer on held-out sequences."""

    layer: int
    fvu: float
    fvu_special: float | None = None
    """With BOS, EOS and padding among the tokens."""
    l0: float | None = None
    dead_share: float | None = None


class Results(BaseModel):
    """Results of the manifest."""

    layers: list[LayerQuality] = Field(min_length=1)
    site: str
    model: str
    n_layers: int
    tokens: int = 0
    """Of the training."""
    resumed_at_tokens: int = 0


class Training(BaseModel):
    """How the SAEs were trained, as far as readers need it."""

    latents: int
    seed: int


class Settings(BaseModel):
    """Configuration of the manifest."""

    sae: Training


class Losses(RootModel[dict[int, list[float]]]):
    """losses.json: of each layer, step by step."""


class Saes(Kind):
    """Trained SAEs."""

    name = "saes"
    recipe = 2  # BOS, EOS and padding are left out unless they are asked for
    folder = "saes"
    title, titles = "SAEs", "SAEs"
    column = "SAEs"
    command = ("train-saes",)
    lighter = (
        "A smaller --memory-limit goes on with what is kept; a smaller --batch or fewer "
        "--latents begin anew."
    )
    Results = Results
    Settings = Settings
    files = {"losses.json": Losses}  # noqa: RUF012 - declared once, never changed

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say how many SAEs there are, and how much of the activations they leave unexplained."""
        results: Results = artifact.results
        training: Training = artifact.settings.sae
        fvu = [row.fvu for row in results.layers]
        return (
            f"Sparse autoencoders of {len(fvu)} layer(s) of {results.model} at {results.site}, "
            f"{training.latents:,} latents each, seed {training.seed}; share of the variance that "
            f"they leave unexplained on held-out text (FVU): {min(fvu):.4f} to {max(fvu):.4f}."
        )

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Say how wide they are, and which seed they began from."""
        training: Training = artifact.settings.sae
        return f"{training.latents:,} latents, seed {training.seed}"
