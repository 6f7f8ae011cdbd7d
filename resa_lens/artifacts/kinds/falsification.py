"""Counted features put to the test: what survives, and beside what."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, Field, RootModel

from resa_lens.artifacts.artifact import Artifact, Kind


class Tally(BaseModel):
    """What is left of a rule's count, beside a model with random weights."""

    rule: str
    counted: int
    verdicts: dict[str, int]
    survivors: int
    ci: tuple[float, float]
    """95 % interval of the share that survives."""
    active: int
    """Features active on the prompt: what could have been counted."""
    by_texts: int
    """Features that stand by the texts alone."""
    null_counted: int | None = None
    """None, as the next ones, without a model with random weights."""
    null_by_texts: int | None = None
    null_active: int | None = None
    p_value: float | None = None
    p_counted: float | None = None
    null_verdicts: dict[str, int] | None = None


class Summary(BaseModel):
    """What the tests leave of the counts."""

    rules: list[Tally] = Field(min_length=1)
    reason: str
    tests: dict[str, int] = Field(default_factory=dict)
    """How many features fall at each test."""

    @property
    def weakest(self) -> Tally:
        """The tally of the rule that counts most."""
        return max(self.rules, key=lambda tally: tally.counted)


class Results(BaseModel):
    """Results of the manifest."""

    summary: Summary
    site: str
    model: str
    n_layers: int
    skipped: list[str] = Field(default_factory=list)


class Judgement(BaseModel):
    """How features are judged."""

    fires: float = 0.5
    """Share of trials from which a feature counts as firing."""


class Settings(BaseModel):
    """Configuration of the manifest."""

    falsify: Judgement = Field(default_factory=Judgement)


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
    agreement: tuple[int, int] | None = None
    """In how many trials both are active, of those in which the feature is."""
    places: int = 0


class PlaceShare(BaseModel):
    """In which share of the documents a feature fires at one of the tags."""

    share: float
    n: int
    ci: tuple[float, float]


class Dependence(BaseModel):
    """Whether a feature needs something: the share of the trials without it in which it fires."""

    needs: str
    trials: str
    """Their kind."""
    share: float | None = None
    n: int | None = None
    ci: tuple[float, float] | None = None
    open: PlaceShare | None = None
    """Of the phase: at the opening tag of a document."""
    close: PlaceShare | None = None
    correlation: float | None = None
    """Of the seed, with the other SAE's nearest feature."""
    correlation_ci: tuple[float, float] | None = None


class RandomWeights(BaseModel):
    """What the feature's rule counts at its layer of the model with random weights."""

    counted: int = Field(ge=0)
    passing: int = Field(alias="pass")
    active: int = Field(ge=0)


class Verdict(BaseModel):
    """What became of one counted feature, with the evidence."""

    layer: int
    feature: int
    rule: str
    """The strictest rule that counts it."""
    rules: list[str]
    verdict: str
    sentence: str = ""
    """What it needs; of recipe 1 there is none, as of `depends_on` and `by_texts`."""
    reason: str
    depends_on: dict[str, Dependence] = Field(default_factory=dict)
    places: list[str]
    shares: dict[str, TrialShare]
    """By kind of trial."""
    injection_p: float
    other_seed: Twin | None
    failed: list[str]
    by_texts: str | None = None
    random_weights: RandomWeights | None = None


class Verdicts(BaseModel):
    """verdicts.json."""

    features: list[Verdict]
    summary: Summary
    trials: dict[str, int]
    """How many of each kind."""
    skipped: list[str]

    def of(self, layer: int, feature: int) -> Verdict | None:
        """Return the verdict on a feature."""
        return next((v for v in self.features if (v.layer, v.feature) == (layer, feature)), None)

    def by_layer(self, layers: Sequence[int]) -> dict[int, dict[str, int]]:
        """Return {0-based layer: {verdict: features}} for every layer that was counted."""
        table: dict[int, dict[str, int]] = {layer: {} for layer in layers}
        for feature in self.features:
            row = table.setdefault(feature.layer, {})
            row[feature.verdict] = row.get(feature.verdict, 0) + 1
        return dict(sorted(table.items()))

    def null(self) -> dict[str, dict[int, tuple[int, int]]]:
        """Return {rule: {layer: (counted, active)}} with random weights.

        Known where a feature stands under the rule: the artifact keeps it with each feature.
        """
        table: dict[str, dict[int, tuple[int, int]]] = {}
        for feature in self.features:
            if random := feature.random_weights:
                table.setdefault(feature.rule, {})[feature.layer] = random.counted, random.active
        return table


class Trial(BaseModel):
    """A text, and the places where a counted feature may fire."""

    kind: str
    text: str


class Trials(RootModel[list[Trial]]):
    """trials.json."""


class Falsification(Kind):
    """A falsification."""

    name = "falsification"
    folder = "falsified"
    title, titles = "falsification", "falsifications"
    column = "Judged"
    command = ("falsify",)
    recipe = 2  # verdicts are words for measured dependences, and use their intervals
    Results = Results
    Settings = Settings
    files = {  # noqa: RUF012 - declared once, never changed
        "verdicts.json": Verdicts,
        "trials.json": Trials,
    }

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say what the tests leave."""
        results: Results = artifact.results
        return f"Counted features of {results.model} put to the test: {results.summary.reason}."

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Say how many survive of the rule that counts most."""
        tally: Tally = artifact.results.summary.weakest
        return f"{tally.survivors} of {tally.counted} survive" if tally.counted else "none counted"
