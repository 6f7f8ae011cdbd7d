"""Our engines inside lighteval; in an environment made by benchmarks/install_engine.sh."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip(
    "lighteval",
    reason="lighteval is not installed; benchmarks/install_engine.sh lighteval FOLDER makes its "
    "environment",
)
pytestmark = pytest.mark.recorded

from lighteval.tasks.lighteval_task import LightevalTask  # noqa: E402
from lighteval.tasks.registry import Registry  # noqa: E402

from resa_lens.artifacts.stage import Context  # noqa: E402
from resa_lens.artifacts.workspace import Workspace  # noqa: E402
from resa_lens.evals.benchmarks import BENCHMARKS  # noqa: E402
from resa_lens.evals.engines import Generation, GenerationConfig  # noqa: E402
from resa_lens.evals.lighteval import (  # noqa: E402
    METRIC,
    OURS,
    TASKS_TABLE,
    benchmark_doc,
    run_lighteval,
)
from resa_lens.evals.run import EvalConfig, ask  # noqa: E402
from resa_lens.evals.tasks import EvalItem, load_questions  # noqa: E402
from resa_lens.stages.scores import eval_run, load_eval_items  # noqa: E402

QUESTIONS = 500


def test_the_same_answers_as_without_it(tiny, tmp_path):
    config = EvalConfig(limit=QUESTIONS)
    items = load_eval_items("tiny", config)
    ctx = Context(Workspace(tmp_path))
    plain = eval_run(ctx, tiny, items, config).result
    run = eval_run(ctx, tiny, items, config, engine="lighteval")
    folder, inside = run.artifact.path, run.result
    assert inside.samples == plain.samples
    print(f"hf {plain.accuracy}, in lighteval {inside.accuracy}, its metric {inside.peer}")
    # Its metric reads an answer elsewhere than ours does: near, and every difference is listed.
    assert inside.peer["differing"] <= 0.02 * QUESTIONS
    assert abs(inside.peer["accuracy"] - plain.accuracy) <= 0.02
    (results,) = (folder / "lighteval" / "results").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["tiny|0"]
    assert found[METRIC] == pytest.approx(inside.peer["accuracy"])
    assert found[OURS] == pytest.approx(plain.accuracy)
    (details,) = (folder / "lighteval" / "details").rglob("details_*.parquet")
    assert len(pq.read_table(details)) == QUESTIONS


def scripted(asked, texts):
    return [Generation(texts[one.item.id][one.sample], (1,), 1, True) for one in asked]


def test_samples_letters_and_tasks_are_judged_one_by_one(tiny, tmp_path):
    options = "Which?\n\nA) a\nB) b\nC) c\nD) d"
    items = [
        EvalItem("n0", "1+1?", "2", task="math500"),
        EvalItem("n1", "Half?", "\\frac{1}{2}", task="math500"),
        EvalItem("c0", options, "C", task="gpqa-diamond", choice=True),
    ]
    texts = {
        "n0": [" so </think> the answer is $\\boxed{2}$", " so </think> $\\boxed{3}$"],
        "n1": [" </think> $\\boxed{0.5}$", " </think> $\\boxed{\\frac{2}{4}}$"],
        "c0": [" A? </think> Answer: C", " C? </think> Answer: A"],
    }
    generation = GenerationConfig(temperature=0.6)
    asked = ask(items, EvalConfig(samples=2, generation=generation))
    states = random.getstate(), np.random.get_state()[1].copy()
    loaders = Registry.load_all_task_configs, LightevalTask.download_dataset_worker
    answers, peer = run_lighteval(
        lambda all_asked: scripted(all_asked, texts), asked, generation, tmp_path,
        name="scripted", tokenizer=tiny.tokenizer,
    )  # fmt: skip
    assert [a.text for a in answers] == [t for pair in texts.values() for t in pair]
    assert (peer["differing"], peer["accuracy"]) == (0, pytest.approx(4 / 6))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert (Registry.load_all_task_configs, LightevalTask.download_dataset_worker) == loaders


def test_a_difference_of_the_two_gradings_shows(tiny, tmp_path):
    """Ours takes the answer's line whole; lighteval finds a number anywhere in it."""
    asked = ask([EvalItem("d", "1+1?", "2")], EvalConfig())
    texts = {"d": [" </think> <answer> Answer: it may be 2 or so </answer>"]}
    _, peer = run_lighteval(
        lambda all_asked: scripted(all_asked, texts), asked, GenerationConfig(), tmp_path,
        name="scripted", tokenizer=tiny.tokenizer,
    )  # fmt: skip
    assert (peer["differing"], peer["only_lighteval"], peer["only_resa_lens"]) == (1, 1, 0)
    assert peer["examples"][0]["id"] == "d"


def test_benchmarks_are_lighteval_tasks_that_ask_what_we_ask(tmp_path):
    assert [t.name for t in TASKS_TABLE] == [f"resa_{name}" for name in BENCHMARKS]
    for task, benchmark in zip(TASKS_TABLE, BENCHMARKS.values(), strict=True):
        assert (task.hf_repo, task.hf_subset) == (benchmark.repo, benchmark.subset)
    row = {
        "Question": "Which?", "Correct Answer": "right", "Incorrect Answer 1": "x",
        "Incorrect Answer 2": "y", "Incorrect Answer 3": "z",
    }  # fmt: skip
    rows = tmp_path / "gpqa.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    (item,) = load_questions("gpqa-diamond", place=str(rows))
    doc = benchmark_doc(BENCHMARKS["gpqa-diamond"], row)
    assert (doc.query, "ABCD"[doc.gold_index]) == (item.query, item.answer)


def test_a_table_of_rows_through_lightevals_own_loader(tmp_path):
    """The task definitions work on a local folder as on the hub."""
    (tmp_path / "set").mkdir()
    rows = [{"problem": f"{i}+1?", "answer": str(i + 1)} for i in range(5)]
    (tmp_path / "set" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    table = {task.name: task for task in TASKS_TABLE}
    config = replace(table["resa_math500"], hf_repo=str(tmp_path / "set"))
    docs = LightevalTask(config).get_docs()
    assert sorted(doc.get_golds()[0] for doc in docs) == [f"${i + 1}$" for i in range(5)]
