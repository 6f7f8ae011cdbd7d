"""Checkpoints of a training run: after kill -9 the same command goes on.

To the same bits on a CPU, and on CUDA with --deterministic; without it within noise there.

    <run>/lock, <run>/claim-<number>       of the process that trains; a second one refuses
    <run>/checkpoint-<step>/state.json     scalars of every layer, position in the corpus, threads,
                                           kernel path
    <run>/checkpoint-<step>/<hookpoint>.safetensors

A checkpoint is filled under another name, synced and renamed, so a folder with a state.json is
whole.  Older ones are removed afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from resa_lens import claims
from resa_lens.errors import BadInputError
from resa_lens.files import read_json, write_errors
from resa_lens.machine.hardware import MB
from resa_lens.machine.limits import is_out_of_memory
from resa_lens.machine.plans import TRIAL_MB, write_seconds
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.saes.kernels import kernel_path
from resa_lens.saes.world import ALONE, World

if TYPE_CHECKING:
    from resa_lens.saes.train import LayerTrainer

SHARE = 12
"""So many checkpoints a run where they cost little: less than a tenth of the work can be lost."""
COST = 0.05
"""Share of the time that checkpoints may take; where they cost more they are rarer."""
UNNOTICED_S = 0.1
"""A write this short is none that anybody waits for, however short the run is."""
PAUSE_S = 0.5
"""At least, between two checkpoints of which there are more than `SHARE`."""
STATE = "state.json"


def is_due(waited: float, write_seconds: float, share: float) -> bool:
    """Return whether a checkpoint is to be written now.

    Each is preceded by 1 / `COST` times what it takes, so that all together take less than that
    share of the time.

    Args:
        waited: seconds since the last one, or the start.
        write_seconds: what one takes.
        share: of the run's steps that passed since the last one.
    """
    cheap = waited * COST > write_seconds
    part = share * SHARE >= 1 and (cheap or write_seconds <= UNNOTICED_S)
    return part or (cheap and waited > PAUSE_S)


def planned_writes(seconds: float, write_seconds: float, steps: int) -> int:
    """Return how many checkpoints a run of so many seconds and steps will write (`is_due`)."""
    step = seconds / steps
    due = (n for n in range(1, steps) if is_due(n * step, write_seconds, n / steps))
    # The last step is followed by the result itself.
    return (steps - 1) // next(due, steps)


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None."""
    checkpoints = [p for p in folder.glob("checkpoint-*") if (p / STATE).exists()]
    return max(checkpoints, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return what the newest checkpoint says of itself, or None where there is none."""
    checkpoint = newest(folder)
    return None if checkpoint is None else read_json(checkpoint / STATE)


def restore_threads(folder: Path, device: str, asked: int | None) -> int | None:
    """Set the threads that a checkpoint was made with; results depend on them in the last bits.

    Returns:
        The threads, or None where there is no checkpoint.

    Raises:
        BadInputError: other threads were asked for, or this machine has other kernels.
    """
    state = read_state(folder)
    threads = None if state is None else check_machine(state, folder, device, asked)
    if threads is not None:
        torch.set_num_threads(threads)
    return threads


def machine(device: str) -> dict[str, Any]:
    """Return what the bits of a computation depend on besides its inputs."""
    return {
        "threads": torch.get_num_threads(),
        "kernel_path": kernel_path(device),
        "torch": torch.__version__,
    }


def check_machine(
    state: Mapping[str, Any], folder: Path, device: str, asked: int | None
) -> int | None:
    """Return the threads that a run began with; what its record does not name is not compared.

    Raises:
        BadInputError: it began with other kernels or another torch, or other threads are asked for.
    """
    begun = f"the run in {folder} began"
    now = machine(device)
    if state.get("kernel_path", now["kernel_path"]) != now["kernel_path"]:
        raise BadInputError(
            f"{begun} on kernels {state['kernel_path']!r}, this machine has "
            f"{now['kernel_path']!r}: it would not go on to the same bits.\n"
            "Go on where it began, or start anew with --force."
        )
    if state.get("torch", now["torch"]) != now["torch"]:
        raise BadInputError(
            f"{begun} with torch {state['torch']}, this is {now['torch']}: it would not go on "
            "to the same bits.\nInstall that version, or start anew with --force."
        )
    threads = state.get("threads")
    if not isinstance(threads, int) or threads < 1:
        return None
    if asked is not None and asked != threads:
        raise BadInputError(
            f"{begun} with {threads} threads, --threads is {asked}: it would not go on to the "
            "same bits.\nLeave --threads out, or start anew with --force."
        )
    return threads


@dataclass
class Checkpoints:
    """The checkpoints of one group of layers."""

    folder: Path
    device: str = "cpu"
    world: World = ALONE
    last_step: int = 0
    last_time: float = field(default_factory=time.monotonic)
    write_seconds: float | None = None
    """What the last one took; before the first, what a trial of the disk says of a large one."""
    position: Sequence[int] | None = None
    """Where the corpus stands behind the last step, for the next checkpoint; as loaded, that of the
    step where the run goes on, None of older checkpoints."""

    def load(self, trainers: Mapping[Hookpoint, LayerTrainer]) -> int:
        """Restore the newest checkpoint into the trainers; return the steps that it holds.

        Raises:
            BadInputError: the checkpoint was written by another number of processes, or damaged.
        """
        checkpoint = newest(self.folder)
        if checkpoint is None:
            return 0
        state = read_json(checkpoint / STATE)
        if state["processes"] != self.world.size:
            raise BadInputError(
                f"{checkpoint} was written by {state['processes']} processes, this is "
                f"{self.world.size}; go on with as many, or start anew with --force"
            )
        for point, trainer in trainers.items():
            file = checkpoint / f"{point.sparsify}.safetensors"
            try:
                with safe_open(file, framework="pt") as stream:
                    for name, value in trainer.tensors().items():
                        value.copy_(stream.get_tensor(name))
                trainer.load_scalars(state["layers"][point.sparsify])
            except (OSError, SafetensorError, KeyError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                raise BadInputError(
                    f"checkpoint {file} cannot be read ({error}); start anew with --force"
                ) from error
        self.position = state.get("position")
        self.last_step = int(state["step"])
        return self.last_step

    def keep(self, step: int, steps: int, trainers: Mapping[Hookpoint, LayerTrainer]) -> None:
        """Write a checkpoint if one is due: they may take `COST` of the time, and no more."""
        waited = time.monotonic() - self.last_time
        if self.write_seconds is None:
            size = sum(v.nbytes for t in trainers.values() for v in t.tensors().values()) / MB
            self.write_seconds = write_seconds(self.folder, size) if size > TRIAL_MB else 0.0
        due = is_due(waited, self.write_seconds, (step - self.last_step) / steps)
        # Ranks must write together, so rank 0's clock decides.
        if step < steps and self.world.agree(due):
            self.write(step, trainers)

    def write(self, step: int, trainers: Mapping[Hookpoint, LayerTrainer]) -> None:
        """Write a checkpoint now, and remove the older ones.

        Raises:
            RunFailedError: the disk is full, or another write error.
        """
        began = time.monotonic()
        world = self.world
        temporary = self.folder / f".filling-{step}"
        final = self.folder / f"checkpoint-{step}"
        scalars = world.gather({p.sparsify: t.scalars() for p, t in trainers.items()})
        with write_errors(self.folder), ExitStack() as always:
            # A half of it would take room where the disk is full.
            always.callback(shutil.rmtree, temporary, ignore_errors=True)
            temporary.mkdir(parents=True, exist_ok=True)
            for point, trainer in trainers.items():
                file = temporary / f"{point.sparsify}.safetensors"
                # Where all ranks hold all layers, rank 0 writes them.
                if world.rank == 0 or point.sparsify not in scalars[0]:  # pyright: ignore
                    save_file({k: v.cpu() for k, v in trainer.tensors().items()}, file)
                    sync(file)
            world.barrier()
            if world.rank == 0:
                layers: dict[str, Any] = {}
                for part in reversed(scalars):
                    layers.update(part)  # pyright: ignore
                state = {
                    "step": step,
                    "layers": layers,
                    "processes": world.size,
                    "position": self.position,
                    **machine(self.device),
                }
                (temporary / STATE).write_text(json.dumps(state))
                sync(temporary / STATE)
                claims.prove()
                if final.exists():
                    shutil.rmtree(final)
                temporary.rename(final)
                sync(self.folder)
                for old in (*self.folder.glob("checkpoint-*"), *self.folder.glob(".filling-*")):
                    if old != final:
                        shutil.rmtree(old, ignore_errors=True)
            world.barrier()
        self.last_step, self.last_time = step, time.monotonic()
        self.write_seconds = self.last_time - began


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
