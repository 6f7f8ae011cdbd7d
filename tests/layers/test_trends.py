"""Trends are told from lumps: known likelihoods, the verdict, and a seeded part of its error rates.

The whole of the rates is `benchmarks/verdict_power.py`, with its figures in docs/findings.md.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import special, stats

from resa_lens.layers import MixtureFit
from resa_lens.layers.mixture import count_verdict, fit_mixture
from resa_lens.layers.trends import (
    DEVIATIONS,
    WANDERING,
    trend_scores,
    wandering_evidence,
)

X = np.arange(1.0, 27.0)
RISING, GROWING = np.linspace(1, 6, 26), np.geomspace(1, 30, 26)
LUMPS = sum(np.exp(-0.5 * ((X - mean) / 1.5) ** 2) for mean in (5.0, 14.0, 23.0))


def thrown(n: int, rates: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(n, rates / rates.sum()).astype(float)


def table(counts: np.ndarray) -> dict[int, float]:
    return dict(zip(X.astype(int).tolist(), counts.tolist(), strict=True))


def level(counts: np.ndarray, rates: np.ndarray) -> float:
    return float(special.xlogy(counts, rates / rates.sum()).sum())


def test_no_curve_of_a_kind_is_better_than_the_one_that_is_scored() -> None:
    counts = thrown(400, GROWING, 0)
    scores, log_n = trend_scores(counts, X), math.log(400)
    z = 2 * (X - 1) / 25 - 1
    linear = max(level(counts, 1 + b * z) for b in np.linspace(-0.999, 0.999, 2001))
    assert scores["a linear trend"] == pytest.approx(-2 * linear + log_n, abs=0.02)
    exponential = max(level(counts, np.exp(b * z)) for b in np.linspace(-5, 5, 2001))
    assert scores["an exponential trend"] == pytest.approx(-2 * exponential + log_n, abs=0.02)
    step = max(
        level(counts, np.where(x >= X, counts[x >= X].mean(), counts[x < X].mean())) for x in X[:-1]
    )
    assert scores["one step"] == pytest.approx(-2 * step + 2 * log_n)
    curves = [
        level(counts, np.exp(a * z + b * z * z / 2))
        for a in np.linspace(-5, 5, 201)
        for b in np.linspace(-abs(a), abs(a), 51)
    ]
    assert scores["a monotone curve"] == pytest.approx(-2 * max(curves) + 2 * log_n, abs=0.05)


def test_the_evidence_of_wandering_rates_is_the_integral() -> None:
    x, counts = np.arange(3.0), np.array([6.0, 3.0, 1.0])
    rng = np.random.default_rng(0)
    parts = []
    for length in (2.0, 4.0, 8.0):
        kernel = np.exp(-0.5 * (np.subtract.outer(x, x) / length) ** 2)
        root = np.linalg.cholesky(kernel + 1e-9 * np.eye(3))
        for deviation in DEVIATIONS:
            f = deviation * rng.normal(size=(200_000, 3)) @ root.T
            parts.append(special.logsumexp(special.log_softmax(f, axis=1) @ counts))
    drawn = special.logsumexp(parts) - math.log(len(parts) * 200_000)
    assert wandering_evidence(counts, x) == pytest.approx(drawn, abs=0.02)


@pytest.mark.parametrize("rates", [RISING, RISING[::-1], GROWING, GROWING[::-1]])
def test_trends_are_called_trends_and_the_reason_says_what_was_tried(rates: np.ndarray) -> None:
    fit = fit_mixture(table(thrown(300, rates, 1)), draws=99)
    assert fit.verdict == "trend"
    assert fit.bic[0] > min(fit.trends.values())
    assert set(fit.trends) >= {"a linear trend", "an exponential trend", WANDERING}
    for name in fit.trends:
        assert name in fit.reason
    assert "no lumps are needed" in fit.reason
    assert MixtureFit.from_dict(json.loads(json.dumps(fit.to_dict()))) == fit


def test_lumps_are_said_of_lumps_and_trends_are_named_there_too() -> None:
    fit = fit_mixture(table(thrown(300, LUMPS, 1)), draws=99)
    assert fit.verdict == "supported"
    assert min(fit.trends.values()) > min(fit.bic.values())
    assert "no trend describes them better" in fit.reason
    old = fit.to_dict()
    del old["trends"]  # written before these were kept
    assert MixtureFit.from_dict(old) == replace(fit, trends={})


def test_the_papers_recipe_knows_no_trends() -> None:
    fit = fit_mixture(table(thrown(300, RISING, 1)), recipe="paper", draws=50)
    assert fit.trends == {}
    assert fit.verdict != "trend"


def wandering(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kernel = np.exp(-0.5 * np.subtract.outer(X, X) ** 2 / 2.0**2)
    f = 0.5 * np.linalg.cholesky(kernel + 1e-6 * np.eye(26)) @ rng.normal(size=26)
    return thrown(150, np.exp(f), seed)


def test_error_rates_at_few_draws() -> None:
    # No true rate above 10 % gives more than 3 of 8 once in 200 runs; the seeds are fixed.
    draws = range(300, 308)
    said = {
        "flat": [thrown(150, np.ones(26), seed) for seed in draws],
        "linear": [thrown(150, RISING, seed) for seed in draws],
        "exponential": [thrown(150, GROWING, seed) for seed in draws],
        "wandering": [wandering(seed) for seed in draws],
        "lumps": [thrown(150, LUMPS, seed) for seed in draws],
    }
    supported = {
        name: sum(count_verdict(table(c), draws=59, seed=n) == "supported" for n, c in enumerate(t))
        for name, t in said.items()
    }
    most = int(stats.binom.ppf(0.995, len(draws), 0.10))
    assert max(supported[name] for name in said if name != "lumps") <= most, supported
    assert supported["lumps"] >= 7, supported
