"""Figures of experts: maps of layers by experts, scores beside their null, dose and response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from resa_lens.figures.grids import cell
from resa_lens.figures.plots import BLUE, GREY, ORANGE, VERMILION, _axis, _layout, _plain, _to_ends

DIVERGING = ((0.0, VERMILION), (0.5, "#FFFFFF"), (1.0, BLUE))
RISING = ((0.0, "#FFFFFF"), (1.0, BLUE))
BARS = 20
"""Experts that stand beside their null at most."""


def experts_figure(
    experts: Sequence[Mapping[str, Any]],
    value: str,
    title: str,
    *,
    layers: int | None = None,
    limit: float | None = None,
    one_based: bool = False,
) -> go.Figure:
    """Draw a value of every expert, layers by experts; a dense layer's row is empty.

    Args:
        experts: rows with `layer`, `expert` and the value.
        value: its name, "scores.rd".
        title: of the figure.
        layers: of the model; up to the last with experts by default.
        limit: end of the colour scale, so that maps beside each other can be compared.
        one_based: numbering of the layers.
    """
    count = 1 + max(row["expert"] for row in experts)
    rows = layers or 1 + max(row["layer"] for row in experts)
    table = np.full((rows, count), np.nan)
    for row in experts:
        number = cell(f"{{{value}}}", row)
        table[row["layer"], row["expert"]] = float(number) if number != "" else np.nan
    signed = bool(np.nanmin(table, initial=0.0) < 0)
    end = limit or float(np.nanmax(np.abs(table), initial=1e-9))
    figure = go.Figure(
        go.Heatmap(
            z=table, y=[layer + one_based for layer in range(rows)], x=list(range(count)),
            colorscale=DIVERGING if signed else RISING, zmin=-end if signed else 0.0, zmax=end,
            hovertemplate="layer %{y}, expert %{x}: %{z:.3f}<extra></extra>",
            colorbar={"thickness": 12},
        )
    )  # fmt: skip
    figure.update_yaxes(dtick=1 if rows <= 16 else 4, autorange="reversed")
    return _layout(
        figure, _plain(title), "expert", _axis(one_based), showlegend=False, hovermode="closest",
        plot_bgcolor="#EEEEEE",
    )  # fmt: skip


def expert_null_figure(
    experts: Sequence[Mapping[str, Any]],
    measure: str,
    null: Sequence[float],
    title: str,
    *,
    one_based: bool = False,
) -> go.Figure:
    """Draw the best experts' scores as bars, and beside each what the null reaches.

    Args:
        experts: rows, the strongest first.
        measure: the score.
        null: the best scores of ordinary token types; none where nothing stands for the target.
        title: of the figure.
        one_based: numbering of the layers.
    """
    rows = experts[:BARS]
    names = [f"{row['layer'] + one_based}:{row['expert']}" for row in rows]
    scores = [row["scores"][measure] for row in rows]
    reach = [1.96 * row.get("errors", {}).get(measure, 0.0) for row in rows]
    intervals = [(s - half, s + half) for s, half in zip(scores, reach, strict=True)]
    figure = go.Figure()
    figure.add_bar(
        x=names, y=scores, name=measure, marker_color=BLUE, error_y=_to_ends(scores, intervals)
    )
    if null:
        low, middle, high = np.quantile(null, (0.05, 0.5, 0.95)).tolist()
        level, ends = [middle] * len(names), [(low, high)] * len(names)
        figure.add_bar(
            x=names, y=level, name="ordinary token types, median", marker_color=GREY,
            error_y=_to_ends(level, ends),
        )  # fmt: skip
    figure.update_xaxes(type="category")
    how = {"barmode": "group", "hovermode": "closest"}
    return _layout(figure, _plain(title), "layer:expert", measure, **how)


def steering_figure(results: Mapping[str, Any]) -> go.Figure:
    """Draw the change of the loss of thoughts by number of experts, and the random sets' band.

    Args:
        results: of `stages.steering.steering_run`.
    """
    doses = [dose for dose in results["doses"] if "think" in dose["loss"]]
    sizes = [dose["experts"] for dose in doses]
    changes = [dose["loss"]["think"]["change"] for dose in doses]
    intervals = [tuple(dose["loss"]["think"]["ci"]) for dose in doses]
    figure = go.Figure()
    figure.add_scatter(
        x=[0, *sizes], y=[0.0, *changes], mode="lines+markers", name="chosen experts",
        line_color=BLUE, error_y=_to_ends([0.0, *changes], [(0.0, 0.0), *intervals]),
    )  # fmt: skip
    random = doses[-1]["loss"]["think"].get("random") if doses else None
    if random and sizes:
        low, high = np.quantile(random["each"], (0.025, 0.975))
        figure.add_hrect(y0=float(low), y1=float(high), fillcolor=GREY, opacity=0.25, line_width=0)
        figure.add_scatter(
            x=[sizes[-1]] * len(random["each"]), y=random["each"], mode="markers",
            name="random sets of the same use", marker={"color": GREY, "symbol": "line-ew-open"},
        )  # fmt: skip
    types = [one["change"] for one in results["null"]["types"] if one["change"] is not None]
    if types and sizes:
        figure.add_scatter(
            x=[sizes[-1]] * len(types), y=types, mode="markers", name="best of other token types",
            marker={"color": ORANGE, "symbol": "x-thin-open"},
        )  # fmt: skip
    title = f"{results['how']}: loss of thoughts by number of experts"
    return _layout(figure, _plain(title), "experts changed", "change, nats a token")
