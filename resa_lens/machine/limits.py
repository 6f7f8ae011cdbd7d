"""Where memory and disk end: what is free, and one sentence where there was too little."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resa_lens.errors import BadInputError, ResaLensError, RunFailedError
from resa_lens.machine.hardware import MB

_SIGNS = ("out of memory", "allocate memory", "alloc_failed", "not enough memory",
          "can't start new thread")  # fmt: skip
"""What messages of torch, CUDA, cuBLAS and the system say of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory was too little, of the machine or of a GPU."""
    if isinstance(error, ResaLensError) or not isinstance(error, MemoryError | RuntimeError):
        return isinstance(error, OSError) and "allocate memory" in str(error)
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def memory_errors(doing: str, remedy: str) -> Iterator[None]:
    """Turn an error of memory into the project's, which names what takes less.

    Args:
        doing: what the message calls the work.
        remedy: the options that take less memory.

    Raises:
        RunFailedError: memory was too little.
    """
    try:
        yield
    except Exception as error:
        # An engine says itself how far it came.
        cause = error.__cause__ if isinstance(error, RunFailedError) else error
        if cause is None or not is_out_of_memory(cause):
            raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        what = f"{doing}: out of memory ({reason})."
        if cause is not error:
            what = str(error).splitlines()[0]
        raise RunFailedError(f"{what}\n{remedy}") from cause


def free_disk_mb(place: Path) -> float:
    """Return the MB that are free where a folder lies, or will lie."""
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    usage = shutil.disk_usage(there)
    # Some network file systems do not say.
    return usage.free / MB if usage.total else math.inf


def check_disk(place: Path, needed_mb: float, what: str, other: str = "folder") -> None:
    """Compare what a piece of work writes with what is free, before it begins.

    Raises:
        BadInputError: the disk has too little room.
    """
    if needed_mb > (free := free_disk_mb(place)):
        raise BadInputError(
            f"{what}: {needed_mb:.0f} MB of disk are needed, {free:.0f} MB are free in {place}.\n"
            f"Free some, or choose another {other}."
        )


def size_mb(folder: Path) -> float:
    """Return the MB of the files below a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total / MB
