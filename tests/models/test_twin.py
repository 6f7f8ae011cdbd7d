"""A second module over a model's weights: the same numbers, the same memory, its own everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from resa_lens.models.host import load_model
from resa_lens.resources import data_path

IDS = torch.arange(2, 20)[None]


def write(model: torch.nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)  # pyright: ignore
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((data_path("tiny-reasoner") / name).read_bytes())
    return str(folder)


def small(kind: str, folder: Path) -> str:
    torch.manual_seed(0)
    if kind == "bundled":
        return "tiny-reasoner"
    if kind == "gpt2":
        return write(GPT2LMHeadModel(GPT2Config(
            vocab_size=600, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1,
            eos_token_id=1,
        )), folder)  # fmt: skip
    scaling: Any = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    return write(LlamaForCausalLM(LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        **scaling,
    )), folder)  # fmt: skip


@pytest.mark.parametrize("bridged", [False, True], ids=["plain", "bridged"])
@pytest.mark.parametrize("kind", ["bundled", "gpt2", "llama"])
def test_a_twin_is_the_model_over_the_same_memory(kind: str, bridged: bool, tmp_path: Path) -> None:
    name = small(kind, tmp_path)
    first = load_model(name)
    expected = first.model(IDS, use_cache=False).logits
    if bridged:
        _ = first.bridge
    second, alone = load_model(name, weights_of=first), load_model(name)
    assert torch.equal(second.model(IDS, use_cache=False).logits, expected)
    places = {value.data_ptr() for value in first.model.parameters()}
    assert {value.data_ptr() for value in second.model.parameters()} <= places
    assert not places & {value.data_ptr() for value in alone.model.parameters()}
    assert second.contents == alone.contents
    assert second.model.state_dict().keys() == alone.model.state_dict().keys()
    assert second.model.config.to_dict() == alone.model.config.to_dict()
    theirs = alone.model.generation_config.to_dict()  # pyright: ignore
    assert second.model.generation_config.to_dict() == theirs  # pyright: ignore
    assert [n for n, p in second.model.named_parameters() if p.requires_grad] == [
        n for n, p in alone.model.named_parameters() if p.requires_grad
    ]


def test_what_is_done_to_a_twin_leaves_the_model_alone(tmp_path: Path) -> None:
    first = load_model("tiny-reasoner")
    expected = first.model(IDS, use_cache=False).logits
    second = load_model("tiny-reasoner", weights_of=first)
    second.model.requires_grad_(False)
    assert all(p.requires_grad for p in first.model.parameters())
    with second.bridge.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda x, hook: x * 0)]):
        assert not torch.equal(second.bridge(IDS), expected)
        assert torch.equal(first.model(IDS, use_cache=False).logits, expected)
    del second
    assert torch.equal(first.bridge(IDS, use_cache=False), expected)


def test_another_dtype_or_base_is_loaded(tmp_path: Path) -> None:
    first = load_model("tiny-reasoner")
    places = {value.data_ptr() for value in first.model.parameters()}
    for other in (
        load_model("tiny-reasoner", weights_of=first, dtype="bfloat16"),
        load_model(small("llama", tmp_path), weights_of=first),
    ):
        assert not places & {value.data_ptr() for value in other.model.parameters()}
