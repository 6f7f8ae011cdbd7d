"""Figures of scores that are compared."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from resa_lens.plots import BLUE, GREY, ORANGE, _layout, _plain
from resa_lens.stats import Interval


def forest_figure(
    rows: Sequence[tuple[str, float, Interval]], margin: float, title: str, subtitle: str = ""
) -> go.Figure:
    """Differences with their intervals, one below the other, and the margin as a band.

    Args:
        rows: (label, difference, interval), shares of 1, the first on top.
        margin: differences within it count as none.
        title: of the figure.
        subtitle: what the intervals are.
    """
    points = [100 * difference for _, difference, _ in rows]
    figure = go.Figure()
    figure.add_vrect(
        x0=-100 * margin, x1=100 * margin, fillcolor=GREY, opacity=0.15, line_width=0, layer="below"
    )
    figure.add_vline(x=0, line={"color": GREY, "dash": "dash"})
    away = [low > 0 or high < 0 for _, _, (low, high) in rows]
    figure.add_scatter(
        x=points,
        y=[_plain(label) for label, _, _ in rows],
        mode="markers",
        marker={
            "size": 9,
            "color": [ORANGE if off else BLUE for off in away],
            "symbol": ["diamond" if off else "circle" for off in away],
        },
        customdata=[(100 * low, 100 * high) for _, _, (low, high) in rows],
        hovertemplate="%{y}: %{x:+.2f} points (%{customdata[0]:+.2f} to %{customdata[1]:+.2f})"
        "<extra></extra>",
        error_x={
            "type": "data",
            "symmetric": False,
            "thickness": 2,
            "width": 4,
            "color": GREY,
            "array": [100 * (high - d) for _, d, (_, high) in rows],
            "arrayminus": [100 * (d - low) for _, d, (low, _) in rows],
        },
    )
    made = _layout(figure, _plain(title), "difference, points", "", _plain(subtitle), legend=False)
    made.update_yaxes(autorange="reversed", type="category")
    return made.update_layout(hovermode="closest", height=190 + 34 * max(3, len(rows)))
