"""The paper's mixture, digit by digit, and what speaks against it.

Source: "Resa" (arXiv 2506.09967), section 5; the recipe was found by search over its Table 6.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy import special
from sklearn.mixture import GaussianMixture

from resa_lens import stats
from resa_lens.errors import BadInputError
from resa_lens.layers import Component, ComponentInterval, MixtureFit, Profile
from resa_lens.layers.fits import MAX_K, Fitted, matched_intervals, plain_level, plain_mixture
from resa_lens.layers.nulls import MIN_LAYERS, too_few
from resa_lens.stats import Floats

MAX_REPEATS = 5_000_000


def paper_weights(values: Floats, kind: str, baseline: float | None) -> Floats:
    """How often the paper's recipe repeats each layer [L]: its count, or 100 (score - baseline)."""
    return values if kind == "counts" else np.round(100 * (values - (baseline or 0.0)))


def fit_paper(profile: Profile, k: int, restarts: int) -> Fitted:
    """Layers repeated by weight, GaussianMixture(k, random_state=seed), all else default."""
    weights = paper_weights(profile.values, profile.kind, profile.baseline)
    if bool((weights < 0).any()):
        layer = profile.layers[int(weights.argmin())]
        return Fitted(trouble=f"layer {layer} (0-based) has the negative weight {weights.min():g}")
    total, distinct = int(weights.sum()), int(np.count_nonzero(weights))
    if total > MAX_REPEATS:
        raise BadInputError(
            f"{total} repetitions: the paper's recipe is for {MAX_REPEATS} or fewer"
        )
    if len(profile.layers) < MIN_LAYERS:
        return Fitted(n=total, trouble=too_few(len(profile.layers)))
    if total < k:
        return Fitted(n=total, trouble=f"{total} features cannot hold {k} Gaussians")
    if distinct < k:
        return Fitted(n=total, trouble=f"{distinct} layers hold all {total}, too few for {k} means")
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
    if restarts:
        extra["best_of_seeds"] = _best_of_seeds(weights, x, k, restarts)
    bic: dict[int, float] = {}
    if profile.kind == "counts":
        bic[0] = 2 * total * math.log(len(x))
        for size in range(1, min(MAX_K, distinct) + 1):
            fit = GaussianMixture(size, random_state=profile.seed).fit(data)
            bic[size] = float(fit.bic(data))
    return Fitted(
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


def _best_of_seeds(weights: Floats, x: Floats, k: int, seeds: int) -> dict[str, Any]:
    """The best of the library's random states 0 to seeds - 1, all fitted at once."""
    tables = np.tile(weights, (seeds, 1))
    fitted = plain_mixture(tables, x, k, library_seed=range(seeds))
    levels = plain_level(tables, x, *fitted)
    best, n = int(levels.argmax()), float(weights.sum())
    rows = zip(*(part[best] for part in fitted), strict=True)
    parts = [Component(float(m), float(w), math.sqrt(float(v))) for m, v, w in rows]
    return {
        "seeds": seeds,
        "log_likelihood": float(levels[best]),
        "bic": -2 * n * float(levels[best]) + (3 * k - 1) * math.log(n),
        "components": [asdict(part) for part in parts],
    }


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
    means, _, shares = plain_mixture(tables, profile.positions, len(start[0]), start)
    return matched_intervals(means, shares, start[0])


def _parameters(model: GaussianMixture) -> tuple[Floats, Floats, Floats]:
    """Means, variances and weights, each [k], of one-dimensional data."""
    means, variances, weights = (
        np.asarray(part, dtype=np.float64).ravel()
        for part in (model.means_, model.covariances_, model.weights_)
    )
    return means, variances, weights


def objections(fit: MixtureFit) -> tuple[str, ...]:
    """What speaks against a fit of the paper's recipe, a sentence with its figures each."""
    if fit.recipe != "paper" or not fit.components or fit.log_likelihood is None:
        return ()
    uniform = fit.nulls["uniform_distribution"]
    run_on, best = fit.nulls["run_to_convergence"], fit.nulls.get("best_of_seeds")
    steps = f"{fit.iterations} iteration{'s' * (fit.iterations != 1)}"
    own = f"EM stopped after {steps} at {fit.log_likelihood:.4f} a sample"
    said = [
        f"{own}, where it had converged."
        if fit.converged
        else f"{own}, before it had converged; the same seed run on reaches "
        f"{run_on['log_likelihood']:.4f} with {_described(run_on['components'])}."
    ]
    levels = [fit.log_likelihood, run_on["log_likelihood"]]
    if best:
        levels.append(best["log_likelihood"])
        said.append(
            f"The best of {best['seeds']} seeds has {best['log_likelihood']:.4f} with "
            f"{_described(best['components'])}."
        )
    flat = uniform["log_likelihood"]
    beaten = sum(level < flat for level in levels)
    said.append(
        f"The uniform distribution over {len(fit.layers)} layers, which has no parameter, has "
        f"{flat:.4f}: better than {beaten} of these {len(levels)} fits."
    )
    if "entropy" in uniform and fit.entropy is not None:
        said.append(
            f"A uniform profile gets the entropy {uniform['entropy']:.4f} from the same recipe; "
            f"this one has {fit.entropy:.4f}."
        )
    if fit.bic.get(1) is not None and fit.k > 1:
        own_bic = best["bic"] if best else fit.bic.get(fit.k)
        if own_bic is not None:
            verb = "beats" if fit.bic[1] < own_bic else "does not beat"
            said.append(
                f"By the library's BIC one component ({fit.bic[1]:.1f}) {verb} {fit.k} "
                f"({own_bic:.1f}{', the best seed' if best else ''})."
            )
    return tuple(said)


def _described(components: list[dict[str, float]]) -> str:
    ordered = sorted(components, key=lambda part: part["mean"])
    means = ", ".join(f"{part['mean']:.1f}" for part in ordered)
    weights = ", ".join(f"{part['weight']:.2f}" for part in ordered)
    return f"means {means} and weights {weights}"
