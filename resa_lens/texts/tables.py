"""Rows of a local table: jsonl, json, csv, tsv or parquet; the one reader of them.

A table is a file, or a folder of shards; it is read row by row, so it may be larger than memory.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from resa_lens.errors import BadInputError
from resa_lens.files import named_path

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, the longer ones first: one begins with another."""
_DELIMITERS = ",;\t|"
ROWS_AT_ONCE = 256
"""Rows of a parquet file that are in memory while it is read."""


class Row(dict[str, Any]):
    """One row of a table: its cells by column, and where it stands."""

    def __init__(self, cells: Any, place: str) -> None:
        super().__init__(cells)
        self.place = place
        """Where it stands in its file: "row 2 (line 3)", or "row 2" where a file has no lines."""


@dataclass(frozen=True)
class Table:
    """The rows of a file, of a folder's shards or of a data set, read anew at each iteration."""

    rows: Callable[[], Iterator[Row]]
    names: Callable[[], list[str]]
    """Returns the columns that any row has, in the order in which they appear."""
    files: tuple[Path, ...]
    """What it is read from."""
    nbytes: int
    """Of the rows; of a parquet file, uncompressed."""
    limit: int | None = None
    """First rows that it is cut to."""

    def __iter__(self) -> Iterator[Row]:
        """Go through the rows, one or a few in memory at a time."""
        return self.rows()

    def first(self, limit: int | None) -> Table:
        """Return the table of the first rows alone; None leaves it whole."""
        if limit is None:
            return self

        def rows() -> Iterator[Row]:
            return itertools.islice(self.rows(), limit)

        return replace(self, rows=rows, names=lambda: header(rows()), limit=limit)


def read_table(path: Path) -> Table:
    """Return the table in a file, or in the shards of a folder in the order of their paths.

    Of a folder in the hub's layout the shards of the training split are read.

    Raises:
        BadInputError: as `iterate_rows`, or a folder without shards or with shards of two formats.
    """
    if not named_path(path, "data").is_dir():
        files = (path,)
        check_format(path)
        return Table(lambda: iterate_rows(path), lambda: _names(files), files, _nbytes(path))
    files = tuple(shards(path))
    training = tuple(f for f in files if _TRAINING.search(str(f.relative_to(path))))
    files = training or files
    if not files:
        raise BadInputError(f"{path} holds no {', '.join(READERS)} file; copy the shards there")
    if len(formats := sorted({file.suffix.lower() for file in files})) > 1:
        raise BadInputError(
            f"{path} holds {' and '.join(formats)} files; the shards of one table have one format"
        )

    def rows() -> Iterator[Row]:
        for file in files:
            name = file.relative_to(path)
            for row in iterate_rows(file):
                row.place = f"{name}, {row.place}"
                yield row

    return Table(rows, lambda: _names(files), files, sum(map(_nbytes, files)))


_TRAINING = re.compile(r"(?<![a-z])train(?![a-z])", re.IGNORECASE)


def shards(folder: Path) -> list[Path]:
    """Return the table files in a folder and below it, by their paths.

    Hidden ones are left out, and so are .json files beside others: in the hub's layout they
    describe the data and hold none.
    """
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in READERS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    return [file for file in files if file.suffix.lower() != ".json"] or files


def _nbytes(file: Path) -> int:
    if file.suffix.lower() != ".parquet":
        return file.stat().st_size
    with _arrow_errors(file):
        meta = pq.read_metadata(file)
    return sum(meta.row_group(group).total_byte_size for group in range(meta.num_row_groups))


def _names(files: Iterable[Path]) -> list[str]:
    names: dict[str, None] = {}
    for file in files:
        if file.suffix.lower() == ".parquet":
            names |= dict.fromkeys(pq.read_schema(file).names)
        else:
            names |= dict.fromkeys(header(iterate_rows(file)))
    return list(names)


def header(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the columns that any of the rows has, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def check_format(path: Path) -> None:
    """Raise BadInputError where a file is missing, or has no known format."""
    if not named_path(path, "data file").is_file():
        raise BadInputError(f"data file {path} does not exist")
    if path.suffix.lower() not in READERS:
        raise BadInputError(f"{path} has no known format; use one of {', '.join(READERS)}")


def read_rows(path: Path) -> list[Row]:
    """Return all rows of a file; see `iterate_rows`."""
    return list(iterate_rows(path))


def iterate_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .json, .csv, .tsv or .parquet file, a few in memory at a time.

    Text is UTF-8, or what a byte order mark says.  JSON may be a line a row or a list of rows,
    whatever the suffix (a list is read whole); cells of a CSV file are divided by commas,
    semicolons, tabs or bars, as its header shows.

    Raises:
        BadInputError: no such file, no known format, the content is not of that format, a row has
            more cells than the header, or a column or key stands twice.
    """
    check_format(path)
    with _arrow_errors(path):
        yield from READERS[path.suffix.lower()](path)


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise BadInputError(f"{path} is not readable as {path.suffix}: {reason}") from error


@contextmanager
def _text(path: Path, newline: str) -> Iterator[TextIO]:
    """Open a text by its byte order mark; `newline` is that of `open`.

    Raises:
        BadInputError: bytes of another encoding are read.
    """
    with path.open("rb") as stream:
        start = stream.read(4)
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
    try:
        with path.open(encoding=encoding, newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise _no_text(path, encoding) from error


def _no_text(path: Path, encoding: str) -> BadInputError:
    """Return what is wrong with a text's bytes, by reading it again line by line."""
    line, decoder = 0, codecs.getincrementaldecoder(encoding)()
    reason = "is of another encoding"
    with path.open("rb") as stream:
        try:
            for piece in stream:
                line += 1
                decoder.decode(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            reason = f"holds byte 0x{error.object[error.start]:02x}"
    return BadInputError(
        f"{path} is not readable as {encoding}: line {line} {reason}; save it as UTF-8"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return unique


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _read_json(path: Path) -> Iterator[Row]:
    """Yield the objects of a list, or of a file with one a line."""
    with _text(path, newline="\n") as stream:
        lines = enumerate(iter(stream.readline, ""), start=1)
        first = next(((n, line) for n, line in lines if line.strip()), (1, ""))
        if first[1].lstrip()[:1] == "[" or path.suffix.lower() == ".json":
            stream.seek(0)
            yield from _whole_json(stream.read(), path)
            return
        yield from _objects(_lines(itertools.chain([first], lines), path), path)


def _whole_json(text: str, path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON text: a list, a record, one key that holds the list, or lines."""
    if text.lstrip()[:1] != "[":
        try:
            whole = _DECODER.decode(text.strip())
        except ValueError:
            # Of several objects, one a line.
            lines = enumerate(text.split("\n"), start=1)
            yield from _objects(_lines(lines, path), path)
        else:
            yield from _wrapped(whole, path)
    else:
        yield from _objects(_items(text, path), path)


def _objects(values: Iterable[tuple[int, Any]], path: Path) -> Iterator[Row]:
    for number, (line, value) in enumerate(values, start=1):
        if not isinstance(value, dict):
            value = json.dumps(value)[:40]
            raise BadInputError(
                f"{path}, row {number} (line {line}) is not a JSON object: {value}; a row is "
                '{"question": ..., "answer": ...}'
            )
        yield Row(value, f"row {number} (line {line})")


def _wrapped(whole: Any, path: Path) -> list[Row]:
    """Return the rows of one JSON object: a record, or one key that holds the list of records."""
    lists = [v for v in whole.values() if isinstance(v, list)] if isinstance(whole, dict) else []
    if not isinstance(whole, dict) or len(lists) > 1:
        raise BadInputError(
            f"{path} is one JSON {'object of columns' if lists else type(whole).__name__}; "
            "write a list of objects, one a row"
        )
    inside = lists[0] if len(whole) == 1 and lists else [whole]
    if not all(isinstance(row, dict) for row in inside):
        raise BadInputError(f"{path}: {next(iter(whole))} is no list of objects, one a row")
    return [Row(row, f"row {number}") for number, row in enumerate(inside, start=1)]


def _lines(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[tuple[int, Any]]:
    # Not of str.splitlines, which takes a separator inside a string for an end.
    for number, line in lines:
        if line.strip():
            try:
                yield number, _DECODER.decode(line.strip())
            except ValueError as error:
                raise _no_json(path, number, error) from error


def _items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield each item of a JSON list with the line that it begins in."""
    at, line, counted = text.index("[") + 1, 1, 0

    def skip(to: int) -> int:
        while to < len(text) and text[to] in " \t\r\n":
            to += 1
        return to

    at = skip(at)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = _DECODER.raw_decode(text, at)
        except ValueError as error:
            raise _no_json(path, line, error) from error
        yield line, value
        at = skip(at)
        if at == len(text):
            raise BadInputError(f"{path} is not JSON: its list is not closed")
        if text[at] not in ",]":
            line += text.count("\n", counted, at)
            raise BadInputError(f"{path}, line {line} is not JSON: no comma between two rows")
        at = skip(at + 1) if text[at] == "," else at
    if text[at + 1 :].strip():
        raise BadInputError(f"{path} is not JSON: text follows the end of its list")


def _no_json(path: Path, line: int, error: ValueError) -> BadInputError:
    if isinstance(error, json.JSONDecodeError):
        return BadInputError(f"{path}, line {line} is not JSON: {error.msg}")
    return BadInputError(f"{path}, line {line}: {error}; keep one")


def _read_parquet(path: Path) -> Iterator[Row]:
    # A row group may be all of the file: a page of it is in memory, where nothing is read ahead.
    with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        _check_columns(path, file.schema_arrow.names)
        number = itertools.count(1)
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False):
            for row in batch.to_pylist():
                yield Row(row, f"row {next(number)}")


def _check_columns(path: Path, names: list[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInputError(f"{path} has column {twice[0]!r} twice; rename one or drop it")


def _read_csv(path: Path) -> Iterator[Row]:
    # Not by type inference: "007" and "1.0" must stay what they are.
    before = csv.field_size_limit(sys.maxsize)
    try:
        with _text(path, newline="") as stream:
            start = stream.readline()
            first = start.strip("\r\n")
            delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(first)
            # For spreadsheets, no row of the table.
            head = [] if first.lower() == f"sep={delimiter}" else [start]
            yield from _cells(path, itertools.chain(head, stream), delimiter)
    finally:
        csv.field_size_limit(before)


def _delimiter(header: str) -> str:
    """Return what divides a header's cells: what makes most of them, a comma where none does."""
    if header.lower().startswith("sep=") and len(header) == 5:
        return header[4]
    return max(_DELIMITERS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def _cells(path: Path, text: Iterable[str], delimiter: str) -> Iterator[Row]:
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    number, line = 0, 1
    try:
        for cells in lines:
            begins, line = line, lines.line_num + 1
            if not cells:
                continue
            if names is None:
                names = [name.strip() for name in cells]
                _check_columns(path, [name for name in names if name])
                continue
            number += 1
            place = f"row {number} (line {begins})"
            if len(cells) > len(names):
                raise BadInputError(
                    f"{path}, {place} has {len(cells)} cells, the header {len(names)} "
                    f"({', '.join(names)[:80]}):\n{delimiter.join(cells)[:80]!r}; put a cell that "
                    f"holds {delimiter!r} in double quotes"
                )
            filled = [*cells, *[None] * (len(names) - len(cells))]
            # A column without a name is a spreadsheet's, or a data frame's index.
            yield Row({n: c for n, c in zip(names, filled, strict=True) if n}, place)
    except csv.Error as error:
        raise BadInputError(
            f"{path} is not readable as CSV: line {lines.line_num}: {error}"
        ) from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".json": _read_json,
    ".tsv": _read_csv,
}
"""Rows of a file, by its suffix."""
