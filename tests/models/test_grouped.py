"""Attention of single queries in groups: transformers' numbers without its copies."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.evals.engines import hf as hf_engine
from resa_lens.evals.tasks import load_tasks
from resa_lens.models.grouped import grouped_attention, grouped_queries
from resa_lens.models.host import load_model
from resa_lens.texts.prompts import question_prompt


def projections(
    rows: int, heads: int, shared: int, queries: int, keys: int, mask_kind: str
) -> tuple[torch.Tensor, ...]:
    """Random projections; of each row the first keys are padding, of each row some more."""
    torch.manual_seed(rows + heads + keys)
    query = torch.randn(rows, queries, heads, 16).transpose(1, 2)
    key, value = torch.randn(2, rows, shared, keys, 16).unbind(0)
    attends = torch.arange(keys) >= torch.arange(rows)[:, None]
    mask = attends[:, None, None].expand(-1, 1, queries, -1)
    if mask_kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return query, key, value, mask


@pytest.mark.parametrize("mask_kind", ["boolean", "added"])
@pytest.mark.parametrize(
    ("rows", "heads", "shared", "queries", "keys"),
    [(1, 4, 2, 1, 7), (5, 12, 2, 1, 40), (3, 8, 1, 1, 9), (3, 6, 6, 1, 9), (2, 4, 2, 5, 11)],
)
def test_the_numbers_are_those_of_transformers(rows, heads, shared, queries, keys, mask_kind):
    query, key, value, mask = projections(rows, heads, shared, queries, keys, mask_kind)
    module = nn.Module()
    module.num_key_value_groups = heads // shared
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    ours, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    assert ours.shape == theirs.shape == (rows, queries, heads, 16)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class _Copies(TorchDispatchMode):
    """Counts the reshapes that repeat keys or values: copies of so many elements or more."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.reshape.default and result.numel() >= self.elements:
            self.count += args[0].data_ptr() != result.data_ptr()
        return result


def test_no_step_repeats_keys(monkeypatch: pytest.MonkeyPatch):
    config = LlamaConfig(
        vocab_size=32, hidden_size=96, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    engine = HFEngine(LlamaForCausalLM(config).eval(), _Letters())
    # Rows of other lengths, which need padding and its mask.
    prompts = ["a" * 90, "b" * 60, "c" * 30]
    generation = GenerationConfig(max_new_tokens=6, stop=(), batch_size=3)

    def copies() -> tuple[int, list[tuple[int, ...]]]:
        with _Copies(3 * 6 * 90 * 16) as counter:
            answers = engine.generate(prompts, generation)
        return counter.count, [answer.token_ids for answer in answers]

    ours, answers = copies()
    monkeypatch.setattr(hf_engine, "grouped_queries", nullcontext)
    theirs, same = copies()
    assert answers == same
    # Keys and values of two layers: once in the prompts' own pass, and in five steps after it.
    assert (ours, theirs) == (2 * 2, 2 * 2 * 6)


def test_the_models_own_attention_comes_back():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with grouped_queries():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is grouped_attention
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


@pytest.mark.recorded
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_five_hundred_answers_are_the_same(monkeypatch: pytest.MonkeyPatch, temperature: float):
    """Prints the CPU seconds of both ways, taken in turns; one thread (`OMP_NUM_THREADS=1`)."""
    model = load_model("tiny-reasoner")
    engine = HFEngine(model.model, model.tokenizer)
    questions = load_tasks("tiny", levels=(1, 2, 3), limit=500)
    prompts = [question_prompt(item.question) for item in questions]
    generation = GenerationConfig(max_new_tokens=80, temperature=temperature, batch_size=64)
    answers, seconds = {}, {"grouped": [], "repeated": []}
    for _ in range(3):
        for name, context in (("grouped", grouped_queries), ("repeated", nullcontext)):
            monkeypatch.setattr(hf_engine, "grouped_queries", context)
            began = time.process_time()
            answers[name] = [a.token_ids for a in engine.generate(prompts, generation)]
            seconds[name].append(round(time.process_time() - began, 1))
    print(temperature, len(prompts), seconds)
    assert answers["grouped"] == answers["repeated"]


class _Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = None
    is_fast = False

    def __len__(self) -> int:
        return 32

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) % 32 for c in text] for text in texts]}

    def decode(self, ids: list[int], **options: object) -> str:
        return "".join(chr(96 + i) for i in ids)

    def batch_decode(self, rows: list[list[int]], **options: object) -> list[str]:
        return [self.decode(ids) for ids in rows]
