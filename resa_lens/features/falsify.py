"""Does a counted feature answer to reasoning, or to the token, the prompt or the SAE?

A feature that fires at the think tags of one prompt is by construction suspect (spec, section 8;
arXiv 2601.05679).  Each counted feature is tried on the texts of stimuli.py.  It fires in a trial
when it is active at one or more of the places of a tag at which it was counted.

    test         what is measured                                        it falls if it
    injection    share of plain texts in which it fires at the tags      fires: token detector
    shuffle      share of orders of the prompt's words, likewise         fires: token detector
    plain        share of plain texts without any tag, same places       fires: prompt artefact
    neutral      share of other tags in the same places                  fires: prompt artefact
    paraphrase   share of other prompts that ask for the same            does not: prompt artefact
    other seed   whether an SAE of another seed has one like it          has not: prompt artefact

"Fires" is a share of at least `fires`; for the injection also one above the share at the same
places before the tags came in.  Whether the tags made the difference is told by a p-value beside it
(McNemar's exact test, Holm's correction over the features); it acquits no feature, for one that
fires in plain text is refuted either way, and with few texts no p-value is small.  What passes all
tests survives: it has not been refuted, no more.  How many would survive by chance is
told by the SAE of a random-weights model put through the tests on texts (`summarise`).

The injected texts share their sentences, and a shuffled prompt all its words: p-values and
intervals are about further texts of this kind.  The test on another seed is a weak one: by
direction it is strict, but any two features that answer to the same tag correlate over the trials'
places.  So beside that correlation stands the one with the other SAE's other layers: on
tiny-reasoner 48 % of layer 5's counted features found such a partner at the same layer of another
seed, and 43 and 38 % at its layers 3 and 8 (and none a direction).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from resa_lens import stats
from resa_lens.errors import BadInputError
from resa_lens.features.checks import check_features
from resa_lens.features.config import FalsifyConfig as FalsifyConfig
from resa_lens.features.config import check_active
from resa_lens.features.exclusive import RULES, LayerCount
from resa_lens.features.matching import best_matches
from resa_lens.features.stimuli import Trial
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseActs, SparseCoder, encode
from resa_lens.stats import Interval

DETECTOR, ARTEFACT, SURVIVES = "token detector", "prompt artefact", "survives"
VERDICTS = (DETECTOR, ARTEFACT, SURVIVES)
PLACES = ("open", "close")
"""Where a feature may have been counted; the order of `Trial.places`."""
OTHER_SEED = "other seed"
TESTS = ("injection", "shuffle", "plain", "neutral", "paraphrase", OTHER_SEED)
ALPHA = 0.05
FOUND_AGAIN = 0.7
"""Decoder cosine, or correlation over the trials' places, from which a feature is alike."""


@dataclass(frozen=True)
class Share:
    """In how many trials of one kind a feature fired."""

    fired: int
    n: int
    share: float
    ci: Interval
    """Wilson's 95 % interval."""

    @classmethod
    def of(cls, fired: NDArray[np.bool_]) -> Share:
        """Count the trials [n]."""
        count = int(fired.sum())
        return cls(count, fired.size, count / fired.size, stats.wilson_interval(count, fired.size))


@dataclass(frozen=True)
class Counterpart:
    """The feature of another seed's SAE that comes nearest."""

    cosine: float
    """Largest cosine of the decoder directions, over all its features."""
    feature: int
    correlation: float | None
    """Largest correlation of activations at the trials' places, over the features that it counts;
    None where it counts none or nothing varies."""
    correlated: int | None
    elsewhere: float | None = None
    """The same correlation at the other SAE's other layers, the median of them: what features that
    cannot be the same have in common by answering to one tag.  None with one layer."""

    @property
    def found(self) -> bool:
        """Whether either is large enough for a feature alike."""
        return self.same_direction or (self.correlation or 0.0) >= FOUND_AGAIN

    @property
    def same_direction(self) -> bool:
        """Whether the decoder direction is there, which chance does not give."""
        return self.cosine >= FOUND_AGAIN


@dataclass(frozen=True)
class FeatureVerdict:
    """What became of one counted feature, with the evidence."""

    layer: int
    feature: int
    rule: str
    """The strictest rule that counts it."""
    rules: tuple[str, ...]
    verdict: str
    reason: str
    places: tuple[str, ...]
    """Tags at which it fires in the prompt: open, close."""
    shares: Mapping[str, Share]
    """By kind of trial: injected, plain (the base rate), shuffled, neutral, paraphrase."""
    injection_p: float
    """Injected against plain, after Holm's correction over all features of the run."""
    other_seed: Counterpart | None
    """None where no other seed's SAE was given."""
    failed: tuple[str, ...]
    """Every test at which it falls; the verdict is that of the first."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        seed = self.other_seed
        held = asdict(self)
        held["other_seed"] = seed and {**asdict(seed), "found": seed.found}
        return held


@dataclass(frozen=True)
class Responses:
    """Largest activation of each listed feature at each place of each trial."""

    trials: Sequence[Trial]
    values: Mapping[Hookpoint, Float[Tensor, "trial place feature"]]
    """0 where a feature is not active; the last axis is that of `features`."""
    features: Mapping[Hookpoint, tuple[int, ...]]


def union_of_rules(counts: LayerCount) -> dict[int, tuple[str, ...]]:
    """Return {feature: the rules that count it, strictest first}."""
    found: dict[int, tuple[str, ...]] = {}
    for rule in RULES:
        for feature in counts.features[rule]:
            found[feature] = (*found.get(feature, ()), rule)
    return dict(sorted(found.items()))


def respond(
    model: Model,
    coders: Mapping[Hookpoint, SparseCoder],
    features: Mapping[Hookpoint, Sequence[int]],
    trials: Sequence[Trial],
    advance: Any = None,
) -> Responses:
    """Run the trials through the model and read the listed features at their places.

    Args:
        model: the host.
        coders: an SAE for each place in the model.
        features: the indices that are looked at, by place in the model.
        trials: what `stimuli.trials` makes.
        advance: called with the number of finished trials, if given.

    Raises:
        BadInputError: an SAE of another width, or an index beyond its latents.
    """
    wanted = {point: tuple(features.get(point, ())) for point in sorted(coders)}
    for point, listed in wanted.items():
        check_features(model, point, listed, coders)
    values = {p: torch.zeros(len(trials), len(PLACES), len(f)) for p, f in wanted.items()}
    points = [point for point, listed in wanted.items() if listed]
    batches = (torch.tensor([trial.ids]) for trial in trials)
    for number, batch in enumerate(stream_activations(model, batches, points) if points else ()):
        places = trials[number].places
        for point in points:
            for index, positions in enumerate(places):
                x = batch.acts[point][0, list(positions)].float()
                active = encode(coders[point], x)
                values[point][number, index] = _largest(active, wanted[point])
        if advance is not None:
            advance(1)
    return Responses(tuple(trials), values, wanted)


def _largest(acts: SparseActs, features: Sequence[int]) -> Float[Tensor, " feature"]:
    """Return each feature's largest value over the rows."""
    order = torch.tensor(sorted(features))
    latents, values = acts.latents.cpu(), acts.values.cpu()
    index = torch.searchsorted(order, latents).clamp(max=len(order) - 1)
    hit = order[index] == latents
    top = torch.zeros(len(order)).scatter_reduce_(0, index[hit], values[hit].float(), "amax")
    return top[torch.searchsorted(order, torch.tensor(list(features)))]


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
        other_seed: what `counterparts` found; the test is left out where it is not given.

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
            rows.append((point, feature, named, own[0], (own & own[0]).any(1)))
    raw = []
    for *_, fired in rows:
        injected, plain = fired[kinds == "injected"], fired[kinds == "plain"]
        only, base = int((injected & ~plain).sum()), int((plain & ~injected).sum())
        # One-sided questions asked of a two-sided test: firing less than before is no detector.
        raw.append(stats.mcnemar_exact(only, base) if only > base else 1.0)
    corrected = stats.holm(raw) if raw else []
    found = []
    for (point, feature, named, at, fired), p in zip(rows, corrected, strict=True):
        shares = {
            kind: Share.of(fired[kinds == kind])
            for kind in ("injected", "plain", "shuffled", "neutral", "paraphrase")
        }
        twin = other_seed[point].get(feature) if other_seed and point in other_seed else None
        failed = _failed(shares, twin, config.fires)
        verdict, reason = _verdict(failed, shares, float(p), twin)
        found.append(
            FeatureVerdict(
                point.layer, feature, named[0], named, verdict, reason,
                tuple(name for name, hit in zip(PLACES, at, strict=True) if hit),
                shares, float(p), twin, failed,
            )
        )  # fmt: skip
    return found


def _failed(shares: Mapping[str, Share], twin: Counterpart | None, fires: float) -> tuple[str, ...]:
    injected, plain = shares["injected"].share, shares["plain"].share
    tests = {
        "injection": injected >= fires and injected > plain,
        "shuffle": shares["shuffled"].share >= fires,
        "plain": plain >= fires,
        "neutral": shares["neutral"].share >= fires,
        "paraphrase": shares["paraphrase"].share < fires,
        OTHER_SEED: twin is not None and not twin.found,
    }
    return tuple(name for name, falls in tests.items() if falls)


def _verdict(
    failed: Sequence[str],
    shares: Mapping[str, Share],
    p: float,
    twin: Counterpart | None,
) -> tuple[str, str]:
    def of(kind: str) -> str:
        return f"{shares[kind].fired} of {shares[kind].n}"

    answers = ""
    if twin is not None and twin.correlation is not None:
        beside = "" if twin.elsewhere is None else f"; {twin.elsewhere:.2f} at other layers"
        answers = f"one that answers to these tags alike (r = {twin.correlation:.2f}{beside})"
    reasons = {
        "injection": (
            f"it fires at the tags in {of('injected')} plain texts ({of('plain')} without them)"
            + ("" if p < ALPHA else f", too few to be sure of the tags' part (p = {p:.2g})")
        ),
        "shuffle": f"it fires at the tags in {of('shuffled')} random orders of the prompt's words",
        "plain": f"it fires at these places of {of('plain')} plain texts without any tag",
        "neutral": f"it fires at {of('neutral')} other tags in the same places",
        "paraphrase": f"it fires in {of('paraphrase')} other prompts that ask for the same",
        OTHER_SEED: "the SAE of another seed has none of its direction or its answers",
    }
    if not failed:
        seed = ""
        if twin is not None:
            seed = f"; another seed's SAE has {'its direction' if twin.same_direction else answers}"
        return SURVIVES, (
            f"it fires in {of('paraphrase')} other prompts, and in {of('injected')} plain texts "
            f"and {of('shuffled')} shuffled prompts with the tags{seed}"
        )
    verdict = DETECTOR if failed[0] in ("injection", "shuffle") else ARTEFACT
    return verdict, reasons[failed[0]]


@torch.no_grad()
def counterparts(
    responses: Responses,
    other: Responses,
    directions: Callable[[Hookpoint], tuple[Tensor, Tensor]],
) -> dict[Hookpoint, dict[int, Counterpart]]:
    """Look for each feature in the SAEs of another seed: by decoder direction, and by activity.

    Args:
        responses: of the features in question.
        other: responses to the same trials of the features that the other SAEs count.
        directions: gives both SAEs' decoders [d_sae, d_in] at a place; asked for one place after
            the other, because those of a large model fill a machine together.
    """
    found: dict[Hookpoint, dict[int, Counterpart]] = {}
    for point, listed in responses.features.items():
        if not listed or point not in other.features:
            continue
        mine, theirs = directions(point)
        matches, cosines = best_matches(mine[list(listed)], theirs)
        names = other.features[point]
        values = responses.values[point]
        best, where = _best_correlations(values, other.values[point])
        others = [
            _best_correlations(values, there)[0] for q, there in other.values.items() if q != point
        ]
        elsewhere = torch.stack(others).nanmedian(0).values if others else None
        found[point] = {}
        for i, feature in enumerate(listed):
            known = bool(best[i].isfinite())
            beside = None if elsewhere is None or elsewhere[i].isnan() else float(elsewhere[i])
            found[point][feature] = Counterpart(
                float(cosines[i]),
                int(matches[i]),
                float(best[i]) if known else None,
                int(names[int(where[i])]) if known else None,
                beside,
            )
    return found


def _best_correlations(
    a: Float[Tensor, "trial place m"], b: Float[Tensor, "trial place n"]
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"]]:
    """Return each feature's largest Pearson correlation, over all places of all trials, and whose.

    NaN where it does not vary, or nothing of b does.
    """
    if not b.shape[2]:
        return torch.full(a.shape[2:], torch.nan).double(), torch.zeros(a.shape[2:]).long()
    x, y = (side.flatten(0, 1).double() - side.flatten(0, 1).double().mean(0) for side in (a, b))
    r = (x.mT @ y) / (x.norm(dim=0)[:, None] * y.norm(dim=0))
    best, where = r.nan_to_num(-2.0).max(1)
    return best.masked_fill(best < -1.5, torch.nan), where


@dataclass(frozen=True)
class Tally:
    """Verdicts of one rule's features, with the same figures for a random-weights model's SAE."""

    rule: str
    counted: int
    verdicts: Mapping[str, int]
    survivors: int
    ci: Interval
    """Wilson's 95 % interval of the share that survives; (0, 1) where nothing is counted."""
    active: int
    """Features active on the prompt: what could have been counted."""
    by_texts: int
    """Features that pass all tests on texts: the null faces those, but no other seed."""
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


@dataclass(frozen=True)
class Summary:
    """What the tests leave of the counts."""

    rules: tuple[Tally, ...]
    reason: str
    tests: Mapping[str, int] = field(default_factory=dict)
    """How many features fall at each test; a feature may fall at several."""


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
        kept, passed = sum(v.verdict == SURVIVES for v in mine), sum(map(_by_texts, mine))
        beside: dict[str, Any] = {}
        if null is not None:
            others = [v for v in null[0] if rule in v.rules]
            chance = sum(map(_by_texts, others))
            beside = {
                "null_counted": len(others),
                "null_by_texts": chance,
                "null_active": null[1],
                "p_value": stats.fisher_greater(passed, active, chance, null[1]),
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
    tests = {name: sum(name in v.failed for v in verdicts) for name in TESTS}
    return Summary(tuple(tallies), _reason(tallies, verdicts), tests)


def _by_texts(verdict: FeatureVerdict) -> bool:
    return not set(verdict.failed) - {OTHER_SEED}


def _reason(tallies: Sequence[Tally], verdicts: Sequence[FeatureVerdict]) -> str:
    if not verdicts:
        return "no rule counts a feature here: there is nothing to falsify"
    kept = sum(v.verdict == SURVIVES for v in verdicts)
    text = f"{kept} of {len(verdicts)} counted features survive"
    widest = tallies[-1]
    if widest.p_value is None:
        return f"{text}; how many would by chance was not measured (no random-weights SAE)"
    chance = (
        f"{widest.by_texts} of {widest.active} active features pass the tests on texts, with a "
        f"random-weights model {widest.null_by_texts} of {widest.null_active}"
    )
    told = "more than" if widest.p_value < ALPHA else "not more than"
    counted = f"p = {widest.p_value:.2g}, features counted as independent"
    return f"{text}; {told} the random-weights SAE gives ({counted}): {chance}"
