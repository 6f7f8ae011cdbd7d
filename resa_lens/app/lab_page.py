"""The page of lab."""

from __future__ import annotations

import streamlit as st

from resa_lens.app.data import Listing


def show(listing: Listing) -> None:
    """Draw the page."""
    st.text(f"{len(listing.artifacts)} artifacts")
