"""The page of features through AppTest, on a synthetic workspace and on the shipped one."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from app_driver import HOSTILE, edit, marked_up, state, texts
from synthetic_workspace import (
    ACTIVITY,
    COUNTS,
    PLANTED,
    SAES,
    SLUG,
    TOKENS,
    Size,
    write_workspace,
)

from resa_lens.app import data, features_data, features_table
from resa_lens.app.features_table import Query, as_csv, select
from resa_lens.errors import BadInputError
from resa_lens.resources import data_path
from resa_lens.workspace import digest

SMALL = Size(layers=3, latents=1500)
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


@pytest.fixture(scope="session")
def truth(made) -> pd.DataFrame:
    """All rows with what the counts say, joined without the app's code."""
    rows = pq.read_table(made / ACTIVITY / "features.parquet").to_pandas()
    counts = json.loads((made / COUNTS / "features.json").read_text())["layers"]
    either = {(row["layer"], f) for row in counts for f in row["features"]["either"]}
    pairs = zip(rows["layer"], rows["feature"], strict=True)
    return rows.assign(either=[pair in either for pair in pairs])


def shown(app) -> pd.DataFrame:
    """The table of features."""
    return next(d.value for d in app.dataframe if "raises" in d.value.columns)


def tables(app) -> dict[str, pd.DataFrame]:
    return {d.value.columns[0]: d.value for d in app.dataframe}


def commands(app) -> str:
    return "\n".join(code.value for code in app.code)


def source_of(root):
    return features_data.sources(data.scan(str(root)))[0][0]


def pairs(frame) -> list[tuple[int, int]]:
    return list(zip(frame.iloc[:, 0], frame["feature"], strict=True))


# The table ------------------------------------------------------------------------------------


def test_opens_on_the_counted_features_and_never_writes(made, features, truth):
    before = state(made)
    app = features(made)
    counted = int(truth["either"].sum())
    assert f"{counted} of {len(truth):,} features match." in texts(app)
    held = shown(app)
    assert len(held) == counted
    first = held.iloc[0]
    assert (first["layer (0-based)"], first["feature"]) == (PLANTED.layer, PLANTED.feature)
    assert (first["counted by"], first["verdict"], first["most in"]) == ("all", "survives", "think")
    assert first["density, %"] == pytest.approx(100 * PLANTED.overall, rel=1e-5)
    assert first["raises"].startswith("␣zebra  ␣word")
    elsewhere = {p: PLANTED.density[p] * TOKENS[p] for p in ("prompt", "answer")}
    other = sum(elsewhere.values()) / (TOKENS["prompt"] + TOKENS["answer"])
    assert first["in thoughts"] == pytest.approx(0.5 / (0.5 + other), rel=1e-5)
    assert set(held["verdict"][1:]) == {"token detector"}
    assert "Activity over 40 documents" in texts(app)
    assert state(made) == before


@pytest.mark.parametrize(
    ("query", "rule"),
    [
        ({"rule": "every feature", "layer": "2"}, lambda t: t["layer"] == 2),
        ({"rule": "every feature", "layer": "3rd"}, lambda t: t["layer"] == 2),
        ({"rule": "all"}, lambda t: (t["layer"] == 1) & (t["feature"] == PLANTED.feature)),
        (
            {"rule": "every feature", "phase": "densest in answer"},
            lambda t: (
                t[["density_prompt", "density_think", "density_answer"]].to_numpy().argmax(1) == 2
            ),
        ),
        (
            {"rule": "every feature", "phase": "twice as dense in thoughts", "layer": "0"},
            lambda t: (
                (
                    t["density_think"]
                    > 2
                    * (t["tokens_fired_prompt"] + t["tokens_fired_answer"])
                    / (TOKENS["prompt"] + TOKENS["answer"])
                )
                & (t["layer"] == 0)
            ),
        ),
        ({"verdict": "token detector"}, lambda t: t["either"] & (t["feature"] != PLANTED.feature)),
        (
            {"rule": "every feature", "verdict": "not tested", "layer": "1"},
            lambda t: ~t["either"] & (t["layer"] == 1),
        ),
        (
            {"rule": "every feature", "density": ["0.1", "1"]},
            lambda t: (t["density"] >= 0.1) & (t["density"] <= 1),
        ),
        (
            {"rule": "every feature", "find": "ZEBRA"},
            lambda t: (t["layer"] == 1) & (t["feature"] == PLANTED.feature),
        ),
        ({"find": "none such"}, lambda t: t["layer"] > 99),
    ],
)
def test_filters_of_the_address_select_what_they_say(made, features, truth, query, rule):
    app = features(made, **query)
    wanted = truth[rule(truth)]
    total = len(truth) if "layer" not in query else SMALL.latents
    assert f"{len(wanted):,} of {total:,} features match" in texts(app)
    if len(wanted):
        assert len(shown(app)) == min(len(wanted), features_table.PAGE)
        if len(wanted) <= features_table.PAGE:
            assert set(pairs(shown(app))) == set(pairs(wanted))


def test_scores_and_their_significance(made, features):
    app = features(made, rule="every feature", score="auc")
    held = shown(app)
    assert list(held["auc"]) == sorted(held["auc"], reverse=True)
    assert pairs(held)[0] == (PLANTED.layer, PLANTED.feature)
    assert (held.iloc[0]["auc"], held.iloc[0]["p"], held.iloc[0]["q"]) == (2.5, 0.001, 0.004)
    app = features(made, rule="every feature", score="auc", significant="true")
    assert "1 of 4,500 features match." in texts(app)


@pytest.mark.parametrize("order", ["density", "max", "thoughts"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_rows_are_the_first_of_all(made, truth, order, reverse):
    found = select(source_of(made), Query(order=order, reverse=reverse))
    values = found.columns[order][found.index]
    steps = values[1:] - values[:-1]
    assert (steps >= 0).all() if reverse else (steps <= 0).all()
    assert len(found.shown) == features_table.PAGE < found.matching == len(truth)
    if order != "thoughts":
        ends = truth[order].min() if reverse else truth[order].max()
        assert values[0] == pytest.approx(ends, rel=1e-6)


def test_says_how_many_are_shown_and_lets_all_be_downloaded(made, features, truth):
    app = features(made, rule="every feature")
    assert "4,500 of 4,500 features match; the first 1,000 of them are below." in texts(app)
    keys = {button.key for button in app.get("download_button")}
    assert {"download-features", "download-all-features"} <= keys
    whole = as_csv(select(source_of(made), Query(order="density")))
    lines = whole.decode().splitlines()
    assert len(lines) == 1 + len(truth)
    assert lines[0].startswith('"layer","feature","counted_all"')
    first = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert float(first['"density"']) == pytest.approx(truth["density"].max(), rel=1e-5)


def test_text_is_found_over_tokens_and_in_examples(made):
    source = source_of(made)
    (row,) = [r for r in features_data.examples(source, 2, 70) if r["rank"] == 0]
    spread = "".join(row["tokens"][2:5]).upper()
    found = select(source, Query(layer=2, find=spread))
    assert (2, 70) in found.order
    assert dict(zip(found.shown["feature"], found.shown["found in"], strict=True))[70] == "examples"
    planted = select(source, Query(find=PLANTED.token))
    assert list(planted.shown["found in"]) == ["both"]
    # The tokens that are raised are no text: nothing is found over two of them.
    raised = features_data.activity(source, 2, 70).row["top_tokens"]
    over = select(source, Query(layer=2, find=raised[0] + raised[1]))
    assert (2, 70) not in over.order


def test_many_layers_are_searched_in_what_they_raise_alone(made, monkeypatch):
    from resa_lens.app import features_text

    monkeypatch.setattr(features_text, "TEXT_GROUPS", 1)
    found = select(source_of(made), Query(find="zebra", reverse=True))
    assert list(found.shown["found in"]) == ["raises"]
    assert any("choose a layer" in note for note in found.notes)


def test_counted_features_that_never_fired_are_listed(workspace, features):
    def count_one_more(counts):
        counts["layers"][0]["features"]["either"].append(2000)

    edit(workspace / COUNTS / "features.json", count_one_more)
    edit(
        workspace / ACTIVITY / "manifest.json",
        lambda v: [row.update(latents=4096) for row in v["results"]["layers"]],
    )
    app = features(workspace, layer="0", verdict="not tested")
    assert "1 of 1,501 features match." in texts(app)
    (row,) = shown(app).to_dict("records")
    assert (row["feature"], row["density, %"], row["most in"], row["raises"]) == (2000, 0, "", "")
    app = features(workspace, layer="0", feature="2000")
    assert "It fired at none of the 100,000 tokens of 40 documents" in texts(app)
    assert "not put to the test" in texts(app)


def test_numbering_is_shown_and_the_address_stays_0_based(made, features):
    app = features(made, one_based="true", layer="1")
    assert set(shown(app)["layer (1-based)"]) == {2}
    assert app.query_params["layer"] == "1"
    assert app.selectbox(key="features-layer").value == 1
    app.selectbox(key="features-layer").set_value(2).run()
    assert app.query_params["layer"] == "2"
    assert set(shown(app)["layer (1-based)"]) == {3}
    app.selectbox(key="features-layer").set_value(-1).run()
    assert "layer" not in app.query_params


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
    assert len(app.get("plotly_chart")) == 4
    assert f"layer={PLANTED.layer}&feature={PLANTED.feature}" in commands(app)
    assert shlex.quote(ACTIVITY).replace("/", "%2F") in commands(app)


def test_examples_frame_the_peak_and_underline_phases(made, features):
    app = features(made, layer="1", feature=str(PLANTED.feature))
    body = next(h.proto.body for h in app.get("html") if "Document" in h.proto.body)
    assert body.count('class="peak"') == SMALL.examples
    first = body.split('class="peak"')[1]
    assert first.startswith(' title="␣zebra: 4, think"')
    # Tokens 20 to 28 of a document whose thoughts begin at its 20th.
    assert body.count("3px solid") == 9 * SMALL.examples
    assert "Document 4, token 24, think: 4" in body
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
    for name in table.schema.names[-6:]:
        place = table.schema.get_field_index(name)
        empty = pa.nulls(table.num_rows, table.schema.field(name).type)
        table = table.set_column(place, table.schema.field(name), empty)
    pq.write_table(table, file)
    assert set(shown(features(workspace))["raises"]) == {""}
    # What has no lens raises nothing that could be found.
    found = select(source_of(workspace), Query(find=PLANTED.token))
    assert list(found.shown["found in"]) == ["examples"]
    app = features(workspace, layer="0", feature="7")
    line = "resa-lens activity --model synthetic --show 0:7 --layers 0,1,2"
    assert line in commands(app)
    assert "keep no neighbours" in texts(app)


def test_the_set_of_a_rule_has_its_effect(workspace, features):
    counts = json.loads((workspace / COUNTS / "features.json").read_text())
    named = {str(row["layer"]): row["features"]["all"] for row in counts["layers"]}
    effect = {
        "value": 0.002, "se": 0.0005, "freedom": 9.0, "n": 35, "control": 0.001, "target": 0.003,
        "p_value": 0.003, "rank_p": 0.1, "features": 1, "controls": 10,
    }  # fmt: skip
    folder = workspace / "effects" / SLUG / "run"
    folder.mkdir(parents=True)
    manifest = json.loads((workspace / "scores" / SLUG / "run" / "manifest.json").read_text())
    manifest |= {"kind": "effects", "config": {"features": digest(named), "saes": SAES}}
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


# Going about ----------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", ["1:62", " 2nd:62 "])
def test_a_typed_feature_opens_and_the_list_comes_back_as_it_was(made, features, typed):
    app = features(made, verdict="survives", find="word")
    app.text_input(key="features-open").set_value(typed).run()
    assert app.subheader[0].value.startswith("Feature 62, layer 1")
    assert (app.query_params["layer"], app.query_params["feature"]) == ("1", "62")
    app.button(key="to-list").click().run()
    assert {"layer", "feature"}.isdisjoint(app.query_params)
    assert "1 of 4,500 features match." in texts(app)
    assert app.selectbox(key="verdict").value == "survives"
    assert app.text_input(key="find").value == "word"
    assert app.query_params["verdict"] == "survives"


def test_a_link_may_name_layer_and_feature_in_one(made, features):
    app = features(made, at="2nd:62")
    assert app.subheader[0].value.startswith("Feature 62, layer 1")
    assert (app.query_params["layer"], app.query_params["feature"]) == ("2nd", "62")
    assert "at" not in app.query_params
    app = features(made, at="<b>")
    assert "write LAYER:FEATURE" in texts(app)


def test_the_lens_command_reads_the_run_that_is_there():
    source = source_of(data_path("workspace"))
    given = features_data.same_activity(source)
    options = dict(zip(given[::2], given[1::2], strict=True))
    made_by = source.activity.manifest.command
    for name in ("--text-tokens", "--examples"):
        assert options[name] == made_by[made_by.index(name) + 1]
    assert options["--layers"] == ",".join(map(str, source.layers))


def test_next_and_previous_follow_the_list(made, features):
    app = features(made, verdict="token detector", layer="1")
    listed = pairs(shown(app))
    app.text_input(key="features-open").set_value(f"1:{listed[1][1]}").run()
    app.button(key="to-next").click().run()
    assert app.query_params["feature"] == str(listed[2][1])
    app.button(key="to-previous").click().run()
    app.button(key="to-previous").click().run()
    assert app.query_params["feature"] == str(listed[0][1])
    assert app.button(key="to-previous").disabled
    app.button(key="to-list").click().run()
    assert app.query_params["layer"] == "1"


def test_a_link_goes_to_the_layers_neighbours_and_back_to_the_layer(made, features):
    app = features(made, layer="2", feature="100")
    app.button(key="to-next").click().run()
    assert app.query_params["feature"] == "101"
    near = app.button(key="near-0")
    wanted = near.label.split()[0]
    near.click().run()
    assert app.query_params["feature"] == wanted
    assert app.subheader[0].value.startswith(f"Feature {wanted}, layer 2")
    app.button(key="to-list").click().run()
    assert app.query_params["layer"] == "2"
    assert "features match" in texts(app)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"layer": "9", "feature": "1"}, "layer '9' is out of range"),
        ({"layer": "1", "feature": "1500"}, "its SAE has latents 0 to 1499"),
        ({"layer": "1", "feature": "-1"}, "write LAYER:FEATURE"),
        ({"layer": "1", "feature": "<b>x"}, "write LAYER:FEATURE"),
        ({"feature": "7"}, "is not a layer"),
        ({"layer": "first"}, "layer 'first' is not a layer"),
        ({"run": "activity/none/such"}, "The run activity/none/such is not in this workspace"),
    ],
)
def test_an_address_that_names_nothing_says_so_beside_the_list(made, features, query, said):
    app = features(made, **query)
    assert said in texts(app)
    assert "features match" in texts(app)


@pytest.mark.parametrize("typed", ["62", "0th:1", "4th:1", "1:6 2"])
def test_what_cannot_be_opened_is_said(made, features, typed):
    app = features(made)
    app.text_input(key="features-open").set_value(typed).run()
    assert "features match" in texts(app)
    assert "this cannot be shown" in marked_up(app)
    assert "feature" not in app.query_params


def test_one_of_several_runs_is_chosen_by_the_address(workspace, features):
    other = workspace / "activity" / SLUG / "other"
    shutil.copytree(workspace / ACTIVITY, other)
    edit(other / "manifest.json", lambda m: m["results"].update(documents=7))
    key = str(other.relative_to(workspace))
    first = texts(features(workspace))
    app = features(workspace, run=key)
    assert ("over 7 documents" in first) != ("over 40 documents" in first)
    assert "over 7 documents" in texts(app)
    app = features(workspace, run=ACTIVITY, layer="1", feature="62")
    assert "of 40 documents" in texts(app)


# What is missing or damaged -------------------------------------------------------------------


def test_counts_without_activity_are_listed(workspace, features, truth):
    shutil.rmtree(workspace / "activity")
    app = features(workspace)
    counted = int(truth["either"].sum())
    assert f"{counted} of {counted} features match." in texts(app)
    assert shown(app)["density, %"].isna().all()
    assert "resa-lens activity --model synthetic --saes" in commands(app)
    app = features(workspace, layer="1", feature="62")
    assert "Activity was not measured here" in texts(app)
    assert "survives" in marked_up(app)


def test_activity_without_counts_opens_on_thinking_features(workspace, features, truth):
    for folder in ("counts", "falsified"):
        shutil.rmtree(workspace / folder)
    app = features(workspace)
    assert app.selectbox(key="phase").value == "twice as dense in thoughts"
    held = shown(app)
    assert len(held)
    assert (held["in thoughts"] > 2 / 3).all()
    app.selectbox(key="rule").set_value("either").run()
    assert "resa-lens count-features" in commands(app)


def test_empty_missing_and_foreign_workspaces(tmp_path, features, workspace):
    assert "There is no workspace" in texts(features(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    app = features(tmp_path / "empty")
    assert "holds no finished run" in texts(app)
    assert "resa-lens demo" in commands(app)
    for folder in ("activity", "counts"):
        shutil.rmtree(workspace / folder)
    app = features(workspace)
    assert "neither counted nor measured" in texts(app)
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
        for element in app.get("html"):
            assert _Tags(element.proto.body).seen <= {"style", "div", "span", "class", "title"}
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


# The shipped workspace, and what is loaded ----------------------------------------------------


def test_the_shipped_workspace_has_features(features):
    root = data_path("workspace")
    before = state(root)
    app = features(root)
    held = shown(app)
    assert len(held) > 10
    layer, feature = pairs(held)[0]
    app = features(root, layer=str(layer), feature=str(feature))
    assert "Fires at" in texts(app)
    assert "Why: " in texts(app)
    assert any("Document" in h.proto.body for h in app.get("html"))
    assert state(root) == before


def test_the_page_loads_no_torch():
    code = (
        "import sys; from resa_lens.app import features_page, feature_view; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_score_is_refused_by_the_data(made):
    with pytest.raises(KeyError):
        select(source_of(made), Query(score="none such"))
    with pytest.raises(BadInputError, match="nothing to download"):
        as_csv(select(source_of(made), Query(find="none such")))
