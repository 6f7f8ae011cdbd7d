"""Bootstrap, permutation and the p-values of their draws."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from resa_lens.errors import BadInputError
from resa_lens.stats import arrays
from resa_lens.stats.arrays import DRAWS, Floats, Interval, Seed, check_level, vector_of


def percentile_interval(samples: ArrayLike, level: float = 0.95) -> Interval:
    """Central interval that holds ``level`` of the samples [draws]."""
    check_level(level)
    low, high = np.quantile(
        np.asarray(samples, dtype=np.float64), [0.5 - level / 2, 0.5 + level / 2]
    )
    return float(low), float(high)


def bootstrap_means(values: ArrayLike, draws: int = DRAWS, seed: Seed = 0) -> Floats:
    """Means of resamples with replacement over questions.

    Args:
        values: [n], or [n, samples]: then whole questions are drawn, with all their samples.
        draws: number of resamples.
        seed: for the random generator.

    Returns:
        [draws] means.
    """
    vector = vector_of(values, "values")
    rng = np.random.default_rng(seed)
    rows = max(1, arrays.CHUNK // vector.size)
    means = np.empty(draws)
    for start in range(0, draws, rows):
        stop = min(start + rows, draws)
        picks = rng.integers(0, vector.size, size=(stop - start, vector.size), dtype=np.int32)
        means[start:stop] = vector[picks].mean(axis=1)
    return means


def bootstrap_mean_interval(
    values: ArrayLike, level: float = 0.95, draws: int = DRAWS, seed: Seed = 0
) -> Interval:
    """Percentile bootstrap interval of the mean over questions; values as `bootstrap_means`."""
    return percentile_interval(bootstrap_means(values, draws, seed), level)


def student_interval(
    value: float | None, error: float | None = None, freedom: float = math.inf
) -> tuple[float | None, float | None]:
    """Student's 95 % interval of a mean with its standard error; no ends where one is unknown."""
    if value is None or error is None or freedom <= 0:
        return None, None
    reach = float(scipy.stats.t.ppf(0.975, freedom)) * error
    return value - reach, value + reach


def permutation_p_value(observed: float, null_draws: ArrayLike) -> float:
    """(1 + number of null draws at least as large) / (1 + number of draws)."""
    null = np.asarray(null_draws, dtype=np.float64)
    # Equal statistics reached by another order of summation must count as ties, in any unit.
    finite = np.abs(null[np.isfinite(null)])
    slack = 1e-9 * max(abs(observed), float(finite.max(initial=0.0)))
    return float((1 + np.count_nonzero(null >= observed - slack)) / (1 + null.size))


def sign_flip_p_value(differences: ArrayLike, draws: int = DRAWS, seed: Seed = 0) -> float:
    """Two-sided p of a zero mean: the sign of each difference [n] is flipped at random."""
    vector = vector_of(differences, "differences")
    vector = vector[vector != 0]
    if vector.size == 0:
        return 1.0
    rng = np.random.default_rng(seed)
    rows = max(1, arrays.CHUNK // vector.size)
    parts = []
    for start in range(0, draws, rows):
        signs = rng.integers(0, 2, size=(min(rows, draws - start), vector.size), dtype=np.int8)
        parts.append(np.abs((2.0 * signs - 1.0) @ vector))
    return permutation_p_value(abs(float(vector.sum())), np.concatenate(parts))


def permutation_draws(values: ArrayLike, draws: int, seed: Seed = 0) -> Floats:
    """Shuffled copies [draws, n] of values [n], each independent of the others."""
    vector = vector_of(values, "values")
    return np.random.default_rng(seed).permuted(np.tile(vector, (draws, 1)), axis=1)


def multinomial_draws(n: int, weights: ArrayLike, draws: int, seed: Seed = 0) -> Floats:
    """Counts [draws, bins] of n things thrown into bins with probabilities weights / sum."""
    vector = vector_of(weights, "weights")
    if n < 0 or bool((vector < 0).any()) or vector.sum() <= 0:
        raise BadInputError(f"n = {n}, weights {vector.tolist()[:4]}...: none may be negative")
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, vector / vector.sum(), size=draws).astype(np.float64)


def circular_shifts(lengths: ArrayLike, draws: int, seed: Seed = 0) -> Iterator[NDArray[np.int64]]:
    """Yield indices [part of draws, n] that rotate consecutive blocks, each by its own offset.

    ``values[index]`` keeps every block's values and their order but for where the block begins.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    block = np.repeat(np.arange(sizes.size), sizes)
    start = np.repeat(sizes.cumsum() - sizes, sizes)
    place = np.arange(block.size) - start
    rng, rows = np.random.default_rng(seed), max(1, arrays.CHUNK // max(1, block.size))
    for first in range(0, draws, rows):
        offsets = rng.integers(0, sizes, size=(min(rows, draws - first), sizes.size))
        yield start + (place - offsets[:, block]) % sizes[block]


class TailCounts:
    """Of many statistics at once, how many null draws were at least as extreme."""

    def __init__(self, observed: ArrayLike, draws: int) -> None:
        self.observed, self.draws = np.asarray(observed, dtype=np.float64), draws
        self.above, self.below = (np.zeros(self.observed.shape, np.int64) for _ in range(2))

    def add(self, null: Floats, part: slice = slice(None)) -> None:
        """Count draws [statistics of the part, some draws]."""
        observed = self.observed[part, None]
        # Equal statistics reached by another order of summation must count as ties.
        slack = 1e-9 * np.abs(observed) + 1e-12
        self.above[part] += (null >= observed - slack).sum(axis=1)
        self.below[part] += (null <= observed + slack).sum(axis=1)

    def upper(self) -> Floats:
        """P-values of statistics that are large."""
        return (1 + self.above) / (1 + self.draws)

    def two_sided(self) -> Floats:
        """Twice the smaller tail, which a skewed null does not bias."""
        return np.minimum(1.0, 2 * (1 + np.minimum(self.above, self.below)) / (1 + self.draws))


def spearman(x: ArrayLike, y: ArrayLike, draws: int = DRAWS, seed: Seed = 0) -> tuple[float, float]:
    """Spearman's rank correlation of x [n] and y [n], and its two-sided permutation p-value.

    Returns (0, 1) where one side does not vary.
    """
    first, second = scipy.stats.rankdata(vector_of(x, "x")), scipy.stats.rankdata(vector_of(y, "y"))
    if first.size != second.size or first.size < 3:
        raise BadInputError(
            f"{first.size} and {second.size} values: give the same number, 3 or more"
        )
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((first @ first) * (second @ second)))
    if scale == 0.0:
        return 0.0, 1.0
    rho = float(first @ second) / scale
    null = np.abs(permutation_draws(first, draws, seed) @ second) / scale
    return rho, permutation_p_value(abs(rho), null)
