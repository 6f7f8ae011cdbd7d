"""Of the page "Layers": what a sweep says, in sentences and tables."""

from __future__ import annotations

from typing import Any

import streamlit as st

from resa_lens.app import layers_data
from resa_lens.app.data import Artifact
from resa_lens.app.widgets import table
from resa_lens.hookpoints import describe_layer
from resa_lens.pipeline.sweep_page import findings
from resa_lens.pipeline.sweep_tables import Sweep

_POINTS, _P = "%.2f", "%.3g"


def show(swept: Artifact, sweep: Sweep, same_counts: bool) -> None:
    """Draw the section.

    Args:
        swept: the artifact.
        sweep: its results.
        same_counts: whether it was made with the counts that the page shows.
    """
    st.subheader("What the sweep says", anchor=False)
    st.text(layers_data.said_of(swept))
    if not same_counts:
        totals = ", ".join(f"{sum(t.values()):.0f} {rule}" for rule, t in sweep.counts.items())
        st.text(
            "The sweep has counts of its own, from the SAEs that it tuned through; correlation and "
            f"selectors below are about those ({totals})."
        )
    st.text("\n".join(f"• {sentence}" for sentence in findings(sweep)))
    with st.expander("Table of layers"):
        table(_layers(sweep), "sweep_layers", _formats(_layers(sweep)))
    if sweep.controls:
        with st.expander("Table of controls"):
            rows = _controls(sweep)
            table(rows, "sweep_controls", _formats(rows))
    with st.expander("Selectors: what each would have cost", expanded=True):
        rows = _selectors(sweep)
        table(rows, "selectors", _formats(rows))
        st.caption(
            "Regret: the best layer's accuracy minus that of the layer which the selector chose, "
            "in points; gain: above a layer at random. 95 % from the spread between seeds, on "
            "these questions."
        )
        said = [f"{name}: {reason}" for name, reason in sweep.reasons.items()]
        if said:
            st.text("\n".join(said))


def _formats(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Points with two digits, p-values with three figures."""
    named = {key: _P for key in rows[0] if key.startswith("p") or " p" in key}
    points = ("%", "points", "FVU")
    return named | {key: _POINTS for key in rows[0] if any(word in key for word in points)}


def _points(
    name: str, value: float, ci: tuple[float, float] | None, scale: float
) -> dict[str, Any]:
    low, high = ci or (None, None)
    return {
        f"{name}, points": scale * value,
        f"{name} low, points": None if low is None else scale * low,
        f"{name} high, points": None if high is None else scale * high,
    }


def _place(layer: int | None) -> dict[str, Any]:
    return {"layer": layer, "layer_1_indexed": None if layer is None else layer + 1}


def _layers(sweep: Sweep) -> list[dict[str, Any]]:
    return [
        {
            **_place(row["layer"]),
            "accuracy, %": 100 * row["accuracy"],
            **_points("minus base", row["difference"], row["simultaneous_ci"], 100),
            "p, all layers": row["adjusted_p"],
            "seeds": row["seeds"],
            "n": sweep.n,
            **{rule: held.get(row["layer"]) for rule, held in sweep.counts.items()},
            "FVU": sweep.fvu.get(row["layer"]),
        }
        for row in sweep.layers
    ]


def _controls(sweep: Sweep) -> list[dict[str, Any]]:
    rows = []
    for row in sweep.controls:
        beside = row["sae_minus_control"] or {}
        rows.append(
            {
                "control": row["control"],
                **_place(row["layer"]),
                "accuracy, %": 100 * row["accuracy"],
                **_points("minus base", row["difference"], row["ci"], 100),
                "p, all controls": row["adjusted_p"],
                "SAE minus control, points": 100 * beside["difference"] if beside else None,
                "low, points": 100 * beside["ci"][0] if beside else None,
                "high, points": 100 * beside["ci"][1] if beside else None,
                "its p, all pairs": beside.get("adjusted_p"),
                "seeds": row["seeds"],
                "n": sweep.n,
            }
        )
    return rows


def _selectors(sweep: Sweep) -> list[dict[str, Any]]:
    made = sweep.regrets
    rows = [
        {
            "selector": row["selector"],
            "chose": describe_layer(row["layer"], sweep.n_layers),
            "accuracy, %": row["score"],
            **_points("regret", row["regret"], row["ci"], 1),
            **_points("gain", row["gain"], row["gain_ci"], 1),
        }
        for row in made["selectors"]
    ]
    random = {
        "selector": "(a layer at random)",
        "chose": "any",
        "accuracy, %": None,
        **_points("regret", made["random"], made["random_ci"], 1),
    }
    return [*rows, {**dict.fromkeys(rows[0] if rows else random), **random}]
