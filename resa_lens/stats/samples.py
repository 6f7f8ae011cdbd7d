"""Scores of one run: avg@n, pass@k and means over tasks or runs, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy
from numpy.typing import ArrayLike

from resa_lens.errors import BadInputError
from resa_lens.stats.arrays import DRAWS, Floats, Interval, Seed, check_level, vector_of
from resa_lens.stats.proportions import wilson_interval
from resa_lens.stats.resampling import bootstrap_mean_interval


def pass_at_k(correct: ArrayLike, samples: ArrayLike, k: int) -> Floats:
    """Return the unbiased chance [n] that one of k samples is right, by question.

    1 - C(samples - correct, k) / C(samples, k): Chen et al. (2021), equation 1, as a product of k
    ratios of at most 1.  Its mean over questions is pass@k; k = 1 gives avg@n.

    Args:
        correct: right answers of each question [n].
        samples: answers of each question, [n] or one number.
        k: answers that one may draw.

    Raises:
        BadInputError: k below 1 or above the samples of a question, or more right than samples.
    """
    right, drawn = np.broadcast_arrays(
        np.asarray(correct, dtype=np.int64), np.asarray(samples, dtype=np.int64)
    )
    if right.size == 0 or bool(((right < 0) | (right > drawn)).any()):
        raise BadInputError("right answers must lie between 0 and the samples of their question")
    if not 1 <= k <= int(drawn.min()):
        raise BadInputError(
            f"pass@{k} of {int(drawn.min())} samples a question: k may be 1 to {int(drawn.min())}"
        )
    steps = np.arange(k)
    wrong = np.maximum(drawn - right, 0)[:, None] - steps
    return 1.0 - (np.maximum(wrong, 0) / (drawn[:, None] - steps)).prod(axis=1)


def mean_interval(
    values: ArrayLike, level: float = 0.95, draws: int = DRAWS, seed: Seed = 0
) -> Interval:
    """Interval over questions of the mean of scores between 0 and 1, [n] or [n, samples].

    Wilson's where every score is 0 or 1 (one answer a question, or all of them agree); else the
    percentile bootstrap of whole questions.  Equal scores leave the bootstrap nothing to vary:
    then Wilson's again, as if each question were right or wrong, which is too wide.
    """
    vector = vector_of(values, "scores")
    if bool(((vector < 0) | (vector > 1)).any()):
        raise BadInputError(f"scores from {vector.min():g} to {vector.max():g}: give 0 to 1")
    if bool(np.isin(vector, (0.0, 1.0)).all()) or float(np.ptp(vector)) == 0.0:
        return wilson_interval(min(float(vector.sum()), vector.size), vector.size, level)
    return bootstrap_mean_interval(vector, level, draws, seed)


def macro_average(
    groups: Sequence[ArrayLike], level: float = 0.95, draws: int = DRAWS, seed: Seed = 0
) -> tuple[float, Interval]:
    """Mean over tasks of their mean scores, every task counting alike, with its interval.

    The tasks' own intervals (`mean_interval`) are put together by the squares of their arms (Zou
    and Donner 2008), so a task with all answers right still adds what its few questions leave open.
    The tasks are taken as given: another choice of tasks is not covered.

    Args:
        groups: the scores of each task, [n] or [n, samples].
        level: of the interval.
        draws: of the bootstrap.
        seed: of the bootstrap.
    """
    check_level(level)
    if not groups:
        raise BadInputError("no tasks to average: give the scores of at least one")
    means = np.array([vector_of(group, "scores").mean() for group in groups])
    ends = np.array([mean_interval(group, level, draws, seed) for group in groups])
    down, up = (float(np.sqrt(((means - ends[:, side]) ** 2).sum())) for side in (0, 1))
    mean = float(means.mean())
    return mean, (mean - down / means.size, mean + up / means.size)


def t_test(values: ArrayLike, level: float = 0.95) -> tuple[float, Interval, float]:
    """Return mean, Student's interval and two-sided p of values [n] against zero.

    Raises:
        BadInputError: fewer than two values.
    """
    vector = vector_of(values, "values")
    check_level(level)
    if vector.size < 2:
        raise BadInputError(f"{vector.size} value has no interval: give two or more")
    mean, error = float(vector.mean()), float(vector.std(ddof=1)) / math.sqrt(vector.size)
    freedom = vector.size - 1
    half = float(scipy.special.stdtrit(freedom, (1 + level) / 2)) * error
    tail = float(scipy.special.stdtr(freedom, -abs(mean) / error)) if error else 0.5 * (mean == 0)
    p_value = 2 * tail
    return mean, (mean - half, mean + half), p_value
