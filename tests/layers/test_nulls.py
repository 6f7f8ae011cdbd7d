from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from resa_lens.layers import fits, nulls
from resa_lens.layers.mixture import fit_mixture, read_table

TABLE = Path(__file__).parents[2] / "data" / "paper" / "table6_hookpoints.csv"
X = np.arange(1.0, 27.0)


def test_layer_masses_against_numerical_integration():
    means, sds = np.array([1.0, 14.3]), np.array([0.5, 3.0])
    fine = np.linspace(0.5, 26.5, 26_000, endpoint=False) + 0.0005
    for mean, sd, mass in zip(means, sds, fits.layer_masses(means, sds, X), strict=True):
        density = np.exp(-0.5 * ((fine - mean) / sd) ** 2)
        expected = density.reshape(26, 1000).sum(axis=1) / density.sum()
        np.testing.assert_allclose(mass, expected, atol=1e-6)


def test_layer_masses_keep_digits_in_both_tails():
    mass = fits.layer_masses(np.array([13.5]), np.array([0.6]), X)[0]
    np.testing.assert_allclose(mass, mass[::-1], rtol=1e-6)
    assert mass[0] > 0


def test_plain_mixture_is_scikit_learns_em():
    counts = np.random.default_rng(0).multinomial(80, np.ones(26) / 26)
    data = np.repeat(X, counts)[:, None]
    start = (np.array([5.0, 13.0, 21.0]), np.array([9.0, 9.0, 9.0]), np.ones(3) / 3)
    means, variances, weights = fits.plain_mixture(counts[None].astype(float), X, 3, start)
    peer = GaussianMixture(
        3,
        means_init=start[0][:, None],
        precisions_init=1 / start[1][:, None, None],
        weights_init=start[2],
    ).fit(data)
    np.testing.assert_allclose(means[0], np.asarray(peer.means_, dtype=float).ravel(), atol=1e-4)
    np.testing.assert_allclose(
        variances[0], np.asarray(peer.covariances_, dtype=float).ravel(), atol=1e-3
    )
    np.testing.assert_allclose(
        weights[0], np.asarray(peer.weights_, dtype=float).ravel(), atol=1e-4
    )


def test_grid_mixture_never_loses_and_robust_mixture_finds_the_truth():
    grid = fits.ComponentGrid.over(X, 0.5, 0.25, 12)
    truth = fits.layer_masses(np.array([6.0, 18.0]), np.array([2.0, 2.0]), X).mean(axis=0)
    index = grid.nearest(np.array([[3.0, 24.0]]), np.array([[4.0, 4.0]]))
    levels = [
        fits.grid_mixture(1e4 * truth[None], grid, index, np.full((1, 2), 0.5), 0.0, steps)[2][0]
        for steps in (1, 2, 3, 5, 10, 40)
    ]
    assert np.all(np.diff(levels) >= -1e-12)
    assert levels[-1] > levels[0] + 0.1
    best = float(truth @ np.log(truth))
    found = fits.robust_mixture(1e4 * truth, X, 2, grid, 0)
    assert best - 1e-6 < found.level <= best + 1e-12
    assert found.means == pytest.approx([6.0, 18.0], abs=0.02)
    assert found.sds == pytest.approx([2.0, 2.0], abs=0.02)


def test_uniform_null_is_calibrated_and_powerful():
    rng = np.random.default_rng(1)
    flat = [
        nulls.uniform_null(rng.multinomial(80, np.ones(26) / 26).astype(float), X, 99, s).p
        for s in range(40)
    ]
    assert np.mean(np.array(flat) <= 0.05) <= 0.15
    assert 0.35 < np.mean(flat) < 0.65
    lump = np.zeros(26)
    lump[8:13] = [6, 12, 18, 12, 6]
    assert nulls.uniform_null(lump, X, 199, 0).p == pytest.approx(1 / 200)


def test_permutation_null_sees_order_not_unevenness():
    lump = np.zeros(26)
    lump[8:13] = [6, 12, 18, 12, 6]
    assert nulls.permutation_null(lump, X, 199, 0).p <= 0.01
    scattered = np.zeros(26)
    scattered[[1, 6, 12, 18, 24]] = [6, 18, 12, 12, 6]
    assert nulls.permutation_null(scattered, X, 199, 0).p > 0.2
    assert nulls.uniform_null(scattered, X, 199, 0).p <= 0.01


def test_permutation_null_of_scores():
    slope = np.linspace(0, 1, 26) + 0.05 * np.random.default_rng(0).normal(size=26)
    assert nulls.permutation_null(slope, X, 199, 0, "scores").p <= 0.01
    flat = [
        nulls.permutation_null(np.random.default_rng(s).normal(size=26), X, 99, s, "scores").p
        for s in range(80)
    ]
    assert np.mean(np.array(flat) <= 0.05) <= 0.13
    assert nulls.permutation_null(np.ones(26), X, 99, 0, "scores").p == 1.0


def test_dispersion_and_noise_known_answers():
    result = nulls.dispersion_null(np.array([2.0] * 13 + [4.0] * 13))
    assert result.value == pytest.approx(26 / 25 / 3)
    scores = np.array([1.0, -1.0] * 13)
    result = nulls.noise_null(scores, 1.0)
    assert result.value == pytest.approx(26 / 25)
    assert result.p == pytest.approx(0.408, abs=0.01)
    assert nulls.noise_null(scores, 0.1).p < 1e-9


def test_alignment_of_the_papers_profiles():
    counts, scores = read_table(TABLE, "feature_count"), read_table(TABLE, "average")
    fits = (
        fit_mixture(counts, recipe="paper", draws=50),
        fit_mixture(scores, recipe="paper", baseline=41.18, draws=50),
    )
    means = [[part.mean for part in fit.components] for fit in fits]
    table = np.array(list(counts.values()))
    result = nulls.alignment_null(means[0], means[1], table, list(counts), draws=2000)
    assert round(result.value, 3) == 0.732
    # The spec found about 7 % with the library's fits in a few hundred draws.
    assert 0.03 < result.p < 0.11


def test_alignment_without_components():
    assert np.isnan(nulls.alignment([], []))
    assert nulls.alignment([3.0, 1.0], [1.5, 3.0]) == 0.5
    assert nulls.alignment_null([], [], np.ones(26), list(range(26))).p == 1.0
