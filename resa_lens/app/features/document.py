"""A whole document of the activity run, coloured by a feature, and what else fires at a token."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from resa_lens.app.features.data import Source, document_of
from resa_lens.app.lab import data as lab_data
from resa_lens.app.lab import token as lab_token
from resa_lens.app.tokens import clickable
from resa_lens.app.widgets import part
from resa_lens.artifacts.listing import Listing
from resa_lens.errors import BadInputError
from resa_lens.figures import tokens
from resa_lens.texts.prompts import PHASES

Go = Callable[..., None]
"""Opens the page of a layer's feature, of another run where a third argument names it; a callback.
"""
_CHOSEN = "document-place"


def choose(source: Source, number: int, place: int) -> None:
    """Show a document of a run and look at one of its tokens; a callback."""
    st.session_state[_CHOSEN] = (source.key, number, place)


def show(listing: Listing, source: Source, layer: int, feature: int, go: Go) -> None:
    """Draw the document that was chosen, with the model run over it in the worker."""
    key, number, place = st.session_state.get(_CHOSEN, ("", 0, 0))
    if key != source.key:
        return
    with part(), st.container(border=True):
        ids, phases = document_of(source, number)
        saes = listing.at(source.saes)
        if saes is None:
            raise BadInputError(f"the SAEs {source.saes} are not in this workspace any more")
        st.button("Close", icon=":material/close:", key="document-close", on_click=_close)
        request = {"model": source.model, "saes": lab_data.place(listing, saes), "ids": ids}
        result = lab_data.follow("layer", {**request, "layer": layer}, "document")
        if result is None:
            return
        values, active = lab_data.by_token(lab_data.acts(result), feature, len(ids))
        st.text(f"Document {number}, whole: active at {active} of {len(ids)} tokens")
        markup = tokens.coloured(result["tokens"], values.tolist(), phases=phases, peak=place)
        clickable(markup, "document-text", lambda at: choose(source, number, at), "Document")
        prompt = "".join(
            token
            for token, phase in zip(result["tokens"], phases, strict=True)
            if phase == PHASES[0]
        )
        off = lab_token.linked(source.model, prompt, raw=True)

        def page(at: int, other: int) -> None:
            # No link: one that leads to the page it stands on leaves the address as it was.
            st.button(
                lab_token.name(at, other),
                key=f"document-{at}-{other}",
                type="tertiary",
                on_click=go,
                args=(at, other),
            )

        document = {"ids": ids, "tokens": result["tokens"], "phases": phases}
        lab_token.show(
            listing, saes, source.model, document, place, off=off, page=page, slot="document-token"
        )


def _close() -> None:
    st.session_state.pop(_CHOSEN, None)
    for slot in ("document", "document-token"):
        lab_data.forget(slot)
