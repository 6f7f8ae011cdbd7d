"""Adapters in the workspace: resumed, kept on the way, with card and cost; controls as jobs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config

from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError
from resa_lens.evals.run import EvalConfig
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes.coder import new_coder
from resa_lens.saes.train import SaeConfig
from resa_lens.saes.world import ALONE
from resa_lens.stages import adapters
from resa_lens.stages.adapters import adapter_run, elicitation_records
from resa_lens.stages.saes import SaeRun
from resa_lens.stages.tune_job import ALL_CONTROLS, Through, TuneJob, with_sequence
from resa_lens.stages.tuning import tune_run
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig, Record
from resa_lens.tuning.config import preset
from resa_lens.tuning.log import read_log
from resa_lens.tuning.loop import TuneConfig

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def ctx(demo, tmp_path) -> Context:
    place = tmp_path / "workspace"
    shutil.copytree(demo.workspace / "saes", place / "saes")
    return Context(Workspace(place))


def job(**changes) -> TuneJob:
    given = {
        "model": "tiny-reasoner",
        "layer": "4",
        "lora": TuneConfig(rank=4, learning_rate=1e-3),
        "sae": SaeConfig(),
        "steps": 3,
        "evaluation": EvalConfig(limit=8),
    }
    return TuneJob(**{**given, **changes})


def test_an_adapter_has_log_card_cost_and_its_states_on_the_way(ctx):
    asked = job(steps=4, lora=TuneConfig(rank=4, learning_rate=1e-3, checkpoint_every=2))
    made = tune_run(ctx, asked)
    names = {path.name for path in made.adapter.folder.iterdir()}
    assert {"log.jsonl", "step-2", "step-4", "README.md", "manifest.json", WEIGHTS} <= names
    assert [line["step"] for line in read_log(made.adapter.folder / "log.jsonl")] == [1, 2, 3, 4]
    # The last state on the way is the adapter itself, and all of them are plain PEFT.
    place = made.adapter.folder
    last, whole = (load_file(folder / WEIGHTS) for folder in (place / "step-4", place))
    assert all(torch.equal(last[key], whole[key]) for key in whole)
    middle = load_model(str(made.adapter.folder / "step-2"))
    assert middle.base_hash == made.model.weights_hash
    assert list(made.adapter.artifact.damage()) == []
    manifest = made.adapter.artifact.manifest
    assert manifest.cost["tokens"] == manifest.results["tokens"] == 4 * 256
    assert manifest.cost["seconds"] > 0
    card = (made.adapter.folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert "5th of 12" in card
    assert not list(made.adapter.folder.parent.glob(".work-*"))
    again = tune_run(ctx, asked)
    assert again.adapter.folder == made.adapter.folder
    assert again.losses == made.losses


@pytest.mark.parametrize(
    ("width", "preset_name", "context", "given", "expected"),
    [
        (1536, "reference", 4096, None, 2048),
        (1536, "reference", 1024, None, 1024),
        (1536, "reference", 4096, 512, 512),
        (1536, "paper", 4096, None, 256),
        (1536, "paper", 4096, 2048, 2048),
        (512, "reference", 4096, None, 256),
        (512, "distil", 256, 256, 256),
    ],
)
def test_sequences_are_as_long_as_the_preset_says_or_the_caller(
    tmp_path, width, preset_name, context, given, expected
):
    """Only a configuration is there: no weight is read."""
    Qwen2Config(hidden_size=width, max_position_embeddings=context).save_pretrained(tmp_path)
    asked = job(model=str(tmp_path), objective=preset(preset_name), sequence=given)
    assert with_sequence(asked).elicitation.sequence == expected
    assert with_sequence(with_sequence(asked)) == with_sequence(asked)


def test_a_sequence_beyond_the_context_is_refused_before_the_model_is_loaded(tmp_path):
    Qwen2Config(hidden_size=64, max_position_embeddings=512).save_pretrained(tmp_path)
    with pytest.raises(BadInputError, match=r"--sequence 513: .* reads 512 tokens"):
        tune_run(Context(Workspace(tmp_path / "w")), job(model=str(tmp_path), sequence=513))


def test_an_sae_that_was_checked_when_it_was_opened_is_not_checked_again(
    tiny, tmp_path, monkeypatch
):
    """Of the model it was opened for: put into another one, it is held to its place there."""
    warned = tuple(f"the SAE for {Hookpoint(n).describe(12)}, site mlp_out, leaves" for n in (4, 5))
    points = (Hookpoint(4), Hookpoint(5))
    opened = SaeRun(tmp_path, points, {}, 0, 0.0, False, warnings=warned, checked=frozenset({4, 5}))
    calls = []
    monkeypatch.setattr(adapters, "check_fit", lambda *_, **__: (calls.append(1), ({}, ["new"]))[1])
    run = adapters._Run(
        Context(Workspace(tmp_path)), job(), tiny, elicitation_records(job()), CorpusConfig(), 1,
        ALONE,
    )  # fmt: skip
    coder = new_coder(128, 64, 4, seed=0)
    through = Through(tiny, opened, 4, "given", "")
    assert run._check(through, points[0], coder) == [warned[0]]
    assert calls == []
    for other in (
        replace(through, source=replace(tiny)),
        replace(through, run=replace(opened, checked=frozenset({5}))),
    ):
        assert run._check(other, points[0], coder) == ["new"]
    assert len(calls) == 2


@pytest.mark.parametrize("control", ["cot-free", "cot"])
def test_fine_tuning_takes_as_many_steps_and_tokens(ctx, control):
    through = adapter_run(ctx, job())
    beside = adapter_run(ctx, job(control=control))
    assert beside.layer is None
    assert beside.artifact.manifest.results["tokens"] == through.artifact.manifest.results["tokens"]
    assert len(beside.artifact.manifest.results["losses"]) == 3
    assert (
        beside.artifact.manifest.results["trainable"]
        == through.artifact.manifest.results["trainable"]
    )
    # At these steps the loss of the model's own task is far below that of a uniform guess.
    assert 0 < beside.artifact.manifest.results["losses"][0] < 6
    assert beside.artifact.manifest.parents == []


def test_nothing_trains_without_an_sae(ctx):
    made = adapter_run(ctx, job(control="none"))
    weights = load_file(made.folder / WEIGHTS)
    assert all(not value.any() for key, value in weights.items() if "lora_B" in key)


def test_bad_input(ctx, tmp_path):
    with pytest.raises(BadInputError, match=f"use {', '.join(ALL_CONTROLS)}"):
        job(control="magic")
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1+1?", "answer": ""}\n')
    elicitation = job().elicitation.__class__(source=str(data))
    with pytest.raises(BadInputError, match="column answer: empty"):
        adapter_run(ctx, job(elicitation=elicitation))
    data.write_text("")
    with pytest.raises(BadInputError, match=r"data\.jsonl"):
        adapter_run(ctx, job(elicitation=elicitation))
    data.write_text('{"question": "1+1?", "answer": "2"}\n')
    with pytest.raises(BadInputError, match="no steps to imitate"):
        adapter_run(ctx, job(control="cot", elicitation=elicitation))
    assert not list(ctx.workspace.root.glob("adapters/*"))


COMMAND = (
    "tune", "--model", "tiny-reasoner", "--layer", "4", "--rank", "4", "--learning-rate", "1e-3",
    "--limit", "8", "--no-start-check", "--json",
)  # fmt: skip


def started(workspace: Path, *more: str, world: int = 1) -> subprocess.Popen:
    run = ["-m", "resa_lens"]
    if world > 1:
        run = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "-m", "resa_lens"]
    return subprocess.Popen(
        [sys.executable, *run, *COMMAND, *more, "--workspace", str(workspace)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.recorded
def test_a_killed_tuning_goes_on_to_the_same_bits(ctx, demo, tmp_path):
    killed = tmp_path / "killed"
    shutil.copytree(demo.workspace / "saes", killed / "saes")
    out, err = started(ctx.workspace.root, "--steps", "24").communicate(timeout=300)
    whole = json.loads(out)
    process = started(killed, "--steps", "24")
    deadline = time.monotonic() + 200
    while not list(killed.glob("adapters/.work-*/checkpoint-*/state.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(killed.glob("adapters/*/manifest.json"))
    out, err = started(killed, "--steps", "24").communicate(timeout=300)
    again = json.loads(out)
    assert "went on at step" in err
    first, second = (load_file(Path(made["adapter"]) / WEIGHTS) for made in (whole, again))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert whole["tuned"] == again["tuned"]
    lines = read_log(Path(again["adapter"]) / "log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 25))


@pytest.mark.recorded
def test_two_processes_make_the_adapter_of_one(ctx, demo, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(demo.workspace / "saes", both / "saes")
    more = ("--steps", "3", "--accumulation", "2")
    one, _ = started(ctx.workspace.root, *more).communicate(timeout=300)
    # With --force too it is all of them who make it, and not one of them again.
    process = started(both, *more, "--force", world=2)
    two, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    alone, shared = json.loads(one), json.loads(two)
    assert alone["loss"] == pytest.approx(shared["loss"], rel=1e-4)
    first, second = (load_file(Path(made["adapter"]) / WEIGHTS) for made in (alone, shared))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-3, atol=1e-5)
    for place, made, count in ((ctx.workspace, alone, 1), (Workspace(both), shared, 2)):
        assert place.read(Path(made["adapter"])).manifest.config["processes"] == count


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_two_epochs_are_of_the_documents_that_are_read(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """With worked steps they are longer, and behind the first rows longer still."""
    monkeypatch.setattr(adapters, "WIDE", 0)
    records = [
        Record(f"What is {n}+1?", str(n + 1), f"{n} " * (1 + n // 20)) for n in range(1000)
    ]  # fmt: skip
    corpus = CorpusConfig(thought_share=share, system_share=0.0)
    steps = adapters.default_steps(tiny, records, corpus, TuneConfig())
    texts = list(islice(corpora.documents(records, corpus), 2 * len(records)))
    tokens = sum(len(ids) + 1 for ids in tiny.tokenizer(texts)["input_ids"])  # pyright: ignore
    assert steps == pytest.approx(tokens / 256, rel=0.12)
