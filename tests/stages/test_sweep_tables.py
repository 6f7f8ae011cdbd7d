"""What a sweep says of planted answers: the right thing, whichever way it went."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.sweep import SWEEP, SweepTables
from resa_lens.artifacts.manifest import Manifest
from resa_lens.errors import BadInputError
from resa_lens.evals.compare import RunScores, run_scores
from resa_lens.evals.run import EvalResult
from resa_lens.figures.scores import sweep_figure
from resa_lens.stages.sweep_page import findings, layer_cells, write_sweep_page
from resa_lens.stages.sweep_tables import JobScores, analyse, write_tables

N, LAYERS, SEEDS = 400, (1, 2, 3, 4, 5, 6), (0, 1, 2)


def result(correct: np.ndarray) -> EvalResult:
    samples = [
        {
            "id": f"q{i}",
            "sample": 0,
            "question": f"question {i}",
            "gold": "1",
            "answer": "1",
            "correct": bool(value),
            "family": None,
            "level": None,
        }
        for i, value in enumerate(correct)
    ]
    share = float(np.mean(correct))
    return EvalResult(share, len(correct), (share - 0.05, share + 0.05), {}, {}, samples, 1.0, 1)


def scores(name: str, correct: np.ndarray) -> RunScores:
    return run_scores(name, result(correct).samples)


def planted(gain: dict[int, float], seed: int = 0, control_gain: float = 0.0):
    """Base answers at 60 %, runs that flip 5 % of them, balanced; a gained layer flips more up."""
    rng = np.random.default_rng(seed)
    base = rng.random(N) < 0.6

    def run(extra: float) -> np.ndarray:
        # As many lost as gained on average: the null is none.
        flipped = base ^ (rng.random(N) < np.where(base, 0.04, 0.06))
        return flipped | (rng.random(N) < extra)

    runs, jobs = {}, []
    for s in SEEDS:
        for layer in LAYERS:
            name = f"L{layer:02d}-s{s}"
            runs[name] = scores(name, run(gain.get(layer, 0.0)))
            jobs.append(JobScores(name, layer, s, None, "a", "e"))
        for name, layer, control in ((f"L03-noise-s{s}", 3, "noise"), (f"cot-s{s}", None, "cot")):
            runs[name] = scores(name, run(control_gain))
            jobs.append(JobScores(name, layer, s, control, "a", "e"))
    return result(base), runs, jobs


def only(sweep: SweepTables, word: str) -> str:
    (line,) = [line for line in findings(sweep) if word in line]
    return line


def made(gain: dict[int, float], counts: dict[int, float] | None = None, **options) -> SweepTables:
    base, runs, jobs = planted(gain, **options)
    counts = counts or {layer: float(layer % 3) for layer in LAYERS}
    return analyse(
        base=base, runs=runs, jobs=jobs, failed={}, n_layers=8,
        counts={"all": dict.fromkeys(LAYERS, 0.0), "either": counts}, rule="either",
        quality={layer: 0.1 * layer for layer in LAYERS}, causal=None,
        fvu=dict.fromkeys(LAYERS, 0.1), seed=0,
    )  # fmt: skip


def test_a_planted_layer_is_found_and_the_others_are_not():
    sweep = made({4: 0.3})
    changed = [row["layer"] for row in sweep.layers if row["adjusted_p"] < 0.05]
    assert changed == [4]
    row = next(row for row in sweep.layers if row["layer"] == 4)
    # 30 % of the questions that are not right anyway.
    assert row["ci"][0] < 0.3 * 0.4 < row["ci"][1]
    wide, narrow = row["simultaneous_ci"], row["ci"]
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert sweep.effect is not None
    assert sweep.effect["anova"]["p_value"] < 1e-3
    said = findings(sweep)
    assert "4 (+" in said[0]
    assert "differ from the base model after correction" in said[0]
    chosen = {row["selector"]: row for row in sweep.regrets["selectors"]}
    assert sweep.regrets["best"] == 4
    assert chosen["quality"]["layer"] == 1
    assert chosen["quality"]["regret"] > 5


def test_what_a_sweep_measured_of_gradients_and_changes_is_judged():
    base, runs, jobs = planted({4: 0.3})
    sweep = analyse(
        base=base, runs=runs, jobs=jobs, failed={}, n_layers=8,
        counts={"either": dict.fromkeys(LAYERS, 1.0)}, rule="either",
        quality=dict.fromkeys(LAYERS, 0.1), causal=None,
        gradient={layer: (1.0 + (layer == 4), 0.1) for layer in LAYERS},
        change={layer: (1.0 + (layer == 2), 0.1) for layer in LAYERS},
        fvu=dict.fromkeys(LAYERS, 0.1), seed=0,
    )  # fmt: skip
    chosen = {row["selector"]: row for row in sweep.regrets["selectors"]}
    assert (chosen["gradient-probe"]["layer"], chosen["gradient-probe"]["regret"]) == (4, 0.0)
    assert chosen["activation-change"]["layer"] == 2
    assert chosen["activation-change"]["regret"] > 5


def test_nothing_planted_nothing_found():
    wrong = 0
    for seed in range(6):
        sweep = made({}, seed=seed)
        wrong += any(row["adjusted_p"] < 0.05 for row in sweep.layers)
    # At 5 % each, two or more have a chance of 3 %.
    assert wrong <= 1
    assert "No layer differs" in findings(made({}))[0]


def test_counts_that_predict_are_seen_and_constant_ones_said_to_be_so():
    gain = {layer: 0.1 * i for i, layer in enumerate(LAYERS)}
    sweep = made(gain, counts={layer: 10.0 * i for i, layer in enumerate(LAYERS)})
    assert sweep.correlations["either"]["rho"] > 0.9
    said = " ".join(findings(sweep))
    assert "Counts of rule all: the same at every layer" in said


def test_controls_stand_beside_base_and_sae():
    sweep = made({3: 0.3}, control_gain=0.0)
    rows = {row["control"]: row for row in sweep.controls}
    assert rows["cot"]["layer"] is None
    assert rows["cot"]["sae_minus_control"] is None
    beside = rows["noise"]["sae_minus_control"]
    assert beside["ci"][0] < 0.12 < beside["ci"][1]
    assert beside["p_value"] < 0.01
    assert all(row["adjusted_p"] >= row["p_value"] for row in sweep.controls)
    gained = made({}, control_gain=0.3)
    assert all(row["adjusted_p"] < 0.05 for row in gained.controls)
    assert beside["adjusted_p"] >= beside["p_value"]
    assert only(sweep, "Controls that differ").endswith("correction for 2: none.")
    assert "for 1: noise at layer 3 (+" in only(sweep, "SAE minus a control")
    assert "noise at layer 3 (+" in only(gained, "Controls that differ")
    assert "cot (+" in only(gained, "Controls that differ")


def test_with_one_seed_the_layer_effect_is_said_to_be_untested():
    base, runs, jobs = planted({4: 0.3})
    kept = [job for job in jobs if job.seed == 0]
    sweep = analyse(
        base=base, runs={job.name: runs[job.name] for job in kept}, jobs=kept, failed={},
        n_layers=8, counts={"all": {layer: float(layer) for layer in LAYERS}}, rule="all",
        quality=dict.fromkeys(LAYERS, 0.1), causal=None, fvu={}, seed=0,
    )  # fmt: skip
    assert "not tested, there is one seed" in only(sweep, "Layers against seeds")
    assert [row["layer"] for row in sweep.layers if row["adjusted_p"] < 0.05] == [4]


def test_a_layer_that_misses_a_seed_is_left_out():
    base, runs, jobs = planted({})
    kept = [job for job in jobs if job.name != "L02-s1"]
    runs.pop("L02-s1")
    options = {
        "base": base, "runs": runs, "n_layers": 8, "rule": "either", "causal": None, "seed": 0,
        "counts": {"either": dict.fromkeys(LAYERS, 1.0)}, "failed": {"L02-s1": "diverged"},
        "quality": dict.fromkeys(LAYERS, 0.0), "fvu": {},
    }  # fmt: skip
    sweep = analyse(jobs=kept, **options)
    assert [row["layer"] for row in sweep.layers] == [1, 3, 4, 5, 6]
    assert any("L02-s1" in line for line in findings(sweep))
    with pytest.raises(BadInputError, match="no layer of the sweep has all its seeds"):
        analyse(jobs=[JobScores("L02-s0", 2, 0, None, "a", "e"), jobs[-1]], **options)


def test_runs_that_change_no_answer_have_intervals_all_the_same():
    base, runs, jobs = planted({})
    alike = {name: run_scores(name, base.samples) for name in runs}
    sweep = analyse(
        base=base, runs=alike, jobs=jobs, failed={}, n_layers=8,
        counts={"all": dict.fromkeys(LAYERS, 0.0)}, rule="all",
        quality=dict.fromkeys(LAYERS, 0.0), causal=None, fvu={}, seed=0,
    )  # fmt: skip
    for row in sweep.layers:
        assert row["difference"] == 0
        assert row["p_value"] == 1
        assert row["ci"][0] < 0 < row["ci"][1]
    said = " ".join(findings(sweep))
    assert "F is not defined" in said
    assert sweep.power["layer_spread"] is None
    assert "nan" not in said.lower()


def test_tables_and_page_hold_what_was_computed(tmp_path):
    base, runs, _ = planted({4: 0.3})
    sweep = made({4: 0.3})
    write_tables(sweep, base, runs, tmp_path)
    artifact = Artifact(tmp_path, "sweep", Manifest(kind="sweep", config={}))
    stored = artifact.read(SWEEP, SweepTables)
    assert json.dumps(stored.to_dict()) == json.dumps(sweep.to_dict())
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert len(rows) == len(sweep.jobs)
    assert {r["layer"] for r in rows if r["control"] == "cot"} == {""}
    answers = pq.read_table(tmp_path / "answers.parquet")
    mean = np.mean(answers["L04-s0"].to_numpy())
    assert mean == pytest.approx(runs["L04-s0"].means.mean())
    assert np.mean(answers["base"].to_numpy()) == pytest.approx(base.accuracy)
    write_sweep_page(sweep, tmp_path / "sweep.html", "a <b> title", "lead")
    page = (tmp_path / "sweep.html").read_text()
    assert "a &lt;b&gt; title" in page
    assert "Controls" in page
    header, cells = layer_cells(sweep)
    assert all(len(row) == len(header) for row in cells)


def test_a_control_that_collapses_does_not_hide_the_layers():
    sweep = made({4: 0.3})
    plain = sweep_figure(sweep.layers, sweep.jobs, sweep.controls, sweep.base)
    assert not plain.layout.annotations
    rows = [dict(row) for row in sweep.controls]
    for row in rows:
        if row["control"] == "cot":
            row |= {"difference": -0.5, "ci": [-0.55, -0.45]}
    figure = sweep_figure(sweep.layers, sweep.jobs, rows, sweep.base)
    low, high = figure.layout.yaxis.range
    base = 100 * sweep.base["accuracy"]
    for row in (*sweep.layers, *(r for r in rows if r["layer"] is not None)):
        ends = row["simultaneous_ci" if "simultaneous_ci" in row else "ci"]
        assert low < base + 100 * ends[0] < base + 100 * ends[1] < high
    assert base - 50 < low
    (said,) = [a.text for a in figure.layout.annotations]
    assert said.startswith("cot<br>")
    assert f"{base - 50:.1f} %" in said
