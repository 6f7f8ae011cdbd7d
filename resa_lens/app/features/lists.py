"""Lists of features that an address holds, so that a person's own list can be sent as a link."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import streamlit as st

from resa_lens.app import links
from resa_lens.app.features.data import Source, place_of
from resa_lens.app.features.table import Selection
from resa_lens.app.widgets import part, problem, verbatim
from resa_lens.artifacts.notes import notes_file, read_notes
from resa_lens.errors import BadInputError
from resa_lens.figures.tokens import plain

LIST = "list"
"""Key in the address: LAYER:FEATURE by commas, layers 0-based."""
PAGES = "page"
"""Key in the address of the table's pages."""
MOST = 200
"""Features in one address: with numbers of five digits it has two thousand characters, which every
browser and every mail program takes."""
_LONGEST = 10_000  # characters of an address' list that are looked at
_TAGS = 20  # tags whose links are shown

Place = tuple[int, int]
"""0-based layer and feature."""


@dataclass(frozen=True)
class Listed:
    """The features that an address names."""

    places: tuple[Place, ...]
    """In its order, each once."""
    problem: str
    """What of it names no feature or is too much, in a sentence or two; empty if nothing is."""


def of_address(source: Source) -> Listed | None:
    """Return the list of the address; None where it holds none."""
    text = st.query_params.get(LIST)
    return None if text is None else parse(text, source)


def parse(text: str, source: Source) -> Listed:
    """Read LAYER:FEATURE by commas; what names no feature of these SAEs is said and left out."""
    entries = [entry.strip() for entry in text[:_LONGEST].split(",") if entry.strip()]
    if len(text) > _LONGEST:
        entries = entries[:-1]  # it may be cut
    places: dict[Place, None] = {}
    wrong: list[str] = []
    for entry in entries[:MOST]:
        try:
            place = place_of(entry, source)
        except BadInputError:
            wrong.append(entry)
            continue
        if place[0] in source.latents:
            places[place] = None
        else:
            wrong.append(entry)
    sentences = []
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        sentences.append(
            f"The list in the address names {plain(wrong[0])!r:.80}{more}, which is no feature "
            "that was measured here; LAYER:FEATURE by commas is wanted, as in 5:62,6:10."
        )
    elif not places:
        sentences.append("The list in the address is empty; LAYER:FEATURE by commas is wanted.")
    if len(entries) > MOST or len(text) > _LONGEST:
        sentences.append(f"A list holds {MOST} features at most; the others are left out.")
    return Listed(tuple(places), " ".join(sentences))


def about(listed: Listed) -> None:
    """Say that the table is a list, what of it cannot be shown, and how to leave it."""
    if listed.problem:
        problem(listed.problem)
    with st.container(horizontal=True, vertical_alignment="center"):
        if listed.places:
            st.text(f"A list of {_features(len(listed.places))}, by its link.")
        st.button(
            "Leave the list", icon=":material/close:", on_click=_leave, key="leave-list",
            type="tertiary", help="Show all features",
        )  # fmt: skip


def _leave() -> None:
    """Take the list out of the address; a callback."""
    links.first_page(PAGES)
    if LIST in st.query_params:
        del st.query_params[LIST]


def offer(source: Source, selection: Selection) -> None:
    """Draw the link to the features that match, and one to those of each tag of a person's."""
    first = selection.rows.iloc[selection.index[:MOST]]
    places = list(zip(first["layer"].tolist(), first["feature"].tolist(), strict=True))
    with st.popover("Link to this list", icon=":material/link:"):
        _link(source, places, selection.matching)
    with part():
        tags = _tags(source)
        if not tags:
            return
        with st.popover("Links to your tags", icon=":material/label:"):
            for tag, tagged in sorted(tags.items())[:_TAGS]:
                st.text(f"{plain(tag)}: {_features(len(tagged))}")
                _link(source, tagged, len(tagged))
            if len(tags) > _TAGS:
                st.text(f"{len(tags) - _TAGS} more tags are not shown.")


def _link(source: Source, places: Iterable[Place], count: int) -> None:
    first = list(places)[:MOST]
    if count > len(first):
        st.caption(f"The first {len(first)} of {count:,}: more an address does not hold.")
    text = ",".join(f"{layer}:{feature}" for layer, feature in first)
    verbatim(links.address(run=source.key, **{LIST: text}))


def _tags(source: Source) -> dict[str, list[Place]]:
    """Return the tagged features of these SAEs, by tag.

    Raises:
        BadInputError: the file of notes cannot be read.
    """
    file, tags = notes_file(), {}
    for (saes, *place), note in sorted(read_notes(file).items()) if file else ():
        for tag in note.tags if saes == source.notes_key else ():
            tags.setdefault(tag, []).append(tuple(place))
    return tags


def _features(count: int) -> str:
    return f"{count} feature{'' if count == 1 else 's'}"
