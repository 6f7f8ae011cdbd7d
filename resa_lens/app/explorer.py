"""The feature explorer's entry: the workspace, the settings that all pages share, and the pages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module

import streamlit as st

from resa_lens.app import data, links, places, widgets
from resa_lens.app.links import OVERVIEW, PAGES
from resa_lens.artifacts.listing import Listing
from resa_lens.errors import BadInputError

# Without one of ours the browser would fetch the page's icon from a server on the internet.
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><circle cx="13" cy="13" r="9" '
    'fill="none" stroke="#0072B2" stroke-width="4"/><path d="M20 20l9 9" stroke="#E69F00" '
    'stroke-width="5" stroke-linecap="round"/></svg>'
)


def main(first: str = OVERVIEW) -> None:
    """Draw the app; streamlit calls it again at every click.  The workspace is never written.

    Args:
        first: the page that opens where the address names none.
    """
    st.set_page_config(page_title="resa-lens", page_icon=_ICON, layout="wide")
    # Also where the app is started without the options of apps/.streamlit and `resa-lens app`.
    st.set_option("client.showErrorDetails", "none")
    with _said():
        place = places.choose(places.argument(sys.argv[1:]))
        st.sidebar.text(f"workspace: {place.root}\n({place.why})")
        _pages(data.scan(str(place.root)), first)


def _pages(listing: Listing, first: str) -> None:
    with st.sidebar:
        # Bound to the address, as all that a view depends on: a link opens the same view again.
        st.toggle("Count layers from 1", **links.bound("one_based"))
        st.radio(
            "The camera above a figure saves it as",
            ("PNG", "SVG"),
            key="image",
            horizontal=True,
            persist_state="session",
        )
    pages = {
        path: st.Page(
            partial(_show, path, listing),
            title=title,
            icon=icon,
            url_path=path,
            default=path == first,
        )
        for path, (title, icon) in PAGES.items()
    }
    links.register(pages)
    st.navigation(list(pages.values())).run()


def _show(path: str, listing: Listing) -> None:
    """Draw a page; only the one that is shown is imported: the first one opens sooner."""
    page = import_module(f"resa_lens.app.{path}.page")
    links.about(PAGES[path][0])
    st.title(PAGES[path][0], anchor=False)
    page.show(listing)


@contextmanager
def _said() -> Iterator[None]:
    """Say on the page what stops it.

    What a user can cause is a problem with its remedy.  Anything else is an error of ours: it goes
    on to streamlit, which writes its traceback to the terminal and none to the page.
    """
    try:
        yield
    except BadInputError as error:
        widgets.problem(str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            widgets.problem(
                f"{error.filename} cannot be read: {error.strerror}. A run may be writing there, "
                "or it was removed; reload the page."
            )
            return
        with st.container(border=True):
            st.badge("an error of resa-lens", icon=":material/bug_report:", color="red")
            st.text(
                "The rest of this page cannot be drawn. The terminal in which the app runs has the "
                "details; please report them with the address of this page and what `resa-lens "
                "doctor` prints."
            )
        raise
