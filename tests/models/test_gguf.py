"""GGUF files: special tokens as the file says, and a Gemma 3 shape through the main path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GgufConfig,
    PreTrainedTokenizerFast,
)

from resa_lens.models.host import load_model

SPECIALS = ["<pad>", "<eos>", "<bos>", "<think>", "</think>"]
VOCABULARY = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "in"]
MERGES = [("t", "h"), ("i", "n")]
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64,
    "max_position_embeddings": 512, "vocab_size": len(VOCABULARY), "bos_token_id": 2,
    "eos_token_id": 1, "pad_token_id": 0, "rope_scaling": None,
}  # fmt: skip
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def gemma(folder: Path) -> Path:
    """A random Gemma 3, written as a folder."""
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.05 if "norm" in name else 0.2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_gguf(path: Path, folder: Path, **flags: bool) -> Path:
    """Write the folder as llama.cpp's converter does: Gemma's norms are stored plus one."""
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_key_length(SHAPE["head_dim"])
    writer.add_value_length(SHAPE["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(SHAPE["sliding_window"])
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(VOCABULARY)
    special = gguf.TokenType.CONTROL
    writer.add_token_types(
        [special if token in SPECIALS else gguf.TokenType.NORMAL for token in VOCABULARY]
    )
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    for name, value in flags.items():
        getattr(writer, name)(value)
    for key, tensor in load_file(folder / "model.safetensors").items():
        stem, suffix = key.rsplit(".", 1)
        parts = stem.split(".", 3)
        block = stem.startswith("model.layers.")
        name = f"blk.{parts[2]}.{NAMES[parts[3]]}" if block else NAMES[stem]
        values = tensor.numpy().astype(np.float32)
        writer.add_tensor(f"{name}.{suffix}", values + 1 if "norm" in name else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma(tmp_path_factory.mktemp("gemma") / "folder")


@pytest.mark.parametrize(
    ("flags", "before", "behind"),
    [
        ({}, [], []),
        ({"add_add_bos_token": True}, [2], []),
        ({"add_add_bos_token": True, "add_add_eos_token": True}, [2], [1]),
        ({"add_add_bos_token": False, "add_add_eos_token": True}, [], [1]),
    ],
    ids=str,
)
def test_bos_and_eos_stand_as_the_file_says(
    folder: Path, tmp_path: Path, flags: dict[str, bool], before: list[int], behind: list[int]
) -> None:
    model = load_model(str(write_gguf(tmp_path / "gemma.gguf", folder, **flags)))
    text = "one thing <think> in"
    ids = model.tokenizer(text)["input_ids"]
    assert ids == [*before, *tokenizer()(text)["input_ids"], *behind]
    assert (
        model.tokenizer(text, add_special_tokens=False)["input_ids"]
        == tokenizer()(text)["input_ids"]
    )
    assert (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id) == (2, 1)
    config = model.model.config
    assert (config.bos_token_id, config.eos_token_id) == (2, 1)
    assert bool(model.parts) == bool(before or behind)


@torch.no_grad()
def loss(model: Any, ids: torch.Tensor) -> float:
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, ids[:, 1:].flatten()).item()


def test_the_loss_of_a_gemma_3_is_plain_transformers_with_bos(folder: Path, tmp_path: Path) -> None:
    model = load_model(str(write_gguf(tmp_path / "gemma.gguf", folder, add_add_bos_token=True)))
    assert model.model.config.architectures == ["Gemma3ForCausalLM"]
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="gemma.gguf", dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()  # fmt: skip
    own = tokenizer()("one thing <think> in </think> two")["input_ids"]
    ids = torch.tensor([model.tokenizer("one thing <think> in </think> two")["input_ids"]])
    assert ids.tolist() == [[2, *own]]
    with torch.no_grad():
        assert (model.bridge(ids) - plain(ids).logits).abs().max() < 1e-4
    assert loss(model.bridge.original_model, ids) == pytest.approx(loss(plain, ids), abs=1e-5)
    assert abs(loss(plain, ids) - loss(plain, torch.tensor([own]))) > 1e-3


@pytest.mark.recorded
def test_a_gemma_3_from_gguf_goes_the_main_path(folder: Path, tmp_path: Path, cli: Any) -> None:
    path = write_gguf(tmp_path / "gemma.gguf", folder, add_add_bos_token=True)
    common = ("--model", str(path), "--tokens", "2048", "--latents", "64", "--k", "4", "--layers",
              "1-2", "--workspace", str(tmp_path / "w"), "--json")  # fmt: skip
    recommended = cli("recommend-layers", *common)
    assert recommended.returncode == 0, recommended.stderr
    layer = json.loads(recommended.stdout)["recommended"][0]
    falsified = cli("falsify", *common, "--texts", "2", "--shuffles", "2", "--no-other-seed",
                        "--no-random-weights")  # fmt: skip
    assert falsified.returncode == 0, falsified.stderr
    tuned = cli(
        "tune", "--model", str(path), "--layer", str(layer), "--tokens", "2048", "--latents", "64",
        "--k", "4", "--steps", "2", "--rank", "2", "--limit", "2", "--max-new-tokens", "4",
        "--workspace", str(tmp_path / "w"), "--json",
    )  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr
    assert json.loads(tuned.stdout)["layer"] == layer
