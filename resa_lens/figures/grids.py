"""Tables of results before they are drawn: a row a result, a format a column."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Grid:
    """A table: what a terminal, a page and a data frame draw alike."""

    title: str
    columns: tuple[str, ...]
    """Headers; one that begins with "<" stands to the left."""
    rows: tuple[tuple[Any, ...], ...]
    """Cells as they are shown; None is an empty one."""


def table(title: str, *columns: str, rows: Iterable[Iterable[Any]] = ()) -> Grid:
    """Return a table of cells that are at hand."""
    return Grid(title, columns, tuple(map(tuple, rows)))


class _Empty(Exception):  # noqa: N818 - no error
    """A cell of which a value is None."""


class _Cells(string.Formatter):
    """Formats of cells: of a row's keys or attributes, "" where one is None.

    A list of numbers is an interval, "1 to 2", and `*` before a format is a hundred times.
    """

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        value = args[0]
        for name in field_name.split("."):
            if value is None:
                raise _Empty
            value = value[name] if isinstance(value, Mapping) else getattr(value, name)
        return value, field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise _Empty
        if isinstance(value, list | tuple):
            return " to ".join(self.format_field(part, format_spec) for part in value)
        factor = 100 if format_spec.startswith("*") else 1
        return format(factor * value if factor > 1 else value, format_spec.removeprefix("*"))


def cell(form: str | Callable[[Any], Any], row: Any) -> Any:
    """Return a row's cell by its format, or by a function of the row."""
    try:
        return _Cells().vformat(form, (row,), {}) if isinstance(form, str) else form(row)
    except _Empty:
        return ""


def grid(
    title: str, rows: Iterable[Any], columns: Mapping[str, str | Callable[[Any], Any]]
) -> Grid:
    """Return a table of results: by each column's header the format of its cells.

    A format is as of `str.format`, its names are keys or attributes of a row: "{fvu:.4f}",
    "{paired.ci:*+.1f} %".
    """
    cells = [[cell(form, row) for form in columns.values()] for row in rows]
    return table(title, *columns, rows=cells)
