"""The features of all layers at one token, strongest first: open one, or switch it off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import streamlit as st

from resa_lens.app import data, links
from resa_lens.app.lab import data as lab_data
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.listing import Listing
from resa_lens.figures import tokens

_CELL = 300  # pixels
STRONGEST = 12
"""Features named at a token."""
Way = Callable[[int, int], None]
"""Draws a way to do something with a layer's feature."""


def show(
    listing: Listing,
    saes: Artifact,
    model: str,
    document: dict[str, Any],
    place: int,
    *,
    off: Way,
    page: Way | None = None,
    slot: str = "token",
) -> None:
    """Draw the features at a token, each with a link to its page.

    Args:
        listing: the workspace.
        saes: SAEs of the model.
        model: its name, as the worker takes it.
        document: keys `ids`, `tokens` and `phases`.
        place: number of the token.
        off: draws beside each how it is switched off.
        page: draws what opens its page; a link by default.
        slot: of the request to the worker.
    """
    ids: Sequence[int] = document["ids"][: place + 1]
    request = {"model": model, "saes": lab_data.place(listing, saes), "ids": list(ids)}
    token = tokens.visible(document["tokens"][place])
    st.text(f"At token {place} {token} ({document['phases'][place]}), all layers:")
    result = lab_data.follow("token", {**request, "most": STRONGEST}, slot)
    if result is None:
        return
    shift, page = int(links.one_based()), page or _link(listing, saes)
    grid = st.container(horizontal=True, gap="small")
    for row in result["features"]:
        cell = grid.container(
            horizontal=True, gap="small", vertical_alignment="center", width=_CELL
        )
        with cell:
            page(row["layer"], row["feature"])
            st.text(f"{row['value']:.3g} · {100 * row['share']:.2g} %")
            off(row["layer"], row["feature"])
    if not result["features"]:
        st.text("No feature is active there.")
    st.caption(
        f"Layer:feature (layers counted from {shift}), activation, and its share of the sum of all "
        f"activations of its layer there; the {STRONGEST} largest shares."
    )


def name(layer: int, feature: int) -> str:
    """Return a feature as the page counts layers."""
    return f"{layer + int(links.one_based())}:{feature}"


def _link(listing: Listing, saes: Artifact) -> Way:
    address = data.features_of(listing, saes.relative)

    def page(layer: int, feature: int) -> None:
        # In one: streamlit leaves out of a link what the page with the link binds itself.
        show = f"{layer}:{feature}"
        links.to(links.FEATURES, name(layer, feature), icon="", show=show, **address)

    return page


def linked(model: str, prompt: str, *, raw: bool) -> Way:
    """Return what links to the lab, where a feature is switched off after the prompt."""

    def off(layer: int, feature: int) -> None:
        change = f"{layer}:{feature}"
        links.to_lab("Switch off", prompt, raw=raw, host=model, change=change)

    return off
