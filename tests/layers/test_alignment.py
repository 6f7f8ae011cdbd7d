from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture
from typer.testing import CliRunner

from resa_lens import stats
from resa_lens.cli import app
from resa_lens.layers import fits, read_replicates
from resa_lens.layers.alignment import align
from resa_lens.layers.mixture import fit_mixture, read_table
from resa_lens.layers.nulls import alignment_null

TABLE = Path(__file__).parents[2] / "data" / "paper" / "table6_hookpoints.csv"
X = np.arange(1.0, 27.0)


@pytest.fixture(scope="module")
def papers():
    counts, scores = read_table(TABLE, "feature_count"), read_table(TABLE, "average")
    return (
        fit_mixture(counts, recipe="paper", draws=20),
        fit_mixture(scores, recipe="paper", baseline=41.18, draws=20),
    )


def lumps(seed, means=(5.0, 14.0, 23.0), n=300):
    share = fits.layer_masses(np.array(means), np.full(len(means), 1.5), X).mean(axis=0)
    counts = np.random.default_rng(seed).multinomial(n, share)
    return fit_mixture(dict(zip(range(1, 27), counts.tolist(), strict=True)), draws=20)


def test_the_papers_alignment_is_no_closer_than_chance(papers):
    found = align(*papers)
    assert round(found.value, 3) == 0.732
    assert found.p == pytest.approx(0.07, abs=0.01)  # 10,000 shuffles: standard error 0.0026
    assert (found.draws, found.components, found.n) == (10_000, (3, 3), 26)
    assert round(found.spearman, 3) == -0.225
    assert found.spearman_p == pytest.approx(0.27, abs=0.02)
    assert "no closer than chance" in found.reason
    json.dumps(found.to_dict(), allow_nan=False)


def test_spearman_of_the_mean_of_four(papers):
    table = read_replicates(TABLE.with_name("tables36_61_layer_checkpoints.csv"), "average")
    means = {layer: float(np.mean(values)) for layer, values in table.items()}
    found = align(papers[0], fit_mixture(means, draws=20))
    assert round(found.spearman, 2) == 0.12
    assert found.spearman_p == pytest.approx(0.57, abs=0.02)


@pytest.mark.recorded
def test_the_null_of_the_papers_recipe_is_the_librarys(papers):
    counts = np.array(papers[0].values)
    target = np.sort([part.mean for part in papers[1].components])
    shuffled = stats.permutation_draws(counts, 1500, 11)
    hits = 0
    for table in shuffled:
        data = np.repeat(X, table.astype(int))[:, None]
        means = np.asarray(GaussianMixture(3, random_state=0).fit(data).means_, dtype=float)
        hits += np.abs(np.sort(means.ravel()) - target).max() <= 0.7324
    low, high = stats.clopper_pearson(hits, 1500, 0.99)
    p = align(*papers).p
    assert p is not None
    assert low < p < high


def test_planted_components_align_and_others_do_not():
    a, b = lumps(0), lumps(1)
    assert (a.k, b.k) == (3, 3)
    found = align(a, b, draws=999)
    assert found.value < 0.6
    assert found.p <= 0.01
    assert found.spearman_p <= 0.01
    assert "closer than chance" in found.reason
    far = align(a, lumps(2, (2.0, 9.5, 18.5)), draws=999)
    assert far.value > 3
    assert far.p > 0.1


@pytest.mark.parametrize("recipe", ["paper", "robust"])
def test_p_is_uniform_for_shuffled_profiles(recipe):
    # The observed profile is itself a shuffle, fitted as the null fits.
    counts = np.array(list(read_table(TABLE, "feature_count").values()))
    p_values = []
    for seed, table in enumerate(stats.permutation_draws(counts, 60, 4)):
        fitted = (
            fits.plain_mixture(table[None], X, 3, library_seed=0)
            if recipe == "paper"
            else fits.grid_refit(table[None], X, 3)
        )
        null = alignment_null(
            fitted[0][0], [5.0, 14.0, 23.0], table, X.astype(int).tolist(),
            draws=99, seed=seed, recipe=recipe,
        )  # fmt: skip
        p_values.append(null.p)
    assert 0.38 < np.mean(p_values) < 0.62
    assert np.mean(np.array(p_values) <= 0.1) <= 0.22  # 3 standard errors above 0.1


def test_fits_that_cannot_be_paired_say_why(papers):
    flat = fit_mixture(dict.fromkeys(range(1, 27), 3), draws=20)
    two = fit_mixture({**dict.fromkeys(range(1, 27), 0), 5: 30, 6: 30, 20: 40}, draws=20)
    for a, b, why in (
        (flat, flat, "neither fit has a component"),
        (flat, papers[0], "the first fit has no component"),
        (papers[0], flat, "the second fit has no component"),
        (papers[0], two, "3 and 2 components cannot be paired"),
    ):
        found = align(a, b, draws=50)
        assert (found.value, found.p, found.draws) == (None, None, 0)
        assert why in found.reason
    short = fit_mixture({1: 2, 2: 4}, draws=20)
    assert align(short, flat).spearman is None
    assert align(short, flat).n == 2


def test_fit_mixture_against_a_column():
    options = ["--column", "feature_count", "--recipe", "paper", "--draws", "50"]
    beside = ["--against", "average", "--against-baseline", "41.18"]
    done = CliRunner().invoke(app, ["fit-mixture", str(TABLE), *options, *beside, "--json"])
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["against"]["column"] == "average"
    assert round(made["against"]["value"], 3) == 0.732
    assert made["against"]["p"] == pytest.approx(0.07, abs=0.01)
    assert len(made["objections"]) == 5
    shown = CliRunner().invoke(
        app, ["fit-mixture", str(TABLE), *options, *beside, "--restarts", "5"]
    )
    assert "What speaks against this recipe:" in shown.stdout
    assert "best of 5 seeds" in shown.stdout
    assert "feature_count against average: The sorted means differ by at most 0.732" in shown.stdout
    bad = CliRunner().invoke(app, ["fit-mixture", str(TABLE), *options, *beside[2:]])
    assert bad.exit_code == 2
    assert "--against:" in bad.stderr
