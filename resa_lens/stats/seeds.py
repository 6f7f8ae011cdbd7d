"""Runs of several seeds on the same questions: questions and seeds are both drawn at random.

A score is modelled as question + seed + rest.  A mean over S seeds and n questions then varies by
question / n + seed / S + rest / (n S): more questions do not average the seeds away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from resa_lens.errors import BadInputError
from resa_lens.stats.arrays import Floats, Interval, Seed, check_level
from resa_lens.stats.paired import FEW
from resa_lens.stats.power import TARGET, questions_with_seeds, reach_of
from resa_lens.stats.proportions import clopper_pearson, tango_interval
from resa_lens.stats.resampling import sign_flip_p_value


@dataclass(frozen=True)
class Spread:
    """Mean squares of runs [seeds, n]: what varies between seeds, and what is left."""

    seeds: float
    """Variance of the runs' means: seed + rest / n."""
    rest: float
    """Variance left after question and seed."""
    freedom: int
    """Seeds - 1; with 0 the variance of seeds is unknown and taken as none."""


def spread_of(runs: Floats) -> Spread:
    """Mean squares of runs [seeds, n]."""
    seeds, n = runs.shape
    if seeds < 2:
        return Spread(0.0, 0.0, 0)
    means = runs.mean(axis=1)
    left = runs - runs.mean(axis=0) - means[:, None] + means.mean()
    return Spread(
        float(means.var(ddof=1)), float((left**2).sum()) / ((seeds - 1) * (n - 1)), seeds - 1
    )


def runs_of(values: ArrayLike, name: str, axes: int) -> Floats:
    """Return finite scores with so many axes, or raise BadInputError."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != axes or min(array.shape, default=0) < 1 or array.shape[-1] < 2:
        kind = "[layers, seeds, questions]" if axes == 3 else "[seeds, questions]"
        raise BadInputError(f"{name} has shape {array.shape}: give {kind}, two questions or more")
    if not bool(np.isfinite(array).all()):
        raise BadInputError(f"{name} holds a score that is not finite: a run is incomplete")
    return array


def is_sparse(differences: Floats) -> bool:
    """Whether too few questions differ for Student's t, or all by the same."""
    return int(np.count_nonzero(differences)) < FEW or float(np.ptp(differences)) == 0.0


def never_a_point(differences: Floats, ci: Interval, level: float) -> Interval:
    """Widen an interval of sparse differences: there Student's t covers too little."""
    n, changed = differences.size, int(np.count_nonzero(differences))
    if not is_sparse(differences):
        return ci
    if changed == 0:
        bound = clopper_pearson(0, n, level)[1]
        return min(ci[0], -bound), max(ci[1], bound)
    gained = float(differences[differences > 0].sum())
    lost = float(-differences[differences < 0].sum())
    low, high = tango_interval(gained, lost, n, level)
    return min(ci[0], low), max(ci[1], high)


def honest_p(differences: Floats, p_value: float, seed: Seed = 0) -> float:
    """Student's p, or that of a sign-flip test if larger where differences are sparse."""
    if not is_sparse(differences):
        return p_value
    return max(p_value, sign_flip_p_value(differences, seed=seed))


@dataclass(frozen=True)
class GroupDifference:
    """Mean of setting b minus mean of setting a, each run with several seeds."""

    difference: float
    """Of the settings' expected scores, over seeds and questions like these."""
    ci: Interval
    """Student's t with Satterthwaite's degrees of freedom; never of zero width."""
    p_value: float
    """Two-sided, of no difference."""
    se: float
    freedom: float
    n: int
    """Questions."""
    seeds: tuple[int, int]
    """Runs of a and of b; a setting with one is taken as that run, its seed as fixed."""
    paired_seeds: bool
    seed_sd: tuple[float | None, ...]
    """Standard deviation between seeds beyond what questions explain, of each setting, or of the
    difference where seeds are paired; None with one run."""
    question_sd: float
    """Standard deviation between questions of the difference, beyond seeds and the rest."""
    changed: int
    """Questions with another mean score."""
    detectable: float
    """Smallest difference seen at 80 % power with these seeds and questions."""
    target: float
    questions: int | None
    """Questions for the target with these seeds; None where the seeds vary too much for it, or
    are too few to know."""
    single_run_alarms: float | None = None
    """Share of such comparisons that find a difference at 1 - level where there is none, if the one
    run of a setting is one of many that vary as the other setting's do, and seeds are all that
    varies; None where both have several runs, or both have one."""


def single_run_alarms(runs: int, level: float = 0.95) -> float:
    """False alarms at most where one run stands against several and its seed is taken as fixed.

    The difference varies by s^2 (1 + 1 / runs), its error is taken as s^2 / runs: with three runs
    16 % of the comparisons are called different at 5 %.
    """
    reach = float(scipy.stats.t.ppf(0.5 + level / 2, runs - 1))
    return 2 * float(scipy.stats.t.sf(reach / math.sqrt(1 + runs), runs - 1))


def group_difference(
    a: ArrayLike,
    b: ArrayLike,
    level: float = 0.95,
    target: float = TARGET,
    paired_seeds: bool = False,
) -> GroupDifference:
    """Compare two settings over seeds and questions: b minus a.

    Seeds are a random effect, questions another that both settings share.

    Args:
        a: scores [seeds, questions] of the first setting.
        b: the same questions in the same order; the number of seeds may differ.
        level: of the interval.
        target: difference to plan for, as a share.
        paired_seeds: run k of a and run k of b share their seed, and what it does to both is in no
            difference; else seeds are nested in each setting.

    Raises:
        BadInputError: other questions, fewer than two, or other numbers of paired seeds.
    """
    first, second = runs_of(a, "a", 2), runs_of(b, "b", 2)
    check_level(level)
    if first.shape[1] != second.shape[1]:
        raise BadInputError(
            f"{first.shape[1]} and {second.shape[1]} questions: give runs on the same questions"
        )
    sizes, n = (first.shape[0], second.shape[0]), first.shape[1]
    if paired_seeds and sizes[0] != sizes[1]:
        raise BadInputError(f"{sizes[0]} and {sizes[1]} runs: paired seeds need as many of both")
    differences = second.mean(axis=0) - first.mean(axis=0)
    drawn = [(spread_of(runs), len(runs)) for runs in (first, second)]
    if paired_seeds:
        drawn = [(spread_of(second - first), sizes[0])]
    rest = sum(s.rest / size for s, size in drawn)
    between = float(differences.var(ddof=1))
    sources = [(s.seeds / size, s.freedom) for s, size in drawn]
    se, freedom = error_of(between / n, rest / n, sources, n)
    value = float(differences.mean())
    t = float(scipy.stats.t.ppf(0.5 + level / 2, freedom))
    ci = never_a_point(differences, (value - t * se, value + t * se), level)
    p_value = 2 * float(scipy.stats.t.sf(abs(value) / se, freedom)) if se else float(value == 0)
    seeds = [max(0.0, s.seeds - s.rest / n) for s, _ in drawn]
    questions = max(0.0, between - rest)
    return GroupDifference(
        difference=value,
        ci=ci,
        p_value=honest_p(differences, p_value),
        se=se,
        freedom=freedom,
        n=n,
        seeds=sizes,
        paired_seeds=paired_seeds,
        seed_sd=tuple(
            math.sqrt(v) if size > 1 else None for v, (_, size) in zip(seeds, drawn, strict=True)
        ),
        question_sd=math.sqrt(questions),
        changed=int(np.count_nonzero(differences)),
        detectable=reach_of(freedom) * se,
        target=target,
        # Both variances are those of means over the runs already: as of one seed.
        questions=questions_with_seeds(
            questions, sum(v / size for v, (_, size) in zip(seeds, drawn, strict=True)), rest, 1,
            target, freedom=freedom,
        ),
        single_run_alarms=single_run_alarms(max(sizes), level)
        if min(sizes) == 1 < max(sizes)
        else None,
    )  # fmt: skip


def error_of(
    questions: float, rest: float, seeds: list[tuple[float, int]], n: int
) -> tuple[float, float]:
    """Standard error, and its degrees of freedom by Satterthwaite.

    `questions` and every entry of `seeds` hold the rest too: it counts once.
    """
    alone = max(0.0, questions - rest)
    # Less than the questions' own error cannot be: an estimated variance of seeds below 0 is none.
    variance = max(questions, alone + sum(v for v, _ in seeds))
    if variance == 0:
        return 0.0, n - 1.0
    uncertain = alone**2 / (n - 1) + sum(v**2 / f for v, f in seeds if f)
    freedom = min(n - 1.0, variance**2 / uncertain) if uncertain else n - 1.0
    return math.sqrt(variance), max(1.0, freedom)
