"""The quality of SAEs by phase, on held-out documents."""

from __future__ import annotations

from pydantic import BaseModel, RootModel

from resa_lens.artifacts.artifact import Artifact, Kind


class PhaseFigures(BaseModel):
    """An SAE on the tokens of one phase; None where a figure has no meaning."""

    tokens: int
    documents: int
    fvu: float | None
    l0: float | None
    dead_share: float | None
    loss_change: float | None
    """Loss with the reconstruction in the layer's place minus without, nats a token."""
    loss_change_se: float | None
    """Its standard error over documents."""
    loss_recovered: float | None


class Results(BaseModel):
    """Results of the manifest."""

    layers: dict[int, PhaseFigures]
    """Over all tokens, by 0-based layer."""
    model: str
    site: str | None = None


class Figures(RootModel[dict[int, dict[str, PhaseFigures]]]):
    """quality.json: figures by 0-based layer and phase, and over all tokens under "all"."""


class Quality(Kind):
    """A quality report."""

    name = "quality"
    folder = "quality"
    title, titles = "SAE quality", "SAE quality reports"
    column = "Measured"
    Results = Results
    files = {"quality.json": Figures}  # noqa: RUF012 - declared once, never changed

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say of which SAEs it is."""
        results: Results = artifact.results
        place = f" at {results.site}" if results.site else ""
        return f"Quality of SAEs of {results.model}{place}, measured anew."

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the site."""
        return artifact.results.site or ""
