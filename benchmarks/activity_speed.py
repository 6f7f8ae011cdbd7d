"""Feature activity of all layers against its floor, interleaved in one run.

    python benchmarks/activity_speed.py
    python benchmarks/activity_speed.py --dtype bfloat16 --device cuda

The floor is the model's forward pass plus every layer's encoder product and top-k, by the same
functions on the same batches: what no tally can avoid.  Medians of the rounds.
"""

from __future__ import annotations

import torch
import typer
from side_by_side import Threads, heading, interleaved, llama, timed

TARGET = 1.3


def main(
    width: int = 576,
    n_layers: int = 12,
    latents: int = 4608,
    k: int = 32,
    batch: int = 8,
    length: int = 128,
    batches: int = 32,
    rounds: int = 5,
    threads: Threads = 1,
    device: str = "cpu",
    dtype: str = "float32",
    vocab: int = 2048,
) -> None:
    """Time the tally of all layers on documents of one length, a third of each in each phase."""
    from resa_lens.features.activity import ActivityConfig, measure_activity, needed_bytes
    from resa_lens.models.activations import stream_activations
    from resa_lens.models.hookpoints import Hookpoint
    from resa_lens.models.host import Model
    from resa_lens.saes.baselines import random_coder
    from resa_lens.saes.coder import encode, encoder_of, new_coder
    from resa_lens.texts.phases import PhasedBatch

    torch.set_num_threads(threads)
    heading(device, threads)
    print(
        f"{n_layers} layers x {width}, model in {dtype}, {latents} latents, k {k}, {batches} "
        f"batches of {batch} documents x {length} tokens, {rounds} rounds"
    )
    host = Model(
        "random", llama(width, n_layers, vocab, getattr(torch, dtype), device),
        None, None, "0" * 8, device, dtype, "benchmark",  # pyright: ignore
    )  # fmt: skip
    points = [Hookpoint(n) for n in range(n_layers)]
    blank = new_coder(width, latents, k, seed=0, device=device)
    coders = {point: random_coder(blank, point.layer) for point in points}
    ids = torch.randint(vocab, (batches, batch, length), generator=torch.Generator().manual_seed(1))
    phases = (3 * torch.arange(length) // length).expand(batch, length)
    documents = torch.arange(batches * batch).view(batches, batch, 1).expand(-1, -1, length)
    parts = [PhasedBatch(i, phases, d) for i, d in zip(ids, documents, strict=True)]
    encoders = {point: encoder_of(coder) for point, coder in coders.items()}

    def floor() -> None:
        for held in stream_activations(host, (part.ids for part in parts), points):
            for point in points:
                x = held.acts.pop(point).flatten(0, 1).float()
                encode(coders[point], x, prepared=encoders[point])

    def forward() -> None:
        for _ in stream_activations(host, (part.ids for part in parts), points):
            pass

    found = interleaved(
        {
            "activity": lambda: timed(lambda: measure_activity(host, coders, parts), device),
            "floor": lambda: timed(floor, device),
            "forward alone": lambda: timed(forward, device),
        },
        rounds,
    )
    for name, seconds in found.items():
        rate = batches * batch * length / seconds
        print(f"{name:20} {seconds:8.3f} s  {rate:8.0f} tokens/s")
    ratio = found["activity"] / found["floor"]
    print(f"{'activity / floor':58} {ratio:6.2f}x  target {TARGET}x  "
          f"{'met' if ratio <= TARGET else 'MISSED'}")  # fmt: skip
    held = n_layers * needed_bytes(width, latents, ActivityConfig()) / 2**20
    print(f"figures and encoders of all layers: {held:.0f} MB")


if __name__ == "__main__":
    typer.run(main)
