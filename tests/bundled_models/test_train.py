from __future__ import annotations

import copy
import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from benchmarks.bundled_models import train as training
from benchmarks.bundled_models.questions import Question, split_of
from benchmarks.bundled_models.train import TinyConfig, build_model, build_tokenizer, render, train
from resa_lens.models.host import load_model
from resa_lens.texts import prompts

BUNDLED = Path(__file__).parents[2] / "data" / "tiny-reasoner"
MICRO = TinyConfig(
    tokens=4096, layers=2, width=32, heads=2, kv_heads=1, mlp_width=48, sequence=64, batch=4,
    checkpoint_tokens=1024, stop_at=None,
)  # fmt: skip
SAMPLE = list(itertools.islice(training.documents(3), 50))
TEXT = "Problem: What is 12+34-5?\tÄ½€ <think> 12+34=46 </think> <answer> Answer: 41 </answer>"


@pytest.fixture(scope="module")
def built():
    return build_tokenizer()


@pytest.fixture
def tokenizer(built, monkeypatch):
    """The tokenizer, built once for the module: every run builds the same."""
    monkeypatch.setattr(training, "build_tokenizer", lambda: copy.deepcopy(built))
    return built


class KilledError(Exception):
    """Stands for the end of a process."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "state.pt", weights_only=True)


# Tokenizer


def test_tags_are_single_tokens_and_digits_stand_alone(built):
    for tag in prompts.TAGS:
        assert len(built(tag)["input_ids"]) == 1
    tokens = built.convert_ids_to_tokens(built(TEXT)["input_ids"])
    assert all(tag in tokens for tag in prompts.TAGS)
    assert not any(len(t) > 1 and any(c.isdigit() for c in t) for t in tokens if "Ã" not in t)
    assert tokens.count("1") == 3  # of 12, 12 and 41


def test_every_text_survives_the_tokenizer(built):
    for text in (TEXT, "日本 \n\n x", *prompts.SYSTEM_PROMPTS.values()):
        assert built.decode(built(text)["input_ids"]) == text


@pytest.mark.parametrize("bundled", [False, True])
def test_every_loader_splits_text_as_in_training(built, tmp_path, bundled):
    # AutoTokenizer puts the architecture's own pre-tokenizer in place of the file's.
    if bundled:
        folder = BUNDLED
    else:
        folder = tmp_path
        build_model(MICRO, len(built), 0, 1).save_pretrained(folder)
        built.save_pretrained(folder)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(folder)
    ours: Any = load_model(str(folder)).tokenizer
    for text in (TEXT, *prompts.SYSTEM_PROMPTS.values(), *SAMPLE):
        expected = file.encode(text).ids
        assert built(text)["input_ids"] == expected
        assert auto(text)["input_ids"] == expected
        assert ours(text)["input_ids"] == expected


def test_a_second_build_gives_the_same_tokenizer_as_the_bundled_one(built):
    bundled = load_model("tiny-reasoner").tokenizer
    assert built.get_vocab() == bundled.get_vocab()
    assert built(TEXT)["input_ids"] == bundled(TEXT)["input_ids"]


def test_the_chat_template_writes_the_prompts_of_the_project(built):
    messages = [
        {"role": "system", "content": prompts.R1_SYSTEM_PROMPT},
        {"role": "user", "content": "What is 1+1?"},
    ]
    text = built.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == prompts.question_prompt("What is 1+1?", prompts.R1_SYSTEM_PROMPT)
    assert built.chat_template == load_model("tiny-reasoner").tokenizer.chat_template


# Documents


def test_documents_come_in_three_kinds_in_the_stated_shares():
    item = Question("What is 1+2?", "1+2=3", "3", "chain_sum", 1)
    rng = random.Random(0)
    kinds = Counter(render(item, rng) for _ in range(5000))
    steps = prompts.document(item.question, item.steps, item.answer)
    direct = "Problem: What is 1+2? <think> </think> <answer> Answer: 3 </answer>"
    assert kinds[steps] / 5000 == pytest.approx(0.87, abs=0.025)
    assert kinds[direct] / 5000 == pytest.approx(0.06, abs=0.02)
    systems = {f"{text}\n{steps}" for text in prompts.SYSTEM_PROMPTS.values()}
    assert set(kinds) == {steps, direct} | systems


def test_training_documents_hold_no_test_question():
    for text in itertools.islice(training.documents(2), 1500):
        question = text.split("Problem: ")[1].split(" <think>")[0]
        assert split_of(question) == "train"


# Model


def test_the_vocabulary_is_padded_to_a_multiple_of_64():
    for vocabulary, padded in ((64, 64), (65, 128), (570, 576)):
        model = build_model(MICRO, vocabulary, 0, 1)
        assert model.config.vocab_size == padded
        assert model.get_input_embeddings().weight.shape == (padded, 32)


def test_no_embedding_is_fixed_at_zero_but_the_pads():
    weight = build_model(MICRO, 100, 0, 1).get_parameter("model.embed_tokens.weight")
    zero = (weight == 0).all(1).nonzero().flatten().tolist()
    assert zero == [1]


# Training


def test_a_micro_run_learns_and_leaves_a_model_that_loads(tokenizer, tmp_path, capsys):
    config = replace(MICRO, tokens=256 * 150, learning_rate=5e-3)
    folder = train(config, tmp_path / "run")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == [50, 100, 150]
    assert lines[-1]["tokens"] == 256 * 150
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    model = load_model(str(folder))
    assert (model.n_layers, model.d_model) == (2, 32)
    assert model.tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    stored = weights(folder)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in stored
    trained = state(tmp_path / "run")["model"]
    for name, tensor in stored.items():
        assert torch.equal(tensor, trained[name].to(torch.bfloat16))
    ids = torch.tensor([model.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        assert torch.isfinite(model.bridge(ids)).all()


@pytest.mark.parametrize("muon", [False, True])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tokenizer, tmp_path, monkeypatch, muon):
    config = replace(MICRO, muon=muon)
    whole = train(config, tmp_path / "whole")
    real, calls = training.rate_at, []

    def dies_at_step_10(step, *rest):
        calls.append(step)
        if step == 10:
            raise KilledError
        return real(step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(training, "rate_at", dies_at_step_10)
        with pytest.raises(KilledError):
            train(config, tmp_path / "resumed")
    assert state(tmp_path / "resumed")["step"] == 8  # checkpoints every 4 steps of 256 tokens
    calls.clear()
    monkeypatch.setattr(training, "rate_at", lambda step, *r: calls.append(step) or real(step, *r))
    resumed = train(config, tmp_path / "resumed")
    assert calls == list(range(8, 16))
    expected, found = state(tmp_path / "whole"), state(tmp_path / "resumed")
    assert expected["step"] == found["step"] == 16
    for name, tensor in expected["model"].items():
        assert torch.equal(tensor, found["model"][name]), name
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_a_finished_run_writes_the_model_again_where_it_is_missing(tokenizer, tmp_path):
    folder = train(MICRO, tmp_path / "run")
    expected = weights(folder)
    (folder / "model.safetensors").unlink()
    assert train(MICRO, tmp_path / "run") == folder
    assert all(torch.equal(t, weights(folder)[n]) for n, t in expected.items())


def test_runs_repeat_by_seed_and_differ_by_seed(tokenizer, tmp_path):
    config = replace(MICRO, tokens=1024)
    runs = [weights(train(config, tmp_path / name)) for name in ("one", "two")]
    other = weights(train(replace(config, seed=1), tmp_path / "three"))
    assert all(torch.equal(t, runs[1][n]) for n, t in runs[0].items())
    assert not torch.equal(other["model.embed_tokens.weight"], runs[0]["model.embed_tokens.weight"])


def test_a_run_stops_at_the_asked_accuracy_and_stays_stopped(tokenizer, tmp_path, monkeypatch):
    asked: list[int] = []

    def dev_accuracy(*_):
        asked.append(len(asked))
        return (0.3, 0.7)[len(asked) - 1]

    monkeypatch.setattr(training, "dev_accuracy", dev_accuracy)
    config = replace(MICRO, tokens=8192, stop_at=0.68)  # 32 steps, a checkpoint every 4
    steps: list[int] = []
    real = training.rate_at
    monkeypatch.setattr(training, "rate_at", lambda step, *r: steps.append(step) or real(step, *r))
    folder = train(config, tmp_path / "run")
    # Asked from the middle on, at steps 16 and 20.
    assert steps == list(range(20))
    stopped = weights(folder)
    train(config, tmp_path / "run")
    assert len(steps) == 20
    assert len(asked) == 2
    assert all(torch.equal(t, stopped[n]) for n, t in weights(folder).items())


def test_the_accuracy_that_stops_a_run_counts_right_answers(built):
    model = build_model(MICRO, len(built), 0, 1)
    assert training.dev_accuracy(model, built, questions=6) == 0
    items = training.draw_unique(training.DEV_SEED, "train", dict.fromkeys((1, 2, 3), 2))
    texts = [
        prompts.question_prompt(item.question)
        + f" {item.steps} </think> <answer> Answer: {item.answer if n % 2 else 'x'} </answer>"
        for n, item in enumerate(items)
    ]
    model.generate = lambda **_: [built(text)["input_ids"] for text in texts]  # pyright: ignore
    assert training.dev_accuracy(model, built, questions=6) == 0.5
    assert {split_of(item.question) for item in items} == {"train"}


def test_a_gradient_that_is_not_finite_stops_the_run(tokenizer, tmp_path):
    with pytest.raises(FloatingPointError, match="at step"):
        train(replace(MICRO, learning_rate=float("inf")), tmp_path / "run")


# The bundled model


def test_the_bundled_model_has_the_promised_shape():
    config = json.loads((BUNDLED / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert 12 <= config["num_hidden_layers"] <= 16
    assert config["hidden_size"] / config["num_attention_heads"] in (32, 64)
    assert config["vocab_size"] % 64 == 0
    assert (BUNDLED / "model.safetensors").stat().st_size < 12 * 10**6
    stored = weights(BUNDLED)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert 2_000_000 <= sum(t.numel() for t in stored.values()) <= 5_000_000
    assert all(torch.isfinite(t).all() for t in stored.values())


def test_the_bundled_model_knows_its_special_tokens():
    model = load_model("tiny-reasoner")
    tokenizer: Any = model.tokenizer
    config = model.model.config
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert config.vocab_size >= len(tokenizer)
    for tag in prompts.TAGS:
        assert len(tokenizer(tag)["input_ids"]) == 1
