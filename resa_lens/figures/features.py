"""Figures of one feature: how strongly it fires, in which phase, and how it answers to trials."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from resa_lens.features.words import SILENT, UNDETERMINED
from resa_lens.figures import tokens
from resa_lens.figures.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    _layout,
    _to_ends,
)
from resa_lens.stats import Interval
from resa_lens.texts.prompts import PHASES

PHASE_COLOURS = {"prompt": GREY, "think": BLUE, "answer": GREEN}
TRIALS = {
    "injected": "plain text, tags put in",
    "plain": "plain text, no tags",
    "words": "other words in the prompt",
    "shuffled": "the prompt's words shuffled",
    "paraphrase": "other prompts for the same",
    "untagged": "prompts, no tags",
    "neutral": "other tags in their places",
    "format": "other tags, no reasoning",
    "document": "a thought's tags",
    "thought": "within the thought",
}
"""Kinds of trials that put a counted feature to the test."""


_SMALL: dict[str, Any] = {"showlegend": False, "hovermode": "closest", "height": 320}
"""Layout of a figure that stands beside another."""
FIRES, SILENT_THERE = "fires there", "silent there"


_CARD_STYLE = (
    "<style>.near{font-size:.8rem;overflow-wrap:anywhere}.near .where{opacity:.7}"
    ".near .value{font-weight:600}"
    ".near .tokens{font-size:.8rem;line-height:1.7}.near .scale{position:relative;height:6px;"
    "margin:3px 0 6px;border-radius:3px;background:rgba(128,128,128,.25)}.near .scale div{height:"
    "6px;border-radius:3px}.near .scale .chance{position:absolute;top:-3px;height:12px;width:2px;"
    "background:currentColor}.near .bars{display:flex;align-items:flex-end;height:32px;gap:1px;"
    "margin-top:4px}.near .bars div{flex:1;min-height:1px;max-width:12px;background:"
    "rgba(230,120,0,.8)}</style>"
)


def activation_figure(edges: Sequence[float], counts: Sequence[int]) -> go.Figure:
    """Tokens at which a feature fires, by the size of its activation, in the bins given.

    Args:
        edges: of the bins, one more than there are bins; equal steps on a log axis, or nearly so.
        counts: tokens in each bin; empty bins at both ends are left out.
    """
    filled = [place for place, count in enumerate(counts) if count]
    first, last = (filled[0], filled[-1]) if filled else (0, 0)
    kept = list(range(max(0, first - 1), min(len(counts), last + 2)))
    bounds = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)]
    figure = go.Figure(
        go.Bar(
            # Bins have one width on the page: the octaves stand as ticks below their edges.
            x=[place + 0.5 for place in kept],
            y=[counts[place] for place in kept],
            width=0.98,
            marker={"color": ORANGE},
            customdata=[bounds[place] for place in kept],
            hovertemplate="%{customdata}: %{y} tokens<extra></extra>",
        )
    )
    marks = [place for place in range(len(edges)) if kept[0] <= place <= kept[-1] + 1]
    every = max(2, 2 * round(len(marks) / 16))
    marks = [place for place in marks if place % every == 0]
    figure.update_xaxes(tickvals=marks, ticktext=[f"{edges[place]:.2g}" for place in marks])
    figure.update_yaxes(rangemode="tozero")
    return _layout(figure, "Activation where it fires", "activation, log scale", "tokens", **_SMALL)


def densities_figure(densities: NDArray[Any]) -> go.Figure:
    """Features by their density, in quarters of a decade; those that never fire are left out."""
    exponents = np.log10(densities[densities > 0])
    least = np.floor(exponents.min(initial=-1.0))
    counts, exponents = np.histogram(exponents, bins=np.arange(least, 0.01, 0.25))
    filled = np.flatnonzero(counts)
    near = slice(filled[0], filled[-1] + 1) if filled.size else slice(0, 0)
    low, high = 10 ** exponents[:-1][near], 10 ** exponents[1:][near]
    figure = go.Figure(
        go.Bar(
            # On a log axis too a bar reaches half its width to either side.
            x=(low + high) / 2,
            y=counts[near],
            width=high - low,
            marker={"color": ORANGE, "line": {"width": 1, "color": "white"}},
            customdata=[f"{a:.2g} to {b:.2g}" for a, b in zip(low, high, strict=True)],
            hovertemplate="%{customdata}: %{y} features<extra></extra>",
        )
    )
    figure.update_xaxes(type="log")
    return _layout(
        figure, "The features of this list by density", "density, share of tokens (log scale)",
        "features", showlegend=False, height=280,
    )  # fmt: skip


def similarity_card(
    where: str,
    similarities: Sequence[tuple[str, float, float | None]],
    words: Sequence[str],
    counts: Sequence[int],
    edges: Sequence[float],
) -> str:
    """Return how near a feature is to another, beside chance, and what it responds to, as HTML.

    Args:
        where: which layer, SAE or model it is in.
        similarities: measure, value from -1 to 1, and what chance gives; None where unknown.
        words: tokens at which it fires.
        counts: tokens in each bin of activation; empty bins at both ends are left out.
        edges: of the bins, one more than there are bins; equal steps on a log axis, or nearly so.
    """
    parts = [f'<div class="where">{html.escape(tokens.plain(where), quote=True)}</div>']
    for measure, value, chance in similarities:
        above = chance is not None and value > chance
        mark = (
            "" if chance is None else f'<div class="chance" style="left:{_percent(chance)}"></div>'
        )
        null = "unknown" if chance is None else f"{chance:.2f}"
        parts.append(
            f'<div><span class="value">{measure} {value:.2f}</span>, chance {null}</div>'
            f'<div class="scale"><div style="width:{_percent(value)};'
            f'background:{ORANGE if above else GREY}"></div>{mark}</div>'
        )
    filled = [place for place, count in enumerate(counts) if count]
    if words:
        parts.append(tokens.chips(words, [0.0] * len(words), form=""))
    if filled:
        kept, top = range(filled[0], filled[-1] + 1), max(counts)
        bars = "".join(
            f'<div style="height:{100 * counts[place] / top:.0f}%"></div>' for place in kept
        )
        note = f"activation {edges[filled[0]]:.3g} to {edges[filled[-1] + 1]:.3g}, log scale"
        parts.append(f'<div class="bars" title="{note}">{bars}</div>')
    return f'{_CARD_STYLE}<div class="near">{"".join(parts)}</div>'


def _percent(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.0f}%"


def lens_figure(counts: Sequence[int], low: float, high: float) -> go.Figure:
    """Tokens of the vocabulary by the logit that a feature's direction gives them.

    Args:
        counts: tokens in each bin, all of one width.
        low: lower edge of the first bin, the lowest logit.
        high: upper edge of the last one, the highest logit.
    """
    width = (high - low) / len(counts)
    edges = [low + width * place for place in range(len(counts) + 1)]
    figure = go.Figure(
        go.Bar(
            x=[(left + right) / 2 for left, right in pairwise(edges)],
            y=list(counts),
            width=0.98 * width,
            marker={"color": [BLUE if left + right < 0 else ORANGE
                              for left, right in pairwise(edges)]},
            customdata=[f"{left:.3g} to {right:.3g}" for left, right in pairwise(edges)],
            hovertemplate="%{customdata}: %{y:,} tokens<extra></extra>",
        )
    )  # fmt: skip
    # The ends, which say what a feature is for, hold single tokens of thousands.
    top = math.log10(max(1, *counts)) + 0.1
    figure.update_yaxes(type="log", range=[math.log10(0.5), top], dtick=1)
    subtitle = f"{sum(counts):,} tokens; those at both ends stand above"
    return _layout(
        figure, "Logit lens over the vocabulary", "logit beside that of nothing",
        "tokens, log scale", subtitle, **{**_SMALL, "height": 300},
    )  # fmt: skip


def phases_figure(
    densities: Mapping[str, float], overall: float, interval: Interval, documents: int
) -> go.Figure:
    """Share of tokens at which a feature fires, by phase and over all.

    Args:
        densities: {phase: share}.
        overall: over all tokens.
        interval: of that, 95 % over documents; the phases' own is not kept by the tables.
        documents: how many.
    """
    low, high = interval
    error = _to_ends([100 * overall], [(100 * low, 100 * high)], color=GREY)
    figure = go.Figure()
    for names, shares, colours, reach in (
        (PHASES, [densities[p] for p in PHASES], [PHASE_COLOURS[p] for p in PHASES], None),
        (["all"], [overall], [PURPLE], error),
    ):
        values = [100 * share for share in shares]
        figure.add_bar(
            x=values,
            # The figures stand at the axis: in a short bar they would have no room.
            y=[f"{name}, {value:.3g} %" for name, value in zip(names, values, strict=True)],
            orientation="h",
            marker={"color": colours},
            hovertemplate="%{x:.4g} % of tokens<extra></extra>",
            error_x=reach,
        )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(rangemode="tozero")
    subtitle = f"95 % of the whole, over {documents} documents"
    return _layout(figure, "Density by phase", "% of the phase's tokens", "", subtitle, **_SMALL)


def trials_figure(shares: Mapping[str, tuple[int, int, Interval]], fires: float) -> go.Figure:
    """Share of trials of each kind in which a feature fired, with the border of its verdict.

    Args:
        shares: {kind: (fired, trials, 95 % interval)}, kinds of TRIALS.
        fires: the share from which it counts as firing.

    It fires where the interval lies above, and is silent where it lies below `words.SILENT` of it.
    """
    kinds = [kind for kind in TRIALS if kind in shares]
    points = [100 * shares[kind][0] / max(1, shares[kind][1]) for kind in kinds]
    ends = [(100 * low, 100 * high) for low, high in (shares[kind][2] for kind in kinds)]
    states = np.where(
        [low > 100 * fires for low, _ in ends], FIRES,
        np.where([high < 100 * SILENT * fires for _, high in ends], SILENT_THERE, UNDETERMINED),
    )  # fmt: skip
    figure = go.Figure()
    for bound in (fires, SILENT * fires):
        figure.add_vline(x=100 * bound, line={"color": GREY, "dash": "dash"})
    for name, colour, symbol in (
        (FIRES, BLUE, "circle"),
        (SILENT_THERE, ORANGE, "circle-open"),
        (UNDETERMINED, GREY, "x"),
    ):
        rows = [place for place, state in enumerate(states) if state == name]
        figure.add_scatter(
            x=[points[place] for place in rows],
            y=[TRIALS[kinds[place]] for place in rows],
            mode="markers",
            name=name,
            marker={"color": colour, "symbol": symbol, "size": 11},
            customdata=[shares[kinds[place]][:2] for place in rows],
            hovertemplate="%{y}: %{customdata[0]} of %{customdata[1]}<extra></extra>",
            error_x=_to_ends([points[p] for p in rows], [ends[p] for p in rows], color=GREY),
        )
    figure.update_xaxes(range=[-4, 104])
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=[TRIALS[kind] for kind in kinds][::-1]
    )
    subtitle = "95 % intervals; dashed: above both it fires, below both it is silent"
    return _layout(
        figure, "Where it fires", "% of the trials", "", subtitle, hovermode="closest",
        height=480, legend_y=-0.25,
    )  # fmt: skip
