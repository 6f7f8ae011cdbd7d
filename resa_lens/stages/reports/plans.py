"""A plan on a terminal: its parts, the line of what is expected, and what would make it shorter."""

from __future__ import annotations

from collections.abc import Iterator

from resa_lens.figures.grids import Grid
from resa_lens.machine.plans import Plan, duration


def plan(whole: Plan) -> Iterator[Grid | str]:
    """Yield a plan's table and sentences."""
    rows = tuple(
        (
            part.name, f"{part.amount:,} {part.unit}",
            f"{'at most ' if part.at_most else ''}{duration(part.seconds)}",
            f"{part.peak_memory_mb:,.0f}", f"{part.disk_mb:,.0f}" if part.disk_mb else "",
        )
        for part in whole.parts
    )  # fmt: skip
    yield Grid(
        f"{whole.stage} {whole.model}, on {whole.device}",
        ("part", "amount", "time", "memory MB", "disk MB"), rows,
    )  # fmt: skip
    yield whole.describe()
    yield from whole.notes
    yield from whole.warnings
    for lever in whole.shorter:
        yield f"shorter: {lever}"
