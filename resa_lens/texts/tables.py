"""Rows of a local table file: jsonl, json, csv, tsv or parquet; the one reader of them."""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


class Row(dict[str, Any]):
    """One row of a table: its cells by column, and where it stands."""

    def __init__(self, cells: Any, place: str) -> None:
        super().__init__(cells)
        self.place = place
        """Where it stands in its file: "row 2 (line 3)", or "row 2" where a file has no lines."""


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a .jsonl, .json, .csv, .tsv or .parquet file.

    Text is UTF-8, or what a byte order mark says.  JSON may be a line a row or a list of rows,
    whatever the suffix; cells of a CSV file are divided by commas, semicolons, tabs or bars, as
    its header shows.

    Raises:
        BadInputError: no such file, no known format, the content is not of that format, a row has
            more cells than the header, or a column or key stands twice.
    """
    if not named_path(path, "data file").is_file():
        raise BadInputError(f"data file {path} does not exist")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInputError(f"{path} has no known format; use one of {', '.join(READERS)}")
    try:
        return reader(path)
    except (pa.ArrowException, OSError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise BadInputError(f"{path} is not readable as {path.suffix}: {reason}") from error


def _text(path: Path) -> str:
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInputError(
            f"{path} is not readable as {encoding}: line {line} holds byte "
            f"0x{data[error.start]:02x}; save it as UTF-8"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return unique


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _read_json(path: Path) -> list[Row]:
    """Return the objects of a list, or of a file with one a line."""
    text = _text(path)
    start = text.lstrip()[:1]
    if start != "[" and path.suffix.lower() == ".json":
        try:
            whole = _DECODER.decode(text.strip())
        except ValueError:
            pass  # of several objects, one a line
        else:
            return _wrapped(whole, path)
    values = _items(text, path) if start == "[" else _lines(text, path)
    rows = []
    for number, (line, value) in enumerate(values, start=1):
        if not isinstance(value, dict):
            value = json.dumps(value)[:40]
            raise BadInputError(
                f"{path}, row {number} (line {line}) is not a JSON object: {value}; a row is "
                '{"question": ..., "answer": ...}'
            )
        rows.append(Row(value, f"row {number} (line {line})"))
    return rows


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


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # Not by str.splitlines, which takes a separator inside a string for an end.
    for number, line in enumerate(text.split("\n"), start=1):
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


def _read_parquet(path: Path) -> list[Row]:
    _check_columns(path, pq.read_schema(path).names)
    rows = pq.read_table(path).to_pylist()
    return [Row(row, f"row {number}") for number, row in enumerate(rows, start=1)]


def _check_columns(path: Path, names: list[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInputError(f"{path} has column {twice[0]!r} twice; rename one or drop it")


def _read_csv(path: Path) -> list[Row]:
    # Not by type inference: "007" and "1.0" must stay what they are.
    text, before = _text(path), csv.field_size_limit(sys.maxsize)
    try:
        first = text.partition("\n")[0].strip("\r")
        delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(first)
        if first.lower() == f"sep={delimiter}":  # for spreadsheets, no row of the table
            text = text.partition("\n")[2]
        return list(_cells(path, text, delimiter))
    finally:
        csv.field_size_limit(before)


def _delimiter(header: str) -> str:
    """Return what divides a header's cells: what makes most of them, a comma where none does."""
    if header.lower().startswith("sep=") and len(header) == 5:
        return header[4]
    return max(_DELIMITERS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def _cells(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number, line = 0, 1
    try:
        for cells in lines:
            begins, line = line, lines.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                _check_columns(path, [name for name in header if name])
                continue
            number += 1
            place = f"row {number} (line {begins})"
            if len(cells) > len(header):
                raise BadInputError(
                    f"{path}, {place} has {len(cells)} cells, the header {len(header)} "
                    f"({', '.join(header)[:80]}):\n{delimiter.join(cells)[:80]!r}; put a cell that "
                    f"holds {delimiter!r} in double quotes"
                )
            filled = [*cells, *[None] * (len(header) - len(cells))]
            # A column without a name is a spreadsheet's, or a data frame's index.
            yield Row({n: c for n, c in zip(header, filled, strict=True) if n}, place)
    except csv.Error as error:
        raise BadInputError(
            f"{path} is not readable as CSV: line {lines.line_num}: {error}"
        ) from error


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".json": _read_json,
    ".tsv": _read_csv,
}
"""Rows of a file, by its suffix."""
