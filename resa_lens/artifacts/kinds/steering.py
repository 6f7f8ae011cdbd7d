"""Experts changed while the model runs: loss, accuracy and length, beside random sets."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from resa_lens.artifacts.artifact import Artifact, Kind


class Results(BaseModel):
    """Results of the manifest; changes of the loss of thoughts, nats a token."""

    model: str
    experts: list[tuple[int, int]] = Field(min_length=1)
    """(0-based layer, expert)."""
    how: str
    where: str
    effect: float
    control: float
    """Of random sets, on average."""
    p_value: float
    accuracy: float
    """Change of the accuracy, a share."""


class SteeringResults(BaseModel):
    """steering.json."""

    experts: list[dict[str, Any]]
    how: str
    beta: float
    where: str
    effect: float
    control: float
    p_value: float
    doses: list[dict[str, Any]]
    """By number of experts: change of the loss by phase, and of accuracy and length."""
    null: dict[str, Any]
    """The random sets with their uses, and the best experts of other token types."""
    documents: int
    notes: list[str] = Field(default_factory=list)


class Steering(Kind):
    """A change of experts."""

    name = "steering"
    folder = "steerings"
    title, titles = "steering of experts", "steerings of experts"
    column = "Judged"
    command = ("experts", "steer")
    lighter = "A smaller --limit goes on with what is kept."
    Results = Results
    files = {"steering.json": SteeringResults}  # noqa: RUF012 - declared once, never changed

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say what becomes of thoughts and answers, and what random experts make of them."""
        results: Results = artifact.results
        n = len(results.experts)
        return (
            f"{n} expert{'' if n == 1 else 's'} of {results.model} changed ({results.how}): loss "
            f"of thoughts {results.effect:+.3f} nats a token, random experts "
            f"{results.control:+.3f} on average (p = {results.p_value:.2g}); accuracy "
            f"{100 * results.accuracy:+.1f} points."
        )

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the experts."""
        shift = int(one_based)
        return ", ".join(f"{layer + shift}:{e}" for layer, e in artifact.results.experts)
