"""Intervals, equivalence and power of paired runs, against enumeration and simulation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats as reference

from resa_lens import stats
from resa_lens.errors import BadInputError


def answers(gained: int, lost: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two runs with so many flips."""
    base = np.zeros(n)
    base[: n // 2] = 1
    other = base.copy()
    other[:lost] = 0
    other[n // 2 : n // 2 + gained] = 1
    return base, other


def tables(
    n: int, gaining: float, losing: float, draws: int, seed: int
) -> Iterator[tuple[int, int]]:
    """Numbers of gained and lost questions of simulated pairs of runs."""
    drawn = np.random.default_rng(seed).multinomial(
        n, [gaining, losing, 1 - gaining - losing], size=draws
    )
    yield from ((int(gained), int(lost)) for gained, lost, _ in drawn)


# Tango's interval


def test_the_interval_is_where_the_score_test_stops_to_reject():
    low, high = stats.tango_interval(15, 3, 100)
    for end, z in ((low, 1.959964), (high, -1.959964)):
        assert float(stats.score_statistic(15, 3, 100, end)) == pytest.approx(z, abs=1e-4)
    # The statistic at no difference is McNemar's without correction.
    assert float(stats.score_statistic(15, 3, 100, 0.0)) == pytest.approx(12 / np.sqrt(18))
    assert stats.tango_interval(3, 15, 100) == pytest.approx((-high, -low))


def test_the_interval_without_flips_has_the_closed_form():
    # With b = c = 0 the statistic at d is sqrt(n d / (1 - d)): its square is 3.84 at the end.
    bound = 3.841459 / (100 + 3.841459)
    assert stats.tango_interval(0, 0, 100) == pytest.approx((-bound, bound), abs=1e-7)
    assert stats.tango_interval(0, 4, 4)[0] == -1.0


@pytest.mark.parametrize(("gaining", "losing"), [(0.0075, 0.0075), (0.012, 0.003), (0.05, 0.02)])
def test_coverage_of_the_interval(gaining, losing):
    covered = []
    for gained, lost in tables(200, gaining, losing, 400, 1):
        interval, _ = stats.paired_interval(
            np.repeat([1.0, -1.0, 0.0], [gained, lost, 200 - gained - lost]), draws=400
        )
        covered.append(interval[0] <= gaining - losing <= interval[1])
    assert stats.clopper_pearson(sum(covered), 400, 0.99)[1] > 0.95
    assert np.mean(covered) > 0.92


def test_the_bootstrap_alone_covers_too_little_with_few_flips():
    """What Tango's interval is there for: three flips in 200 questions, two to one."""
    inside = {"bootstrap": 0, "used": 0}
    for gained, lost in tables(200, 0.00975, 0.00525, 400, 2):
        differences = np.repeat([1.0, -1.0, 0.0], [gained, lost, 200 - gained - lost])
        if gained + lost == 0:
            inside["bootstrap"] += 1  # the exact rule, in both ways
        else:
            low, high = stats.bootstrap_mean_interval(differences, draws=400)
            inside["bootstrap"] += low <= 0.0045 <= high
        low, high = stats.paired_interval(differences, draws=400)[0]
        inside["used"] += low <= 0.0045 <= high
    assert inside["bootstrap"] / 400 < 0.9 < 0.94 < inside["used"] / 400


def test_the_interval_says_how_it_was_made():
    for flips, name in ((0, "exact"), (5, "Tango"), (40, "bootstrap")):
        found = stats.compare_paired(*answers(flips, 0, 200))
        assert name in found.interval
    # Equal changes of every question are no certainty.
    low, high = stats.paired_interval(np.full(50, 0.25))[0]
    assert low < 0.25 < high


# Equivalence


def enumerated(gained: int, lost: int, n: int, margin: float) -> float:
    """P over every table, the nuisance on a fine grid: no bisection, no binomials."""
    up, down = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    possible = up + down <= n
    observed = stats.score_statistic(gained, lost, n, -margin)
    extreme = possible & (stats.score_statistic(up, down, n, -margin) >= observed - 1e-9)
    cells = np.stack([up, down, n - up - down], axis=-1)[extreme]
    return max(
        # At the end of the grid no question is left that both runs answer alike.
        float(
            reference.multinomial.pmf(
                cells, n, [max(0.0, q - margin), q, max(0.0, 1 - 2 * q + margin)]
            ).sum()
        )
        for q in np.linspace(margin, (1 + margin) / 2, 300)
    )


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 0), (4, 1), (6, 2), (2, 2), (0, 3)])
def test_noninferiority_against_enumeration(gained, lost):
    ours = stats.noninferiority_p(gained, lost, 14, 0.1)
    assert ours == pytest.approx(enumerated(gained, lost, 14, 0.1), rel=0.01)


def test_no_flips_is_equivalence_only_with_questions_enough():
    # The least favourable truth loses the margin and gains nothing.
    assert stats.noninferiority_p(0, 0, 100, 0.02) == pytest.approx(0.98**100)
    same = stats.equivalence_test(*answers(0, 0, 100))
    assert not same.equivalent
    assert stats.equivalence_test(*answers(0, 0, 200)).equivalent


def test_size_of_the_equivalence_test_at_the_margin():
    """The second run is worse by the margin: it may pass at most 5 times of 100, and about so."""
    n, margin = 1000, 0.02
    counts = [list(tables(n, q - margin, q, 2000, 3)) for q in (0.02, 0.03, 0.06, 0.15)]
    statistics = [
        stats.score_statistic([up for up, _ in pairs], [down for _, down in pairs], n, -margin)
        for pairs in counts
    ]
    # P falls as the statistic grows: the smallest one that passes is found by halves.
    order = sorted({(float(t), pair) for drawn, pairs in zip(statistics, counts, strict=True)
                    for t, pair in zip(drawn, pairs, strict=True)})  # fmt: skip
    low, high = 0, len(order) - 1
    while low < high:
        middle = (low + high) // 2
        if stats.noninferiority_p(*order[middle][1], n=n, margin=margin) <= 0.05:
            high = middle
        else:
            low = middle + 1
    sizes = [float((drawn >= order[low][0]).mean()) for drawn in statistics]
    for size in sizes:
        assert stats.clopper_pearson(round(2000 * size), 2000, 0.998)[0] <= 0.05
    assert max(sizes) > 0.035


def test_equivalence_of_several_samples_at_the_margin():
    """Means of four correlated samples: the bootstrap-t holds its size."""
    rng, n, passed, methods = np.random.default_rng(4), 300, 0, set()
    for seed in range(200):
        ability = rng.beta(0.6, 0.4, size=(n, 1))
        base = rng.random((n, 4)) < ability
        other = rng.random((n, 4)) < np.clip(ability - 0.05 / 0.84 * (ability > 0.16), 0, 1)
        shift = 0.05 / 0.84 * reference.beta.sf(0.16, 0.6, 0.4)
        made = stats.equivalence_test(base, other, margin=float(shift), draws=400, seed=seed)
        passed += made.noninferior
        methods.add(made.method)
    assert methods == {"bootstrap-t over questions"}
    assert (
        stats.clopper_pearson(passed, 200, 0.998)[0]
        <= 0.05
        <= (stats.clopper_pearson(passed, 200, 0.998)[1])
    )


def test_equivalence_and_difference_answer_different_questions():
    base, other = answers(60, 60, 2000)
    assert stats.equivalence_test(base, other).equivalent
    # A difference that is seen and smaller than the margin is both.
    base, other = answers(22, 2, 2000)
    made = stats.equivalence_test(base, other)
    assert made.equivalent
    assert stats.compare_paired(base, other).p_value < 0.001
    # Far too few questions: neither.
    few = stats.equivalence_test(*answers(3, 4, 60))
    assert not few.equivalent
    assert not few.noninferior
    better = stats.equivalence_test(*answers(200, 20, 2000))
    assert better.noninferior
    assert not better.equivalent


def test_few_changes_of_several_samples_are_bounded_by_whole_flips():
    base = np.ones((400, 4))
    other = base.copy()
    other[:3, 0] = 0
    made = stats.equivalence_test(base, other)
    assert "bounded" in made.method
    assert made.p_noninferior == pytest.approx(stats.noninferiority_p(0, 0.75, 400, 0.02))


# Power


@pytest.mark.parametrize(
    ("discordance", "difference"), [(0.1, 0.02), (0.2, 0.05), (0.3, 0.1), (0.05, 0.03)]
)
def test_questions_for_a_difference_give_the_power(discordance, difference):
    n = stats.mcnemar_questions(discordance, difference)
    assert n is not None
    assert 0.79 < stats.mcnemar_power(discordance, difference, n) < 0.84
    assert stats.mcnemar_detectable(discordance, n) == pytest.approx(difference, rel=0.01)
    # Connor's form without the correction for continuity is a little too hopeful here.
    z, power = 1.959964, 0.841621
    plain = (z * discordance**0.5 + power * (discordance - difference**2) ** 0.5) / difference
    assert plain**2 < n < plain**2 + 2 / difference + 4


def test_power_against_simulation():
    n, discordance, difference = 600, 0.12, 0.04
    gaining, losing = (discordance + difference) / 2, (discordance - difference) / 2
    seen = [stats.mcnemar_exact(*pair) <= 0.05 for pair in tables(n, gaining, losing, 3000, 5)]
    power = stats.mcnemar_power(discordance, difference, n)
    assert np.mean(seen) == pytest.approx(power, abs=4 * np.sqrt(power * (1 - power) / 3000))
    # Under the null the same sum is the test's size, at most alpha.
    assert 0.03 < stats.mcnemar_power(discordance, 0.0, n) <= 0.05


def test_paired_power_of_runs():
    power = stats.paired_power(*answers(120, 80, 2000))
    assert power.discordance == pytest.approx(0.1)
    assert power.questions == stats.mcnemar_questions(0.1, 0.02)
    low, high = power.questions_ci
    assert low is not None
    assert high is not None
    assert power.questions is not None
    assert low < power.questions < high
    assert power.detectable == pytest.approx(stats.mcnemar_detectable(0.1, 2000))


def test_paired_power_where_too_little_changes():
    none = stats.paired_power(*answers(0, 0, 2000))
    # Ends of the interval: no flips at all, and 0.18 % of the questions.
    assert (none.questions, none.questions_ci) == (None, (None, None))
    assert stats.paired_power(*answers(1, 0, 20)).detectable is None
    assert stats.mcnemar_questions(0.01, 0.02) is None
    assert stats.mcnemar_detectable(0.5, 4) is None


def test_paired_power_of_several_samples_against_simulation():
    rng, n = np.random.default_rng(6), 400
    ability = rng.beta(2, 2, size=(n, 1))
    base, other = (rng.random((2, n, 4)) < ability).astype(float)
    power = stats.paired_power(base, other, target=0.03)
    assert power.detectable is not None
    assert power.questions is not None
    spread = float((other - base).mean(axis=1).std())
    t = rng.normal(power.detectable, spread / np.sqrt(n), size=4000) / (spread / np.sqrt(n))
    assert (np.abs(t) > 1.96).mean() == pytest.approx(0.8, abs=0.03)
    assert power.questions == pytest.approx(n * (power.detectable / 0.03) ** 2, rel=0.01)


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.tango_interval(-1, 2, 10),
        lambda: stats.tango_interval(6, 5, 10),
        lambda: stats.noninferiority_p(1, 1, 10, 0.0),
        lambda: stats.noninferiority_p(8, 3, 10, 0.02),
        lambda: stats.equivalence_test([1, 0], [1, 0], margin=2.0),
        lambda: stats.equivalence_test([1, 0], [1, 0, 1]),
        lambda: stats.mcnemar_questions(0.0, 0.02),
        lambda: stats.mcnemar_questions(0.1, 0.0),
        lambda: stats.mcnemar_power(0.1, 0.2, 50),
        lambda: stats.mcnemar_detectable(0.1, 50, power=0.2),
        lambda: stats.paired_power([1, 0], [1, 1], target=2),
    ],
)
def test_bad_input(call):
    with pytest.raises(BadInputError):
        call()


def test_mcnemar_counts_whole_numbers_of_any_kind():
    # 40 against 60 of 100: the binomial tail twice, which SciPy gives too.
    expected = 2 * reference.binom.cdf(40, 100, 0.5)
    assert stats.mcnemar_exact(40, 60) == pytest.approx(expected, rel=1e-12)
    assert stats.mcnemar_exact(*np.array([40, 60])) == stats.mcnemar_exact(40, 60)
    assert stats.mcnemar_exact(1, 5) == 2 * 7 / 64
    assert stats.mcnemar_exact(0, 0) == stats.mcnemar_exact(3, 3) == 1.0
