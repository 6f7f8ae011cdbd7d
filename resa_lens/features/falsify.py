"""What does a counted feature answer to: reasoning, the token, the prompt, or its SAE?

A feature that fires at the think tags of one prompt is by construction suspect (spec, section 8;
arXiv 2601.05679).  Each counted feature is tried on the texts of stimuli.py.  It fires in a trial
when it is active at one or more of the places of a tag at which it was counted.  dependences.py
says what it needs, each answer with its interval, and which word that comes to; an answer whose
interval crosses its bounds is undetermined, and so is a word that rests on it.  How often the words
are wrong of planted features stands in battery.py.

How many words of each kind chance gives is known from the SAE of a random-weights model put through
the trials (`summarise`).  Whether the tag makes the difference in plain text has a p-value of its
own (McNemar's exact test, Holm's correction over the features).

Trials of one kind share sentences or words: p-values and intervals are about further texts of this
kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from resa_lens import stats
from resa_lens.errors import BadInputError
from resa_lens.features.config import FalsifyConfig as FalsifyConfig
from resa_lens.features.config import check_active
from resa_lens.features.counterparts import Counterpart
from resa_lens.features.dependences import (
    OTHER_SEED,
    TESTS,
    Dependences,
    Share,
    dependences,
    failed_tests,
    reason_of,
    sentence,
    word_of,
)
from resa_lens.features.exclusive import RULES, LayerCount
from resa_lens.features.responses import PLACES, Responses
from resa_lens.features.words import REFUTED, STANDS, SURVIVES, UNDETERMINED, VERDICTS, WORDS
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.stats import Interval

ALPHA = 0.05


@dataclass(frozen=True)
class FeatureVerdict:
    """What became of one counted feature, with the evidence."""

    layer: int
    feature: int
    rule: str
    """The strictest rule that counts it."""
    rules: tuple[str, ...]
    verdict: str
    """A word of `dependences.WORDS`."""
    sentence: str
    """What it needs and what it does without."""
    reason: str
    """The sentence with the shares that decide."""
    depends_on: Dependences
    places: tuple[str, ...]
    """Tags at which it fires in the prompt: open, close."""
    shares: Mapping[str, Share]
    """By kind of trial (`stimuli.KINDS`)."""
    injection_p: float
    """Injected against plain, after Holm's correction over all features of the run."""
    other_seed: Counterpart | None
    """None where no other seed's SAE was given."""
    failed: tuple[str, ...]
    """Every test at which it surely falls."""
    by_texts: str
    """The word that the texts alone come to, without the other seed."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        seed = self.other_seed
        values = asdict(self)
        values["other_seed"] = seed and {**asdict(seed), "found": seed.found}
        return values


def union_of_rules(counts: LayerCount) -> dict[int, tuple[str, ...]]:
    """Return {feature: the rules that count it, strictest first}."""
    found: dict[int, tuple[str, ...]] = {}
    for rule in RULES:
        for feature in counts.features[rule]:
            found[feature] = (*found.get(feature, ()), rule)
    return dict(sorted(found.items()))


def judge(
    responses: Responses,
    rules: Mapping[Hookpoint, Mapping[int, tuple[str, ...]]],
    config: FalsifyConfig | None = None,
    *,
    threshold: float = 0.0,
    other_seed: Mapping[Hookpoint, Mapping[int, Counterpart]] | None = None,
) -> list[FeatureVerdict]:
    """Give every counted feature its verdict.

    Args:
        responses: of `respond`; the first trial is the prompt itself.
        rules: the rules that count each feature, by place in the model (`union_of_rules`).
        config: what counts as firing.
        threshold: a feature is active above it, as in the count.
        other_seed: of `counterparts`; the dependence on the seed is left out where it is missing.

    Raises:
        BadInputError: a feature that is not active at a tag of the prompt was not counted on it, or
            a threshold that is negative or no finite number.
    """
    check_active(threshold)
    config = config or FalsifyConfig()
    kinds = np.array([trial.kind for trial in responses.trials])
    rows = []
    for point, counted in sorted(rules.items()):
        columns = {f: i for i, f in enumerate(responses.features[point])}
        active = (responses.values[point] > threshold).numpy()
        for feature, named in counted.items():
            own = active[:, :, columns[feature]]
            if not own[0].any():
                raise BadInputError(
                    f"feature {feature} at layer {point.layer} (0-based) is active at no tag of "
                    "the prompt: it was not counted on this prompt with this SAE"
                )
            rows.append((point, feature, named, own))
    raw = []
    for *_, own in rows:
        fired = (own & own[0]).any(1)
        injected, plain = fired[kinds == "injected"], fired[kinds == "plain"]
        only, base = int((injected & ~plain).sum()), int((plain & ~injected).sum())
        # One-sided questions for a two-sided test: firing less than before is no detector.
        raw.append(stats.mcnemar_exact(only, base) if only > base else 1.0)
    corrected = stats.holm(raw) if raw else []
    verdicts = []
    for (point, feature, named, own), p in zip(rows, corrected, strict=True):
        fired = (own & own[0]).any(1)
        shares = {
            str(kind): Share.of(fired[kinds == kind])
            for kind in dict.fromkeys(kinds)
            if kind != "original"
        }
        documents = own[kinds == "document"]
        by_place = {
            place: Share.of(documents[:, index])
            for index, place in enumerate(PLACES)
            if len(documents)
        }
        twin = other_seed[point].get(feature) if other_seed and point in other_seed else None
        depends_on = dependences(shares, by_place, twin, config.fires)
        word = word_of(depends_on)
        verdicts.append(
            FeatureVerdict(
                layer=point.layer,
                feature=feature,
                rule=named[0],
                rules=named,
                verdict=word,
                sentence=sentence(depends_on),
                reason=reason_of(word, depends_on, shares),
                depends_on=depends_on,
                places=tuple(name for name, hit in zip(PLACES, own[0], strict=True) if hit),
                shares=shares,
                injection_p=float(p),
                other_seed=twin,
                failed=failed_tests(depends_on),
                by_texts=word_of(depends_on, seed=False),
            )
        )
    return verdicts


@dataclass(frozen=True)
class Tally:
    """Verdicts of one rule's features, with the same figures for a random-weights model's SAE.

    A feature stands whose word is of that class in `WORDS`: nothing refutes it as a feature of
    reasoning, and it needs more than the tag.
    """

    rule: str
    counted: int
    verdicts: Mapping[str, int]
    survivors: int
    """Features that stand."""
    ci: Interval
    """Wilson's 95 % interval of the share that stands; (0, 1) where nothing is counted."""
    active: int
    """Features active on the prompt: what could have been counted."""
    by_texts: int
    """Features that stand by the texts alone: the null faces those, but no other seed."""
    null_counted: int | None = None
    """None, as the next ones, where no random-weights SAE was given."""
    null_by_texts: int | None = None
    null_active: int | None = None
    p_value: float | None = None
    """Fisher's exact test, one-sided: a larger share of the active features passes the tests on
    texts than of the random-weights model's SAE.  As if features were independent, which those of
    one SAE are not, and one model with random weights were all of them: p is too small."""
    p_counted: float | None = None
    """Likewise for the count itself."""
    null_verdicts: Mapping[str, int] | None = None
    """Words of the random-weights model's counted features, by the texts alone."""


@dataclass(frozen=True)
class Summary:
    """What the tests leave of the counts."""

    rules: tuple[Tally, ...]
    reason: str
    tests: Mapping[str, int] = field(default_factory=dict)
    """How many features surely fall at each test; a feature may fall at several."""


def summarise(
    verdicts: Sequence[FeatureVerdict],
    active: int,
    null: tuple[Sequence[FeatureVerdict], int] | None = None,
) -> Summary:
    """Count the verdicts by rule, beside those of a random-weights model's SAE.

    Args:
        verdicts: of all layers.
        active: features active on the prompt, over the same layers.
        null: the same two of the random-weights model.
    """
    tallies = []
    for rule in RULES:
        mine = [v for v in verdicts if rule in v.rules]
        kept, passed = sum(map(_stands, mine)), sum(map(_by_texts, mine))
        beside: dict[str, Any] = {}
        if null is not None:
            others = [v for v in null[0] if rule in v.rules]
            chance = sum(map(_by_texts, others))
            beside = {
                "null_counted": len(others),
                "null_by_texts": chance,
                "null_active": null[1],
                "p_value": stats.fisher_greater(passed, active, chance, null[1]),
                "null_verdicts": {n: sum(v.by_texts == n for v in others) for n in VERDICTS},
                "p_counted": stats.fisher_greater(len(mine), active, len(others), null[1]),
            }
        tallies.append(
            Tally(
                rule=rule,
                counted=len(mine),
                verdicts={name: sum(v.verdict == name for v in mine) for name in VERDICTS},
                survivors=kept,
                ci=stats.wilson_interval(kept, len(mine)) if mine else (0.0, 1.0),
                active=active,
                by_texts=passed,
                **beside,
            )
        )
    tests = {name: sum(name in v.failed for v in verdicts) for name in (*TESTS, OTHER_SEED)}
    return Summary(tuple(tallies), _reason(tallies, verdicts), tests)


def _stands(verdict: FeatureVerdict) -> bool:
    return WORDS[verdict.verdict].group == STANDS


def _by_texts(verdict: FeatureVerdict) -> bool:
    return WORDS[verdict.by_texts].group == STANDS


def _reason(tallies: Sequence[Tally], verdicts: Sequence[FeatureVerdict]) -> str:
    if not verdicts:
        return "no rule counts a feature here: there is nothing to falsify"
    groups = [WORDS[v.verdict].group for v in verdicts]
    kept, survive = groups.count(STANDS), sum(v.verdict == SURVIVES for v in verdicts)
    stand = "survives" if survive == 1 else "survive"
    text = f"{survive} of {len(verdicts)} counted features {stand}"
    if kept > survive:
        text += f", {kept - survive} more answer to delimiters of reasoning however spelled"
    rest = {
        "described by what they answer to": len(groups) - kept - groups.count(REFUTED)
        - groups.count(UNDETERMINED),
        "refuted": groups.count(REFUTED),
        "undetermined": groups.count(UNDETERMINED),
    }  # fmt: skip
    text += f" ({', '.join(f'{n} {name}' for name, n in rest.items())})"
    widest = tallies[-1]
    if widest.p_value is None:
        return f"{text}; how many would by chance was not measured (no random-weights SAE)"
    chance = (
        f"{widest.by_texts} of {widest.active} active features stand by the texts alone, with a "
        f"random-weights model {widest.null_by_texts} of {widest.null_active}"
    )
    compared = "more than" if widest.p_value < ALPHA else "not more than"
    counted = f"p = {widest.p_value:.2g}, features counted as independent"
    return f"{text}; {compared} the random-weights SAE gives ({counted}): {chance}"
