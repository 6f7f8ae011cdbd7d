"""Lists of features by their address, and the addresses that the page offers."""

from __future__ import annotations

import shutil
from urllib.parse import parse_qs, urlsplit

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from app_driver import HOSTILE, marked_up, texts
from features_driver import SMALL, commands, pairs, shown, source_of
from synthetic_workspace import ACTIVITY, PLANTED, write_workspace

from resa_lens.app.features.lists import MOST, parse
from resa_lens.artifacts.notes import VARIABLE, Note, write_notes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A workspace that no test changes."""
    return write_workspace(tmp_path_factory.mktemp("lists") / "workspace", SMALL)


@pytest.fixture
def features(open_page):
    return lambda root, **query: open_page(root, "features", **query)


def addresses(app) -> list[dict[str, str]]:
    """The queries of the links that are shown."""
    queries = [urlsplit(code.value).query for code in app.code if "list=" in code.value]
    return [{key: values[0] for key, values in parse_qs(query).items()} for query in queries]


def test_a_list_is_shown_in_its_order_whatever_the_filters_are_by_default(made, features):
    app = features(made, list="2:20,0:7,1:1499")
    assert "A list of 3 features, by its link." in texts(app)
    assert "3 of 3 features match." in texts(app)
    assert pairs(shown(app)) == [(2, 20), (0, 7), (1, 1499)]
    assert "cannot be shown" not in marked_up(app)
    # A filter that is chosen narrows it.
    app = features(made, list="2:20,0:7,1:1499", layer="0")
    assert pairs(shown(app)) == [(0, 7)]
    app = features(made, list="2:20,0:7,1:1499", rule="either")
    assert pairs(shown(app)) == [(0, 7)]
    assert "1 of 3 features match." in texts(app)
    app = features(made, list="2:20,0:7,1:1499", reverse="true")
    assert pairs(shown(app)) == [(1, 1499), (0, 7), (2, 20)]
    app = features(made, list="2:20,0:7,1:1499", sort="layer and feature")
    assert pairs(shown(app)) == [(0, 7), (1, 1499), (2, 20)]


def test_the_next_feature_is_the_lists_and_back_is_the_list(made, features):
    app = features(made, list="2:20,0:7")
    app.query_params["layer"], app.query_params["feature"] = "2", "20"
    app.run()
    assert "Next feature in the list" in app.button(key="to-next").help
    app.button(key="to-next").click().run()
    assert app.query_params["feature"] == "7"
    app.button(key="to-list").click().run()
    assert pairs(shown(app)) == [(2, 20), (0, 7)]


def test_a_list_is_left_by_a_button(made, features):
    app = features(made, list="2:20")
    app.button(key="leave-list").click().run()
    texts(app)
    assert "list" not in app.query_params
    assert len(shown(app)) > 1


@pytest.mark.parametrize(
    ("text", "kept", "said"),
    [
        ("", [], "is empty"),
        (",, ,", [], "is empty"),
        ("x", [], "names 'x', which is no feature"),
        ("1:62,7", [(1, 62)], "names '7', which"),
        ("1:62,1:-3,3:1,1:1500", [(1, 62)], "names '1:-3' and 2 more"),
        ("1:62,1:62, 2nd:62", [(1, 62)], ""),
        ("1:99999999999999999999", [], "no feature"),
        (HOSTILE, [], "no feature"),
        ("1:62,\u202e1:2", [(1, 62)], "[U+202E]"),
        ("1:\u0661", [], "no feature"),
        ("9" * 100_000, [], "the others are left out"),
        (",".join(f"1:{n}" for n in range(300)), [(1, n) for n in range(MOST)], "200 features at"),
        ("0:5," * 90_000, [(0, 5)], "the others are left out"),
    ],
)
def test_what_is_no_feature_is_said_in_a_line(made, features, text, kept, said):
    listed = parse(text, source_of(made))
    assert list(listed.places) == kept
    assert said in listed.problem
    assert bool(said) == bool(listed.problem)
    assert len(listed.problem) < 400
    if len(text) < 3000:
        app = features(made, list=text)
        assert listed.problem in texts(app)
        assert "onerror" not in marked_up(app)
        if kept:
            assert pairs(shown(app))[:MOST] == kept
        else:
            assert "features match" in texts(app)


def test_a_listed_feature_that_never_fired_stands_with_zeros(made, features, tmp_path):
    root = shutil.copytree(made, tmp_path / "workspace")
    file = root / ACTIVITY / "features.parquet"
    rows = pq.read_table(file)
    pq.write_table(rows.filter(~((pc.field("layer") == 2) & (pc.field("feature") == 20))), file)
    frame = shown(features(root, list="2:20,0:7"))
    assert pairs(frame) == [(2, 20), (0, 7)]
    assert frame["density, %"][0] == 0 < frame["density, %"][1]


def test_the_link_to_the_selection_opens_the_selection(made, features):
    app = features(made, layer="1", one_based="true", find="zebra")
    wanted = pairs(shown(app).assign(**{"layer (1-based)": lambda f: f["layer (1-based)"] - 1}))
    (query,) = addresses(app)
    assert query["run"] == ACTIVITY
    assert query["one_based"] == "true"
    assert query["list"] == f"1:{PLANTED.feature}"
    assert pairs(shown(features(made, list=query["list"]))) == wanted
    # Of many the first stand in it, which is said.
    app = features(made, rule="every feature", sort="density")
    (query,) = addresses(app)
    assert query["list"].split(",") == [
        f"{layer}:{feature}" for layer, feature in pairs(shown(app))[:MOST]
    ]
    assert "The first 200 of 4,500" in marked_up(app)
    assert len(commands(app)) < 4000


def test_tags_have_a_link_each(made, features, tmp_path, monkeypatch):
    file, key = tmp_path / "notes.csv", source_of(made).notes_key
    monkeypatch.setenv(VARIABLE, str(file))
    nasty = f"a{HOSTILE}"
    write_notes(file, {
        (key, 2, 20): Note("x", tags=("mine", nasty)), (key, 0, 7): Note(tags=("mine",)),
        ("other", 0, 8): Note(tags=("mine",)),
    })  # fmt: skip
    app = features(made)
    assert "mine: 2 features" in texts(app)
    assert "onerror" not in marked_up(app)
    assert [query["list"] for query in addresses(app)][1:] == ["2:20", "0:7,2:20"]
    file.write_text("damaged")
    assert "other columns" in texts(features(made))
