"""Plotly figures, shared by the app, the notebooks, the report and the command line.

Functions from plain tables to figures; layers are 0-based inside and shown in either numbering.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from resa_lens import stats
from resa_lens.layers import FLAT, SUPPORTED, TREND, WEAK, MixtureFit
from resa_lens.stats import Interval

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
MARKS = {
    SUPPORTED: "recommended", TREND: "a trend", WEAK: "weak evidence", FLAT: "fallback",
}  # fmt: skip
"""What stands at the first recommended layer, by verdict; "not tested" for all others."""
BAND_DRAWS = 2000


def _plain(text: str) -> str:
    """Text from a file as text: Plotly reads tags in titles, names and categories."""
    return html.escape(text, quote=False)


def _layout(
    figure: go.Figure, title: str, x: str, y: str, subtitle: str = "", **more: Any
) -> go.Figure:
    legend = more.get("showlegend", True)
    # The short title and the subtitle fit a phone's width; legend and title have their own bands
    # above and below the axes, which grow with the legend's lines.
    figure.update_layout(
        title={
            "text": title,
            "subtitle": {"text": subtitle, "font": {"size": 12.5}},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "pad": {"l": 8},
            "y": 0.97,
            "yref": "container",
            "yanchor": "top",
            "font": {"size": 16},
        },
        xaxis_title=x,
        yaxis_title=y,
        template="plotly_white",
        legend={"orientation": "h", "y": -0.22, "x": 0},
        margin={"l": 56, "r": 16, "t": 92 if subtitle else 76, "b": 84 if legend else 56},
        hovermode="x unified",
        height=440 if legend else 410,
    )
    figure.update_xaxes(automargin=True).update_yaxes(automargin=True)
    return figure.update_layout(**more)


def _over_layers(
    figure: go.Figure, layers: int, one_based: bool, title: str, y: str, **more: Any
) -> go.Figure:
    """Lay out a figure over so many layers, each of them named or every second one."""
    figure.update_xaxes(dtick=1 if layers <= 16 else 2)
    return _layout(figure, title, _axis(one_based), y, **more)


def _axis(one_based: bool) -> str:
    return "layer (1-based)" if one_based else "layer (0-based)"


def _over(layers: Iterable[int], table: Mapping[int, Any], one_based: bool) -> dict[str, Any]:
    """Return where a trace stands over layers; a layer without a value breaks its line."""
    places = list(layers)
    return {"x": [layer + one_based for layer in places], "y": [table.get(n) for n in places]}


def _count_ticks(figure: go.Figure, highest: float) -> None:
    """Whole numbers on an axis of counts."""
    figure.update_yaxes(rangemode="tozero", dtick=1 if highest <= 8 else None)


def _to_ends(
    points: Sequence[float], intervals: Sequence[Interval], **style: Any
) -> dict[str, Any]:
    """Error bars from marks to the ends of their intervals."""
    pairs = list(zip(points, intervals, strict=True))
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, high - point) for point, (_, high) in pairs],
        "arrayminus": [max(0.0, point - low) for point, (low, _) in pairs],
        **style,
    }


def _stacks(
    figure: go.Figure,
    tables: Mapping[str, Mapping[int, int]],
    colours: Mapping[str, str],
    shift: bool,
) -> None:
    """Bars over layers of each table, {name: {0-based layer: count}}."""
    for name, table in tables.items():
        figure.add_bar(
            **_over(table, table, shift),
            name=RULE_NAMES.get(name, _plain(name)),
            marker_color=colours.get(name, GREY),
        )


def _empty(figure: go.Figure, text: str) -> None:
    where = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
    figure.add_annotation(text=text, showarrow=False, font={"size": 14}, **where)


def counts_figure(
    counts: Mapping[str, Mapping[int, int]],
    *,
    recommended: Sequence[int] = (),
    verdict: str = FLAT,
    null: Mapping[str, Mapping[int, tuple[int, int]]] | None = None,
    one_based: bool = False,
    title: str = "Think-tag exclusive features",
) -> go.Figure:
    """Bars of the exclusive features of each layer, a colour a rule, the recommended layers marked.

    Args:
        counts: {rule: {0-based layer: count}}.
        recommended: 0-based layers, best first.
        verdict: on them, which their mark names: solid where it supports them, else dotted.
        null: {rule: {layer: (counted, active)}}: what the rule counts with random weights, of how
            many active features; drawn over the rule's bars.
        one_based: numbering of the axis.
        title: of the figure.
    """
    shift = int(one_based)
    figure = go.Figure()
    # A rule that counts nothing has no bars: theirs would hold room, and push the others aside.
    drawn = {rule: table for rule, table in counts.items() if any(table.values())} or counts
    _stacks(figure, drawn, RULE_COLOURS, one_based)
    for rule, table in counts.items():
        if rule not in drawn:
            name = f"{RULE_NAMES.get(rule, _plain(rule))}: none"
            figure.add_scatter(
                x=[layer + shift for layer in table], y=[None] * len(table), name=name,
                mode="markers",
                marker={"symbol": "square", "size": 10, "color": RULE_COLOURS.get(rule, GREY)},
            )  # fmt: skip
    if null:
        _null_marks(figure, list(drawn), null, shift)
    for rank, layer in enumerate(recommended):
        figure.add_vline(
            x=layer + shift,
            line={
                "color": VERMILION,
                "dash": "solid" if verdict == SUPPORTED else "dot",
                "width": 2 if rank == 0 else 1.2,
            },
            # Centred above the axes: to the side of its line it would cover bars, or be cut off.
            annotation={
                "text": MARKS.get(verdict, "not tested") if rank == 0 else "",
                "font": {"color": VERMILION},
                "y": 1,
                "yanchor": "bottom",
                "xanchor": "center",
            },
        )
    total = sum(sum(table.values()) for table in counts.values())
    if total == 0:
        _empty(figure, "no feature under any rule" if len(counts) > 1 else "no feature")
    _count_ticks(figure, max((v for t in counts.values() for v in t.values()), default=0))
    layers = len(next(iter(counts.values()), {}))
    return _over_layers(figure, layers, one_based, title, "features")


def _null_marks(
    figure: go.Figure,
    rules: Sequence[str],
    null: Mapping[str, Mapping[int, tuple[int, int]]],
    shift: int,
) -> None:
    """Counts with random weights over each rule's bars, with the interval of their rate."""
    gap = 0.2
    width, known = (1 - gap) / len(rules), [rule for rule in rules if null.get(rule)]
    for rule in known:
        place, table = rules.index(rule), null[rule]
        counted = [n for n, _ in table.values()]
        # 95 % intervals of how many of the active features are counted.
        rates = [stats.clopper_pearson(*pair) if pair[1] else (0.0, 0.0) for pair in table.values()]
        ends = [
            (active * low, active * high)
            for (_, active), (low, high) in zip(table.values(), rates, strict=True)
        ]
        figure.add_scatter(
            x=[layer + shift + (place - (len(rules) - 1) / 2) * width for layer in table],
            y=counted,
            mode="markers",
            name="random weights, 95 %",
            legendgroup="null",
            showlegend=rule == known[0],
            marker={"symbol": "line-ew-open", "color": PURPLE, "size": 9, "line": {"width": 3}},
            error_y=_to_ends(counted, ends, color=PURPLE, thickness=1.5, width=3),
            customdata=[
                (_plain(rule), active, low, high)
                for (_, active), (low, high) in zip(table.values(), ends, strict=True)
            ],
            hovertemplate="%{customdata[0]}, random weights: %{y} of %{customdata[1]} active "
            "(%{customdata[2]:.1f} to %{customdata[3]:.1f})<extra></extra>",
        )
    figure.update_layout(bargap=gap)


def mixture_figure(
    fit: MixtureFit, *, one_based: bool = False, title: str = "Mixture over layers"
) -> go.Figure:
    """The profile, the fitted density on its scale, and the 95 % band of the flat null.

    For counts the band is that of each layer when the same number of features falls on the layers
    at random (pointwise); for scores there is no such band and the mean is drawn.
    """
    shift = int(one_based)
    layers = np.asarray(fit.layers, dtype=float)
    values = np.asarray(fit.values)
    figure, y = go.Figure(), "features" if fit.kind == "counts" else "score"
    if fit.kind == "counts" and fit.n > 0:
        draws = stats.multinomial_draws(fit.n, np.ones(layers.size), BAND_DRAWS, 0)
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        edges = (layers[:, None] + np.array([-0.5, 0.5])).ravel()
        figure.add_scatter(
            x=np.concatenate([edges, edges[::-1]]) + shift,
            y=np.concatenate([high.repeat(2), low.repeat(2)[::-1]]),
            fill="toself",
            fillcolor="rgba(127,127,127,0.22)",
            line={"width": 0},
            hoverinfo="skip",
            name="flat null, 95 % of draws a layer",
        )
    figure.add_bar(x=layers + shift, y=values, name=y, marker_color=SKY)
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
        intervals = [*fit.intervals, *[None] * len(fit.components)]
        for rank, (part, interval) in enumerate(zip(fit.components, intervals, strict=False)):
            top = float(values.max()) * 1.06
            figure.add_scatter(
                x=[part.mean + shift],
                y=[top],
                mode="markers",
                showlegend=rank == 0,
                legendgroup="means",
                name="mean of a component, 95 %" if fit.intervals else "mean of a component",
                marker={"symbol": "triangle-down", "size": 11, "color": VERMILION},
                error_x=interval and _to_ends([part.mean], [interval.mean], color=VERMILION),
                hovertemplate=f"mean {part.mean:.2f}, weight {part.weight:.2f}, "
                f"sd {part.std:.2f}<extra></extra>",
            )
    if fit.kind == "scores" and values.size:
        spread = max(float(np.ptp(values)), 0.1)
        figure.update_yaxes(range=[values.min() - 0.3 * spread, values.max() + 0.3 * spread])
    if fit.kind == "counts" and fit.n == 0:
        _empty(figure, "no feature: nothing to fit")
    if fit.kind == "counts":
        _count_ticks(figure, float(values.max(initial=0)))
    subtitle = _plain(f"recipe {fit.recipe}: {fit.verdict}")
    return _over_layers(figure, layers.size, one_based, title, y, subtitle=subtitle)


def profile_figure(
    profile: Mapping[int, float],
    *,
    title: str,
    y: str,
    baseline: float | None = None,
    one_based: bool = False,
) -> go.Figure:
    """A line over layers, {0-based layer: value}, with a level to compare it with where given."""
    layers, figure = sorted(profile), go.Figure()
    figure.add_scatter(
        **_over(layers, profile, one_based), mode="lines+markers", line={"color": PURPLE}, name=y
    )
    if baseline is not None and layers:
        ends = layers[0], layers[-1]
        figure.add_scatter(
            **_over(ends, dict.fromkeys(ends, baseline), one_based),
            mode="lines",
            line={"color": GREY, "dash": "dash"},
            name="base model",
        )
    legend = {"showlegend": False} if baseline is None else {}
    return _over_layers(figure, len(layers), one_based, title, y, **legend)


def quality_figure(fvu: Mapping[int, float]) -> go.Figure:
    """FVU of each layer's SAE on held-out sequences."""
    title, y = "SAE quality on held-out sequences", "fraction of variance unexplained"
    return profile_figure(fvu, title=title, y=y).update_yaxes(rangemode="tozero")


def scores_figure(
    runs: Mapping[str, Mapping[str, tuple[float, tuple[float, float], int]]],
) -> go.Figure:
    """Accuracy with 95 % intervals: {run: {group: (accuracy, interval, n)}}, a colour a run."""
    figure = go.Figure()
    # Points, not bars: the interval is what is to be read, on light and on dark ground.
    styles = (
        (GREY, "circle"), (BLUE, "diamond"), (ORANGE, "square"), (GREEN, "cross"),
        (SKY, "triangle-up"), (VERMILION, "x"), (PURPLE, "star"),
    )  # fmt: skip
    for (run, groups), (colour, symbol) in zip(runs.items(), styles, strict=False):
        accuracy = [100 * score[0] for score in groups.values()]
        ends = [(100 * low, 100 * high) for _, (low, high), _ in groups.values()]
        figure.add_scatter(
            x=[_plain(group) for group in groups],
            y=accuracy,
            mode="markers",
            name=_plain(run),
            marker={"color": colour, "symbol": symbol, "size": 9},
            customdata=[(n, *pair) for (_, _, n), pair in zip(groups.values(), ends, strict=True)],
            hovertemplate="%{y:.1f} % (%{customdata[1]:.1f} to %{customdata[2]:.1f}, "
            "n = %{customdata[0]})<extra>" + _plain(run) + "</extra>",
            error_y=_to_ends(accuracy, ends, thickness=2, width=4, color=colour),
        )
    figure.update_yaxes(range=[-3, 103], tickvals=list(range(0, 101, 20)))
    # On a narrow screen the groups' names stand upright, where the legend would be.
    place = {"legend_y": 1.02, "legend_yanchor": "bottom", "margin_b": 40, "margin_t": 84}
    return _layout(
        figure, "Accuracy with 95 % intervals", "", "accuracy, %",
        showlegend=True, scattermode="group", scattergap=0.35, **place,
    )  # fmt: skip


def loss_figure(losses: Sequence[float]) -> go.Figure:
    """The tuning's loss by step."""
    figure = go.Figure(go.Scatter(y=list(losses), mode="lines", line={"color": BLUE}, name="loss"))
    figure.update_yaxes(rangemode="tozero", exponentformat="power")
    return _layout(figure, "Tuning loss", "step", "KL, nats", showlegend=False)


def dose_response_figure(doses: Sequence[Mapping[str, Any]], title: str) -> go.Figure:
    """Change of the accuracy by strength, of features and of matched random ones.

    Args:
        doses: rows as `pipeline.dose_response.dose_response` makes them.
        title: what was done to which features.
    """
    figure = go.Figure()
    effects = [row["effect"] for row in doses]
    # Strength 0 is what the others are compared with: no change, without error.
    strengths = [0.0, *(row["strength"] for row in doses)]
    points = [0.0, *(100 * effect["difference"] for effect in effects)]
    ends = [(0.0, 0.0), *((100 * low, 100 * high) for low, high in (e["ci"] for e in effects))]
    figure.add_scatter(
        x=strengths,
        y=points,
        mode="lines+markers",
        name="features",
        line={"color": BLUE},
        error_y=_to_ends(points, ends),
    )
    controls = [(row["strength"], row["control"]) for row in doses if row["control"]]
    figure.add_scatter(
        x=[strength for strength, control in controls for _ in control["each"]],
        y=[100 * each for _, control in controls for each in control["each"]],
        mode="markers",
        name="random features, each set",
        marker={"color": GREY, "symbol": "circle-open", "size": 8},
    )
    figure.add_scatter(
        x=[strength for strength, _ in controls],
        y=[100 * control["effect"]["difference"] for _, control in controls],
        mode="markers",
        name="random features, mean",
        marker={"color": ORANGE, "symbol": "diamond", "size": 10},
    )
    return _layout(
        figure,
        _plain(title),
        "strength",
        "change of the accuracy, points",
        "95 % intervals over questions; random features of equal activation mass",
    )


VERDICT_COLOURS = {
    "prompt artefact": ORANGE,
    "delimiter detector": VERMILION,
    "seed artefact": PURPLE,
    "token detector": SKY,
    "prompt vocabulary x tag": BLUE,
    "undetermined": GREY,
    "reasoning delimiter": "#F0E442",
    "survives": GREEN,
}
"""Every verdict (`features.words.WORDS`), from what says least for a feature."""


def verdict_figure(
    verdicts: Mapping[int, Mapping[str, int]],
    null: Mapping[int, int] | None = None,
    *,
    one_based: bool = False,
) -> go.Figure:
    """Counted features of each layer by their verdict (`features.dependences`), stacked.

    Args:
        verdicts: {0-based layer: {verdict: features}}.
        null: {layer: features that the same rules count with a random-weights model}.
        one_based: which numbering the axis shows.
    """
    figure, layers = go.Figure(), sorted(verdicts)
    rows = {n: {at: verdicts[at].get(n, 0) for at in layers} for n in VERDICT_COLOURS}
    # A legend of words that nothing has would hide those that something has.
    tables = {name: row for name, row in rows.items() if any(row.values())}
    _stacks(figure, tables, VERDICT_COLOURS, one_based)
    if null:
        figure.add_scatter(
            **_over(sorted(null), null, one_based),
            mode="markers",
            name="counted with random weights",
            marker={"color": BLUE, "symbol": "line-ew-open", "size": 18, "line": {"width": 4}},
        )
    totals = [sum(row.values()) for row in verdicts.values()]
    if not any(totals):
        _empty(figure, "no rule counts a feature at these layers")
    _count_ticks(figure, max([*totals, *(null or {}).values()], default=0))
    return _over_layers(
        figure,
        len(layers),
        one_based,
        "Counted features by verdict",
        "features",
        subtitle="union of all rules; a token detector needs the tag alone, in any text",
        barmode="stack",
    )
