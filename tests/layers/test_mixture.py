from __future__ import annotations

import json
import math
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import resa_lens
from resa_lens import stats
from resa_lens.errors import BadInputError
from resa_lens.layers import MixtureFit, fits, read_replicates
from resa_lens.layers.mixture import (
    count_verdict,
    fit_mixture,
    objections,
    paper_weights,
    read_table,
)

TABLE = Path(__file__).parents[2] / "data" / "paper" / "table6_hookpoints.csv"
CHECKPOINTS = TABLE.with_name("tables36_61_layer_checkpoints.csv")
LAYERS = np.arange(1, 27)
UNIFORM = np.ones(26) / 26


@pytest.fixture(scope="module")
def counts():
    return read_table(TABLE, "feature_count")


@pytest.fixture(scope="module")
def scores():
    return read_table(TABLE, "average")


def planted():
    masses = fits.layer_masses(np.array([5.0, 14.0, 23.0]), np.full(3, 1.5), LAYERS.astype(float))
    return masses.mean(axis=0)


def profile(n, probabilities, seed):
    return dict(
        zip(LAYERS.tolist(), np.random.default_rng(seed).multinomial(n, probabilities), strict=True)
    )


def digits(value, places):
    assert value is not None
    return round(value, places)


def rounded(fit):
    return [(round(part.mean, 2), round(part.weight, 3)) for part in fit.components]


# The paper's figures -----------------------------------------------------------------------------


def test_paper_recipe_on_counts(counts):
    fit = fit_mixture(counts, recipe="paper")
    assert rounded(fit) == [(14.48, 0.407), (4.86, 0.371), (22.70, 0.222)]
    assert digits(fit.entropy, 4) == 3.1938
    assert digits(fit.log_likelihood, 4) == -3.3187
    assert fit.recommended == (14, 5, 23)
    assert (fit.kind, fit.n, fit.k, fit.iterations, fit.converged) == ("counts", 53, 3, 6, False)


def test_paper_recipe_on_scores(scores):
    fit = fit_mixture(scores, recipe="paper", baseline=41.18)
    assert rounded(fit) == [(15.15, 0.390), (5.59, 0.368), (23.03, 0.242)]
    assert digits(fit.entropy, 4) == 3.2021
    assert fit.kind == "scores"
    assert fit.verdict == "not distinguishable from flat"
    assert fit.bic == {}


def test_paper_recipe_says_what_it_is_worth(counts):
    fit = fit_mixture(counts, recipe="paper")
    flat = fit.nulls["uniform_distribution"]
    assert round(flat["log_likelihood"], 4) == -3.2581
    assert flat["log_likelihood"] == -math.log(26)
    assert round(flat["entropy"], 4) == 3.2013
    run_on = fit.nulls["run_to_convergence"]
    assert round(run_on["log_likelihood"], 4) == -3.2799
    by_mean = sorted((c["mean"], c["weight"]) for c in run_on["components"])
    assert [round(m, 1) for m, _ in by_mean] == [3.2, 13.6, 24.2]
    assert [round(w, 2) for _, w in by_mean] == [0.21, 0.66, 0.13]
    assert round(fit.bic[1], 1) == 371.1
    assert fit.bic[1] < fit.bic[3]
    assert fit.bic[0] < min(fit.bic[k] for k in range(1, 6))
    assert round(fit.nulls["dispersion"]["value"], 2) == 0.84
    assert round(fit.nulls["dispersion"]["p"], 2) == 0.69
    assert fit.verdict == "not distinguishable from flat"
    assert "-3.3187 is below the uniform's -3.2581" in fit.reason
    assert "before convergence" in fit.reason
    assert len(fit.intervals) == 3
    for part, interval in zip(fit.components, fit.intervals, strict=True):
        assert interval.mean[0] < part.mean < interval.mean[1]
        assert interval.mean[1] - interval.mean[0] > 3  # layers: 53 features cannot pin a mean


def test_count_against_score(counts, scores):
    rho, p = stats.spearman(list(counts.values()), [scores[layer] for layer in counts])
    assert round(rho, 3) == -0.225
    assert p == pytest.approx(0.27, abs=0.02)


def test_best_of_200_seeds_and_the_objections(counts):
    fit = fit_mixture(counts, recipe="paper", restarts=200, draws=50)
    best = fit.nulls["best_of_seeds"]
    assert best["seeds"] == 200
    assert round(best["log_likelihood"], 4) == -3.2940
    assert sorted(round(part["mean"], 1) for part in best["components"]) == [4.2, 14.6, 24.1]
    assert round(best["bic"], 1) == 380.9
    said = objections(fit)
    assert len(said) == 5
    assert "stopped after 6 iterations at -3.3187" in said[0]
    assert "reaches -3.2799 with means 3.2, 13.6, 24.2 and weights 0.21, 0.66, 0.13" in said[0]
    assert "best of 200 seeds has -3.2940 with means 4.2, 14.6, 24.1" in said[1]
    assert "-3.2581: better than 3 of these 3 fits" in said[2]
    assert "3.2013" in said[3]
    assert "3.1938" in said[3]
    assert "one component (371.1) beats 3 (380.9, the best seed)" in said[4]


def test_objections_follow_the_fit():
    # Three lumps far apart: the recipe converges and beats the uniform, and that is what is said.
    table = dict.fromkeys(range(1, 27), 0) | {3: 40, 4: 60, 13: 50, 14: 60, 23: 50, 24: 40}
    said = objections(fit_mixture(table, recipe="paper", draws=50))
    assert "where it had converged" in said[0]
    assert any("better than 0 of these 2 fits" in line for line in said)
    assert any("does not beat 3" in line for line in said)
    assert objections(fit_mixture(table, draws=50)) == ()


def test_scores_keep_their_baseline(scores):
    fit = fit_mixture(scores, recipe="paper", baseline=41.18, draws=50)
    assert fit.baseline == 41.18
    assert paper_weights(np.array(fit.values), fit.kind, fit.baseline).sum() == fit.n == 15489
    assert MixtureFit.from_dict(json.loads(json.dumps(fit.to_dict()))) == fit
    old = fit.to_dict()
    del old["baseline"], old["seed"]  # written before these were kept
    assert MixtureFit.from_dict(old).components == fit.components


def test_count_against_mean_of_four(counts):
    table = read_replicates(CHECKPOINTS, "average")
    assert {len(values) for values in table.values()} == {4}
    rho, p = stats.spearman(list(counts.values()), [np.mean(table[layer]) for layer in counts])
    assert round(rho, 2) == 0.12
    assert p == pytest.approx(0.57, abs=0.02)  # 10,000 draws: standard error 0.005


# The robust recipe -------------------------------------------------------------------------------


def test_robust_calls_the_papers_table_flat(counts, scores):
    start = time.process_time()
    fit = fit_mixture(counts)
    assert time.process_time() - start < 4
    assert fit.verdict == "not distinguishable from flat"
    assert (fit.k, fit.components, fit.recommended) == (0, (), ())
    assert fit.entropy == pytest.approx(math.log(26))
    assert fit.log_likelihood == pytest.approx(-math.log(26))
    assert fit.bic[0] == pytest.approx(2 * 53 * math.log(26))
    for baseline in (None, 41.18):
        fit = fit_mixture(scores, baseline=baseline)
        assert fit.verdict == "not distinguishable from flat"
        assert fit.log_likelihood is None
        assert fit.bic == {}
        assert "cannot show more" in fit.reason


def test_robust_finds_planted_components():
    fit = fit_mixture(profile(600, planted(), 0), draws=300)
    assert (fit.verdict, fit.k, fit.converged) == ("supported", 3, True)
    assert [c.mean for c in fit.components] == pytest.approx([5, 14, 23], abs=0.4)
    assert [c.weight for c in fit.components] == pytest.approx([1 / 3] * 3, abs=0.06)
    assert [c.std for c in fit.components] == pytest.approx([1.5] * 3, abs=0.4)
    assert sorted(fit.recommended) == [5, 14, 23]
    order = [c.mean for c in sorted(fit.components, key=lambda c: -c.weight)]
    assert list(fit.recommended) == [round(mean) for mean in order]
    for centre, interval in zip((5, 14, 23), fit.intervals, strict=True):
        assert interval.mean[0] < centre < interval.mean[1]
        assert interval.mean[1] - interval.mean[0] < 1.2
        assert interval.weight[0] < 1 / 3 < interval.weight[1]


def test_robust_likelihood_is_over_unit_intervals_and_normalised():
    fit = fit_mixture(profile(600, planted(), 0), draws=50)
    means, sds = (np.array([getattr(c, n) for c in fit.components]) for n in ("mean", "std"))
    weights = np.array([c.weight for c in fit.components])
    masses = fits.layer_masses(means, sds, LAYERS.astype(float))
    np.testing.assert_allclose(masses.sum(axis=1), 1.0)
    share = weights @ masses
    expected = np.array(fit.values) @ np.log(share) / 600
    assert fit.log_likelihood == pytest.approx(expected, rel=1e-9)
    assert fit.entropy == pytest.approx(-(share * np.log(share)).sum())
    x = np.linspace(0.5, 26.5, 26_001)
    assert np.trapezoid(fit.density(x), x) == pytest.approx(1.0, abs=1e-4)
    near = (x > 13.5) & (x < 14.5)
    assert np.trapezoid(fit.density(x[near]), x[near]) == pytest.approx(share[13], abs=1e-3)
    assert fit.density(np.array([-3.0, 40.0])).tolist() == [0.0, 0.0]


def test_robust_does_not_collapse_onto_a_layer():
    # A free Gaussian would have unbounded likelihood here; one lone layer is uneven, not a lump.
    table = dict.fromkeys(range(1, 27), 1)
    table[9] = 40
    fit = fit_mixture(table, draws=300)
    assert min(part.std for part in fit.components) >= 0.5
    assert fit.verdict == "weak"
    assert "single layers stand out" in fit.reason
    assert 9 in fit.recommended


def test_flat_and_planted_profiles_few_draws():
    flat = [fit_mixture(profile(150, UNIFORM, s), draws=100).verdict for s in range(4)]
    lumps = [fit_mixture(profile(150, planted(), s), draws=100).verdict for s in range(4)]
    assert flat.count("supported") <= 1
    assert lumps.count("supported") == 4


def test_the_verdict_alone_is_the_fits_verdict():
    rng = np.random.default_rng(3)
    trend = np.linspace(1, 3, 26) / 52
    steep = np.geomspace(1, 30, 26)
    spike = np.where(LAYERS == 9, 8, 1) / 33
    said = []
    for share in (UNIFORM, trend, steep / steep.sum(), spike, planted()):
        for seed in range(2):
            table = dict(zip(LAYERS.tolist(), rng.multinomial(80, share).tolist(), strict=True))
            said.append(count_verdict(table, draws=59, seed=seed))
            assert said[-1] == fit_mixture(table, draws=59, seed=seed).verdict
    assert set(said) == {"supported", "trend", "weak", "not distinguishable from flat"}
    for table in (dict.fromkeys(range(8), 0), {1: 90, 2: 9, 3: 5, 4: 1, 5: 2}, {0: 3, 9: 1}):
        assert count_verdict(table, draws=20) == fit_mixture(table, draws=20).verdict
    with pytest.raises(BadInputError, match="no count"):
        count_verdict({1: 0.5})


@pytest.mark.recorded
@pytest.mark.parametrize("n", [53, 75, 100, 150])
def test_false_alarms_and_power_200_draws(n):
    flat = [fit_mixture(profile(n, UNIFORM, s), seed=s).verdict for s in range(200)]
    lumps = [fit_mixture(profile(n, planted(), s), seed=s).verdict for s in range(200)]
    alarms, hits = flat.count("supported"), lumps.count("supported")
    print(f"n {n}: flat called supported {alarms} of 200, planted {hits} of 200")
    assert alarms <= 10
    assert stats.clopper_pearson(alarms, 200, 0.9)[1] < 0.09
    if n == 150:
        assert hits >= 160


# Scores ------------------------------------------------------------------------------------------


def test_scores_with_noise_can_be_supported():
    rng = np.random.default_rng(0)
    smooth = 50 + 3 * np.exp(-((LAYERS - 12.0) ** 2) / 18) + 0.3 * rng.normal(size=26)
    table = dict(zip(LAYERS.tolist(), smooth.tolist(), strict=True))
    fit = fit_mixture(table, noise=0.3, components=1, draws=300)
    assert fit.verdict == "supported"
    assert fit.recommended[0] in (11, 12, 13)
    alone = fit_mixture(table, components=1, draws=300)
    assert alone.verdict == "weak"
    assert "cannot show more" in alone.reason
    loud = fit_mixture(table, noise=30.0, draws=300)
    assert loud.verdict == "weak"


def test_pure_noise_scores_are_flat():
    table = dict(zip(LAYERS.tolist(), np.random.default_rng(5).normal(size=26), strict=True))
    fit = fit_mixture(table, noise=1.0, draws=300)
    assert fit.verdict == "not distinguishable from flat"
    assert fit.components == ()


# Degenerate and bad input ------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["paper", "robust"])
@pytest.mark.parametrize(
    ("table", "options"),
    [
        (dict.fromkeys(range(1, 27), 0), {}),
        ({1: 0, 2: 1, 3: 0, 4: 0, 5: 1, 6: 0, 7: 0}, {}),
        ({1: 0, 2: 9, 3: 0, 4: 0, 5: 8, 6: 0, 7: 0}, {}),
        ({3: 7}, {}),
        ({1: 4, 2: 9, 3: 5, 4: 1, 5: 2}, {}),
        (dict.fromkeys(range(1, 9), 40.0), {"baseline": 41.18}),
        (dict.fromkeys(range(1, 9), 40.0), {"kind": "scores"}),
        (dict.fromkeys(range(1, 9), 0.5), {}),
        (dict.fromkeys(range(0, 900, 100), 7), {}),
    ],
)
def test_degenerate_profiles_get_a_verdict(recipe, table, options):
    fit = fit_mixture(table, recipe=recipe, draws=50, **options)
    if len(table) == 7 and sum(table.values()) == 17 and recipe == "robust":
        assert fit.verdict in ("weak", "not distinguishable from flat")
    else:
        assert fit.verdict == "not distinguishable from flat"
    assert fit.reason
    assert fit.next_step
    json.dumps(fit.to_dict(), allow_nan=False)
    fit.density(np.linspace(0, 9, 20))


def test_too_little_for_the_papers_recipe_has_no_components():
    for table in ({1: 0, 2: 0, 3: 0}, {1: 1, 2: 1, 3: 0}, {1: 5, 2: 5, 3: 0}):
        fit = fit_mixture(table, recipe="paper", draws=50)
        assert (fit.components, fit.recommended, fit.entropy) == ((), (), None)
    fit = fit_mixture({1: 40.0, 2: 50.0, 3: 45.0, 4: 46.0}, recipe="paper", baseline=41.18)
    assert fit.components == ()
    assert "negative weight" in fit.reason


def test_sizes_below_the_limits_say_so():
    assert "5 layers are too few" in fit_mixture({1: 90, 2: 9, 3: 5, 4: 1, 5: 2}).reason
    for recipe in ("paper", "robust"):
        for layers in (1, 3, 5):
            table = {layer: 10 + 30 * (layer == 2) for layer in range(layers)}
            fit = fit_mixture(table, recipe=recipe, draws=50)
            assert fit.verdict == "not distinguishable from flat"
            assert (fit.components, fit.recommended) == ((), ())
            assert "too few to tell: 6 are needed" in fit.reason
    few = dict.fromkeys(range(1, 10), 1)
    assert "9 features over 9 layers are too few" in fit_mixture(few).reason


@pytest.mark.parametrize(
    ("table", "options", "match"),
    [
        ({}, {}, "empty"),
        ({1: float("nan")}, {}, "nan"),
        ({1: 1, 2: float("inf")}, {}, "inf"),
        ({1: 1}, {"recipe": "magic"}, "magic"),
        ({1: 1}, {"kind": "odd"}, "odd"),
        ({1: 1.5}, {"kind": "counts"}, "layer 1 .*1.5, which is no count"),
        ({4: 2, 5: -4}, {"kind": "counts"}, "layer 5 .*-4, which is no count"),
        ({-1: 1}, {}, "-1"),
        ({"1": 1}, {}, "layer '1'"),
        ({None: 1}, {}, "layer None"),
        ({float("nan"): 1}, {}, "layer nan"),
        ({1.5: 1}, {}, "layer 1.5"),
        ({1: 1, 7: "3"}, {}, "layer 7 .*'3': give a finite number"),
        ({1: 1, 7: None}, {}, "layer 7 .*None"),
        ({1: 1, 7: [3]}, {}, "layer 7"),
        ({1: 1, 7: np.float64("nan")}, {}, "layer 7 .*nan"),
        ({1: 1, 7: -math.inf}, {}, "layer 7 .*-inf"),
        (dict.fromkeys(range(513), 3), {}, "513 candidate layers: give 512 or fewer"),
        ({1: 1}, {"noise": 0.0}, "noise"),
        ({1: 1}, {"components": 0}, "components"),
        ({1: 1}, {"restarts": -1}, "restarts"),
        ({1: 1}, {"baseline": float("nan")}, "baseline"),
    ],
)
def test_bad_input(table, options, match):
    with pytest.raises(BadInputError, match=match):
        fit_mixture(table, **options)


@pytest.mark.parametrize("entry", ["x", "3", None, float("nan"), float("inf"), [1, 2]])
def test_the_front_door_names_layer_and_value(entry):
    for value in ({1: 2, 7: entry}, pd.Series({1: 2, 7: entry}, dtype=object)):
        with pytest.raises(BadInputError, match=r"layer 7 .* has the value") as caught:
            resa_lens.fit_mixture(value)
        assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(BadInputError, match="twice"):
        resa_lens.fit_mixture(pd.Series([1, 2], index=[3, 3]))


def test_numbers_of_other_libraries_are_numbers():
    plain = dict.fromkeys(range(1, 9), 3) | {4: 9}
    same = fit_mixture(plain, draws=20)
    for kind in (np.int64, np.float32, np.uint8, torch.tensor, Fraction):
        assert fit_mixture({k: kind(v) for k, v in plain.items()}, draws=20) == same
    assert fit_mixture({np.int32(k): v for k, v in plain.items()}, draws=20) == same
    assert resa_lens.fit_mixture(pd.Series(plain), draws=20).fit == same


def test_many_layers_take_seconds():
    rates = np.exp(-0.5 * ((np.arange(200) % 70 - 35) / 5) ** 2)
    counts = np.random.default_rng(0).multinomial(1000, rates / rates.sum())
    start = time.process_time()
    fit = fit_mixture(dict(enumerate(counts.tolist())))
    assert time.process_time() - start < 10
    assert (fit.verdict, fit.k) == ("supported", 3)
    assert [c.mean for c in fit.components] == pytest.approx([35, 105, 175], abs=2)


def test_two_gaussians_reach_their_maximum_from_every_seed():
    # Draw 4 stopped 1.1 nats short for two seeds of four, of 12 draws and more one in six.
    x = LAYERS.astype(float)
    grid = fits.ComponentGrid.over(x, fits.MIN_SD, 0.25, 12)
    pairs = np.array([(a, b) for a in x[::2] for b in x[::2] if a <= b])
    for draw in (2, 4, 6):
        counts = np.random.default_rng(draw).multinomial(150, planted()).astype(float)
        fitted = [list(fits.robust_mixtures(counts, x, 2, seed))[-1].level for seed in range(3)]
        assert np.ptp(fitted) * 150 < 0.01
        rows = np.tile(counts, (len(pairs), 1))
        for sds in ((1, 1), (1, 6), (6, 1), (6, 6)):
            start = grid.nearest(pairs, np.tile(np.array(sds, float), (len(pairs), 1)))
            levels = fits.grid_mixture(rows, grid, start, np.full(start.shape, 0.5))[2]
            assert levels.max() < min(fitted) + 1e-6


def test_same_seed_same_fit(counts):
    assert fit_mixture(counts, seed=4, draws=100) == fit_mixture(counts, seed=4, draws=100)


# The table reader --------------------------------------------------------------------------------


def test_read_table_is_zero_based(counts, tmp_path):
    assert list(counts) == list(range(1, 27))
    assert (counts[1], counts[18], sum(counts.values())) == (1, 5, 53)
    path = tmp_path / "zero.csv"
    path.write_text("layer,features\n0,3\n1,4\n")
    assert read_table(path, "features") == {0: 3.0, 1: 4.0}


@pytest.mark.parametrize(
    ("text", "column", "match"),
    [
        ("layer,a\n1,2\n", "b", 'no column "b": it has layer, a'),
        ("depth,a\n1,2\n", "a", 'no column "layer"'),
        ("layer,a\n", "a", "no rows"),
        ("", "a", "is empty: give a CSV"),
        ("layer,a\n1,x\n", "a", '"x" is no finite number'),
        ("layer,a\n1,\n", "a", "no finite number"),
        ("layer,a\n1\n", "a", "no finite number"),
        ("layer,a\n1,nan\n", "a", "no finite number"),
        ("layer,a\n1,2\n1,3\n", "a", "twice"),
        ("layer_1_indexed,a\n0,3\n", "a", "no layer number"),
        ("layer,a\n1.5,3\n", "a", "no layer number"),
    ],
)
def test_read_table_bad_input(tmp_path, text, column, match):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(BadInputError, match=match) as caught:
        read_table(path, column)
    assert len(str(caught.value).splitlines()) <= 3


def test_read_table_missing_or_binary(tmp_path):
    with pytest.raises(BadInputError, match="nowhere"):
        read_table(tmp_path / "nowhere.csv", "a")
    path = tmp_path / "binary.csv"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(BadInputError, match=r"binary\.csv"):
        read_table(path, "a")


@pytest.mark.parametrize("recipe", ["paper", "robust"])
@pytest.mark.parametrize("table", [dict.fromkeys(range(8), 1e308), {1: 2, 2: 3, 10_000_000: 1}])
def test_mistyped_figures_are_refused(table, recipe):
    with pytest.raises(BadInputError, match="give"):
        fit_mixture(table, recipe=recipe)
