"""The course of a run, a line of JSON an update; a resumed run goes on without a step twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from resa_lens.files import write_errors
from resa_lens.machine.meters import peak_memory_mb

LOG = "log.jsonl"


class Log:
    """Writes each line at once, so that a killed run shows how far it came."""

    def __init__(
        self,
        file: Path | None,
        trackers: Sequence[Callable[[dict[str, Any]], None]] = (),
        *,
        after: int = 0,
    ) -> None:
        """Open the log.

        Args:
            file: where the lines go; None for the trackers alone.
            trackers: called with each line: any other place to follow a run.
            after: the updates that the run goes on from; later lines, of a run that was killed
                after its last state, are dropped.
        """
        self.trackers = trackers
        self.stream = None
        if file is None:
            return
        with write_errors(file):
            if file.exists():
                _drop_after(file, after)
            self.stream = file.open("a")

    def write(self, line: dict[str, Any]) -> None:
        """Write one line.

        Raises:
            RunFailedError: the disk is full, or another write error.
        """
        if self.stream is not None:
            with write_errors(Path(self.stream.name)):
                self.stream.write(json.dumps(line) + "\n")
                self.stream.flush()
        for tracker in self.trackers:
            tracker(line)

    def close(self) -> None:
        """Close the file."""
        if self.stream is not None:
            self.stream.close()


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a log; the last one of a killed run may be a part."""
    lines = []
    for text in file.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _drop_after(file: Path, step: int) -> None:
    kept = [line for line in read_log(file) if line["step"] <= step]
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(file)


def memory_mb(device: str) -> float:
    """Return the peak memory so far: the device's, or the process's on the CPU."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return peak_memory_mb()
