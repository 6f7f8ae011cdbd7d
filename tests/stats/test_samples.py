"""avg@n, pass@k, averages over tasks, and the bias of the best of many, against enumeration."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats as reference

from resa_lens import stats
from resa_lens.errors import BadInputError


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_answer(k):
    for right in range(7):
        answers = [1] * right + [0] * (6 - right)
        draws = list(combinations(answers, k))
        assert stats.pass_at_k([right], 6, k)[0] == pytest.approx(
            sum(any(draw) for draw in draws) / len(draws)
        )


def test_pass_at_k_of_many_samples_is_stable():
    # C(20000, 100) is far above the largest float.
    found = stats.pass_at_k([1, 0, 20_000, 10_000], 20_000, 100)
    assert found[:3] == pytest.approx([100 / 20_000, 0, 1])
    assert 1 - 1e-12 < found[3] <= 1
    assert stats.pass_at_k([1, 1], [2, 4], 2) == pytest.approx([1.0, 0.5])


def test_pass_at_1_is_the_mean_and_the_estimate_is_unbiased():
    right = np.array([0, 1, 3, 4])
    assert stats.pass_at_k(right, 4, 1) == pytest.approx(right / 4)
    rng = np.random.default_rng(0)
    drawn = rng.binomial(5, 0.3, size=40_000)
    truth = 1 - 0.7**3
    assert stats.pass_at_k(drawn, 5, 3).mean() == pytest.approx(truth, abs=0.006)
    # The plain 1 - (1 - c/n)^k falls short.
    assert (1 - (1 - drawn / 5) ** 3).mean() < truth - 0.02


def test_one_answer_a_question_has_wilsons_interval():
    assert stats.mean_interval([1] * 7 + [0] * 3) == stats.wilson_interval(7, 10)
    assert stats.mean_interval(np.ones((30, 4))) == stats.wilson_interval(30, 30)
    # Equal shares of right answers are no certainty.
    low, high = stats.mean_interval(np.tile([1, 0], (30, 1)))
    assert (low, high) == stats.wilson_interval(15.0, 30)


def test_interval_over_questions_is_wider_than_over_answers():
    """Samples of a question share its difficulty: counted as independent they cover too little."""
    rng, n, samples = np.random.default_rng(1), 120, 8
    whole, naive = [], []
    for seed in range(200):
        ability = rng.beta(0.4, 0.4, size=(n, 1))
        answers = (rng.random((n, samples)) < ability).astype(float)
        low, high = stats.mean_interval(answers, draws=500, seed=seed)
        whole.append(low <= 0.5 <= high)
        low_naive, high_naive = stats.wilson_interval(int(answers.sum()), n * samples)
        naive.append(low_naive <= 0.5 <= high_naive)
        assert high - low > high_naive - low_naive
    assert stats.clopper_pearson(sum(whole), 200, 0.998)[1] > 0.95
    assert np.mean(whole) > 0.9
    assert np.mean(naive) < 0.75


def test_macro_average_counts_tasks_alike_and_covers():
    large, small = np.repeat([1.0, 0.0], [900, 100]), np.repeat([1.0, 0.0], [3, 27])
    mean, (low, high) = stats.macro_average([large, small])
    assert mean == pytest.approx((0.9 + 0.1) / 2)
    # The small task decides the width.
    reach = np.ptp(stats.wilson_interval(3, 30)) / 2
    assert high - low == pytest.approx(reach, rel=0.05)
    rng, truth = np.random.default_rng(2), np.array([0.97, 0.6, 0.2])
    covered = 0
    for _ in range(300):
        groups = [
            (rng.random(n) < p).astype(float) for n, p in zip((30, 200, 40), truth, strict=True)
        ]
        _, (low, high) = stats.macro_average(groups)
        covered += low <= truth.mean() <= high
    inside = stats.clopper_pearson(covered, 300, 0.998)
    assert inside[0] <= 0.95 <= inside[1]


def test_best_of_equal_runs_is_too_good_by_the_noise():
    """Planted: eight equally good runs.  The naive best is biased by what the bootstrap says."""
    rng, n, runs = np.random.default_rng(3), 200, 8
    bias, noise, optimism = [], [], []
    for seed in range(120):
        table = (rng.random((runs, n)) < 0.6).astype(float)
        bias.append(table.mean(axis=1).max() - 0.6)
        found = stats.selection_bias(table, draws=200, seed=seed)
        noise.append(found.noise)
        optimism.append(found.optimism)
    expected = stats.expected_maximum(runs) * np.sqrt(0.24 / n)
    assert np.mean(bias) == pytest.approx(expected, abs=0.006)
    assert np.mean(noise) == pytest.approx(expected, rel=0.03)
    assert 0.6 < np.mean(optimism) / expected < 0.8


def test_choice_among_runs_that_share_answers_or_clearly_differ_adds_little():
    rng = np.random.default_rng(4)
    base = (rng.random(300) < 0.6).astype(float)
    table = np.tile(base, (6, 1))
    assert stats.selection_bias(table, draws=300).noise == pytest.approx(0.0, abs=0.005)
    apart = np.array([(rng.random(300) < p) for p in (0.2, 0.4, 0.9)], dtype=float)
    found = stats.selection_bias(apart, draws=1000)
    assert found.optimism == pytest.approx(0.0, abs=0.003)
    assert found.noise > 0.01


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.pass_at_k([1], 4, 5),
        lambda: stats.pass_at_k([1, 1], [4, 2], 3),
        lambda: stats.pass_at_k([1], 4, 0),
        lambda: stats.pass_at_k([5], 4, 1),
        lambda: stats.pass_at_k([], 4, 1),
        lambda: stats.mean_interval([0.2, 1.5]),
        lambda: stats.macro_average([]),
        lambda: stats.macro_average([[]]),
        lambda: stats.selection_bias([0.0, 1.0]),
    ],
)
def test_bad_input(call):
    with pytest.raises(BadInputError):
        call()


def test_students_interval_and_p_agree_with_scipy():
    values = [1.0, 2.5, -0.5, 3.0, 1.5, 0.5]
    mean, ci, p_value = stats.t_test(values, 0.9)
    peer = reference.ttest_1samp(values, 0.0)
    interval = peer.confidence_interval(0.9)
    assert mean == pytest.approx(np.mean(values))
    assert ci == pytest.approx((interval.low, interval.high))
    assert p_value == pytest.approx(peer.pvalue)
    assert stats.t_test([0.0, 0.0]) == (0.0, (0.0, 0.0), 1.0)
    with pytest.raises(BadInputError, match="two or more"):
        stats.t_test([1.0])
