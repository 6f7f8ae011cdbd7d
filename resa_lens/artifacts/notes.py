"""A person's labels, notes and tags of features: one CSV file of their own, outside the workspace.

The file can be edited by hand and kept under version control.  A row a feature: `saes` is the
identity of the SAEs (the path of those that have none), so that notes stay with the features they
are of; layers are 0-based.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.errors import BadInputError
from resa_lens.files import parse_json, read_text, write_errors, write_text

VARIABLE = "RESA_LENS_NOTES"
"""Environment variable that names the file; `resa-lens app --notes` sets it."""
COLUMNS = ("saes", "layer", "feature", "label", "note", "tags")
LONGEST = 4096
"""Characters of one field."""
Key = tuple[str, int, int]
"""SAEs, 0-based layer and feature."""


@dataclass(frozen=True)
class Note:
    """What a person says of one feature."""

    label: str = ""
    note: str = ""
    tags: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nothing is said."""
        return not (self.label or self.note or self.tags)

    def matches(self, text: str) -> bool:
        """Return whether a text stands in it, capitals or not."""
        return text.lower() in " ".join((self.label, self.note, *self.tags)).lower()


def notes_file() -> Path | None:
    """Return the file that the environment names."""
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


def saes_key(saes: Artifact | None, path: str) -> str:
    """Return what a row calls SAEs: their identity, or the path of those that have none."""
    return (saes.manifest.identity if saes else "") or path


def read_notes(file: Path) -> dict[Key, Note]:
    """Return the notes of a file; none where it is not there yet.

    Raises:
        BadInputError: it is no such file; the line is named.
    """
    if not file.exists():
        return {}
    return parse_notes(read_text(file, "notes"), str(file))


def parse_notes(text: str, name: str) -> dict[Key, Note]:
    """Return the notes of a file's text.

    Raises:
        BadInputError: it is no such file; the line is named.
    """
    notes: dict[Key, Note] = {}
    rows = csv.reader(io.StringIO(text, newline=""))
    try:
        if tuple(next(rows, ())) != COLUMNS:
            raise BadInputError(f"notes {name} have other columns than {', '.join(COLUMNS)}")
        for saes, layer, feature, label, note, tags in rows:
            if int(layer) < 0 or int(feature) < 0:
                raise ValueError(layer, feature)
            notes[saes, int(layer), int(feature)] = Note(
                label, note, tuple(tag for tag in tags.split(";") if tag)
            )
    except BadInputError:
        raise
    except (ValueError, csv.Error) as error:
        raise BadInputError(
            f"notes {name}, line {rows.line_num}: not {', '.join(COLUMNS)}"
        ) from error
    return notes


def write_note(file: Path, key: Key, note: Note) -> None:
    """Put one feature's note into the file, read anew before; an empty one is taken out.

    Raises:
        BadInputError: the file is none of notes, cannot be written, or a field is too long.
    """
    if any(len(text) > LONGEST for text in (note.label, note.note, ";".join(note.tags))):
        raise BadInputError(f"a label, a note or tags of more than {LONGEST} characters")
    write_notes(file, {**read_notes(file), key: note})


def write_notes(file: Path, notes: Mapping[Key, Note]) -> None:
    """Write a file of notes, whole or not at all; empty ones are left out.

    Raises:
        BadInputError: no permission to write there.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for (saes, layer, feature), note in sorted(notes.items()):
        if not note.empty:
            row = (saes, layer, feature, note.label, note.note, ";".join(note.tags))
            writer.writerow(row)
    with write_errors(file):
        write_text(file, text.getvalue())


def parse_explanations(content: bytes, name: str, saes: str) -> dict[Key, Note]:
    """Return labels from Neuronpedia's explanations, a JSON object a line, gzipped or not.

    Args:
        content: of a file with the fields `layer` ("7-set"), `index` and `description`.
        name: of the file, for messages.
        saes: what a row calls the SAEs that they are of.

    Raises:
        BadInputError: a line is none of these.
    """
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise BadInputError(f"{name} is not gzipped, or not whole") from error
    notes = {}
    for number, line in enumerate(content.splitlines(), start=1):
        value: Any = parse_json(line, Path(name))
        try:
            layer, feature = int(value["layer"].partition("-")[0]), int(value["index"])
            text = str(value["description"])[:LONGEST]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInputError(f"{name}, line {number}: no explanation of Neuronpedia") from error
        notes[saes, layer, feature] = Note(text, tags=("neuronpedia",))
    return notes
