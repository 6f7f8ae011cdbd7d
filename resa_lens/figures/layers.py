"""Figures over layers that set several measurements under one axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from resa_lens.figures.plots import (
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    SKY,
    VERMILION,
    _axis,
    _layout,
    _over,
    _over_layers,
    _plain,
    _to_ends,
)

PHASE_STYLES = {
    "prompt": (GREY, "circle", "dot"),
    "think": (BLUE, "diamond", "solid"),
    "answer": (GREEN, "square", "dash"),
}
"""Colour, mark and line of each phase."""


def on_one_axis(
    above: go.Figure,
    below: go.Figure,
    layers: Sequence[int],
    *,
    title: str,
    one_based: bool = False,
) -> go.Figure:
    """Set two figures over the same layers one above the other, with one axis of layers.

    Lines that mark layers in the upper figure go through the lower one too.  What stands to the
    right of all layers has none.

    Args:
        above: for example `plots.counts_figure`.
        below: for example `score_plots.sweep_figure`.
        layers: 0-based, all that the axis names.
        title: of both.
        one_based: numbering of the axis, as that of the two.
    """
    upper: Any = above.layout  # properties made while running, which no type checker sees
    lower: Any = below.layout
    figure: Any = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    _layout(figure, title, "", "")
    for row, (part, layout) in enumerate(((above, upper), (below, lower)), start=1):
        figure.add_traces(list(part.data), rows=row, cols=1)
        suffix = "" if row == 1 else "2"
        for kind in ("shapes", "annotations"):
            moved = [_moved(mark, suffix) for mark in getattr(layout, kind)]
            figure.update_layout({kind: [*getattr(figure.layout, kind), *moved]})
        axis = layout.yaxis
        figure.update_yaxes(
            title_text=axis.title.text, range=axis.range, rangemode=axis.rangemode,
            dtick=axis.dtick, row=row, col=1,
        )  # fmt: skip
    marks = [_moved(s, "2") for s in upper.shapes if s.type == "line" and s.x0 == s.x1]
    figure.update_layout(shapes=[*figure.layout.shapes, *marks])
    shift, last = int(one_based), max(layers)
    traces: list[Any] = [*above.data, *below.data]
    places = [float(x) for trace in traces for x in trace.x] + [last + shift]
    named = sorted(layers)[:: 1 if len(layers) <= 16 else 2]
    ticks = {float(layer + shift): str(layer + shift) for layer in named}
    if beyond := [x for x in places if x > last + shift + 0.9]:
        ticks[sum(beyond) / len(beyond)] = "no layer"
    figure.update_xaxes(
        range=[min(places) - 0.6, max(places) + 0.6],
        tickmode="array",
        tickvals=list(ticks),
        ticktext=list(ticks.values()),
    )
    figure.update_xaxes(title_text=_axis(one_based), row=2, col=1)
    # At the figure's foot: below two axes its place in shares of their height would vary with it.
    figure.update_layout(
        height=740,
        legend={"yref": "container", "y": 0.005, "yanchor": "bottom"},
        bargap=upper.bargap,
    )
    return figure


def _moved(mark: Any, suffix: str) -> dict[str, Any]:
    """A shape or annotation, on the axes of another row; what fills the figure fills its row."""
    moved = mark.to_plotly_json()
    for side in ("x", "y"):
        ref = str(moved.get(f"{side}ref", side))
        tail = " domain" if ref == "paper" or ref.endswith("domain") else ""
        moved[f"{side}ref"] = f"{side}{suffix}{tail}"
    return moved


def sae_figure(figures: Mapping[str, Mapping[int, float]], *, one_based: bool = False) -> go.Figure:
    """What SAEs leave unexplained and how they code, a panel a measurement, on one axis of layers.

    Args:
        figures: {name: {0-based layer: value}}; without values there is no panel.
        one_based: numbering of the axis.
    """
    known = {name: values for name, values in figures.items() if values}
    rows, layers = max(1, len(known)), max(map(len, known.values()), default=0)
    figure: Any = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    title = "SAE quality on held-out sequences"
    height = 210 + 150 * rows
    _over_layers(figure, layers, one_based, title, "", showlegend=False, height=height)
    figure.update_xaxes(title_text="")
    figure.update_xaxes(title_text=_axis(one_based), row=rows)
    colours = (PURPLE, BLUE, GREY)
    for row, ((name, values), colour) in enumerate(zip(known.items(), colours, strict=False), 1):
        figure.add_scatter(
            **_over(sorted(values), values, one_based),
            mode="lines+markers",
            line={"color": colour},
            name=_plain(name),
            row=row,
            col=1,
        )
        figure.update_yaxes(title_text=_plain(name), rangemode="tozero", row=row)
    return figure


def recovered_figure(
    recovered: Mapping[str, Mapping[int, float]], *, one_based: bool = False
) -> go.Figure:
    """Share of the loss that an SAE in a layer's place recovers, a line a phase.

    Args:
        recovered: {phase: {0-based layer: share}}; some layers may have none.
        one_based: numbering of the axis.
    """
    figure = go.Figure()
    # A layer without a share breaks its line.
    layers = sorted({layer for shares in recovered.values() for layer in shares})
    for phase, shares in recovered.items():
        colour, symbol, dash = PHASE_STYLES.get(phase, (VERMILION, "x", "solid"))
        figure.add_scatter(
            **_over(layers, {layer: 100 * share for layer, share in shares.items()}, one_based),
            mode="lines+markers",
            name=_plain(phase),
            line={"color": colour, "dash": dash},
            marker={"symbol": symbol, "size": 9},
        )
    figure.add_hline(y=100, line={"color": GREY, "dash": "dash"})
    return _over_layers(
        figure,
        len(layers),
        one_based,
        "Loss recovered by phase",
        "loss recovered, %",
        subtitle="0: as with zeros in the layer's place; 100: no loss",
    )


def effects_figure(
    effects: Mapping[int, tuple[float, float | None, float | None]],
    recommended: Sequence[int] = (),
    *,
    one_based: bool = False,
) -> go.Figure:
    """Each layer's causal effect with its interval, where one is known.

    Args:
        effects: {0-based layer: (effect, low, high)}.
        recommended: 0-based layers, marked.
        one_based: numbering of the axis.
    """
    layers = sorted(effects)
    values = {layer: effects[layer][0] for layer in layers}
    ends = [
        (value if low is None else low, value if high is None else high)
        for value, low, high in (effects[layer] for layer in layers)
    ]
    marked = [layer in recommended for layer in layers]
    figure = go.Figure(
        go.Scatter(
            **_over(layers, values, one_based),
            mode="markers",
            name="effect",
            marker={
                "size": 10,
                "color": [VERMILION if here else BLUE for here in marked],
                "symbol": ["diamond" if here else "circle" for here in marked],
            },
            error_y=_to_ends(list(values.values()), ends, color=SKY),
        )
    )
    figure.add_hline(y=0, line={"color": GREY, "dash": "dash"})
    return _over_layers(
        figure,
        len(layers),
        one_based,
        "Causal effect by layer",
        "change of the loss, nats",
        subtitle="beyond random features; 95 %; diamond: recommended",
        showlegend=False,
    )
