"""What stages that look closer at features do: the configurations alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from resa_lens.config import Config, data_source, setting
from resa_lens.errors import BadInputError
from resa_lens.evals.config import EvalConfig
from resa_lens.features.config import CountConfig
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.texts.config import check_source
from resa_lens.texts.prompts import PHASES

if TYPE_CHECKING:
    from resa_lens.features.interventions import Intervention

Selector = Literal[
    "mixture", "most-features", "middle", "quality", "causal", "blend", "insertion",
    "gradient-probe", "activation-change",
]  # fmt: skip
Recipe = Literal["robust", "paper"]
Phase = Literal["prompt", "think", "answer"]
ChangeKind = Literal["ablate", "scale", "clamp", "steer"]
ChangePlace = Literal["all", "first"]
ScoreName = Literal[
    "all", "any", "either", "reason_score", "cohens_d", "auc", "frequency_ratio"
]  # fmt: skip
DOSES = (0.25, 0.5, 1.0, 2.0)
NO_STEPS = "no-steps"


def check_other(source: str) -> None:
    """Raise BadInputError where other text to score against cannot be meant."""
    if source != NO_STEPS:
        check_source(source)


@dataclass(frozen=True)
class ScoreConfig(Config):
    """Which scores, on which text, against which nulls."""

    scores: tuple[ScoreName, ...] | None = setting(
        None, "Scores; may be repeated, or by commas; by default all that the text allows.",
        "--score",
    )  # fmt: skip
    other: str | None = data_source(
        None,
        "Other text: data whose questions stand with their answers alone, or no-steps (half of "
        "--data without its steps); by default the prompt and answer of the same documents.",
        "--other-data", check=check_other,
    )  # fmt: skip
    """None: the thoughts against the prompt and answer of the same documents.  Else whole documents
    with steps against documents without."""
    tokens: int = setting(16_384, "Tokens of the documents that are looked at.", "--text-tokens",
                          min=1)  # fmt: skip
    words: tuple[str, ...] | None = setting(
        None, 'Reasoning words of reason_score, by commas: "wait,however"; by default ten English '
        "ones, and = and ; for the bundled questions.",
    )  # fmt: skip
    window: tuple[int, int] = (1, 2)
    """Tokens before and after a reasoning word."""
    draws: int = setting(1000, "Draws of each null.", min=10, max=10**7)
    """The smallest p-value is 2 / (draws + 1), 1 / (draws + 1) one-sided."""
    correction: Literal["bh", "holm"] = setting(
        "bh", "For many tests: bh (false discovery rate) or holm (any false call)."
    )
    """Over all layers' features of a score."""
    top: int = setting(20, "Features named of each score, with intervals.", min=1, max=10**6)
    """A run that kept more has them too."""
    count: CountConfig = field(default_factory=CountConfig)
    """The prompt of the exclusive rules."""


@dataclass(frozen=True)
class MatchConfig(Config):
    """How features are matched."""

    threshold: float = setting(
        0.7, "Cosine or correlation above which a feature counts as recovered.",
        "--match-threshold", over=0, max=0.999_999,
    )  # fmt: skip
    tokens: int = setting(16_384, "Tokens of the documents that are looked at.", "--text-tokens",
                          min=1)  # fmt: skip
    """For the correlations."""
    count: CountConfig = field(default_factory=CountConfig)
    """Whose counted features are followed one by one."""


@dataclass(frozen=True)
class InsertionConfig(Config):
    """What is inserted, and what is read and asked with it."""

    arms: Literal["short", "full"] = setting(
        "full",
        "What stands beside the SAE: noise (short), or PCA, the target's own SAE, the source's "
        "activations and both ablations too (full).",
    )
    tokens: int = setting(4096, "Tokens of the documents that are looked at.", "--text-tokens",
                          min=1)  # fmt: skip
    """Of each kind: CoT-free, and with worked steps."""
    seed: int = setting(0, "Seed of everything that is drawn.", min=0, max=2**32 - 1)
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(limit=500))


@dataclass(frozen=True)
class AblationConfig(Config):
    """What is done to which features, and what it is compared with."""

    point: Hookpoint
    features: tuple[int, ...]
    rule: str | None = None
    """The rule that counted the features; None where they were named."""
    kind: ChangeKind = setting("ablate", "What is done to the features.")
    strength: float = setting(1.0, "Dose that effect, control and p-value are of.", max=10**6)
    doses: tuple[float, ...] = setting(DOSES, "Strengths of the curve.", max=10**6)
    phases: tuple[Phase, ...] = setting(PHASES, "Tokens that are changed.")
    at: ChangePlace = setting(
        "all", "Change all tokens of the phases, or the position that decides the first token.",
        later=True,
    )  # fmt: skip
    """first: the prompt's last position, where its phase is among the phases."""
    keep_error: bool = setting(
        True, "Keep, or drop, what the SAE does not explain.", "--keep-error/--no-error"
    )
    value: float | None = setting(
        None, "Of clamp and steer; each feature's mean activation by default."
    )
    """By default the mean over the tokens of the base run's answers where the feature is active: of
    its activation, for steer of the length z |d| that it adds."""
    controls: int = setting(5, "Sets of random features.", "--control-sets", min=1, max=10_000)
    all_doses: bool = setting(False, "Run the random features at every dose, not at --strength.")
    seed: int = setting(0, "Seed of everything that is drawn.", min=0, max=2**32 - 1)
    """Of the random features and of the intervals."""
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadInputError: a value out of its range, a main strength of 0, or what `Intervention`
                refuses.
        """
        super().__post_init__()
        if self.strength == 0:
            raise BadInputError("strength 0 changes nothing; use another, 1 by default")
        self.intervention(1.0, self.features, (1.0,) * len(self.features))
        if self.value is not None and self.kind not in ("clamp", "steer"):
            raise BadInputError(f"kind {self.kind!r} takes no value; use clamp or steer with it")

    @property
    def strengths(self) -> tuple[float, ...]:
        """The doses and the main strength, sorted, without 0: the base is that."""
        return tuple(sorted({*self.doses, self.strength} - {0.0}))

    def intervention(
        self, strength: float, features: Sequence[int], values: Sequence[float]
    ) -> Intervention:
        """Return what is done to some features at a strength."""
        from resa_lens.features.interventions import VALUED, Intervention

        return Intervention(
            self.point,
            tuple(features),
            self.kind,
            strength,
            self.phases,
            self.keep_error,
            tuple(values) if self.kind in VALUED else (),
            self.at,
        )
