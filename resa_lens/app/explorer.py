"""The feature explorer's entry: the workspace, and the pages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import streamlit as st

from resa_lens.app import data, layers_page, widgets
from resa_lens.errors import BadInputError


def workspace_argument(arguments: Sequence[str]) -> str | None:
    """Return the folder of `streamlit run apps/feature_explorer.py -- --workspace FOLDER`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workspace", nargs="?")
    return parser.parse_known_args(list(arguments))[0].workspace


def main() -> None:
    """Draw the app; streamlit calls it again at every click.  Nothing is ever written."""
    st.set_page_config(page_title="resa-lens", layout="wide")
    try:
        listing = data.scan(workspace_argument(sys.argv[1:]))
    except BadInputError as error:
        widgets.problem(str(error))
        return
    # A page is a function of the listing and a line here; with the second one the navigation
    # shows itself.
    layers = st.Page(
        lambda: layers_page.show(listing),
        title="Layers",
        url_path="layers",
        default=True,
    )
    st.navigation([layers]).run()
