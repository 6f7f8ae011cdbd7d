"""The page of layers: its logic through AppTest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from app_driver import HOSTILE, charts, edit, manifest_of, marked_up, state, texts

from resa_lens import plots
from resa_lens.app import data, places
from resa_lens.layers import FLAT, SUPPORTED
from resa_lens.layers.selectors import recommend


@pytest.fixture
def open_app(open_page):
    return lambda workspace: open_page(workspace, "layers")


# Logic ---------------------------------------------------------------------------------------


def test_shows_the_demo_and_never_writes(demo, open_app):
    before = state(demo.workspace)
    app = open_app(demo.workspace)
    shown = texts(app)
    made = demo.result["recommendation"]
    assert f"workspace: {demo.workspace}" in shown
    assert f"Verdict: {made['verdict']}" in shown
    assert made["reason"] in shown
    assert made["next_step"] in shown
    paired = demo.result["tune"]["paired"]
    assert f"Tuned minus base: {100 * paired['difference']:+.1f} points" in shown
    assert f"n = {paired['n']}" in shown
    assert charts(app) == 7
    assert app.selectbox(key="model").value.startswith("tiny-reasoner-")
    tables = {tuple(frame.value.columns): frame.value for frame in app.dataframe}
    paper = next(v for k, v in tables.items() if "paper: features" in k)
    assert paper.iloc[0]["layer"] == 1
    assert paper.iloc[0]["layer_1_indexed"] == 2
    assert paper.iloc[0]["paper: score, %"] == 47.84
    counted = next(v for k, v in tables.items() if {"all", "any", "either"} <= set(k))
    held = {row["layer"]: row["features"] for row in made["layers"]}
    assert dict(zip(counted["layer"], counted["all"], strict=True)) == held
    assert state(demo.workspace) == before


def test_other_rule_and_numbering(demo, open_app):
    app = open_app(demo.workspace)
    app.toggle(key="one_based").set_value(True)
    app.button_group(key="rule-all").set_value("either").run()
    assert f"Verdict: {demo.result['verdicts']['either']}\nWhy:" in texts(app)
    specs = [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]
    first = specs[0]["layout"]["xaxis"]["title"]["text"]
    assert first == "layer (1-based)"


def test_supported_looks_different_from_flat(copied, open_app):
    lumps = {1: 2, 2: 12, 3: 30, 4: 14, 5: 2, 6: 1, 7: 0, 8: 1, 9: 0, 10: 1}
    made = recommend(lumps, n_layers=12, draws=100)
    assert made.verdict == SUPPORTED
    flat = texts(open_app(copied))

    def raise_counts(manifest):
        for row in manifest["results"]["layers"]:
            row["all"] = lumps[row["layer"]]

    edit(manifest_of(copied, "counts"), raise_counts)
    file = manifest_of(copied, "recommendations").with_name("recommendation.json")
    file.write_text(json.dumps(made.to_dict()))
    app = open_app(copied)
    assert f"Verdict: {SUPPORTED}" in texts(app)
    assert f"Verdict: {SUPPORTED}" not in flat
    headings = {element.value for element in app.subheader}
    assert "Recommended" in headings
    assert "Not a finding, only a place to try" not in headings

    def first_line(verdict):
        figure = plots.counts_figure({"all": lumps}, recommended=[3], verdict=verdict)
        return figure.layout.shapes[0].line.dash, figure.layout.annotations[0].text

    assert first_line(SUPPORTED) == ("solid", "recommended")
    assert first_line(FLAT) == ("dot", "fallback")


def test_text_from_files_is_shown_as_text(copied, open_app):
    file = manifest_of(copied, "recommendations").with_name("recommendation.json")
    edit(file, lambda value: value.update(reason=HOSTILE, verdict=HOSTILE))
    app = open_app(copied)
    assert f"Why: {HOSTILE}" in texts(app)
    assert "onerror" not in marked_up(app)
    figure = plots.counts_figure({HOSTILE: {1: 1}})
    assert "<" not in figure.data[0].name
    scores = plots.scores_figure({HOSTILE: {HOSTILE: (0.5, (0.4, 0.6), 9)}}).data[0]
    assert "<img" not in f"{scores.name} {scores.x[0]} {scores.hovertemplate}"


def test_missing_and_empty(tmp_path, open_app):
    missing = tmp_path / "nowhere"
    app = open_app(missing)
    assert f"There is no workspace at {missing}" in texts(app)
    assert any("resa-lens demo" in code.value for code in app.code)
    assert not missing.exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    app = open_app(empty)
    assert f"{empty} holds no finished run" in texts(app)
    assert any("resa-lens demo" in code.value for code in app.code)
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file; pass a folder" in texts(open_app(file))


def test_broken_newer_and_foreign_manifests(copied, open_app):
    counts = manifest_of(copied, "counts")
    text = counts.read_text()
    counts.write_text(text[: len(text) // 2])
    app = open_app(copied)
    assert f"{counts} is not a manifest of resa-lens" in texts(app)
    assert "No feature counts" in texts(app)
    edit_text = json.loads(text)
    counts.write_text(json.dumps({**edit_text, "schema_version": 99}))
    assert "has schema 99" in texts(open_app(copied))
    assert "update resa-lens" in texts(open_app(copied))
    counts.write_text('{"name": "somebody else\'s", "version": 3}')
    assert "is not a manifest of resa-lens" in texts(open_app(copied))
    counts.write_text("[1, 2]")
    assert "is not a manifest of resa-lens" in texts(open_app(copied))
    counts.write_text(json.dumps({**edit_text, "results": {"layers": []}}))
    app = open_app(copied)
    assert "is damaged or of another version" in texts(app)
    assert any("resa-lens demo" in code.value for code in app.code)


def test_one_damaged_artifact_leaves_the_others(copied, open_app):
    manifest_of(copied, "adapters").write_text("{")
    app = open_app(copied)
    assert "is not a manifest of resa-lens" in texts(app)
    assert "No adapter of this model was scored" in texts(app)
    assert charts(app) == 6


def test_adapters_made_without_an_sae_are_shown_as_what_they_are(copied, open_app):
    file = manifest_of(copied, "adapters")
    made = json.loads(file.read_text())
    assert "Tuned through the SAE of layer" in texts(open_app(copied))
    made["config"]["control"] = "noise"
    file.write_text(json.dumps(made))
    assert "Tuned with the control noise in the SAE's place: layer" in texts(open_app(copied))
    made["config"]["control"] = "cot"
    made["results"] |= {"layer": None, "site": None}
    file.write_text(json.dumps(made))
    assert "Fine-tuned in place of SAE-Tuning: cot" in texts(open_app(copied))


@pytest.mark.parametrize("name", ["recommendation.json", "results.json", "samples.parquet"])
def test_half_written_files(copied, open_app, name):
    for file in copied.rglob(name):
        file.write_bytes(file.read_bytes()[:40])
    app = open_app(copied)
    assert "damaged" in texts(app)
    for file in copied.rglob(name):
        file.unlink()
    assert "missing" in texts(open_app(copied))


def test_stages_that_are_missing_name_their_command(copied, open_app):
    for folder in ("recommendations", "saes", "evals"):
        shutil.rmtree(copied / folder)
    app = open_app(copied)
    commands = " ".join(code.value for code in app.code)
    texts(app)
    for command in ("recommend-layers", "train-saes", "tune --layer auto"):
        assert f"resa-lens {command}" in commands
    shutil.rmtree(copied / "counts")
    (copied / "counts" / ".tmp-1-run").mkdir(parents=True)
    assert "1 unfinished folder(s)" in texts(open_app(copied))


def test_reading_puts_nothing_back(copied, open_app):
    run = manifest_of(copied, "counts").parent
    aside = run.with_name(f".tmp-999999999.old-{run.name}")
    run.rename(aside)
    before = state(copied)
    texts(open_app(copied))
    assert state(copied) == before


def test_tunings_pair_the_same_questions(demo, copied):
    listing = data.scan(str(copied))
    weights = listing.of("counts")[0].weights
    (pair,) = data.tunings(listing, weights)
    assert [str(pair.base.path), str(pair.tuned.path)] == [
        path.replace(str(demo.workspace), str(copied)) for path in demo.result["tune"]["evals"]
    ]
    paired = data.comparison(pair)
    assert paired.changed == demo.result["tune"]["paired"]["changed"]
    edit(pair.base.path / "manifest.json", lambda m: m["config"].update(questions="others"))
    assert data.tunings(data.scan(str(copied)), weights) == []


def test_workspace_argument():
    assert places.argument(["--workspace", "/a b"]) == "/a b"
    assert places.argument(["--workspace=/c"]) == "/c"
    assert places.argument([]) is None
    assert places.argument(["--workspace"]) is None
    assert places.argument(["tests", "-q"]) is None
