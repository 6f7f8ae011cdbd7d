"""What is read of a workspace: what is wrong in it is a line, nothing hangs or is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import kind_examples
import pytest
from app_driver import edit, state

from resa_lens.app import data
from resa_lens.artifacts import walk
from resa_lens.artifacts.artifact import KINDS
from resa_lens.artifacts.kinds.counts import Counts, Features
from resa_lens.artifacts.listing import scan
from resa_lens.artifacts.manifest import MANIFEST
from resa_lens.artifacts.workspace import LOCK, Workspace
from resa_lens.errors import BadInputError, DamagedError
from resa_lens.files import run_lock
from resa_lens.resources import data_path

COUNTS = "counts/m-00000000/r"
GOLDEN = Path(__file__).parents[1] / "golden" / "workspace"
"""Of the time before artifacts had an identity."""


def fill(root: Path, relative: str = COUNTS, kind: str = "counts") -> Path:
    """A workspace with one artifact; returns its manifest."""
    space = Workspace(root)
    made = kind_examples.manifest(kind, hashes={"weights": "0" * 64})
    with space.artifact(space.path(*relative.split("/")), made) as folder:
        (folder / "features.json").write_text('{"layers": []}')
    return root / relative / MANIFEST


def test_only_our_folders_are_walked(tmp_path: Path, monkeypatch):
    for folder in range(40):
        place = tmp_path / f"photos{folder:02}" / "deep" / "deeper"
        place.mkdir(parents=True)
        (place / MANIFEST).write_text('{"name": "a web app"}')
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "round").symlink_to(tmp_path)
    fill(tmp_path)
    opened = []
    scandir = os.scandir
    monkeypatch.setattr(walk.os, "scandir", lambda path: opened.append(path) or scandir(path))
    held = scan(tmp_path)
    assert [a.relative for a in held.artifacts] == [COUNTS]
    assert (held.problems, held.whole) == ((), True)
    # Names that no run of resa-lens makes; nobody is told to remove them.
    assert held.others[:2] == ("photos00", "photos01")
    assert not any("photos" in str(path) for path in opened)


def test_a_crowd_ends_too(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(walk, "MOST", 200)
    for folder in range(400):
        (tmp_path / f"photos{folder}").mkdir()
    fill(tmp_path)
    held = scan(tmp_path)
    assert [a.relative for a in held.artifacts] == [COUNTS]
    assert not held.whole
    shutil.rmtree(tmp_path)
    for folder in range(400):
        (tmp_path / "evals" / f"e{folder}").mkdir(parents=True)
    assert not scan(tmp_path).whole


def _deep(manifest: Path) -> None:
    manifest.write_text("[" * 100_000 + "]" * 100_000)


def _folder(manifest: Path) -> None:
    manifest.unlink()
    manifest.mkdir()


def _pipe(manifest: Path) -> None:
    manifest.unlink()
    os.mkfifo(manifest)


def _device(manifest: Path) -> None:
    manifest.unlink()
    manifest.symlink_to("/dev/zero")


def _round(manifest: Path) -> None:
    manifest.unlink()
    manifest.symlink_to(manifest)


def _lost(manifest: Path) -> None:
    manifest.unlink()


def _edited(**fields) -> Callable[[Path], None]:
    return lambda manifest: edit(manifest, lambda value: value.update(fields))


DAMAGE = {
    "empty": lambda m: m.write_text(""),
    "no mapping": lambda m: m.write_text("[]"),
    "half of it": lambda m: m.write_bytes(m.read_bytes()[: m.stat().st_size // 2]),
    "no text": lambda m: m.write_bytes(bytes(range(256))),
    "400 digits": lambda m: m.write_text('{"seconds": ' + "9" * 400 + "}"),
    "5,000 digits": lambda m: m.write_text('{"seconds": ' + "9" * 5000 + "}"),
    "deep": _deep,
    "a folder": _folder,
    "a pipe": _pipe,
    "a device": _device,
    "a circle": _round,
    "lost": _lost,
    "a changed byte": lambda m: m.write_text(m.read_text().replace("tiny-reasoner", "tiny-reader")),
    "a newer schema": _edited(schema_version=99),
    "an unknown kind": _edited(kind="dream"),
    "another kind": _edited(kind="eval"),
    "other results": _edited(results={"layers": "no"}),
    "no results": _edited(results={}),
    "other settings": _edited(config=[]),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_whatever_is_wrong_is_one_line(tmp_path: Path, what: str):
    manifest = fill(tmp_path)
    fill(tmp_path, "evals/e", "eval")
    DAMAGE[what](manifest)
    before = state(tmp_path)
    held = scan(tmp_path)
    (problem,) = held.problems
    assert str(manifest.parent) in problem
    assert "\n" not in problem
    assert len(problem) < 600
    assert [a.relative for a in held.artifacts] == ["evals/e"]
    assert state(tmp_path) == before


def test_newer_schemas_and_unknown_kinds_ask_for_an_update(tmp_path: Path):
    _edited(schema_version=99)(fill(tmp_path))
    _edited(kind="dream")(fill(tmp_path, "evals/e", "eval"))
    newer, unknown = sorted(scan(tmp_path).problems)
    assert "has schema 99" in newer
    assert "kind 'dream' is unknown to this version; update resa-lens" in unknown


def test_what_lies_a_floor_too_high_is_said(tmp_path: Path):
    fill(tmp_path, "counts/r")
    (problem,) = scan(tmp_path).problems
    assert str(tmp_path / "counts" / "r") in problem


def test_unfinished_folders_say_how_far_and_who(tmp_path: Path):
    work = tmp_path / "saes" / "m-0" / ".work-r"
    (work / "group-0" / "checkpoint-40").mkdir(parents=True)
    (tmp_path / "evals" / ".tmp-0123456789abcdef-e").mkdir(parents=True)
    with run_lock(work / LOCK):
        evals, saes = sorted(scan(tmp_path).under_way, key=lambda u: u.relative)
    assert saes.state == f"step 40; process {os.getpid()} is at work here"
    assert "half-written; no process is at work here" in evals.state
    assert (saes.folder, evals.folder) == ("saes", "evals")


def test_a_pipe_in_an_unfinished_folder_does_not_hang(tmp_path: Path):
    work = tmp_path / "evals" / ".work-r"
    (work / LOCK).mkdir(parents=True)
    os.mkfifo(work / LOCK / "claim-0")
    os.mkfifo(work / "answers.jsonl")
    (unfinished,) = scan(tmp_path).under_way
    assert "another process is at work here" in unfinished.state


def test_a_folder_without_permission(tmp_path: Path, monkeypatch):
    fill(tmp_path)
    real = os.scandir

    def scandir(path):
        if Path(path).name == "counts":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(walk.os, "scandir", scandir)
    (problem,) = scan(tmp_path).problems
    assert "counts cannot be read: Permission denied" in problem
    refuse = PermissionError(13, "Permission denied")
    monkeypatch.setattr(walk.os, "scandir", lambda path: (_ for _ in ()).throw(refuse))
    with pytest.raises(BadInputError, match="cannot be read: Permission denied"):
        scan(tmp_path)


@pytest.mark.parametrize("moment", ["before it is read", "while it is read"])
def test_an_artifact_that_goes_meanwhile_is_no_problem(tmp_path: Path, moment: str):
    fill(tmp_path)
    read = Workspace(tmp_path).read

    def gone(folder: Path):
        shutil.rmtree(tmp_path / "counts")
        if moment == "while it is read":
            raise DamagedError(f"{folder / MANIFEST} is missing")
        return read(folder)

    held = scan(tmp_path, gone)
    assert (held.artifacts, held.problems) == ((), ())


def test_a_file_of_an_artifact_that_was_changed_is_refused(tmp_path: Path):
    manifest = fill(tmp_path)
    (counts,) = scan(tmp_path).of(Counts)
    assert counts.read("features.json", Features).layers == []
    manifest.with_name("features.json").write_text('{"layers": [] }')
    (counts,) = scan(tmp_path).of(Counts)
    with pytest.raises(DamagedError, match="was changed since it was written"):
        counts.read("features.json", Features)


def test_a_file_in_another_ones_place_is_read_anew(tmp_path: Path):
    """Copies that keep times, as of an archive, keep the size too where only a digit differs."""
    manifest = fill(tmp_path)
    edit(manifest, lambda value: value.update(schema_version=1, identity="", files={}))
    file, other = manifest.with_name("features.json"), tmp_path / "other.json"
    text = '{"layers": [{"layer": 1, "active": 3, "features": {"all": [5]}}]}'
    file.write_text(text)
    other.write_text(text.replace("5", "7"))
    for one in (file, other):
        os.utime(one, ns=(10**18, 10**18))
    (counts,) = data.scan(str(tmp_path)).of(Counts)
    assert data.read(counts, "features.json", Features).layers[0].features["all"] == [5]
    other.replace(file)
    assert data.read(counts, "features.json", Features).layers[0].features["all"] == [7]


def test_the_app_reads_each_manifest_once(tmp_path: Path, monkeypatch):
    for number in range(30):
        fill(tmp_path, f"evals/e{number:02}", "eval")
    before = state(tmp_path)
    assert len(data.scan(str(tmp_path)).artifacts) == 30
    monkeypatch.setattr(Workspace, "read", lambda self, folder: pytest.fail(f"{folder} again"))
    assert len(data.scan(str(tmp_path)).artifacts) == 30
    assert state(tmp_path) == before


def test_a_read_only_workspace(tmp_path: Path):
    fill(tmp_path)
    places = [tmp_path, *(p for p in tmp_path.rglob("*"))]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    try:
        assert [a.relative for a in scan(tmp_path).artifacts] == [COUNTS]
    finally:
        for place in places:
            place.chmod(0o755 if place.is_dir() else 0o644)


def test_an_older_artifact_is_read_and_its_origin_is_not_verifiable():
    held = scan(GOLDEN)
    assert held.problems == ()
    assert len(held.artifacts) > 10
    assert not any(a.verifiable for a in held.artifacts)


def test_the_smallest_of_each_kind_is_taken(tmp_path: Path):
    for kind in KINDS.values():
        if kind.name in kind_examples.RESULTS:
            middle = "m-00000000/" if kind.by_model else ""
            fill(tmp_path, f"{kind.folder}/{middle}r", kind.name)
    held = scan(tmp_path)
    assert held.problems == ()
    assert {a.manifest.kind for a in held.artifacts} == set(kind_examples.RESULTS)
    assert json.dumps([a.manifest.results for a in held.artifacts])


def test_what_has_lost_its_manifest_is_named_whatever_its_kind(tmp_path: Path):
    """SAEs without one are another tool's; of any other kind the origin is not known."""
    shutil.copytree(data_path("workspace"), tmp_path, dirs_exist_ok=True)
    kinds = {a.manifest.kind: a for a in scan(tmp_path).artifacts}
    assert "insertion" in kinds
    for name, artifact in kinds.items():
        (artifact.path / "manifest.json").rename(tmp_path / "away")
        problems = scan(tmp_path).problems
        assert [p for p in problems if artifact.path.name in p and "no manifest.json" in p], name
        (tmp_path / "away").rename(artifact.path / "manifest.json")
