"""Which workspace the app opens, and why."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from resa_lens.app import links
from resa_lens.resources import data_path
from resa_lens.workspace import DEFAULT_FOLDER

BUNDLED = "workspace"
"""Below data/: what `data/make_workspace.sh` made."""


@dataclass(frozen=True)
class Place:
    """A workspace that can be opened."""

    root: Path
    why: str
    """How it came to be the one."""


def argument(arguments: Sequence[str]) -> str | None:
    """Return the folder of `streamlit run apps/feature_explorer.py -- --workspace FOLDER`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workspace", nargs="?")
    return parser.parse_known_args(list(arguments))[0].workspace


def found(given: str | None) -> dict[str, Place]:
    """Return the workspaces at hand by name, the one to open first.

    One that was given is opened whatever it holds: that it is missing or empty is said there.
    """
    asked = given or os.environ.get("RESA_LENS_WORKSPACE")
    held = {"bundled": Place(data_path(BUNDLED), "a small one that ships with resa-lens")}
    if asked:
        return {"given": Place(Path(asked), "as given"), **held}
    if Path(DEFAULT_FOLDER).is_dir():
        return {"here": Place(Path(DEFAULT_FOLDER), "found where the app was started"), **held}
    return held


def choose(given: str | None) -> Place:
    """Choose among them in the side bar."""
    held = found(given)
    if len(held) == 1:
        return next(iter(held.values()))
    with st.sidebar:
        name = st.radio(
            "Open",
            list(held),
            format_func=lambda name: "bundled example" if name == "bundled" else "your workspace",
            key="place",
            **links.BOUND,
        )
    return held[str(name)]
