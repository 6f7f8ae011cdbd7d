"""A feature's neighbours and counterparts as cards: how near each is, and what chance gives."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from resa_lens.app import data, links
from resa_lens.app.features.data import Activity, Source, opened
from resa_lens.app.features.document import Go
from resa_lens.app.widgets import part
from resa_lens.artifacts.listing import Listing
from resa_lens.figures.features import similarity_card
from resa_lens.stages import neighbours
from resa_lens.stages.neighbours import Neighbour, Place, Profile, Ranking

_WIDTH = 171  # pixels of a card: four in a row on a desk, two on a phone


def _state(place: Place) -> tuple[object, ...]:
    both = place.own, place.other
    states = [data.state(where.file) if where.file else 0 for where in both]
    names = [(one.saes, one.layer, str(one.artifact and one.artifact.path)) for one in both]
    return place.group, *names, *states


@st.cache_resource(show_spinner=False, max_entries=500, hash_funcs={Place: _state})
def _ranking(place: Place, feature: int, known: tuple[tuple[int, float], ...]) -> Ranking:
    return neighbours.nearest(place, feature, known)


def show(
    listing: Listing, source: Source, layer: int, feature: int, figures: Activity | None, go: Go
) -> None:
    """Draw what is near a feature; a decoder that cannot be read leaves the others."""
    st.caption(
        "By the cosine of the decoder directions. The mark on each scale is chance: of as many "
        "random directions as there are, the best stays below it in 95 of 100 cases. Trained "
        "directions share a few dimensions, so a little above it is no match yet. "
        "Of recorded correlations it is the mean best where the tokens are shifted."
    )
    row = figures.row if figures else {}
    pairs = zip(row.get("nearest") or (), row.get("nearest_cosines") or (), strict=False)
    known = tuple(pair for pair in pairs if None not in pair)
    places, left_out = neighbours.places(listing, source.saes, layer)
    unread: list[str] = []
    for group in (neighbours.SAME, neighbours.ADJACENT, neighbours.OTHERS):
        mine = [place for place in places if place.group == group]
        cards: list[Neighbour] = []
        if mine:
            st.markdown(f"**In {group}**")
        for place in mine:
            with part():
                ranking = _ranking(place, feature, known if group == neighbours.SAME else ())
                near, lines = neighbours.neighbours(listing, place, ranking, opened, source.key)
                cards, unread = cards + near, unread + lines
                if ranking.note:
                    st.text(f"What chance gives is not known: {ranking.note}")
        _row(group, cards, go)
    if left_out:
        st.caption(f"{left_out} more SAEs of this layer are left out.")
    cards, notes = neighbours.recorded(listing, source.saes, layer, feature, opened, source.key)
    if cards or notes:
        st.markdown("**In recorded matches**")
    _row("recorded", cards, go)
    for note in dict.fromkeys((*unread, *notes)):
        st.text(note)


def _row(group: str, cards: Sequence[Neighbour], go: Go) -> None:
    with st.container(horizontal=True, gap="xsmall"):
        for number, card in enumerate(cards):
            _card(card, f"near-{group}-{number}", go)


def _card(card: Neighbour, key: str, go: Go) -> None:
    name = ", ".join(filter(None, (card.name, f"layer {card.layer + int(links.one_based())}")))
    alike = [(one.measure, one.value, one.chance) for one in card.similarities]
    profile = card.profile or Profile((), (), ())
    with st.container(border=True, width=_WIDTH, gap="xxsmall"):
        # No links: one that leads to the page it stands on leaves the address as it was.
        st.button(
            f"Feature {card.feature}", key=key, type="tertiary", icon=":material/hub:",
            on_click=go, args=(card.layer, card.feature, card.run), disabled=not card.run,
            help="Open its page" if card.run else "Its activity was not measured",
        )  # fmt: skip
        st.html(similarity_card(name, alike, profile.tokens, profile.histogram, profile.edges))
