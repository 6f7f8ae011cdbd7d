"""Which workspace the app opens, and why."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resa_lens.errors import BadInputError
from resa_lens.resources import data_path
from resa_lens.workspace import DEFAULT_FOLDER

BUNDLED = "workspace"
"""Below data/: what `data/make_workspace.sh` made."""
VARIABLE = "RESA_LENS_WORKSPACE"
NAMES = {"given": "your workspace", "here": "your workspace", "bundled": "bundled example"}


@dataclass(frozen=True)
class Place:
    """A workspace that can be opened."""

    root: Path
    why: str
    """How it came to be the one."""


def argument(arguments: Sequence[str]) -> str | None:
    """Return the folder of `streamlit run apps/feature_explorer.py -- --workspace FOLDER`.

    Raises:
        BadInputError: --workspace without a folder.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workspace", nargs="?", const="")
    asked = parser.parse_known_args(list(arguments))[0].workspace
    if asked == "":
        raise BadInputError("--workspace names no folder; write --workspace FOLDER")
    return asked


def found(given: str | None) -> dict[str, Place]:
    """Return the workspaces at hand by name, the one to open first.

    One that was given is opened whatever it holds: that it is missing or empty is said there.

    Raises:
        BadInputError: none is at hand, and this installation lacks the bundled one.
    """
    held = {}
    if asked := given or os.environ.get(VARIABLE):
        why = "given with --workspace" if given else f"named by {VARIABLE}"
        held["given"] = Place(resolved(asked), why)
    elif Path(DEFAULT_FOLDER).is_dir():
        held["here"] = Place(resolved(DEFAULT_FOLDER), f"./{DEFAULT_FOLDER} is here")
    try:
        root = data_path(BUNDLED).resolve()
    except BadInputError:
        if held:
            return held
        raise
    if not any(place.root == root for place in held.values()):
        why = (
            f"the example that ships with resa-lens: no other was given, and no ./{DEFAULT_FOLDER}"
        )
        held["bundled"] = Place(root, "the example that ships with resa-lens" if held else why)
    return held


def resolved(folder: str) -> Path:
    """Return the whole path of a folder that a person named.

    Raises:
        BadInputError: no path of this machine.
    """
    try:
        return Path(folder).expanduser().resolve()
    # No permission, a circle of links, an unknown user, a character that no path can have.
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInputError(
            f"folder {folder!r} cannot be reached: {error}; name another"
        ) from error


def choose(given: str | None) -> Place:
    """Choose among them in the side bar.

    Raises:
        BadInputError: see `found`.
    """
    # `resa-lens app` asks for `found` alone, before streamlit is started.
    import streamlit as st

    from resa_lens.app import links

    held = found(given)
    if len(held) == 1:
        return next(iter(held.values()))
    with st.sidebar:
        name = st.radio(
            "Open", list(held), format_func=NAMES.__getitem__, key="place", **links.BOUND
        )
    return held[str(name)]
