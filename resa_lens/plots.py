"""Plotly figures, shared by the app, the notebooks, the report and the command line.

Functions from plain tables to figures; layers are 0-based inside and shown in either numbering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from resa_lens import stats
from resa_lens.layers import FLAT, MixtureFit

# Okabe and Ito's palette: told apart by colour-blind readers, on light and on dark ground.
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#7F7F7F",
)  # fmt: skip
RULE_COLOURS = {"all": BLUE, "any": ORANGE, "either": GREEN}
RULE_NAMES = {
    "all": "all (strict: every occurrence of both tags)",
    "any": "any occurrence of both tags",
    "either": "either tag",
}
BAND_DRAWS = 2000


def _layout(figure: go.Figure, title: str, x: str, y: str) -> go.Figure:
    figure.update_layout(
        title={"text": title, "x": 0, "xanchor": "left", "font": {"size": 16}},
        xaxis_title=x,
        yaxis_title=y,
        template="plotly_white",
        legend={"orientation": "h", "y": -0.22, "x": 0},
        margin={"l": 60, "r": 20, "t": 70, "b": 90},
        hovermode="x unified",
        height=430,
    )
    return figure


def _axis(one_based: bool) -> str:
    return "layer (1-based)" if one_based else "layer (0-based)"


def counts_figure(
    counts: Mapping[str, Mapping[int, int]],
    *,
    recommended: Sequence[int] = (),
    supported: bool = False,
    one_based: bool = False,
) -> go.Figure:
    """Bars of the exclusive features of each layer, a colour a rule, the recommended layers marked.

    Args:
        counts: {rule: {0-based layer: count}}.
        recommended: 0-based layers, best first.
        supported: whether the verdict supports them: solid marks, else dashed.
        one_based: numbering of the axis.
    """
    shift = int(one_based)
    figure = go.Figure()
    for rule, table in counts.items():
        figure.add_bar(
            x=[layer + shift for layer in table],
            y=list(table.values()),
            name=RULE_NAMES.get(rule, rule),
            marker_color=RULE_COLOURS.get(rule, GREY),
        )
    for rank, layer in enumerate(recommended):
        figure.add_vline(
            x=layer + shift,
            line={"color": VERMILION, "dash": "solid" if supported else "dot", "width": 2},
            annotation_text=("recommended" if supported else "fallback") if rank == 0 else None,
            annotation_font_color=VERMILION,
        )
    total = sum(sum(table.values()) for table in counts.values())
    if total == 0:
        figure.add_annotation(
            text="no feature under any rule",
            showarrow=False,
            xref="paper",
            yref="paper",
            x=0.5,
            y=0.5,
        )
    figure.update_xaxes(dtick=1 if len(next(iter(counts.values()), {})) <= 16 else 2)
    figure.update_yaxes(rangemode="tozero")
    return _layout(figure, "Think-tag exclusive features", _axis(one_based), "features")


def mixture_figure(fit: MixtureFit, *, one_based: bool = False, seed: int = 0) -> go.Figure:
    """The profile, the fitted density on its scale, and the 95 % band of the flat null.

    For counts the band is that of each layer when the same number of features falls on the layers
    at random (pointwise); for scores there is no such band and the mean is drawn.
    """
    shift = int(one_based)
    layers = np.asarray(fit.layers, dtype=float)
    values = np.asarray(fit.values)
    figure = go.Figure()
    if fit.kind == "counts" and fit.n > 0:
        draws = stats.multinomial_draws(fit.n, np.ones(layers.size), BAND_DRAWS, seed)
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        figure.add_scatter(
            x=np.concatenate([layers, layers[::-1]]) + shift,
            y=np.concatenate([high, low[::-1]]),
            fill="toself",
            fillcolor="rgba(127,127,127,0.22)",
            line={"width": 0},
            hoverinfo="skip",
            name="flat null, 95 % of draws a layer",
        )
    figure.add_bar(
        x=layers + shift,
        y=values,
        name="features" if fit.kind == "counts" else "score",
        marker_color=SKY,
    )
    level = float(values.mean()) if values.size else 0.0
    figure.add_scatter(
        x=layers + shift,
        y=np.full(layers.size, level),
        mode="lines",
        name="flat",
        line={"color": GREY, "dash": "dash"},
    )
    if fit.components:
        grid = np.linspace(layers[0] - 0.5, layers[-1] + 0.5, 400)
        if fit.kind == "counts":
            figure.add_scatter(
                x=grid + shift,
                y=fit.density(grid) * values.sum(),
                mode="lines",
                name=f"fitted mixture (K = {fit.k})",
                line={"color": BLUE, "width": 3, "dash": "dot" if fit.verdict == FLAT else "solid"},
            )
        for part, interval in zip(
            fit.components, [*fit.intervals, *[None] * len(fit.components)], strict=False
        ):
            top = float(values.max()) * 1.06
            figure.add_scatter(
                x=[part.mean + shift],
                y=[top],
                mode="markers",
                showlegend=False,
                marker={"symbol": "triangle-down", "size": 11, "color": VERMILION},
                error_x=None
                if interval is None
                else {
                    "type": "data",
                    "symmetric": False,
                    "color": VERMILION,
                    "array": [max(0.0, interval.mean[1] - part.mean)],
                    "arrayminus": [max(0.0, part.mean - interval.mean[0])],
                },
                hovertemplate=f"mean {part.mean:.2f}, weight {part.weight:.2f}, "
                f"sd {part.std:.2f}<extra></extra>",
            )
    if fit.kind == "scores" and values.size:
        spread = max(float(np.ptp(values)), 0.1)
        figure.update_yaxes(range=[values.min() - 0.3 * spread, values.max() + 0.3 * spread])
    title = f"Mixture over layers, recipe {fit.recipe}: {fit.verdict}"
    y = "features" if fit.kind == "counts" else "score"
    return _layout(figure, title, _axis(one_based), y)


def quality_figure(fvu: Mapping[int, float], *, one_based: bool = False) -> go.Figure:
    """FVU of each layer's SAE on held-out sequences."""
    shift = int(one_based)
    figure = go.Figure(
        go.Scatter(
            x=[layer + shift for layer in fvu],
            y=list(fvu.values()),
            mode="lines+markers",
            line={"color": PURPLE},
            name="FVU",
        )
    )
    figure.update_yaxes(rangemode="tozero")
    return _layout(
        figure,
        "SAE quality on held-out sequences",
        _axis(one_based),
        "fraction of variance unexplained",
    )


def scores_figure(
    runs: Mapping[str, Mapping[str, tuple[float, tuple[float, float], int]]],
) -> go.Figure:
    """Accuracy with 95 % intervals: {run: {group: (accuracy, interval, n)}}, a colour a run."""
    figure = go.Figure()
    for (run, groups), colour in zip(runs.items(), (GREY, BLUE, ORANGE, GREEN), strict=False):
        accuracy = [100 * score[0] for score in groups.values()]
        figure.add_bar(
            x=list(groups),
            y=accuracy,
            name=run,
            marker_color=colour,
            customdata=[score[2] for score in groups.values()],
            hovertemplate="%{y:.1f} % (n = %{customdata})<extra>" + run + "</extra>",
            error_y={
                "type": "data",
                "symmetric": False,
                "thickness": 1.5,
                "array": [
                    100 * s[1][1] - a for s, a in zip(groups.values(), accuracy, strict=True)
                ],
                "arrayminus": [
                    a - 100 * s[1][0] for s, a in zip(groups.values(), accuracy, strict=True)
                ],
            },
        )
    figure.update_yaxes(range=[0, 100])
    return _layout(figure, "Accuracy with 95 % intervals", "", "accuracy, %")


def loss_figure(losses: Sequence[float]) -> go.Figure:
    """The tuning's loss by step."""
    figure = go.Figure(go.Scatter(y=list(losses), mode="lines", line={"color": BLUE}, name="loss"))
    figure.update_yaxes(rangemode="tozero")
    return _layout(figure, "Tuning loss", "step", "KL, nats")
