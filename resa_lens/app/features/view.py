"""One feature's page: what it is, what it answers to, whether it survived, what it does."""

from __future__ import annotations

from typing import Any

import streamlit as st

from resa_lens.app import links
from resa_lens.app.features import cards, evidence, examples, lens, notes
from resa_lens.app.features.data import (
    Activity,
    Source,
    activity,
    command,
    verdict_of,
)
from resa_lens.app.features.document import Go
from resa_lens.app.features.examples import PHASE_NAMES
from resa_lens.app.widgets import figure, missing, part, readable, table, verbatim
from resa_lens.artifacts.feature_tables import density_interval
from resa_lens.artifacts.listing import Listing
from resa_lens.errors import BadInputError
from resa_lens.features.words import DESCRIBED, REFUTED, STANDS, UNDETERMINED, WORDS
from resa_lens.figures import features as feature_plots
from resa_lens.figures import tokens
from resa_lens.models.hookpoints import describe_layer
from resa_lens.texts.prompts import PHASES

_GROUPS: dict[str, tuple[str, Any]] = {
    STANDS: (":material/check_circle:", "green"),
    DESCRIBED: (":material/label:", "blue"),
    REFUTED: (":material/cancel:", "red"),
    UNDETERMINED: (":material/help:", "gray"),
}
BADGES: dict[str, tuple[str, Any]] = {name: _GROUPS[word.group] for name, word in WORDS.items()}


def show(listing: Listing, source: Source, layer: int, feature: int, *, go: Go) -> None:
    """Draw the page of a feature; a part that cannot be read leaves the others.

    Args:
        listing: the workspace.
        source: the runs.
        layer: 0-based.
        feature: of the layer's SAE.
        go: opens another feature's page.
    """
    links.about(f"feature {feature}", source.model, f"layer {layer}")
    figures = readable(activity, source, layer, feature)
    st.subheader(f"Feature {feature}, {describe_layer(layer, source.n_layers)}", anchor=False)
    if figures is None:
        _silent(listing, source, layer)
        _about(source, layer, feature, figures)
    else:
        with part("What it responds to"):
            _firing_tokens(listing, source, figures)
            examples.show(listing, source, layer, feature, figures, go)
        _about(source, layer, feature, figures)
        readable(_activations, figures, source)
        with part("What it raises and lowers"):
            lens.show(listing, source, figures)
    near = st.container()
    notes.box(source, layer, feature)
    evidence.show(listing, source, layer, feature)
    st.subheader("Link to this page", anchor=False)
    verbatim(links.address(run=source.key, layer=layer, feature=feature))
    # The rest of the page does not wait for decoders.
    with near, part("Neighbours and counterparts"):
        cards.show(listing, source, layer, feature, figures, go)


def _about(source: Source, layer: int, feature: int, figures: Activity | None) -> None:
    """What it was counted for and what became of that, and how often it fires."""
    st.subheader("Verdict and density", anchor=False)
    st.text(f"{tokens.plain(source.model)}, site {tokens.plain(source.site)}")
    readable(_verdict, source, layer, feature)
    if figures is None:
        return
    row, (low, high) = figures.row, density_interval(figures.row)
    most = max(PHASES, key=lambda phase: row[f"density_{phase}"])
    by_phase = ", ".join(
        f"{_percent(row[f'density_{phase}'])} of {PHASE_NAMES[phase]}" for phase in PHASES
    )
    st.text(
        f"Fires at {_percent(row['density'])} of all tokens (95 % over documents "
        f"{_percent(low)} to {_percent(high)}), in {row['documents_fired']:,} of "
        f"{source.documents:,} documents. Densest in {PHASE_NAMES[most]}: {by_phase}. "
        f"Where it fires its mean is {row['mean']:.3g}, its maximum {row['max']:.3g}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _verdict(source: Source, layer: int, feature: int) -> None:
    verdict = verdict_of(source, layer, feature)
    if verdict and verdict.verdict in BADGES:
        icon, colour = BADGES[verdict.verdict]
        st.badge(verdict.verdict, icon=icon, color=colour)
        word = WORDS[verdict.verdict]
        # Older verdicts have the same words, but were given by other rules.
        if verdict.depends_on:
            st.text(f"{word.group}: {word.meaning}")
        st.text(f"Why: {tokens.plain(verdict.reason)}")
        if word.group == STANDS and source.verdicts:
            st.caption("What stands was not refuted, no more. Of all that were counted:")
            st.text(tokens.plain(source.verdicts.results.summary.reason))
    elif verdict:
        st.text(tokens.plain(f"Verdict: {verdict.verdict}\nWhy: {verdict.reason}"))
    elif source.counted().rules_of(layer, feature):
        st.badge("counted, not tested", icon=":material/help:", color="blue")
    else:
        st.badge("not counted by any rule", color="gray")


def _silent(listing: Listing, source: Source, layer: int) -> None:
    """Why there is no activity to show."""
    if source.activity is None or layer not in source.latents:
        what = "This layer was not part of the activity run"
        missing(
            f"{what if source.activity else 'Activity was not measured here'}; this command "
            "measures it:",
            command(listing, source, "activity", "--layers", str(layer)),
        )
        return
    st.text(
        f"It fired at none of the {sum(source.tokens.values()):,} tokens of "
        f"{source.documents:,} documents (or its row could not be read): there is no histogram and "
        "no example."
    )


def _activations(figures: Activity, source: Source) -> None:
    row = figures.row
    counts = row["histogram"] or []
    if len(counts) + 1 != len(figures.edges):
        raise BadInputError(
            f"the histogram has {len(counts)} bins and {len(figures.edges)} edges; --force of "
            "resa-lens activity makes the tables anew"
        )
    left, right = st.columns(2)
    with left:
        figure(feature_plots.activation_figure(figures.edges, counts), "figure-activations")
    with right:
        densities = {phase: row[f"density_{phase}"] for phase in PHASES}
        drawing = feature_plots.phases_figure(
            densities, row["density"], density_interval(row), source.documents
        )
        figure(drawing, "figure-phases")
    rows = [
        {
            "phase": phase,
            "tokens": source.tokens.get(phase),
            "fires at": row[f"tokens_fired_{phase}"],
            "density, %": 100 * row[f"density_{phase}"],
            "mean where it fires": row[f"mean_{phase}"],
            "maximum": row[f"max_{phase}"],
        }
        for phase in PHASES
    ]
    table(rows, "density_by_phase", "Table of densities")


def _firing_tokens(listing: Listing, source: Source, figures: Activity) -> None:
    """The tokens at which it fires most often, as chips, and as a table with their means."""
    row = figures.row
    words = [token or "" for token in row.get("fires_on") or []]
    shares = [100 * (share or 0.0) for share in row.get("fires_on_share") or []]
    if not words:
        missing(
            "This activity run is of an older version: it kept the strongest examples alone. This "
            "command measures anew:",
            command(listing, source, "activity"),
        )
        return
    st.caption(
        f"Tokens, with their share of its {row['tokens_fired']:,} firings in percent; ␣ is a space."
    )
    st.html(tokens.chips(words, shares, form=".3g"))
    rows = [
        {"token": tokens.visible(word), "share of firings, %": share, "mean there": mean}
        for word, share, mean in zip(words, shares, row["fires_on_mean"], strict=True)
    ]
    table(rows, "firing_tokens", "Table of tokens")
