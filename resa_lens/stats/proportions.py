"""Intervals and tests of shares: k of n, and the difference of two shares of the same n."""

from __future__ import annotations

import numpy as np
import scipy
from numpy.typing import ArrayLike

from resa_lens.errors import BadInputError
from resa_lens.stats.arrays import Floats, Interval, check_level


def _check_counts(successes: float, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise BadInputError(f"{successes} successes of {n}: give 0 <= successes <= n and n >= 1")


def wilson_interval(successes: float, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (1927).

    `successes` may be a sum of scores between 0 and 1: they vary no more than answers that are
    right or wrong with the same mean, so the interval is then wide enough, or too wide.
    """
    _check_counts(successes, n)
    check_level(level)
    z = float(scipy.special.ndtri(0.5 + level / 2))
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
    check_level(level)
    tail = (1 - level) / 2
    low, high = 0.0, 1.0
    if successes > 0:
        low = float(scipy.special.betaincinv(successes, n - successes + 1, tail))
    if successes < n:
        high = float(scipy.special.betaincinv(successes + 1, n - successes, 1 - tail))
    return low, high


def fisher_greater(hits_a: int, n_a: int, hits_b: int, n_b: int) -> float:
    """Fisher's exact test, one-sided: is the share of a larger than that of b?"""
    for hits, n in ((hits_a, n_a), (hits_b, n_b)):
        if not 0 <= hits <= n:
            raise BadInputError(f"{hits} of {n}: give 0 <= hits <= n")
    # P(at least hits_a of the hits fall into a), all margins given.
    return min(1.0, float(scipy.stats.hypergeom.sf(hits_a - 1, n_a + n_b, hits_a + hits_b, n_a)))


def score_statistic(gained: ArrayLike, lost: ArrayLike, n: int, difference: float) -> Floats:
    """Score statistic of a true difference of two shares of the same n questions.

    Tango (1998), equation 3: about standard normal where the two runs' true difference is
    `difference`; large where they seem to differ by more.  Defined for no flips too.

    Args:
        gained: questions that only the second run solved; arrays are broadcast.
        lost: questions that only the first solved.
        n: questions.
        difference: strictly between -1 and 1.
    """
    b, c = np.asarray(gained, dtype=np.float64), np.asarray(lost, dtype=np.float64)
    linear = (2 * n - b + c) * difference - b - c
    product = -c * difference * (1 - difference)
    # The share of lost questions that is most likely under that difference.
    q = (np.sqrt(np.maximum(linear**2 - 8 * n * product, 0.0)) - linear) / (4 * n)
    variance = n * (2 * q + difference * (1 - difference))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (b - c - n * difference) / np.sqrt(np.maximum(variance, 0.0))
    return np.where(np.isnan(value), 0.0, value)


def tango_interval(gained: float, lost: float, n: int, level: float = 0.95) -> Interval:
    """Tango's score interval (1998) of the difference of two shares of the same n questions.

    The set of differences that the score test does not reject; near its nominal coverage with few
    flips or none.  Fractional counts (sums of positive and of negative differences of scores) give
    an interval that is wide enough, or too wide.
    """
    _check_counts(gained + lost, n)
    if min(gained, lost) < 0:
        raise BadInputError(f"{gained} gained and {lost} lost questions: neither can be negative")
    check_level(level)
    z = float(scipy.special.ndtri(0.5 + level / 2))
    estimate = (gained - lost) / n

    def end(sign: float, border: float) -> float:
        inside, outside = estimate, border
        if abs(estimate - border) < 1e-12:
            return border
        # Bisection: the statistic falls as the difference grows.
        while abs(outside - inside) > 1e-10:
            middle = (inside + outside) / 2
            if sign * float(score_statistic(gained, lost, n, middle)) > z:
                outside = middle
            else:
                inside = middle
        return (inside + outside) / 2

    return end(1.0, -1.0), end(-1.0, 1.0)
