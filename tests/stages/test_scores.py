"""Scoring in a workspace: kept answers, engines, tasks, and the command."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import LOCK, Workspace
from resa_lens.cli import app
from resa_lens.errors import BadInputError, RunFailedError, TakenError
from resa_lens.evals.engines import Generation, GenerationConfig, HFEngine
from resa_lens.evals.engines.choice import check_engine
from resa_lens.evals.run import EvalConfig, read_samples
from resa_lens.files import run_lock
from resa_lens.machine.plans import HOUR, Trial
from resa_lens.models.host import load_model
from resa_lens.progress import Reporter
from resa_lens.resources import data_path
from resa_lens.stages import replicates, trials
from resa_lens.stages.scores import eval_run, load_eval_items, read_eval
from resa_lens.stages.trials import AnswersTrial

CONFIG = EvalConfig(limit=24, generation=GenerationConfig(temperature=0.8, batch_size=8))
ITEMS = load_eval_items("tiny", CONFIG)


class Notes(Reporter):
    def __init__(self) -> None:
        self.said = []

    def note(self, text: str) -> None:
        self.said.append(text)


def context(place, **options) -> Context:
    return Context(Workspace(place), Notes(), **options)


def works(place):
    return sorted(place.rglob(".work-*"))


@pytest.fixture
def breaking(tiny):
    """Make the bundled model fail at its n-th forward pass."""
    handles = []

    def install(passes: int) -> None:
        seen = [0]

        def count(*_) -> None:
            seen[0] += 1
            if seen[0] > passes:
                raise MemoryError("no more memory")

        handles.append(tiny.model.register_forward_pre_hook(count))

    def remove() -> None:
        while handles:
            handles.pop().remove()

    install.remove = remove
    yield install
    remove()


def test_after_a_crash_the_same_call_goes_on(tiny, breaking, tmp_path):
    whole = eval_run(context(tmp_path / "whole"), tiny, ITEMS, CONFIG).result
    place = tmp_path / "w"
    breaking(60)
    with pytest.raises(RunFailedError, match=r"after \d+ of 24 answers \(MemoryError: no more"):
        eval_run(context(place), tiny, ITEMS, CONFIG)
    breaking.remove()
    (work,) = works(place)
    kept = len((work / "answers.jsonl").read_bytes().splitlines()) - 1
    assert 0 < kept < 24
    assert not list(place.rglob("manifest.json"))
    ctx = context(place)
    run = eval_run(ctx, tiny, ITEMS, CONFIG)
    assert f"{kept} of 24 answers are there; going on" in ctx.reporter.said
    assert run.result.samples == whole.samples
    assert works(place) == []
    again = read_eval(ctx.workspace, run.artifact.path).result
    assert (again.accuracy, again.samples) == (whole.accuracy, whole.samples)


def test_an_error_before_the_first_answer_leaves_nothing(tiny, breaking, tmp_path):
    breaking(0)
    with pytest.raises(RunFailedError, match="after 0 of 24"):
        eval_run(context(tmp_path / "new"), tiny, ITEMS, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_force_forgets_kept_answers(tiny, breaking, tmp_path):
    breaking(60)
    with pytest.raises(RunFailedError):
        eval_run(context(tmp_path), tiny, ITEMS, CONFIG)
    breaking.remove()
    ctx = context(tmp_path, force=True)
    eval_run(ctx, tiny, ITEMS, CONFIG)
    assert not any("going on" in line for line in ctx.reporter.said)


def test_another_process_at_the_same_run_is_refused(tiny, breaking, tmp_path):
    breaking(60)
    with pytest.raises(RunFailedError):
        eval_run(context(tmp_path), tiny, ITEMS, CONFIG)
    breaking.remove()
    (work,) = works(tmp_path)
    with run_lock(work / LOCK, "answering"), pytest.raises(TakenError, match="is answering"):
        eval_run(context(tmp_path), tiny, ITEMS, CONFIG)
    assert works(tmp_path) == [work]


def test_runaway_answers_are_cut_and_counted(tiny, tmp_path):
    config = replace(CONFIG, generation=GenerationConfig(900, stop=(), timeout=0.05))
    ctx = context(tmp_path)
    run = eval_run(ctx, tiny, ITEMS[:3], config)
    result = run.result
    assert (result.timed_out, result.unfinished, result.accuracy) == (3, 3, 0.0)
    assert "3 of 3 answers took more than 0.05 s and count as wrong" in ctx.reporter.said
    assert read_eval(ctx.workspace, run.artifact.path).result.timed_out == 3


def test_a_run_is_what_it_was_made_from_and_not_how(tiny, tmp_path):
    ctx, asked = context(tmp_path), EvalConfig()

    def path(items=ITEMS[:2], config=asked, **options):
        return eval_run(ctx, tiny, items, config, **options).artifact.path

    first = path()
    # The questions count, not how they were chosen or called; nor the batch they are answered in.
    assert path(config=EvalConfig(limit=2, question_seed=3), source="mine.jsonl") == first
    assert path(config=replace(asked, generation=GenerationConfig(batch_size=1))) == first
    assert path(engine="hf") == first
    assert path(config=replace(asked, generation=GenerationConfig(timeout=600))) != first
    assert path(config=replace(asked, prompt_style="direct")) != first
    edited = [replace(ITEMS[0], answer="0"), ITEMS[1]]
    assert path(edited) != first


def test_another_chat_template_is_another_run(tiny, tmp_path, monkeypatch):
    ctx, asked = context(tmp_path), EvalConfig(limit=2, chat_template=True)
    first = eval_run(ctx, tiny, ITEMS[:2], asked).artifact.path
    assert eval_run(ctx, tiny, ITEMS[:2], asked).artifact.path == first
    text = tiny.tokenizer.chat_template
    monkeypatch.setattr(tiny.tokenizer, "chat_template", "Say it in short. " + text)
    second = eval_run(ctx, tiny, ITEMS[:2], asked).artifact.path
    assert second != first
    prompts = {read_samples(place / "samples.parquet")[0]["prompt"] for place in (first, second)}
    assert len(prompts) == 2


def test_threads_are_recorded(tiny, tmp_path):
    ctx = context(tmp_path)
    manifest = eval_run(ctx, tiny, ITEMS[:2], EvalConfig(limit=2)).artifact.manifest
    assert (manifest.threads, manifest.results["threads_probe"]) == (1, {})
    assert manifest.results["engine"] == "hf"


def test_a_wide_model_is_probed_once_and_keeps_its_threads(tiny, monkeypatch, tmp_path):
    calls = []

    def probe(engine, prompts, most):
        calls.append(most)
        return 1, {1: 0.5, 3: 4.0}

    monkeypatch.setattr("resa_lens.stages.scores.NARROW", 0)
    monkeypatch.setattr("resa_lens.stages.scores.probe_threads", probe)
    monkeypatch.setattr("resa_lens.stages.scores._PROBED", {})
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        ctx = context(tmp_path)
        manifest = eval_run(ctx, tiny, ITEMS[:2], EvalConfig(limit=2)).artifact.manifest
        eval_run(ctx, tiny, ITEMS[:1], EvalConfig(limit=1))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert calls == [3]
    assert "1 thread: 0.5 s with 1, 4.0 s with 3" in ctx.reporter.said
    assert (manifest.threads, manifest.results["threads_probe"]) == (1, {"1": 0.5, "3": 4.0})
    # What was asked for is not questioned.
    eval_run(context(tmp_path, threads=1), tiny, ITEMS[:3], EvalConfig(limit=3))
    assert calls == [3]


@pytest.mark.parametrize("engine", ["vllm", "lighteval"])
def test_an_engine_that_is_not_installed(monkeypatch, engine):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInputError, match=f"engine {engine} is not installed") as error:
        check_engine(engine)
    assert f"benchmarks/install_engine.sh {engine} .venv-{engine}" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
    check_engine("hf")
    with pytest.raises(BadInputError, match="'llama' is unknown; use hf, vllm, lighteval"):
        check_engine("llama")


def command(*args, code=0):
    done = CliRunner().invoke(app, ["eval", *map(str, args)])
    assert done.exit_code == code, (done.stderr, done.exception)
    return json.loads(done.stdout) if code == 0 else done.stderr


def test_several_tasks_by_command(tmp_path):
    rows = [{"problem": "Which is even?", "solution": "It is \\boxed{2}"}, {
        "problem": "Evaluate (10+2)*8-55.", "solution": "so \\boxed{41}"}]  # fmt: skip
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = command(
        "--tasks", f"{mine},tiny:families=count,math500={mine}", "--limit", 2, "--json",
        "--max-new-tokens", 80, "--workspace", tmp_path / "w",
    )  # fmt: skip
    assert found["n"] == 6
    assert {k: v["n"] for k, v in found["by_task"].items()} == {
        "mine": 2, "tiny": 2, "math500": 2, "tiny:count": 2,
    }  # fmt: skip
    rows = read_samples(tmp_path / "w" / found["folder"] / "samples.parquet")
    assert rows[-1]["prompt"].startswith("Problem: Solve the following math problem")


def test_the_papers_setting_by_command(tmp_path):
    found = command(
        "--setting", "paper", "--limit", 2, "--max-new-tokens", 60, "--json",
        "--workspace", tmp_path / "w",
    )  # fmt: skip
    manifest = json.loads((tmp_path / "w" / found["folder"] / "manifest.json").read_text())
    evaluated = manifest["config"]["eval"]
    assert evaluated["chat_template"] is True
    assert (evaluated["generation"]["temperature"], evaluated["generation"]["top_p"]) == (0.6, 0.95)
    assert evaluated["generation"]["max_new_tokens"] == 60  # given, so not the setting's


def test_replicates_of_greedy_answers_with_hf_have_no_noise(tmp_path):
    ctx, model = context(tmp_path), load_model("tiny-reasoner")
    run = eval_run(ctx, model, ITEMS[:3], CONFIG, replicates=3)
    noise = run.artifact.manifest.results["replicates"]
    assert noise == {"accuracies": [run.result.accuracy] * 3, "sd": 0.0, "flips": 0.0}
    # The noise stands in the results: an evaluation without it is another one, and each is kept.
    once = eval_run(ctx, model, ITEMS[:3], CONFIG)
    assert once.artifact.path != run.artifact.path
    assert "replicates" not in once.artifact.manifest.results
    assert once.result.accuracy == run.result.accuracy
    again = eval_run(ctx, model, ITEMS[:3], CONFIG, replicates=3)
    assert again.artifact.path == run.artifact.path


def test_a_replicate_that_is_finished_is_not_answered_again(tmp_path, monkeypatch):
    """Interrupted while the third of four is graded: only the fourth is left to answer."""
    model = load_model("tiny-reasoner")
    whole = eval_run(context(tmp_path / "whole"), model, ITEMS[:3], CONFIG, replicates=4)
    generate, score, drawn, graded = HFEngine.generate, replicates.score, [], []

    def counted(self, prompts, *args, **options):
        drawn.append(len(prompts))
        return generate(self, prompts, *args, **options)

    def interrupted(*args, **options):
        graded.append(1)
        if len(graded) == 2:
            raise KeyboardInterrupt
        return score(*args, **options)

    monkeypatch.setattr(HFEngine, "generate", counted)
    monkeypatch.setattr(replicates, "score", interrupted)
    ctx = context(tmp_path / "w", threads=1)
    with pytest.raises(KeyboardInterrupt):
        eval_run(ctx, model, ITEMS[:3], CONFIG, replicates=4)
    assert drawn == [3, 3, 3]
    assert "the same command goes on" in ctx.reporter.said[-1]
    drawn.clear()
    run = eval_run(context(tmp_path / "w", threads=1), model, ITEMS[:3], CONFIG, replicates=4)
    assert drawn == [3]
    assert run.result.samples == whole.result.samples
    results = (one.artifact.manifest.results["replicates"] for one in (run, whole))
    assert len({json.dumps(noise) for noise in results}) == 1
    assert works(tmp_path / "w") == []


def test_an_engine_that_answers_otherwise_has_its_noise_measured(tmp_path):
    """One answer of four is right in one replicate of three."""
    asked = [SimpleNamespace(prompt="", stream=(n,), key=(str(n), 0)) for n in range(4)]
    rounds = iter([[1, 0, 1, 1], [1, 0, 0, 1]])

    def graded(verdicts):
        return SimpleNamespace(seconds=0.0, samples=[{"correct": bool(r)} for r in verdicts])

    def generate(prompts, config, *, streams, answered):
        for number, right in enumerate(next(rounds)):
            answered(number, Generation(str(right), (right,), 1, True))

    engine = SimpleNamespace(generate=generate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            replicates, "score",
            lambda asked, answers, extraction: graded([answer.text == "1" for answer in answers]),
        )  # fmt: skip
        noise, seconds = replicates.replicate_noise(
            context(tmp_path), engine, asked, CONFIG, graded([1, 0, 0, 1]), 3,
            work=tmp_path / "work", settings={},
        )  # fmt: skip
    assert seconds > 0
    assert noise["accuracies"] == [0.5, 0.75, 0.5]
    assert noise["flips"] == 0.25
    assert noise["sd"] == pytest.approx(0.1443, abs=1e-4)


def test_long_answers_are_announced_in_hours_where_they_take_some(tmp_path, monkeypatch):
    """The engine that was not made for them tries a batch first; vllm, and a small rest, do not."""
    tried = []

    def trial(model, questions, config):
        tried.append(len(questions))
        return AnswersTrial(Trial(7.3 * HOUR, 7.3 * HOUR), 100.0, 10**6, True)

    monkeypatch.setattr(trials, "try_answers", trial)
    model = load_model("tiny-reasoner")
    model.model.config.max_position_embeddings = 40_000
    long = replace(CONFIG, generation=replace(CONFIG.generation, max_new_tokens=8192))
    ctx = context(tmp_path)
    run = eval_run(ctx, model, ITEMS[:2], long)
    (warned,) = [text for text in ctx.reporter.said if "warning" in text]
    assert "at most 7.3 hours with engine hf" in warned
    assert tried == [2]
    assert run.artifact.manifest.results["generated_by"].startswith("transformers 5.")
    short = context(tmp_path)
    eval_run(short, model, ITEMS[:2], CONFIG)
    assert tried == [2]
    assert not [text for text in short.reporter.said if "warning" in text]


def test_bad_input_by_command(tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(data_path("tiny-reasoner"), plain)
    (plain / "chat_template.jinja").unlink()
    empty = tmp_path / "empty.csv"
    empty.write_text("question,answer\n1+1?,2\n1+2?,\n")
    place = ("--workspace", tmp_path / "w")
    for args, says in (
        (("--model", plain, "--chat-template"), "the model has no chat template"),
        (("--tasks", empty), "row 2 (line 3), column answer: empty"),
        (("--setting", "best"), "'best' is unknown; use greedy or paper"),
        (("--tasks", "tiny:families=sums"), "family 'sums'"),
        (("--timeout", "0"), "--timeout 0"),
        (("--engine", "tgi"), "'tgi' is unknown"),
    ):
        said = command(*args, *place, code=2)
        error = said[said.index("error: ") :]
        assert says in error
        assert len(error.strip().splitlines()) <= 3
    assert not (tmp_path / "w").exists()


def save_adapter(folder, width):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=width, intermediate_size=352, num_hidden_layers=12,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    peft = get_peft_model(
        Qwen2ForCausalLM(config),
        LoraConfig(r=2, target_modules=["q_proj"]),
    )
    for name, value in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value.data)
    peft.save_pretrained(str(folder))
    return folder


def test_adapters_by_command(tmp_path):
    adapter = save_adapter(tmp_path / "fits", 128)
    options = ("--limit", 4, "--workspace", tmp_path / "w", "--json")

    def rows(*args):
        found = command(*args, *options)
        read = read_samples(tmp_path / "w" / found["folder"] / "samples.parquet")
        return [row["generation"] for row in read]

    base = rows()
    assert rows("--adapter", adapter) != base
    assert rows("--adapter", adapter, "--scale", 0) == base
    # An adapter's own name is the same model.
    assert rows("--model", adapter, "--base", "tiny-reasoner") == rows("--adapter", adapter)
    wide = save_adapter(tmp_path / "wide", 192)
    said = command("--adapter", wide, *options, code=2)
    assert f"adapter {wide} does not fit the model" in said


@pytest.mark.recorded
def test_killed_runs_go_on_to_the_same_answers(cli, tmp_path):
    args = ["eval", "--limit", "64", "--temperature", "0.8", "--batch-size", "8", "--json"]
    code = "from resa_lens.cli import main; main()"
    place = tmp_path / "w"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args, "--workspace", str(place)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None:
        # Between the look and the reading the folder may still get its file.
        files = [f for work in works(place) if (f := work / "answers.jsonl").is_file()]
        if files and len(files[0].read_bytes().splitlines()) > 25:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    resumed = cli(*args, "--workspace", str(place))
    whole = cli(*args, "--workspace", str(tmp_path / "whole"))
    assert "answers are there; going on" in resumed.stderr
    a, b = (json.loads(done.stdout)["folder"] for done in (resumed, whole))
    files = (place / a / "samples.parquet", tmp_path / "whole" / b / "samples.parquet")
    assert files[0].read_bytes() == files[1].read_bytes()


# Contexts


LONG = {"question": "7 " * 3000, "answer": "1"}


def questions(place, *rows):
    file = place / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_question_beyond_the_context_counts_as_not_asked(tmp_path):
    short = [{"question": f"What is {n}+1?", "answer": str(n + 1)} for n in range(3)]
    place = ("--workspace", tmp_path / "w", "--max-new-tokens", 60, "--json")
    found = command("--tasks", questions(tmp_path, *short, LONG), *place)
    assert (found["n"], found["unanswerable"], found["unanswerable_share"]) == (3, 1, 0.25)
    assert found["truncated_share"] == found["unfinished"] / 3
    without = command("--tasks", questions(tmp_path, *short), *place)
    assert without["accuracy"] == found["accuracy"]
    assert (without["n"], without["unanswerable_share"]) == (3, 0.0)
    stored = read_eval(Workspace(tmp_path / "w"), tmp_path / "w" / found["folder"]).result
    assert (stored.n, stored.unanswerable_share) == (3, 0.25)


def test_answers_that_are_cut_off_are_counted(tmp_path):
    found = command("--limit", 4, "--max-new-tokens", 1, "--json", "--workspace", tmp_path / "w")
    assert (found["unfinished"], found["truncated_share"]) == (4, 1.0)


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([LONG], ("--max-new-tokens", 60), "none of the questions fits: the shortest prompt has"),
        ([LONG, LONG], ("--direct",), "none of the questions fits"),
        ([{"question": "1+1?", "answer": "2"}], ("--max-new-tokens", 1024), "reads 1024 tokens"),
        ([{"question": "1+1?", "answer": "2"}], ("--setting", "paper"), "--max-new-tokens 32768"),
    ],
)
def test_lengths_are_compared_before_the_weights_are_loaded(
    tmp_path, monkeypatch, rows, options, says
):
    def load(*args, **options):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("resa_lens.artifacts.stage.load_model", load)
    file = questions(tmp_path, *rows)
    said = command("--tasks", file, *options, "--workspace", tmp_path / "w", code=2)
    assert says in said
    assert not (tmp_path / "w").exists()


def test_columns_by_command_and_golds_without_a_result(tmp_path):
    rows = [
        {"q": "1+1?", "info": {"gold": "2"}, "answer": "no"},
        {"q": "1+2?", "info": {"gold": "C(n, 4), or an equivalent form such as n!"}, "answer": "x"},
    ]
    file = questions(tmp_path, *rows)
    done = CliRunner().invoke(app, [
        "eval", "--tasks", str(file), "--question-column", "q", "--answer-column", "info.gold",
        "--max-new-tokens", "9", "--workspace", str(tmp_path / "w"),
    ])  # fmt: skip
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert f"1 of 2 answers of {file}" in said or "1 of 2 answers of" in said
    assert "first of row 2" in said
