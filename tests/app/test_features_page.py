"""The table of features and the ways through it, by AppTest."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pandas as pd
import pyarrow.parquet as pq
import pytest
from app_driver import clickable_markup, edit, marked_up, state, texts
from features_driver import SMALL, commands, listed, pairs, shown, source_of
from synthetic_workspace import (
    ACTIVITY,
    COUNTS,
    PLANTED,
    SLUG,
    TOKENS,
    write_workspace,
)

from resa_lens.app.features import data as features_data
from resa_lens.app.features import table as features_table
from resa_lens.app.features.table import Query, as_csv, page_of, select
from resa_lens.artifacts import feature_tables
from resa_lens.errors import BadInputError
from resa_lens.resources import data_path


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
    values = found.rows[order].to_numpy()[found.index]
    steps = values[1:] - values[:-1]
    assert (steps >= 0).all() if reverse else (steps <= 0).all()
    assert found.matching == len(truth)
    page = page_of(source_of(made), Query(order=order, reverse=reverse), 200)
    assert pairs(page) == listed(found)[200 : 200 + features_table.PAGE]
    if order != "thoughts":
        ends = truth[order].min() if reverse else truth[order].max()
        assert values[0] == pytest.approx(ends, rel=1e-6)


def test_says_how_many_are_shown_and_lets_all_be_downloaded(made, features, truth):
    app = features(made, rule="every feature")
    assert "4,500 of 4,500 features match." in texts(app)
    assert "rows 1 to 200 of 4,500" in texts(app)
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
    assert (2, 70) in listed(found)
    page = page_of(source, Query(layer=2, find=spread))
    assert dict(zip(page["feature"], page["found in"], strict=True))[70] == "examples"
    assert list(page_of(source, Query(find=PLANTED.token))["found in"]) == ["both"]
    # The tokens that are raised are no text: nothing is found over two of them.
    raised = features_data.activity(source, 2, 70).row["top_tokens"]
    over = select(source, Query(layer=2, find=raised[0] + raised[1]))
    assert (2, 70) not in listed(over)


def test_many_layers_are_searched_in_what_they_raise_alone(made, monkeypatch):
    monkeypatch.setattr(feature_tables, "TEXT_GROUPS", 1)
    query = Query(find="zebra", reverse=True)
    source = source_of(made)
    assert list(page_of(source, query)["found in"]) == ["raises"]
    assert any("choose a layer" in note for note in select(source, query).notes)


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


# Its pages ------------------------------------------------------------------------------------


def test_a_long_table_is_paged_by_the_address(made, features):
    whole = listed(select(source_of(made), Query()))
    app = features(made, rule="every feature", sort="layer and feature", page="3")
    assert "rows 401 to 600 of 4,500" in texts(app)
    assert pairs(shown(app)) == whole[400:600]
    # The last page is short, and its rows open their own features.
    app = features(made, rule="every feature", sort="layer and feature", page="23")
    assert "rows 4,401 to 4,500 of 4,500" in texts(app)
    assert pairs(shown(app)) == whole[4400:]
    # A feature has its neighbours in the whole list: the next page's first one, too.
    layer, feature = whole[199]
    app = features(made, rule="every feature", sort="layer and feature", page="1")
    app.text_input(key="features-open").set_value(f"{layer}:{feature}").run()
    app.button(key="to-next").click().run()
    assert (app.query_params["layer"], app.query_params["feature"]) == tuple(map(str, whole[200]))


@pytest.mark.parametrize(
    "change",
    [
        lambda app: app.selectbox(key="verdict").set_value("not tested"),
        lambda app: app.selectbox(key="features-layer").set_value(1),
        lambda app: app.toggle(key="reverse").set_value(True),
        lambda app: app.text_input(key="find").set_value("word1"),
        # What is left has fewer pages than the one that was open.
        lambda app: app.selectbox(key="rule").set_value("either"),
        lambda app: app.text_input(key="find").set_value("word77"),
    ],
)
def test_a_filter_goes_back_to_the_first_page(made, features, change):
    app = features(made, rule="every feature", page="7")
    assert "rows 1,201 to 1,400 of" in texts(app)
    change(app).run()
    assert "rows 1 to " in texts(app)
    assert "cannot be shown" not in marked_up(app)


@pytest.mark.parametrize(
    "page", ["0", "-1", "24", "x", "", "1.5", "9" * 5000, "<img src=x>", "1e3"]
)
def test_a_page_that_is_none_is_said(made, features, page):
    app = features(made, rule="every feature", page=page)
    assert "The address names page" in texts(app)
    assert "there is 1 to 23" in texts(app)
    assert "rows 1 to 200 of 4,500" in texts(app)
    app.toggle(key="reverse").set_value(True).run()
    assert "The address names page" not in texts(app)


def test_a_short_table_has_no_pages(made, features):
    app = features(made)
    assert "rows 1 to" not in texts(app)
    app = features(made, page="7")
    assert "The address names page '7'; there is 1 to 1." in texts(app)
    assert len(shown(app)) > 1


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
    app = features(made, show="2nd:62")
    assert app.subheader[0].value.startswith("Feature 62, layer 1")
    assert (app.query_params["layer"], app.query_params["feature"]) == ("2nd", "62")
    assert "show" not in app.query_params
    app = features(made, show="<b>")
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
    near = app.button(key="near-this SAE-0")
    neighbour = near.label.split()[1]
    near.click().run()
    assert app.query_params["feature"] == neighbour
    assert app.subheader[0].value.startswith(f"Feature {neighbour}, layer 2")
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
        (
            {"run": "activity/none/such"},
            "The address names run 'activity/none/such', which is not in this workspace",
        ),
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


# Where a part is missing ---------------------------------------------------------------------


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
    assert 'title="document' in clickable_markup(app, "examples-text")
    assert state(root) == before


def test_the_page_loads_no_torch():
    code = (
        "import sys; from resa_lens.app.features import page, view; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_score_is_refused_by_the_data(made):
    with pytest.raises(KeyError):
        select(source_of(made), Query(score="none such"))
    with pytest.raises(BadInputError, match="nothing to download"):
        as_csv(select(source_of(made), Query(find="none such")))
