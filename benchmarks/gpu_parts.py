"""What only a GPU can show, in parts; benchmarks/gpu.sh runs them and the other benchmarks on one.

python benchmarks/gpu_parts.py selection    the k-th of a batch by counting, and by torch.topk
python benchmarks/gpu_parts.py kl           the chunked KL at the shape that Liger reports
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import typer
from side_by_side import heading, timed

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
LIGER = (60.7, 11.1)
"""Milliseconds and GB of Liger's fused loss at 8,192 tokens, width 4,096, vocabulary 128,256."""


def median_ms(job: Callable[[], object], device: str, rounds: int) -> float:
    """Return the median milliseconds of a job, the first call left out."""
    return 1000 * statistics.median([timed(job, device) for _ in range(rounds + 1)][1:])


@app.command()
def selection(
    width: int = 1536, latents: int = 65_536, k: int = 32, tokens: int = 4096,
    rounds: int = 5, device: str = "cuda",
) -> None:  # fmt: skip
    """Time the selections of one SAE's step, and what finds the k-th of all values."""
    from resa_lens.saes.select import Encoder, batch_topk, half_precision, kth_by_counting, topk
    from resa_lens.saes.static import batch_topk_places, topk_places

    heading(device, torch.get_num_threads())
    weight = torch.randn(latents, width, device=device) / width**0.5
    bias = torch.zeros(latents, device=device)
    encoder = Encoder(weight, bias, half_precision(weight, bias))
    x = torch.randn(tokens, width, device=device)
    values = torch.randn(tokens, latents, device=device)
    print(f"| selection at {tokens} x {latents}, k {k} | ms |\n|---|---|")
    jobs = {
        "k-th of all, by counting": lambda: kth_by_counting(values, k * tokens),
        "k-th of all, torch.topk": lambda: values.flatten().topk(k * tokens).values.min(),
        "top-k in places": lambda: topk_places(encoder, x, k),
        "top-k by the data": lambda: topk(encoder, x, k),
        "BatchTopK in places": lambda: batch_topk_places(encoder, x, k),
        "BatchTopK by the data": lambda: batch_topk(encoder, x, k),
    }
    for name, job in jobs.items():
        print(f"| {name} | {median_ms(job, device, rounds):.2f} |", flush=True)


@app.command()
def kl(
    width: int = 4096, vocabulary: int = 128_256, tokens: int = 8192,
    rounds: int = 5, device: str = "cuda",
) -> None:  # fmt: skip
    """Time loss and gradients of the chunked KL, and its memory beside the head's weights."""
    from resa_lens.tuning.kl import Head, chunked_kl

    heading(device, torch.get_num_threads())
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    weight = torch.randn(vocabulary, width, device=device, dtype=dtype) / width**0.5
    head = Head(weight)
    p = torch.randn(1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    q = torch.randn(1, tokens, width, device=device, dtype=dtype)

    def step() -> None:
        p.grad = None
        chunked_kl(p, q, head, "mean").backward()

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    ms = median_ms(step, device, rounds)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.startswith("cuda") else float("nan")
    print(f"| KL, {tokens} x {width} x {vocabulary} | ms | GB |\n|---|---|---|")
    print(f"| chunked, loss and gradients | {ms:.1f} | {peak:.1f} |")
    print(f"| Liger's figures, of 8192 x 4096 x 128256 | {LIGER[0]} | {LIGER[1]} |")


if __name__ == "__main__":
    app()
