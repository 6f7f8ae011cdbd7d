"""A person's labels on the page of features: the box of one feature, and the list of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import streamlit as st

from resa_lens.app.features.data import Source
from resa_lens.app.widgets import part, table
from resa_lens.artifacts.notes import (
    VARIABLE,
    Note,
    notes_file,
    parse_explanations,
    parse_notes,
    read_notes,
    write_note,
    write_notes,
)

_LABEL, _NOTE, _TAGS, _TABLE = "note-label", "note-text", "note-tags", "labelled"
_SENT = "labels-sent"


def box(source: Source, layer: int, feature: int) -> None:
    """Draw the label, note and tags of a feature, to be changed; each change is written at once."""
    with part("Your label"):
        file = notes_file()
        if file is None:
            st.caption(
                f"`resa-lens app --notes FILE.csv` (or {VARIABLE}) keeps labels, notes and tags in "
                "a file of yours; the workspace is never written."
            )
            return
        key = source.notes_key, layer, feature
        note = read_notes(file).get(key, Note())
        tail = f"{layer}:{feature}"
        columns = st.columns([2, 3, 1])
        values = (
            columns[0].text_input("Label", note.label, key=f"{_LABEL}-{tail}"),
            columns[1].text_input("Note", note.note, key=f"{_NOTE}-{tail}"),
            columns[2].text_input("Tags, by commas", ", ".join(note.tags), key=f"{_TAGS}-{tail}"),
        )
        label, text, tags = (str(value or "").strip() for value in values)
        changed = Note(label, text, tuple(t for tag in tags.split(",") if (t := tag.strip())))
        if changed != note:
            write_note(file, key, changed)
            st.caption("Kept.")


def listed(source: Source, text: str, go: Callable[[int, int], None]) -> None:
    """Draw the features that have a label, note or tag, those with a text in it; a click opens one.

    Args:
        source: the runs.
        text: that is searched; empty for all.
        go: opens a feature's page.
    """
    file = notes_file()
    if file is None:
        return
    with part():
        notes = {
            key[1:]: note
            for key, note in read_notes(file).items()
            if key[0] == source.notes_key and note.matches(text)
        }
        _take_in(source, file)
        if not notes:
            return
        places = sorted(notes)
        rows = [
            {
                "layer": layer, "feature": feature, "label": notes[layer, feature].label,
                "tags": ", ".join(notes[layer, feature].tags), "note": notes[layer, feature].note,
            }
            for layer, feature in places
        ]  # fmt: skip

        with st.expander(f"{len(rows)} with a label of yours", expanded=bool(text)):
            table(
                rows, "labelled", key=_TABLE, picked=lambda row: go(*places[row]),
                alt="Features with your labels",
            )  # fmt: skip


def _take_in(source: Source, file: Path) -> None:
    """Draw the box that takes in labels: a file of notes, or explanations of Neuronpedia."""
    with st.popover("Take in labels"):
        sent = st.file_uploader("CSV of notes, or explanations (.jsonl, .jsonl.gz)", key=_SENT)
        if sent is None or not st.button("Take them in; what has a label keeps it"):
            return
        content = sent.getvalue()
        if sent.name.endswith(".csv"):
            fresh = parse_notes(content.decode("utf-8", "replace"), sent.name)
        else:
            fresh = parse_explanations(content, sent.name, source.notes_key)
        known = read_notes(file)
        write_notes(file, {**fresh, **known})
        st.text(f"{len(fresh.keys() - known.keys())} taken in.")
