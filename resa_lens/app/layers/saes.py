"""Of the page "Layers": what falsification left of the counts, and how good the SAEs are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from resa_lens.app import data, links
from resa_lens.app.widgets import figure, layer_columns, part, problem, share_columns, table
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.commands import command_of
from resa_lens.artifacts.kinds.counts import RULES
from resa_lens.artifacts.kinds.falsification import Verdicts
from resa_lens.artifacts.kinds.quality import Figures, PhaseFigures, Quality
from resa_lens.artifacts.kinds.saes import LayerQuality, Saes
from resa_lens.artifacts.kinds.sweep import SweepTables
from resa_lens.artifacts.listing import Listing
from resa_lens.figures import layers as layer_plots
from resa_lens.figures import plots
from resa_lens.stats.resampling import student_interval


def verdicts(falsification: Verdicts, layers: Sequence[int], address: dict[str, str]) -> None:
    """Draw what the tests left of the counted features.

    Args:
        falsification: the verdicts.
        layers: 0-based, all that were counted.
        address: of the features of the same SAEs.
    """
    st.subheader("What falsification leaves of the counts", anchor=False)
    by_layer, one_based = falsification.by_layer(layers), links.one_based()
    # Every feature that any rule counts stands under the weakest one.
    null = falsification.null().get(RULES[-1], {})
    drawing = plots.verdict_figure(
        by_layer, {layer: counted for layer, (counted, _) in null.items()}, one_based=one_based
    )
    figure(drawing, "figure-verdicts")
    st.text(falsification.summary.reason)
    st.caption(
        "A token detector needs the tag alone, in any text: that describes it and refutes nothing. "
        "Artefacts and detectors of any delimiter are refuted; what stands (reasoning delimiter, "
        "survives) was not, no more."
    )
    st.text(f"Texts tried: {', '.join(f'{n} {kind}' for kind, n in falsification.trials.items())}.")
    for reason in falsification.skipped:
        st.text(f"left out: {reason}")
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
        for tally in falsification.summary.rules
    ]
    table(rows, "verdicts_by_rule", "Table by rule, beside random weights")
    counts = {layer: sum(row.values()) for layer, row in by_layer.items() if row}
    if counts:
        st.caption("The features of a layer, each with its evidence:")
        with st.container(horizontal=True):
            for layer, count in counts.items():
                label = f"layer {layer + one_based}: {count}"
                links.to(links.FEATURES, label, layer=layer, **address)


def quality(
    listing: Listing,
    slug: str,
    weights: str,
    run: Artifact | None,
    sweep: SweepTables | None,
) -> None:
    """Draw how good the SAEs are that were counted, or the model's newest ones.

    Args:
        listing: the workspace.
        slug: the model's.
        weights: hash of its weights.
        run: the counts, where there are any.
        sweep: has the FVU of its SAEs, which a workspace may lack.
    """
    st.subheader("SAE quality", anchor=False)
    if run:
        saes = listing.parent(run, Saes)
    else:
        saes = next((artifact for artifact in listing.of(Saes) if artifact.slug == slug), None)
    if saes is None and sweep and sweep.fvu and run is None:
        st.caption("Of the SAEs that the sweep tuned through; they are not in this workspace.")
        _panels({"FVU": sweep.fvu})
        return
    if saes is None:
        named = f"of these counts, {data.saes_path(run)}," if run else "of this model"
        problem(
            f"The SAEs {named} are not in this workspace. This command trains some:",
            command_of(listing, weights, "train-saes"),
        )
        return
    st.text(saes.relative)
    layers: list[LayerQuality] = saes.results.layers
    rows = [
        {
            **layer_columns(row.layer),
            "FVU": row.fvu,
            "L0": row.l0,
            "dead share": row.dead_share,
        }
        for row in layers
    ]
    names = ("FVU", "L0", "dead share")
    _panels({n: {r["layer"]: r[n] for r in rows if r[n] is not None} for n in names})
    table(rows, "sae_quality", "Table of SAEs")
    if reports := listing.made_of(saes, Quality):
        with part():
            _by_phase(data.read(reports[0], "quality.json", Figures).root)


def _panels(panels: dict[str, dict[int, float]]) -> None:
    figure(layer_plots.sae_figure(panels, one_based=links.one_based()), "figure-quality")
    st.caption(
        "FVU, the fraction of variance unexplained: 0 is a perfect reconstruction, 1 no better "
        "than the mean activation. L0: active latents a token. Dead: latents that fired on no "
        "token of the last part of the training."
    )


def _by_phase(report: dict[int, dict[str, PhaseFigures]]) -> None:
    phases = [name for name in layer_plots.PHASE_STYLES if any(name in f for f in report.values())]
    recovered = {
        phase: {
            layer: share
            for layer, figures in report.items()
            if phase in figures and (share := figures[phase].loss_recovered) is not None
        }
        for phase in phases
    }
    drawing = layer_plots.recovered_figure(recovered, one_based=links.one_based())
    figure(drawing, "figure-recovered")
    st.caption(
        "With the SAE's reconstruction in the layer's place. Left out where even zeros in its "
        "place do not raise the loss by two standard errors: there is nothing to recover."
    )
    rows = [
        _phase_row(layer, phase, figures[phase])
        for layer, figures in sorted(report.items())
        for phase in (*phases, "all")
        if phase in figures
    ]
    table(rows, "quality_by_phase", "Table by phase")


def _phase_row(layer: int, phase: str, figures: PhaseFigures) -> dict[str, Any]:
    change, error = figures.loss_change, figures.loss_change_se
    ci = student_interval(change, error, figures.documents - 1)
    return {
        **layer_columns(layer),
        "phase": phase,
        "tokens": figures.tokens,
        "documents": figures.documents,
        "FVU": figures.fvu,
        "L0": figures.l0,
        "dead share": figures.dead_share,
        **share_columns("loss change", "nats", change, ci, scale=1),
        "loss recovered": figures.loss_recovered,
    }
