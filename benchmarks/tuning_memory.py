"""Memory of a tuning step at a large vocabulary: chunked KL against both passes' whole logits.

    python benchmarks/tuning_memory.py

A random Qwen2-shaped model, a few narrow layers, adapters on all projections.  Each way runs one
step in a process of its own; what is given is the peak of resident memory above what was there
after loading, the ratio, and the difference of the gradients.  Exits with 1 where a target is
missed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

RATIO, DIFFERENCE = 0.25, 1e-5


def memory_mb(field: str) -> float:
    """Return a field of this process's status: VmRSS, or VmHWM for the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{field} is not in /proc/self/status")


def child(way: str, vocab: int, tokens: int, width: int, layers: int, name: str, out: Path) -> None:
    """Take one step and write the gradients; print peak and loss."""
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from resa_lens.models.hookpoints import Hookpoint
    from resa_lens.models.host import Model
    from resa_lens.saes.coder import new_coder
    from resa_lens.tuning.objective import preset, tuning_loss
    from resa_lens.tuning.passes import Passes
    from resa_lens.tuning.train import TuneConfig, add_adapters

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=tokens,
        tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    plain: Any = Qwen2ForCausalLM(config)
    model = Model("random", plain, None, None, "0" * 8, "cpu", "float32", "benchmark")  # pyright: ignore
    objective = preset(name)
    peft, bridge = add_adapters(model, objective, TuneConfig(rank=8, alpha=16, dropout=0.0))
    # Zero adapters would leave half of the gradients zero.
    with torch.no_grad():
        for key, weight in peft.named_parameters():
            if "lora_B" in key:
                weight.copy_(0.05 * torch.randn(weight.shape))
    point = Hookpoint(layers // 2 - 1, objective.site)
    coder = new_coder(width, 4 * width, 8, seed=0).requires_grad_(False)
    ids = torch.randint(vocab, (1, tokens))
    # What only the first step needs is loaded too.
    passes = Passes(bridge, peft, point, coder, objective)
    for loss in (
        tuning_loss(bridge, peft, ids[:, :8], point, coder, objective),
        passes(ids[:, :8])[0],
    ):
        loss.backward()
    for weight in peft.parameters():
        weight.grad = None
    # The kernel forgets the peak so far.
    Path("/proc/self/clear_refs").write_text("5")
    loaded = memory_mb("VmRSS")
    if way == "plain":
        loss = tuning_loss(bridge, peft, ids, point, coder, objective)
    else:
        loss = passes(ids)[0]
    loss.backward()
    peak = memory_mb("VmHWM")
    grads = {key: w.grad for key, w in peft.named_parameters() if w.grad is not None}
    save_file(grads, out)
    print(json.dumps({"loaded": loaded, "peak": peak - loaded, "loss": loss.item()}))


def main(
    vocab: int = 151_936,
    tokens: int = 2048,
    width: int = 128,
    layers: int = 4,
    preset: str = "both",
    way: str = "",
    out: str = "",
) -> None:
    """Measure both ways and print the table."""
    if way:
        child(way, vocab, tokens, width, layers, preset, Path(out))
        return
    from safetensors.torch import load_file

    print(f"{date.today()}, vocabulary {vocab}, {tokens} tokens, {layers} layers x {width}, "
          f"float32, torch {torch.__version__}")  # fmt: skip
    met = True
    for name in ("paper", "reference") if preset == "both" else (preset,):
        found, grads = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("plain", "chunked"):
                file = f"{folder}/{kind}.safetensors"
                done = subprocess.run(
                    [
                        sys.executable, __file__, "--vocab", str(vocab), "--tokens", str(tokens),
                        "--width", str(width), "--layers", str(layers), "--preset", name,
                        "--way", kind, "--out", file,
                    ],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                found[kind] = json.loads(done.stdout.splitlines()[-1])
                grads[kind] = load_file(file)
        assert grads["plain"].keys() == grads["chunked"].keys()
        whole = torch.cat([grads["plain"][key].flatten() for key in sorted(grads["plain"])])
        other = torch.cat([grads["chunked"][key].flatten() for key in sorted(grads["plain"])])
        difference = ((whole - other).norm() / whole.norm()).item()
        ratio = found["chunked"]["peak"] / found["plain"]["peak"]
        good = ratio <= RATIO and difference <= DIFFERENCE
        met = met and good
        for kind, label in (("plain", "both passes' logits"), ("chunked", "chunked")):
            row = found[kind]
            print(f"{name:10} {label:20} {row['loaded']:7.0f} MB after loading, peak "
                  f"{row['peak']:7.0f} MB above it, loss {row['loss']:.7g}")  # fmt: skip
        print(f"{name:10} chunked / plain {ratio:.3f}, target {RATIO}; gradients differ by "
              f"{difference:.1e} of their norm, target {DIFFERENCE:.0e}: "
              f"{'met' if good else 'MISSED'}")  # fmt: skip
    if not met:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
