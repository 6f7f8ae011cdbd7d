"""Tunings and sweeps, in tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from resa_lens.figures.grids import table
from resa_lens.models.hookpoints import describe_layer

if TYPE_CHECKING:
    from resa_lens.stages.sweep import SweepRun
    from resa_lens.stages.tuning import Tuned


def tuned(result: Tuned, preset: str, control: str | None) -> Iterator[Any]:
    """Yield the scores before and after a tuning, and where the adapter lies."""
    from resa_lens.stages.demo import score_rows

    where = f"objective {control}"
    if result.layer is not None:
        where = f"{describe_layer(result.layer, result.model.n_layers)}, {result.site}"
    title = f"{result.model.slug}, {where}, preset {preset}"
    yield table(title, "", "accuracy", "95 % interval", "n", rows=score_rows(result))
    yield f"adapter: {result.adapter.folder}"


def sweep(run: SweepRun) -> Iterator[Any]:
    """Yield the tables of a sweep, what they say, and its page."""
    from resa_lens.stages.sweep_page import control_cells, findings, layer_cells, selector_cells

    cells = {"Layers": layer_cells(run.sweep), "Selectors": selector_cells(run.sweep)}
    if run.sweep.controls:
        cells["Controls"] = control_cells(run.sweep)
    for title, (header, rows) in cells.items():
        yield table(title, *header, rows=rows)
    yield from findings(run.sweep)
    yield f"page: {run.page}"
