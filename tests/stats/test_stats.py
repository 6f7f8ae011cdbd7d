from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as reference

from resa_lens import stats
from resa_lens.errors import BadInputError


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 30), (15, 30), (30, 30), (140, 198)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_proportion_intervals_agree_with_scipy(k, n, level):
    peer = reference.binomtest(k, n)
    for ours, method in ((stats.wilson_interval, "wilson"), (stats.clopper_pearson, "exact")):
        expected = peer.proportion_ci(level, method=method)
        assert ours(k, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_clopper_pearson_at_zero_is_the_closed_form():
    low, high = stats.clopper_pearson(0, 100)
    assert low == 0.0
    assert high == pytest.approx(1 - 0.025 ** (1 / 100))


def test_mcnemar_exact_known_values():
    assert stats.mcnemar_exact(0, 0) == 1.0
    assert stats.mcnemar_exact(5, 0) == pytest.approx(2 * 0.5**5)
    assert stats.mcnemar_exact(3, 3) == 1.0
    assert stats.mcnemar_exact(10, 2) == pytest.approx(reference.binomtest(2, 12).pvalue)
    assert stats.mcnemar_exact(10, 2) == stats.mcnemar_exact(2, 10)


def test_bootstrap_interval_has_the_analytic_width():
    values = np.repeat([0.0, 1.0], [120, 280])
    low, high = stats.bootstrap_mean_interval(values, draws=20_000, seed=1)
    half = 1.96 * np.sqrt(0.7 * 0.3 / 400)
    assert low == pytest.approx(0.7 - half, abs=0.004)
    assert high == pytest.approx(0.7 + half, abs=0.004)
    assert (low, high) == stats.bootstrap_mean_interval(values, draws=20_000, seed=1)


def test_bootstrap_resamples_questions_not_samples():
    # Eight identical samples of a question carry no more than one.
    answers = np.repeat(np.array([[0.0], [1.0]] * 50), 8, axis=1)
    wide = np.diff(stats.bootstrap_mean_interval(answers, seed=0))[0]
    pooled = np.diff(stats.bootstrap_mean_interval(answers.ravel(), seed=0))[0]
    assert wide / pooled == pytest.approx(np.sqrt(8), rel=0.1)


def test_paired_bootstrap_uses_the_pairs():
    rng = np.random.default_rng(0)
    base = rng.random(300)
    difference, (low, high) = stats.paired_bootstrap(
        base, base + 0.05 + 0.01 * rng.normal(size=300)
    )
    assert difference == pytest.approx(0.05, abs=0.003)
    assert high - low < 0.005  # unpaired it would be about 0.09


def test_permutation_p_value_counts_ties_and_the_observed():
    assert stats.permutation_p_value(3.0, [1.0, 2.0, 3.0, 4.0]) == pytest.approx(3 / 5)
    assert stats.permutation_p_value(9.0, np.zeros(99)) == pytest.approx(0.01)


def test_spearman_agrees_with_scipy_with_ties():
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 6, 26), rng.normal(size=26)
    rho, p = stats.spearman(x, y, draws=20_000)
    peer_rho, peer_p = reference.spearmanr(x, y)
    assert rho == pytest.approx(peer_rho)
    assert p == pytest.approx(peer_p, abs=0.02)
    assert stats.spearman([1, 1, 1], [1, 2, 3]) == (0.0, 1.0)


def test_sign_flip_matches_exact_enumeration():
    # 6 equal differences: only all plus and all minus are as extreme, 2 of 64.
    assert stats.sign_flip_p_value([1.0] * 6, draws=40_000) == pytest.approx(2 / 64, abs=0.005)
    assert stats.sign_flip_p_value([0.0, 0.0]) == 1.0


def test_compare_paired_changed_no_answer():
    run = np.array([1, 0, 1, 1, 0] * 20)
    result = stats.compare_paired(run, run.copy())
    assert (result.note, result.p_value, result.changed) == ("changed no answer", 1.0, 0)
    bound = stats.clopper_pearson(0, 100)[1]
    assert result.ci == (-bound, bound)
    assert bound > 0.03


def test_compare_paired_counts_and_tests():
    base = np.array([1] * 50 + [0] * 50)
    tuned = base.copy()
    tuned[:3] = 0
    tuned[50:65] = 1
    result = stats.compare_paired(base, tuned, seed=3)
    assert (result.gained, result.lost, result.changed, result.n) == (15, 3, 18, 100)
    assert result.difference == pytest.approx(0.12)
    assert result.p_value == pytest.approx(reference.binomtest(3, 18).pvalue)
    half = 1.96 * np.sqrt((0.18 - 0.12**2) / 100)
    assert result.ci == pytest.approx((0.12 - half, 0.12 + half), abs=0.015)


def test_compare_paired_is_never_a_point():
    result = stats.compare_paired(np.zeros(4), np.ones(4))
    assert result.ci == (stats.clopper_pearson(4, 4)[0], 1.0)
    result = stats.compare_paired([1], [0])
    assert result.ci[0] == -1.0
    assert result.ci[1] < 0


def test_compare_paired_with_several_samples():
    base = np.array([[1, 0, 0, 0], [1, 1, 1, 1]] * 20)
    tuned = np.array([[1, 1, 0, 0], [1, 1, 1, 1]] * 20)
    result = stats.compare_paired(base, tuned)
    assert result.difference == pytest.approx(0.125)
    assert result.changed == result.gained == 20
    assert result.p_value < 0.001
    assert "sign-flip" in result.note


def test_multinomial_and_permutation_draws():
    draws = stats.multinomial_draws(50, [1.0, 0.0, 3.0], 400, seed=0)
    assert (draws.sum(axis=1) == 50).all()
    assert (draws[:, 1] == 0).all()
    assert draws[:, 2].mean() == pytest.approx(37.5, abs=0.6)
    shuffled = stats.permutation_draws([1, 2, 3, 4], 200, seed=0)
    assert (np.sort(shuffled, axis=1) == [1, 2, 3, 4]).all()
    assert len(np.unique(shuffled, axis=0)) > 15


def test_permutation_p_value_does_not_depend_on_the_unit():
    """With a slack of 1e-9 whatever the size, p of the small figures would be 1."""
    null = np.random.default_rng(0).normal(size=199)
    p_values = [stats.permutation_p_value(2.5 * unit, unit * null) for unit in (1.0, 1e-10, 1e10)]
    assert p_values[0] < 0.05
    assert p_values == [p_values[0]] * 3
    small = 1e-11 * (1 + np.arange(20.0))
    assert stats.sign_flip_p_value(small) < 0.001
    assert stats.permutation_p_value(0.0, np.zeros(9)) == 1.0


def test_a_random_set_among_random_sets_is_no_effect():
    """Units enough make any two sets differ; the sets' own spread says what chance gives."""
    rng = np.random.default_rng(1)
    found, fixed = [], []
    # Every set does something of its own, the same at all of 50 documents but for some noise.
    drawn = rng.normal(size=(400, 7, 1)) + 0.5 * rng.normal(size=(400, 7, 50))
    for own in drawn:
        found.append(stats.difference_from_sets(own[0], own[1:]).p_value)
        beyond = own[0] - own[1:].mean(0)
        fixed.append(reference.ttest_1samp(beyond, 0).pvalue)
    assert (np.array(fixed) <= 0.05).mean() > 0.8
    alarms = (np.array(found) <= 0.05).sum()
    assert alarms / 400 > 0.01
    assert stats.clopper_pearson(int(alarms), 400, 0.99)[0] < 0.05
    first = drawn[0]
    far = stats.difference_from_sets(first[0] + 9, first[1:])
    assert far.p_value < 0.01
    assert far.value == pytest.approx((first[0] + 9 - first[1:].mean(0)).mean())


def test_difference_from_sets_of_equal_sets_is_the_paired_t_test():
    """Sets that do not differ add nothing: what is left is the t test over units."""
    rng = np.random.default_rng(2)
    target, other = rng.normal(size=(2, 30))
    found = stats.difference_from_sets(target, np.tile(other, (4, 1)))
    t = reference.ttest_rel(target, other)
    assert found.p_value == pytest.approx(t.pvalue)
    assert found.freedom == pytest.approx(29)
    same = stats.difference_from_sets(other, np.tile(other, (4, 1)))
    assert (same.value, same.se, same.p_value) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.difference_from_sets([1.0, 2.0], [[1.0, 2.0]]),
        lambda: stats.difference_from_sets([1.0], [[1.0], [2.0]]),
        lambda: stats.difference_from_sets([1.0, 2.0], [[1.0], [2.0]]),
        lambda: stats.wilson_interval(5, 4),
        lambda: stats.clopper_pearson(0, 0),
        lambda: stats.bootstrap_mean_interval([]),
        lambda: stats.bootstrap_mean_interval([1.0, float("nan")]),
        lambda: stats.bootstrap_mean_interval([[1.0, float("inf")]]),
        lambda: stats.paired_bootstrap([1, 0], [1, 0, 1]),
        lambda: stats.wilson_interval(1, 2, level=95),
        lambda: stats.mcnemar_exact(-1, 2),
        lambda: stats.spearman([1, 2], [1, 2]),
    ],
)
def test_bad_input(call):
    with pytest.raises(BadInputError):
        call()


@pytest.mark.parametrize("between", [0.0, 0.5, 1.0])
def test_the_power_of_the_f_test_is_that_of_random_effects(between):
    """With normal group means F is a multiple of a central F: its power is known in closed form."""
    groups, each = 26, 4
    freedom = (groups - 1, groups * (each - 1))
    border = reference.f.ppf(0.95, *freedom)
    known = reference.f.sf(border / (1 + each * between**2 / 1.5**2), *freedom)
    draws = 4000
    simulated = stats.one_way_power(between, 1.5, groups=groups, each=each, draws=draws)
    error = (known * (1 - known) / draws) ** 0.5
    assert simulated == pytest.approx(known, abs=4 * error)
