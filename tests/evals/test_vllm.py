"""vLLM beside the in-process engine; in an environment made by benchmarks/install_engine.sh."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.evals.engines import vllm as engine_file
from resa_lens.evals.engines.choice import open_engine
from resa_lens.evals.engines.vllm import VLLMEngine, document_seed
from resa_lens.evals.run import EvalConfig, ask, score
from resa_lens.evals.tasks import load_questions
from resa_lens.models.host import load_model
from resa_lens.processes import process_start

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vllm is not installed; benchmarks/install_engine.sh vllm FOLDER makes its environment",
)
QUESTIONS = 500


def test_seeds_are_named_by_document_and_sample():
    seeds = {document_seed(s, (d, n)) for s in range(3) for d in range(50) for n in range(4)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert document_seed(5, (3,)) == document_seed(5, (3, 0))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_where_it_is_missing_it_says_how_to_get_it(tiny):
    with pytest.raises(BadInputError, match=r"install_engine.sh vllm") as error:
        VLLMEngine(tiny)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.usefixtures("fake_vllm")
def test_an_engine_that_does_not_start_says_so(tiny, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "start")
    with pytest.raises(RunFailedError, match="ValueError: No available memory for the") as error:
        VLLMEngine(tiny)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(
    ("fails", "said"), [("step", "RuntimeError: a kernel failed"), ("exit", "ended with code 3")]
)
def test_an_engine_that_fails_says_so(tiny, monkeypatch, fails, said):
    monkeypatch.setenv("FAKE_VLLM", fails)
    with open_engine(tiny, "vllm") as engine, pytest.raises(RunFailedError, match=said):
        engine.generate(["1+1"], GenerationConfig())


@pytest.mark.usefixtures("fake_vllm")
def test_it_generates_in_a_process_that_ends_with_it(tiny):
    """The same greedy answers as hf's; no module of vLLM in this process, and none left of it."""
    asked = ask(load_questions("tiny", levels=(1,), limit=6), EvalConfig())
    texts, seen = [one.prompt for one in asked], []
    with open_engine(tiny, "vllm") as engine:
        assert isinstance(engine, VLLMEngine)
        found = engine.generate(texts, GenerationConfig(), answered=lambda i, _: seen.append(i))
        short = engine.generate(texts[:2], GenerationConfig(max_new_tokens=3))
        slow = engine.generate(texts[:2], GenerationConfig(timeout=1e-6))
        with pytest.raises(BadInputError, match="a prompt has"):
            engine.generate(["1+1 " * 2000], GenerationConfig())
        process = engine._process
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL
    assert "vllm" not in sys.modules
    assert found == HFEngine(tiny.model, tiny.tokenizer).generate(texts, GenerationConfig())
    assert sorted(seen) == list(range(len(texts)))
    assert [(g.tokens, g.finished) for g in short] == [(3, False)] * 2
    assert {(g.timed_out, g.finished) for g in slow} == {(True, False)}


@pytest.mark.usefixtures("fake_vllm")
def test_sampled_answers_are_their_documents_own(tiny):
    texts, names = ["2+2 <think>", "3+3 <think>", "2+2 <think>"], [(5,), (6,), (7,)]
    config = GenerationConfig(temperature=1.0, seed=3, max_new_tokens=12)
    with open_engine(tiny, "vllm") as engine:
        first = engine.generate(texts, config, streams=names)
        assert engine.generate(texts[::-1], config, streams=names[::-1])[::-1] == first
    assert first[0].token_ids != first[2].token_ids


@pytest.mark.slow
@pytest.mark.usefixtures("fake_vllm")
def test_it_ends_when_its_caller_is_killed(tmp_path):
    """A worker whose caller is gone would hold a GPU and answer nobody."""
    code = (
        "import time; from resa_lens.evals.engines.vllm import VLLMEngine; "
        "from resa_lens.models.host import load_model; "
        "print(VLLMEngine(load_model('tiny-reasoner'))._process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as caller:
        assert caller.stdout is not None
        started = process_start(worker := int(caller.stdout.readline()))
        assert started is not None
        caller.kill()
    until = time.monotonic() + 60
    while process_start(worker) == started and time.monotonic() < until:
        time.sleep(0.05)
    assert process_start(worker) != started


@pytest.mark.slow
@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize("lora", ["request", "merged"])
def test_an_adapter_goes_with_the_requests_or_into_the_weights(tiny, adapter, lora):
    tuned = load_model("tiny-reasoner", dtype="float32", device="cpu", adapters=[str(adapter)])
    texts = [one.prompt for one in ask(load_questions("tiny", limit=4), EvalConfig())]
    config = GenerationConfig(max_new_tokens=40)
    with open_engine(tuned, "vllm", lora=lora) as engine:
        found = engine.generate(texts, config)
        assert isinstance(engine, VLLMEngine)
        merged = engine._merged
    assert found == HFEngine(tuned.model, tuned.tokenizer).generate(texts, config)
    assert found != HFEngine(tiny.model, tiny.tokenizer).generate(texts, config)
    assert (merged is None) == (lora == "request")
    assert merged is None or not Path(merged.name).exists()


def test_ranks_are_rounded_up_to_those_that_requests_have():
    assert [engine_file._rank(rank) for rank in (1, 8, 9, 512)] == [8, 8, 16, 512]
    with pytest.raises(BadInputError, match=r"rank 513.*--merge"):
        engine_file._rank(513)


@pytest.fixture(scope="module")
def prompts():
    items = load_questions("tiny", levels=(1, 2, 3), limit=QUESTIONS)
    return ask(items, EvalConfig())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that changes many answers without ruining the model."""
    torch.manual_seed(0)
    model = load_model("tiny-reasoner", dtype="float32", device="cpu")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = get_peft_model(model.model, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    for name, value in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value.data, std=0.1)
    folder = tmp_path_factory.mktemp("adapter")
    peft.save_pretrained(str(folder))
    return folder


def answers(engine, asked):
    return engine.generate([one.prompt for one in asked], GenerationConfig())


@needs_vllm
@pytest.mark.recorded
def test_greedy_answers_equal_those_of_hf(prompts, adapter):
    model = load_model("tiny-reasoner", dtype="float32", device="cpu")
    hf = answers(HFEngine(model.model, model.tokenizer), prompts)
    with open_engine(model, "vllm") as engine:
        base = answers(engine, prompts)
    equal = sum(a == b for a, b in zip(hf, base, strict=True))
    print(f"base: {equal} of {len(hf)} greedy answers equal, "
          f"{score(prompts, hf).accuracy} and {score(prompts, base).accuracy}")  # fmt: skip
    assert equal == len(hf)

    tuned = load_model("tiny-reasoner", dtype="float32", device="cpu", adapters=[str(adapter)])
    peft = answers(HFEngine(tuned.model, tuned.tokenizer), prompts)
    assert sum(a != b for a, b in zip(hf, peft, strict=True)) > 50  # or nothing was tested
    for lora in ("request", "merged"):
        with open_engine(tuned, "vllm", lora=lora) as engine:
            found = answers(engine, prompts)
        equal = sum(a == b for a, b in zip(peft, found, strict=True))
        changed = sum(a != b for a, b in zip(hf, found, strict=True))
        print(f"adapter by {lora}: {equal} of {len(peft)} equal; {changed} differ from the base's")
        # Merging rounds the sum of weight and adapter: an argmax may turn.
        assert equal >= len(peft) - (0 if lora == "request" else 5)


@needs_vllm
@pytest.mark.recorded
def test_seeds_stops_timeouts_and_order(prompts):
    model = load_model("tiny-reasoner", dtype="float32", device="cpu")
    with open_engine(model, "vllm") as engine:
        texts = [one.prompt for one in prompts[:12]]
        config = GenerationConfig(temperature=1.0, top_p=0.95, seed=3)
        names = [one.stream for one in prompts[:12]]
        seen = []
        first = engine.generate(texts, config, streams=names, answered=lambda i, a: seen.append(i))
        again = engine.generate(texts[::-1], config, streams=names[::-1])[::-1]
        assert first == again
        assert sorted(seen) == list(range(12))
        assert len({g.text for g in engine.generate([texts[0]] * 16, config)}) > 1
        assert all(g.text.endswith("</answer>") for g in first if g.finished)
        endless = GenerationConfig(max_new_tokens=900, stop=(), timeout=0.01)
        slow = engine.generate(texts[:3], endless)
        assert {(g.timed_out, g.finished) for g in slow} == {(True, False)}
        with pytest.raises(BadInputError, match="a prompt has"):
            engine.generate(["1+1 " * 2000], config)
