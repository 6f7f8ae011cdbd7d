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
    own: dict[str, str] = {}

    def do(name: str) -> None:
        own.pop(name, None)
        try:
            jobs[name]()
        except RunFailedError as error:
            own[name] = str(error)
            raise

    left = list(board.names)
    while left:
        board.share(do)
        # A process that starts forgets how jobs ended: over is what was seen to be finished.
        left = [name for name in left if not board.record(name).exists()]
        for name, reason in {**board.failed(), **own}.items():
            if name in left:
                raise RunFailedError(f"{name}: {reason}")
