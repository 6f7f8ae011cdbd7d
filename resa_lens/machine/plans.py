"""What a stage will do and take, before it begins: its parts, memory, disk and time.

A time comes from a trial of the work itself, on the model that will do it (`Trial`); the plan's
sentences and tables say it in the unit that people count in.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resa_lens.machine.hardware import MB

MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0
_UNITS = (("s", 1.0, 90.0), ("minutes", MINUTE, 90.0), ("hours", HOUR, 36.0))
"""Units with their seconds, and how many of each are said before the next one is taken."""
TRIAL_MB = 64.0
"""Written by the trial of a disk: more than it answers from its own buffers in a millisecond."""


def duration(seconds: float) -> str:
    """Return a time as people say it: seconds, minutes, hours, or days ("9 days")."""
    for unit, size, most in _UNITS:
        if seconds < most * size:
            return f"{_figure(seconds / size)} {unit}"
    return f"{_figure(seconds / DAY)} days"


def _figure(count: float) -> str:
    return f"{count:.0f}" if count >= 9.95 else f"{count:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class Trial:
    """Seconds that a piece of work took, or will take: of the clock and of the processor."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: Trial) -> Trial:
        """Return the time of both, one after the other."""
        return Trial(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)

    def __mul__(self, times: float) -> Trial:
        """Return the time of doing it so many times."""
        return Trial(self.seconds * times, self.cpu_seconds * times)


@contextmanager
def timed(device: str = "cpu") -> Iterator[list[Trial]]:
    """Collect the time of a block as the list's only element.

    On a GPU what was queued before is waited for first, and what the block queues is, too: without
    it the clock is read before the work is done.
    """
    synchronise(device)
    began, cpu = time.perf_counter(), time.process_time()
    trials = [Trial()]
    yield trials
    synchronise(device)
    trials[0] = Trial(time.perf_counter() - began, time.process_time() - cpu)


def synchronise(device: str) -> None:
    """Wait until a GPU has done what was given to it; on a CPU there is nothing to wait for."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def write_seconds(place: Path, size_mb: float) -> float:
    """Return how long writing so many MB takes where a folder lies, or will lie.

    A file without a name is written and synced, of at most `TRIAL_MB`; nothing is left of it.

    Args:
        place: the folder, which need not exist.
        size_mb: MB to be written.
    """
    there = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
    trial = max(1.0, min(size_mb, TRIAL_MB))
    # Not zeros, which some file systems do not store.
    block = os.urandom(int(MB))
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            began = time.perf_counter()
            for _ in range(math.ceil(trial)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return (time.perf_counter() - began) * size_mb / math.ceil(trial)
    except OSError:
        return 0.0  # a full disk or a read-only one: writing itself will say so


@dataclass(frozen=True)
class Part:
    """A part of a stage's work."""

    name: str
    amount: int
    unit: str
    """What the amount counts: "tokens", "answers", "updates"."""
    seconds: float
    cpu_seconds: float
    peak_memory_mb: float
    """Of the process while this part runs; on a GPU of its memory."""
    disk_mb: float = 0.0
    """That it leaves in the workspace."""
    at_most: bool = False
    """Whether the time is an upper bound: of answers whose length is not known."""


def part_of(
    name: str, amount: int, unit: str, time: Trial, peak_memory_mb: float, **more: Any
) -> Part:
    """Return a part with the time of a trial."""
    return Part(
        name, amount, unit, round(time.seconds, 2), round(time.cpu_seconds, 2),
        round(peak_memory_mb, 1), **more,
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a stage will do and take; memory in MB is the process's peak (on a GPU, of its memory).

    Its totals are those of the parts, which run one after the other.
    """

    stage: str
    """The command."""
    model: str
    device: str
    parts: tuple[Part, ...]
    available_mb: float
    """Memory that the process may take, with what it has already."""
    free_disk_mb: float
    """Where the workspace lies."""
    work_disk_mb: float = 0.0
    """Kept while it runs and removed afterwards: checkpoints."""
    passes: int = 1
    """Over the data, where not all fits into the memory at once."""
    notes: tuple[str, ...] = ()
    """What the figures leave out or assume."""
    levers: tuple[str, ...] = ()
    """What would make it shorter, each with what it would save."""
    details: dict[str, Any] = field(default_factory=dict)
    """Figures of this stage alone."""

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return round(sum(part.seconds for part in self.parts), 2)

    @property
    def cpu_seconds(self) -> float:
        """Of all parts, of the processor."""
        return round(sum(part.cpu_seconds for part in self.parts), 2)

    @property
    def peak_memory_mb(self) -> float:
        """The largest of the parts'."""
        return max((part.peak_memory_mb for part in self.parts), default=0.0)

    @property
    def disk_mb(self) -> float:
        """What all parts leave."""
        return round(sum(part.disk_mb for part in self.parts), 1)

    @property
    def shorter(self) -> tuple[str, ...]:
        """What would make it shorter, where it takes more than a day."""
        return self.levers if self.seconds > DAY else ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Where the machine has too little memory or disk."""
        needed, texts = self.disk_mb + self.work_disk_mb, []
        if self.peak_memory_mb > self.available_mb:
            texts.append(
                f"warning: {self.peak_memory_mb:.0f} MB of memory are planned for, "
                f"{self.available_mb:.0f} MB are free"
            )
        if needed > self.free_disk_mb:
            texts.append(
                f"warning: {needed:.0f} MB of disk are needed, {self.free_disk_mb:.0f} MB are free"
            )
        return tuple(texts)

    def describe(self) -> str:
        """Say it in one line."""
        most = "at most " if any(part.at_most for part in self.parts) else ""
        passes = f" in {self.passes} passes over the data" if self.passes > 1 else ""
        work = self.work_disk_mb
        kept = f" and {work:.0f} MB for checkpoints while it runs" if work else ""
        return (
            f"expected: {most}{duration(self.seconds)}{passes}, {self.peak_memory_mb:.0f} MB of "
            f"memory at the peak ({self.available_mb:.0f} MB available), {self.disk_mb:.0f} MB on "
            f"disk{kept}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON, totals among them; the stage's own figures stand beside."""
        values = asdict(self)
        details = values.pop("details")
        totals = ("seconds", "cpu_seconds", "peak_memory_mb", "disk_mb", "shorter", "warnings")
        return {**values, **{name: getattr(self, name) for name in totals}, **details}
