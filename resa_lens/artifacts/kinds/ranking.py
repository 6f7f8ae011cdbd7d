"""Experts ranked for a target, beside the nulls."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from resa_lens.artifacts.artifact import Artifact, Kind


@with_config(ConfigDict(extra="allow"))
class RankedExpert(TypedDict):
    """One expert."""

    layer: int
    expert: int
    scores: dict[str, float]
    errors: dict[str, float]
    p_value: float
    """Of labels exchanged between documents."""
    p_holm: float
    type_p: float | None
    """Share of ordinary token types whose best expert answers as strongly; None without a tag."""


class Results(BaseModel):
    """Results of the manifest."""

    model: str
    target: str
    by: str
    layer: int
    """Of the first expert."""
    expert: int
    score: float
    reached_by: int | None
    """Ordinary token types whose best expert reaches that score; None where none stand for it."""
    types: int | None
    documents: int


class RankingResults(BaseModel):
    """ranking.json."""

    target: str
    by: str
    classes: list[str] | None
    experts: list[RankedExpert] = Field(min_length=1)
    """The strongest first; all of them."""
    null: dict[str, Any]
    documents: int
    tokens: int
    notes: list[str] = Field(default_factory=list)


class Ranking(Kind):
    """A ranking of experts."""

    name = "ranking"
    folder = "rankings"
    title, titles = "ranking of experts", "rankings of experts"
    column = "Measured"
    command = ("experts", "rank")
    lighter = "Fewer --text-tokens, or --dtype bfloat16, take less memory."
    Results = Results
    files = {"ranking.json": RankingResults}  # noqa: RUF012 - declared once, never changed

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Name the first expert, and say how many ordinary tokens have one as specific."""
        results: Results = artifact.results
        reached = (
            ""
            if results.reached_by is None
            else f"; {results.reached_by} of {results.types} ordinary token types have one as "
            "specific"
        )
        return (
            f"Experts of {results.model} ranked for {results.target} by {results.by}: first is "
            f"{results.layer}:{results.expert} with {results.score:.2f}{reached}."
        )

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the target."""
        return str(artifact.results.target)
