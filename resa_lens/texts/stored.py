"""Records that outgrow memory: on the disk, and read one by one in any order.

An order that is drawn over all records jumps between the row groups of a parquet file, and each of
them would be decompressed for one row.  So a large table is read once, from its first row to its
last, into a file of records:

    <cache folder>/records/<key>/records.jsonl   a line a record, its checksum before it
    <cache folder>/records/<key>/offsets.npy     where each line begins, and the end: 8 bytes each
    <cache folder>/records/<key>/facts.json      what is known of all of them, their hash included

The key is the state of the table's files, as that of a known hash is (`hashes`).  The folder is a
cache: it may be removed, and where it cannot be written a temporary one takes its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
import weakref
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, overload

import numpy as np

from resa_lens import claims
from resa_lens.errors import BadInputError, DamagedError, RunFailedError
from resa_lens.files import read_json, write_json
from resa_lens.hashes import SETTLED_S, cache_folder, digest, file_state
from resa_lens.texts.lines import checked_line, read_line
from resa_lens.texts.records import Columns, Doubts, Record, reader_of
from resa_lens.texts.tables import Table

IN_MEMORY = 64 * 2**20
"""Bytes of a table up to which its records are a list."""
RATE_MB = 30
"""Megabytes a second that a table is read at, for the line that says how long it will take."""
LAYOUT = 1
"""Raised when a record's file, or what a row becomes, changes."""
RECORDS, OFFSETS, FACTS = "records.jsonl", "offsets.npy", "facts.json"
_FIELDS = tuple(item.name for item in fields(Record))


class RecordHash:
    """The SHA-256 of records' contents, in their order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, record: Record) -> None:
        """Take one more record."""
        self._digest.update(repr(record).encode())
        self._digest.update(repr(record.text).encode() if record.text else b"")

    def hexdigest(self) -> str:
        """Return the hash, 64 hex digits."""
        return self._digest.hexdigest()


@dataclass(frozen=True)
class Facts:
    """What is known of all records of a table, so that nobody reads them to know it."""

    hash: str
    with_steps: int
    doubts: Doubts
    files: dict[str, str]
    """The state of each file that they were read from."""
    host: str


class Selection(Sequence[Record]):
    """Some of the records of a sequence, in an order: 8 bytes each, and no copy of them."""

    def __init__(self, records: Sequence[Record], indices: Sequence[int]) -> None:
        self.records = records
        self.indices = indices if isinstance(indices, array) else array("q", indices)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Selection: ...
    def __getitem__(self, index: int | slice) -> Record | Selection:
        """Return a record, or a selection of the selected ones."""
        if isinstance(index, slice):
            return Selection(self.records, self.indices[index])
        return self.records[self.indices[index]]


class StoredRecords(Sequence[Record]):
    """The records of a folder; each is read when it is looked up, and none is kept."""

    def __init__(self, folder: Path) -> None:
        facts = read_json(folder / FACTS)
        self.folder = folder
        self.facts = Facts(**{**facts, "doubts": Doubts(**facts["doubts"])})
        self.offsets = np.load(folder / OFFSETS, mmap_mode="r", allow_pickle=False)
        self._file = os.open(folder / RECORDS, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        if os.fstat(self._file).st_size != self.offsets[-1]:
            raise ValueError(f"{folder / RECORDS} has not the bytes that its offsets say")

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Selection: ...
    def __getitem__(self, index: int | slice) -> Record | Selection:
        """Read a record, or return a selection.

        Raises:
            IndexError: there are not so many.
            DamagedError: a byte of it changed since it was written.
        """
        if isinstance(index, slice):
            return Selection(self, range(len(self))[index])
        number = range(len(self))[index]
        first, end = self.offsets[number : number + 2].tolist()
        try:
            text = read_line(os.pread(self._file, end - first, first))
        except ValueError as error:
            raise DamagedError(
                f"{self.folder / RECORDS}, line {number + 1} is damaged; remove {self.folder}, "
                "which is a cache, and run again"
            ) from error
        return Record(*json.loads(text.decode("utf-8", "surrogatepass")))


def _line(record: Record) -> bytes:
    values = json.dumps([getattr(record, name) for name in _FIELDS], ensure_ascii=False)
    # Of a list that was written as JSON into a text, half of a character may be left.
    return checked_line(values.encode("utf-8", "surrogatepass"))


_TEMPORARY: dict[str, StoredRecords] = {}
"""Where there is no cache folder: what this process has read, by key."""


def stored_records(table: Table, where: str, columns: Columns | None = None) -> StoredRecords:
    """Return the records of a large table: as they lie in the cache, or read now.

    Args:
        table: its rows.
        where: its name, for messages.
        columns: as of `records.reader_of`.

    Raises:
        BadInputError: as `records.records_of`, or a file that changes while it is read.
        RunFailedError: the disk is full.
    """
    states = {str(file.resolve()): file_state(file) for file in table.files}
    host = platform.node()
    cut = [] if table.limit is None else [table.limit]
    key = digest([LAYOUT, host, states, asdict(columns or Columns()), *cut])[:16]
    if key in _TEMPORARY:
        return _TEMPORARY[key]
    cache = cache_folder("records")
    if cache and (known := _open(cache / key)):
        return known
    if table.limit is None:
        size = table.nbytes / 2**20
        what, expected = f"{size:.0f} MB", f" (expected: {size / RATE_MB:.0f} s)"
    else:
        what, expected = f"the first {table.limit:,} rows", ""
    claims.say(f"data {where}: {what} are read once, to find every record in any order{expected}")
    temporary = Path(tempfile.mkdtemp(prefix=".filling-", dir=cache))
    try:
        _fill(temporary, table, where, columns, states, host)
        if cache is None:
            records = _TEMPORARY[key] = StoredRecords(temporary)
            weakref.finalize(records, shutil.rmtree, temporary, ignore_errors=True)
            return records
        _remove_stale(cache, host)
        try:
            temporary.rename(cache / key)
        except OSError:  # another process was as quick, or what is there is damaged
            if known := _open(cache / key):
                return known
            shutil.rmtree(cache / key)
            temporary.rename(cache / key)
        return StoredRecords(cache / key)
    except OSError as error:
        raise RunFailedError(
            f"writing {temporary} failed: {error.strerror}; data larger than memory are kept there "
            "while they are used.\nFree some space, or set XDG_CACHE_HOME to a folder of a larger "
            "disk"
        ) from error
    finally:
        if key not in _TEMPORARY:
            shutil.rmtree(temporary, ignore_errors=True)


def _open(folder: Path) -> StoredRecords | None:
    """Return the records of a folder, or None where it is missing, damaged or of another layout."""
    try:
        return StoredRecords(folder)
    except (OSError, ValueError, TypeError, KeyError, EOFError):
        return None


def _fill(
    folder: Path,
    table: Table,
    where: str,
    columns: Columns | None,
    states: dict[str, str],
    host: str,
) -> None:
    read = reader_of(table.names(), where, columns)
    contents, doubts, with_steps, offsets = RecordHash(), Doubts(), 0, array("q", [0])
    with (folder / RECORDS).open("wb") as stream:
        for row in table:
            record = read(row)
            contents.add(record)
            with_steps += bool(record.steps)
            if not record.text:
                doubts.add(record.answer)
            offsets.append(offsets[-1] + stream.write(_line(record)))
    if len(offsets) == 1:
        raise BadInputError(f"{where} is empty: it holds no question")
    np.save(folder / OFFSETS, np.frombuffer(offsets, dtype=np.int64))
    # A file that was written a moment ago may change again and show the same times.
    newest = max(max(s.st_mtime, s.st_ctime) for s in map(os.stat, states))
    time.sleep(min(SETTLED_S, max(0.0, SETTLED_S - (time.time() - newest))))
    if any(file_state(Path(file)) != state for file, state in states.items()):
        raise BadInputError(f"{where} changed while it was read; run again when it is written")
    facts = Facts(contents.hexdigest(), with_steps, doubts, states, host)
    write_json(folder / FACTS, asdict(facts))


def _remove_stale(cache: Path, host: str) -> None:
    """Remove this host's records of files that are gone or have changed: no key finds them."""
    for folder in cache.iterdir():
        try:
            if folder.name.startswith(".filling-"):
                # Of a process that was killed; none writes a day without a change.
                written = max(f.stat().st_mtime for f in (folder, *folder.iterdir()))
                stale = time.time() - written > 86_400
            else:
                facts: Any = read_json(folder / FACTS)
                stale = facts["host"] == host and any(
                    not Path(file).exists() or file_state(Path(file)) != state
                    for file, state in facts["files"].items()
                )
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if stale:
            shutil.rmtree(folder, ignore_errors=True)


def hash_of(records: Iterable[Record]) -> str:
    """Return the SHA-256 of records' contents; of stored ones it is known."""
    if isinstance(records, StoredRecords):
        return records.facts.hash
    contents = RecordHash()
    for record in records:
        contents.add(record)
    return contents.hexdigest()
