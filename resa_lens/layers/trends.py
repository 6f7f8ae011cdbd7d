"""Trends and wandering rates: what counts over layers may follow where they form no lumps.

A mixture of Gaussians follows any smooth profile, so that one beats the uniform distribution does
not yet say that there are lumps.  Its rivals share its likelihood, that of features thrown onto the
layers, and its scale, that of BIC (lower is better):

- monotone, -2 log-likelihood + parameters x log(features): rates that are linear or exponential in
  the layer (one parameter), an exponential of a parabola that has no turning point inside of the
  layers, or one step (two parameters);
- wandering, -2 log evidence: log-rates are a Gaussian process that prefers no layer, with the
  evidence averaged over its lengths and deviations.

The deviations end at 0.5: rates that wander by a factor of e have hills that no test tells from
lumps, and a prior that allows them explains every lump (benchmarks/verdict_power.py).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import optimize, special

from resa_lens.stats import Floats

SHORTEST, LONGEST = 2.0, 8.0
"""Layers over which wandering rates stay alike: doubled from the first to the second, and further
up to a third of the layers."""
DEVIATIONS = (0.25, 0.5)
"""Of the log-rates that wander."""
MARGIN = 1.0
"""A trend is said where it is better than the mixture by so much, on the scale of BIC."""
WANDERING = "wandering rates"
_FLATTEST, _STEPS = 1e-6, 50


def trend_scores(counts: Floats, x: Floats) -> dict[str, float]:
    """Score each trend on counts [L] at layers x [L], by its name; lower is better."""
    log_n = math.log(float(counts.sum()))
    z = 2 * (x - x[0]) / (x[-1] - x[0]) - 1
    # A slope that is u at the first layer, v at the last, and of one sign between them.
    curves = np.stack([z / 2 - z * z / 4, z / 2 + z * z / 4])
    return {
        "a linear trend": -2 * _linear(counts, z) + log_n,
        "an exponential trend": -2 * _exponential(counts, z[None]) + log_n,
        "a monotone curve": -2 * max(_exponential(counts, s * curves, 0.0) for s in (1, -1))
        + 2 * log_n,
        "one step": -2 * _step(counts) + 2 * log_n,
        WANDERING: -2 * wandering_evidence(counts, x),
    }


def _linear(counts: Floats, z: Floats) -> float:
    """Log-likelihood of counts [L] whose rates are linear in z [L], -1 to 1."""
    n = counts.sum()

    def loss(slope: float) -> float:
        rates = 1 + slope * z
        return float(n * np.log(rates.sum()) - counts @ np.log(rates))

    steepest = 1 - _FLATTEST
    best: Any = optimize.minimize_scalar(loss, bounds=(-steepest, steepest))
    return -float(best.fun)


def _exponential(counts: Floats, curves: Floats, least: float | None = None) -> float:
    """Log-likelihood of counts [L] whose log-rates are a sum of curves [k, L], best weights."""
    n = counts.sum()

    def loss(weights: Floats) -> tuple[float, Floats]:
        logs = special.log_softmax(weights @ curves)
        return -float(counts @ logs), curves @ (n * np.exp(logs) - counts)

    bounds = [(least, None)] * len(curves)
    start = np.full(len(curves), 0.1)
    return -float(optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).fun)


def _step(counts: Floats) -> float:
    """Log-likelihood of counts [L] with one rate up to a layer and another from there on."""
    n, left = counts.sum(), counts.cumsum()[:-1]
    share = np.arange(1, counts.size) / counts.size
    levels = special.xlogy(left, left / n / share)
    levels += special.xlogy(n - left, (1 - left / n) / (1 - share))
    return float(levels.max() - n * math.log(counts.size))


def wandering_evidence(counts: Floats, x: Floats) -> float:
    """Log evidence of counts [L] at layers x [L] with wandering log-rates.

    The average over doubled lengths and `DEVIATIONS`, all equally likely before.
    """
    longest = max(LONGEST, np.ptp(x) / 3)
    lengths = SHORTEST * 2.0 ** np.arange(math.floor(math.log2(longest / SHORTEST)) + 1)
    gaps = np.subtract.outer(x, x) ** 2
    parts = []
    for length in lengths:
        values, vectors = np.linalg.eigh(np.exp(-0.5 * gaps / length**2))
        kept = values > 1e-6 * values[-1]
        basis = vectors[:, kept] * np.sqrt(values[kept])
        parts += [_evidence(counts, deviation * basis) for deviation in DEVIATIONS]
    return float(special.logsumexp(parts)) - math.log(len(parts))


def _evidence(counts: Floats, basis: Floats) -> float:
    """Log evidence of counts [L] with log-rates basis [L, r] @ v, v [r] standard normal.

    Laplace's approximation (Rasmussen and Williams 2006, section 3.4) for the multinomial.
    """
    n, v = counts.sum(), np.zeros(basis.shape[1])

    def height(v: Floats) -> float:
        return float(counts @ special.log_softmax(basis @ v) - 0.5 * v @ v)

    level = height(v)
    for _ in range(_STEPS):
        p = special.softmax(basis @ v)
        pull = basis.T @ p
        curve = np.eye(v.size) + n * ((basis.T * p) @ basis - np.outer(pull, pull))
        step = np.linalg.solve(curve, basis.T @ counts - n * pull - v)
        while (higher := height(v + step)) < level and np.abs(step).max() > 1e-9:
            step /= 2
        if higher - level <= 1e-9 * max(1.0, abs(level)):
            break
        level, v = higher, v + step
    p = special.softmax(basis @ v)
    pull = basis.T @ p
    curve = np.eye(v.size) + n * ((basis.T * p) @ basis - np.outer(pull, pull))
    return level - 0.5 * float(np.linalg.slogdet(curve)[1])
