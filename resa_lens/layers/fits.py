"""Gaussian mixtures of profiles over layers: the batched fits that the nulls and recipes share.

Profiles are counts (or non-negative masses) ``[draws, L]`` at candidate layers ``[L]``.  `plain` is
scikit-learn's EM; `grid` integrates each Gaussian over [layer - 1/2, layer + 1/2], truncates it to
the candidate layers and keeps its sd at half a layer or more; `robust` goes on from the grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special
from scipy.special import ndtr
from threadpoolctl import threadpool_limits

from resa_lens import stats
from resa_lens.layers import Component, ComponentInterval, Profile
from resa_lens.stats import Floats

ONE_THREAD = threadpool_limits.wrap(limits=1)
"""The products here are small: on two busy cores a second BLAS thread made a fit 40 times slower
(0.24 against 11 s, 2026-11-22), because the threads wait for each other by spinning."""
MAX_K = 5
MIN_SD = 0.5  # layers: a narrower Gaussian is a spike on one integer
STARTS, POLISHED = 16, 6
MEANS = 128
"""Means of a grid at most, so that the work of many layers grows with their number alone."""
PLACES = 40
"""Layers at most where one more Gaussian is tried; of more layers an even selection."""
PAIRS, PAIR_SDS = 7, (1.0, 3.0, 9.0)
"""Places, and sds in layers, of the pairs that K = 2 starts from."""
_TINY = 1e-300


def plain_mixture(
    counts: Floats,
    layers: Floats,
    k: int,
    start: tuple[Floats, Floats, Floats] | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    library_seed: int | Sequence[int] | None = None,
) -> tuple[Floats, Floats, Floats]:
    """Free Gaussian mixtures of histograms [draws, L] by EM with scikit-learn's stopping rule.

    The start is one-dimensional k-means, from the quantiles or, with a ``library_seed`` (one for
    all draws, or one each), from the centres of the library's random_state; or ``start`` = (means,
    variances, weights), each [k].  Returns means, variances and weights, each [draws, k].
    """
    rows = len(counts)
    total = counts.sum(axis=1)
    if start is None:
        means = (
            _quantiles(counts, layers, k)
            if library_seed is None
            else _library_centres(counts, layers, k, library_seed)
        )
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


def _library_centres(
    counts: Floats, layers: Floats, k: int, random_state: int | Sequence[int]
) -> Floats:
    """Centres [draws, k] that scikit-learn's greedy k-means++ starts from on the repeated layers.

    One random_state is the same few random numbers for every data set, hence the same quantiles of
    it; starts drawn anew for each profile lead to more scattered fits than the library's.
    """
    tries = 2 + int(math.log(k))
    numbers = np.array(
        [
            np.random.RandomState(seed).random_sample(1 + (k - 1) * tries)
            for seed in np.atleast_1d(random_state)
        ]
    )
    squares = (layers[:, None] - layers[None, :]) ** 2
    rows = np.arange(len(counts))
    edges = counts.cumsum(axis=1)
    first = (edges <= numbers[:, :1] * edges[:, -1:]).sum(axis=1)
    chosen, nearest = first[:, None], squares[first]
    for step in range(1, k):
        edges = (nearest * counts).cumsum(axis=1)
        points = numbers[:, 1 + (step - 1) * tries : 1 + step * tries] * edges[:, -1:]
        tried = (edges[:, None, :] < points[:, :, None]).sum(axis=2)
        gaps = np.minimum(nearest[:, None, :], squares[tried])
        best = (gaps * counts[:, None, :]).sum(axis=2).argmin(axis=1)
        nearest, chosen = gaps[rows, best], np.column_stack([chosen, tried[rows, best]])
    return layers[chosen]


def plain_level(
    counts: Floats, layers: Floats, means: Floats, variances: Floats, weights: Floats
) -> Floats:
    """Log-likelihood a sample [draws] of histograms [draws, L] under free Gaussians [draws, k]."""
    gaps = (layers - means[:, :, None]) ** 2 / (2 * variances[:, :, None])
    joint = (weights / np.sqrt(2 * np.pi * variances))[:, :, None] * np.exp(-gaps) + _TINY
    return (counts * np.log(joint.sum(axis=1))).sum(axis=1) / counts.sum(axis=1)


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


def mass_slopes(means: Floats, sds: Floats, layers: Floats) -> tuple[Floats, Floats, Floats]:
    """`layer_masses` [k, L], and their derivatives by the mean and by the logarithm of the sd."""
    masses = layer_masses(means, sds, layers)
    z_high = (layers + 0.5 - means[:, None]) / sds[:, None]
    z_low = (layers - 0.5 - means[:, None]) / sds[:, None]
    high, low = (np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) for z in (z_high, z_low))
    # As in `layer_masses`: between layers far apart a narrow Gaussian reaches none.
    total = (ndtr(z_high) - ndtr(z_low) + _TINY).sum(axis=1, keepdims=True)

    def normalised(slope: Floats) -> Floats:
        return (slope - masses * slope.sum(axis=1, keepdims=True)) / total

    by_mean = normalised((low - high) / sds[:, None])
    return masses, by_mean, normalised(z_low * low - z_high * high)


@dataclass(frozen=True)
class ComponentGrid:
    """All Gaussians that a batched fit may choose from: G pairs of mean and sd."""

    means: Floats
    sds: Floats
    masses: Floats
    """[G, L]"""

    @classmethod
    def over(cls, layers: Floats, min_sd: float, step: float, widths: int) -> ComponentGrid:
        """Means every ``step`` candidates, or coarser; sds from min_sd to half their span.

        No more than `MEANS` means: the work grows with layers x means, and candidates far apart
        have nothing between them that a mean could stand for.
        """
        last = layers.size - 1
        step = max(step, last / MEANS)
        ranks = np.arange(0, last + step / 2, step).clip(max=last)
        middle = np.unique(np.interp(ranks, np.arange(layers.size), layers))
        spread = np.geomspace(min_sd, max(2 * min_sd, (np.ptp(layers) + 1) / 2), widths)
        means, sds = (part.ravel() for part in np.meshgrid(middle, spread, indexing="ij"))
        return cls(means, sds, layer_masses(means, sds, layers))

    def nearest(self, means: Floats, sds: Floats) -> np.ndarray:
        """Index of the grid's Gaussian nearest each (mean, sd)."""
        # All pairs of means and sds, sds fastest: each side has its own nearest.
        middle, spread = np.unique(self.means), np.unique(self.sds)
        mean = np.abs(middle - means[..., None]).argmin(axis=-1)
        sd = np.abs(np.log(spread / sds[..., None])).argmin(axis=-1)
        return mean * spread.size + sd


def _quantiles(counts: Floats, layers: Floats, k: int) -> Floats:
    """Layers at the quantiles (i + 1/2) / k of histograms [draws, L]: [draws, k]."""
    shares = np.cumsum(counts, axis=1) / counts.sum(axis=1, keepdims=True)
    targets = (np.arange(k) + 0.5) / k
    return layers[(shares[:, None, :] < targets[None, :, None]).sum(axis=2)]


def quantile_start(
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


def robust_mixtures(counts: Floats, x: Floats, largest: int, seed: int) -> Iterator[RobustMixture]:
    """Yield the best fit of K = 1 to ``largest`` Gaussians to counts (or masses) [L] at x [L]."""
    grid = ComponentGrid.over(x, MIN_SD, 0.25, 12)
    fit = None
    for k in range(1, largest + 1):
        fit = robust_mixture(counts, x, k, grid, seed, fit)
        yield fit


def robust_mixture(
    counts: Floats,
    x: Floats,
    k: int,
    grid: ComponentGrid,
    seed: int,
    smaller: RobustMixture | None = None,
) -> RobustMixture:
    """EM on the grid from many starts, the best of them run to convergence off the grid.

    Where the best fit of k - 1 Gaussians is given as `smaller`, it is a start too, with one narrow
    Gaussian more at each layer: without these, eight seeds' maxima differed by up to 2.6 nats (100
    features over 26 layers, K = 1 to 5), with them by 0 up to K = 3 and by up to 1.4 beyond.  Two
    Gaussians start from pairs of even places and of sds too: three lumps fitted by two stopped
    1.1 nats short for some seeds.
    """
    rng = np.random.default_rng([seed, 4, k])
    middle = rng.choice(x, size=(STARTS, k), p=counts / counts.sum())
    widths = rng.choice(np.unique(grid.sds), size=(STARTS, k))
    share = np.full((STARTS, k), 1 / k)
    if smaller is not None and k > 1:
        places = _even(x, PLACES)
        for sd in (MIN_SD, 4 * MIN_SD):
            others = np.tile(smaller.means, (places.size, 1))
            middle = np.vstack([middle, np.column_stack([others, places])])
            added = np.tile(np.append(smaller.sds, sd), (places.size, 1))
            widths = np.vstack([widths, added])
            kept = np.append(smaller.weights * (k - 1) / k, 1 / k)
            share = np.vstack([share, np.tile(kept, (places.size, 1))])
    if k == 2:
        places = _even(x, PAIRS)
        pairs = [
            ((places[i], places[j]), sds)
            for i, j in itertools.combinations(range(places.size), 2)
            for sds in itertools.product(PAIR_SDS, repeat=2)
        ]
        middle = np.vstack([middle, [means for means, _ in pairs]])
        widths = np.vstack([widths, [sds for _, sds in pairs]])
        share = np.vstack([share, np.full((len(pairs), 2), 0.5)])
    tables = np.tile(counts, (len(middle), 1))
    index, weights, levels, iterations = grid_mixture(
        tables, grid, grid.nearest(middle, widths), share
    )
    limits = [(x[0], x[-1])] * k + [(math.log(MIN_SD), math.log(np.ptp(x) + 1))] * k
    limits += [(-15.0, 15.0)] * (k - 1)
    found: list[Any] = []
    for row in _distinct(index, levels)[:POLISHED]:
        share = np.log(np.clip(weights[row], 1e-6, None))
        start = [grid.means[index[row]], np.log(grid.sds[index[row]]), share[1:] - share[0]]
        found.append(
            optimize.minimize(
                _mixture_loss,
                np.concatenate(start),
                (counts, x, k),
                jac=True,
                method="L-BFGS-B",
                bounds=limits,
            )
        )
    best = min(found, key=lambda result: float(result.fun))
    means, sds, share = _split(best.x, k)
    order = means.argsort()
    return RobustMixture(
        means[order],
        sds[order],
        share[order],
        -float(best.fun),
        bool(best.success),
        iterations + int(best.nit),
    )


def _even(x: Floats, most: int) -> Floats:
    """All of the layers [L], or so many of them at even ranks."""
    ranks = np.linspace(0, x.size - 1, min(most, x.size))
    return x[np.round(ranks).astype(int)]


def _distinct(index: np.ndarray, levels: Floats) -> list[int]:
    """Rows of index [starts, k] that differ in more than order, best level first."""
    rows: dict[tuple[int, ...], int] = {}
    for row in (-levels).argsort(kind="stable").tolist():
        rows.setdefault(tuple(np.sort(index[row]).tolist()), row)
    return list(rows.values())


def _split(point: Floats, k: int) -> tuple[Floats, Floats, Floats]:
    """Means, sds and weights, each [k], of a point of the optimiser."""
    return point[:k], np.exp(point[k : 2 * k]), special.softmax(np.append(0.0, point[2 * k :]))


def _mixture_loss(point: Floats, counts: Floats, x: Floats, k: int) -> tuple[float, Floats]:
    """Negative log-likelihood a sample of counts [L] at layers x [L], and its gradient."""
    m, s, w = _split(point, k)
    masses, by_mean, by_log_sd = mass_slopes(m, s, x)
    mixed = w @ masses
    share = counts / (counts.sum() * mixed)
    pull = masses @ share
    slopes = (w * (by_mean @ share), w * (by_log_sd @ share), (w * (pull - w @ pull))[1:])
    return -float(counts @ np.log(mixed)) / counts.sum(), -np.concatenate(slopes)


def grid_refit(counts: Floats, x: Floats, k: int) -> tuple[Floats, Floats]:
    """Means and weights [draws, k] of histograms [draws, L], from their quantiles."""
    grid = ComponentGrid.over(x, MIN_SD, max(0.25, len(x) / 100), 8)
    index, weights, _, _ = grid_mixture(
        counts, grid, *quantile_start(counts, x, k, grid), 1e-5, 100
    )
    return grid.means[index], weights


def robust_bootstrap(profile: Profile, fitted: RobustMixture) -> tuple[Floats, Floats]:
    """Means and weights [draws, k] of resampled features: the better of two starts, K kept."""
    n, k, x = int(profile.values.sum()), len(fitted.means), profile.positions
    tables = stats.multinomial_draws(n, profile.values, profile.draws, [profile.seed, 5])
    grid = ComponentGrid.over(x, MIN_SD, max(0.25, len(x) / 100), 8)
    own, even = quantile_start(tables, x, k, grid)
    near = np.tile(grid.nearest(fitted.means, fitted.sds), (len(tables), 1))
    kept = np.tile(fitted.weights, (len(tables), 1))
    tries = [grid_mixture(tables, grid, *start, 1e-5, 100) for start in ((near, kept), (own, even))]
    second = (tries[1][2] > tries[0][2])[:, None]
    index = np.where(second, tries[1][0], tries[0][0])
    return grid.means[index], np.where(second, tries[1][1], tries[0][1])


@dataclass(frozen=True)
class Fitted:
    """What a recipe found in a profile, before any verdict."""

    n: int = 0
    components: tuple[Component, ...] = ()
    entropy: float | None = None
    log_likelihood: float | None = None
    converged: bool = False
    iterations: int = 0
    intervals: tuple[ComponentInterval, ...] = ()
    bic: dict[int, float] | None = None
    trends: dict[str, float] | None = None
    nulls: dict[str, Any] | None = None
    trouble: str = ""
    """Why there is no fit or none to trust, as a clause."""


def matched_intervals(
    means: Floats, weights: Floats, fitted: Floats
) -> tuple[ComponentInterval, ...]:
    """Percentile intervals of draws [draws, k], matched to the fitted means [k] by rank."""
    order = means.argsort(axis=1)
    means, weights = np.take_along_axis(means, order, 1), np.take_along_axis(weights, order, 1)
    return tuple(
        ComponentInterval(
            stats.percentile_interval(means[:, rank]), stats.percentile_interval(weights[:, rank])
        )
        for rank in fitted.argsort().argsort()
    )
