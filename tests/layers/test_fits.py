from __future__ import annotations

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from resa_lens.layers import fits

X = np.arange(1.0, 27.0)


def planted(n, seed):
    share = fits.layer_masses(np.array([5.0, 14.0, 23.0]), np.full(3, 1.5), X).mean(axis=0)
    return np.random.default_rng(seed).multinomial(n, share).astype(float)


def test_slopes_of_the_masses_against_differences():
    means, sds, step = np.array([1.0, 14.3, 25.0]), np.array([0.5, 3.0, 9.0]), 1e-6
    masses, by_mean, by_log_sd = fits.mass_slopes(means, sds, X)
    np.testing.assert_array_equal(masses, fits.layer_masses(means, sds, X))
    for found, (up, down) in (
        (by_mean, ((means + step, sds), (means - step, sds))),
        (by_log_sd, ((means, sds * np.exp(step)), (means, sds * np.exp(-step)))),
    ):
        difference = (fits.layer_masses(*up, X) - fits.layer_masses(*down, X)) / (2 * step)
        np.testing.assert_allclose(found, difference, atol=1e-8)


def test_slopes_stay_finite_between_layers_far_apart():
    layers = np.array([0.0, 100.0, 200.0])
    for part in fits.mass_slopes(np.array([50.0, 100.0]), np.array([0.5, 0.5]), layers):
        assert np.isfinite(part).all()


def test_nearest_is_the_nearest_of_all_pairs():
    grid = fits.ComponentGrid.over(X, 0.5, 0.25, 12)
    rng = np.random.default_rng(0)
    means, sds = rng.uniform(-2, 30, (50, 3)), rng.uniform(0.2, 20, (50, 3))
    gaps = np.abs(grid.means - means[..., None]) + 4 * np.abs(np.log(grid.sds / sds[..., None]))
    np.testing.assert_array_equal(grid.nearest(means, sds), gaps.argmin(axis=-1))


def test_other_random_starts_reach_the_same_maximum():
    # What "run to convergence from many starts" means: the answer does not hang on the seed.
    for counts in (planted(150, 1), np.random.default_rng(2).multinomial(100, np.ones(26) / 26)):
        table = np.asarray(counts, dtype=float)
        levels = np.array(
            [[fit.level for fit in fits.robust_mixtures(table, X, 3, seed)] for seed in range(4)]
        )
        assert np.ptp(table.sum() * levels, axis=0).max() < 0.05  # nats of the whole table
        assert np.all(np.diff(levels, axis=1) > -1e-9)  # one Gaussian more fits no worse
    assert all(fit.converged for fit in fits.robust_mixtures(planted(150, 1), X, 5, 0))


def test_batched_em_is_the_librarys_fit_of_the_same_random_state():
    tables = np.random.default_rng(0).multinomial(60, np.ones(26) / 26, size=40).astype(float)
    means, variances, weights = fits.plain_mixture(tables, X, 3, library_seed=5)
    same = 0
    for row, table in enumerate(tables):
        data = np.repeat(X, table.astype(int))[:, None]
        peer = GaussianMixture(3, random_state=5).fit(data)
        theirs = [np.asarray(part, dtype=float).ravel() for part in (
            peer.means_, peer.covariances_, peer.weights_
        )]  # fmt: skip
        ours = [means[row], variances[row], weights[row]]
        same += all(np.allclose(a, b, atol=1e-3) for a, b in zip(ours, theirs, strict=True))
    # Where two layers are equally near a centre, or a gain meets the tolerance, paths part.
    assert same >= 32


def test_one_seed_a_row_is_the_librarys_best_of_many():
    counts = np.random.default_rng(7).multinomial(60, np.ones(26) / 26).astype(float)
    data = np.repeat(X, counts.astype(int))[:, None]
    peers = [GaussianMixture(3, random_state=seed).fit(data).score(data) for seed in range(30)]
    tables = np.tile(counts, (30, 1))
    fitted = fits.plain_mixture(tables, X, 3, library_seed=range(30))
    levels = fits.plain_level(tables, X, *fitted)
    assert levels.max() == pytest.approx(max(peers), abs=1e-6)
    assert np.mean(np.abs(levels - peers) < 1e-6) >= 0.8


def test_refit_finds_planted_means():
    tables = np.stack([planted(600, seed) for seed in range(5)])
    means, weights = fits.grid_refit(tables, X, 3)
    np.testing.assert_allclose(np.sort(means, axis=1), [[5, 14, 23]] * 5, atol=0.6)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
