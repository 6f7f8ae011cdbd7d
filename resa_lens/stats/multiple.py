"""Many statistics at once: corrected p-values, simultaneous intervals, the best of many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from resa_lens.errors import BadInputError
from resa_lens.stats import arrays
from resa_lens.stats.arrays import DRAWS, Floats, Seed, check_level, vector_of


def holm(p_values: ArrayLike) -> Floats:
    """Return p-values [n] after Holm's step-down correction for all of them (1979)."""
    p = _p_values(p_values)
    order = p.argsort(kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1.0)
    return corrected


def benjamini_hochberg(p_values: ArrayLike) -> Floats:
    """Return q-values [n]: the false discovery rate at which each would be called (1995)."""
    p = _p_values(p_values)
    order = p.argsort(kind="stable")[::-1]
    steps = p[order] * p.size / np.arange(p.size, 0, -1)
    q = np.empty_like(p)
    q[order] = np.minimum(np.minimum.accumulate(steps), 1.0)
    return q


def _p_values(p_values: ArrayLike) -> Floats:
    p = vector_of(p_values, "p-values")
    if bool(((p < 0) | (p > 1)).any()):
        raise BadInputError(f"a p-value lies outside 0 to 1: {p.min()} to {p.max()}")
    return p


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
    check_level(level)
    errors = np.abs(draw(np.random.default_rng(seed), draws))
    return float(np.quantile(errors.max(axis=1), level))


def expected_maximum(n: int) -> float:
    """Expected maximum of n independent standard normals: 0 for 1, 0.564 for 2, 1.029 for 4."""
    if n < 1:
        raise BadInputError(f"the maximum of {n} values: give 1 or more")
    grid = np.linspace(-12.0, 12.0, 4801)
    below = scipy.special.ndtr(grid) ** (n - 1)
    density = n * np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi) * below
    return float(np.trapezoid(grid * density, grid))


def best_of_noise(sizes: Sequence[int], draws: int = DRAWS, seed: Seed = 0) -> Floats:
    """Mean over groups of maximum minus mean [draws], all values being standard normal noise."""
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    for size in sizes:
        values = rng.standard_normal((draws, size))
        total += values.max(axis=1) - values.mean(axis=1)
    return total / len(sizes)


@dataclass(frozen=True)
class SelectionBias:
    """By how much the best of several runs, chosen and scored on the same questions, is too good.

    Both are bootstraps over questions, so runs that share most answers share most noise.
    """

    optimism: float
    """The choice made anew on each resample; its score there minus its score on the whole."""
    noise: float
    """Expected maximum of the noise if all runs were equally good: the most that choice adds."""


def selection_bias(scores: ArrayLike, draws: int = 2000, seed: Seed = 0) -> SelectionBias:
    """Estimate what choosing the best run adds to its score, scores [runs, questions].

    Where runs do not differ the optimism falls short by about 30 %, as it takes the observed spread
    for true; there the noise is right.  Where they do differ, the noise is too large.
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 1 or not bool(np.isfinite(table).all()):
        raise BadInputError(f"scores have shape {table.shape}: give finite [runs, questions]")
    n = table.shape[1]
    means, rng = table.mean(axis=1), np.random.default_rng(seed)
    optimism, noise = np.empty(draws), np.empty(draws)
    rows = max(1, arrays.CHUNK // table.size)
    for start in range(0, draws, rows):
        count = min(rows, draws - start)
        picks = rng.integers(0, n, size=(count, n), dtype=np.int32)
        errors = table.T[picks].mean(axis=1) - means
        chosen = (errors + means).argmax(axis=1)
        optimism[start : start + count] = errors[np.arange(count), chosen]
        noise[start : start + count] = errors.max(axis=1)
    return SelectionBias(float(optimism.mean()), float(noise.mean()))
