"""The feature explorer's entry: the workspace, the settings that all pages share, and the pages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

import streamlit as st

from resa_lens.app import data, links, places, widgets
from resa_lens.app.data import Listing
from resa_lens.app.links import FEATURES, LAB, LAYERS, OVERVIEW, SCORES
from resa_lens.errors import BadInputError

PAGES: dict[str, tuple[str, str]] = {
    OVERVIEW: ("Overview", ":material/account_tree:"),
    LAYERS: ("Layers", ":material/layers:"),
    FEATURES: ("Features", ":material/grid_view:"),
    LAB: ("Prompt lab", ":material/science:"),
    SCORES: ("Scores", ":material/query_stats:"),
}
"""Title and icon by path; the page is `show(listing)` of the module `<path>_page`."""


def main(first: str = OVERVIEW) -> None:
    """Draw the app; streamlit calls it again at every click.  The workspace is never written.

    Args:
        first: the page that opens where the address names none.
    """
    st.set_page_config(page_title="resa-lens", layout="wide")
    try:
        place = places.choose(places.argument(sys.argv[1:]))
        listing = data.scan(str(place.root))
    except BadInputError as error:
        widgets.problem(str(error))
        return
    with st.sidebar:
        st.text(f"workspace: {listing.root}\n({place.why})")
        # Bound to the address, as all that a view depends on: a link opens the same view again.
        st.toggle("Count layers from 1", key="one_based", **links.BOUND)
        st.radio(
            "The camera above a figure saves it as",
            ("PNG", "SVG"),
            key="image",
            horizontal=True,
            persist_state="session",
        )
    pages = {
        path: st.Page(
            _page(path, listing), title=title, icon=icon, url_path=path, default=path == first
        )
        for path, (title, icon) in PAGES.items()
    }
    links.register(pages)
    st.navigation(list(pages.values())).run()


def _page(path: str, listing: Listing) -> Callable[[], None]:
    def show() -> None:
        # Only the page that is shown is imported: the first one opens sooner.
        page = import_module(f"resa_lens.app.{path}_page")
        st.title(PAGES[path][0], anchor=False)
        page.show(listing)

    return show
