"""Runs of several seeds: error rates and coverage where questions and seeds are planted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats as reference

from resa_lens import stats
from resa_lens.errors import BadInputError
from resa_lens.stats.power import least_detectable

BASE = 0.68


def planted(
    rng: np.random.Generator,
    effects: Sequence[float],
    seeds: int = 3,
    n: int = 400,
    flips: float = 0.1,
    seed_sd: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Runs [layers, seeds, n] of a base [n]: effects, seeds that differ, flips at random."""
    base = rng.random(n) < BASE
    shift = np.asarray(effects)[:, None, None] + rng.normal(0, seed_sd, (len(effects), seeds, 1))
    chance = rng.random((len(effects), seeds, n))
    gaining = np.clip((flips + shift) / 2 / (1 - BASE), 0, 1)
    losing = np.clip((flips - shift) / 2 / BASE, 0, 1)
    runs = np.where(base, chance >= losing, chance < gaining)
    return runs.astype(float), base.astype(float)


def is_nominal(hits: int, of: int, rate: float, chance: float = 0.002) -> bool:
    low, high = stats.clopper_pearson(hits, of, 1 - chance)
    return low <= rate <= high


# Two settings


@pytest.mark.parametrize(("seed_sd", "least"), [(0.0, 0.94), (0.015, 0.91), (0.03, 0.91)])
def test_group_interval_covers_whatever_the_seeds_do(seed_sd, least):
    rng, covered = np.random.default_rng(1), 0
    for _ in range(300):
        runs, _ = planted(rng, [0.0, 0.03], seeds=4, seed_sd=seed_sd)
        low, high = stats.group_difference(*runs).ci
        covered += low <= 0.03 <= high
    assert covered / 300 > least
    assert stats.clopper_pearson(covered, 300, 0.998)[1] > 0.95


def test_questions_alone_understate_what_seeds_do():
    """The mistake that the seeds' variance is there for: all answers pooled over seeds."""
    rng, honest, pooled = np.random.default_rng(2), 0, 0
    for _ in range(200):
        runs, _ = planted(rng, [0.0, 0.0], seeds=3, n=1500, seed_sd=0.03)
        honest += stats.group_difference(*runs).p_value <= 0.05
        together = (runs[1] - runs[0]).mean(axis=0)
        pooled += reference.ttest_rel(together, np.zeros(1500)).pvalue <= 0.05
    assert pooled / 200 > 0.2
    assert honest / 200 < 0.1


def test_variance_between_seeds_is_recovered():
    rng = np.random.default_rng(3)
    runs, _ = planted(rng, [0.0, 0.0], seeds=60, n=2000, seed_sd=0.02, flips=0.2)
    found = stats.group_difference(*runs)
    for sd in found.seed_sd:
        assert sd == pytest.approx(0.02, rel=0.3)
    assert found.seeds == (60, 60)
    # What seeds add cannot be had back by questions: two points need more seeds.
    few, _ = planted(rng, [0.0, 0.0], seeds=3, n=2000, seed_sd=0.03, flips=0.2)
    assert stats.group_difference(*few, target=0.01).questions is None


def test_one_run_a_side_is_the_paired_t_test():
    rng = np.random.default_rng(4)
    runs, _ = planted(rng, [0.0, 0.05], seeds=1)
    found = stats.group_difference(*runs)
    peer = reference.ttest_rel(runs[1, 0], runs[0, 0])
    assert found.p_value == pytest.approx(peer.pvalue)
    assert found.freedom == pytest.approx(399)
    assert found.seed_sd == (None, None)
    peer_ci = peer.confidence_interval()
    assert found.ci == pytest.approx((peer_ci.low, peer_ci.high))


def test_paired_seeds_take_out_what_both_share():
    rng = np.random.default_rng(5)
    runs, _ = planted(rng, [0.0], seeds=6, seed_sd=0.03)
    other = runs[0].copy()
    changed = rng.random(other.shape) < 0.02
    other[changed] = 1 - other[changed]
    nested = stats.group_difference(runs[0], other)
    paired = stats.group_difference(runs[0], other, paired_seeds=True)
    assert paired.difference == nested.difference
    assert paired.se < 0.5 * nested.se
    assert len(paired.seed_sd) == 1


def test_few_flips_of_groups_are_no_certainty():
    base = np.repeat([[1.0, 0.0]], [300, 100], axis=1)
    same = stats.group_difference(np.tile(base, (3, 1)), np.tile(base, (3, 1)))
    bound = stats.clopper_pearson(0, 400)[1]
    assert (same.ci, same.p_value, same.changed) == ((-bound, bound), 1.0, 0)
    other = np.tile(base, (3, 1))
    other[:, :5] = 0  # the same five questions in every run: five flips, not fifteen
    found = stats.group_difference(np.tile(base, (3, 1)), other)
    assert found.p_value == pytest.approx(2 * 0.5**5, abs=0.01)
    assert found.ci[0] == pytest.approx(stats.tango_interval(0, 5, 400)[0], abs=0.002)


def test_equal_changes_of_every_question_are_no_certainty():
    zeros, ones = np.zeros((2, 40)), np.ones((2, 40))
    low, high = stats.group_difference(zeros, ones).ci
    assert (low, high) == (stats.tango_interval(40, 0, 40)[0], 1.0)
    made = stats.sweep_differences(0.25 * ones[None], zeros[0], draws=200)
    assert made.ci[0][0] < 0.25 < made.ci[0][1]
    assert 0 < made.p_value[0] < 0.01


# Questions that are needed


def test_questions_with_seeds_give_the_power():
    per_question, per_seed, rest, seeds = 0.03, 0.01**2, 0.08, 4
    n = stats.questions_with_seeds(per_question, per_seed, rest, seeds, 0.03)
    assert n is not None
    rng, draws = np.random.default_rng(6), 20_000
    se = np.sqrt(per_question / n + per_seed / seeds + rest / (n * seeds))
    drawn = (
        0.03
        + rng.normal(0, np.sqrt(per_seed), (draws, seeds)).mean(axis=1)
        + rng.normal(0, np.sqrt(per_question / n), draws)
        + rng.normal(0, np.sqrt(rest / n), (draws, seeds)).mean(axis=1)
    )
    assert (np.abs(drawn / se) > 1.96).mean() == pytest.approx(0.8, abs=0.015)
    assert stats.questions_with_seeds(per_question, 0.03**2, rest, 3, 0.02) is None


# A sweep


@pytest.mark.parametrize("seed_sd", [0.0, 0.02])
def test_error_rates_of_a_flat_sweep(seed_sd):
    rng, layers, draws = np.random.default_rng(7), 6, 150
    own = together = alarms = f = shuffled = 0
    for seed in range(draws):
        runs, base = planted(rng, [0.0] * layers, seed_sd=seed_sd)
        made = stats.sweep_differences(runs, base, draws=400, seed=seed)
        own += sum(low <= 0 <= high for low, high in made.ci)
        together += all(low <= 0 <= high for low, high in made.simultaneous_ci)
        alarms += min(made.adjusted_p) <= 0.05
        effect = stats.layer_effect(runs, draws=99, question_draws=1, seed=seed)
        assert effect.anova is not None
        assert effect.anova.p_value is not None
        assert effect.run_p is not None
        f += effect.anova.p_value <= 0.05
        shuffled += effect.run_p <= 0.05
    assert own / (layers * draws) == pytest.approx(0.95, abs=0.025)
    assert is_nominal(together, draws, 0.95)
    assert is_nominal(alarms, draws, 0.05)
    assert is_nominal(f, draws, 0.05)
    assert is_nominal(shuffled, draws, 0.05)


def test_labels_shuffled_inside_questions_see_questions_and_not_seeds():
    rng, still, moved = np.random.default_rng(8), 0, 0
    for seed in range(100):
        runs, _ = planted(rng, [0.0] * 4, n=200)
        still += stats.shuffled_within_questions(runs, 99, seed) <= 0.05
        runs, _ = planted(rng, [0.0] * 4, n=1500, seed_sd=0.03)
        moved += stats.shuffled_within_questions(runs, 19, seed) <= 0.05
    assert is_nominal(still, 100, 0.05)
    # Layers without any effect, told apart by their seeds: why F is beside it.
    assert moved > 40


def test_shuffling_agrees_with_cochrans_q():
    rng = np.random.default_rng(9)
    runs, _ = planted(rng, [0.0, 0.02, 0.05], seeds=1, n=300)
    table = runs[:, 0]
    columns, rows = table.sum(axis=1), table.sum(axis=0)
    q = 2 * (3 * (columns**2).sum() - columns.sum() ** 2) / (3 * rows.sum() - (rows**2).sum())
    expected = float(reference.chi2.sf(q, 2))
    assert stats.shuffled_within_questions(runs, 4000) == pytest.approx(expected, abs=0.02)
    assert stats.shuffled_within_questions(np.ones((3, 2, 10))) == 1.0


def test_a_planted_layer_is_found_and_the_power_is_as_said():
    """The detectable difference of the design, planted at one layer, is seen 8 times of 10."""
    rng = np.random.default_rng(10)
    # One sweep's noise is itself an estimate: the mean of many is what is planted.
    powers = [
        stats.sweep_power(*planted(rng, [0.0] * 6, seed_sd=0.01), draws=400) for _ in range(40)
    ]
    one, any_layer = (float(np.mean(size)) for size in zip(
        *((power.one_layer, power.any_layer) for power in powers), strict=True))  # fmt: skip
    seen = seen_any = 0
    for seed in range(150):
        runs, base = planted(rng, [one] + [0.0] * 5, seed_sd=0.01)
        seen += stats.sweep_differences(runs, base, draws=50, seed=seed).p_value[0] <= 0.05
        runs, base = planted(rng, [any_layer] + [0.0] * 5, seed_sd=0.01)
        seen_any += stats.sweep_differences(runs, base, draws=400, seed=seed).adjusted_p[0] <= 0.05
    assert seen / 150 == pytest.approx(0.8, abs=0.12)
    assert seen_any / 150 == pytest.approx(0.8, abs=0.12)
    assert one < any_layer


def test_spread_of_layers_that_f_sees():
    rng = np.random.default_rng(11)
    big, _ = planted(rng, [0.0] * 8, seeds=40, seed_sd=0.01)
    within = big.mean(axis=2).var(axis=1, ddof=1).mean()
    # Three seeds of the same noise.
    small = big[:, :3]
    power = stats.sweep_power(small, np.zeros(400), draws=200)
    assert power.layer_spread is not None
    scaled = power.layer_spread * np.sqrt(within / small.mean(axis=2).var(axis=1, ddof=1).mean())
    effects = rng.normal(size=8)
    effects = (effects - effects.mean()) / effects.std(ddof=1) * scaled
    values = effects[:, None] + rng.normal(0, np.sqrt(within), size=(2000, 8, 3))
    f = stats.one_way_f(values.reshape(2000, -1), np.repeat(np.arange(8), 3))
    assert (f > reference.f.isf(0.05, 7, 16)).mean() == pytest.approx(0.8, abs=0.03)


def test_one_seed_leaves_the_questions_noise_alone():
    rng = np.random.default_rng(12)
    runs, base = planted(rng, [0.0, 0.05, 0.0], seeds=1)
    made = stats.sweep_differences(runs, base, draws=200)
    assert made.seed_sd is None
    for layer in range(3):
        t = reference.ttest_rel(runs[layer, 0], base)
        assert made.p_value[layer] == pytest.approx(t.pvalue)
    effect = stats.layer_effect(runs, draws=99)
    assert (effect.anova, effect.run_p) == (None, None)
    assert effect.question_p < 0.2
    assert stats.sweep_power(runs, base, draws=200).layer_spread is None


def test_layers_that_change_nothing_have_an_interval():
    base = np.repeat([1.0, 0.0], [150, 50])
    runs = np.tile(base, (3, 2, 1))
    made = stats.sweep_differences(runs, base)
    bound = stats.clopper_pearson(0, 200)[1]
    assert made.ci == ((-bound, bound),) * 3
    assert made.simultaneous_ci[0][1] >= bound
    assert made.p_value == made.adjusted_p == (1.0, 1.0, 1.0)
    runs[0, :, :4] = 0
    few = stats.sweep_differences(runs, base)
    assert few.p_value[0] == pytest.approx(2 * 0.5**4, abs=0.02)
    assert few.adjusted_p[0] == pytest.approx(3 * few.p_value[0])
    assert few.simultaneous_ci[0][0] < -0.02


def test_profile_correlation():
    rng = np.random.default_rng(13)
    counts, means = rng.integers(0, 20, 10), rng.normal(size=10)
    found = stats.profile_correlation(means, counts, draws=4000)
    assert (found.rho, found.p_value) == stats.spearman(means, counts, draws=4000)
    assert found.ci[0] < found.rho < found.ci[1]
    # Ten layers see a correlation of about 0.8.
    assert found.detectable == pytest.approx(0.8, abs=0.05)
    perfect = stats.profile_correlation(np.arange(10.0), np.arange(10.0))
    assert perfect.rho == pytest.approx(1.0)
    assert perfect.ci[0] < 0.97


def test_coverage_and_power_of_the_correlation():
    rng, n, covered, seen = np.random.default_rng(14), 12, 0, 0
    detectable = stats.profile_correlation(np.arange(12.0), rng.normal(size=12)).detectable
    pearson = 2 * np.sin(np.pi * detectable / 6)  # of normals with that rank correlation
    for seed in range(200):
        x = rng.normal(size=n)
        y = pearson * x + np.sqrt(1 - pearson**2) * rng.normal(size=n)
        found = stats.profile_correlation(x, y, draws=200, seed=seed)
        covered += found.ci[0] <= detectable <= found.ci[1]
        seen += found.p_value <= 0.05
    assert covered / 200 > 0.9
    assert seen / 200 == pytest.approx(0.8, abs=0.12)


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.group_difference([[1.0, 0.0]], [[1.0, 0.0, 1.0]]),
        lambda: stats.group_difference([[1.0], [0.0]], [[1.0], [0.0]]),
        lambda: stats.group_difference([[1.0, np.nan]], [[1.0, 0.0]]),
        lambda: stats.group_difference(np.ones((2, 5)), np.ones((3, 5)), paired_seeds=True),
        lambda: stats.sweep_differences(np.ones((2, 5)), np.ones(5)),
        lambda: stats.sweep_differences(np.ones((2, 3, 5)), np.ones(4)),
        lambda: stats.layer_effect(np.ones((1, 3, 5))),
        lambda: stats.profile_correlation([1, 2, 3], [1, 2, 3]),
        lambda: stats.questions_with_seeds(-1, 0, 0, 3, 0.02),
    ],
)
def test_bad_input(call):
    with pytest.raises(BadInputError):
        call()


@pytest.mark.parametrize("n", [60, 500, 4000])
def test_the_least_that_questions_can_show_is_seen(n):
    least = least_detectable(n)
    assert 0.8 < stats.mcnemar_power(least, least, n) < 0.97
    assert least_detectable(n, alpha=0.005) > least


def test_a_sweep_that_changes_hardly_an_answer_does_not_see_everything():
    """Without noise Student's t would see two questions of 2,000, which no test of flips does."""
    rng = np.random.default_rng(0)
    base = (rng.random(2000) < 0.7).astype(float)
    scores = np.tile(base, (5, 3, 1))
    for run in scores.reshape(-1, 2000):
        run[rng.integers(2000)] *= 0.0
    power = stats.sweep_power(scores, base)
    assert power.one_layer == least_detectable(2000)
    assert power.any_layer > power.one_layer
    more = np.flatnonzero(base == 0)[: int(np.ceil(power.any_layer * 2000))]
    scores[2][:, more] = 1.0
    assert stats.sweep_differences(scores, base).adjusted_p[2] < 0.05


def test_one_run_against_three_says_how_often_it_is_wrong() -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        runs = 0.5 + 0.1 * rng.normal(size=(4, 1)) + 0.01 * rng.normal(size=(4, 40))
        found = stats.group_difference(runs[:1], runs[1:])
        alarms += found.p_value <= 0.05
    assert found.single_run_alarms == pytest.approx(0.164, abs=0.001)
    low, high = stats.clopper_pearson(alarms, 400)
    assert low < found.single_run_alarms < high
    assert stats.group_difference(runs[:2], runs[2:]).single_run_alarms is None
    assert stats.group_difference(runs[:1], runs[1:2]).single_run_alarms is None
