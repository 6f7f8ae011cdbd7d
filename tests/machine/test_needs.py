"""What a model will need, from its headers: held to the stages' own arithmetic and to the log."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM
from whole_process import run_whole

from resa_lens.errors import BadInputError
from resa_lens.machine import needs
from resa_lens.machine.needs import Shape, needs_of, read_shape
from resa_lens.resources import data_path
from resa_lens.saes.coder import new_coder

R1_DISTILL = Shape(
    name="R1-Distill-1.5B", layers=28, width=1536, feed_forward=8960, vocabulary=151_936,
    parameters=1_777_088_000, dtype="BF16", stored_mb=3390.0, adapted=8_716_288,
)  # fmt: skip


def of(shape: Shape, device: str = "cpu", latents: int | None = None) -> needs.Needs:
    return needs_of(
        shape, device=device, available_mb=24_000.0, free_disk_mb=1e6, latents=latents
    )  # fmt: skip


def test_constants_are_those_of_the_stages():
    from resa_lens.saes.optim import STATE_COPIES
    from resa_lens.saes.plan import state_mb
    from resa_lens.saes.train import SaeConfig
    from resa_lens.texts.corpora import CorpusConfig
    from resa_lens.tuning.kl import GPU_ROWS, LOGIT_BYTES
    from resa_lens.tuning.loop import TuneConfig
    from resa_lens.tuning.objective import preset

    for width in (64, 128, 576, 1023, 1024, 1536, 4096):
        assert needs.latents_of(width) == SaeConfig().for_width(width).latents
    assert STATE_COPIES["signum"] == needs.STATE_COPIES
    made = of(R1_DISTILL)
    full = SaeConfig().for_width(1536)
    assert made.sae_mb * needs.STATE_COPIES == pytest.approx(state_mb(full, 1536))
    assert TuneConfig().rank == needs.RANK
    assert CorpusConfig().sequence == needs.SEQUENCE
    assert preset("paper").targets == needs.TARGETS
    assert needs.LOGIT_MB * needs.MB == LOGIT_BYTES
    assert needs.LOGIT_ROWS == GPU_ROWS


def test_the_bundled_model_is_read_from_its_headers(tiny):
    shape = read_shape("tiny-reasoner")
    plain = tiny.model
    assert (shape.layers, shape.width) == (tiny.n_layers, tiny.d_model)
    assert shape.parameters == sum(p.numel() for p in plain.parameters())
    assert shape.vocabulary == plain.config.vocab_size
    # docs/log.md and the manifests of data/workspace hold these as measured.
    assert shape.adapted == 344_064
    assert of(shape).train_mb == pytest.approx(657, rel=0.05)
    assert of(shape).tune_mb == pytest.approx(719, rel=0.1)


def test_estimates_are_those_of_the_log_and_of_the_howto():
    bench = Shape("random", 4, 128, 256, 151_936, 0, "F32", 0.0, 0)
    assert needs.activations_mb(bench, 2048, 4) == pytest.approx(370, rel=0.2)
    gpu = of(R1_DISTILL, "cuda")
    assert gpu.dtype == "bfloat16"
    # The how-to: two encoders of 403 MB and 3.55 GB of weights, in decimal gigabytes.
    assert gpu.count_mb * needs.MB / 1e9 == pytest.approx(4.36, rel=0.01)
    assert gpu.train_mb == pytest.approx(43_765, rel=0.03)
    assert gpu.saes_disk_mb == pytest.approx(19_968)
    assert gpu.fits() == {
        "load": True, "count": True, "train-saes": True, "tune": True, "disk": True
    }  # fmt: skip
    small = replace(gpu, available_mb=3000.0, free_disk_mb=100.0)
    assert not any(small.fits().values())
    assert of(R1_DISTILL, latents=32_768).sae_mb == gpu.sae_mb / 2


@pytest.mark.slow
def test_tuning_takes_what_the_plan_says(tmp_path: Path):
    """A whole process, scores included, whose weights are more than its activations: one copy."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=16_384, hidden_size=512, intermediate_size=1408, num_hidden_layers=10,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = tmp_path / "model"
    Qwen2ForCausalLM(config).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((data_path("tiny-reasoner") / name).read_bytes())
    new_coder(512, 2048, 16, seed=0).save_to_disk(tmp_path / "saes" / "layers.4.mlp")
    command = (
        "tune", "--model", str(model), "--layer", "4", "--saes", str(tmp_path / "saes"),
        "--allow-site-mismatch", "--steps", "3", "--limit", "4", "--max-new-tokens", "8",
        "--no-start-check", "--workspace", str(tmp_path / "w"),
    )  # fmt: skip
    plan, _ = run_whole(*command, "--plan")
    assert not (tmp_path / "w").exists()
    _, peak = run_whole(*command)
    assert of(read_shape(str(model)), latents=2048).tune_mb == pytest.approx(peak, rel=0.15)
    assert plan["peak_memory_mb"] == pytest.approx(peak, rel=0.15)


def write_model(folder: Path, **config: object) -> Path:
    folder.mkdir()
    held = {"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 10, "intermediate_size": 16}
    (folder / "config.json").write_text(json.dumps({**held, **config}))
    save_file(
        {"model.embed_tokens.weight": np.zeros((10, 8), np.float16),
         "model.layers.0.self_attn.q_proj.weight": np.zeros((8, 8), np.float16)},
        folder / "model.safetensors",
    )  # fmt: skip
    return folder


def test_a_folder(tmp_path: Path):
    shape = read_shape(str(write_model(tmp_path / "m")))
    assert (shape.layers, shape.width, shape.feed_forward) == (2, 8, 16)
    assert (shape.parameters, shape.dtype, shape.adapted) == (144, "F16", 32 * 16)
    nested = {"text_config": {"num_hidden_layers": 3, "hidden_size": 8, "vocab_size": 10}}
    assert read_shape(str(write_model(tmp_path / "n", **nested))).layers == 3


def write_gguf(file: Path, *, version: int = 3, blocks: bool = True) -> Path:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fields = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        # As a vocabulary stands there, in front of what is needed.
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("tokenizer.ggml.types") + struct.pack("<IIQ", 9, 5, 2) + struct.pack("<ii", 1, 1),
        text("llama.embedding_length") + struct.pack("<II", 4, 8),
        text("llama.feed_forward_length") + struct.pack("<II", 4, 16),
    ]
    if blocks:
        fields.append(text("llama.block_count") + struct.pack("<II", 4, 2))
    tensors = [
        text(name) + struct.pack("<IQQIQ", 2, *shape, kind, 0)
        for name, shape, kind in (
            ("token_embd.weight", (8, 10), 8), ("blk.0.attn_q.weight", (8, 8), 0)
        )
    ]  # fmt: skip
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    file.write_bytes(head + b"".join(fields) + b"".join(tensors))
    return file


def long_key(file: Path, length: int) -> Path:
    """A header whose first key has a length that no file holds."""
    file.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, length) + bytes(64))
    return file


def test_a_gguf_file(tmp_path: Path):
    shape = read_shape(str(write_gguf(tmp_path / "m.gguf")))
    assert (shape.layers, shape.width, shape.feed_forward, shape.vocabulary) == (2, 8, 16, 10)
    assert (shape.parameters, shape.dtype, shape.adapted) == (144, "F32, Q8_0", 32 * 16)
    assert of(shape).load_mb > needs.PROCESS_MB + 144 * 4 / needs.MB


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent", "no such file or folder"),
        (lambda p: (p / "x.bin").touch() or p / "x.bin", "file of no known kind"),
        (lambda p: (p / "e").mkdir() or p / "e", "has no config.json"),
        (lambda p: write_model(p / "c", hidden_size=None), "hidden_size"),
        (lambda p: (p / "g.gguf").write_bytes(b"GGUF\x03") and p / "g.gguf", "no readable GGUF"),
        (lambda p: (p / "h.gguf").write_bytes(b"hello") and p / "h.gguf", "does not begin with"),
        (lambda p: write_gguf(p / "v.gguf", version=1), "version 1"),
        (lambda p: write_gguf(p / "b.gguf", blocks=False), "llama.block_count"),
        (lambda p: long_key(p / "k.gguf", 2**63), "a length of 9223372036854775808 in a file of"),
        (lambda p: long_key(p / "k.gguf", 2**45), "a length of 35184372088832 in a file of"),
        (lambda p: Path("nobody/such-model"), "hf download nobody/such-model"),
    ],
)
def test_what_is_no_model_is_said(tmp_path: Path, make, message: str):
    with pytest.raises(BadInputError, match=message):
        read_shape(str(make(tmp_path)))


def test_truncated_weights_are_said(tmp_path: Path):
    folder = write_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BadInputError, match="corrupt or truncated"):
        read_shape(str(folder))
