"""The guide to the 1.5 B model walked at its shape, with random weights and few steps.

    python benchmarks/full_shape.py                          28 layers: 12 GB of memory and more
    python benchmarks/full_shape.py --layers 4               the same width and vocabulary, shorter
    python benchmarks/full_shape.py --layers 4 --only "doctor|train-saes"    some commands alone

A random Qwen2, SAEs and a tokenizer of that vocabulary are written into a folder; then the commands
of docs/how-to-r1-distill.md run on them, each as a process of its own, with the model in bfloat16
as on a card.  Printed are each one's exit code, seconds of the clock and of the processor, its peak
memory and, where it plans, the peak that it announced.  Exits with 1 if one failed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import typer

NAME = "R1-Distill-random"
SHORT = "--limit 2 --max-new-tokens 4"
COMMANDS = (
    "doctor --model M",
    f"eval --model M --chat-template {SHORT}",
    "train-saes --model M --layers L --tokens 4096 --plan",
    "train-saes --model M --layers L --tokens 4096",
    "train-saes --model M --mode pretrained --saes S --layers L",
    "count-features --model M --layers L --saes S",
    "count-features --model M --layers L --saes S --chat-template",
    "recommend-layers --model M --saes S",
    "falsify --model M --layers L --saes S --texts 2 --shuffles 2 --no-other-seed "
    "--no-random-weights",
    f"tune --model M --layer L --saes S --preset paper --steps 2 {SHORT} --plan",
    f"tune --model M --layer L --saes S --preset paper --steps 2 {SHORT}",
    f"tune --model M --layer L --saes S --preset paper --sequence 2048 --steps 1 {SHORT}",
    f"tune --model M --layer L --preset reference --tokens 4096 --steps 1 {SHORT}",
    f"tune --model M --layer L --saes S --control noise --steps 2 {SHORT}",
    f"eval --model M --adapter A --chat-template {SHORT}",
    "runs",
    "compare B T --flips 2",
    f"sweep --model M --layers L --saes S --seeds 1 --steps 2 {SHORT} --plan",
    f"sweep --model M --layers L --saes S --seeds 1 --steps 2 {SHORT}",
    "activity --model M --layers L --saes S --text-tokens 1024",
    "cost --usd-per-hour 1",
)
"""M is the model, L a middle layer, S the SAEs that the fourth command trained, A the adapter of
preset paper, B and T the evaluations of the base and of that adapter."""


def write_model(folder: Path, layers: int, width: int, vocabulary: int) -> None:
    """Write a random Qwen2 in bfloat16 with a tokenizer of its vocabulary."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from resa_lens.resources import data_path

    heads = max(1, width // 128)
    sizes: dict[str, Any] = {"head_dim": min(128, width // heads)}
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 35 // 6,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 6),
        max_position_embeddings=131_072, **sizes,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        Qwen2ForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    source = data_path("tiny-reasoner")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    used = {*words.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    # Words that no merge makes: the text is read as before, the vocabulary is as large.
    words |= {f"unused {i}": i for i in range(vocabulary) if i not in used}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{{ m['content'] }}\\n{% endfor %}"
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def run(words: list[str], log: Path) -> tuple[int, float, float, float]:
    """Run a command; return its exit code, seconds of clock and processor, and peak MB."""
    began = time.perf_counter()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "resa_lens", *words], stdout=sink, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = code = os.waitstatus_to_exitcode(status)
    return code, time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def words_of(command: str, model: Path, layers: int, workspace: Path) -> list[str]:
    """Return a command's words; what stands for a result is looked up in the workspace."""
    results = {
        "S": (workspace / "saes", "*/scratch-mlp_out-*"),
        "A": (workspace / "adapters", f"{NAME}*-paper-mlp_out-*"),
        "B": (workspace / "evals", f"{NAME}-????????-????????????"),
        "T": (workspace / "evals", f"{NAME}-????????-paper-mlp-out-*"),
    }
    words = []
    for word in shlex.split(command):
        if word in results:
            folder, pattern = results[word]
            there = [path for path in folder.glob(pattern) if (path / "manifest.json").exists()]
            word = str(min(there, key=lambda path: path.stat().st_mtime, default=folder / pattern))
        words.append({"M": str(model), "L": str(layers // 2)}.get(word, word))
    return words


def hosts_model(command: str) -> bool:
    """Whether a command runs the model, and so has a device and a dtype."""
    return shlex.split(command)[0] not in ("doctor", "runs", "compare", "cost")


def announced_mb(log: Path) -> str:
    """Return the megabytes at the peak that a command announced, if it did."""
    seen = re.findall(r"(\d+) MB of memory at the peak", " ".join(log.read_text().split()))
    return f"{int(seen[-1]):,}" if seen else ""


def main(
    layers: int = 28,
    width: int = 1536,
    vocabulary: int = 151_936,
    latents: int = 65_536,
    only: str = "",
    device: str = "auto",
    dtype: str = "bfloat16",
    folder: Path | None = None,
    limit_gb: float = 0.0,
) -> None:
    """Write what is needed, run the commands and print the table."""
    if limit_gb:
        resource.setrlimit(resource.RLIMIT_AS, (int(limit_gb * 2**30), resource.RLIM_INFINITY))
    machine = platform.processor() or platform.machine()
    print(f"{date.today()}, {machine}, {layers} layers x {width}, vocabulary {vocabulary:,}, "
          f"{latents:,} latents, random weights, {dtype}")  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        model, workspace = place / NAME, place / "workspace"
        if not model.exists():
            # Elsewhere: of a process that is forked the peak begins with its parent's memory.
            writer = multiprocessing.get_context("spawn").Process(
                target=write_model, args=(model, layers, width, vocabulary)
            )
            writer.start()
            writer.join()
            if writer.exitcode:
                raise SystemExit(f"the model could not be written: exit {writer.exitcode}")
        failed = 0
        print("| command | exit | s | CPU s | peak MB | announced |\n|---|---|---|---|---|---|")
        for number, command in enumerate(COMMANDS):
            if only and not re.match(only, command):
                continue
            own = ["--workspace", str(workspace)]
            own += ["--dtype", dtype, "--device", device] if hosts_model(command) else []
            own += ["--latents", str(latents)] if "--tokens" in command else []
            log = place / f"{number}.log"
            code, *used = run([*words_of(command, model, layers, workspace), *own], log)
            failed += code != 0
            cells = [f"`{command.replace('--model M ', '')}`", code, *(f"{n:,.0f}" for n in used)]
            print("|", " | ".join(map(str, [*cells, announced_mb(log)])), "|", flush=True)
            if code:
                print("\n".join(log.read_text().splitlines()[-6:]), file=sys.stderr)
    raise typer.Exit(min(failed, 1))


if __name__ == "__main__":
    typer.run(main)
