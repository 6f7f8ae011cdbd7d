"""The files of the workspace that speak of features, as this version writes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class MeasuredLayer(BaseModel):
    """A layer of an activity run."""

    layer: int
    latents: int


class ActivityResults(BaseModel):
    """Results of an activity run's manifest."""

    layers: list[MeasuredLayer] = Field(min_length=1)
    tokens: dict[str, int]
    documents: int
    site: str
    model: str
    n_layers: int


class CountedLayer(BaseModel):
    """Features of one layer that each rule names."""

    layer: int
    features: dict[str, list[int]]


class CountedFeatures(BaseModel):
    """features.json of a counts run."""

    layers: list[CountedLayer]

    def rules_of(self, layer: int, feature: int) -> list[str]:
        """The rules that count a feature, the strictest first."""
        for row in self.layers:
            if row.layer == layer:
                return [rule for rule, held in row.features.items() if feature in held]
        return []


class TrialShare(BaseModel):
    """In how many trials of one kind a feature fired."""

    fired: int
    n: int
    share: float
    ci: tuple[float, float]


class Twin(BaseModel):
    """The nearest feature of another seed's SAE."""

    cosine: float
    feature: int
    correlation: float | None
    elsewhere: float | None = None
    found: bool


class Beside(BaseModel):
    """What the feature's rule counts at its layer of the random-weights model."""

    counted: int
    passing: int = Field(alias="pass")
    active: int


class StoredVerdict(BaseModel):
    """One feature of verdicts.json, as `features.falsify.FeatureVerdict.to_dict` writes it."""

    layer: int
    feature: int
    rule: str
    rules: list[str]
    verdict: str
    reason: str
    places: list[str]
    shares: dict[str, TrialShare]
    injection_p: float
    other_seed: Twin | None
    failed: list[str]
    random_weights: Beside | None = None


class Verdicts(BaseModel):
    """verdicts.json."""

    features: list[StoredVerdict]
    trials: dict[str, int]
    skipped: list[str]

    def of(self, layer: int, feature: int) -> StoredVerdict | None:
        """The verdict on a feature."""
        return next(
            (v for v in self.features if (v.layer, v.feature) == (layer, feature)),
            None,
        )


class NamedFeature(BaseModel):
    """One of the best features by a score, with its interval."""

    layer: int
    feature: int
    ci: tuple[float, float] | None = None


class ScoreTotals(BaseModel):
    """One score of summary.json."""

    score: str
    tested: int
    top: list[NamedFeature] = Field(default_factory=list)


class ScoreSummary(BaseModel):
    """summary.json of a scores run."""

    design: str
    correction: str
    draws: int
    scores: list[ScoreTotals] = Field(min_length=1)

    def interval(self, score: str, layer: int, feature: int) -> tuple[float, float] | None:
        """The 95 % interval, where the run kept one."""
        for held in self.scores:
            if held.score == score:
                for row in held.top:
                    if (row.layer, row.feature) == (layer, feature):
                        return row.ci
        return None


class Ablation(BaseModel):
    """results.json of an ablation; differences of the accuracy, shares of 1."""

    layer: int
    features: list[int]
    rule: str | None
    kind: str
    strength: float
    effect: float
    effect_ci: tuple[float, float]
    effect_p_value: float
    beyond: float
    beyond_ci: tuple[float, float]
    p_value: float
    n: int
    note: str
    doses: list[dict[str, Any]]
    controls: list[Any]


class AttributedFeature(BaseModel):
    """What one feature does to a measure of the model, in nats."""

    feature: int
    active: int
    documents: int
    gradient: float
    patching: float
    ci: tuple[float, float]
    p_value: float
    p_corrected: float


class Attribution(BaseModel):
    """results.json of an attribution."""

    layer: int
    metric: str
    effects: list[AttributedFeature]
    documents: int
    loss: float


class LayerEffect(BaseModel):
    """What ablating a layer's counted features does to the loss, in nats (`features.effects`)."""

    value: float
    se: float
    n: int
    control: float
    target: float
    p_value: float
    features: int
    controls: int


class LayerEffects(BaseModel):
    """Results of an effects run's manifest."""

    layers: dict[int, LayerEffect]
    rule: str
