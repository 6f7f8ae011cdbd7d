"""What the address holds: the pages, and the widgets whose state a link opens again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

OVERVIEW, LAYERS, FEATURES, LAB, SCORES = "overview", "layers", "features", "lab", "scores"

BOUND: dict[str, Any] = {"bind": "query-params", "persist_state": "session"}
"""Of a widget with a key: its value stands in the address, and stays when the page is left."""

_REGISTERED = "registered-pages"


def register(pages: Mapping[str, Any]) -> None:
    """Remember the session's pages, so that any page can link to any other."""
    st.session_state[_REGISTERED] = dict(pages)


def to(page: str, label: str, *, icon: str | None = None, **parameters: str | int) -> None:
    """Draw a link to a page of the app.

    Args:
        page: its path, for example `FEATURES`.
        label: what is shown.
        icon: beside it.
        parameters: the address' query: keys of the page's bound widgets.
    """
    held = {key: str(value) for key, value in {**_kept(), **parameters}.items()}
    st.page_link(st.session_state[_REGISTERED][page], label=label, icon=icon, query_params=held)


def go(page: str, **parameters: str | int) -> None:
    """Open a page of the app now."""
    held = {key: str(value) for key, value in {**_kept(), **parameters}.items()}
    st.switch_page(st.session_state[_REGISTERED][page], query_params=held)


def _kept() -> dict[str, str]:
    """What every page of the app understands: the workspace and the numbering."""
    return {key: st.query_params[key] for key in ("place", "one_based") if key in st.query_params}


def one_based() -> bool:
    """Return whether layers are shown counted from 1."""
    return bool(st.session_state.get("one_based", False))
