"""Neighbours and counterparts on a feature's page: planted ones, missing and damaged SAEs."""

from __future__ import annotations

import re
import shutil
import time

import pytest
import torch
from app_driver import HOSTILE, edit, marked_up, state, texts
from features_driver import SMALL
from planted_neighbours import (
    TWIN,
    TWIN_ACTIVITY,
    add_saes,
    floor_of_a_decoder,
    write_decoder,
)
from synthetic_workspace import ACTIVITY, SAES, Size, write_workspace

LAYER, FEATURE = "1", "62"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A workspace that no test changes, and the counterparts of its features."""
    root = write_workspace(tmp_path_factory.mktemp("cards") / "workspace", SMALL)
    return root, add_saes(root, SMALL.layers, SMALL.latents, torch.float16)


@pytest.fixture
def workspace(planted, tmp_path):
    return shutil.copytree(planted[0], tmp_path / "workspace")


@pytest.fixture
def feature(open_page):
    def run(root, **query):
        query = {"run": ACTIVITY, "layer": LAYER, "feature": FEATURE, **query}
        return open_page(root, "features", **query)

    return run


def cards(app) -> dict[str, str]:
    """The text of each card, by the key of its button."""
    assert not app.exception
    keys = [button.key for button in app.button if str(button.key).startswith("near-")]
    bodies = [e.proto.body for e in app.get("html") if 'class="near"' in e.proto.body]
    plain = [re.sub("<[^>]*>", " ", body.partition("</style>")[2]) for body in bodies]
    # The tokens within a card bring their own style.
    assert len(keys) == len(bodies)
    return {key: " ".join(text.split()) for key, text in zip(keys, plain, strict=True)}


def test_a_counterpart_stands_beside_chance_and_opens_its_page(planted, feature):
    root, order = planted
    before = state(root)
    app = feature(root)
    shown = cards(app)
    groups = [key.split("-")[1] for key in shown]
    assert {name: groups.count(name) for name in dict.fromkeys(groups)} == {
        "this SAE": 4, "adjacent layers": 4, "other SAEs of this layer": 2, "recorded": 4
    }  # fmt: skip
    key = "near-other SAEs of this layer-0"
    assert app.button(key=key).label == f"Feature {order[62]}"
    # 1,500 directions of 64 dimensions: chance reaches less than a half.
    assert re.match(r"seed 1 \(twin\), layer 1 cosine 1\.00 , chance 0\.47", shown[key])
    assert "word" in shown[key]
    assert re.search(r"layer 0 cosine 0\.\d\d , chance 0\.47", shown["near-adjacent layers-0"])
    assert "match in cousin, layer 1 cosine 0.75 , chance unknown" in shown["near-recorded-0"]
    assert app.button(key="near-recorded-0").disabled
    assert "cannot be shown" not in marked_up(app)
    app.button(key=key).click().run()
    assert app.subheader[0].value.startswith(f"Feature {order[62]}, layer 1")
    assert (app.query_params["run"], app.query_params["feature"]) == (
        TWIN_ACTIVITY, str(order[62])
    )  # fmt: skip
    assert "seed 0" in cards(app)[key]
    assert app.button(key=key).label == "Feature 62"
    assert state(root) == before


def test_the_examples_come_before_the_cards(planted, feature):
    app = feature(planted[0])
    headings = [element.value for element in app.subheader]
    assert headings.index("What it responds to") < headings.index("Neighbours and counterparts")


def test_layers_are_counted_as_the_page_counts(planted, feature):
    assert "layer 2 cosine" in cards(feature(planted[0], one_based="true"))["near-this SAE-0"]


def test_a_damaged_sae_leaves_the_rest_and_says_why(workspace, feature):
    whole = cards(feature(workspace))
    file = workspace / TWIN / "layers.1.mlp" / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-300])
    shutil.rmtree(workspace / SAES / "layers.0.mlp")
    app = feature(workspace)
    rest = cards(app)
    said = texts(app)
    assert f"{file} is truncated: W_dec ends beyond it" in said
    assert "layers.0.mlp has no sae.safetensors" in said
    assert len(rest) == len(whole) - 4
    assert "layer 2 cosine" in rest["near-adjacent layers-0"]
    assert "Fires at" in said


def test_cards_stay_with_the_run_that_is_viewed(workspace, feature):
    older = ACTIVITY + "-older"
    shutil.copytree(workspace / ACTIVITY, workspace / older)
    created = {"created": "2020-01-01T00:00:00+00:00"}
    edit(workspace / older / "manifest.json", lambda m: m.update(created))
    app = feature(workspace, run=older)
    app.button(key="near-adjacent layers-0").click().run()
    assert (app.query_params["run"], app.query_params["layer"]) == (older, "0")


def test_a_damaged_table_of_activity_is_said_once_below_the_cards(workspace, feature):
    whole = cards(feature(workspace))
    for run in (ACTIVITY, TWIN_ACTIVITY):
        (workspace / run / "features.parquet").write_bytes(b"x")
    app = feature(workspace)
    assert list(cards(app)) == list(whole)
    said = [text.value for text in app.text if "missing or damaged" in text.value]
    # Of the run that is viewed the page says it above too; three of the decoders are of that run.
    runs = [text.partition("/features.parquet")[0] for text in said]
    assert runs == [str(workspace / run) for run in (ACTIVITY, ACTIVITY, TWIN_ACTIVITY)]


def test_without_the_saes_the_tables_neighbours_stand(workspace, feature):
    shutil.rmtree(workspace / SAES)
    app = feature(workspace)
    shown = cards(app)
    assert "layer 1 cosine 0.50 , chance unknown" in shown["near-this SAE-0"]
    assert f"the SAEs {SAES} are not in this workspace" in texts(app)


def test_hostile_names_are_text(workspace, feature):
    for name in ("there", "back"):
        file = next((workspace / "matches").rglob(name)) / "manifest.json"
        edit(file, lambda m: m["results"].update(models=[HOSTILE, HOSTILE]))
    app = feature(workspace)
    assert "&lt;img src=x" in cards(app)["near-recorded-0"]
    assert all("<img" not in e.proto.body for e in app.get("html"))


def test_a_feature_that_never_fired_has_counterparts_too(workspace, feature):
    shutil.rmtree(workspace / ACTIVITY)
    counted = "counts/synthetic-5e5e5e5e/run"
    app = feature(workspace, run=counted, feature="7")
    assert "Activity was not measured here" in texts(app)
    assert app.button(key="near-this SAE-0").disabled
    assert "cosine" in cards(app)["near-other SAEs of this layer-0"]


@pytest.mark.slow
def test_a_click_stays_under_a_second_at_the_size_that_the_issue_names(tmp_path, feature):
    """65,536 latents x 1,536 in bfloat16: CPU time of a page that nobody opened before.

    Three decoders are read for it.  Held to the floor of one on the same machine, which is 0.2 s
    where other work runs; 0.63 s and 0.115 s on a quiet machine, 4.1 floors on a busy one.
    """
    root = write_workspace(tmp_path / "workspace", Size(layers=3, latents=65_536))
    for layer in range(3):
        write_decoder(root / SAES / f"layers.{layer}.mlp", torch.randn(65_536, 1536).bfloat16())
    app = feature(root)
    fastest, floor = 99.0, 99.0
    for number in range(3):
        app.query_params["feature"] = str(100 + number)
        began = time.process_time()
        app.run()
        fastest = min(fastest, time.process_time() - began)
        floor = min(floor, floor_of_a_decoder())
    assert len(cards(app)) == 8
    print(f"a click {fastest:.2f} s, a decoder's floor {floor:.2f} s of CPU")
    assert fastest < 9 * floor
