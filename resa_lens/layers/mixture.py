"""Gaussian mixtures over layers: the recipe that can say no, and the verdict on either recipe.

Source: "Resa" (arXiv 2506.09967), section 5.  Layers are 0-based throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from resa_lens.errors import BadInputError
from resa_lens.layers import (
    FLAT,
    SUPPORTED,
    TREND,
    WEAK,
    Component,
    ComponentInterval,
    MixtureFit,
    Profile,
    checked_profile,
    nearest_layer,
    nulls,
    read_table,
)
from resa_lens.layers.fits import (
    MAX_K,
    ONE_THREAD,
    Fitted,
    RobustMixture,
    matched_intervals,
    robust_bootstrap,
    robust_mixtures,
)
from resa_lens.layers.nulls import MIN_LAYERS, too_few
from resa_lens.layers.paper import fit_paper, objections, paper_weights
from resa_lens.layers.trends import MARGIN, trend_scores

__all__ = [
    "Component",
    "ComponentInterval",
    "MixtureFit",
    "count_verdict",
    "fit_mixture",
    "objections",
    "paper_weights",
    "read_table",
]

ALPHA = 0.05
MIN_FEATURES = 10

_NEXT = {
    SUPPORTED: "Tune at the recommended layers beside the middle layer, with several seeds.",
    TREND: "Tune where the rates are highest beside the middle layer, or measure layers directly.",
    WEAK: "Count again with another prompt, rule or SAE seed, and trust only what returns.",
    FLAT: "Use the middle layer, or measure layers directly (causal effect, SAE quality, a sweep).",
}
_NEXT_REPEATS = "Score each layer with several seeds and pass the noise of one score (its sd)."


@ONE_THREAD
def fit_mixture(
    values: Mapping[int, float],
    *,
    recipe: str = "robust",
    kind: str = "auto",
    baseline: float | None = None,
    noise: float | None = None,
    components: int = 3,
    seed: int = 0,
    draws: int = 1000,
    restarts: int = 0,
) -> MixtureFit:
    """Fits Gaussians over layers and judges them against their nulls.

    Args:
        values: {0-based layer: count or score}; the keys are the candidate layers.
        recipe: "robust", or "paper" for the published figures.
        kind: "counts", "scores", or "auto": scores with a baseline or where a value is no
            non-negative integer.
        baseline: score of the untuned model; `paper` repeats a layer round(100 (score - baseline))
            times (0 where not given).
        noise: standard deviation of one layer's score over seeds or checkpoints, where known.
        components: of `paper`, and of `robust` on scores; on counts `robust` picks K by BIC.
        seed: of the fits and the draws.
        draws: of each null and of the bootstrap.
        restarts: of `paper`: try the library's seeds 0 to restarts - 1 too and keep the best beside
            the recipe's own fit, as the null "best_of_seeds".

    Returns:
        The fit.  A profile that supports none has the verdict and its reason, never an error.

    Raises:
        BadInputError: no layers or more than 512, a value that is no finite number, a count that
            is negative, an unknown recipe or kind.
    """
    profile = checked_profile(values, kind, baseline, noise, draws, seed)
    if components < 1 or restarts < 0:
        raise BadInputError(
            f"components {components}, restarts {restarts}: give 1 or more and 0 or more"
        )
    if recipe == "paper":
        found = fit_paper(profile, components, restarts)
    elif recipe == "robust":
        fit = _fit_counts if profile.kind == "counts" else _fit_scores
        found = fit(profile, components)
    else:
        raise BadInputError(f'recipe "{recipe}" is unknown: give "robust" or "paper"')
    tests = {**nulls.profile_nulls(profile), **(found.nulls or {})}
    verdict, reason, next_step = _judge(profile, recipe, found, tests)
    parts = found.components
    if recipe == "robust" and profile.kind == "scores" and verdict == FLAT:
        parts = ()  # without a likelihood nothing chose K: a flat profile has no components
    ranked = [nearest_layer(c.mean, profile.layers) for c in sorted(parts, key=lambda c: -c.weight)]
    flat_entropy = math.log(len(profile.layers))
    return MixtureFit(
        recipe=recipe,
        kind=profile.kind,
        layers=profile.layers,
        values=tuple(float(value) for value in profile.values),
        n=found.n,
        k=len(parts),
        components=parts,
        entropy=flat_entropy if recipe == "robust" and not parts else found.entropy,
        log_likelihood=found.log_likelihood,
        converged=found.converged,
        iterations=found.iterations,
        intervals=found.intervals if parts else (),
        bic=found.bic or {},
        nulls=tests,
        verdict=verdict,
        reason=reason,
        next_step=next_step,
        recommended=tuple(dict.fromkeys(ranked)),
        baseline=baseline,
        seed=seed,
        trends=found.trends or {},
    )


@ONE_THREAD
def count_verdict(values: Mapping[int, float], *, draws: int = 1000, seed: int = 0) -> str:
    """The verdict of `fit_mixture(values)` on counts, for simulations: it stops where it is clear.

    Raises:
        BadInputError: as `fit_mixture`.
    """
    profile = checked_profile(values, "counts", None, None, draws, seed)
    counts, x = profile.values, profile.positions
    n = int(counts.sum())
    if n < MIN_FEATURES or len(x) < MIN_LAYERS:
        return FLAT
    tests = nulls.count_nulls(profile)
    if (chance := next(tests).p) > ALPHA:
        return _count_rule(chance, 1.0, {}, {})
    if (order := next(tests).p) > ALPHA:
        return _count_rule(chance, order, {}, {})
    fits = enumerate(robust_mixtures(counts, x, MAX_K, seed), start=1)
    bic = {0: _bic(n, -math.log(len(x)), 0), **{k: _bic(n, fit.level, k) for k, fit in fits}}
    return _count_rule(chance, order, bic, trend_scores(counts, x))


# The robust recipe -------------------------------------------------------------------------------


def _fit_counts(profile: Profile, _: int) -> Fitted:
    """K by BIC with n = features, likelihood over unit intervals; see the module `nulls`."""
    counts, x = profile.values, profile.positions
    n = int(counts.sum())
    if n == 0:
        return Fitted(trouble="no layer has a feature")
    uniform = -math.log(len(x))
    fits = {0: RobustMixture(np.empty(0), np.empty(0), np.empty(0), uniform)}
    trends: dict[str, float] = {}
    if len(x) >= MIN_LAYERS and n >= MIN_FEATURES:
        fits |= dict(enumerate(robust_mixtures(counts, x, MAX_K, profile.seed), start=1))
        trends = trend_scores(counts, x)
    bic = {k: _bic(n, fit.level, k) for k, fit in fits.items()}
    best = min(bic, key=lambda k: bic[k])
    chosen = fits[best]
    return Fitted(
        n=n,
        components=chosen.components,
        entropy=chosen.entropy(x),
        log_likelihood=chosen.level,
        converged=chosen.converged,
        iterations=chosen.iterations,
        intervals=matched_intervals(*robust_bootstrap(profile, chosen), chosen.means)
        if best
        else (),
        bic=bic,
        trends=trends,
        nulls={"uniform_distribution": {"log_likelihood": uniform, "entropy": -uniform}},
    )


def _fit_scores(profile: Profile, k: int) -> Fitted:
    """Describes the scores above the baseline (or the lowest) by k Gaussians; no likelihood."""
    scores, x = profile.values, profile.positions
    floor = scores.min() if profile.baseline is None else profile.baseline
    mass = np.clip(scores - floor, 0.0, None)
    if len(x) < MIN_LAYERS or np.count_nonzero(mass) < k:
        return Fitted(n=len(x))
    *_, best = robust_mixtures(mass, x, k, profile.seed)
    return Fitted(
        n=len(x),
        components=best.components,
        entropy=best.entropy(x),
        converged=best.converged,
        iterations=best.iterations,
    )


# The verdict -------------------------------------------------------------------------------------


def _judge(
    profile: Profile, recipe: str, found: Fitted, tests: dict[str, Any]
) -> tuple[str, str, str]:
    """Verdict, one sentence of reason, next step; scores need their noise and the permutation."""
    layers, counts = len(profile.layers), profile.kind == "counts"
    size = (
        f"{found.n} feature{'s' * (found.n != 1)} over {layers} layers"
        if counts
        else f"The scores of {layers} layers"
    )
    if found.trouble:
        return FLAT, f"No fit: {found.trouble}.", _NEXT[FLAT]
    if layers < MIN_LAYERS:
        return FLAT, f"{too_few(layers)}.", _NEXT[FLAT]
    if counts and found.n < MIN_FEATURES:
        few = f"{size} are too few to tell a lump from chance: {MIN_FEATURES} are needed."
        return FLAT, few, _NEXT[FLAT]
    order = tests["permutation"]["p"]
    shuffled = f"layers shuffled p = {order:.3g}"
    notes = _fit_notes(profile, recipe, found)
    if counts:
        chance, spread = tests["uniform"]["p"], tests["dispersion"]
        numbers = (
            f"uniform null p = {chance:.3g}, {shuffled}, variance over mean {spread['value']:.2f}"
            f" with p = {spread['p']:.2g}{notes}"
        )
        bic = _own_bic(found, layers) if recipe == "paper" else found.bic or {}
        trends = found.trends or {}
        verdict = _count_rule(chance, order, bic, trends)
        if verdict == FLAT:
            return FLAT, f"{size} are no more clustered than chance: {numbers}.", _NEXT[FLAT]
        if verdict == SUPPORTED:
            lumps = "form lumps that chance does not"
            if trends:
                lumps += f", and no trend describes them better by a BIC of {MARGIN:g}"
                numbers += _rivals(bic, trends)
            return SUPPORTED, f"{size} {lumps}: {numbers}.", _NEXT[SUPPORTED]
        if verdict == TREND:
            best = min(trends, key=lambda name: trends[name])
            rates = f"{size} lie unevenly, but no lumps are needed, {best} will do"
            return TREND, f"{rates}: {numbers}{_rivals(bic, trends)}.", _NEXT[TREND]
        why = (
            "single layers stand out, not lumps"
            if order > ALPHA
            else "neither a mixture nor a trend beats the uniform distribution"
            if trends
            else "the mixture does not beat the uniform distribution"
        )
        return WEAK, f"{size} are uneven, but {why}: {numbers}.", _NEXT[WEAK]
    if profile.noise is None:
        single = "one score per layer without repeats cannot show more"
        if order > ALPHA:
            flat = f"{size} show no smooth structure: {shuffled}{notes}; {single}."
            return FLAT, flat, _NEXT_REPEATS
        return WEAK, f"{size} vary smoothly, {shuffled}{notes}, but {single}.", _NEXT_REPEATS
    noise = tests["noise"]["p"]
    numbers = f"p = {noise:.3g} against the noise {profile.noise:g}, {shuffled}{notes}"
    if noise <= ALPHA and order <= ALPHA and found.components:
        return SUPPORTED, f"{size} vary smoothly beyond noise: {numbers}.", _NEXT[SUPPORTED]
    if noise <= ALPHA or order <= ALPHA:
        return WEAK, f"{size} differ from flat by one test of two: {numbers}.", _NEXT_REPEATS
    return FLAT, f"{size} vary no more than noise: {numbers}.", _NEXT[FLAT]


def _count_rule(
    chance: float, order: float, bic: Mapping[int, float], trends: Mapping[str, float]
) -> str:
    """Verdict on counts from the p-values of the uniform and of the permutation null, and scores.

    Flat where the uniform null does not reject at `ALPHA`.  Where both reject, the best of the
    uniform distribution, the mixtures and the trends decides, a trend by `MARGIN` or more: the
    uniform is weak, a mixture supported.  Weak too where the permutation null does not reject.
    """
    if chance > ALPHA:
        return FLAT
    if order > ALPHA:
        return WEAK
    mixture = min((score for k, score in bic.items() if k), default=math.inf)
    trend = min(trends.values(), default=math.inf)
    if mixture < bic[0] and mixture < trend + MARGIN:
        return SUPPORTED
    return TREND if trend < bic[0] else WEAK


def _rivals(bic: Mapping[int, float], trends: Mapping[str, float]) -> str:
    """How the best mixture stands beside the best trend, of all that were tried."""
    mixture, best = min(score for k, score in bic.items() if k), min(trends.values())
    names = sorted(trends, key=lambda name: trends[name])
    gap = mixture - best
    return (
        f"; of {', '.join(names[1:])} and {names[0]} the last is best, with a BIC "
        f"{abs(gap):.1f} {'below' if gap > 0 else 'above'} the mixture's"
    )


def _bic(n: int, level: float, k: int) -> float:
    """BIC of k Gaussians with this log-likelihood a sample; n is the number of features."""
    return -2 * n * level + max(0, 3 * k - 1) * math.log(n)


def _own_bic(fitted: Fitted, layers: int) -> dict[int, float]:
    """BIC of the paper's own fit and of the uniform distribution; its other K are the library's."""
    own, k = fitted.log_likelihood, len(fitted.components)
    bic = {0: _bic(fitted.n, -math.log(layers), 0)}
    return bic | {k: _bic(fitted.n, own, k)} if own is not None and k else bic


def _fit_notes(profile: Profile, recipe: str, found: Fitted) -> str:
    """What the reason says about the fit itself."""
    if recipe == "robust":
        if profile.kind == "scores":
            return ""
        k = len(found.components)
        return f", and by BIC K = {k}" + (" (uniform)" if k == 0 else "")
    level, uniform = found.log_likelihood or 0.0, -math.log(len(profile.layers))
    place = "below" if level < uniform else "above"
    note = f", and the fit's log-likelihood {level:.4f} is {place} the uniform's {uniform:.4f}"
    if not found.converged and found.nulls:
        further = found.nulls["run_to_convergence"]["log_likelihood"]
        note += f" (stopped by the library's tolerance before convergence, at {further:.4f})"
    return note
