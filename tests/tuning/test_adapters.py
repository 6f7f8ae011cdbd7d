"""Adapters: stacked, scaled, put onto another model, merged; the card claims what was measured."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, Qwen2Config

import resa_lens.stages.merge as module
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import load_model
from resa_lens.resources import data_path
from resa_lens.saes.coder import new_coder
from resa_lens.stages.card import adapter_card, write_card
from resa_lens.stages.merge import merge_model
from resa_lens.tuning.objective import PRESETS, preset
from resa_lens.tuning.train import TuneConfig, save_adapter, tune

SEVEN = list(PRESETS["reference"].targets)


def make_adapter(base: Path, folder: Path, *, seed: int = 0, std: float = 0.05, **options: Any):
    """Save a LoRA adapter of random weights onto a plain model's folder, by PEFT alone."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": SEVEN, **options}
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    peft.peft_config["default"].base_model_name_or_path = str(base)
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def changes(folder: Path) -> dict[str, torch.Tensor]:
    """The weights' changes, from the files by the definition: alpha / r (or / sqrt r) B A."""
    config = json.loads((folder / "adapter_config.json").read_text())
    held = load_file(folder / "adapter_model.safetensors")
    rank = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
    return {
        key.removeprefix("base_model.model.").replace("lora_A.weight", "weight"): (
            config["lora_alpha"] / rank * held[key.replace("lora_A", "lora_B")] @ value
        )
        for key, value in held.items() if "lora_A" in key
    }  # fmt: skip


def by_hand(base: Path, *terms: tuple[float, Path]) -> Any:
    """The base with the sum of scaled changes added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for scale, folder in terms:
            for name, change in changes(folder).items():
                weights[name] += scale * change
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return (
        getattr(model, "model", model)(ids).logits if hasattr(model, "slug") else model(ids).logits
    )


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest logit (of 1 at least): float32's rounding grows with them."""
    torch.testing.assert_close(
        ours, theirs, atol=1e-5 * max(1.0, theirs.abs().max().item()), rtol=0
    )


@pytest.fixture(scope="module")
def other_base(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape, other weights: as a post-trained sibling of the base."""
    folder = tmp_path_factory.mktemp("sibling") / "sibling-rl"
    shutil.copytree(small_folder, folder)
    generator = torch.Generator().manual_seed(1)
    held = load_file(folder / "model.safetensors")
    moved = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in held.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def a(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(small_folder, tmp_path_factory.mktemp("adapters") / "a", seed=1)


@pytest.fixture(scope="module")
def b(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another rank, other modules, and rank-stabilised scaling."""
    folder = tmp_path_factory.mktemp("adapters") / "b"
    options = {"r": 9, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    return make_adapter(small_folder, folder, seed=2, **options)


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(BadInputError) as caught:
        load_model(*map(str, args), **options)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


# Attached, scaled, stacked


def test_scale_zero_is_the_base_bit_for_bit_and_one_the_adapter(small_folder, a, ids):
    base = logits(load_model(str(small_folder)), ids)
    plain: Any = AutoModelForCausalLM.from_pretrained(small_folder, dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, str(a)).eval()
    off = load_model(str(small_folder), adapters=[str(a)], scale=0)
    on = load_model(str(small_folder), adapters=[str(a)], scale=1)
    assert torch.equal(logits(off, ids), base)
    assert torch.equal(logits(on, ids), logits(peft, ids))
    assert (logits(on, ids) - base).abs().max() > 0.1


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0])
def test_a_scale_multiplies_the_change_of_the_weights(small_folder, a, ids, scale):
    model = load_model(str(small_folder), adapters=[str(a)], scale=scale)
    expected = logits(by_hand(small_folder, (scale, a)), ids)
    assert_same(logits(model, ids), expected)


def test_several_adapters_are_the_sum_of_their_changes(small_folder, a, b, ids):
    model = load_model(str(small_folder), adapters=[str(a), str(b)], scale=[0.5, 2.0])
    expected = logits(by_hand(small_folder, (0.5, a), (2.0, b)), ids)
    assert_same(logits(model, ids), expected)
    alone = logits(load_model(str(small_folder), adapters=[str(a)], scale=0.5), ids)
    assert (logits(model, ids) - alone).abs().max() > 0.1
    assert not any(p.requires_grad for n, p in model.peft.named_parameters() if "lora_" in n)
    # The bridge wraps what was attached.
    with torch.no_grad():
        assert_same(model.bridge(ids), expected)


def test_the_same_adapter_twice_is_twice_its_change(small_folder, a, ids):
    twice = load_model(str(small_folder), adapters=[str(a), str(a)])
    doubled = load_model(str(small_folder), adapters=[str(a)], scale=2.0)
    assert_same(logits(twice, ids), logits(doubled, ids))


def test_an_adapter_as_the_models_name_is_the_first(small_folder, a, b, ids):
    named = load_model(str(a), adapters=[str(b)], base=str(small_folder))
    listed = load_model(str(small_folder), adapters=[str(a), str(b)])
    assert torch.equal(logits(named, ids), logits(listed, ids))
    assert named.weights_hash == listed.weights_hash


def test_hash_and_slug_name_base_adapters_and_scales(small_folder, other_base, a, b):
    base = str(small_folder)
    as_before = load_model(str(a), base=base)
    made = {
        "a": load_model(base, adapters=[str(a)]),
        "b": load_model(base, adapters=[str(b)]),
        "half a": load_model(base, adapters=[str(a)], scale=0.5),
        "a off": load_model(base, adapters=[str(a)], scale=0),
        "a + b": load_model(base, adapters=[str(a), str(b)]),
        "a + half b": load_model(base, adapters=[str(a), str(b)], scale=[1, 0.5]),
        "a elsewhere": load_model(str(other_base), adapters=[str(a)]),
        "plain": load_model(base),
    }
    assert (made["a"].weights_hash, made["a"].slug) == (as_before.weights_hash, as_before.slug)
    assert len({model.slug for model in made.values()}) == len(made)
    assert re.fullmatch(r"[A-Za-z0-9.-]+-[0-9a-f]{8}", made["a + half b"].slug)
    assert [x.scale for x in made["a + half b"].adapters] == [1.0, 0.5]
    assert made["plain"].adapters == ()


def test_on_another_model_of_the_shape_it_acts_and_says_so(
    small_folder, other_base, a, tmp_path, ids
):
    own = load_model(str(small_folder)).weights_hash
    adapter = tmp_path / "known"
    shutil.copytree(a, adapter)
    config = {"kind": "adapter", "config": {"base_hash": own}}
    (adapter / "manifest.json").write_text(json.dumps(config))
    model = load_model(str(other_base), adapters=[str(adapter)])
    expected = logits(by_hand(other_base, (1.0, adapter)), ids)
    assert_same(logits(model, ids), expected)
    assert len(model.notes) == 1
    assert own[:8] in model.notes[0]
    assert load_model(str(other_base)).weights_hash[:8] in model.notes[0]
    assert load_model(str(small_folder), adapters=[str(adapter)]).notes == ()


def test_what_tune_saves_is_attached_and_merged(small, small_folder, tmp_path, ids):
    coder = new_coder(32, 64, 4, seed=0).requires_grad_(False)
    batch = [torch.randint(2, 500, (1, 24), generator=torch.Generator().manual_seed(3))] * 3
    peft, _ = tune(
        small(), coder, Hookpoint(1), batch, 3, preset("paper"),
        TuneConfig(rank=4, alpha=8, learning_rate=1e-2),
    )  # fmt: skip
    save_adapter(peft, tmp_path / "tuned", small_folder)
    expected = logits(peft, ids)
    attached = load_model(str(small_folder), adapters=[str(tmp_path / "tuned")])
    assert_same(logits(attached, ids), expected)
    merge_model(str(tmp_path / "tuned"), [], tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    assert_same(logits(whole, ids), expected)
    assert (expected - logits(load_model(str(small_folder)), ids)).abs().max() > 1e-2


# Bad input


def small_qwen(folder: Path, **changes: Any) -> Path:
    config = Qwen2Config(
        **{
            "vocab_size": 576, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
            "num_attention_heads": 2, "num_key_value_heads": 2, **changes,
        }
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copyfile(data_path("tiny-reasoner") / "tokenizer.json", folder / "tokenizer.json")
    return folder


def test_another_shape_is_refused_with_the_tensor_and_both_shapes(a, b, tmp_path):
    wide = small_qwen(tmp_path / "wide", hidden_size=48)
    message = refusal(wide, adapters=[str(a)])
    assert re.search(
        r"layers\.0\.\S+\.lora_[AB]\.weight is \(.*\), the model needs \(.*\)", message
    )
    assert "(4, 32), the model needs (4, 48)" in message or "(32, 4)" in message
    tall = small_qwen(tmp_path / "tall", intermediate_size=80)
    assert re.search(r"lora_[AB]\.weight is .*64.*needs .*80", refusal(tall, adapters=[str(a)]))
    # The second adapter is checked as the first is.
    assert "the model needs" in refusal(tall, adapters=[str(b)])
    deeper = small_qwen(tmp_path / "deeper", num_hidden_layers=5)
    assert "layers.4" in refusal(deeper, adapters=[str(a)])
    flatter = small_qwen(tmp_path / "flatter", num_hidden_layers=3)
    assert "the model has no module model.layers.3" in refusal(flatter, adapters=[str(a)])


def test_the_second_adapters_shape_is_checked_on_a_wrapped_model(small_folder, a, tmp_path):
    wide = small_qwen(tmp_path / "wide", hidden_size=48)
    unfit = make_adapter(wide, tmp_path / "unfit")
    message = refusal(small_folder, adapters=[str(a), str(unfit)])
    assert str(unfit) in message
    assert "the model needs" in message


def test_adapters_that_are_none_and_scales_that_do_not_match(small_folder, a, b):
    base = str(small_folder)
    assert "no adapter_config.json" in refusal(base, adapters=[base])
    assert "3 scales for 2 adapters" in refusal(base, adapters=[str(a), str(b)], scale=[1, 2, 3])
    assert "0.5 has no adapter" in refusal(base, scale=0.5)
    for bad in (float("nan"), float("inf")):
        assert str(bad) in refusal(base, adapters=[str(a)], scale=bad)
    assert "/nope" in refusal(base, adapters=["/nope"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["norm"]}, "norm.weight"),
    ],
)
def test_more_than_a_lora_is_refused(small_folder, tmp_path, options, named):
    """Scaled by 0 it would not be the base."""
    folder = make_adapter(small_folder, tmp_path / "more", **options)
    message = refusal(small_folder, adapters=[str(folder)])
    assert "only plain LoRA is read" in message
    assert named in message


# Merge


def test_merged_stacked_and_scaled_is_the_attached_one(
    small_folder, other_base, a, b, tmp_path, ids
):
    out = tmp_path / "merged"
    adapters, scale = [str(a), str(b)], [0.5, 2.0]
    made = merge_model(str(other_base), adapters, out, scale=scale)
    attached = load_model(str(other_base), adapters=adapters, scale=scale)
    expected = logits(attached, ids)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert_same(logits(plain, ids), expected)
    ours = load_model(str(out))
    assert_same(logits(ours, ids), expected)
    assert made.dtype == "float32"
    assert made.rounding.lost == 0
    assert made.notes == ()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (other_base / name).read_bytes()
    artifact = Workspace(tmp_path).read(out)
    assert artifact is not None
    assert list(artifact.damage()) == []
    lineage = artifact.manifest
    assert lineage.config["base_hash"] == load_model(str(other_base)).weights_hash
    assert [x["scale"] for x in lineage.config["adapters"]] == scale
    assert lineage.hashes["weights"] == ours.weights_hash
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_bundled_model_is_merged_in_its_own_dtype(tmp_path, ids):
    base = data_path("tiny-reasoner")
    adapter = make_adapter(base, tmp_path / "adapter", std=0.02)
    made = merge_model("tiny-reasoner", [str(adapter)], tmp_path / "out")
    assert made.dtype == "bfloat16"
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    original = load_file(base / "model.safetensors")
    under = set(changes(adapter))
    assert set(held) == set(original)
    assert all(torch.equal(held[k], original[k]) for k in original if k not in under)
    assert not any(torch.equal(held[k], original[k]) for k in under)
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    # Each weight is the float32 sum rounded once, not the rounded change added.
    expected = dict(by_hand(base, (1.0, adapter)).named_parameters())
    for name in under:
        step = held[name].float().abs() * 2**-7 + 1e-9
        assert ((held[name].float() - expected[name]).abs() <= step / 2 * 1.01).all()
    exact = merge_model("tiny-reasoner", [str(adapter)], tmp_path / "exact", dtype="float32")
    assert exact.rounding.lost == 0
    attached = load_model("tiny-reasoner", adapters=[str(adapter)])
    whole = load_model(str(tmp_path / "exact"))
    assert_same(logits(whole, ids), logits(attached, ids))


def test_a_change_that_rounding_takes_away_is_said(tmp_path):
    base = data_path("tiny-reasoner")
    faint = make_adapter(base, tmp_path / "faint", std=1e-4)
    made = merge_model("tiny-reasoner", [str(faint)], tmp_path / "out")
    assert made.rounding.lost > 0.9
    assert made.rounding.unchanged > 0.99
    assert "--dtype float32 keeps it" in made.notes[0]
    assert merge_model("tiny-reasoner", [str(faint)], tmp_path / "x", dtype="float32").notes == ()
    off = merge_model("tiny-reasoner", [str(faint)], tmp_path / "off", scale=0)
    assert (off.rounding.lost, off.rounding.unchanged) == (0, 1)
    held, original = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "off", base)
    )
    assert all(torch.equal(held[k], original[k]) for k in original)


def test_a_neox_model_is_attached_and_merged(tmp_path, ids):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=576, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, initializer_range=0.2,
    )  # fmt: skip
    base = tmp_path / "neox"
    GPTNeoXForCausalLM(config).save_pretrained(base)
    shutil.copyfile(data_path("tiny-reasoner") / "tokenizer.json", base / "tokenizer.json")
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=targets)
    attached = load_model(str(base), adapters=[str(adapter)])
    expected = logits(by_hand(base, (1.0, adapter)), ids)
    assert_same(logits(attached, ids), expected)
    merge_model(str(base), [str(adapter)], tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert_same(logits(plain, ids), expected)


_GGUF = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def write_gguf(path: Path, folder: Path) -> None:
    """Write the small Qwen2 folder as GGUF in float32."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(4)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]
    names = {number: token for token, number in tokens["vocab"].items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([names.get(i, f"<unused{i}>") for i in range(576)])
    writer.add_token_types([gguf.TokenType.NORMAL] * 576)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokens["merges"]])
    writer.add_eos_token_id(0)
    for key, tensor in load_file(folder / "model.safetensors").items():
        stem, suffix = key.removeprefix("model.").rsplit(".", 1)
        layer = re.match(r"layers\.(\d+)\.(.+)", stem)
        name = f"blk.{layer[1]}.{_GGUF[layer[2]]}" if layer else _GGUF[stem]
        writer.add_tensor(f"{name}.{suffix}", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_base_becomes_a_whole_folder(small_folder, a, tmp_path, ids):
    path = tmp_path / "small.gguf"
    write_gguf(path, small_folder)
    made = merge_model(str(path), [str(a)], tmp_path / "out")
    assert made.dtype == "float32"
    attached = load_model(str(path), adapters=[str(a)])
    expected = logits(by_hand(small_folder, (1.0, a)), ids)
    assert_same(logits(attached, ids), expected)
    whole = load_model(str(tmp_path / "out"))
    assert_same(logits(whole, ids), expected)
    text = "What is 12+34? abc"
    assert whole.tokenizer(text)["input_ids"] == attached.tokenizer(text)["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert_same(logits(plain, ids), expected)


def test_what_is_there_is_not_overwritten(small_folder, a, tmp_path):
    out = tmp_path / "out"
    merge_model(str(small_folder), [str(a)], out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(BadInputError, match="--force"):
        merge_model(str(small_folder), [str(a)], out, scale=2.0)
    assert (out / "model.safetensors").read_bytes() == before
    merge_model(str(small_folder), [str(a)], out, scale=2.0, force=True)
    assert (out / "model.safetensors").read_bytes() != before

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(BadInputError, match="not made by merge"):
        merge_model(str(small_folder), [str(a)], mine, force=True)
    assert (mine / "thesis.txt").read_text() == "mine"
    for taken in (small_folder, a, tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(BadInputError):
            merge_model(str(small_folder), [str(a)], taken, force=True)
    with pytest.raises(BadInputError, match="holds"):
        merge_model(str(small_folder), [str(a)], small_folder.parent, force=True)
    with pytest.raises(BadInputError, match="no folder that can be written to"):
        merge_model(str(small_folder), [str(a)], mine / "thesis.txt" / "out")


def test_a_merge_that_fails_on_the_way_leaves_nothing(small_folder, a, tmp_path, monkeypatch):
    out = tmp_path / "out"
    merge_model(str(small_folder), [str(a)], out)
    before = (out / "model.safetensors").read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_copy_files", full)
    with pytest.raises(RunFailedError, match="disk is full"):
        merge_model(str(small_folder), [str(a)], out, scale=2.0, force=True)
    assert (out / "model.safetensors").read_bytes() == before
    with pytest.raises(RunFailedError):
        merge_model(str(small_folder), [str(a)], tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_merges_that_cannot_be(small_folder, a, tmp_path):
    with pytest.raises(BadInputError, match="no adapter to merge"):
        merge_model(str(small_folder), [], tmp_path / "out")
    with pytest.raises(BadInputError, match="'int3'"):
        merge_model(str(small_folder), [str(a)], tmp_path / "out", dtype="int3")
    with pytest.raises(RunFailedError, match="float16"):
        merge_model(str(small_folder), [str(a)], tmp_path / "out", dtype="float16", scale=1e8)
    with pytest.raises(RunFailedError, match="finite"):
        merge_model(str(small_folder), [str(a)], tmp_path / "out", scale=1e39)
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_tied_embeddings_is_not_merged(tmp_path):
    adapter = make_adapter(
        data_path("tiny-reasoner"), tmp_path / "adapter", target_modules=["lm_head"]
    )
    with pytest.raises(BadInputError, match="tied"):
        merge_model("tiny-reasoner", [str(adapter)], tmp_path / "out")


# Card


def card_input() -> dict[str, Any]:
    objective = {
        "preset": "paper", "site": "mlp_out", "reference": "adapted", "reference_gradient": True,
        "direction": "sae||reference", "sae_gradient": True, "reduction": "sum",
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "schedule": "cosine",
        "clip_norm": None,
    }  # fmt: skip
    return {
        "kind": "adapter",
        "command": ["resa-lens", "tune", "--data", "my data.jsonl"],
        "config": {
            "layer": 5, "objective": objective, "lora": {"rank": 32, "alpha": 128},
            "elicitation": {"source": "tiny"}, "data": "ab12", "steps": 100,
            "sae": "saes/m/run", "source": "tiny-reasoner-rl-0a1b2c3d", "base_hash": "459a3904ff",
            "base": "/somewhere/tiny-reasoner", "dtype": "float32",
        },
        "results": {
            "losses": [0.5, 0.25], "tokens": 25600, "trainable": 1234, "layer": 5,
            "site": "mlp_out", "model": "tiny-reasoner", "n_layers": 12, "warnings": [],
        },
        "hashes": {"data": "ab12"},
        "seconds": 12.5, "peak_memory_mb": 800.0, "device": "cpu", "dtype": "float32",
        "versions": {"peft": "0.21.2"},
    }  # fmt: skip


def card_scores(difference: float, low: float, high: float, p: float) -> dict[str, Any]:
    return {
        "base": {"accuracy": 0.68, "n": 500, "ci": [0.64, 0.72]},
        "tuned": {"accuracy": 0.68 + difference, "n": 500, "ci": [0.65, 0.73]},
        "paired": {
            "difference": difference, "ci": [low, high], "p_value": p, "n": 500, "changed": 5,
            "gained": 4, "lost": 1, "note": "McNemar's exact test",
        },
    }  # fmt: skip


SAE = {
    "config": {"sae": {"latents": 2048, "k": 32}},
    "results": {"layers": [{"layer": 4, "fvu": 0.9}, {"layer": 5, "fvu": 0.0123}]},
}


GOLDEN = """---
base_model: tiny-reasoner
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- resa-lens
- sae-tuning
---

# LoRA adapter for tiny-reasoner

Tuned by SAE-Tuning: the KL divergence between the model with a frozen sparse autoencoder's \
reconstruction inserted and the model without it is minimised over the LoRA weights; the \
autoencoder is not part of the result.

## Scores

|  | accuracy | 95 % interval | questions |
| --- | --- | --- | --- |
| base | 68.0 % | 64.0 to 72.0 % | 500 |
| with this adapter | 68.6 % | 65.0 to 73.0 % | 500 |

No difference from the base was shown, and none is claimed: +0.6 points, 95 % interval -0.2 to \
+1.6, p = 0.375 (McNemar's exact test), n = 500; 5 answers changed, 4 gained and \
1 lost. Same questions for both, paired. One adapter's test: it is \
not corrected for other adapters, layers or seeds that were tried.

## Lineage

| what | value |
| --- | --- |
| base model | `tiny-reasoner`, weights `459a3904ff` |
| source model of the SAE | `tiny-reasoner-rl-0a1b2c3d` |
| SAE run | `saes/m/run` |
| place | layer 5 (0-based; 6th of 12), site `mlp_out` |
| SAE | 2048 latents, k 32 |
| SAE's FVU at this layer | 0.0123 |
| objective | preset `paper`; reduction `sum` |
| elicitation data | `tiny`, hash `ab12` |
| length | 100 steps, 25600 tokens |
| LoRA and optimizer | rank `32`, alpha `128` |
| trainable parameters | 1234 |
| loss | 0.5 at the first step, 0.25 at the last |

## Cost of this adapter's tuning

| what | value |
| --- | --- |
| time | 12.5 s on cpu, float32 |
| peak memory | 800 MB |
| energy | not recorded |

## Made with

```
resa-lens tune --data 'my data.jsonl'
```

| package | version |
| --- | --- |
| peft | 0.21.2 |
"""


def test_the_card_in_full():
    scores = card_scores(0.006, -0.002, 0.016, 0.375)
    card = adapter_card(card_input(), scores, sae=SAE)
    assert card == GOLDEN
    ModelCard(card)  # the hub's own reader


def test_a_gain_is_claimed_only_where_it_was_measured():
    manifest = card_input()
    gain = adapter_card(manifest, card_scores(0.05, 0.02, 0.08, 0.001))
    assert "Measured gain: +5.0 points, 95 % interval +2.0 to +8.0, p = 0.001 (McNemar" in gain
    loss = adapter_card(manifest, card_scores(-0.05, -0.08, -0.02, 0.001))
    assert "Measured loss: -5.0 points" in loss
    for shy in (
        card_scores(0.05, 0.02, 0.08, 0.06),
        card_scores(0.05, -0.001, 0.08, 0.04),
        card_scores(0.0, 0.0, 0.0, 1.0),
    ):
        card = adapter_card(manifest, shy)
        assert "none is claimed" in card
        assert "gain:" not in card
    assert "Not scored." in adapter_card(manifest)


def test_controls_and_fine_tunings_are_called_that():
    manifest = card_input()
    manifest["config"]["control"] = "noise"
    card = adapter_card(manifest)
    assert "A control, for comparison with SAE-Tuning: `noise` in the place of the SAE." in card
    assert "- control\n" in card
    assert "- sae-tuning\n" not in card
    for key in ("sae", "layer", "source"):
        del manifest["config"][key]
    manifest["config"] |= {"control": "cot-free", "objective": {"targets": ["q_proj"]}}
    manifest["results"] |= {"layer": None, "site": None}
    card = adapter_card(manifest)
    assert "fine-tuned on `cot-free` data" in card
    assert "no preset; targets `['q_proj']`" in card


HOSTILE = "evil|`x`\n---\nlicense: mit\n# Best model\n<script>alert(1)</script>\x1b[31m ![i](u)"


def test_hostile_names_stay_names(tmp_path):
    manifest = card_input()
    manifest["results"] |= {"model": HOSTILE, "warnings": [HOSTILE]}
    manifest["config"] |= {"source": HOSTILE, "sae": HOSTILE}
    manifest["config"]["elicitation"]["source"] = HOSTILE
    manifest["config"]["lora"] = {HOSTILE: HOSTILE}
    manifest["versions"] = {HOSTILE: HOSTILE}
    manifest["command"] = ["resa-lens", "```\n# out", HOSTILE]
    card = adapter_card(manifest, card_scores(0.0, 0.0, 0.0, 1.0), sae=SAE)
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    values = yaml.safe_load(front)
    assert set(values) == {"base_model", "library_name", "pipeline_tag", "tags"}
    assert "license" in values["base_model"]
    fence = re.search(r"^(`{3,})\n(.*?)\n\1\n", body, re.DOTALL | re.MULTILINE)
    assert fence is not None
    assert len(fence[1]) > 3
    body = body.replace(fence[0], "")
    assert "\x1b" not in card
    headings = re.findall(r"^#+ .*$", body, re.MULTILINE)
    assert [h.split()[0] for h in headings] == ["#", "##", "##", "##", "##"]
    for line in body.splitlines():
        if line.startswith("| ") and "interval" not in line:
            cells = re.split(r"(?<!\\)\|", line)
            assert len(cells) in (4, 6), line
    outside = re.sub(r"(`+).*?(?<!`)\1(?!`)", "", body)
    assert "<script>" not in outside
    path = write_card(tmp_path, card)
    assert path.read_text() == card
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_a_path_tells_nothing_of_the_machine():
    manifest = card_input()
    manifest["results"]["model"] = "/home/somebody/models/my-base"
    card = adapter_card(manifest)
    assert "base_model: my-base\n" in card
    assert "somebody" not in card
    manifest["results"]["model"] = "owner/name"
    assert "base_model: owner/name\n" in adapter_card(manifest)
