"""The overview: the answers first, what came from what, and what is missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from app_driver import HOSTILE, edit, manifest_of, marked_up, state, texts

from resa_lens.app.overview import page as overview_page
from resa_lens.artifacts import lineage
from resa_lens.artifacts.listing import scan
from resa_lens.artifacts.workspace import MANIFEST, Manifest, Workspace
from resa_lens.resources import data_path

SHIPPED = data_path("workspace")
MODEL = "tiny-reasoner-459a3904"
COUNTS = f"counts/{MODEL}/mlp_out-9a4bb908aea5"


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A copy of the shipped workspace without what is large, to be damaged."""
    target = tmp_path / "w"
    skip = shutil.ignore_patterns("*.safetensors", "sweeps", "features.parquet")
    shutil.copytree(SHIPPED, target, ignore=skip)
    return target


def states(app) -> dict[str, str]:
    table = next(f.value for f in app.dataframe if "stage" in f.value)
    return dict(zip(table["stage"], table["state"], strict=True))


def test_the_answers_stand_first_and_nothing_is_written(open_page):
    before = state(SHIPPED)
    app = open_page(SHIPPED, "overview")
    shown = texts(app)
    manifest = json.loads(manifest_of(SHIPPED, "falsified").read_text())
    row = max(manifest["results"]["summary"]["rules"], key=lambda row: row["counted"])
    assert f"{row['survivors']} of {row['counted']}" in [metric.value for metric in app.metric]
    assert "12 layers; weights 459a3904" in shown
    verdict = json.loads(manifest_of(SHIPPED, "recommendations").read_text())["results"]["verdict"]
    assert f"(verdict: {verdict}, rule all)" in shown
    assert "A place to try: layer 5 (0-based; 6th of 12)" in shown
    assert "n = 500" in shown
    assert "control noise:" in shown
    assert manifest["results"]["summary"]["reason"] in shown
    # Before all details: one sentence, and four numbers with their intervals.
    sentence = app.subheader[0].value.replace("\\", "")
    assert sentence.startswith("tiny-reasoner: no layer stands out by its features at the think t")
    assert f"none of {row['counted']} counted features stands" in sentence
    numbers = {metric.label: metric.value for metric in app.metric}
    # Both may have moved from the base: the difference between them stands there too.
    assert list(numbers) == [
        "Accuracy, untuned", "Features that stand", "Tuned minus untuned", "Tuned minus noise",
    ]  # fmt: skip
    assert all(re.fullmatch(r"[+-]\d+\.\d points", text) for text in list(numbers.values())[2:])
    assert shown.count("95 % ") == 4
    assert [h.value for h in app.subheader][1] == "What to do next"
    assert state(SHIPPED) == before


def test_every_stage_of_the_shipped_workspace_is_done(open_page):
    app = open_page(SHIPPED, "overview")
    assert all(said.startswith("done") for said in states(app).values())
    assert "Every stage is done for this model." in texts(app)
    assert not app.code


def test_a_chosen_artifact_shows_its_manifest_and_its_relations(open_page):
    app = open_page(SHIPPED, "overview", artifact=COUNTS)
    assert app.selectbox(key="artifact").value == COUNTS
    shown = texts(app)
    assert "0 by rule all, 0 by rule any, 72 by rule either" in shown
    assert app.code[0].value.startswith("resa-lens recommend-layers --latents 1024")
    table = next(f.value for f in app.dataframe if "value" in f.value and "what" in f.value)
    rows = dict(zip(table["what"], table["value"], strict=True))
    assert rows["device"] == "cpu, float32, 1 thread(s)"
    assert "torch 2.13.0" in rows["versions"]
    assert rows["folder"].endswith(COUNTS)
    settings = next(f.value for f in app.dataframe if "setting" in f.value)
    assert "count.open_tag" in settings["setting"].tolist()
    assert "Open in Layers" in [link.label for link in app.get("page_link")]
    related = {button.label.replace("\\", ""): button for button in app.button}
    assert any(label.startswith("falsification") for label in related)
    (above,) = (b for label, b in related.items() if label.startswith("SAEs: 1,024 latents"))
    above.click().run()
    assert app.selectbox(key="artifact").value.startswith("saes/")
    assert "sparse autoencoders" in texts(app).lower()


def test_choosing_by_keyboard_and_by_a_click_do_the_same(open_page, monkeypatch):
    app = open_page(SHIPPED, "overview")
    app.selectbox(key="artifact").select(COUNTS).run()
    by_choice = texts(app)
    assert "active at the think tags" in by_choice
    session = {
        "lineage": {"selection": {"points": [{"customdata": [COUNTS]}]}},
    }
    monkeypatch.setattr(overview_page.st, "session_state", session)
    overview_page._clicked()
    assert session["artifact"] == COUNTS
    session["lineage"]["selection"]["points"] = []
    overview_page._clicked()
    assert session["artifact"] == COUNTS


def test_what_is_missing_has_its_command(held: Path, open_page):
    shutil.rmtree(held / "falsified")
    shutil.rmtree(held / "saes")
    (held / "activity" / MODEL / ".work-x" / "checkpoint-7").mkdir(parents=True)
    shutil.rmtree(manifest_of(held, "activity").parent)
    app = open_page(held, "overview")
    found = states(app)
    assert found["SAEs"] == "missing"
    assert found["Falsification"] == "missing"
    assert found["Activity"] == "unfinished (step 7)"
    assert "Not tested yet." in texts(app)
    commands = [code.value for code in app.code]
    assert f"resa-lens falsify --model tiny-reasoner --workspace {held}" in commands
    assert any(command.startswith("resa-lens sweep --model") for command in commands)
    # The counts' parent is drawn hollow; chosen, it says how it is made.
    options = app.selectbox(key="artifact").options
    missing = next(name for name in options if name.startswith("missing: saes/"))
    app.selectbox(key="artifact").set_value(missing.removeprefix("missing: ")).run()
    assert "not in this workspace" in texts(app)
    assert any("train-saes --model tiny-reasoner --latents 1024" in c.value
               or "--latents 1024" in c.value for c in app.code)  # fmt: skip


@pytest.mark.parametrize("kind", ["recommendations", "falsified", "adapters", "counts", "evals"])
def test_results_of_another_version_hide_nothing_else(held: Path, open_page, kind: str):
    for file in (held / kind).rglob(MANIFEST):
        edit(file, lambda manifest: manifest.update(results={"summary": 7, "layers": "no"}))
    app = open_page(held, "overview")
    assert "What is done and what is missing" in marked_up(app)
    assert not app.exception
    for node in lineage.build(scan(held)).nodes:
        if node.key.startswith(kind):
            app.selectbox(key="artifact").set_value(node.key).run()
            assert not app.exception


def test_damaged_answers_are_said_in_their_place(held: Path, open_page):
    for file in held.rglob("samples.parquet"):
        file.write_bytes(b"PAR1 broken")
    app = open_page(held, "overview")
    assert "samples.parquet was changed since it was written" in texts(app)
    assert "All runs" in marked_up(app)


def test_numbering_is_switched(open_page):
    app = open_page(SHIPPED, "overview")
    app.toggle(key="one_based").set_value(True).run()
    runs = next(f.value for f in app.dataframe if "CPU seconds" in f.value)
    assert "layer 6" in runs["what"].tolist()


def test_text_from_files_stays_text(tmp_path: Path, open_page):
    space = Workspace(tmp_path / "w")
    made = Manifest(
        kind="counts", config={}, command=["resa-lens", HOSTILE],
        results={"model": HOSTILE, "n_layers": 2, "site": HOSTILE, "warnings": [HOSTILE],
                 "layers": [{"layer": 0, "all": 1, "any": 1, "either": 1}]},
        hashes={"weights": "0" * 64},
    )  # fmt: skip
    with space.artifact(space.path("counts", "m-00000000", "r"), made):
        pass
    app = open_page(tmp_path / "w", "overview", artifact="counts/m-00000000/r")
    shown = texts(app)
    assert HOSTILE in shown
    assert HOSTILE not in marked_up(app)
    assert shown.count("warning") == 0
    labels = [link.label for link in app.get("page_link")] + [b.label for b in app.button]
    assert not any("**bold**" in label or ":red[" in label for label in labels)
    assert overview_page.plain("**b** [x](y) :red[z]") == (
        r"\*\*b\*\* \[x\]\(y\) \:red\[z\]"
    )  # fmt: skip


def test_the_demo_and_a_workspace_under_way(demo, open_page):
    app = open_page(demo.workspace, "overview")
    found = states(app)
    assert found["SAEs"].startswith("done")
    assert found["Tuning"].startswith("done")
    assert found["Sweep"] == "missing"
    paired = demo.result["tune"]["paired"]
    difference = f"{100 * paired['difference']:+.1f} points"
    assert difference in [metric.value for metric in app.metric]
