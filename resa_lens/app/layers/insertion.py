"""What SAEs do when they are inserted and nothing is tuned, on the page "Layers"."""

from __future__ import annotations

import streamlit as st

from resa_lens.app import links
from resa_lens.app.widgets import choose, figure, layer_columns, table
from resa_lens.artifacts.kinds.insertion import Insertion, LayerInsertion
from resa_lens.artifacts.kinds.insertion import Results as InsertionResults
from resa_lens.artifacts.listing import Listing
from resa_lens.figures.scores import forest_figure
from resa_lens.models.hookpoints import describe_layer, list_layers


def show(listing: Listing, slug: str) -> None:
    """Draw the newest insertion test of a model, and choose among several."""
    tests = [test for test in listing.of(Insertion) if test.slug == slug]
    if not tests:
        return
    st.subheader("Inserted, nothing tuned", anchor=False)
    test = tests[0] if len(tests) == 1 else choose(st, "Test", "insertion", tests)
    results: InsertionResults = test.results
    rows = [(f"{list_layers([layer.layer], one_based=links.one_based())}, {arm}",
             figures.difference, figures.difference_ci)
            for layer in results.layers for arm, figures in layer.inserted.items()]  # fmt: skip
    subtitle = f"SAEs of {results.source} in {results.model}; 95 % intervals over questions"
    figure(forest_figure(rows, 0.0, "Change of accuracy", subtitle), "figure-insertion")
    for layer in results.layers:
        st.text(f"{describe_layer(layer.layer, results.n_layers)}: {layer.verdict}: {layer.reason}")
    cells = [_cells(layer) for layer in results.layers]
    table(cells, "insertion", "Table of the insertion test")
    st.caption(
        "Preset distil hands on what the SAE does when it is inserted. Where source and target are "
        "one model, an SAE can only cost."
    )


def _cells(layer: LayerInsertion) -> dict[str, object]:
    return {
        **layer_columns(layer.layer),
        "verdict": layer.verdict,
        "KL, tuning documents": layer.kl_tuning,
        "KL, thoughts": layer.kl_thoughts,
        **{f"FVU, {phase}": value for phase, value in layer.fvu.items()},
        **{f"{arm}, points": 100 * figures.difference for arm, figures in layer.inserted.items()},
        **{f"{name} ablation, nats": cost.loss for name, cost in layer.ablation.items()},
    }
