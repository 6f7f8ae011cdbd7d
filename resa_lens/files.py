"""Files read and written with care: regular files of sane size only, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resa_lens import claims
from resa_lens.errors import BadInputError, DamagedError, RunFailedError

SANE = 256 * 2**20
"""Bytes of the largest text or JSON file that is read whole."""


_NUMBERS = re.compile(r"\[\n[^\[\]{}\"]*\]")
"""A list without texts, lists or objects in it; no text of JSON holds a bare end of line."""

LONGEST_PATH = 4095
"""Bytes of a path, by Linux."""


def named_path(name: str | Path, what: str = "path") -> Path:
    """Return the path that a user names, with ~ written out; it need not exist.

    Raises:
        BadInputError: it cannot be one: a name that is too long, a circle of links, a folder
            that may not be looked into, a ~ of nobody's.
    """
    try:
        path = Path(name).expanduser()
        path.exists()  # says False of what is missing, and raises the rest
        return path
    except (OSError, RuntimeError, ValueError) as error:
        shown = str(name) if len(str(name)) < 80 else f"{str(name)[:60]}..."
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            reason += f" (a name has at most 255 bytes, a path {LONGEST_PATH})"
        raise BadInputError(f"{what} {shown!r} cannot be reached: {reason}; use another") from error


def check_path(name: str) -> None:
    """Raise BadInputError where a name cannot be that of a file or a folder."""
    named_path(name, "name")


def check_workspace(name: str) -> None:
    """Raise BadInputError where a path, or one above it, is a file."""
    path = named_path(name, "workspace")
    if file := next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None):
        raise BadInputError(f"workspace {name!r}: {file} is a file; pass a folder with --workspace")


def check_file(name: str) -> None:
    """Raise BadInputError where there is no such file."""
    if not named_path(name, "file").is_file():
        raise BadInputError(f"file {name!r} does not exist; name a file that is there")


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Yield the descriptor of a regular file; nothing else is opened, so nothing can hang.

    Raises:
        DamagedError: it is missing, or a folder, a pipe or a device.
        BadInputError: no permission to read it.
    """
    try:
        # A pipe without a writer would wait for one.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError as error:
        raise BadInputError(f"{path} cannot be read: no permission") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        missing = isinstance(error, FileNotFoundError)
        what = "is missing" if missing else f"cannot be read: {reason}"
        raise DamagedError(f"{path} {what}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DamagedError(f"{path} is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def read_regular(path: Path, limit: int = SANE) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        DamagedError: missing, not a regular file, or larger than `limit` bytes.
    """
    with open_regular(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise DamagedError(f"{path} has {size} bytes; at most {limit} are read")
        parts = []
        try:
            while block := os.read(descriptor, min(limit, 1 << 24)):
                parts.append(block)
        except OSError as error:
            raise DamagedError(f"{path} cannot be read: {error.strerror}") from error
        return b"".join(parts)


def read_text(path: Path, what: str = "file") -> str:
    """Return the text of a file that a user names.

    Raises:
        BadInputError: it cannot be read, or is no UTF-8.
    """
    try:
        return read_regular(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{what} {path} is no text: byte {error.start} is no UTF-8; give a text file"
        ) from error


def parse_json(text: bytes, path: Path) -> Any:
    """Return the value of a JSON text.

    Raises:
        DamagedError: it is no JSON, or nested or written beyond what a reader takes.
    """
    try:
        return json.loads(text, parse_int=_sane_int)
    # A number of too many digits is a ValueError, deep nesting a RecursionError.
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"{path} is damaged: {reason[:120]}") from error


def _sane_int(digits: str) -> int:
    """Return an integer that fits 64 bits, as all that is written does."""
    if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**64:
        raise ValueError(f"an integer of {len(digits)} digits")
    return number


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        DamagedError: missing, not a regular file, too large, or damaged.
    """
    return parse_json(read_regular(path), path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; a list of numbers stands on one line."""
    text = json.dumps(value, indent=2, default=str)
    write_text(path, _NUMBERS.sub(lambda match: " ".join(match[0].split()), text) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    # Two processes that write the same file must not share it half-written.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def write_errors(where: Path) -> Iterator[None]:
    """Turn write errors into the project's: no permission is bad input, a full disk a failure.

    Raises:
        TakenError: another process has taken over what this one was at (`claims.prove`).
        BadInputError: no permission, or a read-only disk.
        RunFailedError: the disk is full, or another write error.
    """
    from safetensors import SafetensorError

    try:
        claims.prove()
        yield
    except PermissionError as error:
        raise BadInputError(
            f"no permission to write {error.filename or where}; choose another --workspace"
        ) from error
    except (OSError, SafetensorError) as error:
        # What another process has cleared away since is no write error.
        with contextlib.suppress(OSError):
            claims.prove()
        code = getattr(error, "errno", None)
        if code == errno.EROFS:
            raise BadInputError(
                f"{where} is on a read-only disk; choose another --workspace"
            ) from error
        quota = code == errno.EDQUOT or "quota exceeded" in str(error)
        full = quota or code == errno.ENOSPC or "No space left" in str(error)
        what = f"the disk is full{', or its quota' if quota else ''}" if full else str(error)
        raise RunFailedError(
            f"writing {where} failed: {what}; the workspace is as it was before"
            + ("\nFree some space, or choose another --workspace" if full else "")
        ) from error


@contextlib.contextmanager
def run_lock(folder: Path, doing: str = "training", *, wait: bool = True) -> Iterator[None]:
    """Claim a run's folder, and lock it where the file system can; both go with the process.

    Args:
        folder: comes into being where it is missing.
        doing: what another process is told that this one does.
        wait: as of `claims.take`.

    Raises:
        TakenError: another process is at work here, or has taken over meanwhile.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / "lock").open("a")
    with stream:
        with write_errors(folder):
            claim = claims.take(folder, doing, wait=wait, locked=not _lock(stream.fileno()))
        with claim.kept():
            yield


_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EIO}


def _lock(descriptor: int) -> bool:
    """Lock an open file; False where another process has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _say_without_locks(str(error.strerror))
    return True


@functools.cache
def _say_without_locks(reason: str) -> None:
    claims.say(f"this file system has no locks ({reason}); claims keep processes apart")


def finite(value: Any) -> Any:
    """Return a result with None for numbers that JSON has not: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
