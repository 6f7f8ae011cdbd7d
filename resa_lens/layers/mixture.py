"""Gaussian mixtures over layers: the paper's recipe digit by digit, and one that can say no.

Source: "Resa" (arXiv 2506.09967), section 5.  Layers are 0-based throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import special
from sklearn.mixture import GaussianMixture

from resa_lens import stats
from resa_lens.errors import BadInputError
from resa_lens.layers import (
    FLAT,
    SUPPORTED,
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
from resa_lens.layers.nulls import MAX_K, MIN_LAYERS, MIN_SD
from resa_lens.stats import Floats

__all__ = ["Component", "ComponentInterval", "MixtureFit", "fit_mixture", "read_table"]

ALPHA = 0.05
MIN_FEATURES = 10
MAX_REPEATS = 5_000_000

_NEXT = {
    SUPPORTED: "Tune at the recommended layers beside the middle layer, with several seeds.",
    WEAK: "Count again with another prompt, rule or SAE seed, and trust only what returns.",
    FLAT: "Use the middle layer, or measure layers directly (causal effect, SAE quality, a sweep).",
}
_NEXT_REPEATS = "Score each layer with several seeds and pass the noise of one score (its sd)."


@dataclass(frozen=True)
class _Fitted:
    """What a recipe found, before any verdict."""

    n: int = 0
    components: tuple[Component, ...] = ()
    entropy: float | None = None
    log_likelihood: float | None = None
    converged: bool = False
    iterations: int = 0
    intervals: tuple[ComponentInterval, ...] = ()
    bic: dict[int, float] | None = None
    nulls: dict[str, Any] | None = None
    trouble: str = ""
    """Why there is no fit or none to trust, as a clause."""


@nulls.ONE_THREAD
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

    Returns:
        The fit.  A profile that supports none has the verdict and its reason, never an error.

    Raises:
        BadInputError: no layers, a value that is not finite, an unknown recipe or kind.
    """
    profile = checked_profile(values, kind, baseline, noise, draws, seed)
    if components < 1:
        raise BadInputError(f"components {components}: give 1 or more")
    if recipe == "paper":
        found = _fit_paper(profile, components)
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
    )


# The paper's recipe ------------------------------------------------------------------------------


def _fit_paper(profile: Profile, k: int) -> _Fitted:
    """Layers repeated by weight, GaussianMixture(k, random_state=seed), all else default."""
    weights = profile.values
    if profile.kind == "scores":
        weights = np.round(100 * (profile.values - (profile.baseline or 0.0)))
    if bool((weights < 0).any()):
        layer = profile.layers[int(weights.argmin())]
        return _Fitted(trouble=f"layer {layer} (0-based) has the negative weight {weights.min():g}")
    total, distinct = int(weights.sum()), int(np.count_nonzero(weights))
    if total > MAX_REPEATS:
        raise BadInputError(
            f"{total} repetitions: the paper's recipe is for {MAX_REPEATS} or fewer"
        )
    if total < k:
        return _Fitted(n=total, trouble=f"{total} features cannot hold {k} Gaussians")
    if distinct < k:
        return _Fitted(
            n=total, trouble=f"{distinct} layers hold all {total}, too few for {k} means"
        )
    x = profile.positions  # floats: scikit-learn 1.9 scores whole-number data wrongly
    data = np.repeat(x, weights.astype(int))[:, None]
    model = GaussianMixture(k, random_state=profile.seed).fit(data)
    run_on = GaussianMixture(k, random_state=profile.seed, tol=1e-9, max_iter=20_000).fit(data)
    level, further = float(model.score(data)), float(run_on.score(data))
    extra: dict[str, Any] = {
        "uniform_distribution": {"log_likelihood": -math.log(len(x))},
        "run_to_convergence": {
            "log_likelihood": further,
            "components": [asdict(part) for part in _library_components(run_on)],
        },
    }
    if len(x) >= k:
        flat = GaussianMixture(k, random_state=profile.seed).fit(x[:, None])
        extra["uniform_distribution"]["entropy"] = _paper_entropy(flat, x)
    bic: dict[int, float] = {}
    if profile.kind == "counts":
        bic[0] = 2 * total * math.log(len(x))
        for size in range(1, min(MAX_K, distinct) + 1):
            fit = GaussianMixture(size, random_state=profile.seed).fit(data)
            bic[size] = float(fit.bic(data))
    return _Fitted(
        n=total,
        components=_library_components(model),
        entropy=_paper_entropy(model, x),
        log_likelihood=level,
        converged=further - level < model.tol,
        iterations=int(model.n_iter_),
        intervals=_paper_intervals(profile, weights, model),
        bic=bic,
        nulls=extra,
    )


def _library_components(model: GaussianMixture) -> tuple[Component, ...]:
    rows = zip(*_parameters(model), strict=True)
    return tuple(Component(float(m), float(w), math.sqrt(float(v))) for m, v, w in rows)


def _paper_entropy(model: GaussianMixture, positions: Floats) -> float:
    grid = np.linspace(positions[0], positions[-1], 300)
    density = np.exp(model.score_samples(grid[:, None]))
    share = density / density.sum()
    step = grid[1] - grid[0]
    return float(special.entr(share).sum() + (math.log(step) if step > 0 else 0.0))


def _paper_intervals(
    profile: Profile, weights: Floats, model: GaussianMixture
) -> tuple[ComponentInterval, ...]:
    """Features resampled, or scores shaken by their noise; EM starts from the library's fit."""
    if profile.kind == "counts":
        tables = stats.multinomial_draws(
            int(weights.sum()), weights, profile.draws, [profile.seed, 3]
        )
    elif profile.noise is not None:
        rng = np.random.default_rng([profile.seed, 3])
        shaken = weights + 100 * profile.noise * rng.normal(size=(profile.draws, weights.size))
        tables = np.clip(np.round(shaken), 0.0, None)
        tables = tables[tables.sum(axis=1) > 0]
    else:
        return ()
    start = _parameters(model)
    means, _, shares = nulls.plain_mixture(tables, profile.positions, len(start[0]), start)
    return _intervals(means, shares, start[0])


def _parameters(model: GaussianMixture) -> tuple[Floats, Floats, Floats]:
    """Means, variances and weights, each [k], of one-dimensional data."""
    means, variances, weights = (
        np.asarray(part, dtype=np.float64).ravel()
        for part in (model.means_, model.covariances_, model.weights_)
    )
    return means, variances, weights


def _intervals(means: Floats, weights: Floats, fitted: Floats) -> tuple[ComponentInterval, ...]:
    """Percentile intervals of draws [draws, k], matched to the fitted means [k] by rank."""
    order = means.argsort(axis=1)
    means, weights = np.take_along_axis(means, order, 1), np.take_along_axis(weights, order, 1)
    return tuple(
        ComponentInterval(
            stats.percentile_interval(means[:, rank]), stats.percentile_interval(weights[:, rank])
        )
        for rank in fitted.argsort().argsort()
    )


# The robust recipe -------------------------------------------------------------------------------


def _fit_counts(profile: Profile, _: int) -> _Fitted:
    """K by BIC with n = features, likelihood over unit intervals; see the module `nulls`."""
    counts, x = profile.values, profile.positions
    n = int(counts.sum())
    if bool((counts < 0).any()):
        return _Fitted(n=n, trouble=f"{counts.min():g} is a negative count")
    if n == 0:
        return _Fitted(trouble="no layer has a feature")
    uniform = -math.log(len(x))
    bic, fits = (
        {0: -2 * n * uniform},
        {0: nulls.RobustMixture(np.empty(0), np.empty(0), np.empty(0), uniform)},
    )
    if len(x) >= MIN_LAYERS and n >= MIN_FEATURES:
        grid = nulls.ComponentGrid.over(x, MIN_SD, 0.25, 12)
        for k in range(1, MAX_K + 1):
            fits[k] = nulls.robust_mixture(counts, x, k, grid, profile.seed)
            bic[k] = -2 * n * fits[k].level + (3 * k - 1) * math.log(n)
    best = min(bic, key=lambda k: bic[k])
    chosen = fits[best]
    return _Fitted(
        n=n,
        components=chosen.components,
        entropy=chosen.entropy(x),
        log_likelihood=chosen.level,
        converged=chosen.converged,
        iterations=chosen.iterations,
        intervals=_intervals(*nulls.robust_bootstrap(profile, chosen), chosen.means)
        if best
        else (),
        bic=bic,
        nulls={"uniform_distribution": {"log_likelihood": uniform, "entropy": -uniform}},
    )


def _fit_scores(profile: Profile, k: int) -> _Fitted:
    """Describes the scores above the baseline (or the lowest) by k Gaussians; no likelihood."""
    scores, x = profile.values, profile.positions
    floor = scores.min() if profile.baseline is None else profile.baseline
    mass = np.clip(scores - floor, 0.0, None)
    if len(x) < MIN_LAYERS or np.count_nonzero(mass) < k:
        return _Fitted(n=len(x))
    grid = nulls.ComponentGrid.over(x, MIN_SD, 0.25, 12)
    best = nulls.robust_mixture(mass, x, k, grid, profile.seed)
    return _Fitted(
        n=len(x),
        components=best.components,
        entropy=best.entropy(x),
        converged=best.converged,
        iterations=best.iterations,
    )


# The verdict -------------------------------------------------------------------------------------


def _judge(
    profile: Profile, recipe: str, found: _Fitted, tests: dict[str, Any]
) -> tuple[str, str, str]:
    """Verdict, one sentence of reason, next step.

    Counts are supported where the uniform and the permutation null both reject at `ALPHA` and the
    fitted mixture beats the uniform distribution by BIC; where the uniform null does not reject
    they are flat, and in between weak.  Scores need their noise and the permutation null.
    """
    layers, counts = len(profile.layers), profile.kind == "counts"
    size = (
        f"{found.n} feature{'s' * (found.n != 1)} over {layers} layers"
        if counts
        else f"The scores of {layers} layers"
    )
    if found.trouble:
        return FLAT, f"No fit: {found.trouble}.", _NEXT[FLAT]
    if layers < MIN_LAYERS:
        return FLAT, f"{layers} layers are too few to tell: {MIN_LAYERS} are needed.", _NEXT[FLAT]
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
        better = _gain(profile, found) > 0
        if chance > ALPHA:
            return FLAT, f"{size} are no more clustered than chance: {numbers}.", _NEXT[FLAT]
        if order <= ALPHA and better:
            return (
                SUPPORTED,
                f"{size} form lumps that chance does not: {numbers}.",
                _NEXT[SUPPORTED],
            )
        why = (
            "single layers stand out, not lumps"
            if order > ALPHA
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


def _gain(profile: Profile, found: _Fitted) -> float:
    """How far the fit beats the uniform distribution by BIC."""
    if found.log_likelihood is None or not found.components:
        return 0.0
    lift = 2 * found.n * (found.log_likelihood + math.log(len(profile.layers)))
    return lift - (3 * len(found.components) - 1) * math.log(found.n)


def _fit_notes(profile: Profile, recipe: str, found: _Fitted) -> str:
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
