"""What a page says that has nothing to show, and the command that makes something."""

from __future__ import annotations

import streamlit as st

from resa_lens.app.widgets import problem, table
from resa_lens.artifacts.commands import line, workspace_option
from resa_lens.artifacts.listing import Listing


def lacking(listing: Listing, what: str, *words: str) -> None:
    """Say what a page needs and does not find.

    Args:
        listing: the workspace.
        what: is not there, as the start of a sentence.
        words: of the command that makes it.
    """
    if not listing.artifacts:
        nothing(listing)
        return
    kinds = ", ".join(sorted({a.manifest.kind for a in listing.artifacts}))
    problem(
        f"{what} in {listing.root} yet; it holds: {kinds}. This command makes what is missing:",
        line(*words, *workspace_option(listing)),
    )
    if listing.under_way:
        st.text(f"{listing.unfinished} unfinished folder(s): a run is at work there or was killed.")
        unfinished(listing)


def nothing(listing: Listing) -> None:
    """Say why there is nothing to show, and which command makes something."""
    demo = line("demo", *workspace_option(listing))
    if not listing.exists:
        text = (
            f"There is no workspace at {listing.root}. Check the path, or make one there; this "
            "command takes a few minutes:"
        )
    elif listing.under_way:
        text = (
            f"Nothing in {listing.root} is complete yet; {listing.unfinished} unfinished "
            "folder(s), listed below. Reload this page when the run is done, or begin with:"
        )
    elif listing.others:
        names = ", ".join(listing.others[:4]) + (", ..." if len(listing.others) > 4 else "")
        text = (
            f"{listing.root} is not a workspace of resa-lens: it holds {names} and no artifact. "
            "Give the folder of another one, or make one elsewhere:"
        )
        demo = line("demo", "--workspace", "resa-workspace")
    elif listing.problems:
        text = (
            f"Nothing in {listing.root} can be read by this version, as said above. What is there "
            "is left as it is; this command makes another workspace:"
        )
        demo = line("demo", "--workspace", "resa-workspace")
    else:
        text = f"{listing.root} is empty. This command fills it in a few minutes:"
    problem(text, demo)
    if listing.under_way:
        unfinished(listing)


def unfinished(listing: Listing) -> None:
    """List the folders that a run is filling, or left when it was killed."""
    rows = [{"folder": u.relative, "state": u.state} for u in listing.under_way]
    table(rows, "unfinished")
