"""What a feature's direction says to the vocabulary: the tokens at both ends, and all by value."""

from __future__ import annotations

import math

import streamlit as st

from resa_lens.app.features.data import Activity, Source, command, same_activity
from resa_lens.app.widgets import figure, missing, table
from resa_lens.artifacts.feature_tables import LENS_HISTOGRAM
from resa_lens.artifacts.listing import Listing
from resa_lens.errors import BadInputError
from resa_lens.figures import features as feature_plots
from resa_lens.figures import tokens


def show(listing: Listing, source: Source, figures: Activity) -> None:
    """Draw the logit lens of a feature: the tokens it moves most, and the histogram of all.

    Raises:
        BadInputError: the histogram is not one of logits.
    """
    row = figures.row
    if row["top_tokens"] is None:
        options = ("--show", f"{row['layer']}:{row['feature']}", *same_activity(source))
        missing(
            "For SAEs this wide the tables keep no logit lens; this command prints it:",
            command(listing, source, "activity", *options),
        )
        return
    st.caption(
        "Logit lens: the feature's direction through the model's final norm and unembedding. ␣ is "
        "a space; the numbers are logits beside those of nothing."
    )
    listed = []
    for side, name in (("top", "Raises"), ("bottom", "Lowers")):
        words = [token or "" for token in row[f"{side}_tokens"] or []]
        logits = [value or 0.0 for value in row[f"{side}_logits"] or []]
        pairs = list(zip(words, logits, strict=False))
        st.caption(name)
        st.html(tokens.chips([word for word, _ in pairs], [value for _, value in pairs]))
        listed += [
            {"side": name.lower(), "token": tokens.visible(word), "logit": value}
            for word, value in pairs
        ]
    _histogram(listing, source, figures)
    if listed:
        table(listed, "logit_lens", "Table of the logit lens")


def _histogram(listing: Listing, source: Source, figures: Activity) -> None:
    row = figures.row
    counts = row.get(LENS_HISTOGRAM)
    if not counts:
        missing(
            "This activity run is of an older version: it kept no histogram of the whole "
            "vocabulary. This command measures anew:",
            command(listing, source, "activity", *same_activity(source)),
        )
        return
    # The bins go from the lowest logit to the highest, which stand first on their sides.
    low, high = ((row[f"{side}_logits"] or [None])[0] for side in ("bottom", "top"))
    ends = [value for value in (low, high) if value is not None and math.isfinite(value)]
    if len(ends) < 2 or ends[0] > ends[1] or any(count is None or count < 0 for count in counts):
        raise BadInputError(
            f"the logit lens' histogram goes from {low} to {high}, which is no range of logits; "
            "--force of resa-lens activity makes the tables anew"
        )
    figure(feature_plots.lens_figure(counts, ends[0], ends[1]), "figure-lens")
