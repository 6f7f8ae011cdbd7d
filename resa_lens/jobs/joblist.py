"""Named independent jobs that any number of processes and hosts share through a folder.

    <folder>/locks/<name>/          the claim of the process that is at a job (`claims`)
    <folder>/jobs/<name>.json       what a finished job returned
    <folder>/failures/<name>.json   why a job could not be finished

The folder alone says what is over, so a killed process loses the job it was at and nothing else,
and whoever looks next takes that job over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from resa_lens import claims
from resa_lens.errors import RunFailedError, TakenError
from resa_lens.files import read_json, run_lock, write_errors, write_json
from resa_lens.progress import Advance

WAIT_S = 2.0
"""Seconds between two looks at jobs that other processes are at."""
Work = Callable[[str], Any]
"""Does the job of a name and returns what JSON can hold of it."""
Outcome = Literal["done", "over", "taken"]
"""Of a job: ended by this process, ended before, or at another process."""


@dataclass(frozen=True)
class JobList:
    """Jobs by name, and the folder that says where they stand."""

    folder: Path
    names: tuple[str, ...]
    closed: Callable[[], bool] = field(default=lambda: False)
    """Whether another process has gathered all results and cleared the folder."""
    all_needed: bool = False
    """Whether a job that fails ends the work; else it is written down, and the others go on."""

    def record(self, name: str) -> Path:
        """Return the file of what a finished job returned."""
        return self.folder / "jobs" / f"{name}.json"

    def open(self) -> list[str]:
        """Return the jobs that are neither finished nor failed, in their order."""
        over = {file.stem for place in ("jobs", "failures") for file in self._files(place)}
        return [name for name in self.names if name not in over]

    def failed(self) -> dict[str, str]:
        """Return why jobs could not be finished, by their names.

        Raises:
            DamagedError: a file is not as it was written.
        """
        files = {file.stem: file for file in self._files("failures")}
        return {name: read_json(files[name]) for name in self.names if name in files}

    def retry(self, names: Iterable[str]) -> None:
        """Forget how jobs ended, so that they are done again."""
        with write_errors(self.folder):
            for name in names:
                for file in (self.record(name), self._failure(name)):
                    file.unlink(missing_ok=True)

    def do(self, name: str, work: Work, *, wait: bool = False) -> Outcome:
        """Claim a job and do it, unless it is over or another process is at it.

        A job that fails is over; why is kept beside the records, unless `all_needed`.

        Args:
            name: of the job.
            work: does it.
            wait: watch another host's process until it shows whether it lives.

        Raises:
            BadInputError: nothing can be written here, or the work refuses its input.
            RunFailedError: the disk is full, or the job failed and all are needed.
        """
        try:
            with run_lock(self.folder / "locks" / name, "working", wait=wait):
                if self._is_over(name) or self.closed():
                    return "over"
                try:
                    value = work(name)
                except RunFailedError as error:
                    if self.all_needed:
                        raise
                    self.fail(name, str(error))
                else:
                    self._write(self.record(name), value)
                return "done"
        except TakenError:
            return "taken"

    def fail(self, name: str, reason: str) -> None:
        """Write down why a job could not be finished."""
        self._write(self._failure(name), reason)

    def share(self, work: Work, *, stay: bool = True, advance: Advance | None = None) -> list[str]:
        """Do the jobs that no other process is at, and return the names of those done here.

        What a dead process was at is taken over; of another host's process only time tells.

        Args:
            work: does a job.
            stay: return when every job is over; else as soon as all that are left are at other
                processes that show that they live, whether at the job or at the work inside it.
            advance: called with the number of jobs that are newly over.

        Raises:
            BadInputError: as of `do`.
            RunFailedError: as of `do`.
        """
        mine: list[str] = []
        over = 0
        while not self.closed():
            left = self.open()
            if advance:
                advance(len(self.names) - len(left) - over)
            over = len(self.names) - len(left)
            if not left:
                break
            # Jobs that nobody has begun come first: a look at a claim of another host is a file
            # operation on the network, and a thousand jobs have many.
            fresh = self._never_begun(left)
            living = 0
            for name in fresh or left:
                alive = False if fresh else self._is_at_work(name)
                # Taken: a live process is at the job, or another command at the work inside it.
                outcome = self.do(name, work) if alive is False else None
                if outcome == "done":
                    mine.append(name)
                    break
                living += alive is True or outcome == "taken"
            else:
                if fresh:
                    continue
                if not stay and living == len(left):
                    break
                time.sleep(WAIT_S)
        return mine

    def at_work(self) -> bool:
        """Return whether a process may be at one of the jobs."""
        return any(self._is_at_work(name) is not False for name in self.names)

    def _never_begun(self, names: list[str]) -> list[str]:
        with suppress(FileNotFoundError):
            begun = {place.name for place in (self.folder / "locks").iterdir()}
            return [name for name in names if name not in begun]
        return names

    def _is_at_work(self, name: str) -> bool | None:
        """Return whether a live process is at a job; None: only time will tell."""
        try:
            claim = claims.newest(self.folder / "locks" / name)
            return claim is not None and claims.is_alive(claim)
        except OSError:
            return None

    def _files(self, place: str) -> Iterable[Path]:
        return (self.folder / place).glob("*.json")

    def _failure(self, name: str) -> Path:
        return self.folder / "failures" / f"{name}.json"

    def _is_over(self, name: str) -> bool:
        return self.record(name).exists() or self._failure(name).exists()

    def _write(self, file: Path, value: Any) -> None:
        # Proves the claim first: what was taken over meanwhile is the other's to finish.
        with write_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, value)
