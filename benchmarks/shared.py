"""Jobs of an experiment that equal processes on one folder share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from resa_lens.errors import RunFailedError
from resa_lens.jobs.joblist import JobList


def share(work: Path, jobs: Mapping[str, Callable[[], Any]]) -> None:
    """Do the jobs that no other process is at, and return when all of them are over.

    Args:
        work: the folder of the experiment, where the jobs' claims lie too.
        jobs: by name, in their order.  A job keeps what it makes in files, and does nothing where
            they are there: these say what is finished, so a file that is removed is made again.

    Raises:
        RunFailedError: a job could not be finished.
    """
    board = JobList(work, tuple(jobs))
    board.retry(board.names)

    def do(name: str) -> None:
        jobs[name]()

    board.share(do)
    for name, reason in board.failed().items():
        raise RunFailedError(f"{name}: {reason}")
