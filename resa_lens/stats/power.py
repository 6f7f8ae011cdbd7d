"""What a paired comparison could see: detectable differences and the questions that they need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from resa_lens.errors import BadInputError
from resa_lens.stats.arrays import Interval, check_level
from resa_lens.stats.paired import differences_of, is_binary
from resa_lens.stats.proportions import clopper_pearson

ALPHA, POWER, TARGET = 0.05, 0.8, 0.02
"""Two-sided size and power of the detectable differences; the target as a share."""


def _quantiles(alpha: float, power: float) -> tuple[float, float]:
    check_level(alpha)
    if not 0.5 < power < 1.0:
        raise BadInputError(f"power {power} is none to plan for: give one between 0.5 and 1")
    return float(scipy.special.ndtri(1 - alpha / 2)), float(scipy.special.ndtri(power))


def reach_of(freedom: float, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the standard errors from which on a two-sided t test has the power."""
    return float(scipy.stats.t.ppf(1 - alpha / 2, freedom) + scipy.stats.t.ppf(power, freedom))


def _check_discordance(discordance: float) -> None:
    if not 0.0 < discordance <= 1.0:
        raise BadInputError(f"discordance {discordance} is no share of questions: give 0 to 1")


def mcnemar_questions(
    discordance: float, difference: float, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """Questions with which McNemar's exact test sees a difference.

    Connor's closed form (1987), with the correction for continuity that the exact test needs.

    Args:
        discordance: share of questions on which the two runs differ.
        difference: of the two runs, as a share.
        alpha: two-sided size.
        power: wanted.

    Returns:
        The number, or None where the difference exceeds the discordance: it cannot be.
    """
    _check_discordance(discordance)
    size = abs(difference)
    if size == 0:
        raise BadInputError("a difference of 0 cannot be seen: give one above 0")
    if size > discordance:
        return None
    z_alpha, z_power = _quantiles(alpha, power)
    reach = z_alpha * math.sqrt(discordance) + z_power * math.sqrt(discordance - size**2)
    # (n d - 1) = reach sqrt(n), where the 1 is the correction of |gained - lost|.
    return math.ceil(((reach + math.sqrt(reach**2 + 4 * size)) / (2 * size)) ** 2)


def mcnemar_detectable(
    discordance: float, n: int, alpha: float = ALPHA, power: float = POWER
) -> float | None:
    """Return the smallest difference that McNemar's exact test sees with n questions.

    None where even all flips in one direction would be too few.
    """
    _check_discordance(discordance)
    z_alpha, z_power = _quantiles(alpha, power)

    def excess(size: float) -> float:
        reach = z_alpha * math.sqrt(discordance) + z_power * math.sqrt(discordance - size**2)
        return n * size - 1 - reach * math.sqrt(n)

    if n < 1 or excess(discordance) < 0:
        return None
    return scipy.optimize.root_scalar(excess, bracket=(0.0, discordance)).root


def least_detectable(n: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the smallest difference that n questions can show: as if every flip went one way.

    `mcnemar_detectable` where the discordance is the difference itself, slightly rounded up.
    """
    reach = sum(_quantiles(alpha, power))
    return min(1.0, ((reach + math.sqrt(reach**2 + 4)) / 2) ** 2 / n)


def mcnemar_power(discordance: float, difference: float, n: int, alpha: float = ALPHA) -> float:
    """Power of McNemar's exact test with n questions, summed over every number of flips."""
    _check_discordance(discordance)
    if abs(difference) > discordance:
        raise BadInputError(
            f"difference {difference} with a discordance of {discordance}: it cannot be larger"
        )
    least, most = scipy.stats.binom.ppf([1e-12, 1 - 1e-12], n, discordance)
    flips = np.arange(int(least), int(most) + 1)
    # Reject where the smaller side is at most so many: twice its tail stays within alpha.
    border = scipy.stats.binom.ppf(alpha / 2, flips, 0.5)
    border = np.where(scipy.stats.binom.cdf(border, flips, 0.5) <= alpha / 2, border, border - 1)
    gaining = (discordance + difference) / (2 * discordance)
    rejected = scipy.stats.binom.cdf(border, flips, gaining)
    rejected += scipy.stats.binom.cdf(border, flips, 1 - gaining)
    return float((scipy.stats.binom.pmf(flips, n, discordance) * rejected).sum())


@dataclass(frozen=True)
class PairedPower:
    """What so many questions could see, from how much the two runs differ."""

    discordance: float
    """Share of questions with a changed score."""
    discordance_ci: Interval
    """Clopper-Pearson."""
    detectable: float | None
    """Smallest difference seen at the power; None where even flips all one way are too few."""
    target: float
    """The difference to plan for."""
    questions: int | None
    """Questions for the target at the discordance seen; None where that is below the target."""
    questions_ci: tuple[int | None, int | None]
    """The same at the ends of the discordance's interval."""
    alpha: float
    power: float
    n: int


def paired_power(
    a: ArrayLike,
    b: ArrayLike,
    target: float = TARGET,
    alpha: float = ALPHA,
    power: float = POWER,
) -> PairedPower:
    """Power of the comparison of two runs on the same questions.

    One answer a question: McNemar's test at the observed discordance (at its upper bound where no
    question differs).  Several: a normal test at the observed variance between questions, which the
    discordance's interval scales.

    Args:
        a: [n] or [n, samples], 1 where correct.
        b: the same questions in the same order.
        target: difference to plan for, as a share.
        alpha: two-sided size.
        power: wanted.

    Raises:
        BadInputError: other questions, a target outside (0, 1), no such power.
    """
    if not 0.0 < target < 1.0:
        raise BadInputError(f"target {target} is none: give a share above 0 and below 1")
    differences = differences_of(a, b)
    n, changed = int(differences.size), int(np.count_nonzero(differences))
    share, ends = changed / n, clopper_pearson(changed, n)
    if changed == 0 or is_binary(differences):
        planned = share or ends[1]
        questions, low, high = (
            mcnemar_questions(value, target, alpha, power) if value > 0 else None
            for value in (share, *ends)
        )
        detectable = mcnemar_detectable(planned, n, alpha, power)
    else:
        both = sum(_quantiles(alpha, power))
        variance = float(differences.var())
        detectable = both * math.sqrt(variance / n)
        needed = variance * (both / target) ** 2
        questions, low, high = (math.ceil(needed * value / share) for value in (share, *ends))
    return PairedPower(
        share, ends, detectable, target, questions, (low, high), alpha, power, n
    )  # fmt: skip


def questions_with_seeds(
    per_question: float,
    per_seed: float,
    rest: float,
    seeds: int,
    difference: float,
    alpha: float = ALPHA,
    power: float = POWER,
    freedom: float = math.inf,
) -> int | None:
    """Questions that show a difference where runs of several seeds are averaged.

    The mean difference varies by per_question / n + per_seed / seeds + rest / (n seeds).

    Args:
        per_question: variance between questions of the true difference.
        per_seed: variance between seeds; questions do not average it away.
        rest: variance of a question's difference between seeds beyond both.
        seeds: runs averaged.
        difference: to see, as a share.
        alpha: two-sided size.
        power: wanted.
        freedom: degrees of freedom of the t test; infinite for known variances.

    Returns:
        The number, or None where the seeds alone vary too much: more seeds are needed.
    """
    if min(per_question, per_seed, rest) < 0 or seeds < 1 or difference <= 0:
        raise BadInputError(
            f"variances {per_question:g}, {per_seed:g}, {rest:g}, {seeds} seeds, difference "
            f"{difference:g}: variances cannot be negative, the others are above 0"
        )
    allowed = (difference / reach_of(freedom, alpha, power)) ** 2 - per_seed / seeds
    if allowed <= 0:
        return None
    return max(1, math.ceil((per_question + rest / seeds) / allowed))
