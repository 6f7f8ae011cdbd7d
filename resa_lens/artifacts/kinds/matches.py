"""One run's features looked for in another's."""

from __future__ import annotations

import pyarrow as pa
from pydantic import BaseModel, Field, RootModel

from resa_lens.artifacts.artifact import Artifact, Kind

MATCH_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int32()),
        pa.field("feature", pa.int32()),
        pa.field("fires", pa.bool_()),
        pa.field("cosine_match", pa.int32()),
        pa.field("cosine", pa.float64()),
        pa.field("correlation_match", pa.int32()),
        pa.field("correlation", pa.float64()),
    ]
)
"""matches.parquet: a row a feature of the first run; a match is null where there is none."""


class Results(BaseModel):
    """Results of the manifest."""

    site: str
    models: list[str]
    """The one whose features are looked for, and the one they are looked for in."""
    layers: dict[int, dict[str, float | None]]
    """Share of features with a match, by 0-based layer and kind of match."""


class Settings(BaseModel):
    """Configuration of the manifest."""

    saes: list[str] = Field(default_factory=list)
    """Paths of the SAEs whose features are looked for, and of those in which they are."""


class MatchShare(BaseModel):
    """How many features have a match, beside what the null gives."""

    share: float
    n: int
    ci: tuple[float, float]
    null_share: float
    null_mean: float | None = None
    """Of the matches that chance gives, their mean."""


class LayerMatches(BaseModel):
    """The matches of one layer."""

    layer: int
    threshold: float
    latents: tuple[int, int] | None = None
    """Of the two SAEs."""
    cosine: MatchShare | None
    """None across widths, with the reason."""
    cosine_reason: str | None
    correlation: MatchShare


class AllMatches(RootModel[list[LayerMatches]]):
    """matches.json."""


class Matches(Kind):
    """Matched features."""

    name = "matches"
    folder = "matches"
    title, titles = "matches", "matches"
    column = "Judged"
    command = ("match-features",)
    lighter = "Fewer --text-tokens or --layers take less memory."
    Results = Results
    Settings = Settings
    files = {  # noqa: RUF012 - declared once, never changed
        "matches.parquet": MATCH_SCHEMA,
        "matches.json": AllMatches,
    }

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Name the two models."""
        first, *others = dict.fromkeys(artifact.results.models) or ["a model"]
        there = f" of {others[0]}" if others else ""
        return f"One run's features of {first} looked for in another's{there}."

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the site."""
        return artifact.results.site
