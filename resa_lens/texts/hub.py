"""Data sets of the hub: whole, as `datasets` keeps them, or their first rows as a stream.

A stream is kept as it comes: it is fetched once, goes on after a kill, and is there offline.

    <cache folder>/streams/<owner>--<name>/<commit>/<first row>.jsonl

A file has a line a row, each behind its checksum, and a last line that says where the stream goes
on.  Pictures and sounds are left out.  The folder is a cache, and may be removed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from resa_lens import claims
from resa_lens.errors import BadInputError, DamagedError, RunFailedError, TakenError
from resa_lens.files import open_regular, read_regular, run_lock
from resa_lens.hashes import cache_file, cache_folder
from resa_lens.texts.config import HUB_SETS
from resa_lens.texts.lines import checked_line, read_line
from resa_lens.texts.tables import Row, Table, header

ROWS_A_FILE = 4096
"""So many rows of a stream are fetched again after a kill, at most."""
BYTES_A_FILE = 32 * 2**20
TAIL = 2**20
"""Bytes at a file's end in which its last line is looked for."""
TIMEOUT_S = 10
"""For the hub's answer to which commit is the newest."""
WAIT_S = 1.0
"""Between two looks at what another process is fetching."""
MEDIA = ("Audio", "Image", "Pdf", "Video")
"""Features of `datasets` that hold no text."""


def hub_table(repo: str, name: str, rows: int | None = None) -> Table:
    """Return the training split of a hub data set.

    Args:
        repo: its id.
        name: what the user called it, for messages.
        rows: its first rows alone; no more of it are fetched than these.

    Raises:
        BadInputError: it is not in the cache and cannot be fetched.
        RunFailedError: a stream broke off, or cannot be kept.
    """
    if rows is None:
        return _whole(repo, name)
    from huggingface_hub.constants import is_offline_mode

    commit = None if is_offline_mode() else _newest(repo, name)
    parts = _parts(_place(repo, commit), rows) if commit else _kept_offline(repo, rows)
    if commit and not _enough(parts, rows):
        parts = _fetched(repo, name, commit, rows)
    if _enough(parts, rows):
        return _table(parts).first(rows)
    if is_offline_mode():  # nothing can be fetched, and what the cache holds is whole
        return _whole(repo, name).first(rows)
    count = sum(part.rows for part in parts)
    remedy = f"pass --data-rows {count}, or run" if count else "run"
    raise BadInputError(
        f"the first {rows:,} rows of {repo}: the hub does not answer, and {count:,} are kept "
        f"here; {remedy} it once where there is a network"
    )


def _whole(repo: str, name: str) -> Table:
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    # Offline, its notes on every new try would bury the error.
    hub_logging.set_verbosity_error()
    try:
        loaded: Any = datasets.load_dataset(repo, split="train")
    except (OSError, ValueError, RuntimeError) as error:
        raise _refusal(repo, name, error) from error
    files = tuple(Path(file["filename"]) for file in loaded.cache_files)
    return Table(
        lambda: (Row(row, f"row {number}") for number, row in enumerate(loaded, start=1)),
        lambda: list(loaded.column_names),
        files,
        # Its Arrow files are mapped; without files it is in memory already.
        loaded.data.nbytes if files else 0,
    )


def _refusal(repo: str, name: str, error: Exception) -> BadInputError:
    known = "" if name in HUB_SETS else f", no short name ({', '.join(['tiny', *HUB_SETS])})"
    return BadInputError(
        f"data {name!r} is no file{known}, and the hub's data set {repo} is not in the cache "
        f"and cannot be fetched ({_reason(error)}).\nWhere there is a network run "
        f"`hf download {repo} --repo-type dataset --local-dir FOLDER`, "
        "copy it here and pass that folder, or one of its files."
    )


def _reason(error: Exception) -> str:
    name = type(error).__name__
    # Of a missing split or several configurations the library says which there are.
    return f"{name}: {_words(error)}" if isinstance(error, ValueError) else name


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _newest(repo: str, name: str) -> str | None:
    """Return a data set's newest commit, in a process the same; None where the hub is silent."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    # Errors of the client below it come out bare, and which client that is differs by version.
    of_client: Any = HfHubHTTPError.__bases__
    try:
        return _commit(repo)
    except RepositoryNotFoundError as error:
        raise _refusal(repo, name, error) from error
    except (OSError, *of_client):
        return None


@cache
def _commit(repo: str) -> str | None:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repo, timeout=TIMEOUT_S).sha


class _Part(NamedTuple):
    """A file of a stream, whole."""

    file: Path
    first: int
    rows: int
    state: Any
    """Where the stream goes on behind it, as this version of `datasets` says it."""
    version: str
    ended: bool


def _place(repo: str, commit: str) -> Path | None:
    file = cache_file()
    return file.parent / "streams" / repo.replace("/", "--") / commit if file else None


def _parts(place: Path | None, rows: int) -> list[_Part]:
    """Return the files that hold the first rows, as far as they go without a gap."""
    parts: list[_Part] = []
    while place is not None and not _enough(parts, rows):
        first = _end(parts)
        file = place / f"{first:012d}.jsonl"
        try:
            with open_regular(file) as descriptor:
                size = os.fstat(descriptor).st_size
                tail = os.pread(descriptor, TAIL, max(0, size - TAIL))
            last = tail.splitlines(keepends=True)[-1]
            before, *facts = json.loads(read_line(last))
            if before + len(last) != size:
                break
            parts.append(_Part(file, first, *facts))
        except (OSError, ValueError, TypeError, IndexError, BadInputError):
            break  # not there, or damaged: it is fetched again
    return parts


def _end(parts: list[_Part]) -> int:
    return parts[-1].first + parts[-1].rows if parts else 0


def _enough(parts: list[_Part], rows: int) -> bool:
    return bool(parts) and (parts[-1].ended or _end(parts) >= rows)


def _kept_offline(repo: str, rows: int) -> list[_Part]:
    """Return the files of the commit that was fetched from last."""
    place = _place(repo, "")
    if place is None or not place.is_dir():
        return []
    every = [parts for folder in place.iterdir() if (parts := _parts(folder, rows))]
    every.sort(key=lambda parts: (_enough(parts, rows), parts[-1].file.stat().st_mtime))
    if every and _enough(every[-1], rows):
        commit = every[-1][0].file.parent.name[:8]
        claims.say(f"data {repo}: the hub is not asked; rows of its commit {commit} are read")
    return every[-1] if every else []


def _fetched(repo: str, name: str, commit: str, rows: int) -> list[_Part]:
    """Return the files of the first rows; what is missing of them is fetched."""
    streams = cache_folder("streams")
    place = _place(repo, commit)
    if streams is None or place is None:
        raise RunFailedError(
            f"the first {rows:,} rows of {repo} are kept in the cache folder, which cannot be "
            "written; set XDG_CACHE_HOME to another"
        )
    while not _enough(parts := _parts(place, rows), rows):
        try:
            with run_lock(place, "fetching"):
                _fetch(place, repo, name, commit, rows)
        except TakenError:
            # Of the processes of one training, or two commands, one fetches and the others wait.
            time.sleep(WAIT_S)
            continue
        if not _enough(_parts(place, rows), rows):
            raise RunFailedError(f"{place} is not what was written there; remove it and run again")
    return parts


def _fetch(place: Path, repo: str, name: str, commit: str, rows: int) -> None:
    """Fetch what is missing of the first rows, from where the kept ones end."""
    import datasets

    parts = _parts(place, rows)
    done = _end(parts)
    going_on = f"; {done:,} are here" if done else ""
    claims.say(f"data {repo}: its first {rows:,} rows are fetched{going_on}")
    try:
        stream: Any = datasets.load_dataset(repo, split="train", streaming=True, revision=commit)
        columns = (stream.features or {}).items()
        stream = stream.remove_columns([n for n, f in columns if type(f).__name__ in MEDIA])
        if parts and parts[-1].version == datasets.__version__:
            stream.load_state_dict(parts[-1].state)
        elif parts:  # a state of another version: what is here is passed over
            stream = stream.skip(done)
        source = iter(stream)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise _refusal(repo, name, error) from error
    ended = False
    while done < rows and not ended:
        try:
            lines, ended = _next_lines(source, rows - done)
        except Exception as error:
            raise RunFailedError(
                f"the stream of {repo} broke off after {done:,} of {rows:,} rows "
                f"({type(error).__name__}: {_words(error)})\n"
                "What came is kept; run again to go on from there"
            ) from error
        facts = [len(lines), stream.state_dict(), datasets.__version__, ended]
        _write(place / f"{done:012d}.jsonl", lines, facts)
        done += len(lines)


def _next_lines(source: Iterator[Any], rows: int) -> tuple[list[bytes], bool]:
    """Return the next rows as the lines of a file, and whether the stream ends with them."""
    lines: list[bytes] = []
    size = 0
    while len(lines) < min(rows, ROWS_A_FILE) and size < BYTES_A_FILE:
        if (row := next(source, None)) is None:
            return lines, True
        lines.append(_line(row))
        size += len(lines[-1])
    return lines, False


def _line(value: Any) -> bytes:
    return checked_line(json.dumps(value, default=_no_text).encode())


def _no_text(value: Any) -> Any:
    """Return what a cell that JSON does not have is kept as: a number's text, of bytes nothing."""
    return None if isinstance(value, bytes | bytearray) else str(value)


def _write(file: Path, lines: list[bytes], facts: list[Any]) -> None:
    draft = file.with_suffix(".part")
    try:
        with draft.open("wb") as sink:
            sink.writelines(lines)
            sink.write(_line([sum(map(len, lines)), *facts]))
        draft.replace(file)
    except OSError as error:
        raise RunFailedError(
            f"writing {file} failed: {error.strerror}; the rows of a stream are kept there.\n"
            "Free some space, or set XDG_CACHE_HOME to a folder of a larger disk"
        ) from error


def _table(parts: list[_Part]) -> Table:
    def rows() -> Iterator[Row]:
        for part in parts:
            lines = read_regular(part.file).splitlines(keepends=True)
            for place, line in enumerate(lines[: part.rows], 1):
                try:
                    yield Row(json.loads(read_line(line)), f"row {part.first + place}")
                except (ValueError, TypeError) as error:
                    part.file.unlink(missing_ok=True)
                    raise DamagedError(
                        f"{part.file} was damaged, and is removed; run again to fetch it anew"
                    ) from error

    files = tuple(part.file for part in parts)
    return Table(rows, lambda: header(rows()), files, sum(f.stat().st_size for f in files))
