"""Folders and files that appear whole, wherever a command writes: killed, shared, or full."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from resa_lens import claims, publishing
from resa_lens.errors import RunFailedError, TakenError
from resa_lens.publishing import filled, put_back

LEFT = "0" * 16
"""Token of a process that is gone."""


def fill(place: Path, text: str, *, folder: bool, meanwhile: Callable[[], object] = bool) -> None:
    with filled(place) as temporary:
        if folder:
            temporary.mkdir()
        (temporary / "data" if folder else temporary).write_text(text)
        meanwhile()


def content(place: Path) -> str:
    return (place / "data" if place.is_dir() else place).read_text()


@pytest.mark.parametrize("folder", [True, False])
def test_what_a_killed_process_left_of_a_place_goes_and_nothing_else(tmp_path, folder):
    own, other = (tmp_path / f".tmp-{LEFT}-{name}" for name in ("page", "theirs"))
    for path in (own, other):
        if folder:
            path.mkdir()
        else:
            path.write_text("half")
    fill(tmp_path / "page", "whole", folder=folder)
    fill(tmp_path / "page", "again", folder=folder)
    assert content(tmp_path / "page") == "again"
    assert {p.name for p in tmp_path.iterdir()} == {"page", other.name}


def test_a_claim_without_a_folder_goes_and_what_is_not_of_this_host_stays(tmp_path):
    """A process may be killed between its claim and its first file."""
    with claims.mark(tmp_path).kept() as claim:
        own = json.loads(claim.path.read_text())
    gone = {**own, "process": 2**22 + 1}
    claims.marked(tmp_path, LEFT).write_text(json.dumps(gone))
    others = {".claim-elsewhere": json.dumps({**gone, "host": "elsewhere"}), ".claim-notes": "mine"}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    fill(tmp_path / "page", "whole", folder=True)
    assert {p.name for p in tmp_path.iterdir()} == {"page", *others}


def test_a_seal_that_is_a_pipe_keeps_nobody_waiting(tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    os.mkfifo(place / "manifest.json")
    with filled(place, seal="manifest.json") as temporary:
        temporary.mkdir()
        (temporary / "manifest.json").write_text("{}")
    assert (place / "manifest.json").read_text() == "{}"


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_a_folder_that_another_process_published_meanwhile_stays(
    tmp_path, monkeypatch, exchange, old
):
    if not exchange:
        monkeypatch.setattr(publishing, "_exchange", lambda *_: False)
    place = tmp_path / "new" / "converted"
    if old:
        fill(place, "old", folder=True)
    with pytest.raises(TakenError, match=r"wrote .*converted meanwhile"):
        fill(place, "second", folder=True, meanwhile=lambda: fill(place, "first", folder=True))
    assert content(place) == "first"
    assert [p.name for p in place.parent.iterdir()] == ["converted"]


def test_of_a_file_the_last_writer_stays(tmp_path):
    place = tmp_path / "page.html"
    fill(place, "second", folder=False, meanwhile=lambda: fill(place, "first", folder=False))
    assert content(place) == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("folder", [True, False])
def test_a_full_disk_leaves_all_as_before(tmp_path, folder):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunFailedError, match="disk is full"):
        fill(tmp_path / "a" / "b", "half", folder=folder, meanwhile=full)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_set_aside_by_a_killed_process_comes_back(tmp_path):
    fill(tmp_path / f".tmp-{LEFT}.old-merged", "old", folder=True)
    put_back(tmp_path / "merged")
    assert content(tmp_path / "merged") == "old"
    # What stands there is not replaced.
    fill(tmp_path / f".tmp-{LEFT}.old-merged", "older", folder=True)
    put_back(tmp_path / "merged")
    assert content(tmp_path / "merged") == "old"
