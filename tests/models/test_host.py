from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from resa_lens.errors import BadInputError
from resa_lens.models.host import choose_device, hash_files, load_model
from resa_lens.resources import data_path
from resa_lens.tuning.objective import PRESETS
from resa_lens.tuning.train import TuneConfig, add_adapters, save_adapter

EOS, PAD = "<eos>", "<pad>"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIALS = [EOS, PAD, "<think>", "</think>"]
MERGED = ["Ġt", "ab"]
MERGES = [("Ġ", "t"), ("a", "b")]
VOCABULARY = [*ALPHABET, *SPECIALS, *MERGED]
SHAPE: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": len(ALPHABET), "pad_token_id": None,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES: dict[str, Any] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=32)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)),
}


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, two merges, and the think tags as special tokens."""
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def save_small(folder: Path, shape: str = "qwen2", seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = SHAPES[shape]()
    # Biases and norms away from 0 and 1, so that a lost one is seen.
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return save_small(tmp_path / "small")


def token_ids(rows: int = 3, length: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(len(ALPHABET), (rows, length), generator=generator)


def plain_logits(folder: Path | str) -> torch.Tensor:
    """Of a copy that neither resa-lens nor TransformerLens has touched."""
    untouched = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return untouched(token_ids()).logits


def bridge_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.bridge(token_ids())


def refusal(name: Any, **options: Any) -> str:
    """The message of the refusal, of at most three lines."""
    with pytest.raises(BadInputError) as caught:
        load_model(str(name), **options)
    message = str(caught.value)
    assert message.strip().count("\n") < 3
    return message


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Host


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_hosts_logits_are_plain_transformers(tmp_path, shape):
    folder = save_small(tmp_path / shape, shape)
    expected = plain_logits(folder)
    assert expected.std() > 0.1
    model = load_model(str(folder))
    assert (model.n_layers, model.d_model, model.dtype) == (3, 64, "float32")
    assert (bridge_logits(model) - expected).abs().max() < 1e-4
    assert model.attention == "native"


def test_another_model_would_be_seen(tmp_path):
    one, other = (save_small(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert (bridge_logits(load_model(str(one))) - plain_logits(other)).abs().max() > 0.1


def test_the_bundled_models_logits_are_plain_transformers():
    model = load_model("tiny-reasoner")
    expected = plain_logits(data_path("tiny-reasoner"))
    assert (bridge_logits(model) - expected).abs().max() < 1e-4
    assert model.attention == "native"


def test_hooked_logits_on_the_host_change_and_unhooked_return(small):
    model = load_model(str(small))
    before = bridge_logits(model)
    with model.bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda acts, hook: 0 * acts)]):
        assert not torch.allclose(bridge_logits(model), before, atol=1e-2)
    assert torch.equal(bridge_logits(model), before)


def test_a_model_nobody_hooks_stays_plain(small):
    model = load_model(str(small))
    assert not any("_original_component" in key for key in model.model.state_dict())
    assert "bridge" not in vars(model)
    assert not model.model.training


def test_tied_weights_load_without_a_head_of_their_own(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "tied"
    Qwen2ForCausalLM(
        Qwen2Config(**{**SHAPE, "tie_word_embeddings": True}, num_key_value_heads=2)
    ).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert (bridge_logits(load_model(str(folder))) - plain_logits(folder)).abs().max() < 1e-4


def test_a_sharded_folder_loads_like_a_whole_one(small, tmp_path):
    whole = load_model(str(small))
    sharded = tmp_path / "sharded"
    shutil.copytree(small, sharded)
    tensors = sorted(load_file(small / "model.safetensors").items())
    (sharded / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number, part in enumerate((dict(tensors[:9]), dict(tensors[9:])), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file(part, sharded / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    index_file = sharded / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert torch.equal(bridge_logits(load_model(str(sharded))), bridge_logits(whole))

    (sharded / "model-00002-of-00002.safetensors").rename(tmp_path / "outside.safetensors")
    assert "lacks model-00002-of-00002.safetensors" in refusal(sharded)
    for escape in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        moved = {key: escape if "00002" in value[:11] else value for key, value in index.items()}
        index_file.write_text(json.dumps({"weight_map": moved}))
        assert escape in refusal(sharded)
    for damaged in ("{", "[]", '{"weight_map": 3}', "{}"):
        index_file.write_text(damaged)
        assert "index.json is damaged" in refusal(sharded)


def test_the_tokens_are_those_of_the_folders_own_file(small):
    # AutoTokenizer puts Qwen2's pre-tokenizer, which knows no digit pairs, in place of the file's.
    model = load_model(str(small))
    own = Tokenizer.from_file(str(small / "tokenizer.json"))
    text = "abc te 12<think> don't\n\n x"
    assert model.tokenizer(text)["input_ids"] == own.encode(text).ids
    assert model.tokenizer.eos_token == EOS
    assert model.tokenizer.pad_token == PAD


def test_the_bundled_models_tokens_are_those_it_was_trained_with():
    own = Tokenizer.from_file(str(data_path("tiny-reasoner") / "tokenizer.json"))
    text = "Problem: What is 12+34? <think> 12+34=46 </think> <answer> Answer: 46 </answer>"
    assert load_model("tiny-reasoner").tokenizer(text)["input_ids"] == own.encode(text).ids


# Names and places


def test_the_slug_is_readable_with_8_hex_digits_and_tells_two_finals_apart(tmp_path):
    one = load_model(str(save_small(tmp_path / "a" / "final", seed=0)))
    two = load_model(str(save_small(tmp_path / "b" / "final", seed=1)))
    assert re.fullmatch(r"final-[0-9a-f]{8}", one.slug)
    assert re.fullmatch(r"final-[0-9a-f]{8}", two.slug)
    assert one.slug != two.slug
    assert load_model(str(tmp_path / "a" / "final") + "/").slug == one.slug
    one.name = "some-owner/A model_v2"
    assert one.slug == f"A-model-v2-{one.weights_hash[:8]}"


def test_the_weights_hash_is_sha256_of_the_file_or_of_all_files_names_and_hashes(tmp_path):
    (tmp_path / "b").write_bytes(b"second")
    (tmp_path / "a").write_bytes(b"first")

    def sha256sum(text: bytes) -> str:
        done = subprocess.run(["sha256sum"], input=text, capture_output=True, check=True)
        return done.stdout.split()[0].decode()

    first, second = sha256sum(b"first"), sha256sum(b"second")
    assert hash_files([tmp_path / "a"]) == first
    both = f'{{"a":"{first}","b":"{second}"}}'.encode()
    assert hash_files([tmp_path / "b", tmp_path / "a"]) == sha256sum(both)


def test_device_and_dtype_are_chosen_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, dtype, why = choose_device()
    assert (device, dtype) == ("cpu", torch.float32)
    assert "no CUDA" in why
    assert "float32" in why
    device, dtype, why = choose_device("cpu", "bfloat16")
    assert (device, dtype) == ("cpu", torch.bfloat16)
    assert why.count("as asked") == 2
    for bad in ({"device": "cuda"}, {"device": "tpu"}, {"dtype": "int3"}):
        with pytest.raises(BadInputError, match=repr(next(iter(bad.values())))):
            choose_device(**bad)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device, dtype, why = choose_device()
    assert (device, dtype) == ("cuda", torch.bfloat16)
    assert "GPU" in why
    assert choose_device("cuda:1", "float16")[:2] == ("cuda:1", torch.float16)


def test_the_dtype_asked_for_is_the_models(small):
    model = load_model(str(small), dtype="bfloat16")
    assert model.dtype == "bfloat16"
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["nope", "./nope", "/nope/model", "a/b/c", "nope.gguf", "", " "])
def test_an_unknown_model_is_refused_with_its_name_and_what_there_is(name):
    message = refusal(name)
    assert repr(name) in message
    assert "tiny-reasoner" in message


def test_a_hub_id_that_is_not_cached_says_how_to_fetch_it():
    assert "`hf download some-owner/some-model`" in refusal("some-owner/some-model")
    assert "'-a/b'" in refusal("-a/b")


HUB_SCRIPT = """
import json, sys, time
from resa_lens.errors import BadInputError
from resa_lens.models.host import load_model
model = load_model("some-owner/Small-Model")
began = time.time()
try:
    load_model("some-owner/Absent")
except BadInputError as error:
    message = str(error)
print(json.dumps([model.slug, model.n_layers, str(model.folder), message, time.time() - began]))
"""


def test_a_hub_id_is_found_in_the_hub_cache_offline(small, tmp_path):
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some-owner--Small-Model"
    snapshot = repository / "snapshots" / revision
    shutil.copytree(small, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    # In a process of its own: huggingface_hub reads the place of its cache at import.
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    slug, layers, folder, message, seconds = json.loads(done.stdout)
    assert slug == f"Small-Model-{hash_files([small / 'model.safetensors'])[:8]}"
    assert layers == 3
    assert Path(folder) == snapshot
    assert "some-owner/Absent" in message
    assert seconds < 5


# Damaged and unfit folders


def test_a_folder_without_config_weights_or_tokenizer_is_refused(small, tmp_path):
    for name, what in (
        ("config.json", "no config.json"),
        ("model.safetensors", "no *.safetensors"),
        ("tokenizer.json", "no tokenizer"),
    ):
        folder = tmp_path / f"without-{name}"
        shutil.copytree(small, folder)
        (folder / name).unlink()
        message = refusal(folder)
        assert what in message
        assert str(folder) in message
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert "weights.bin is a file of no known kind" in refusal(tmp_path / "weights.bin")


@pytest.mark.parametrize("kept", [0, 4, 300, 20_000, -1])
def test_a_truncated_safetensors_is_refused_with_its_name(small, kept):
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refusal(small)
    assert str(file) in message
    assert "truncated" in message


def test_a_corrupt_safetensors_is_refused_with_its_name(small):
    file = small / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20:60] = b"\xff" * 40  # inside the header
    file.write_bytes(data)
    assert str(file) in refusal(small)
    file.write_bytes(os.urandom(5000))
    assert "corrupt" in refusal(small)


def test_a_missing_tensor_is_named(small):
    file = small / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight is missing" in refusal(small)


def test_a_wrong_width_is_named_with_both_shapes(small):
    edit_config(small, hidden_size=32)
    message = refusal(small)
    assert re.search(r"\(.*\b64\b.*\), the config needs \(.*\b32\b.*\)", message)
    assert "hidden_size" in message


@pytest.mark.parametrize(("layers", "named"), [(2, "layers.2."), (4, "layers.3.")])
def test_another_number_of_layers_is_refused(tmp_path, layers, named):
    folder = save_small(tmp_path / "llama", "llama")
    edit_config(folder, num_hidden_layers=layers)
    message = refusal(folder)
    assert named in message
    assert "num_hidden_layers" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "wide"}, "wide"),
        ({"num_attention_heads": 0}, "zero"),
        ({"hidden_size": -4}, "-4"),
        ({"model_type": "abacus"}, "abacus"),
        ({"model_type": "t5"}, "T5Config"),
    ],
)
def test_a_config_that_makes_no_causal_model_is_refused(small, changes, named):
    edit_config(small, **changes)
    message = refusal(small)
    assert named in message
    assert str(small) in message


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_json_is_refused(small, file):
    (small / file).write_text('{"')
    assert str(small) in refusal(small)


# GGUF

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_GGUF_ROOTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def write_gguf(path: Path, folder: Path, quantization: gguf.GGMLQuantizationType | None) -> None:
    """Write a Qwen2 folder as GGUF, its matrices quantised."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(VOCABULARY)
    special = gguf.TokenType.CONTROL
    writer.add_token_types(
        [special if token in SPECIALS else gguf.TokenType.NORMAL for token in VOCABULARY]
    )
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(len(ALPHABET))
    for key, tensor in load_file(folder / "model.safetensors").items():
        stem, suffix = key.rsplit(".", 1)
        if stem in _GGUF_ROOTS:
            name = _GGUF_ROOTS[stem]
        else:
            _, _, layer, rest = stem.split(".", 3)
            name = f"blk.{layer}.{_GGUF_NAMES[rest]}"
        values = tensor.numpy().astype(np.float32)
        if quantization is None or values.ndim == 1:
            writer.add_tensor(f"{name}.{suffix}", values)
        else:
            packed = gguf.quants.quantize(values, quantization)
            writer.add_tensor(f"{name}.{suffix}", packed, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_in_fp32_has_the_folders_logits_and_tokens(small, tmp_path):
    path = tmp_path / "small.gguf"
    write_gguf(path, small, None)
    model = load_model(str(path))
    assert (bridge_logits(model) - plain_logits(small)).abs().max() < 1e-4
    assert model.attention == "native"
    text = "abc 12 te<think>"
    assert model.tokenizer(text)["input_ids"] == small_tokenizer()(text)["input_ids"]
    assert model.tokenizer.eos_token == EOS
    assert model.slug == f"small-{hash_files([path])[:8]}"


def test_a_quantised_gguf_file_is_dequantised(small, tmp_path):
    path = tmp_path / "small-q8.gguf"
    write_gguf(path, small, gguf.GGMLQuantizationType.Q8_0)
    model = load_model(str(path))
    weight: Any = model.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert weight.dtype == torch.float32
    original = load_file(small / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    # Q8_0 has 127 steps for the largest of 32 values (its scale in fp16).
    step = original.view(-1, 32).abs().amax(1, keepdim=True) / 127
    error = (weight.detach() - original).view(-1, 32).abs()
    assert (error <= 0.55 * step).all()
    assert error.max() > 0
    expected = plain_logits(small)
    assert (bridge_logits(model) - expected).std() < 0.1 * expected.std()


def test_a_damaged_gguf_file_is_refused_with_its_name(small, tmp_path):
    path = tmp_path / "bad.gguf"
    write_gguf(path, small, None)
    whole = path.read_bytes()
    for damaged in (b"", b"no gguf at all" * 9, whole[:3000], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert str(path) in refusal(path)


@pytest.mark.slow
@pytest.mark.skipif("RESA_LENS_GGUF" not in os.environ, reason="RESA_LENS_GGUF names no .gguf file")
def test_a_real_gguf_file_has_plain_transformers_logits():
    from transformers import GgufConfig

    path = Path(os.environ["RESA_LENS_GGUF"])
    model = load_model(str(path))
    untouched = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    ids = torch.tensor([model.tokenizer("One and one is two.")["input_ids"]])
    with torch.no_grad():
        assert (model.bridge(ids) - untouched(ids).logits).abs().max() < 1e-4


# Adapters


def adapter_of(base: Path, folder: Path, seed: int = 0) -> torch.Tensor:
    """Save a LoRA adapter that does something; return the adapted model's logits."""
    model = load_model(str(base))
    peft, bridge = add_adapters(model, PRESETS["reference"], TuneConfig(rank=4, seed=seed))
    torch.manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(peft, folder, base)
    peft.eval()
    with torch.no_grad():
        return bridge(token_ids())


def manifest_of(folder: Path, base_hash: str) -> None:
    manifest = {"kind": "adapter", "config": {"base_hash": base_hash}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def adapter(small: Path, tmp_path: Path) -> Path:
    adapter_of(small, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_reloaded_adapter_changes_the_logits_as_it_did_when_saved(small, tmp_path):
    folder = tmp_path / "adapter"
    expected = adapter_of(small, folder)
    base = load_model(str(small))
    for given in (None, str(small)):
        model = load_model(str(folder), base=given)
        frozen = [p for n, p in model.peft.named_parameters() if "lora_" in n]
        assert frozen
        assert not any(p.requires_grad for p in frozen)
        logits = bridge_logits(model)
        assert (logits - expected).abs().max() < 1e-4
        assert (logits - plain_logits(small)).abs().max() > 0.05
        assert model.base_hash == base.weights_hash
        assert model.weights_hash != base.weights_hash
        with torch.no_grad(), model.peft.disable_adapter():
            assert (model.bridge(token_ids()) - plain_logits(small)).abs().max() < 1e-4
    trainable = load_model(str(folder), trainable=True)
    assert all(p.requires_grad for n, p in trainable.peft.named_parameters() if "lora_" in n)


def test_plain_peft_reads_the_saved_adapter(small, tmp_path):
    from peft import PeftModel

    expected = adapter_of(small, tmp_path / "adapter")
    untouched: Any = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    plain = PeftModel.from_pretrained(untouched, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert (plain(token_ids()).logits - expected).abs().max() < 1e-4


def test_the_slug_tells_adapters_of_one_base_apart(small, tmp_path):
    for seed in (0, 1):
        adapter_of(small, tmp_path / str(seed) / "adapter", seed)
    slugs = {load_model(str(tmp_path / str(seed) / "adapter")).slug for seed in (0, 1)}
    assert len(slugs) == 2


def test_a_moved_base_is_found_by_its_weights_hash(adapter, small):
    manifest_of(adapter, load_model(str(small)).weights_hash)
    expected = bridge_logits(load_model(str(adapter)))
    decoy = save_small(small.parent / "another", seed=5)
    small.rename(small.parent / "moved")
    model = load_model(str(adapter))
    assert torch.equal(bridge_logits(model), expected)
    shutil.rmtree(small.parent / "moved")
    message = refusal(adapter)
    assert str(small) in message
    assert "--base" in message
    # Another model at the recorded path is not taken for the base.
    decoy.rename(small)
    assert "--base" in refusal(adapter)


def test_the_bundled_base_is_found_by_its_hash(tmp_path):
    folder = tmp_path / "adapter"
    adapter_of(data_path("tiny-reasoner"), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/another/machine/tiny-reasoner"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert "/another/machine" in refusal(folder)
    base_hash = load_model("tiny-reasoner").weights_hash
    manifest_of(folder, base_hash)
    assert load_model(str(folder)).base_hash == base_hash


def test_a_gguf_base_beside_the_adapter_is_found_by_its_hash(small, tmp_path):
    path = tmp_path / "base.gguf"
    write_gguf(path, small, None)
    folder = tmp_path / "adapter"
    expected = adapter_of(path, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(path)
    config["base_model_name_or_path"] = "/elsewhere/base.gguf"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    manifest_of(folder, hash_files([path]))
    assert (bridge_logits(load_model(str(folder))) - expected).abs().max() < 1e-4


def test_without_its_base_an_adapter_is_refused(adapter, small):
    shutil.rmtree(small)
    message = refusal(adapter)
    assert str(small) in message
    assert "--base" in message
    assert "'/nope/base'" in refusal(adapter, base="/nope/base")


def test_an_adapter_of_another_shape_is_refused(adapter, tmp_path):
    wide = tmp_path / "wide"
    torch.manual_seed(0)
    config = Qwen2Config(**{**SHAPE, "hidden_size": 32}, num_key_value_heads=2)
    Qwen2ForCausalLM(config).save_pretrained(wide)
    small_tokenizer().save_pretrained(wide)
    assert "does not fit" in refusal(adapter, base=str(wide))
    neox = save_small(tmp_path / "neox", "neox")
    assert "does not fit" in refusal(adapter, base=str(neox))


def test_an_adapter_whose_keys_would_load_nothing_is_refused(adapter):
    # What peft writes from a booted model: it would load in silence and change nothing.
    file = adapter / "adapter_model.safetensors"
    tensors = {
        key.replace(".lora_", "._original_component.lora_"): value
        for key, value in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    message = refusal(adapter)
    assert str(adapter) in message
    assert "does not fit" in message


def test_a_damaged_adapter_is_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:2000])
    assert "truncated" in refusal(adapter)
    file.unlink()
    assert str(file) in refusal(adapter)
    file.write_bytes(whole)
    manifest = adapter / "manifest.json"
    manifest.write_text("{")
    assert str(manifest) in refusal(adapter)
    manifest.unlink()
    config = adapter / "adapter_config.json"
    for damaged in ("{", "[]", '{"peft_type": "IA3"}'):
        config.write_text(damaged)
        assert str(config) in refusal(adapter)
