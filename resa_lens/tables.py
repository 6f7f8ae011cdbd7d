"""Rows of a local table file: jsonl, parquet or csv; the one reader of records and questions."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from resa_lens.errors import BadInputError


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl, .parquet or .csv file.

    Raises:
        BadInputError: no such file, no known format, or the content is not of that format.
    """
    if not path.is_file():
        raise BadInputError(f"data file {path} does not exist")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInputError(f"{path} has no known format; use one of {', '.join(READERS)}")
    try:
        return reader(path)
    except (UnicodeDecodeError, pa.ArrowException, csv.Error, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise BadInputError(f"{path} is not readable as {path.suffix}: {reason}") from error


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInputError(f"{path}, line {number} is not JSON: {error.msg}") from error
            if not isinstance(row, dict):
                raise BadInputError(f"{path}, line {number} is not a JSON object: {line[:40]!r}")
            rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def _read_csv(path: Path) -> list[dict[str, Any]]:
    # Not by type inference: "007" and "1.0" must stay what they are.
    with path.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
"""Rows of a file, by its suffix."""
