"""Checkpoints of a training run: after kill -9 the same command goes on to the same bits.

    <run>/lock                             held by the process that trains; a second one refuses
    <run>/checkpoint-<step>/state.json     scalars of every layer, threads, kernel path
    <run>/checkpoint-<step>/<hookpoint>.safetensors

A checkpoint is filled under another name, synced and renamed, so a folder with a state.json is
whole.  Older ones are removed afterwards.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from resa_lens.errors import BadInputError, TakenError
from resa_lens.hookpoints import Hookpoint
from resa_lens.saes.kernels import kernel_path
from resa_lens.saes.world import ALONE, World
from resa_lens.workspace import write_errors

if TYPE_CHECKING:
    from resa_lens.saes.train import LayerTrainer

SHARE = 12
"""At least so many checkpoints a run: less than a tenth of the work can be lost."""
COST = 0.03
"""Share of the time that checkpoints between those may take."""
STATE = "state.json"


@contextmanager
def run_lock(folder: Path, doing: str = "training") -> Iterator[None]:
    """Hold a run's folder; the lock goes with the process, also when it is killed.

    Args:
        folder: comes into being where it is missing.
        doing: what another process is told that this one does.

    Raises:
        TakenError: another process holds it.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / "lock").open("a+")
    try:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise TakenError(
                f"process {stream.read().strip() or '?'} is {doing} into {folder}; wait for it, "
                "or end it"
            ) from error
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield
    finally:
        stream.close()


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None."""
    found = [p for p in folder.glob("checkpoint-*") if (p / STATE).exists()]
    return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return what the newest checkpoint says of itself, or None where there is none."""
    held = newest(folder)
    return None if held is None else json.loads((held / STATE).read_text())


def restore_threads(folder: Path, device: str, asked: int | None) -> int | None:
    """Set the threads that a checkpoint was made with; results depend on them in the last bits.

    Returns:
        The threads, or None where there is no checkpoint.

    Raises:
        BadInputError: other threads were asked for, or this machine has other kernels.
    """
    state = read_state(folder)
    if state is None:
        return None
    begun = f"the run in {folder} began"
    if state["kernel_path"] != kernel_path(device):
        raise BadInputError(
            f"{begun} on kernels {state['kernel_path']!r}, this machine has "
            f"{kernel_path(device)!r}: it would not go on to the same bits.\n"
            "Go on where it began, or start anew with --force."
        )
    if state["torch"] != torch.__version__:
        raise BadInputError(
            f"{begun} with torch {state['torch']}, this is {torch.__version__}: it would not go on "
            "to the same bits.\nInstall that version, or start anew with --force."
        )
    threads = int(state["threads"])
    if asked is not None and asked != threads:
        raise BadInputError(
            f"{begun} with {threads} threads, --threads is {asked}: it would not go on to the "
            "same bits.\nLeave --threads out, or start anew with --force."
        )
    torch.set_num_threads(threads)
    return threads


@dataclass
class Checkpoints:
    """The checkpoints of one group of layers."""

    folder: Path
    device: str = "cpu"
    world: World = ALONE
    last_step: int = 0
    last_time: float = field(default_factory=time.monotonic)
    write_seconds: float = 0.0

    def load(self, trainers: Mapping[Hookpoint, LayerTrainer]) -> int:
        """Restore the newest checkpoint into the trainers; return the steps that it holds.

        Raises:
            BadInputError: the checkpoint was written by another number of processes, or damaged.
        """
        held = newest(self.folder)
        if held is None:
            return 0
        state = json.loads((held / STATE).read_text())
        if state["processes"] != self.world.size:
            raise BadInputError(
                f"{held} was written by {state['processes']} processes, this is {self.world.size}; "
                "go on with as many, or start anew with --force"
            )
        for point, trainer in trainers.items():
            file = held / f"{point.sparsify}.safetensors"
            try:
                with safe_open(file, framework="pt") as stream:
                    for name, value in trainer.tensors().items():
                        value.copy_(stream.get_tensor(name))
                trainer.load_scalars(state["layers"][point.sparsify])
            except (OSError, SafetensorError, KeyError, RuntimeError) as error:
                raise BadInputError(
                    f"checkpoint {file} cannot be read ({error}); start anew with --force"
                ) from error
        self.last_step = int(state["step"])
        return self.last_step

    def keep(self, step: int, steps: int, trainers: Mapping[Hookpoint, LayerTrainer]) -> None:
        """Write a checkpoint if one is due: a twelfth of the run passed, or it costs little."""
        waited = time.monotonic() - self.last_time
        cheap = waited * COST > self.write_seconds and waited > 0.5
        due = (step - self.last_step) * SHARE >= steps or cheap
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
        with write_errors(self.folder):
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
                    "threads": torch.get_num_threads(),
                    "processes": world.size,
                    "kernel_path": kernel_path(self.device),
                    "torch": torch.__version__,
                }
                (temporary / STATE).write_text(json.dumps(state))
                sync(temporary / STATE)
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
