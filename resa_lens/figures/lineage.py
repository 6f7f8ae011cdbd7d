"""Figure of a workspace's lineage: nodes in columns by stage, and what was made from what."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from resa_lens.artifacts.lineage import Node
from resa_lens.figures.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, _plain

COLOURS = (GREY, BLUE, SKY, ORANGE, GREEN, VERMILION, PURPLE)
"""Of the columns; each has its heading too."""
ROW, HEAD = 66, 44
"""Pixels of a row, and of the headings above all."""
_PASSING = 0.5
"""Rows that an edge takes where it passes through a column."""
_EDGE = 0.1
"""Columns between a node's middle and where its lines begin: a hollow one stays empty."""
_LEVEL = 0.36
"""Columns from a node's middle in which its lines stay level: half of a label's width."""
_LONGEST = 24
"""Characters of a label's line."""

Point = tuple[float, float]


def layout(
    nodes: Sequence[Node], edges: Sequence[tuple[str, str]]
) -> tuple[dict[str, Point], list[tuple[str, str, list[Point]]]]:
    """Place nodes in columns beside their parents, and lead every edge around the nodes between.

    Returns:
        {key: (column, row)} with unused columns left out, and (parent, child, points) of each edge.
    """
    used = sorted({node.column for node in nodes})
    column = {node.key: used.index(node.column) for node in nodes}
    # An edge over several columns has a place in each, shared by all edges of its parent.
    items: list[list[tuple[str, int]]] = [[] for _ in used]
    for node in nodes:
        items[column[node.key]].append((node.key, column[node.key]))
    above: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for parent, child in edges:
        for place in range(column[parent] + 1, column[child]):
            if (parent, place) not in items[place]:
                items[place].append((parent, place))
                above[parent, place] = [(parent, place - 1)]
        above.setdefault((child, column[child]), []).append((parent, column[child] - 1))
    rows: dict[tuple[str, int], float] = {}

    def wanted(item: tuple[str, int]) -> float:
        parent_rows = [rows[parent] for parent in above.get(item, ()) if parent in rows]
        return sum(parent_rows) / len(parent_rows) if parent_rows else float("inf")

    for held in items:
        below = 0.0
        for item in sorted(held, key=lambda item: (wanted(item), item[0])):
            height = 1.0 if item[1] == column[item[0]] else _PASSING
            aim = wanted(item)
            rows[item] = max(below, aim - height / 2 if aim != float("inf") else below) + height / 2
            below = rows[item] + height / 2
    points = {node.key: (float(column[node.key]), rows[node.key, column[node.key]])
              for node in nodes}  # fmt: skip
    paths = []
    for parent, child in edges:
        between = range(column[parent] + 1, column[child])
        path = [points[parent], *[(float(c), rows[parent, c]) for c in between], points[child]]
        paths.append((parent, child, path))
    return points, paths


def reduced(edges: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave out the edges that others already say: from a to c where a leads to b and b to c."""
    below: dict[str, set[str]] = {}
    for parent, child in edges:
        below.setdefault(parent, set()).add(child)

    def reached(key: str) -> set[str]:
        """What can be reached from a node."""
        found: set[str] = set()
        waiting = [key]
        while waiting:
            new = below.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    beyond = {key: reached(key) for key in below}
    return [
        (parent, child)
        for parent, child in edges
        if not any(child in beyond.get(other, ()) for other in below[parent] - {child})
    ]


def lineage_figure(
    nodes: Sequence[Node],
    edges: Sequence[tuple[str, str]],
    *,
    headings: Sequence[str] = (),
    chosen: str | None = None,
) -> go.Figure:
    """Draw what was made from what; a click on a node gives its key as customdata.

    Args:
        nodes: each with its column.
        edges: (parent, child) keys.
        headings: of all columns.
        chosen: key of the node that is ringed, its edges drawn strong.
    """
    points, paths = layout(nodes, reduced(edges))
    used = sorted({node.column for node in nodes})
    figure = go.Figure()
    weak = [path for parent, child, path in paths if chosen not in (parent, child)]
    strong = [path for parent, child, path in paths if chosen in (parent, child)]
    for drawn, width, opacity in ((weak, 1.5, 0.45), (strong, 2.5, 0.95)):
        line = [point for path in drawn for point in (*_curve(path), (None, None))]
        figure.add_scatter(
            x=[x for x, _ in line], y=[y for _, y in line], mode="lines", opacity=opacity,
            line={"color": GREY, "width": width}, hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    piles = [node for node in nodes if len(node.members) > 1]
    for step in (2, 1):
        figure.add_scatter(
            x=[points[node.key][0] + 0.022 * step for node in piles],
            y=[points[node.key][1] - 0.06 * step for node in piles],
            mode="markers", hoverinfo="skip", showlegend=False,
            marker={"symbol": "square", "size": 20, "opacity": 0.5,
                    "color": [COLOURS[node.column] for node in piles],
                    "line": {"width": 1, "color": "white"}},
        )  # fmt: skip
    figure.add_scatter(
        x=[points[node.key][0] for node in nodes],
        y=[points[node.key][1] for node in nodes],
        mode="markers",
        customdata=[[node.key] for node in nodes],
        hovertext=[
            "<br>".join(_plain(part) for part in (node.title, node.detail, node.key) if part)
            for node in nodes
        ],
        hoverinfo="text",
        showlegend=False,
        marker={
            "symbol": ["square-open" if node.missing else "square" for node in nodes],
            "size": [26 if node.key == chosen else 20 for node in nodes],
            "color": [COLOURS[node.column] for node in nodes],
            "line": {"width": [3 if node.missing or node.key == chosen else 0 for node in nodes],
                     "color": [VERMILION if node.key == chosen else COLOURS[node.column]
                               for node in nodes]},
        },
        selected={"marker": {"opacity": 1}},
        unselected={"marker": {"opacity": 1}},
    )  # fmt: skip
    labels: list[dict[str, Any]] = []
    for node in nodes:
        x, y = points[node.key]
        title = _cut(node.title)
        bold = f"<b>{title}</b>" if node.key == chosen else title
        labels.append({
            "x": x, "y": y, "text": f"{bold}<br>{_cut(node.detail)}", "showarrow": False,
            "yanchor": "top", "yshift": -13, "font": {"size": 11}, "align": "center",
        })  # fmt: skip
    for place, index in enumerate(used):
        if index < len(headings):
            labels.append({
                "x": place, "y": 1, "yref": "paper", "text": f"<b>{_plain(headings[index])}</b>",
                "showarrow": False, "yanchor": "bottom", "yshift": 10, "font": {"size": 12},
            })  # fmt: skip
    rows = [row for _, _, path in paths for _, row in path]
    most = max([0.0, *rows, *(row for _, row in points.values())])
    figure.update_xaxes(visible=False, range=[-0.5, len(used) - 0.5], fixedrange=True)
    figure.update_yaxes(visible=False, range=[most + 0.75, -0.1], fixedrange=True)
    figure.update_layout(
        # All at once: added one by one, each checks all before it again.
        annotations=labels,
        template="plotly_white",
        height=round((most + 0.85) * ROW) + HEAD,
        margin={"l": 0, "r": 0, "t": HEAD, "b": 0},
        dragmode=False,
        hovermode="closest",
    )
    return figure


def _cut(text: str) -> str:
    return _plain(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…")


def _curve(path: Sequence[Point]) -> list[Point]:
    """A line through the points that is level but midway between two columns: off the labels."""
    points = [(path[0][0] + _EDGE, path[0][1])]
    for (x0, y0), (x1, y1) in pairwise(path):
        for t in np.linspace(0.0, 1.0, 13).tolist():
            x = x0 + (x1 - x0) * (_LEVEL + (1 - 2 * _LEVEL) * t)
            points.append((x, y0 + (y1 - y0) * t**3 * (6 * t * t - 15 * t + 10)))
    return [*points, (path[-1][0] - _EDGE, path[-1][1])]
