"""Of the page "Layers": what falsification left of the counts, and how good the SAEs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from resa_lens import layer_plots, plots
from resa_lens.app import data, layers_data, links, stages
from resa_lens.app.data import Artifact, Listing
from resa_lens.app.layers_data import PhaseFigures, Verdicts
from resa_lens.app.widgets import figure, problem, table
from resa_lens.errors import BadInputError
from resa_lens.pipeline.sweep_tables import Sweep


def verdicts(
    held: Verdicts, layers: Sequence[int], one_based: bool, activity: Artifact | None
) -> None:
    """Draw what the tests left of the counted features.

    Args:
        held: the falsification.
        layers: 0-based, all that were counted.
        one_based: numbering of the axis.
        activity: of the same SAEs, for the links to the features.
    """
    st.subheader("What falsification leaves of the counts", anchor=False)
    by_layer = held.by_layer(layers)
    # Every feature that any rule counts stands under the weakest one.
    null = {k: counted for k, (counted, _) in held.null().get(layers_data.WEAKEST, {}).items()}
    figure(plots.verdict_figure(by_layer, null, one_based=one_based), "figure-verdicts")
    st.text(held.summary.reason)
    kinds = ", ".join(f"{n} {kind}" for kind, n in held.trials.items())
    st.caption(
        "A token detector fires at the tags in any text; a prompt artefact only in this prompt, or "
        "in no other seed's SAE; what survives was not refuted, no more."
    )
    st.text(f"Texts tried: {kinds}.")
    for reason in held.skipped:
        st.text(f"left out: {reason}")
    with st.expander("Table by rule, beside random weights"):
        rows = [
            {
                "rule": tally.rule,
                "counted": tally.counted,
                **{name: tally.verdicts.get(name, 0) for name in plots.VERDICT_COLOURS},
                "survivors, low %": 100 * tally.ci[0],
                "survivors, high %": 100 * tally.ci[1],
                "active": tally.active,
                "random weights: counted": tally.null_counted,
                "random weights: active": tally.null_active,
                "p, counted": tally.p_counted,
                "pass the texts": tally.by_texts,
                "random weights: pass": tally.null_by_texts,
                "p, pass": tally.p_value,
            }
            for tally in held.summary.rules
        ]
        formats = {"survivors, low %": "%.1f", "survivors, high %": "%.1f"}
        table(rows, "verdicts_by_rule", formats | {"p, counted": "%.3g", "p, pass": "%.3g"})
    counted = {layer: sum(found.values()) for layer, found in by_layer.items()}
    if any(counted.values()):
        st.caption("The features of a layer, each with its evidence:")
        with st.container(horizontal=True):
            for layer, number in counted.items():
                if number:
                    named = layer + int(one_based)
                    where = {"run": activity.relative} if activity else {}
                    links.to(links.FEATURES, f"layer {named}: {number}", layer=layer, **where)


def quality(
    listing: Listing, slug: str, run: Artifact | None, sweep: Sweep | None, one_based: bool
) -> None:
    """Draw how good the SAEs are that were counted, or the model's newest ones.

    Args:
        listing: the workspace.
        slug: the model's.
        run: the counts, where there are any.
        sweep: has the FVU of its SAEs, which a workspace may lack.
        one_based: numbering of the axis.
    """
    st.subheader("SAE quality", anchor=False)
    if run:
        saes = data.saes_of(listing, run)
    else:
        saes = next((found for found in listing.of("saes") if found.slug == slug), None)
    if saes is None and sweep and sweep.fvu and run is None:
        st.caption("Of the SAEs that the sweep tuned through; they are not in this workspace.")
        figure(layer_plots.sae_figure({"FVU": sweep.fvu}, one_based=one_based), "figure-quality")
        _explained()
        return
    if saes is None:
        named = f"of these counts, {run.manifest.config.get('saes')}," if run else "of this model"
        problem(
            f"The SAEs {named} are not in this workspace. This command trains some:",
            stages.command_of(listing, layers_data.weights_of(listing, slug), "train-saes"),
        )
        return
    try:
        held = data.checked(data.Saes, saes.manifest.results, saes.path).layers
    except BadInputError as error:
        problem(str(error))
        return
    st.text(saes.relative)
    panels = {
        "FVU": {row.layer: row.fvu for row in held},
        "L0": {row.layer: row.l0 for row in held if row.l0 is not None},
        "dead share": {row.layer: row.dead_share for row in held if row.dead_share is not None},
    }
    figure(layer_plots.sae_figure(panels, one_based=one_based), "figure-quality")
    _explained()
    with st.expander("Table of SAEs"):
        rows = [
            {
                "layer": row.layer,
                "layer_1_indexed": row.layer + 1,
                "FVU": row.fvu,
                "L0": row.l0,
                "dead share": row.dead_share,
            }
            for row in held
        ]
        table(rows, "sae_quality", {"FVU": "%.4f", "L0": "%.1f", "dead share": "%.3f"})
    if report := layers_data.quality_of(listing, saes):
        _by_phase(report, one_based)


def _explained() -> None:
    st.caption(
        "FVU, the fraction of variance unexplained: 0 is a perfect reconstruction, 1 no better "
        "than the mean activation. L0: active latents a token. Dead: latents that fired on no "
        "token of the last part of the training."
    )


def _by_phase(report: Artifact, one_based: bool) -> None:
    try:
        held = layers_data.read_quality(report)
    except BadInputError as error:
        problem(str(error))
        return
    phases = [phase for phase in layer_plots.PHASE_STYLES if any(phase in f for f in held.values())]
    recovered = {
        phase: {
            layer: share
            for layer, figures in held.items()
            if phase in figures and (share := figures[phase].loss_recovered) is not None
        }
        for phase in phases
    }
    figure(layer_plots.recovered_figure(recovered, one_based=one_based), "figure-recovered")
    st.caption(
        "With the SAE's reconstruction in the layer's place. Left out where even zeros in its "
        "place do not raise the loss by two standard errors: there is nothing to recover."
    )
    with st.expander("Table by phase"):
        rows = [
            _phase_row(layer, phase, figures[phase])
            for layer, figures in sorted(held.items())
            for phase in (*phases, "all")
            if phase in figures
        ]
        formats = dict.fromkeys(("FVU", "loss recovered", "dead share"), "%.3f")
        nats = [key for key in (rows[0] if rows else ()) if "nats" in key]
        table(rows, "quality_by_phase", formats | dict.fromkeys(nats, "%.5f") | {"L0": "%.1f"})


def _phase_row(layer: int, phase: str, held: PhaseFigures) -> Mapping[str, Any]:
    low, high = layers_data.interval(held.loss_change, held.loss_change_se, held.documents - 1)
    return {
        "layer": layer,
        "layer_1_indexed": layer + 1,
        "phase": phase,
        "tokens": held.tokens,
        "documents": held.documents,
        "FVU": held.fvu,
        "L0": held.l0,
        "dead share": held.dead_share,
        "loss change, nats": held.loss_change,
        "low, nats": low,
        "high, nats": high,
        "loss recovered": held.loss_recovered,
    }
