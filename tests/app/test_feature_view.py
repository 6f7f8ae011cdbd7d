"""One feature's page through AppTest: what was measured, what is missing, damaged or hostile."""

from __future__ import annotations

import json
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from app_driver import HOSTILE, clickable_markup, edit, marked_up, texts
from features_driver import SMALL, commands, shown, source_of, source_row, tables
from synthetic_workspace import (
    ACTIVITY,
    COUNTS,
    LENS_COUNTS,
    PLANTED,
    SAES,
    SLUG,
    write_workspace,
)

from resa_lens.app.features.table import Query, page_of
from resa_lens.artifacts.feature_tables import ADDED
from resa_lens.artifacts.kinds.effects import features_key
from resa_lens.artifacts.notes import VARIABLE, read_notes
from resa_lens.figures.tokens import visible

NASTY = f"{HOSTILE} $x^2$ `c`\n\u202eabc\u200b</div>"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A workspace that no test changes."""
    return write_workspace(tmp_path_factory.mktemp("features") / "workspace", SMALL)


@pytest.fixture
def workspace(made, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(made, tmp_path / "workspace")


@pytest.fixture
def features(open_page):
    return lambda root, **query: open_page(root, "features", **query)


# One feature ----------------------------------------------------------------------------------


def test_a_features_page_has_everything_that_was_measured(made, features):
    app = features(made, layer=str(PLANTED.layer), feature=str(PLANTED.feature))
    said = texts(app)
    headings = [element.value for element in app.subheader]
    assert headings[0] == f"Feature {PLANTED.feature}, layer 1 (0-based; 2nd of 3)"
    assert "survives" in marked_up(app)
    assert f"Why: {PLANTED.reason}" in said
    low, high = 100 * PLANTED.overall - 0.196, 100 * PLANTED.overall + 0.196
    assert f"Fires at {100 * PLANTED.overall:.3g} % of all tokens (95 % over documents" in said
    assert f"over documents {low:.3g} % to {high:.3g} %)" in said
    assert "Densest in thoughts: 0.1 % of the prompt, 50 % of thoughts, 0.2 % of the answer" in said
    assert "rule all counts 16 of its 645 active features" in said
    assert "1 of these pass the tests on texts" in said
    held = tables(app)
    scores = held["score"].set_index("score")
    assert set(scores.index) == set(SMALL.scores)
    row = scores.loc["auc"]
    assert (row["value"], row["by chance"], row["p"], row["q"]) == (2.5, 0.01, 0.001, 0.004)
    assert row["95 %"] == "2.1 to 2.9"
    assert row["of features"] == 4500
    trials = held["kind"].set_index("kind")
    assert (trials.loc["injected"]["fires in"], trials.loc["injected"]["of"]) == (0, 40)
    ablated = held["what"]
    assert list(ablated["what"]) == ["ablate, this feature alone", "ablate, it and 2 others"]
    assert (ablated["accuracy, points"][0], ablated["p"][0]) == (-4.0, 0.02)
    assert (ablated["beyond random, points"][0], ablated["beyond, p"][0]) == (-3.0, 0.04)
    assert ablated["questions"][0] == 200
    weighed = held["measure"].iloc[0]
    assert weighed["gradient, 1e-3 nats"] == pytest.approx(2.1)
    assert weighed["patching, 1e-3 nats"] == pytest.approx(1.9)
    assert "resa-lens" not in commands(app)
    charts = app.get("plotly_chart")
    assert len(charts) == 5
    names = {json.loads(c.proto.config)["toImageButtonOptions"]["filename"] for c in charts}
    stem = f"synthetic-layer-{PLANTED.layer}-feature-{PLANTED.feature}"
    drawn = ("activations", "phases", "lens", "trials", "doses")
    assert names == {f"{stem}-{what}" for what in drawn}
    assert f"layer={PLANTED.layer}&feature={PLANTED.feature}" in commands(app)
    assert shlex.quote(ACTIVITY).replace("/", "%2F") in commands(app)


def test_what_a_feature_depends_on_stands_with_its_shares(workspace, features):
    depends_on = {
        "tag": {"needs": "yes", "trials": "plain", "share": 0.15, "n": 40, "ci": [0.07, 0.29]},
        "phase": {
            "needs": "undetermined", "trials": "documents",
            "open": {"share": 0.5, "n": 20, "ci": [0.3, 0.7]},
            "close": {"share": 0.0, "n": 20, "ci": [0.0, 0.16]},
        },
        "seed": {"needs": "no", "trials": "original", "correlation": 0.9},
    }  # fmt: skip

    planted = (PLANTED.layer, PLANTED.feature)

    def change(value):
        of = {(row["layer"], row["feature"]): row for row in value["features"]}[planted]
        of |= {"depends_on": depends_on, "sentence": "needs a tag; any text will do"}

    edit(next((workspace / "falsified").rglob("verdicts.json")), change)
    app = features(workspace, layer=str(PLANTED.layer), feature=str(PLANTED.feature))
    said = texts(app)
    assert "It needs a tag; any text will do." in said
    rows = tables(app)["dependence"].set_index("dependence")
    assert list(rows.index) == [
        "a tag", "the border of a thought: opening tag", "the border of a thought: closing tag",
        "the SAE's seed",
    ]  # fmt: skip
    assert list(rows["needed"]) == ["yes", "undetermined", "undetermined", "no"]
    shown = rows[["fires in, %", "of", "low, %", "high, %"]].iloc[:3]
    assert shown.to_numpy() == pytest.approx(
        np.array([[15, 40, 7, 29], [50, 20, 30, 70], [0, 20, 0, 16]])
    )
    assert rows.loc["the SAE's seed", "correlation"] == 0.9
    # Every verdict on the page has its error rates beside it.
    assert "of planted features" in "".join(caption.value for caption in app.caption)


def test_what_a_feature_responds_to_stands_first(demo, open_page):
    """On a fresh demo: its tokens, then examples of every phase in which it fires."""
    folder = Path(demo.result["activity"]["folder"])
    rows = pq.read_table(folder / "features.parquet").to_pylist()
    row = max(
        (r for r in rows if r["tokens_fired_prompt"] > r["tokens_fired_think"] > 20),
        key=lambda r: r["tokens_fired_think"],
    )
    place = {"layer": str(row["layer"]), "feature": str(row["feature"])}
    app = open_page(demo.workspace, "features", **place)
    texts(app)
    headings = [element.value for element in app.subheader]
    assert headings[1] == "What it responds to"
    fires_on = tables(app)["token"]
    assert list(fires_on["token"]) == [visible(token) for token in row["fires_on"]]
    assert list(fires_on["share of firings, %"]) == pytest.approx(
        [100 * share for share in row["fires_on_share"]], rel=1e-5
    )
    kept = pq.read_table(folder / "examples.parquet").to_pylist()
    kept = [r for r in kept if all(r[name] == row[name] for name in ("layer", "feature"))]
    # The phase of most firings comes first.
    listed = tables(app)["document"]
    assert listed["phase"].iloc[0] == "prompt"
    assert set(listed["interval"]) == {"strongest"}
    assert set(listed["phase"]) == {r["phase"] for r in kept}
    app.selectbox(key="of").set_value("think")
    app.selectbox(key="examples").set_value("at random").run()
    texts(app)
    listed = tables(app)["document"]
    drawn = [r for r in kept if r["phase"] == "think" and r["interval"] != "strongest"]
    assert list(listed["activation"]) == pytest.approx([r["value"] for r in drawn])
    assert set(listed["interval"]) == {"upper third", "middle third", "lower third"}
    # The choice stands for the next feature too, and one that never fires there says so.
    silent = next(r for r in rows if not r["tokens_fired_think"])
    app = open_page(
        demo.workspace, "features", layer=str(silent["layer"]), feature=str(silent["feature"]),
        of="thoughts",
    )  # fmt: skip
    assert "no example was kept" in clickable_markup(app)


def test_tables_of_recipe_1_show_their_strongest_examples(workspace, features):
    for name in ("features", "examples"):
        file = workspace / ACTIVITY / f"{name}.parquet"
        table = pq.read_table(file)
        pq.write_table(table.drop_columns(sorted(ADDED.keys() & set(table.column_names))), file)
    app = features(workspace, layer="1", feature=str(PLANTED.feature))
    assert "kept the strongest examples alone" in texts(app)
    assert "resa-lens activity --model synthetic" in commands(app)
    assert len(tables(app)["document"]) == SMALL.examples


def test_examples_frame_the_peak_and_underline_phases(made, features):
    app = features(made, layer="1", feature=str(PLANTED.feature))
    body = clickable_markup(app, "examples-text")
    assert "document 4" in body
    assert body.count('class="peak"') == SMALL.examples
    first = body.split('class="peak"')[1]
    assert first.startswith(' title="␣zebra: 4, think"')
    # Tokens 20 to 28 of a document whose thoughts begin at its 20th.
    assert body.count("3px solid") == 9 * SMALL.examples
    assert 'title="document 4, token 24, strongest">4<' in body
    listed = tables(app)["document"]
    assert listed["peak"].iloc[0] == "␣zebra"


def test_what_was_not_measured_names_its_command(workspace, features):
    for folder in ("ablations", "attributions", "scores", "falsified"):
        shutil.rmtree(workspace / folder)
    app = features(workspace, layer="0", feature="7")
    texts(app)
    where = f"--saes {workspace / SAES} --workspace {workspace}"
    for line in (
        f"resa-lens ablate --model synthetic --layer 0 --features 7 {where}",
        f"resa-lens attribute --model synthetic --layer 0 --features 7 {where}",
        f"resa-lens score-features --model synthetic {where}",
        f"resa-lens falsify --model synthetic {where}",
    ):
        assert line in commands(app)
    shutil.rmtree(workspace / "counts")
    assert "Features were not counted" in texts(features(workspace, layer="0", feature="7"))
    # And where the SAEs themselves are elsewhere, no folder is named.
    shutil.rmtree(workspace / "saes")
    app = features(workspace, layer="0", feature="7")
    assert f"--features 7 --workspace {workspace}" in commands(app)


def test_without_a_lens_the_command_prints_it(workspace, features):
    file = workspace / ACTIVITY / "features.parquet"
    table = pq.read_table(file)
    for name in table.schema.names[-7:]:
        place = table.schema.get_field_index(name)
        empty = pa.nulls(table.num_rows, table.schema.field(name).type)
        table = table.set_column(place, table.schema.field(name), empty)
    pq.write_table(table, file)
    assert set(shown(features(workspace))["raises"]) == {""}
    # What has no lens raises nothing that could be found.
    rows = page_of(source_of(workspace), Query(find=PLANTED.token))
    assert list(rows["found in"]) == ["examples"]
    app = features(workspace, layer="0", feature="7")
    line = "resa-lens activity --model synthetic --show 0:7 --layers 0,1,2"
    assert line in commands(app)
    assert "has no sae.safetensors" in texts(app)


def test_the_lens_stands_over_the_whole_vocabulary(workspace, features):
    query = {"layer": "1", "feature": str(PLANTED.feature)}
    spec = next(
        json.loads(chart.proto.spec)
        for chart in features(workspace, **query).get("plotly_chart")
        if "vocabulary" in chart.proto.spec
    )
    row = source_row(workspace, 1, PLANTED.feature)
    (bars,) = spec["data"]
    assert bars["y"] == LENS_COUNTS.tolist()
    width = (row["top_logits"][0] - row["bottom_logits"][0]) / 40
    assert bars["x"][0] == pytest.approx(row["bottom_logits"][0] + width / 2)
    assert bars["x"][-1] == pytest.approx(row["top_logits"][0] - width / 2)
    # Tables of recipe 2 have the lens' tokens alone, and their page says so.
    file = workspace / ACTIVITY / "features.parquet"
    whole = pq.read_table(file)
    pq.write_table(whole.drop_columns(["lens_histogram"]), file)
    app = features(workspace, **query)
    assert "kept no histogram of the whole vocabulary" in texts(app)
    assert "resa-lens activity --model synthetic" in commands(app)
    assert "token" in tables(app)
    assert "features match" in texts(features(workspace))
    # And what is no range is no figure.
    column = whole.schema.get_field_index("top_logits")
    low = pa.array([[-9.0]] * len(whole), whole.schema.field("top_logits").type)
    pq.write_table(whole.set_column(column, whole.schema.field("top_logits"), low), file)
    assert "which is no range of logits" in texts(features(workspace, **query))


def test_the_set_of_a_rule_has_its_effect(workspace, features):
    counts = json.loads((workspace / COUNTS / "features.json").read_text())
    named = {row["layer"]: row["features"]["all"] for row in counts["layers"]}
    effect = {
        "value": 0.002, "se": 0.0005, "freedom": 9.0, "n": 35, "control": 0.001, "target": 0.003,
        "p_value": 0.003, "rank_p": 0.1, "features": 1, "controls": 10,
    }  # fmt: skip
    folder = workspace / "effects" / SLUG / "run"
    folder.mkdir(parents=True)
    manifest = json.loads((workspace / "scores" / SLUG / "run" / "manifest.json").read_text())
    manifest |= {"kind": "effects", "config": {"features": features_key(named)}}
    manifest["results"] |= {"layers": {"1": effect}, "rule": "all"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said = texts(features(workspace, layer="1", feature="62"))
    assert "With all 1 features that rule all counts" in said
    assert "+2e-3 beyond them (se 0.5e-3, p = 0.003; 35 documents, 10 sets)" in said
    # Effects of other features are not this one's.
    edit(folder / "manifest.json", lambda m: m["config"].update(features="00000000"))
    assert "beyond them" not in texts(features(workspace, layer="1", feature="62"))


def test_runs_of_other_saes_are_not_shown(workspace, features):
    for kind in ("scores", "falsified", "ablations", "attributions"):
        for file in (workspace / kind).rglob("manifest.json"):
            edit(file, lambda m: m.update(parents=["saes/others/run"]))
    app = features(workspace, layer="1", feature="62")
    assert "counted, not tested" in marked_up(app)
    assert {"resa-lens score-features", "resa-lens ablate"} <= {
        " ".join(line.split()[:2]) for line in commands(app).splitlines()
    }


# What is missing or damaged -------------------------------------------------------------------


def test_empty_missing_and_foreign_workspaces(tmp_path, features, workspace):
    assert "There is no workspace" in texts(features(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    app = features(tmp_path / "empty")
    assert "empty is empty" in texts(app)
    assert "resa-lens demo" in commands(app)
    for folder in ("activity", "counts"):
        shutil.rmtree(workspace / folder)
    app = features(workspace)
    assert "No features were counted or measured" in texts(app)
    assert "resa-lens activity" in commands(app)


@pytest.mark.parametrize(
    ("name", "damage", "kept"),
    [
        ("features.parquet", "half", "Why: "),
        ("features.parquet", "other", "Why: "),
        ("examples.parquet", "half", "Fires at"),
        ("documents.parquet", "gone", "Fires at"),
        ("documents.parquet", "other", "Fires at"),
        ("features.json", "half", "Fires at"),
        ("verdicts.json", "other", "Fires at"),
        ("scores.parquet", "half", "Why: "),
        ("summary.json", "other", "Why: "),
        ("results.json", "gone", "Why: "),
        ("results.json", "other", "Why: "),
    ],
)
def test_a_damaged_file_leaves_the_rest_of_the_page(workspace, features, name, damage, kept):
    for file in workspace.rglob(name):
        whole = file.read_bytes()
        if damage == "half":
            file.write_bytes(whole[: len(whole) // 2])
        elif damage == "gone":
            file.unlink()
        elif name.endswith(".json"):
            file.write_text('{"features": [{"layer": 1}], "layers": [1]}')
        else:
            pq.write_table(pa.table({"layer": [1], "feature": [62]}), file)
    app = features(workspace, layer="1", feature="62")
    said = texts(app)
    assert kept in said
    assert name in said
    assert "this cannot be shown" in marked_up(app)
    if name in ("features.parquet", "features.json", "verdicts.json"):
        assert name in texts(features(workspace))


def test_a_manifest_of_another_version_is_a_problem(workspace, features):
    edit(workspace / ACTIVITY / "manifest.json", lambda m: m["results"].pop("tokens"))
    app = features(workspace)
    assert "damaged or of another version, at tokens" in texts(app)
    assert "features match" in texts(app)  # the counts stand


def test_a_manifest_that_was_changed_by_hand_is_no_error(workspace, features):
    for file in workspace.rglob("manifest.json"):
        edit(file, lambda m: m["config"].update(ablation="x", falsify=[1], activity=3, layer="a"))
    app = features(workspace, layer="1", feature="62")
    assert "damaged or of another version, at activity" in texts(app)
    assert "Counted by: all, any, either" not in texts(app)
    assert "resa-lens ablate" in commands(app)


def test_a_row_that_lacks_a_value_is_a_problem(workspace, features):
    file = workspace / ACTIVITY / "features.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("density_se")
    empty = pa.nulls(table.num_rows, pa.float64())
    pq.write_table(table.set_column(place, table.schema.field("density_se"), empty), file)
    said = texts(features(workspace, layer="1", feature="62"))
    assert "has a row without density_se" in said
    assert "Why: " in said


def test_examples_whose_lengths_differ_are_a_problem(workspace, features):
    file = workspace / ACTIVITY / "examples.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("acts")
    short = pa.array([[1.0]] * table.num_rows, table.schema.field("acts").type)
    pq.write_table(table.set_column(place, table.schema.field("acts"), short), file)
    assert "9 tokens and 1 activations" in texts(features(workspace, layer="1", feature="62"))


# Hostile text ---------------------------------------------------------------------------------


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.seen |= {name for name, _ in attrs}


def test_hostile_texts_are_shown_as_text(tmp_path, features):
    root = write_workspace(tmp_path / "w", SMALL, hostile=NASTY)
    for query in ({}, {"layer": "1", "feature": "62"}, {"layer": "2", "feature": "20"}):
        app = features(root, **query)
        said = texts(app).split("workspace:")[0]
        assert "<img src=x" in said
        # Nor do our own words run backwards behind theirs.
        assert "[U+202E]" in said
        assert "\u202e" not in said
        assert "onerror" not in marked_up(app) + "".join(b.label for b in app.button)
        drawn = [element.proto.body for element in app.get("html")]
        for body in (*drawn, clickable_markup(app)):
            assert _Tags(body).seen <= {"style", "div", "span", "class", "title"}
        for chart in app.get("plotly_chart"):
            assert "<img" not in json.loads(chart.proto.spec)["layout"]["title"]["text"]
        lines = [code.value for code in app.code if code.value.startswith("resa-lens")]
        assert all(shlex.split(line)[3] == NASTY for line in lines)
    assert lines
    held = shown(features(root))
    assert any("<img" in text and "[U+202E]" in text for text in held["raises"])


def test_hostile_names_of_runs_and_scores(workspace, features):
    nasty = ":red[x] $y$ <b>"
    (workspace / ACTIVITY).rename(workspace / "activity" / SLUG / nasty)
    for file in (workspace / "scores").rglob("summary.json"):
        edit(file, lambda v: [s.update(score=nasty) for s in v["scores"]])
    app = features(workspace)
    texts(app)
    assert ":red" not in marked_up(app)
    app = features(workspace, rule="every feature", score=nasty)
    assert "features match" in texts(app)


def test_a_label_is_kept_listed_and_searched(workspace, features, tmp_path, monkeypatch) -> None:
    where = {"layer": str(PLANTED.layer), "feature": str(PLANTED.feature)}
    app = features(workspace, **where)
    assert "--notes FILE.csv" in "".join(c.value for c in app.caption)
    file = tmp_path / "notes.csv"
    monkeypatch.setenv(VARIABLE, str(file))
    app = features(workspace, **where)
    tail = f"{PLANTED.layer}:{PLANTED.feature}"
    app.text_input(key=f"note-label-{tail}").set_value(NASTY).run()
    app.text_input(key=f"note-tags-{tail}").set_value("one, two").run()
    assert not app.exception
    ((key, note),) = read_notes(file).items()
    assert key[1:] == (PLANTED.layer, PLANTED.feature)
    assert (note.label, note.tags) == (NASTY.strip(), ("one", "two"))
    listed = tables(features(workspace, find="one"))["layer"]
    assert list(listed["feature"]) == [PLANTED.feature]
    assert "layer" not in tables(features(workspace, find="three"))
    file.write_text("damaged")
    assert "other columns" in texts(features(workspace, **where))
