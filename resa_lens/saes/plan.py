"""What a training run will need, before it starts: memory, disk and time, from a short probe.

Memory is that of the weights and their optimizer, which is arithmetic, plus what one forward pass
and one step take on top, which is measured.  Where all layers do not fit together they are trained
in groups, each in a pass of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.machine.hardware import MB, available_mb
from resa_lens.machine.meters import peak_memory_mb
from resa_lens.machine.plans import Trial, timed
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.optim import STATE_COPIES
from resa_lens.saes.select import half_room
from resa_lens.saes.train import SaeConfig, new_trainers

RESERVE = 0.1
"""Share of the memory that is left free."""


@dataclass(frozen=True)
class TrainingPlan:
    """Needs of a training; memory in MB is the process's peak (on a GPU, of its memory)."""

    groups: tuple[tuple[int, ...], ...]
    """Layers that are trained together, one pass over the data each."""
    peak_memory_mb: float
    available_mb: float
    disk_mb: float
    """Of the finished SAEs."""
    work_disk_mb: float
    """Of two checkpoints, while it runs."""
    checkpoint_mb: float
    """Of one checkpoint of the largest group."""
    time: Trial
    """Of all passes, without checkpoints."""
    steps: int
    """Of one pass."""
    forward: Trial
    """The model on one batch, up to the last layer asked for."""
    step: Trial
    """One SAE on one batch."""


class Meter:
    """The memory in use: the process's, or that of its GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.device = device

    def now(self) -> float:
        """Return MB in use."""
        if self.cuda:
            return torch.cuda.memory_allocated(self.device) / MB
        statm = Path("/proc/self/statm")
        if not statm.exists():
            return peak_memory_mb()
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB

    def available(self) -> float:
        """Return MB that this process may still take."""
        if self.cuda:
            return torch.cuda.mem_get_info(self.device)[0] / MB
        return available_mb()

    @contextmanager
    def peak(self) -> Iterator[list[float]]:
        """Collect the highest reading while the block runs, as the list's only element."""
        sizes = [self.now()]
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            yield sizes
            sizes[0] = torch.cuda.max_memory_allocated(self.device) / MB
            return
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.001):
                sizes[0] = max(sizes[0], self.now())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield sizes
        finally:
            stop.set()
            watcher.join()
            sizes[0] = max(sizes[0], self.now())


def state_mb(config: SaeConfig, d_model: int) -> float:
    """Return the MB of one layer's weights and optimizer."""
    assert config.latents is not None
    return STATE_COPIES[config.optimizer] * 2 * config.latents * d_model * 4 / MB


def plan_training(
    model: Model,
    layers: Sequence[int],
    config: SaeConfig,
    batch: Int[Tensor, "batch position"],
    steps: int,
    *,
    memory_limit_mb: float | None = None,
    processes: int = 1,
) -> TrainingPlan:
    """Probe the model and one SAE on one batch, and plan the run.

    Args:
        model: the source model.
        layers: 0-based.
        config: with every default filled in.
        batch: one batch as it will be trained on.
        steps: batches of one pass.
        memory_limit_mb: what the process may take at its peak; by default what is available.
        processes: ranks among which the rows are divided.

    Raises:
        BadInputError: not even one layer fits.
    """
    meter = Meter(model.device)
    points = [Hookpoint(layer, config.site) for layer in layers]
    part = batch[: max(1, batch.shape[0] // processes)]
    _ = model.bridge
    base = meter.now()
    with meter.peak() as forward:
        # The first pass allocates and warms up; the second is timed.
        next(stream_activations(model, [part], points))
        with timed(model.device) as passed:
            sample = next(stream_activations(model, [part], points))
    x = sample.acts[points[len(points) // 2]].flatten(0, 1).float().clone()
    acts = part.numel() * model.d_model * next(iter(sample.acts.values())).element_size() / MB
    del sample
    trainers = new_trainers(points[:1], model.d_model, config, steps, device=model.device)
    trainer = trainers[points[0]]
    half = None
    before = meter.now()
    times = []
    with meter.peak() as stepping:
        half = half_room(config.latents or 0, model.d_model, model.device)
        for _ in range(4):
            with timed(model.device) as stepped:
                trainer.step(x, half)
            times += stepped
    step = sorted(times[1:], key=lambda trial: trial.seconds)[1]
    del trainer, trainers, half, x
    layer_mb = state_mb(config, model.d_model)
    step_mb = max(0.0, stepping[0] - before)
    forward_mb = max(0.0, forward[0] - base - len(layers) * acts)

    def peak(count: int) -> float:
        return base + count * (layer_mb + acts) + max(forward_mb, step_mb)

    current = meter.now()
    available = current + meter.available() * (1 - RESERVE)
    limit = available if memory_limit_mb is None else memory_limit_mb
    fitting = [n for n in range(1, len(layers) + 1) if peak(n) <= limit]
    if not fitting:
        raise BadInputError(
            f"one SAE of {config.latents} latents needs {peak(1):.0f} MB at the peak, "
            f"{limit:.0f} MB are available; use fewer --latents or a smaller --batch"
        )
    # Groups of nearly equal size: the number of passes is what costs.
    passes = -(-len(layers) // max(fitting))
    size = -(-len(layers) // passes)
    groups = tuple(tuple(layers[i : i + size]) for i in range(0, len(layers), size))
    most = max(len(group) for group in groups)
    disk = len(layers) * 2 * (config.latents or 0) * model.d_model * 4 / MB
    return TrainingPlan(
        groups=groups,
        peak_memory_mb=round(max(peak(most), 0.0 if meter.cuda else peak_memory_mb()), 1),
        available_mb=round(available, 1),
        disk_mb=round(disk, 1),
        work_disk_mb=round(2 * most * layer_mb + (disk if len(groups) > 1 else 0), 1),
        checkpoint_mb=round(most * layer_mb, 1),
        time=(passed[0] * len(groups) + step * len(layers)) * steps,
        steps=steps,
        forward=passed[0],
        step=step,
    )
