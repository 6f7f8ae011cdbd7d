"""What a model cannot read is one line: tokens beyond the embedding, more tokens than positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.model_grid import save_variant, tokenizer
from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import CountConfig, tag_prompt
from resa_lens.machine.needs import read_shape
from resa_lens.models import bridge as bridge_module
from resa_lens.models.activations import check_hookpoints
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import load_model

NARROW: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def save(folder: Path, kind: str, **config: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("read", [load_model, read_shape], ids=["load", "doctor"])
def test_a_think_tag_beyond_the_embedding(tmp_path: Path, read: Any) -> None:
    number = int(tokenizer().convert_tokens_to_ids("<think>"))  # pyright: ignore
    folder = save(tmp_path / "m", "qwen2", vocab_size=number, **NARROW)
    with pytest.raises(BadInputError) as caught:
        read(str(folder))
    message = str(caught.value)
    assert f"<think> is token {number}, the model has {number} embeddings" in message
    assert message.count("\n") == 0


def test_another_token_beyond_the_embedding_is_refused_where_it_is_read(tmp_path: Path) -> None:
    rows = 100
    folder = save(tmp_path / "m", "qwen2", vocab_size=rows, **NARROW)
    model = load_model(str(folder))
    with torch.no_grad():
        model.bridge(torch.tensor([[3, rows - 1]]))
        with pytest.raises(BadInputError, match=f"is {rows + 5}, the model has {rows} embeddings"):
            model.bridge(torch.tensor([[3, rows + 5]]))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}),
        ("opt", {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "max_position_embeddings": 24, "word_embed_proj_dim": 32}),
    ],
)  # fmt: skip
def test_more_tokens_than_learned_positions(
    tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    model = load_model(str(save(tmp_path / "m", kind, vocab_size=576, **config)))
    with torch.no_grad():
        model.bridge(torch.zeros(1, 24, dtype=torch.long) + 5)
        with pytest.raises(BadInputError, match="24 learned positions, and a text of 25 tokens"):
            model.bridge(torch.zeros(1, 25, dtype=torch.long) + 5)
    # Before SAEs are trained for it.
    with pytest.raises(BadInputError, match=r"24 learned positions, the text has \d+ tokens"):
        tag_prompt(model, CountConfig())


def test_the_doctor_says_positions_and_the_prompts_tokens(tmp_path: Path) -> None:
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
    found = read_shape(str(save(tmp_path / "m", "gpt2", vocab_size=576, **shape)))
    assert (found.layers, found.width, found.positions) == (2, 32, 24)
    prompt = tag_prompt(load_model("tiny-reasoner"), CountConfig())
    assert found.prompt == len(prompt.ids)


# The host


def test_where_the_models_own_attention_fails_the_stock_one_is_used_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_variant("gpt_oss", tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    build, ids = bridge_module._build, torch.arange(8, 40)[None]
    told: list[str] = []

    def breaks(model: Any, *args: Any, native: bool) -> Any:
        bridge = build(model, *args, native=native)
        if native:
            raise AttributeError("no such part")
        return bridge

    monkeypatch.setattr(bridge_module, "_build", breaks)
    model = load_model(str(folder))
    model.tell = told.append
    with torch.no_grad():
        torch.testing.assert_close(model.bridge(ids), plain(ids).logits, atol=1e-5, rtol=1e-4)
    assert model.attention == "stock"
    (line,) = told
    assert "TransformerLens' own attention is used" in line
    assert "no such part" in line


def test_a_bridge_with_other_logits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(save_variant("llama", tmp_path / "m")))
    build = bridge_module._build

    def shifts(inner: Any, *args: Any, native: bool) -> Any:
        bridge = build(inner, *args, native=native)
        inner.lm_head.register_forward_hook(lambda module, args, output: output + 1)
        return bridge

    monkeypatch.setattr(bridge_module, "_build", shifts)
    before = model.model.state_dict().keys()
    with pytest.raises(BadInputError, match="its logits differ by"):
        _ = model.bridge
    # As it was: another try begins with the plain model.
    assert model.model.state_dict().keys() == before


def test_a_place_that_a_model_has_not_is_refused_with_the_ones_it_has(tmp_path: Path) -> None:
    llama = load_model(str(save_variant("llama", tmp_path / "llama")))
    with pytest.raises(BadInputError, match=r"no site mlp_post, where mlp_out is .*use mlp_out"):
        check_hookpoints(llama, [Hookpoint(0, "mlp_post")])
    gemma = load_model(str(save_variant("gemma2", tmp_path / "gemma")))
    check_hookpoints(gemma, [Hookpoint(0, "mlp_post"), Hookpoint(1, "attn_post")])


# Adapters as PEFT saves them


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_variant("llama", tmp_path / "base")


def adapter(base: Path, folder: Path, targets: list[str], **options: Any) -> torch.Tensor:
    """Save by PEFT alone, with its defaults; return the adapted model's logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **options)
    ).eval()
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    peft.save_pretrained(str(folder))
    with torch.no_grad():
        return peft(torch.arange(8, 40)[None]).logits


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]], ids=str)
def test_adapters_on_head_or_embedding_are_read_as_peft_saves_them(
    base: Path, tmp_path: Path, targets: list[str]
) -> None:
    expected = adapter(base, tmp_path / "a", targets)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert any("lora_" not in key for key in tensors), "PEFT saves the whole matrix, too"
    model = load_model(str(tmp_path / "a"), base=str(base))
    with torch.no_grad():
        found = model.model(torch.arange(8, 40)[None]).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_whole_matrix_that_is_not_the_bases_is_refused_with_the_way_out(
    base: Path, tmp_path: Path
) -> None:
    adapter(base, tmp_path / "a", ["q_proj", "lm_head"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_" not in key)
    tensors[key] = tensors[key] + 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BadInputError, match=r"merge_and_unload") as caught:
        load_model(str(tmp_path / "a"), base=str(base))
    assert key in str(caught.value)
