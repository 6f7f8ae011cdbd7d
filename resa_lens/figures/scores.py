"""Figures of scores that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from resa_lens.figures.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    _axis,
    _layout,
    _plain,
    _to_ends,
)
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
    ends = [(100 * low, 100 * high) for _, _, (low, high) in rows]
    figure = go.Figure()
    figure.add_vrect(
        x0=-100 * margin, x1=100 * margin, fillcolor=GREY, opacity=0.15, line_width=0, layer="below"
    )
    figure.add_vline(x=0, line={"color": GREY, "dash": "dash"})
    away = [low > 0 or high < 0 for low, high in ends]
    figure.add_scatter(
        x=points,
        y=[_plain(label) for label, _, _ in rows],
        mode="markers",
        marker={
            "size": 9,
            "color": [ORANGE if off else BLUE for off in away],
            "symbol": ["diamond" if off else "circle" for off in away],
        },
        customdata=ends,
        hovertemplate="%{y}: %{x:+.2f} points (%{customdata[0]:+.2f} to %{customdata[1]:+.2f})"
        "<extra></extra>",
        error_x=_to_ends(points, ends, thickness=2, width=4, color=GREY),
    )
    figure.update_yaxes(autorange="reversed", type="category")
    return _layout(
        figure, _plain(title), "difference, points", "", _plain(subtitle), showlegend=False,
        hovermode="closest", height=190 + 34 * max(3, len(rows)),
    )  # fmt: skip


def sweep_figure(
    layers: Sequence[Mapping[str, Any]],
    jobs: Sequence[Mapping[str, Any]],
    controls: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any],
    *,
    one_based: bool = False,
    last: int | None = None,
) -> go.Figure:
    """Accuracy after tuning through each layer's SAE, beside the base model and the controls.

    Args:
        layers: rows with layer (0-based), accuracy, difference and simultaneous_ci (of the
            difference to the base model), shares of 1.
        jobs: every run, with layer, seed, control and accuracy: the small dots.
        controls: rows with control, layer (None: at the right), difference and ci.  One that falls
            far below or above is named at the edge: it would press all layers into a line.
        base: accuracy and ci.
        one_based: which numbering the axis shows.
        last: layer (0-based) to whose right the controls without a layer stand; the last of
            `layers` by default.
    """
    shift, accuracy = int(one_based), 100 * base["accuracy"]
    figure = go.Figure()
    runs = [job for job in jobs if job["control"] is None]
    figure.add_scatter(
        x=[job["layer"] + shift for job in runs],
        y=[100 * job["accuracy"] for job in runs],
        mode="markers",
        marker={"color": BLUE, "size": 6, "opacity": 0.35},
        name="one seed",
        customdata=[_plain(job["name"]) for job in runs],
        hovertemplate="%{customdata}: %{y:.1f} %<extra></extra>",
    )

    def differences(
        rows: Sequence[Mapping[str, Any]], places: Sequence[float], interval: str
    ) -> dict[str, Any]:
        y, spans = [accuracy + 100 * row["difference"] for row in rows], [r[interval] for r in rows]
        ends = [(accuracy + 100 * low, accuracy + 100 * high) for low, high in spans]
        bars = _to_ends(y, ends, thickness=1.5, width=3)
        return {"x": list(places), "y": y, "mode": "markers", "error_y": bars}

    figure.add_scatter(
        **differences(layers, [row["layer"] + shift for row in layers], "simultaneous_ci"),
        marker={"color": BLUE, "size": 10, "symbol": "diamond"},
        name="through the SAE (interval among all layers)",
    )
    known = [row["layer"] for row in layers]
    right = max([*known, last or 0]) + 1 + shift
    colours = (ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY)
    names = list(dict.fromkeys(row["control"] for row in controls))
    free = {row["control"]: row for row in controls if row["layer"] is None}
    at_right = {name: right + 0.5 * place for place, name in enumerate(free)}
    for index, name in enumerate(names):
        rows = [row for row in controls if row["control"] == name]
        # Beside the layer's own mark, one control next to the other.
        places = [
            at_right[name]
            if row["layer"] is None
            else row["layer"] + shift + 0.6 * (index + 1) / (len(names) + 1)
            for row in rows
        ]
        figure.add_scatter(
            **differences(rows, places, "ci"),
            marker={
                "color": colours[index % len(colours)],
                "size": 8,
                "symbol": ("square", "circle", "triangle-up", "cross")[index % 4],
            },
            name=_plain(name),
        )
    low, high = (100 * value for value in base["ci"])
    # What stands at a layer is always inside.
    inside = [
        accuracy + 100 * end
        for row in (*layers, *(row for row in controls if row["layer"] is not None))
        for end in row["simultaneous_ci" if "simultaneous_ci" in row else "ci"]
    ]
    bottom, top = min([low, *inside]), max([high, *inside])
    room = top - bottom
    for name, row in free.items():
        value = accuracy + 100 * row["difference"]
        if bottom - room <= value <= top + room:
            bottom = min(bottom, accuracy + 100 * row["ci"][0])
            top = max(top, accuracy + 100 * row["ci"][1])
            continue
        below = value < bottom
        figure.add_annotation(
            x=at_right[name], y=bottom if below else top, yanchor="bottom" if below else "top",
            text=f"{_plain(name)}<br>{value:.1f} % {'↓' if below else '↑'}", showarrow=False,
        )  # fmt: skip
    figure.update_yaxes(range=[bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom)])
    figure.add_hrect(y0=low, y1=high, fillcolor=GREY, opacity=0.15, line_width=0)
    figure.add_hline(y=accuracy, line={"color": GREY, "dash": "dash"})
    ticks = [layer + shift for layer in known]
    figure.update_xaxes(tickmode="array", tickvals=ticks, ticktext=[str(t) for t in ticks])
    return _layout(
        figure,
        "Accuracy after tuning, by layer",
        _axis(one_based),
        "accuracy, %",
        "band: the base model's own 95 % interval; intervals of marks: of the paired difference",
    )
