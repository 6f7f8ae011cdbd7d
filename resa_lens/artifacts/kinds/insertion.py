"""What SAEs do when they are inserted, before any tuning."""

from __future__ import annotations

from pydantic import BaseModel, Field

from resa_lens.artifacts.artifact import Artifact, Kind
from resa_lens.models.hookpoints import list_layers


class Inserted(BaseModel):
    """Accuracy with something in the activations' place, and its difference to the model's."""

    accuracy: float
    n: int
    ci: tuple[float, float]
    difference: float
    difference_ci: tuple[float, float]
    difference_se: float
    """Standard error of the difference, over questions."""
    p_value: float


class Cost(BaseModel):
    """What an ablation of the site costs."""

    loss: float | None
    """Change of the loss on thoughts, nats a token; None where the documents hold none."""
    accuracy: Inserted | None
    """None in the short form."""


class LayerInsertion(BaseModel):
    """One layer's SAE, inserted."""

    layer: int
    kl_tuning: float | None
    """D_KL(without || with) on CoT-free documents, nats a token."""
    kl_thoughts: float | None
    """On the thoughts of documents with worked steps; None where there are none."""
    fvu: dict[str, float | None]
    """On the target's activations, by phase and over all tokens."""
    ablation: dict[str, Cost]
    """Zero, and in the full form the mean activation."""
    inserted: dict[str, Inserted]
    """By what stood there: sae, noise, pca, own, oracle."""
    verdict: str
    reason: str


class Results(BaseModel):
    """Results of the manifest."""

    layers: list[LayerInsertion] = Field(min_length=1)
    base: dict[str, object]
    """Accuracy, n and interval of the target as it is."""
    site: str
    model: str
    source: str
    n_layers: int


class Insertion(Kind):
    """An insertion test."""

    name = "insertion"
    folder = "insertions"
    title, titles = "insertion test", "insertion tests"
    column = "Measured"
    command = ("insert",)
    lighter = "A smaller --limit takes less."
    Results = Results

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say what the SAEs do to the answers."""
        results: Results = artifact.results
        best = max(results.layers, key=lambda row: row.inserted["sae"].difference)
        return (
            f"SAEs of {results.source} inserted into {results.model}, nothing tuned: at best "
            f"{100 * best.inserted['sae'].difference:+.1f} points at layer {best.layer} (0-based), "
            f"{best.verdict}."
        )

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the layers."""
        rows = artifact.results.layers
        return list_layers([row.layer for row in rows], one_based=one_based)
