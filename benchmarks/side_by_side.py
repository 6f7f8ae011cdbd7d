"""Jobs timed in turn in one run, on one machine, and the model that they share."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Annotated, Any

import torch
import typer

Threads = Annotated[int, typer.Option(help="CPU threads.")]


def heading(device: str, threads: int) -> None:
    """Print date and machine."""
    from resa_lens.saes.kernels import native_bf16

    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    has = "has" if native_bf16() else "lacks"
    print(
        f"{date.today()}, {name}, {threads} threads of {os.cpu_count()} cores, torch "
        f"{torch.__version__}; the CPU {has} native bf16"
    )


def timed(job: Callable[[], object], device: str = "cpu") -> float:
    """Return the seconds of one call: of the clock, or of the processor where one thread works."""
    if device == "cpu" and torch.get_num_threads() == 1:
        began = time.process_time()
        job()
        return time.process_time() - began
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    job()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def interleaved(
    jobs: dict[str, Callable[[], float]], rounds: int, warm: int = 1
) -> dict[str, float]:
    """Run the jobs in turn, `rounds` times; return each one's median."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + warm):
        for name, job in jobs.items():
            seconds = job()
            if number >= warm:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def verdict(what: str, theirs: float, ours: float, target: float) -> None:
    """Print one ratio against its target."""
    ratio = theirs / ours
    met = "met" if ratio >= target else "MISSED"
    print(f"{what:58} {ratio:6.2f}x  target {target:.2f}x  {met}")


def llama(width: int, layers: int, vocab: int, dtype: torch.dtype, device: str) -> Any:
    """Return a random Llama-shaped model without its head's cost (small vocabulary)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # transformers refuses a number of heads that does not divide the width.
    heads = max(h for h in range(1, max(1, width // 64) + 1) if width % h == 0)
    groups = max(g for g in range(1, max(1, width // 192) + 1) if heads % g == 0)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=64, intermediate_size=width * 8 // 3,
        vocab_size=vocab, max_position_embeddings=4096,
    )  # fmt: skip
    made: Any = LlamaForCausalLM(config)
    return made.to(device, dtype).eval()
