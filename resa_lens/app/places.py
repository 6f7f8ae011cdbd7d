"""Which workspace the app opens: the argument, and the choice in the side bar."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import streamlit as st

from resa_lens.app import links
from resa_lens.app.widgets import readable
from resa_lens.artifacts.places import Place, candidates
from resa_lens.errors import BadInputError
from resa_lens.resources import workspace_folder

NAMES = {"given": "your workspace", "here": "your workspace", "bundled": "bundled example"}


def argument(arguments: Sequence[str]) -> str | None:
    """Return the folder of `streamlit run apps/feature_explorer.py -- --workspace FOLDER`.

    Raises:
        BadInputError: --workspace without a folder.
    """
    folder, _ = split(arguments)
    if folder == "":
        raise BadInputError("--workspace names no folder; write --workspace FOLDER")
    return folder


def split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the folder of --workspace, "" where it names none, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workspace", nargs="?", const="")
    known, rest = parser.parse_known_args(list(arguments))
    return known.workspace, rest


def choose(folder: str | None) -> Place:
    """Choose a workspace in the side bar: a folder that is typed, or of those at hand."""
    if typed := _typed():
        return typed
    places = candidates(folder)
    if len(places) == 1:
        return next(iter(places.values()))
    with st.sidebar:
        name = st.radio("Open", list(places), format_func=NAMES.__getitem__, **links.bound("place"))
    return places[str(name)]


def _typed() -> Place | None:
    """The folder that a person opens, also by an address; nothing is written there."""
    with st.sidebar.popover("Open a folder", icon=":material/folder_open:"):
        text = st.text_input(
            "Workspace",
            placeholder="a folder on the machine that runs the app",
            help="Empty: the one that the app was started with",
            **links.bound(links.WORKSPACE),
        )
    root = readable(workspace_folder, text.strip()) if text and text.strip() else None
    return Place(root, "opened here") if root else None
