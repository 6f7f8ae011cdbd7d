"""The prompt lab through AppTest, on the workspace that ships; the model runs in a real worker."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from app_driver import (
    HOSTILE,
    clickable_markup,
    edit,
    manifest_of,
    marked_up,
    reseal,
    state,
    texts,
)
from streamlit.testing.v1 import AppTest

from resa_lens.app.lab import changes as lab_changes
from resa_lens.app.lab import data as lab_data
from resa_lens.app.lab import jobs
from resa_lens.errors import BadInputError
from resa_lens.jobs.children import Worker
from resa_lens.resources import data_path

BUNDLED = data_path("workspace")


@pytest.fixture(scope="module")
def worker():
    """One for all: loading the model takes seconds."""
    process = Worker(jobs.WORKER)
    yield process
    process.close()


@pytest.fixture
def lab(open_page, monkeypatch, worker):
    """`lab()` opens the page; with `process` another worker than the real one."""

    def open_lab(workspace=BUNDLED, process=worker, **query: str) -> AppTest:
        monkeypatch.setattr(jobs, "worker", lambda: process)
        return open_page(workspace, "lab", **query)

    return open_lab


def working(app: AppTest) -> bool:
    return any(button.label == "Stop" for button in app.button)


def settled(app: AppTest) -> AppTest:
    until = time.monotonic() + 300
    while working(app) and time.monotonic() < until:
        time.sleep(0.05)
        app.run()
    assert not working(app)
    assert not app.exception
    return app


def click(app: AppTest, key: str) -> AppTest:
    return settled(app.button(key=key).click().run())


def commands(app: AppTest) -> str:
    return "\n".join(code.value for code in app.code)


def shown_tokens(app: AppTest) -> str:
    fixed = "\n".join(element.proto.body for element in app.get("html"))
    return f"{fixed}\n{clickable_markup(app)}"


def answer(app: AppTest) -> dict:
    return app.session_state["lab-requests"]["respond"].result["document"]


# On the bundled model


def test_a_question_its_answer_and_its_features(lab, worker):
    before = state(BUNDLED)
    file = next(BUNDLED.rglob("features.parquet"))
    table = pq.read_table(file, columns=["layer", "feature", "density"])
    rows = [row for row in table.to_pylist() if row["layer"] == 5]
    densest = max(rows, key=lambda row: row["density"])["feature"]
    app = lab(layer="5", feature=str(densest))
    assert "Problem: " in texts(app)
    assert not app.get("html")
    app = click(app, "generate")
    question = next(
        row for row in lab_data.questions() if row["question"] == app.text_area(key="prompt").value
    )
    document = answer(app)
    right = document["answer"] == question["answer"]
    assert document["correct"] is right
    verdict = "right" if right else f"wrong, it is {question['answer']}"
    shown = texts(app)
    assert f"Answer: {document['answer']} ({verdict})" in shown
    assert f"layer 5 (0-based; 6th of 12): feature {densest}; active at " in shown
    assert "border-bottom:3px solid" in shown_tokens(app)  # thoughts are marked
    assert "background:rgba(" in shown_tokens(app)
    # At the token stand the features of all layers, each by its share of its layer's activation.
    acts = app.session_state["lab-requests"]["layer"].result
    place = app.slider(key="token").value
    part = slice(acts["starts"][place], acts["starts"][place + 1])
    values, features = acts["values"][part], acts["features"][part]
    ranked = app.session_state["lab-requests"]["token"].result["features"]
    of_layer = [row for row in ranked if row["layer"] == 5]
    assert of_layer
    for row in of_layer:
        assert row["value"] == pytest.approx(values[features.index(row["feature"])], rel=1e-4)
        assert row["share"] == pytest.approx(row["value"] / sum(values), rel=1e-4)
    assert len({row["layer"] for row in ranked}) > 3
    assert [row["share"] for row in ranked] == sorted((r["share"] for r in ranked), reverse=True)
    links = [link.proto for link in app.get("page_link") if "show=" in link.proto.query_string]
    first = ranked[0]
    assert links[0].label == f"{first['layer']}:{first['feature']}"
    assert f"show={first['layer']}%3A{first['feature']}" in links[0].query_string
    assert "run=activity" in links[0].query_string
    # Another feature and another layer, by the number inputs.
    other = acts["features"][0]
    app.number_input(key="feature").set_value(other).run()
    assert f"feature {other}; active at " in texts(settled(app))
    app.number_input(key="layer").set_value(3).run()
    assert "layer 3 (0-based; 4th of 12): feature" in texts(settled(app))
    frame = next(f.value for f in app.dataframe if "activation" in f.value)
    assert list(frame["token"]) == document["tokens"]
    assert state(BUNDLED) == before
    # The second click is quick: the model is there.
    app = click(app, "another")
    began = time.process_time()
    click(app, "generate")
    assert time.process_time() - began < 5
    assert answer(app)["text"] != document["text"]


def test_all_counted_features_and_a_change(lab):
    app = click(lab(colour="counted features", prompt="What is 9+4?"), "generate")
    stored = json.loads(next(BUNDLED.glob("counts/*/*/features.json")).read_text())
    counted = {
        row["layer"]: row["features"]["either"]
        for row in stored["layers"]
        if row["features"]["either"]
    }
    number = sum(map(len, counted.values()))
    assert f"Sum of the activations of {number} features in {len(counted)} layers" in texts(app)
    assert f"layer 5: {', '.join(map(str, counted[5]))}" in texts(app)
    app.button_group(key="lab-rule").set_value("all").run()
    assert "Rule all counts no feature in these SAEs." in texts(settled(app))
    app.button_group(key="lab-rule").set_value("either").run()
    click(app, "take-coloured")
    assert lab_changes.parse(app.text_input(key="change").value) == counted
    app.text_input(key="change").set_value("5:978, 5:490").run()
    app.number_input(key="strength").set_value(8.0).run()
    click(app, "compare")
    shown = texts(app)
    result = app.session_state["lab-requests"]["change"].result["changed"]
    if result["first"] is None:
        assert "Both texts are the same, token for token." in shown
    else:
        assert f"differ from written token {result['first']} on" in shown
        assert 'class="peak"' in shown_tokens(app)
    assert f"under the change: {result['moved']['all']:+.3f} nats" in shown
    line = commands(app)
    for part in ("ablate --model tiny-reasoner --layer 5 --features 978,490", "--strength 8"):
        assert part in line
    assert str(BUNDLED / "saes") in line
    assert f"--workspace {BUNDLED}" not in line  # a scratch folder
    assert any("One prompt is an anecdote" in caption.value for caption in app.caption)
    app.number_input(key="strength").set_value(0.0).run()
    assert any("were changed since" in caption.value for caption in app.caption)
    click(app, "compare")
    assert "Both texts are the same, token for token." in texts(app)
    assert "+0.000 nats" in texts(app)
    app.number_input(key="strength").set_value(1.0).run()
    click(app, "compare-random")
    assert "different set(s) that come near" in texts(app) or "no random features" in texts(app)


def test_a_feature_at_a_token_is_switched_off_and_the_texts_stand_side_by_side(lab):
    app = click(lab(prompt="What is 9+4?", longest="40"), "generate")
    assert "Texts of this session" not in marked_up(app)
    app.session_state["token"] = 8  # as a click on it does
    app = settled(app.run())
    assert "At token 8 " in texts(app)
    row = app.session_state["lab-requests"]["token"].result["features"][0]
    app = click(app, f"off-{row['layer']}-{row['feature']}")
    change = app.session_state["lab-requests"]["change"].request
    assert change["targets"] == {str(row["layer"]): [row["feature"]]}
    assert change["how"] == {**change["how"], "kind": "ablate", "strength": 1.0, "value": None}
    app = settled(app)
    assert "Log-probability of the unchanged text" in texts(app)
    before, after = (job.request["ids"] for job in map(app.session_state["lab-requests"].get,
                                                       ("text-1", "text-2")))  # fmt: skip
    assert (before == after) == ("every feature has the same mean in both" in texts(app))
    # The first text and the changed one; then one of another prompt too.
    listed = next(f.value for f in app.dataframe if "tokens written" in f.value)
    assert list(listed["text"]) == [
        "What is 9+4? · tiny-reasoner",
        f"What is 9+4? · tiny-reasoner, ablate {row['layer']}:{row['feature']} x 1",
    ]
    app.text_area(key="prompt").set_value("What is 7*6?").run()
    app = settled(click(app, "generate"))
    jobs_held = app.session_state["lab-requests"]
    one, two = (jobs_held[f"text-{n}"] for n in (2, 3))
    differing = next(f.value for f in app.dataframe if "mean in 2" in f.value)
    best = differing.iloc[0]

    def mean(job, feature: int) -> float:
        pairs = zip(job.result["features"], job.result["values"], strict=True)
        return sum(v for f, v in pairs if f == feature) / len(job.request["ids"])

    assert best["mean in 2"] == pytest.approx(mean(one, best["feature"]))
    assert best["mean in 3"] == pytest.approx(mean(two, best["feature"]))
    for f in {*one.result["features"], *two.result["features"]}:
        gap = abs(mean(one, f) - mean(two, f))
        assert gap <= abs(best["mean in 2"] - best["mean in 3"]) + 1e-9


def test_hostile_text_is_shown_as_text(lab, tmp_path):
    app = click(lab(prompt=HOSTILE, raw="true", longest="4"), "generate")
    assert HOSTILE in texts(app)
    assert "<img" not in shown_tokens(app)
    assert "&lt;" in shown_tokens(app)
    assert "onerror" not in marked_up(app)
    shutil.copytree(BUNDLED / "counts", tmp_path / "counts")
    edit(manifest_of(tmp_path, "counts"), lambda m: m["results"].update(model=HOSTILE))
    app = click(lab(tmp_path, host=HOSTILE, prompt=HOSTILE), "generate")
    assert f"model {HOSTILE!r} not found" in texts(app)
    assert "onerror" not in marked_up(app)


def test_a_long_prompt_is_cut_with_a_word(lab):
    app = lab(prompt="x" * 50_000)
    assert "has 50,000 characters, and at most 20,000 are read" in texts(app)
    assert "characters" not in texts(lab(prompt="x" * 20_000))


def test_a_change_stands_where_no_random_features_come_near(lab, monkeypatch):
    sent = {"draws": lab_changes.DRAWS}
    result = {"changed": {}, "random_lacking": "no random features come near", "random": []}
    seen = []
    monkeypatch.setattr(lab_changes, "_side_by_side", lambda *parts: seen.append(parts))
    monkeypatch.setattr(lab_changes, "problem", seen.append)
    lab_changes.compared({"document": {}}, result, {}, sent["draws"])
    assert len(seen) == 2
    assert seen[1] == "Without random features beside it: no random features come near"


def test_wrong_layer_feature_and_list(lab):
    app = click(lab(layer="0", prompt="What is 9+4?", longest="6"), "generate")
    assert "There is no SAE at layer 0 (0-based; 1st of 12); these layers have one: 1, 2" in texts(
        app
    )
    app.number_input(key="layer").set_value(4).run()
    app.number_input(key="feature").set_value(5000).run()
    assert "no feature 5000; this SAE has features 0 to 1023" in texts(settled(app))
    app.text_input(key="change").set_value("4-17").run()
    assert "'4-17' is no feature; write layer:feature" in texts(settled(app))
    app.text_input(key="change").set_value("4:5000").run()
    click(app, "compare")
    assert "feature 5000 is out of range" in texts(app)
    app.text_area(key="prompt").set_value(" ").run()
    click(app, "generate")
    assert "the prompt is empty; type a question" in texts(app)


def test_values_of_another_page_do_not_stop_this_one(lab):
    app = lab(prompt="What is 9+4?", longest="6")
    for key, value in (("layer", "all"), ("feature", "7"), ("token", 10_000), ("saes", "gone")):
        app.session_state[key] = value
    app = click(app, "generate")
    assert app.number_input(key="feature").value == 7
    assert "feature 7" in texts(app)


# Without the model


STUB = """
import json, os, sys, time
from resa_lens.app.lab import worker

class Bench:
    def answer(self, do, values, tell):
        tell("writing", 1, 4, values.get("text", ""))
        if do == sys.argv[1]:
            time.sleep(60) if sys.argv[2] == "hang" else os.kill(os.getpid(), 9)
        document = {"ids": [1, 2], "tokens": ["a", "b"], "phases": ["prompt", "answer"],
                    "prompt_tokens": 1, "text": "b", "finished": True, "answer": "b",
                    "correct": None}
        model = {"name": sys.argv[3], "slug": sys.argv[3], "weights": sys.argv[4], "base": None,
                 "layers": 3, "width": 4, "device": "cpu", "dtype": "float32",
                 "notes": [sys.argv[3]]}
        return {"document": document, "prompt": "a", "model": model}

worker.Bench = Bench
worker.main([])
"""


@pytest.fixture
def stub():
    held = []

    def make(*how: str) -> Worker:
        held.append(Worker([sys.executable, "-c", STUB, *how]))
        return held[-1]

    yield make
    for each in held:
        each.close()


def test_stop_and_a_dead_worker(lab, stub):
    app = lab(process=stub("respond", "hang", "m", "0"), prompt=HOSTILE)
    app = app.button(key="generate").click().run()
    assert working(app)
    assert app.button(key="generate").disabled
    until = time.monotonic() + 20
    while HOSTILE not in texts(app).splitlines() and time.monotonic() < until:
        time.sleep(0.05)
        app.run()
    assert "writing" in texts(app)
    app.button(key="stop-respond").click().run()
    assert "Stopped." in texts(settled(app))
    assert not app.button(key="generate").disabled
    app = click(lab(process=stub("respond", "die", "m", "0")), "generate")
    assert "killed by SIGKILL; the machine may be out of memory" in texts(app)
    weights = json.loads(manifest_of(BUNDLED, "saes").read_text())["hashes"]["weights"]
    app = click(lab(process=stub("layer", "die", "m", weights)), "generate")
    assert "killed by SIGKILL" in texts(app)
    first = app.session_state["lab-requests"]["layer"]
    click(app, "again-layer")
    assert app.session_state["lab-requests"]["layer"] is not first
    assert "killed by SIGKILL" in texts(app)


def test_a_model_without_saes_names_the_command(lab, stub, tmp_path):
    app = click(lab(process=stub("none", "", HOSTILE, "0" * 64)), "generate")
    assert f"holds no SAEs of {HOSTILE}" in texts(app)
    assert "resa-lens train-saes --model tiny-reasoner" in commands(app)
    assert shown_tokens(app)  # the text is there all the same
    assert len(app.get("html")) == 2
    assert "onerror" not in marked_up(app)
    app = click(lab(tmp_path / "none", process=stub("none", "", "m", "1")), "generate")
    assert "resa-lens train-saes" in commands(app)
    assert not (tmp_path / "none").exists()


def test_damaged_saes_and_counts(lab, tmp_path):
    copy = tmp_path / "workspace"
    for kind in ("saes", "counts"):
        shutil.copytree(BUNDLED / kind, copy / kind)
    counts = next(copy.glob("counts/*/*/features.json"))
    counts.write_text(counts.read_text()[:100])
    reseal(counts)
    app = click(
        lab(copy, colour="counted features", prompt="What is 9+4?", longest="6"), "generate"
    )
    assert f"{counts} is damaged" in texts(app)
    shutil.rmtree(copy / "counts")
    assert "were not counted yet" in texts(settled(app.run()))
    assert "resa-lens count-features" in commands(app)
    for weights in copy.rglob("sae.safetensors"):
        weights.write_bytes(weights.read_bytes()[:200])
    app.radio(key="colour").set_value("one feature").run()
    app.number_input(key="layer").set_value(4).run()
    assert "sae.safetensors" in texts(settled(app))
    edit(manifest_of(copy, "saes"), lambda m: m["results"].pop("site"))
    assert "is damaged or of another version" in texts(settled(app.run()))


def test_models_at_hand(tmp_path):
    from resa_lens.artifacts.listing import scan

    named = lab_data.models(scan(str(BUNDLED)))
    assert named["tiny-reasoner"] == "tiny-reasoner"
    adapters = [name for name in named if name.startswith("adapters/")]
    assert len(adapters) == 2
    assert all(named[name] == str(BUNDLED / name) for name in adapters)
    assert lab_data.models(scan(str(tmp_path))) == {name: name for name in lab_data.BUNDLED}


def test_bundled_questions_are_those_of_evaluation():
    from resa_lens.evals.tasks import load_tasks

    known = {item.id: item for item in load_tasks("tiny")}
    mine = lab_data.questions()
    assert len(mine) == len(known)
    for row in mine:
        item = known[row["id"]]
        assert (row["question"], row["answer"]) == (item.question, item.answer)
    assert lab_data.question(f" {mine[7]['question']}\n") == mine[7]
    assert lab_data.question("What?") is None


def test_lists_of_features():
    assert lab_changes.parse("4:17, 4:33;6:2,4:17,") == {4: [17, 33], 6: [2]}
    assert lab_changes.parse(" ") == {}
    for wrong in ("4", "4:", "a:b", "4:-1", "4:1:2", HOSTILE):
        with pytest.raises(BadInputError, match="write layer:feature"):
            lab_changes.parse(wrong)


def test_the_page_imports_no_model_library():
    code = (
        "import sys, resa_lens.app.lab.page; "
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
