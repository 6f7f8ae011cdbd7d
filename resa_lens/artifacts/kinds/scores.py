"""Scores of features between reasoning text and other text, each with its null."""

from __future__ import annotations

from pydantic import BaseModel, Field

from resa_lens.artifacts.artifact import Artifact, Kind
from resa_lens.artifacts.feature_tables import SCORE_SCHEMA


class Results(BaseModel):
    """Results of the manifest."""

    site: str
    model: str
    layers: list[int]
    significant: dict[str, int]
    """By score: how many features are significant after correction."""
    warnings: list[str] = Field(default_factory=list)


class TopFeature(BaseModel):
    """One of the best features by a score, with its interval."""

    layer: int
    feature: int
    ci: tuple[float, float] | None = None


class ScoreTotals(BaseModel):
    """One score over all features."""

    score: str
    tested: int
    top: list[TopFeature] = Field(default_factory=list)


class ScoreSummary(BaseModel):
    """summary.json."""

    design: str
    correction: str
    draws: int
    scores: list[ScoreTotals] = Field(min_length=1)
    nulls: dict[str, str] = Field(default_factory=dict)
    """By score, what chance does in its null; empty of artifacts of recipe 1."""
    informative: float | None = None
    """Share of the labels' variance that position (and document) leave to the contrasts."""

    def interval(self, score: str, layer: int, feature: int) -> tuple[float, float] | None:
        """Return the 95 % interval of a feature's score, where the run kept one."""
        return next(
            (
                row.ci
                for totals in self.scores
                for row in totals.top
                if (totals.score, row.layer, row.feature) == (score, layer, feature)
            ),
            None,
        )


class Scores(Kind):
    """Scored features."""

    name = "scores"
    folder = "scores"
    title, titles = "feature scores", "feature scores"
    column = "Measured"
    command = ("score-features",)
    recipe = 2  # the contrasts' nulls keep positions and documents
    lighter = "Fewer --text-tokens or --layers take less memory."
    Results = Results
    files = {  # noqa: RUF012 - declared once, never changed
        "scores.parquet": SCORE_SCHEMA,
        "summary.json": ScoreSummary,
    }

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Name the scores."""
        results: Results = artifact.results
        return (
            f"Features of {results.model} scored between reasoning and other text: "
            f"{', '.join(results.significant)}."
        )

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Say how many scores there are."""
        return f"{len(artifact.results.significant)} scores"
