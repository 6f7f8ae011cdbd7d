"""A person's labels: kept in a file of their own, read back, refused by the line that is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from resa_lens.artifacts.notes import (
    COLUMNS,
    LONGEST,
    Note,
    parse_explanations,
    read_notes,
    write_note,
)
from resa_lens.errors import BadInputError

KEY = ("abc", 5, 62)
NASTY = 'a "quoted", comma\nline <b>&\u202e'


def test_a_note_is_read_back_and_an_empty_one_is_taken_out(tmp_path: Path) -> None:
    file = tmp_path / "notes.csv"
    assert read_notes(file) == {}
    note = Note(NASTY, "n", ("one", "two"))
    write_note(file, KEY, note)
    write_note(file, ("abc", 5, 7), Note("other"))
    assert read_notes(file) == {KEY: note, ("abc", 5, 7): Note("other")}
    write_note(file, ("abc", 5, 7), Note())
    assert read_notes(file) == {KEY: note}
    assert file.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.csv"]


def test_notes_are_searched_in_every_field() -> None:
    note = Note("Carries digits", "seen in sums", ("math",))
    assert all(note.matches(text) for text in ("digits", "SUMS", "math", ""))
    assert not note.matches("prose")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer,feature\n1,2\n", "other columns"),
        (f"{','.join(COLUMNS)}\nabc,x,2,l,n,t\n", "line 2"),
        (f"{','.join(COLUMNS)}\nabc,1\n", "line 2"),
        (f"{','.join(COLUMNS)}\nabc,-1,2,l,n,t\n", "line 2"),
        (f"{','.join(COLUMNS)}\nabc,1,2,{'9' * 200_000},n,t\n", "line"),
        ("", "other columns"),
    ],
)
def test_a_file_that_holds_no_notes_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "notes.csv"
    file.write_text(text)
    with pytest.raises(BadInputError, match=words):
        read_notes(file)
    # And never written over.
    with pytest.raises(BadInputError):
        write_note(file, KEY, Note("x"))
    assert file.read_text() == text


def test_what_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=str(LONGEST)):
        write_note(tmp_path / "notes.csv", KEY, Note("x" * (LONGEST + 1)))


def test_explanations_of_neuronpedia_become_labels() -> None:
    line = json.dumps({"layer": "7-set", "index": "596", "description": "opens a thought"})
    expected = {("abc", 7, 596): Note("opens a thought", tags=("neuronpedia",))}
    for content in (line.encode(), gzip.compress(line.encode())):
        assert parse_explanations(content, "batch", "abc") == expected
    with pytest.raises(BadInputError, match="line 1"):
        parse_explanations(b'{"layer": 7}', "batch", "abc")
    with pytest.raises(BadInputError, match="not whole"):
        parse_explanations(gzip.compress(line.encode())[:20], "batch", "abc")
