"""The state of a tuning: after kill -9 the same call goes on.

To the same bits on a CPU, and on CUDA with --deterministic; without it within noise there.

    <folder>/lock, <folder>/claim-<number>         of the process that tunes
    <folder>/checkpoint-<update>/state.json        course, threads, kernel path, identity
    <folder>/checkpoint-<update>/state.safetensors trained weights and the optimizer's moments
    <folder>/step-<update>/                        adapters on the way, plain PEFT
    <folder>/log.jsonl

As with the SAEs' checkpoints (saes/checkpoint.py) a folder is filled under another name, synced and
renamed.  No generator's state is kept: what a batch draws follows from the seed and its number.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from resa_lens import claims
from resa_lens.errors import BadInputError, DamagedError
from resa_lens.files import read_json, write_errors
from resa_lens.machine.limits import is_out_of_memory
from resa_lens.saes.checkpoint import STATE, is_due, machine, newest, sync
from resa_lens.saes.world import ALONE, World
from resa_lens.tuning.collapse import CollapseWatch

TENSORS = "state.safetensors"


@dataclass
class Course:
    """What a tuning has gone through."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    good: int = 0
    """The last update after which the model was seen to be well."""
    collapsed: int = 0
    """The update after which it was seen to have collapsed; 0 where it has not."""


@contextmanager
def own_draws() -> Iterator[None]:
    """Put the caller's generators back at the end: torch's, numpy's and Python's."""
    held = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(held[0])
            np.random.set_state(held[1])


def seed_batch(seed: int, number: int) -> None:
    """Seed every generator for one batch, whichever process has it and whatever came before."""
    drawn = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)


@dataclass
class TuningState:
    """Where a run's state lies, and when it is written."""

    folder: Path
    identity: Mapping[str, Any]
    """What the run is; a state of another run is refused."""
    device: str = "cpu"
    world: World = ALONE
    last_step: int = 0
    last_time: float = field(default_factory=time.monotonic)
    write_seconds: float = 0.0
    watch: CollapseWatch | None = None

    def load(self, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Course:
        """Put the newest state into weights and optimizer; return the course up to it.

        Raises:
            BadInputError: the state is another run's, of other processes, or damaged.
        """
        held = newest(self.folder)
        if held is None:
            return Course()
        try:
            state = read_json(held / STATE)
            self._check(held, state)
            tensors = load_file(held / TENSORS)
            with torch.no_grad():
                for name, value in weights.items():
                    value.copy_(tensors[f"weights.{name}"])
            moments = optimizer.state_dict()
            for key, value in tensors.items():
                if key.startswith("optimizer."):
                    _, index, name = key.split(".", 2)
                    moments["state"].setdefault(int(index), {})[name] = value
            optimizer.load_state_dict(moments)
            if self.watch is not None:
                self.watch.load(int(state["course"].get("good", 0)), tensors)
            self.last_step = int(state["step"])
            return Course(**state["course"])
        except (OSError, SafetensorError, KeyError, RuntimeError, DamagedError) as error:
            if is_out_of_memory(error):
                raise
            raise BadInputError(
                f"state {held} cannot be read ({error}); start anew with --force"
            ) from error

    def _check(self, held: Path, state: dict[str, Any]) -> None:
        if state["processes"] != self.world.size:
            raise BadInputError(
                f"{held} was written by {state['processes']} processes, this is {self.world.size}; "
                "go on with as many, or start anew with --force"
            )
        # As it reads once written: tuples are lists there.
        mine = json.loads(json.dumps(self.identity, default=str))
        for key in sorted({*mine, *state["identity"]}):
            began, now = state["identity"].get(key), mine.get(key)
            if began != now:
                raise BadInputError(
                    f"the run in {self.folder} began with {key} {began}, this has {now}; "
                    "go on as it began, or start anew with --force"
                )

    def keep(
        self,
        step: int,
        steps: int,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        course: Course,
    ) -> None:
        """Write the state if it is due: that may take a twentieth of the time, and no more.

        Raises:
            RunFailedError: the disk is full, or another write error.
        """
        waited = time.monotonic() - self.last_time
        due = is_due(waited, self.write_seconds, (step - self.last_step) / steps)
        if self.world.rank == 0 and due:
            self.write(step, weights, optimizer, course)

    def finish(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        course: Course,
    ) -> None:
        """Write the last state, so that the same call finds all done."""
        if self.world.rank == 0 and step > self.last_step:
            self.write(step, weights, optimizer, course)

    def write(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        course: Course,
    ) -> None:
        """Write the state now, and remove the older ones."""
        began = time.monotonic()
        tensors = {f"weights.{name}": value.detach() for name, value in weights.items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        if self.watch is not None:
            tensors |= self.watch.tensors()
        state = {
            "step": step,
            "course": asdict(course),
            "identity": dict(self.identity),
            "processes": self.world.size,
            **machine(self.device),
        }

        def fill(folder: Path) -> None:
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, folder / TENSORS)
            (folder / STATE).write_text(json.dumps(state, default=str))

        final = self.folder / f"checkpoint-{step}"
        write_whole(final, fill)
        for old in (*self.folder.glob("checkpoint-*"), *self.folder.glob(".filling-*")):
            if old != final:
                shutil.rmtree(old, ignore_errors=True)
        self.last_step, self.last_time = step, time.monotonic()
        self.write_seconds = self.last_time - began


def write_whole(final: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under another name, sync it, and give it its name.

    Raises:
        RunFailedError: the disk is full, or another write error.
    """
    temporary = final.with_name(f".filling-{final.name}")
    with write_errors(final), ExitStack() as always:
        shutil.rmtree(temporary, ignore_errors=True)
        # A half of it would take room where the disk is full.
        always.callback(shutil.rmtree, temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        claims.prove()
        # Only of the same update, by a run that is now made again.
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(final.parent)
