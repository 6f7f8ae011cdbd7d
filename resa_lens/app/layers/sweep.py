"""Of the page "Layers": what a sweep says, in sentences and tables."""

from __future__ import annotations

from typing import Any

import streamlit as st

from resa_lens.app.widgets import layer_columns, share_columns, table
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.sweep import SweepTables
from resa_lens.models.hookpoints import describe_layer
from resa_lens.stages.sweep_page import findings


def show(swept: Artifact, sweep: SweepTables, same_counts: bool) -> None:
    """Draw the section.

    Args:
        swept: the artifact.
        sweep: its results.
        same_counts: whether it was made with the counts that the page shows.
    """
    st.subheader("What the sweep says", anchor=False)
    st.text(_about(swept))
    if not same_counts:
        totals = ", ".join(f"{sum(t.values()):.0f} {rule}" for rule, t in sweep.counts.items())
        st.text(
            "The sweep has counts of its own, from the SAEs that it tuned through; correlation and "
            f"selectors below are about those ({totals})."
        )
    st.text("\n".join(f"• {sentence}" for sentence in findings(sweep)))
    table(_layers(sweep), "sweep_layers", "Table of layers")
    if sweep.controls:
        table(_controls(sweep), "sweep_controls", "Table of controls")
    with st.expander("Selectors: what each would have cost", expanded=True):
        table(_selectors(sweep), "selectors")
        st.caption(
            "Regret: the best layer's accuracy minus that of the layer which the selector chose, "
            "in points; gain: above a layer at random. 95 % from the spread between seeds, on "
            "these questions."
        )
        if sweep.reasons:
            st.text("\n".join(f"{name}: {reason}" for name, reason in sweep.reasons.items()))


def _about(sweep: Artifact) -> str:
    """Say what a sweep tuned through which SAEs."""
    settings, results = sweep.settings, sweep.results
    own = settings.source == settings.target
    saes = "its own SAEs" if own else f"the SAEs of {settings.source}"
    return (
        f"{settings.target} tuned through {saes}, site {results.site}, preset {results.preset}; "
        f"{sweep.manifest.created[:10]}"
    )


def _points(
    name: str, value: float, ci: tuple[float, float] | None, scale: float = 100
) -> dict[str, Any]:
    return share_columns(name, "points", value, ci, ends=f"{name} ", scale=scale)


def _layers(sweep: SweepTables) -> list[dict[str, Any]]:
    return [
        {
            **layer_columns(row["layer"]),
            "accuracy, %": 100 * row["accuracy"],
            **_points("minus base", row["difference"], row["simultaneous_ci"]),
            "p, all layers": row["adjusted_p"],
            "seeds": row["seeds"],
            "n": sweep.n,
            **{rule: column.get(row["layer"]) for rule, column in sweep.counts.items()},
            "FVU": sweep.fvu.get(row["layer"]),
        }
        for row in sweep.layers
    ]


def _controls(sweep: SweepTables) -> list[dict[str, Any]]:
    rows = []
    for row in sweep.controls:
        pair = row["sae_minus_control"]
        value, ci = (pair["difference"], pair["ci"]) if pair else (None, None)
        rows.append(
            {
                "control": row["control"],
                **layer_columns(row["layer"]),
                "accuracy, %": 100 * row["accuracy"],
                **_points("minus base", row["difference"], row["ci"]),
                "p, all controls": row["adjusted_p"],
                **share_columns("SAE minus control", "points", value, ci),
                "its p, all pairs": pair["adjusted_p"] if pair else None,
                "seeds": row["seeds"],
                "n": sweep.n,
            }
        )
    return rows


def _selectors(sweep: SweepTables) -> list[dict[str, Any]]:
    regrets = sweep.regrets
    rows = [
        {
            "selector": row["selector"],
            "chose": describe_layer(row["layer"], sweep.n_layers),
            "accuracy, %": row["score"],
            **_points("regret", row["regret"], row["ci"], 1),
            **_points("gain", row["gain"], row["gain_ci"], 1),
        }
        for row in regrets["selectors"]
    ]
    random = {
        "selector": "(a layer at random)",
        "chose": "any",
        "accuracy, %": None,
        **_points("regret", regrets["random"], regrets["random_ci"], 1),
    }
    return [*rows, {**dict.fromkeys(rows[0] if rows else random), **random}]
