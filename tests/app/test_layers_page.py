"""The page of layers: its logic through AppTest."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import kind_examples
import pytest
from app_driver import HOSTILE, charts, edit, manifest_of, marked_up, reseal, state, texts

from resa_lens import stats
from resa_lens.app import answers, data
from resa_lens.app.places import argument
from resa_lens.artifacts.kinds.counts import Counts
from resa_lens.artifacts.kinds.falsification import Falsification, Verdicts
from resa_lens.artifacts.kinds.sweep import SweepTables
from resa_lens.errors import BadInputError
from resa_lens.figures import layers as layer_plots
from resa_lens.figures import plots
from resa_lens.figures.scores import sweep_figure
from resa_lens.layers import FLAT, SUPPORTED
from resa_lens.layers.selectors import recommend
from resa_lens.resources import data_path
from resa_lens.stages.sweep_page import findings

SHIPPED = data_path("workspace")
SWEEP = "sweeps/tiny-reasoner-459a3904-paper-mlp_out-ac2ea40e"
CONTROLS = "sweeps/tiny-reasoner-459a3904-paper-mlp_out-937b1cc0"


@pytest.fixture
def open_app(open_page):
    """Everything on one page; that views leave parts out has a test of its own."""
    return lambda workspace: open_page(workspace, "layers", view="Everything")


@pytest.fixture
def shipped(tmp_path) -> Path:
    """A copy of the workspace that ships, to be damaged."""
    target = tmp_path / "workspace"
    skip = shutil.ignore_patterns("*.safetensors", "activity", "scores", "ablations")
    shutil.copytree(SHIPPED, target, ignore=skip)
    return target


def specs(app) -> dict[str, Any]:
    """The figures by their titles."""
    made = [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]
    return {spec["layout"]["title"]["text"]: spec for spec in made}


def table(app, *columns: str) -> Any:
    return next(f.value for f in app.dataframe if set(columns) <= set(f.value.columns))


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
    assert "cost only: with the SAE inserted accuracy changes by" in shown
    assert charts(app) == 9
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


def test_the_first_rule_shown_counts_something_and_an_address_names_something(copied, open_page):
    def by_any_alone(manifest):  # whichever rule counts a feature on this kind of machine
        for row in manifest["results"]["layers"]:
            row["all"], row["any"] = 0, int(row["layer"] == 5)

    edit(manifest_of(copied, "counts"), by_any_alone)
    app = open_page(copied, "layers", view="Everything", model="absent", counts="counts/none")
    said = texts(app)
    for what in ("model 'absent'", "counts 'counts/none'"):
        assert f"The address names {what}, which is not in this workspace." in said
    assert app.button_group(key="rule-all").value == "any"
    assert 'follows rule "all", which counts no feature' in marked_up(app)
    assert "Verdict: not distinguishable from flat\nWhy:" in said


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
    reseal(file)
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
    assert f"{empty} is empty" in texts(app)
    assert any("resa-lens demo" in code.value for code in app.code)
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file; pass a folder" in texts(open_app(file))


def test_broken_newer_and_foreign_manifests(copied, open_app):
    counts = manifest_of(copied, "counts")
    text = counts.read_text()
    counts.write_text(text[: len(text) // 2])
    app = open_app(copied)
    assert f"{counts} is damaged" in texts(app)
    assert "No feature counts" in texts(app)
    whole = json.loads(text)
    counts.write_text(json.dumps({**whole, "schema_version": 99}))
    assert "has schema 99" in texts(open_app(copied))
    assert "update resa-lens" in texts(open_app(copied))
    for foreign in ('{"name": "somebody else\'s", "version": 3}', "[1, 2]"):
        counts.write_text(foreign)
        assert "is not a manifest of resa-lens" in texts(open_app(copied))
    counts.write_text(json.dumps({**whole, "results": {"layers": []}}))
    assert f"{counts} was changed since it was written" in texts(open_app(copied))
    reseal(counts)
    app = open_app(copied)
    assert "is damaged or of another version, at layers" in texts(app)
    assert any("resa-lens recommend-layers" in code.value for code in app.code)


def test_one_damaged_artifact_leaves_the_others(copied, open_app):
    file = manifest_of(copied, "adapters")
    file.write_text("{")
    app = open_app(copied)
    assert f"{file} is damaged" in texts(app)
    assert "No adapter of this model was scored" in texts(app)
    assert charts(app) == 8


def test_adapters_made_without_an_sae_are_shown_as_what_they_are(copied, open_app):
    file = manifest_of(copied, "adapters")
    assert "Tuned through the SAE of layer" in texts(open_app(copied))
    edit(file, lambda m: m["config"].update(control="noise"))
    assert "Tuned with the control noise in the SAE's place: layer" in texts(open_app(copied))
    edit(file, lambda m: m["config"].update(control="cot"))
    edit(file, lambda m: m["results"].update(layer=None, site=None))
    assert "Fine-tuned in place of SAE-Tuning: cot" in texts(open_app(copied))


@pytest.mark.parametrize("name", ["recommendation.json", "samples.parquet"])
def test_half_written_files(copied, open_app, name):
    for file in copied.rglob(name):
        file.write_bytes(file.read_bytes()[:40])
    assert f"{name} was changed since it was written" in texts(open_app(copied))
    for file in copied.rglob(name):
        reseal(file)
    assert "damaged" in texts(open_app(copied))
    for file in copied.rglob(name):
        file.unlink()
    assert "missing" in texts(open_app(copied))


def test_stages_that_are_missing_name_their_command(copied, open_app):
    for folder in ("recommendations", "saes", "evals"):
        shutil.rmtree(copied / folder)
    app = open_app(copied)
    commands = " ".join(code.value for code in app.code)
    texts(app)
    for command in ("recommend-layers", "train-saes", "tune"):
        assert f"resa-lens {command} --model tiny-reasoner" in commands
    assert "--layer auto" in commands
    # What a file says is one word of the command, whatever it holds.
    hostile = "x; touch /tmp/never #"
    for file in copied.rglob("manifest.json"):
        edit(file, lambda value: value["results"].update(model=hostile))
    shown = [code.value for code in open_app(copied).code]
    assert any(hostile in value for value in shown)
    for value in shown:
        assert hostile not in value or hostile in shlex.split(value)
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
    weights = listing.of(Counts)[0].weights
    (pair,) = listing.tunings(weights)
    assert [str(pair.base.path), str(pair.tuned.path)] == [
        path.replace(str(demo.workspace), str(copied)) for path in demo.result["tune"]["evals"]
    ]
    paired = answers.comparison(pair)
    assert paired.changed == demo.result["tune"]["paired"]["changed"]
    edit(pair.base.path / "manifest.json", lambda m: m["config"].update(questions="others"))
    assert data.scan(str(copied)).tunings(weights) == []


def test_workspace_argument():
    assert argument(["--workspace", "/a b"]) == "/a b"
    assert argument(["--workspace=/c"]) == "/c"
    assert argument([]) is None
    with pytest.raises(BadInputError, match="names no folder"):
        argument(["--workspace"])
    assert argument(["tests", "-q"]) is None


# Sweeps --------------------------------------------------------------------------------------


def test_sweep_and_counts_stand_on_one_axis(open_page):
    app = open_page(SHIPPED, "layers", view="Everything")
    assert app.selectbox(key="sweep").value == SWEEP  # the one of all layers
    sweep = data.read(data.scan(str(SHIPPED)).at(SWEEP), "sweep.json", SweepTables)
    shown = texts(app)
    for sentence in findings(sweep):
        assert sentence in shown
    for name, reason in sweep.reasons.items():
        assert f"{name}: {reason}" in shown
    made = specs(app)["Features and tuned accuracy by layer"]
    assert made["layout"]["xaxis"]["range"] == made["layout"]["xaxis2"]["range"]
    assert made["layout"]["xaxis"]["matches"] == "x2"
    below = [t for t in made["data"] if t.get("xaxis") == "x2"]
    above = [t for t in made["data"] if t.get("xaxis") == "x"]
    assert [t["name"] for t in below] == ["one seed", "through the SAE (interval among all layers)"]
    rows = table(app, "p, all layers")
    assert list(rows["layer"]) == below[1]["x"] == list(range(12))
    assert list(rows["accuracy, %"]) == pytest.approx([100 * r["accuracy"] for r in sweep.layers])
    assert list(rows["minus base low, points"]) == pytest.approx(
        [100 * row["simultaneous_ci"][0] for row in sweep.layers]
    )
    assert above[2]["x"] == list(range(1, 11))  # these counts have no first and last layer
    regrets = table(app, "regret, points")
    assert list(regrets["regret, points"])[:-1] == pytest.approx(
        [row["regret"] for row in sweep.regrets["selectors"]]
    )
    assert list(regrets["regret, points"])[-1] == pytest.approx(sweep.regrets["random"])
    # The recommended layer is marked in both, and dotted: it is a fallback.
    marks = [m for m in made["layout"]["shapes"] if m["type"] == "line" and m["x0"] == m["x1"] == 5]
    assert {m["xref"] for m in marks} == {"x", "x2"}
    assert {m["line"]["dash"] for m in marks} == {"dot"}


def test_the_address_chooses_sweep_and_numbering(open_page):
    app = open_page(SHIPPED, "layers", view="Everything", sweep=CONTROLS, one_based="true")
    made = specs(app)["Features and tuned accuracy by layer"]
    below = {t["name"]: t for t in made["data"] if t.get("xaxis") == "x2"}
    assert below["through the SAE (interval among all layers)"]["x"] == [5, 9]
    assert made["layout"]["xaxis2"]["title"]["text"] == "layer (1-based)"
    # The controls that use no layer stand to the right of all, also of those only counted.
    assert min(below["cot"]["x"]) >= 12
    assert "no layer" in made["layout"]["xaxis2"]["ticktext"]
    rows = table(app, "p, all controls")
    assert set(rows["control"]) == {
        "noise", "pca", "shuffled", "random", "random-weights", "cot-free", "cot", "own-samples",
    }  # fmt: skip
    assert list(rows["layer_1_indexed"].dropna().unique()) == [5, 9]


def test_controls_without_a_layer_keep_off_the_layers():
    row = {"layer": 2, "accuracy": 0.5, "difference": 0.0, "simultaneous_ci": (-0.1, 0.1)}
    control = {"control": "cot", "layer": None, "difference": 0.0, "ci": (-0.1, 0.1)}
    base = {"accuracy": 0.5, "ci": (0.4, 0.6)}
    for last, place in ((None, 3), (7, 8)):
        figure = sweep_figure([row], [], [control], base, last=last)
        made: list[Any] = [*figure.data]
        assert list(made[-1].x) == [place]


def test_a_workspace_of_sweeps_alone(tmp_path, open_page):
    shutil.copytree(SHIPPED / "sweeps", tmp_path / "sweeps")
    app = open_page(tmp_path, "layers", view="Everything")
    assert "No feature counts in" in texts(app)
    assert "it holds: sweep" in texts(app)
    assert app.selectbox(key="model").value == "tiny-reasoner-459a3904"
    assert table(app, "all", "any", "either")["either"].sum() == 165  # the sweep's own counts
    held = specs(app)
    assert {"Features and tuned accuracy by layer", "SAE quality on held-out sequences"} <= set(
        held
    )
    assert len(held["SAE quality on held-out sequences"]["data"][0]["x"]) == 12
    for file in tmp_path.rglob("sweep.json"):
        file.write_text("{")
        reseal(file)
    app = open_page(tmp_path, "layers", view="Everything")
    assert "sweep.json is damaged" in texts(app)


def test_a_workspace_of_saes_alone(shipped, open_page):
    for folder in shipped.iterdir():
        if folder.is_dir() and folder.name != "saes":
            shutil.rmtree(folder)
    app = open_page(shipped, "layers", view="Everything")
    assert "it holds: saes" in texts(app)
    assert any("resa-lens recommend-layers" in code.value for code in app.code)
    panels = specs(app)["SAE quality on held-out sequences"]["data"]
    assert [panel["name"] for panel in panels] == ["FVU", "L0", "dead share"]
    assert "The paper's tuned models" in specs(app)


def test_a_damaged_sweep_leaves_the_counts(shipped, open_page):
    file = shipped / SWEEP / "sweep.json"
    whole = file.read_text()
    for change in (
        lambda v: v.update(layers=[]),
        lambda v: v["layers"][0].update(simultaneous_ci="wide"),
        lambda v: v.pop("regrets"),
        lambda v: v["regrets"]["selectors"][0].pop("gain"),
    ):
        file.write_text(whole)
        edit(file, change)
        app = open_page(shipped, "layers", view="Everything")
        assert "sweep.json is damaged or of another version" in texts(app)
        assert "Think-tag exclusive features" in specs(app)
    # Another one can still be chosen.
    app.selectbox(key="sweep").set_value(CONTROLS).run()
    assert "Features and tuned accuracy by layer" in specs(app)


# Falsification -------------------------------------------------------------------------------


def test_random_weights_stand_beside_the_counts(open_page):
    app = open_page(SHIPPED, "layers", view="Everything")
    listing = data.scan(str(SHIPPED))
    (counts,) = listing.of(Counts)
    (tests,) = listing.made_of(counts, Falsification)
    held = data.read(tests, "verdicts.json", Verdicts)
    null = held.null()["either"]
    made = specs(app)["Features and tuned accuracy by layer"]
    (marks,) = (t for t in made["data"] if t["name"] == "random weights, 95 %")
    assert marks["y"] == [counted for counted, _ in null.values()]
    counted, active = null[1]
    low, high = stats.clopper_pearson(counted, active)
    assert marks["error_y"]["array"][0] == pytest.approx(active * high - counted)
    assert marks["error_y"]["arrayminus"][0] == pytest.approx(counted - active * low)
    # Over the one bar of its layer: the other rules count nothing, and hold no room.
    assert marks["x"][0] == pytest.approx(1)
    bars = [t["name"] for t in made["data"] if t["type"] == "bar"]
    assert bars == ["either tag"]
    assert held.summary.reason in texts(app)
    tally = table(app, "random weights: counted")
    assert list(tally["rule"]) == ["all", "any", "either"]
    verdicts = specs(app)["Counted features by verdict"]
    bars = {t["name"]: t for t in verdicts["data"]}
    survivors = sum(bars["survives"]["y"]) if "survives" in bars else 0
    assert survivors == tally["survives"].iloc[2] == held.summary.weakest.survivors
    assert bars["counted with random weights"]["x"] == list(null)
    links = [link.proto for link in app.get("page_link") if link.proto.page == "features"]
    listed = {parse_qs(link.query_string)["layer"][0]: link.label for link in links}
    totals = {str(k): sum(v.values()) for k, v in held.by_layer(range(1, 11)).items()}
    assert listed == {layer: f"layer {layer}: {n}" for layer, n in totals.items() if n}


def test_damaged_verdicts_leave_the_rest(shipped, open_page):
    file = next(shipped.rglob("verdicts.json"))
    edit(file, lambda v: v["features"][0].pop("verdict"))
    app = open_page(shipped, "layers", view="Everything")
    assert f"{file} is damaged or of another version" in texts(app)
    assert "Features and tuned accuracy by layer" in specs(app)
    file.write_text(file.read_text()[:99])
    reseal(file)
    assert "is damaged" in texts(open_page(shipped, "layers", view="Everything"))


def test_hostile_names_in_sweeps_and_verdicts(shipped, open_page):
    def sweep(value):
        value["reasons"]["mixture"] = HOSTILE
        value["jobs"][0]["name"] = HOSTILE
        value["counts"][HOSTILE] = value["counts"]["either"]
        value["failed"] = {HOSTILE: HOSTILE}

    edit(shipped / SWEEP / "sweep.json", sweep)
    edit(shipped / SWEEP / "manifest.json", lambda m: m["results"].update(preset=HOSTILE))

    def verdicts(value):
        value["summary"]["reason"] = HOSTILE
        value["trials"] = {HOSTILE: 3}
        value["skipped"] = [HOSTILE]
        for feature in value["features"]:
            feature["rule"] = HOSTILE

    edit(next(shipped.rglob("verdicts.json")), verdicts)
    app = open_page(shipped, "layers", view="Everything")
    assert f"mixture: {HOSTILE}" in texts(app)
    assert "onerror" not in marked_up(app)
    assert "<img" not in "".join(chart.proto.spec for chart in app.get("plotly_chart"))


# Quality and other selectors -----------------------------------------------------------------


def test_quality_by_phase(shipped, open_page):
    figures = {
        "tokens": 100, "documents": 16, "fvu": 0.1, "l0": 32.0, "dead_share": 0.5,
        "loss_change": 0.25, "loss_change_se": 0.125, "loss_recovered": 0.9,
    }  # fmt: skip
    phases = {"think": figures, "answer": {**figures, "loss_recovered": None}, "all": figures}
    saes = next((shipped / "saes").rglob("manifest.json")).parent
    folder = shipped / "quality" / "tiny" / "run"
    folder.mkdir(parents=True)
    manifest = kind_examples.manifest(
        "quality", schema_version=1, identity="", parents=[str(saes.relative_to(shipped))]
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    (folder / "quality.json").write_text(json.dumps({"3": phases, "4": phases}))
    app = open_page(shipped, "layers", view="Everything")
    drawn = {t["name"]: t for t in specs(app)["Loss recovered by phase"]["data"]}
    assert drawn["think"]["x"] == [3, 4]
    assert drawn["think"]["y"] == [90, 90]
    assert drawn["answer"]["y"] == [None, None]
    rows = table(app, "phase", "loss change, nats")
    assert list(rows["phase"]) == ["think", "answer", "all"] * 2
    assert rows["high, nats"].iloc[0] == pytest.approx(0.25 + 2.1314495 * 0.125)  # t, 15 degrees
    (folder / "quality.json").write_text('{"3": {"think": {"tokens": "many"}}}')
    app = open_page(shipped, "layers", view="Everything")
    assert "quality.json is damaged or of another version" in texts(app)
    assert "SAE quality on held-out sequences" in specs(app)


def test_a_causal_recommendation_shows_its_effects(shipped, open_page):
    manifest = manifest_of(shipped, "recommendations")
    effects = {"4": [0.5, 0.1, 10], "5": [0.25, 0.1], "6": 0.125, "7": [-0.5, 0.1, None]}
    del effects["7"]
    edit(manifest, lambda m: m["config"].update(selector="causal", causal=effects))
    app = open_page(shipped, "layers", view="Everything")
    (points, *_) = specs(app)["Causal effect by layer"]["data"]
    assert points["x"] == [4, 5, 6]
    assert points["y"] == [0.5, 0.25, 0.125]
    reach = [2.2281389 * 0.1, 1.9599640 * 0.1, 0.0]
    assert points["error_y"]["array"] == pytest.approx(reach, abs=1e-6)
    assert points["marker"]["symbol"] == ["circle", "diamond", "circle"]  # layer 5 is recommended
    assert math.isnan(table(app, "effect, nats")["low"].iloc[2])
    edit(manifest, lambda m: m["config"].update(causal={"4": "much"}))
    app = open_page(shipped, "layers", view="Everything")
    assert "is damaged or of another version, at causal.4" in texts(app)
    edit(manifest, lambda m: m["config"].pop("causal"))
    said = texts(open_page(shipped, "layers", view="Everything"))
    assert "Selector causal read more than the counts below" in said


def test_stacking_moves_every_mark_to_its_row():
    above = plots.counts_figure({"all": {0: 0, 1: 0}}, recommended=[1], verdict=FLAT)
    below = plots.profile_figure({0: 1.0, 1: 2.0}, title="t", y="accuracy")
    below.add_hrect(y0=1, y1=2)
    made = layer_plots.on_one_axis(above, below, [0, 1], title="both", one_based=False)
    refs = [(mark.xref, mark.yref) for mark in made.layout.shapes]
    assert refs == [("x", "y domain"), ("x2 domain", "y2"), ("x2", "y2 domain")]
    assert {(a.xref, a.yref) for a in made.layout.annotations} == {
        ("x", "y domain"), ("x domain", "y domain"),
    }  # fmt: skip
    assert made.layout.yaxis2.title.text == "accuracy"
    assert list(made.layout.xaxis.ticktext) == ["0", "1"]
    many = layer_plots.on_one_axis(above, below, range(28), title="both", one_based=True)
    assert list(many.layout.xaxis.ticktext) == [str(k) for k in range(1, 29, 2)]


def test_a_view_draws_its_own_parts_alone(open_page) -> None:
    shown = {
        view: marked_up(open_page(SHIPPED, "layers", view=view))
        for view in ("By layer", "Tuned and inserted", "SAE quality", "The paper", "Everything")
    }
    parts = {
        "By layer": "Mixture over layers", "Tuned and inserted": "Scores before and after",
        "The paper": "Beside the paper",
    }  # fmt: skip
    for view, part in parts.items():
        assert [name for name in shown if part in shown[name]] == [view, "Everything"]
    assert marked_up(open_page(SHIPPED, "layers")) == shown["By layer"]


def test_runs_are_chosen_by_name_and_addressed_by_path(open_page) -> None:
    app = open_page(SHIPPED, "layers", view="Everything")
    box = app.selectbox(key="sweep")
    assert all("tunings, 2" in name for name in box.options)
    box.set_value(CONTROLS).run()
    assert app.query_params["sweep"] in (CONTROLS, [CONTROLS])
    again = open_page(SHIPPED, "layers", view="Everything", sweep=CONTROLS)
    assert again.selectbox(key="sweep").value == CONTROLS
