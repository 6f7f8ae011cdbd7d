"""The texts of this session beside one another: prompts, interventions, and what fires in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
from numpy.typing import NDArray

from resa_lens.app import links
from resa_lens.app.lab import data as lab_data
from resa_lens.app.widgets import paged, table
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.listing import Listing
from resa_lens.figures import tokens
from resa_lens.models.hookpoints import describe_layer

MOST = 8
"""Texts that are kept, the newest ones."""
DIFFERING = 20
"""Features listed that differ most between two texts."""
Mean = NDArray[np.float64]
"""[latents]: of a layer's features over the tokens of a text."""
_KEPT, _ROWS, _PAIR, _PAGES = "lab-texts", "lab-differing", "lab-pair", "differing_page"


@dataclass(frozen=True)
class Text:
    """What a model wrote after a prompt, changed or not."""

    name: str
    model: str
    document: dict[str, Any]
    answer: str
    """In a line, and whether it is right."""


def note(request: Mapping[str, Any], document: dict[str, Any], change: str = "") -> None:
    """Keep a text, once.

    Args:
        request: keys `model`, `text` and `question`.
        document: what came of it.
        change: what was done to the model meanwhile, in words.
    """
    prompt = " ".join(tokens.plain(str(request["text"])).split())
    model = str(request["model"])
    name = ", ".join(filter(None, (f"{prompt[:60]} · {tokens.plain(model[-40:])}", change)))
    answer = lab_data.answer_line(document, request["question"])
    kept: list[Text] = st.session_state.setdefault(_KEPT, [])
    if all((text.name, text.document["ids"]) != (name, document["ids"]) for text in kept):
        kept.append(Text(name, model, document, answer))
        del kept[:-MOST]


def show(listing: Listing, saes: Artifact, coloured: Mapping[int, Sequence[int]]) -> None:
    """Draw the texts that were kept, two of them side by side, and the features that tell them.

    Args:
        listing: the workspace.
        saes: the SAEs.
        coloured: what the text above is coloured by: {layer: features}; one layer is compared.
    """
    kept: list[Text] = st.session_state.get(_KEPT, [])
    if len(kept) < 2:
        return
    st.subheader("Texts of this session", anchor=False)
    rows = [
        {
            "number": number,
            "text": text.name,
            "answer": text.answer,
            "tokens written": len(text.document["ids"]) - text.document["prompt_tokens"],
        }
        for number, text in enumerate(kept, 1)
    ]
    table(rows, "lab_texts")
    numbers = list(range(1, len(kept) + 1))
    # Of a name of its own for each new text: it is among the two that are shown.
    key = f"lab-two-{rows[-1]['text']}"
    chosen = st.multiselect(
        "Two of them, side by side", numbers, default=numbers[-2:], max_selections=2,
        format_func=lambda number: f"{number}: {kept[number - 1].name}", key=key,
    )  # fmt: skip
    if len(chosen) < 2 or len(coloured) != 1:
        st.caption("Choose two texts, and colour by one feature, to see what tells them apart.")
        return
    (layer, (feature, *_)), *_ = coloured.items()
    place = lab_data.place(listing, saes)
    pair = [place, layer, *(kept[number - 1] for number in chosen)]
    if st.session_state.get(_PAIR, pair) != pair:
        links.first_page(_PAGES)
    st.session_state[_PAIR] = pair
    means: list[Mean] = []
    for column, number in zip(st.columns(2), chosen, strict=True):
        with column.container(border=True):
            mean = _text(kept[number - 1], number, place, layer, feature)
            means += [] if mean is None else [mean]
    if len(means) == len(chosen):
        left, right = means
        _differing(left, right, chosen, describe_layer(layer, saes.results.n_layers))


def _text(text: Text, number: int, place: dict[str, str], layer: int, feature: int) -> Mean | None:
    """Draw a text coloured by a feature; return the mean activation of the layer's features."""
    document, ids = text.document, text.document["ids"]
    request = {"model": text.model, "saes": place, "ids": ids, "layer": layer}
    st.text(f"{number}: {text.answer}")
    result = lab_data.follow("layer", request, f"text-{number}")
    if result is None:
        return None
    acts = lab_data.acts(result)
    own, _ = lab_data.by_token(acts, feature, len(ids))
    st.html(tokens.coloured(document["tokens"], own.tolist(), phases=document["phases"]))
    return np.bincount(acts["feature"], acts["value"], result["size"]) / len(ids)


def _differing(left: Mean, right: Mean, chosen: Sequence[int], where: str) -> None:
    order = np.argsort(-np.abs(left - right), kind="stable")
    order = order[left[order] != right[order]]
    if not order.size:
        st.text(f"{where}: every feature has the same mean in both.")
        return
    st.text(f"{where}: features whose mean over the tokens differs most")
    order = order[paged(order.size, DIFFERING, _PAGES)]
    first, second = (f"mean in {number}" for number in chosen)
    frame = pd.DataFrame({"feature": order, first: left[order], second: right[order]})

    def picked(place: int) -> None:
        st.session_state["feature"] = int(order[place])

    table(
        frame, "lab_differing", key=_ROWS, picked=picked, selection_mode="single-row",
        alt="Features that differ between two texts",
    )  # fmt: skip
    st.caption(
        "A row that is chosen colours the texts. The model as it is reads them, also what it wrote "
        "under a change. Two texts are an anecdote, not a test."
    )
