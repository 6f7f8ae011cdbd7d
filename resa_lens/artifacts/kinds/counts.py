"""Counts of think-tag exclusive features, by layer and rule."""

from __future__ import annotations

from pydantic import BaseModel, Field

from resa_lens.artifacts.artifact import Artifact, Kind

RULES = ("all", "any", "either")


class LayerCounts(BaseModel):
    """Features of one layer under each rule."""

    layer: int
    all: int
    any: int
    either: int
    shared: dict[str, int] = Field(default_factory=dict)
    """By rule, features that only a token of both tags would make."""


class Results(BaseModel):
    """Results of the manifest."""

    layers: list[LayerCounts] = Field(min_length=1)
    site: str
    model: str
    n_layers: int
    warnings: list[str] = Field(default_factory=list)
    control: str | None = None

    def table(self, rule: str) -> dict[int, int]:
        """Return {0-based layer: features} under a rule."""
        return {row.layer: int(getattr(row, rule)) for row in self.layers}


class CountedLayer(BaseModel):
    """Features of one layer that each rule names."""

    layer: int
    active: int
    features: dict[str, list[int]]
    shared: dict[str, int] = Field(default_factory=dict)


class Features(BaseModel):
    """features.json."""

    layers: list[CountedLayer]

    def by_layer(self, rule: str) -> dict[int, list[int]]:
        """Return {0-based layer: features} under a rule, without layers that have none."""
        table = {row.layer: row.features.get(rule, []) for row in self.layers}
        return {layer: features for layer, features in table.items() if features}

    def rules_of(self, layer: int, feature: int) -> list[str]:
        """Return the rules that count a feature, the strictest first."""
        for row in self.layers:
            if row.layer == layer:
                return [rule for rule, named in row.features.items() if feature in named]
        return []


class Counts(Kind):
    """Counted features."""

    name = "counts"
    folder = "counts"
    title, titles = "counts", "counts"
    column = "Measured"
    command = ("count-features",)
    Results = Results
    files = {"features.json": Features}  # noqa: RUF012 - declared once, never changed

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say how many features each rule counts."""
        results: Results = artifact.results
        sums = ", ".join(f"{sum(results.table(rule).values())} by rule {rule}" for rule in RULES)
        return (
            f"Features of {results.model} that are active at the think tags of the prompt and "
            f"nowhere else in it, over {len(results.layers)} layers: {sums}."
        )

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Say how many features the weakest rule counts."""
        return f"{sum(artifact.results.table('either').values())} by either tag"
