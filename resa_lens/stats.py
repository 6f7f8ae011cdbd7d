"""All resampling of the project: intervals, paired comparisons, permutation p-values.

Every function takes numpy arrays (or what numpy can read) and a seed, and returns plain floats or
frozen dataclasses.  Shapes: ``n`` questions, ``samples`` answers per question, ``draws`` resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from resa_lens.errors import BadInputError

Seed = int | Sequence[int]
Interval = tuple[float, float]
Floats = NDArray[np.float64]

DRAWS = 10_000
_CHUNK = 4_000_000  # elements held at once while resampling: 32 MB


def _vector(values: ArrayLike, name: str) -> Floats:
    """Finite floats [n] from values [n], or from [n, samples] averaged over samples."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 2 and array.shape[1] > 0:
        finite = bool(np.isfinite(array).all())
        array = array.mean(axis=1)
    else:
        finite = bool(np.isfinite(array).all())
    if array.ndim != 1 or array.size == 0:
        raise BadInputError(f"{name} has shape {np.shape(values)}: give [n] or [n, samples], n > 0")
    if not finite:
        raise BadInputError(
            f"{name} holds a value that is not finite: every score must be a number"
        )
    return array


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise BadInputError(f"level {level} is no confidence level: give one between 0 and 1")


def _check_counts(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise BadInputError(f"{successes} successes of {n}: give 0 <= successes <= n and n >= 1")


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (1927)."""
    _check_counts(successes, n)
    _check_level(level)
    z = float(special.ndtri(0.5 + level / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 of n and n of n the formula reaches the border exactly; rounding may miss it.
    low = 0.0 if successes == 0 else max(0.0, float(centre - half))
    high = 1.0 if successes == n else min(1.0, float(centre + half))
    return low, high


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Exact two-sided interval of a proportion (Clopper and Pearson 1934)."""
    _check_counts(successes, n)
    _check_level(level)
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, n - successes + 1, tail))
    high = 1.0
    if successes < n:
        high = float(special.betaincinv(successes + 1, n - successes, 1 - tail))
    return low, high


def percentile_interval(samples: ArrayLike, level: float = 0.95) -> Interval:
    """Central interval that holds ``level`` of the samples [draws]."""
    _check_level(level)
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
    vector = _vector(values, "values")
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // vector.size)
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


def _differences(a: ArrayLike, b: ArrayLike) -> Floats:
    first, second = _vector(a, "a"), _vector(b, "b")
    if first.size != second.size:
        raise BadInputError(
            f"{first.size} and {second.size} questions: paired runs need the same questions"
        )
    return second - first


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, level: float = 0.95, draws: int = DRAWS, seed: Seed = 0
) -> tuple[float, Interval]:
    """Mean of b - a over the same questions, with its percentile bootstrap interval.

    a and b are [n] or [n, samples]; the number of samples may differ.  Where all differences are
    equal the interval has no width: `compare_paired` handles that case.
    """
    differences = _differences(a, b)
    interval = percentile_interval(bootstrap_means(differences, draws, seed), level)
    return float(differences.mean()), interval


def mcnemar_exact(b_only: int, a_only: int) -> float:
    """McNemar's exact two-sided p-value from the questions that only one of two runs solved."""
    if b_only < 0 or a_only < 0:
        raise BadInputError(f"counts {b_only} and {a_only}: discordant pairs cannot be negative")
    if b_only + a_only == 0:
        return 1.0
    tail = float(stats.binom.cdf(min(b_only, a_only), b_only + a_only, 0.5))
    return min(1.0, 2 * tail)


def permutation_p_value(observed: float, null_draws: ArrayLike) -> float:
    """(1 + number of null draws at least as large) / (1 + number of draws)."""
    null = np.asarray(null_draws, dtype=np.float64)
    # Equal statistics reached by another order of summation must count as ties.
    slack = 1e-9 * max(1.0, abs(observed))
    return float((1 + np.count_nonzero(null >= observed - slack)) / (1 + null.size))


def sign_flip_p_value(differences: ArrayLike, draws: int = DRAWS, seed: Seed = 0) -> float:
    """Two-sided p of a zero mean: the sign of each difference [n] is flipped at random."""
    vector = _vector(differences, "differences")
    vector = vector[vector != 0]
    if vector.size == 0:
        return 1.0
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // vector.size)
    parts = []
    for start in range(0, draws, rows):
        signs = rng.integers(0, 2, size=(min(rows, draws - start), vector.size), dtype=np.int8)
        parts.append(np.abs((2.0 * signs - 1.0) @ vector))
    return permutation_p_value(abs(float(vector.sum())), np.concatenate(parts))


def permutation_draws(values: ArrayLike, draws: int, seed: Seed = 0) -> Floats:
    """Shuffled copies [draws, n] of values [n], each independent of the others."""
    vector = _vector(values, "values")
    return np.random.default_rng(seed).permuted(np.tile(vector, (draws, 1)), axis=1)


def multinomial_draws(n: int, weights: ArrayLike, draws: int, seed: Seed = 0) -> Floats:
    """Counts [draws, bins] of n things thrown into bins with probabilities weights / sum."""
    vector = _vector(weights, "weights")
    if n < 0 or bool((vector < 0).any()) or vector.sum() <= 0:
        raise BadInputError(f"n = {n}, weights {vector.tolist()[:4]}...: none may be negative")
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, vector / vector.sum(), size=draws).astype(np.float64)


def spearman(x: ArrayLike, y: ArrayLike, draws: int = DRAWS, seed: Seed = 0) -> tuple[float, float]:
    """Spearman's rank correlation of x [n] and y [n], and its two-sided permutation p-value.

    Returns (0, 1) where one side does not vary.
    """
    first, second = stats.rankdata(_vector(x, "x")), stats.rankdata(_vector(y, "y"))
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


def simultaneous_quantile(
    draw: Callable[[np.random.Generator, int], Floats],
    level: float = 0.95,
    draws: int = DRAWS,
    seed: Seed = 0,
) -> float:
    """Quantile of the largest absolute statistic over a family.

    ``draw(generator, draws)`` returns standardised errors [draws, family]; intervals of that many
    standard errors hold for the whole family at once.
    """
    _check_level(level)
    errors = np.abs(draw(np.random.default_rng(seed), draws))
    return float(np.quantile(errors.max(axis=1), level))


@dataclass(frozen=True)
class PairedComparison:
    """Two runs on the same questions: tuned minus base."""

    difference: float
    """Mean score of the tuned run minus that of the base run."""
    ci: Interval
    """Interval of the difference; never of zero width at zero."""
    p_value: float
    """McNemar's exact test, or a sign-flip test where scores are means of several samples."""
    changed: int
    """Questions with a different score; gained + lost."""
    gained: int
    lost: int
    n: int
    """Questions."""
    note: str
    """"changed no answer" where the two runs agree on every question, else how p was computed."""


def compare_paired(
    correct_base: ArrayLike,
    correct_tuned: ArrayLike,
    seed: Seed = 0,
    level: float = 0.95,
    draws: int = DRAWS,
) -> PairedComparison:
    """Compares two runs on the same questions (paired bootstrap and McNemar's exact test).

    Args:
        correct_base: [n] or [n, samples], 1 where correct.
        correct_tuned: the same questions in the same order.
        seed: of the bootstrap.
        level: of the interval.
        draws: of the bootstrap.

    Returns:
        The comparison.  Where no question differs, the interval is (-u, u) with u the upper
        Clopper-Pearson bound of the flip rate at 0 of n: so many flips could have been missed.
        Where every question flipped the same way, it is likewise exact instead of a point.
    """
    differences = _differences(correct_base, correct_tuned)
    n = int(differences.size)
    gained = int(np.count_nonzero(differences > 0))
    lost = int(np.count_nonzero(differences < 0))
    if gained + lost == 0:
        bound = clopper_pearson(0, n, level)[1]
        return PairedComparison(0.0, (-bound, bound), 1.0, 0, 0, 0, n, "changed no answer")
    binary = bool(np.isin(differences, (-1.0, 0.0, 1.0)).all())
    difference, ci = paired_bootstrap(correct_base, correct_tuned, level, draws, seed)
    if binary and max(gained, lost) == n:
        bound = clopper_pearson(n, n, level)[0]
        ci = (bound, 1.0) if gained else (-1.0, -bound)
    if binary:
        p_value, note = mcnemar_exact(gained, lost), "McNemar's exact test"
    else:
        p_value = sign_flip_p_value(differences, draws, seed)
        note = "sign-flip permutation test over questions"
    return PairedComparison(difference, ci, p_value, gained + lost, gained, lost, n, note)
