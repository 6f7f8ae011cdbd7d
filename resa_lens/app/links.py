"""What the address holds: the pages, and the widgets whose state a link opens again."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

import streamlit as st

OVERVIEW, LAYERS, FEATURES, LAB, SCORES = "overview", "layers", "features", "lab", "scores"
EXPERTS = "experts"
WORKSPACE = "workspace"
"""In the address: a folder that is opened in place of the one that the app was started with."""
PAGES: dict[str, tuple[str, str]] = {
    OVERVIEW: ("Overview", ":material/account_tree:"),
    LAYERS: ("Layers", ":material/layers:"),
    FEATURES: ("Features", ":material/grid_view:"),
    LAB: ("Prompt lab", ":material/science:"),
    SCORES: ("Scores", ":material/query_stats:"),
    EXPERTS: ("Experts", ":material/hub:"),
}
"""Title and icon by path; the page is `show(listing)` of the module `resa_lens.app.<path>.page`."""

LONGEST_PROMPT = 4000
"""Characters of a prompt that a link to the lab holds."""
_REGISTERED, _SUBJECT = "registered-pages", "subject"


def register(pages: Mapping[str, Any]) -> None:
    """Remember the session's pages, so that any page can link to any other."""
    st.session_state[_REGISTERED] = dict(pages)


def to(page: str, label: str = "", *, icon: str | None = None, **parameters: str | int) -> None:
    """Draw a link to a page of the app.

    Args:
        page: its path, for example `FEATURES`.
        label: what is shown; the page's title by default.
        icon: beside it; the page's by default, none for "".
        parameters: the address' query: keys of the page's bound widgets.
    """
    query = {key: str(value) for key, value in {**common(), **parameters}.items()}
    title, own = PAGES[page]
    icon = own if icon is None else icon or None
    target = st.session_state[_REGISTERED][page]
    st.page_link(target, label=label or title, icon=icon, query_params=query)


def to_lab(label: str, prompt: str, *, raw: bool, **parameters: str) -> None:
    """Draw a link to a prompt in the lab; nothing where the address cannot hold it.

    Args:
        label: what is shown.
        prompt: the question, or with `raw` the whole prompt.
        raw: whether the model reads it as it is.
        parameters: what else the address holds.
    """
    if len(prompt) <= LONGEST_PROMPT:
        query = {"prompt": prompt, **({"raw": "true"} if raw else {}), **parameters}
        to(LAB, label, icon=None, **query)


def common() -> dict[str, str]:
    """Return what every page of the app understands: the workspace and the numbering."""
    keys = (WORKSPACE, "place", "one_based")
    return {key: st.query_params[key] for key in keys if key in st.query_params}


def address(**parameters: str | int) -> str:
    """Return the address of the page that is shown, with the workspace and this query alone.

    Args:
        parameters: keys and values; colons and commas in them stay as they are.
    """
    query = urlencode({**common(), **parameters}, safe=":,")
    return urlsplit(st.context.url or "")._replace(query=query, fragment="").geturl()


def about(title: str, *subject: str) -> None:
    """Say what the page is about, in the browser's tab and in the names of saved figures.

    Args:
        title: of the page, or what it shows.
        subject: what that belongs to: a model, a layer.
    """
    st.set_page_config(page_title=" · ".join((title, *subject, "resa-lens")))
    st.session_state[_SUBJECT] = re.sub(r"[^\w.]+", "-", "-".join((*subject, title))).strip("-")


def file_name(name: str) -> str:
    """Return the name of a file of what is shown, without its ending."""
    return f"{st.session_state.get(_SUBJECT, 'resa-lens')}-{name}"


def check(key: str, options: Collection[str], what: str) -> str | None:
    """Return what is wrong with an address that names none of the options."""
    value = st.query_params.get(key)
    if value is None or value in options:
        return None
    return f"The address names {what} {value!r:.80}, which is not in this workspace."


def bound(key: str, pages: str = "") -> dict[str, Any]:
    """Return a widget's key, so that its value stands in the address and outlives its page.

    Args:
        key: of the widget and in the address.
        pages: key of `widgets.paged`, of a table that the widget filters: a change goes back to its
            first page.
    """
    how = {"key": key, "bind": "query-params", "persist_state": "session"}
    return {**how, "on_change": first_page, "args": (pages,)} if pages else how


def first_page(key: str) -> None:
    """Go back to the first page of a table; a callback."""
    if st.session_state.get(key, 1) != 1:
        st.session_state[key] = 1


def choice(
    place: Any, label: str, key: str, names: Mapping[str, str], *, optional: str = "", **how: Any
) -> str | None:
    """Draw a choice that the page shows by name and the address holds by key.

    Args:
        place: the container, or streamlit itself.
        label: of the choice.
        key: of the widget and in the address.
        names: {key: name}; the first is chosen where nothing else is.
        optional: what stands there while nothing is chosen; empty where something always is.
        how: further arguments of `st.selectbox`.
    """
    address = st.query_params.get(key)
    if address in names:
        st.session_state[key] = address
    elif st.session_state.get(key) not in names:
        st.session_state.pop(key, None)
    if optional:
        how = {"index": None, "placeholder": optional, **how}
    value = place.selectbox(
        label, list(names), format_func=names.__getitem__, key=key, on_change=_to_address,
        args=(key,), persist_state="session", **how,
    )  # fmt: skip
    if value != address and (address is not None or value not in (None, next(iter(names)))):
        _to_address(key)
    return value


def choose(key: str, value: str) -> None:
    """Choose something else than what a `choice` shows, before the page runs again."""
    st.session_state[key] = value
    _to_address(key)


def _to_address(key: str) -> None:
    if st.session_state.get(key) is None:
        st.query_params.pop(key, None)
    else:
        st.query_params[key] = str(st.session_state[key])


def one_based() -> bool:
    """Return whether layers are shown counted from 1."""
    return bool(st.session_state.get("one_based", False))
