"""Are two runs as good as each other, to within a margin?

A large p of a difference says only that none was seen.  Here the null hypotheses are that the
second run is worse, or better, by the margin or more: two one-sided tests (Schuirmann 1987).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from resa_lens.errors import BadInputError
from resa_lens.stats import arrays
from resa_lens.stats.arrays import DRAWS, Floats, Seed
from resa_lens.stats.paired import FEW, differences_of, is_binary
from resa_lens.stats.proportions import score_statistic
from resa_lens.stats.resampling import permutation_p_value

EXACT_TEST = "exact unconditional test of the score statistic"
BOUND_TEST = "exact unconditional test, samples bounded by whole flips"
BOOTSTRAP_TEST = "bootstrap-t over questions"

_GRID = 80  # values of the nuisance parameter


@dataclass(frozen=True)
class Equivalence:
    """Whether two runs' true scores differ by less than a margin."""

    margin: float
    """In shares: 0.02 is two points."""
    p_noninferior: float
    """Of the second run being worse by the margin or more."""
    p_equivalent: float
    """The larger of the two one-sided p-values."""
    noninferior: bool
    """The second run is not worse by the margin, at alpha."""
    equivalent: bool
    """It is neither worse nor better by the margin, at alpha."""
    alpha: float
    method: str


def noninferiority_p(gained: float, lost: float, n: int, margin: float) -> float:
    """P of a second run that is worse by the margin or more, from its flips on n questions.

    Exact and unconditional: tables (gained, lost) are ordered by Tango's statistic at the margin
    (Hsueh, Liu and Chen 2001; Sidik 2003), and p is the largest probability, over the unknown share
    of lost questions, of a table at least as extreme.  That share is searched on a grid.

    Args:
        gained: questions that only the second run solved; sums of scores are taken too.
        lost: questions that only the first solved.
        n: questions.
        margin: in shares, above 0 and below 1.

    Raises:
        BadInputError: a margin outside (0, 1), or more flips than questions.
    """
    _check_margin(margin)
    if min(gained, lost) < 0 or gained + lost > n or n < 1:
        raise BadInputError(
            f"{gained} gained and {lost} lost of {n} questions: give 0 <= flips <= questions"
        )
    observed = float(score_statistic(gained, lost, n, -margin))
    # Losing is at least as likely as the margin, and gaining is what is left of it.
    losing = np.geomspace(margin, (1 + margin) / 2, _GRID)
    # Tables of a share of 1e-12 under no value of the grid do not count.
    least, most = (int(scipy.stats.binom.ppf(tail, n, p)) for tail, p in
                   ((1e-13, losing[0]), (1 - 1e-13, losing[-1])))  # fmt: skip
    counts = np.arange(max(0, least - 1), min(n, most + 1) + 1)
    needed = _fewest_gains(counts, n, margin, observed)
    chance = scipy.stats.binom.pmf(counts, n, losing[:, None])
    gaining = np.clip((losing - margin) / (1 - losing), 0.0, 1.0)[:, None]
    beyond = np.where(needed == 0, 1.0, scipy.stats.binom.sf(needed - 1, n - counts, gaining))
    return min(1.0, float((chance * beyond).sum(axis=1).max()))


def _fewest_gains(
    lost: NDArray[np.int64], n: int, margin: float, observed: float
) -> NDArray[np.int64]:
    """The smallest gain beside each loss with a statistic at least as large; n + 1 where none."""
    slack = 1e-9 * max(1.0, abs(observed))
    low, high = np.zeros_like(lost), n - lost + 1
    # The statistic grows with the gains.
    while bool((low < high).any()):
        middle = (low + high) // 2
        reached = score_statistic(middle, lost, n, -margin) >= observed - slack
        high = np.where(reached & (low < high), middle, high)
        low = np.where(~reached & (low < high), middle + 1, low)
    return np.where(low > n - lost, n + 1, low)


def _bootstrap_t(differences: Floats, margin: float, draws: int, seed: Seed) -> tuple[float, float]:
    """P-values of being worse and of being better by the margin or more."""
    n = differences.size
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(n)
    rng, rows = np.random.default_rng(seed), max(1, arrays.CHUNK // n)
    parts = []
    for start in range(0, draws, rows):
        size = (min(rows, draws - start), n)
        drawn = differences[rng.integers(0, n, size=size, dtype=np.int32)]
        spread = np.maximum(drawn.std(axis=1, ddof=1) / np.sqrt(n), 1e-12)
        parts.append((drawn.mean(axis=1) - mean) / spread)
    null = np.concatenate(parts)
    return (
        permutation_p_value(float((mean + margin) / error), null),
        permutation_p_value(float((margin - mean) / error), -null),
    )


def _check_margin(margin: float) -> None:
    if not 0.0 < margin < 1.0:
        raise BadInputError(
            f"margin {margin} is none: give a share above 0 and below 1, 0.02 for two points"
        )


def equivalence_test(
    a: ArrayLike,
    b: ArrayLike,
    margin: float = 0.02,
    alpha: float = 0.05,
    draws: int = DRAWS,
    seed: Seed = 0,
) -> Equivalence:
    """Two one-sided tests of b - a within the margin, over the same questions.

    One answer a question: the exact test of `noninferiority_p`.  Several: the bootstrap-t over
    questions; with few changed questions, where it does not hold, the exact test on the sums of
    gained and lost score, which bounds it.

    Args:
        a: [n] or [n, samples], 1 where correct.
        b: the same questions in the same order.
        margin: in shares.
        alpha: of each of the two tests.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        BadInputError: other questions, or a margin outside (0, 1).
    """
    _check_margin(margin)
    differences = differences_of(a, b)
    n = int(differences.size)
    changed = int(np.count_nonzero(differences))
    binary = is_binary(differences)
    if binary or changed < FEW or float(np.ptp(differences)) == 0.0:
        gained = float(differences[differences > 0].sum())
        lost = float(-differences[differences < 0].sum())
        worse, better = (
            noninferiority_p(up, down, n, margin) for up, down in ((gained, lost), (lost, gained))
        )
        method = EXACT_TEST if binary else BOUND_TEST
    else:
        worse, better = _bootstrap_t(differences, margin, draws, seed)
        method = BOOTSTRAP_TEST
    p_equivalent = max(worse, better)
    return Equivalence(
        margin, worse, p_equivalent, worse <= alpha, p_equivalent <= alpha, alpha, method
    )
