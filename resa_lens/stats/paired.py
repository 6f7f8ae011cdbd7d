"""Two runs, or a set and random sets, on the same questions."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from resa_lens.errors import BadInputError
from resa_lens.stats.arrays import DRAWS, Floats, Interval, Seed, vector_of
from resa_lens.stats.proportions import clopper_pearson, tango_interval
from resa_lens.stats.resampling import bootstrap_means, percentile_interval, sign_flip_p_value

FEW = 20
"""Changed questions below which the bootstrap covers too little: 85 % instead of 95 % at three."""
BOOTSTRAP = "paired bootstrap over questions"
TANGO = "Tango's score interval, for few changes"
EXACT = "exact (Clopper and Pearson), every question or none changed"


def differences_of(a: ArrayLike, b: ArrayLike) -> Floats:
    """Return b - a by question [n], each [n] or [n, samples] averaged over samples."""
    first, second = vector_of(a, "a"), vector_of(b, "b")
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
    equal the interval has no width: `paired_interval` handles that case.
    """
    differences = differences_of(a, b)
    interval = percentile_interval(bootstrap_means(differences, draws, seed), level)
    return float(differences.mean()), interval


def mcnemar_exact(b_only: int, a_only: int) -> float:
    """McNemar's exact two-sided p-value from the questions that only one of two runs solved."""
    # Whole numbers of Python: those of NumPy overflow below.
    b_only, a_only = operator.index(b_only), operator.index(a_only)
    if b_only < 0 or a_only < 0:
        raise BadInputError(f"counts {b_only} and {a_only}: discordant pairs cannot be negative")
    n = b_only + a_only
    tail = term = 1
    for count in range(min(b_only, a_only)):
        term = term * (n - count) // (count + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


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
    interval: str = BOOTSTRAP
    """How the interval was computed."""


def is_binary(differences: Floats) -> bool:
    """Whether every question's difference is -1, 0 or 1: one answer a question, or as good as."""
    return bool(np.isin(differences, (-1.0, 0.0, 1.0)).all())


def paired_interval(
    differences: ArrayLike, level: float = 0.95, draws: int = DRAWS, seed: Seed = 0
) -> tuple[Interval, str]:
    """Interval of the mean of differences [n] of scores between 0 and 1, and how it was computed.

    Where no question differs it is (-u, u) with u the upper Clopper-Pearson bound of the flip rate
    at 0 of n: so many flips could have been missed.  Where every question flipped the same way it
    is exact too.  With fewer than `FEW` changes it is Tango's, otherwise the percentile bootstrap.
    """
    vector = vector_of(differences, "differences")
    n, changed = int(vector.size), int(np.count_nonzero(vector))
    gained, lost = float(vector[vector > 0].sum()), float(-vector[vector < 0].sum())
    if changed == 0:
        bound = clopper_pearson(0, n, level)[1]
        return (-bound, bound), EXACT
    if max(gained, lost) == n:
        bound = clopper_pearson(n, n, level)[0]
        return ((bound, 1.0) if gained else (-1.0, -bound)), EXACT
    # Equal changes of every question leave the bootstrap nothing to vary.
    if changed < FEW or float(np.ptp(vector)) == 0.0:
        return tango_interval(gained, lost, n, level), TANGO
    return percentile_interval(bootstrap_means(vector, draws, seed), level), BOOTSTRAP


def compare_paired(
    correct_base: ArrayLike,
    correct_tuned: ArrayLike,
    seed: Seed = 0,
    level: float = 0.95,
    draws: int = DRAWS,
) -> PairedComparison:
    """Compares two runs on the same questions: interval (`paired_interval`) and p-value.

    Args:
        correct_base: [n] or [n, samples], 1 where correct.
        correct_tuned: the same questions in the same order.
        seed: of the bootstrap.
        level: of the interval.
        draws: of the bootstrap.
    """
    differences = differences_of(correct_base, correct_tuned)
    gained = int(np.count_nonzero(differences > 0))
    lost = int(np.count_nonzero(differences < 0))
    ci, interval = paired_interval(differences, level, draws, seed)
    if gained + lost == 0:
        p_value, note = 1.0, "changed no answer"
    elif is_binary(differences):
        p_value, note = mcnemar_exact(gained, lost), "McNemar's exact test"
    else:
        p_value = sign_flip_p_value(differences, draws, seed)
        note = "sign-flip permutation test over questions"
    return PairedComparison(
        float(differences.mean()), ci, p_value, gained + lost, gained, lost,
        int(differences.size), note, interval,
    )  # fmt: skip


@dataclass(frozen=True)
class SetDifference:
    """How far one set lies from random sets that were measured on the same units."""

    value: float
    """Mean of the set minus the mean of the random sets."""
    se: float
    """Standard error over units and over random sets."""
    freedom: float
    """Its degrees of freedom (Welch and Satterthwaite)."""
    p_value: float
    """Two-sided, of the set being one more random one: Student's t."""


def difference_from_sets(target: ArrayLike, random: ArrayLike) -> SetDifference:
    """Compare a set's values [n] with those of random sets [sets, n] on the same units.

    Random sets differ from each other too, and units do not average that away: taken as fixed, any
    set would lie beyond them once there are units enough.

    Raises:
        BadInputError: fewer than two units or random sets, or other shapes.
    """
    own, others = np.asarray(target, dtype=np.float64), np.asarray(random, dtype=np.float64)
    if own.ndim != 1 or others.ndim != 2 or others.shape[1:] != own.shape or min(others.shape) < 2:
        raise BadInputError(
            f"a set {own.shape} and random sets {others.shape}: give [n] and [sets, n], two or more"
        )
    sets, n = others.shape
    beyond = own - others.mean(axis=0)
    value = float(beyond.mean())
    over_units = float(beyond.var(ddof=1)) / n
    over_sets = float(others.mean(axis=1).var(ddof=1)) * (1 + 1 / sets)
    total = over_units + over_sets
    if total <= 0:
        return SetDifference(value, 0.0, n - 1.0, 1.0 if value == 0 else 0.0)
    freedom = total**2 / (over_units**2 / (n - 1) + over_sets**2 / (sets - 1))
    p_value = 2 * float(scipy.special.stdtr(freedom, -abs(value) / np.sqrt(total)))
    return SetDifference(value, float(np.sqrt(total)), float(freedom), p_value)
