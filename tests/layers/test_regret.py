from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as distributions
from typer.testing import CliRunner

from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.layers import read_replicates, read_table
from resa_lens.layers.regret import regret, regrets
from resa_lens.layers.selectors import regrets_of_selectors

TABLE = Path(__file__).parents[2] / "data" / "paper" / "table6_hookpoints.csv"
CHECKPOINTS = TABLE.with_name("tables36_61_layer_checkpoints.csv")
TRUTH = {layer: 50.0 - 2.0 * abs(layer - 6) for layer in range(1, 13)}


# One choice --------------------------------------------------------------------------------------


def test_regret_of_the_papers_table():
    result = regret(read_table(TABLE, "average"), 12)
    assert (result.best, result.chosen, result.ci) == (17, 12, None)
    assert result.regret == pytest.approx(49.42 - 47.28)


def test_regret_of_a_planted_table():
    rng = np.random.default_rng(0)
    table = {layer: (value + 0.5 * rng.normal(size=8)).tolist() for layer, value in TRUTH.items()}
    result = regret(table, 9)
    assert result.best == 6
    assert result.ci is not None
    assert result.ci[0] < 6.0 < result.ci[1]
    assert result.ci[1] - result.ci[0] < 2.5
    best = regret(table, 6)
    assert best.regret == 0.0
    assert best.ci == (0.0, 0.0)


@pytest.mark.parametrize("truth", [dict.fromkeys(range(1, 13), 50.0), TRUTH])
@pytest.mark.parametrize("replicates", [1, 3])
def test_interval_holds_the_true_regret(truth, replicates):
    # Also where all layers are equal, so that the best of 12 is best by luck alone.
    rng = np.random.default_rng(1)
    layers, trials = sorted(truth), 300
    means = np.array([truth[layer] for layer in layers])
    drawn = means[:, None] + 2.0 * rng.normal(size=(trials, 12, replicates))
    held = clear = 0
    for trial, scores in enumerate(drawn):
        chosen = layers[trial % 12]
        known = dict.fromkeys(layers, 2.0) if replicates == 1 else None
        table = dict(zip(layers, scores.tolist(), strict=True))
        result = regret(table, chosen, se=known, draws=600, seed=trial)
        assert result.ci is not None
        true = max(truth.values()) - truth[chosen]
        held += result.ci[0] <= true <= result.ci[1]
        clear += result.ci[0] > 0
    assert held >= distributions.binom.ppf(0.001, trials, 0.95)
    if truth is TRUTH:
        assert clear > trials / 6  # it is not so wide that it says nothing
    else:
        assert clear <= distributions.binom.ppf(0.999, trials, 0.05)


def test_regret_bad_input():
    with pytest.raises(BadInputError, match="layer 7"):
        regret({1: 2.0}, 7)
    with pytest.raises(BadInputError, match="standard error"):
        regret({1: 2.0, 2: 3.0}, 1, se={1: 0.1})
    with pytest.raises(BadInputError, match="standard error is 0"):
        regret({1: 2.0, 2: 3.0}, 1, se={1: 0.0, 2: 0.0})
    with pytest.raises(BadInputError, match="finite"):
        regret({1: 2.0, 2: float("nan")}, 1)
    with pytest.raises(BadInputError, match="empty"):
        regret({}, 1)
    with pytest.raises(BadInputError, match="no selector"):
        regrets({}, {1: 2.0})


# All selectors -----------------------------------------------------------------------------------


def test_planted_effects_give_the_known_answer():
    # Counts lump at 9, the loss is best kept at 3, the effect is largest at 6, the best layer.
    counts = {layer: int(60 * np.exp(-((layer - 9) ** 2) / 3)) for layer in TRUTH}
    quality = {layer: 0.01 * abs(layer - 3) for layer in TRUTH}
    causal = {layer: (0.5 * np.exp(-abs(layer - 6)), 0.02) for layer in TRUTH}
    made, answers = regrets_of_selectors(
        TRUTH, n_layers=14, counts=counts, quality=quality, causal=causal,
        chosen={"worst": 12}, se=dict.fromkeys(TRUTH, 1e-3), draws=99,
    )  # fmt: skip
    rows = {row.selector: row for row in made.selectors}
    assert {name: row.layer for name, row in rows.items()} == {
        "mixture": 9, "most-features": 9, "middle": 6, "quality": 3, "causal": 6, "blend": 6,
        "worst": 12,
    }  # fmt: skip
    assert answers["mixture"].verdict == "supported"
    expected = {"mixture": 6, "middle": 0, "quality": 6, "causal": 0, "worst": 12}
    assert {name: rows[name].regret for name in expected} == pytest.approx(expected)
    for row in made.selectors:
        assert row.ci is not None
        assert row.ci == pytest.approx((row.regret, row.regret), abs=0.02)
    random = 50.0 - np.mean(list(TRUTH.values()))
    assert made.random == pytest.approx(random)
    assert made.random_ci == pytest.approx((random, random), abs=0.02)
    assert all(row.gain == pytest.approx(random - row.regret) for row in made.selectors)
    assert rows["causal"].as_good == pytest.approx(1 / 12)  # the share a random choice would match
    assert rows["quality"].as_good == pytest.approx(7 / 12)
    assert rows["worst"].as_good == 1.0


def test_gain_over_a_random_layer_holds_in_its_share_of_draws():
    rng = np.random.default_rng(2)
    drawn = np.array(list(TRUTH.values()))[:, None] + rng.normal(size=(400, 12, 2))
    true = TRUTH[4] - np.mean(list(TRUTH.values()))
    chance = 50.0 - np.mean(list(TRUTH.values()))
    held = held_chance = 0
    for scores in drawn:
        made = regrets({"four": 4}, dict(zip(TRUTH, scores.tolist(), strict=True)), draws=300)
        gain, random = made.selectors[0].gain_ci, made.random_ci
        assert gain is not None
        assert random is not None
        held += gain[0] <= true <= gain[1]
        held_chance += random[0] <= chance <= random[1]
    assert distributions.binom.ppf(0.001, 400, 0.95) <= held
    assert held <= distributions.binom.ppf(0.9995, 400, 0.95)
    assert held_chance >= distributions.binom.ppf(0.001, 400, 0.95)


def test_the_papers_sweep():
    replicates = read_replicates(CHECKPOINTS, "average")
    made, answers = regrets_of_selectors(
        replicates, n_layers=28, counts=read_table(TABLE, "feature_count"), draws=99,
        chosen={"paper": 14},
    )  # fmt: skip
    rows = {row.selector: row for row in made.selectors}
    assert set(rows) == {"mixture", "most-features", "middle", "blend", "paper"}
    assert (rows["mixture"].layer, rows["most-features"].layer, rows["middle"].layer) == (
        12, 18, 12,
    )  # fmt: skip
    # The spec: sd between the checkpoints of a layer 1.54, 26 x 3 degrees of freedom.
    assert round(made.noise, 2) == 1.54
    assert (made.freedom, made.layers, made.best) == (78, 26, 17)
    for row in made.selectors:
        assert row.ci is not None
        assert row.gain_ci is not None
        assert row.ci[0] == 0.0  # no choice is shown to cost anything
        assert row.gain_ci[0] < 0 < row.gain_ci[1]  # and none to beat a random layer
    assert "no more clustered than chance" in answers["mixture"].reason


def test_without_counts_the_middle_alone():
    made, _ = regrets_of_selectors({layer: float(layer) for layer in (20, 21, 22)}, n_layers=28)
    assert [(row.selector, row.layer) for row in made.selectors] == [("middle", 20)]


def test_chosen_layer_without_score_is_named():
    with pytest.raises(BadInputError, match="layer 9"):
        regrets({"most-features": 9}, {1: 2.0, 2: 3.0})


# The command -------------------------------------------------------------------------------------


def invoke(*args, code=0):
    done = CliRunner().invoke(app, ["regret", *map(str, args)])
    assert done.exit_code == code, done.stderr or done.exception
    return done


def test_command_on_the_papers_tables():
    args = [TABLE, "--column", "average", "--counts-column", "feature_count", "--draws", "99"]
    made = json.loads(
        invoke(*args, "--checkpoints", CHECKPOINTS, "--layer", "15th", "--json").stdout
    )
    assert [row["selector"] for row in made["selectors"]] == [
        "mixture", "most-features", "middle", "blend", "layer 15th",
    ]  # fmt: skip
    assert made["selectors"][-1]["layer"] == 14
    assert made["random"] == pytest.approx(1.504, abs=0.001)
    shown = invoke(*args).stdout
    assert "no interval" in shown
    assert "(random)" in shown
    assert "sd 2.40, as given" in invoke(*args, "--noise", "2.4").stdout


def test_command_with_effects(tmp_path):
    path = tmp_path / "sweep.csv"
    rows = [f"{x},{40 + x},{3 if x == 2 else 0.1},{1},{0.2 * x}" for x in range(1, 9)]
    path.write_text("layer,score,effect,se,loss\n" + "\n".join(rows) + "\n")
    columns = ["--quality-column", "loss", "--effect-column", "effect", "--effect-se-column", "se"]
    made = json.loads(invoke(path, "--column", "score", *columns, "--json").stdout)
    picked = {row["selector"]: row["layer"] for row in made["selectors"]}
    assert picked == {"middle": 4, "quality": 1, "causal": 2, "blend": 2}
    invoke(path, "--column", "score", *columns[4:], code=2)
    invoke(path, "--column", "score", "--noise", "1", "--checkpoints", path, code=2)
    invoke(path, "--column", "nothing", code=2)
