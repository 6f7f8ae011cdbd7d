"""The guide to the 1.5 B model walked at its shape, with random weights and few steps.

    python benchmarks/full_shape.py                          28 layers: 12 GB of memory and more
    python benchmarks/full_shape.py --layers 4               the same width and vocabulary, shorter
    python benchmarks/full_shape.py --layers 4 --only "doctor|train-saes"    some commands alone

A random Qwen2, SAEs and a tokenizer of that vocabulary are written into a folder; then the commands
of docs/how-to-r1-distill.md run on them, each as a process of its own.  Printed are each one's exit
code, seconds of the clock and of the processor, and its peak memory.  Exits with 1 if one failed.
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
COMMANDS = (
    "doctor --model M",
    "eval --model M --limit 2 --chat-template --max-new-tokens 4",
    "train-saes --model M --layers L --tokens 4096 --plan",
    "train-saes --model M --layers L --tokens 4096 --no-report",
    "train-saes --model M --mode pretrained --saes S --layers L --no-report",
    "count-features --model M --layers L --saes S",
    "recommend-layers --model M --saes S",
    "falsify --model M --layers L --saes S --texts 2 --shuffles 2 --no-other-seed "
    "--no-random-weights",
    "tune --model M --layer L --saes S --steps 2 --limit 2 --max-new-tokens 4 --plan",
    "tune --model M --layer L --saes S --preset paper --steps 2 --limit 2 --max-new-tokens 4",
    "tune --model M --layer L --saes S --sequence 2048 --steps 1 --limit 2 --max-new-tokens 4",
    "tune --model M --layer L --saes S --control noise --steps 2 --limit 2 --max-new-tokens 4",
    "sweep --model M --layers L --saes S --seeds 1 --steps 2 --limit 2 --max-new-tokens 4",
    "activity --model M --layers L --saes S --text-tokens 1024",
    "cost --usd-per-hour 1",
)
"""M is the model, L a middle layer, S the SAEs that the fourth command trained."""


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


def main(
    layers: int = 28,
    width: int = 1536,
    vocabulary: int = 151_936,
    latents: int = 65_536,
    only: str = "",
    device: str = "auto",
    folder: Path | None = None,
    limit_gb: float = 0.0,
) -> None:
    """Write what is needed, run the commands and print the table."""
    if limit_gb:
        resource.setrlimit(resource.RLIMIT_AS, (int(limit_gb * 2**30), resource.RLIM_INFINITY))
    machine = platform.processor() or platform.machine()
    print(f"{date.today()}, {machine}, {layers} layers x {width}, vocabulary {vocabulary:,}, "
          f"{latents:,} latents, random weights")  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        model, workspace, middle = place / NAME, place / "workspace", str(layers // 2)
        if not model.exists():
            # Elsewhere: of a process that is forked the peak begins with its parent's memory.
            writer = multiprocessing.get_context("spawn").Process(
                target=write_model, args=(model, layers, width, vocabulary)
            )
            writer.start()
            writer.join()
            if writer.exitcode:
                raise SystemExit(f"the model could not be written: exit {writer.exitcode}")
        names = {"M": str(model), "L": middle}
        failed = 0
        print("| command | exit | s | CPU s | peak MB |\n|---|---|---|---|---|")
        for number, command in enumerate(COMMANDS):
            if only and not re.match(only, command):
                continue
            names["S"] = str(next((workspace / "saes").glob("*/*/layers.*"), place).parent)
            words = [names.get(word, word) for word in shlex.split(command)]
            own = ["--workspace", str(workspace)]
            own += [] if words[0] in ("cost", "doctor") else ["--device", device]
            own += ["--latents", str(latents)] if "--tokens" in words else []
            log = place / f"{number}.log"
            code, seconds, cpu, peak = run([*words, *own], log)
            failed += code != 0
            shown = command.replace("--model M ", "")
            print(f"| `{shown}` | {code} | {seconds:.0f} | {cpu:.0f} | {peak:,.0f} |", flush=True)
            if code:
                print("\n".join(log.read_text().splitlines()[-6:]), file=sys.stderr)
    raise typer.Exit(min(failed, 1))


if __name__ == "__main__":
    typer.run(main)
