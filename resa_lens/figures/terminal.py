"""Tables and sentences on a terminal, by rich."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from resa_lens.figures.grids import Grid
from resa_lens.progress import local

if TYPE_CHECKING:
    from rich.table import Table

WHOLE = (
    "layer", "by", "95 %", "F (df)", "date (UTC)", "minus base", "among all", "regret",
    "control", "id", "kind", "score",
)  # fmt: skip
"""Columns whose cells keep their line in a narrow terminal; the headers of others wrap first."""


def draw(whole: Grid) -> Table:
    """Return a table of results in the house's style."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Square brackets are markup where no Text says that they are text.
    table = Table(title=Text(whole.title), title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(whole.columns):
        # A folded path can still be copied; a cut one cannot.
        name = column.removeprefix("<")
        kept = name in WHOLE
        table.add_column(
            name, justify="left" if index == 0 or name != column else "right", no_wrap=kept,
            overflow="ellipsis" if kept else "fold",
        )  # fmt: skip
    for row in whole.rows:
        table.add_row(*("" if value is None else Text(local(str(value))) for value in row))
    return table


def _needed(column: Any) -> int:
    """Return the width below which words of a column's cells, as numbers are, would be cut."""
    cells = [str(cell) for cell in column.cells]
    words = cells if column.no_wrap else [word for cell in cells for word in cell.split()]
    words += str(column.header).split()
    # Paths may fold.
    return min(max(map(len, words), default=0), 30)


def fitted(whole: Grid, width: int) -> list[Table]:
    """Return a table in parts that fit a terminal, each with the first column."""
    needs = [_needed(column) + 3 for column in draw(whole).columns]
    groups: list[list[int]] = [[0]]
    for place in range(1, len(needs)):
        if groups[-1][1:] and 1 + sum(needs[p] for p in (*groups[-1], place)) > width:
            groups.append([0])
        groups[-1].append(place)
    return [
        draw(
            Grid(
                whole.title if group is groups[0] else "",
                tuple(whole.columns[place] for place in group),
                tuple(tuple(row[place] for place in group) for row in whole.rows),
            )
        )
        for group in groups
    ]


def show_all(*parts: Any) -> None:
    """Print tables and lines to stdout."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for part in parts:
        if isinstance(part, Grid):
            for piece in fitted(part, console.width):
                console.print(piece)
        else:
            console.print(local(str(part)), markup=False, soft_wrap=True)
