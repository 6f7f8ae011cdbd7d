"""What is permuted or drawn to judge a profile over layers, and the batched fits this needs.

A profile is one number per candidate layer, a count or a score; profiles are ``[draws, L]``.

Counts: the statistic is what is claimed, the gain in BIC of the best mixture (K = 1 to `MAX_K`)
over the uniform distribution.  The observed and the drawn profiles get the same quick fit on the
same coarse grid from the same start, so the p-value is exact whatever local optimum a fit finds.

Scores have no likelihood.  With residuals r = score - mean and the kernel
k_h(i, j) = exp(-(i - j)^2 / 4h^2) (two Gaussians of sd h convolved), r' k_h r is the locally most
powerful statistic for lumps of sd h.  Its cube root is nearly normal (Wilson and Hilferty 1931),
so widths are compared on that scale: the largest standardised cube root over `WIDTHS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import optimize, special
from scipy import stats as distributions
from scipy.special import ndtr
from threadpoolctl import threadpool_limits

from resa_lens import stats
from resa_lens.layers import Component, Profile
from resa_lens.stats import Floats, Seed

ONE_THREAD = threadpool_limits.wrap(limits=1)
"""The products here are small: on two busy cores a second BLAS thread made a fit 40 times slower
(0.24 against 11 s, 2026-11-22), because the threads wait for each other by spinning."""
WIDTHS = (0.7, 1.4, 2.8, 5.6)  # layers: from neighbours alike to a slope over all
MAX_K = 5
MIN_LAYERS = 6
MIN_SD = 0.5  # layers: a narrower Gaussian is a spike on one integer
STARTS = 32
_TINY = 1e-300


@dataclass(frozen=True)
class NullResult:
    """One null beside its statistic."""

    statistic: str
    """What was measured, in words."""
    value: float
    """The profile's own statistic."""
    p: float
    """Probability of a value at least as extreme under the null."""
    draws: int
    """Random draws; 0 where the distribution is known."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def _lumpiness(profiles: Floats, layers: Floats) -> Floats:
    """Statistic for scores [draws, L], the observed first: [draws].

    Standardising over observed and null draws together keeps the test exact (exchangeable rows).
    """
    residuals = profiles - profiles.mean(axis=1, keepdims=True)
    distance = (layers[:, None] - layers[None, :]) ** 2
    scores = []
    for width in WIDTHS:
        kernel = np.exp(-distance / (4 * width**2))
        roots = np.cbrt(np.einsum("dl,lm,dm->d", residuals, kernel, residuals, optimize=True))
        spread = roots.std()
        if spread > 1e-9 * (1e-9 + np.abs(roots).max()):
            scores.append((roots - roots.mean()) / spread)
    return np.max(scores, axis=0) if scores else np.zeros(len(profiles))


def _mixture_gain(profiles: Floats, layers: Floats) -> Floats:
    """Gain in BIC of the best quick mixture over the uniform, counts [draws, L] to [draws]."""
    n = profiles.sum(axis=1)
    grid = ComponentGrid.over(layers, MIN_SD, 0.5, 6)
    best = np.full(len(profiles), -np.inf)
    for k in range(1, MAX_K + 1):
        index, weights = _quantile_start(profiles, layers, k, grid)
        level = grid_mixture(profiles, grid, index, weights, 1e-3, 40)[2]
        gain = 2 * n * (level + math.log(layers.size)) - (3 * k - 1) * np.log(n)
        best = np.maximum(best, gain)
    return best


def _result(scores: Floats, name: str) -> NullResult:
    """The first score against the others."""
    p_value = stats.permutation_p_value(float(scores[0]), scores[1:])
    return NullResult(name, float(scores[0]), p_value, scores.size - 1)


@ONE_THREAD
def uniform_null(counts: Floats, layers: Floats, draws: int, seed: Seed) -> NullResult:
    """Counts [L] against as many features thrown uniformly onto the layers [L]."""
    null = stats.multinomial_draws(round(counts.sum()), np.ones(counts.size), draws, seed)
    scores = _mixture_gain(np.vstack([counts, null]), layers)
    return _result(scores, "gain in BIC over the uniform, features thrown uniformly on layers")


@ONE_THREAD
def permutation_null(
    values: Floats, layers: Floats, draws: int, seed: Seed, kind: str = "counts"
) -> NullResult:
    """Values [L] against the same values shuffled over the layers [L].

    Only the order is destroyed: it rejects where neighbours are alike, not at a lone high layer.
    """
    tables = np.vstack([values, stats.permutation_draws(values, draws, seed)])
    if kind == "counts":
        name = "gain in BIC over the uniform, counts shuffled over layers"
        return _result(_mixture_gain(tables, layers), name)
    return _result(_lumpiness(tables, layers), "smooth lumps, scores shuffled over layers")


def dispersion_null(counts: Floats) -> NullResult:
    """Variance over mean of counts [L], with its chi-square p (large means clustered)."""
    index = float(counts.var(ddof=1) / counts.mean())
    p_value = float(distributions.chi2.sf((counts.size - 1) * index, counts.size - 1))
    return NullResult("variance over mean of the counts", index, p_value, 0)


def noise_null(scores: Floats, noise: float) -> NullResult:
    """Variance of scores [L] over the variance of one score's noise, with its chi-square p."""
    ratio = float(scores.var(ddof=1) / noise**2)
    p_value = float(distributions.chi2.sf((scores.size - 1) * ratio, scores.size - 1))
    return NullResult("variance between layers over variance of the noise", ratio, p_value, 0)


def profile_nulls(profile: Profile) -> dict[str, Any]:
    """Nulls that need no fit; none where the profile is too small or empty."""
    values, layers, seed = profile.values, profile.positions, profile.seed
    found: dict[str, Any] = {}
    if len(layers) < MIN_LAYERS:
        return found
    if profile.kind == "scores":
        if profile.noise is not None:
            found["noise"] = noise_null(values, profile.noise).to_dict()
    elif bool((values < 0).any()) or values.sum() == 0:
        return found
    else:
        found["uniform"] = uniform_null(values, layers, profile.draws, [seed, 1]).to_dict()
        found["dispersion"] = dispersion_null(values).to_dict()
    null = permutation_null(values, layers, profile.draws, [seed, 2], profile.kind)
    found["permutation"] = null.to_dict()
    return found


def alignment(means_a: Sequence[float], means_b: Sequence[float]) -> float:
    """Largest difference of the sorted component means of two profiles, in layers."""
    if len(means_a) != len(means_b) or len(means_a) == 0:
        return float("nan")
    return float(np.abs(np.sort(means_a) - np.sort(means_b)).max())


@ONE_THREAD
def alignment_null(
    means_a: Sequence[float],
    means_b: Sequence[float],
    counts_a: Floats,
    layers: Sequence[int],
    *,
    draws: int = 1000,
    seed: Seed = 0,
) -> NullResult:
    """Do two profiles' means lie closer than those of a shuffled profile would?

    Profile a's counts [L] are shuffled over the layers and refitted by `plain_mixture`; p is the
    share of shuffles whose means come at least as close to profile b's.
    """
    observed = alignment(means_a, means_b)
    name = "largest difference of sorted means, counts shuffled over layers"
    if not np.isfinite(observed):
        return NullResult(name, observed, 1.0, 0)
    shuffled = stats.permutation_draws(counts_a, draws, seed)
    means, _, _ = plain_mixture(shuffled, np.asarray(layers, dtype=np.float64), len(means_a))
    gaps = np.abs(np.sort(means, axis=1) - np.sort(means_b)).max(axis=1)
    return NullResult(name, observed, stats.permutation_p_value(-observed, -gaps), draws)


def plain_mixture(
    counts: Floats,
    layers: Floats,
    k: int,
    start: tuple[Floats, Floats, Floats] | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
) -> tuple[Floats, Floats, Floats]:
    """Free Gaussian mixtures of histograms [draws, L] by EM with scikit-learn's stopping rule.

    The start is one-dimensional k-means from the quantiles, or ``start`` = (means, variances,
    weights), each [k].  Returns means, variances and weights, each [draws, k].
    """
    rows = len(counts)
    total = counts.sum(axis=1)
    if start is None:
        means = _quantiles(counts, layers, k)
        variances = weights = np.ones((rows, k))
        for _ in range(20):
            nearest = np.abs(layers[None, None, :] - means[:, :, None]).argmin(axis=1)
            mass = counts[:, None, :] * (nearest[:, None, :] == np.arange(k)[None, :, None])
            means, variances, weights = _moments(mass, layers, total)
    else:
        means, variances, weights = (np.tile(part, (rows, 1)) for part in start)
    previous = np.full(rows, -np.inf)
    active = np.arange(rows)
    for _ in range(max_iterations):
        m, v, w, c = means[active], variances[active], weights[active], counts[active]
        density = np.exp(-((layers - m[:, :, None]) ** 2) / (2 * v[:, :, None]))
        joint = (w / np.sqrt(2 * np.pi * v))[:, :, None] * density + _TINY
        mixed = joint.sum(axis=1)
        level = (c * np.log(mixed)).sum(axis=1) / total[active]
        mass = joint / mixed[:, None, :] * c[:, None, :]
        means[active], variances[active], weights[active] = _moments(mass, layers, total[active])
        going = np.abs(level - previous[active]) >= tolerance
        previous[active] = level
        active = active[going]
        if active.size == 0:
            break
    return means, variances, weights


def _moments(mass: Floats, layers: Floats, total: Floats) -> tuple[Floats, Floats, Floats]:
    """Means, variances and weights [draws, k] of masses [draws, k, L]."""
    share = mass.sum(axis=2) + 1e-12
    means = mass @ layers / share
    variances = (mass * (layers - means[:, :, None]) ** 2).sum(axis=2) / share + 1e-6
    return means, variances, share / total[:, None]


def layer_masses(means: Floats, sds: Floats, layers: Floats) -> Floats:
    """Probability of each candidate layer [..., L] under Gaussians with means and sds [...].

    Integrated over [layer - 1/2, layer + 1/2] and normalised to the candidate layers.
    """
    z_high = (layers + 0.5 - means[..., None]) / sds[..., None]
    z_low = (layers - 0.5 - means[..., None]) / sds[..., None]
    # In the upper tail 1 - 1 would lose all digits: use the symmetric lower tail there.
    flip = z_low > 0
    mass = np.where(flip, ndtr(-z_low) - ndtr(-z_high), ndtr(z_high) - ndtr(z_low)) + _TINY
    return mass / mass.sum(axis=-1, keepdims=True)


@dataclass(frozen=True)
class ComponentGrid:
    """All Gaussians that a batched fit may choose from: G pairs of mean and sd."""

    means: Floats
    sds: Floats
    masses: Floats
    """[G, L]"""

    @classmethod
    def over(cls, layers: Floats, min_sd: float, step: float, widths: int) -> ComponentGrid:
        """Means every ``step`` layers over the candidates; sds from min_sd to half their span."""
        middle = np.arange(layers.min(), layers.max() + step / 2, step)
        spread = np.geomspace(min_sd, max(2 * min_sd, (np.ptp(layers) + 1) / 2), widths)
        means, sds = (part.ravel() for part in np.meshgrid(middle, spread, indexing="ij"))
        return cls(means, sds, layer_masses(means, sds, layers))

    def nearest(self, means: Floats, sds: Floats) -> np.ndarray:
        """Index of the grid's Gaussian nearest each (mean, sd)."""
        gap = np.abs(self.means - means[..., None]) + 4 * np.abs(np.log(self.sds / sds[..., None]))
        return gap.argmin(axis=-1)


def _quantiles(counts: Floats, layers: Floats, k: int) -> Floats:
    """Layers at the quantiles (i + 1/2) / k of histograms [draws, L]: [draws, k]."""
    shares = np.cumsum(counts, axis=1) / counts.sum(axis=1, keepdims=True)
    targets = (np.arange(k) + 0.5) / k
    return layers[(shares[:, None, :] < targets[None, :, None]).sum(axis=2)]


def _quantile_start(
    counts: Floats, layers: Floats, k: int, grid: ComponentGrid
) -> tuple[np.ndarray, Floats]:
    """Grid index and weights, each [draws, k]."""
    means = _quantiles(counts, layers, k)
    width = max(MIN_SD, (np.ptp(layers) + 1) / (4 * k))
    return grid.nearest(means, np.full(means.shape, width)), np.full(means.shape, 1 / k)


def grid_mixture(
    counts: Floats,
    grid: ComponentGrid,
    index: np.ndarray,
    weights: Floats,
    tolerance: float = 1e-7,
    max_iterations: int = 300,
) -> tuple[np.ndarray, Floats, Floats, int]:
    """EM whose M-step picks, exactly, the best Gaussian of the grid for each component.

    It ends where no step of the grid's size gains: `robust_mixture` goes on from there.

    Args:
        counts: [B, L] histograms (or non-negative masses).
        grid: G Gaussians.
        index: [B, K] Gaussians to start from.
        weights: [B, K] weights to start from.
        tolerance: a row stops when its log-likelihood a sample gains less.
        max_iterations: for all rows.

    Returns:
        index [B, K], weights [B, K], log-likelihood a sample [B], iterations.
    """
    index, weights = index.copy(), weights.copy()
    total = counts.sum(axis=1)
    logs = np.log(grid.masses).T.astype(np.float32)
    level = np.full(len(counts), -np.inf)
    active = np.arange(len(counts))
    iterations = 0
    while active.size and iterations < max_iterations:
        iterations += 1
        c = counts[active]
        joint = weights[active][:, :, None] * grid.masses[index[active]] + _TINY
        mixed = joint.sum(axis=1)
        new = (c * np.log(mixed)).sum(axis=1) / total[active]
        going = new - level[active] >= tolerance
        level[active] = np.maximum(new, level[active])
        active, joint, mixed, c = active[going], joint[going], mixed[going], c[going]
        mass = joint / mixed[:, None, :] * c[:, None, :]
        weights[active] = mass.sum(axis=2) / total[active, None]
        best = (mass.reshape(-1, c.shape[1]).astype(np.float32) @ logs).argmax(axis=1)
        index[active] = best.reshape(-1, index.shape[1])
    return index, weights, level, iterations


@dataclass(frozen=True)
class RobustMixture:
    """A robust mixture: arrays [k], and its log-likelihood a sample."""

    means: Floats
    sds: Floats
    weights: Floats
    level: float
    converged: bool = True
    iterations: int = 0

    @property
    def components(self) -> tuple[Component, ...]:
        """The Gaussians, by mean."""
        rows = zip(self.means, self.weights, self.sds, strict=True)
        return tuple(Component(float(m), float(w), float(s)) for m, w, s in rows)

    def entropy(self, layers: Floats) -> float:
        """Of the probabilities of the candidate layers [L], in nats."""
        if not self.means.size:
            return math.log(len(layers))
        return float(special.entr(self.weights @ layer_masses(self.means, self.sds, layers)).sum())


def robust_mixture(
    counts: Floats, x: Floats, k: int, grid: ComponentGrid, seed: int
) -> RobustMixture:
    """EM on the grid from many starts, the best one run to convergence off the grid."""
    rng = np.random.default_rng([seed, 4, k])
    starts = rng.choice(x, size=(STARTS, k), p=counts / counts.sum())
    widths = rng.choice(np.unique(grid.sds), size=(STARTS, k))
    tables = np.tile(counts, (STARTS, 1))
    index, weights, levels, iterations = grid_mixture(
        tables, grid, grid.nearest(starts, widths), np.full((STARTS, k), 1 / k)
    )
    top = int(levels.argmax())
    means, sds = grid.means[index[top]], grid.sds[index[top]]
    share = np.clip(weights[top], 1e-6, None)

    def split(point: Floats) -> tuple[Floats, Floats, Floats]:
        return point[:k], np.exp(point[k : 2 * k]), special.softmax(np.append(0.0, point[2 * k :]))

    def loss(point: Floats) -> float:
        m, s, w = split(point)
        return -float(counts @ np.log(w @ layer_masses(m, s, x))) / counts.sum()

    limits = [(x[0], x[-1])] * k + [(math.log(MIN_SD), math.log(np.ptp(x) + 1))] * k
    start = np.concatenate([means, np.log(sds), np.log(share[1:] / share[0])])
    result = optimize.minimize(
        loss, start, method="L-BFGS-B", bounds=limits + [(-15.0, 15.0)] * (k - 1)
    )
    means, sds, share = split(result.x)
    order = means.argsort()
    return RobustMixture(
        means[order],
        sds[order],
        share[order],
        -float(result.fun),
        bool(result.success),
        iterations + int(result.nit),
    )


def robust_bootstrap(profile: Profile, fitted: RobustMixture) -> tuple[Floats, Floats]:
    """Means and weights [draws, k] of resampled features: the better of two starts, K kept."""
    n, k, x = int(profile.values.sum()), len(fitted.means), profile.positions
    tables = stats.multinomial_draws(n, profile.values, profile.draws, [profile.seed, 5])
    grid = ComponentGrid.over(x, MIN_SD, max(0.25, len(x) / 100), 8)
    own, even = _quantile_start(tables, x, k, grid)
    near = np.tile(grid.nearest(fitted.means, fitted.sds), (len(tables), 1))
    kept = np.tile(fitted.weights, (len(tables), 1))
    tries = [grid_mixture(tables, grid, *start, 1e-5, 100) for start in ((near, kept), (own, even))]
    second = (tries[1][2] > tries[0][2])[:, None]
    index = np.where(second, tries[1][0], tries[0][0])
    return grid.means[index], np.where(second, tries[1][1], tries[0][1])
