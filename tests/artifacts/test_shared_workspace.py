"""Several processes and hosts write into one workspace: nobody's work is replaced or removed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resa_lens import claims
from resa_lens import publishing as module
from resa_lens.artifacts import listing
from resa_lens.artifacts.kinds.quality import Quality
from resa_lens.artifacts.manifest import Manifest
from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import LOCK, Workspace
from resa_lens.errors import RunFailedError, TakenError
from resa_lens.files import run_lock
from resa_lens.progress import Reporter

STEP = 0.05
OTHER = {"RESA_LENS_HOST": "elsewhere"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("RESA_LENS_CLAIM_INTERVAL", str(STEP))
    claims._LOOKS.clear()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "ws")


def manifest() -> Manifest:
    return Manifest(kind="saes", config={})


def write(workspace: Workspace, text: str, name: str = "run") -> Path:
    folder = workspace.path("saes", "m", name)
    with workspace.artifact(folder, manifest()) as temporary:
        (temporary / "data.txt").write_text(text)
    return folder


def contents(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


WRITE = """
import sys
from resa_lens.artifacts.workspace import Manifest, Workspace
workspace = Workspace(sys.argv[1])
folder = workspace.path("saes", "m", "run")
with workspace.artifact(folder, Manifest(kind="saes", config={})) as temporary:
    (temporary / "data.txt").write_text("other")
    print("begun", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def writer(workspace: Workspace, before: tuple[str, ...] = ()) -> Iterator[Any]:
    """A process of another host that is writing an artifact."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", WRITE, str(workspace.root)], text=True,
        env={**os.environ, **OTHER}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def outlast(folder: Path) -> None:
    """Write beside another host's files until their owner would count as dead."""
    end = time.monotonic() + 2 * claims.PATIENCE * STEP
    while time.monotonic() < end:
        write(Workspace(folder.parents[1]), "x", "next")
        time.sleep(STEP)


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("exchange", [True, False])
def test_what_another_process_wrote_meanwhile_is_not_replaced(
    workspace, monkeypatch, replacing, exchange
):
    if not exchange:
        monkeypatch.setattr(module, "_exchange", lambda *_: False)
    if replacing:
        write(workspace, "old")
    folder = workspace.path("saes", "m", "run")
    with ExitStack() as first:
        temporary = first.enter_context(workspace.artifact(folder, manifest()))
        (temporary / "data.txt").write_text("first")
        with (  # noqa: PT012
            pytest.raises(TakenError, match=r"wrote .*run meanwhile"),
            workspace.artifact(folder, manifest()) as later,
        ):
            (later / "data.txt").write_text("second")
            first.close()
    assert (folder / "data.txt").read_text() == "first"
    assert contents(folder.parent) == {"run"}


def test_a_publisher_that_comes_second_between_look_and_rename_replaces_nothing(
    workspace, monkeypatch
):
    seal, folder = module._seal, workspace.path("saes", "m", "run")

    def look_then_another_comes(place, name):
        value = seal(place, name)
        if value is None and (place.parent / ".claim-x").exists():
            shutil.copytree(workspace.path("saes", "m", "ready"), place)
        return value

    write(workspace, "first", "ready")
    with pytest.raises(TakenError), workspace.artifact(folder, manifest()) as temporary:  # noqa: PT012
        (temporary / "data.txt").write_text("second")
        claims.marked(folder.parent, "x").write_text("")
        monkeypatch.setattr(module, "_seal", look_then_another_comes)
    assert (folder / "data.txt").read_text() == "first"


def test_temporary_files_of_a_live_process_of_another_host_stay(workspace):
    with writer(workspace) as process:
        (half,) = workspace.path("saes", "m").glob(".tmp-*-run")
        outlast(half.parent)
        assert (half / "data.txt").exists()
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    assert contents(half.parent) == {"run", "next"}


def test_temporary_files_of_a_killed_process_of_another_host_go_after_a_while(workspace):
    with writer(workspace) as process:
        process.kill()
        process.wait()
        (half,) = workspace.path("saes", "m").glob(".tmp-*-run")
        write(workspace, "x", "next")
        # Once is not enough: it may be alive.
        assert half.exists()
        outlast(half.parent)
    assert contents(half.parent) == {"next"}


def test_a_writer_that_was_suspended_leaves_what_others_did(workspace):
    with writer(workspace) as process:
        process.send_signal(signal.SIGSTOP)
        (half,) = workspace.path("saes", "m").glob(".tmp-*-run")
        outlast(half.parent)
        assert not half.exists()
        folder = write(workspace, "mine")
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate("\n", timeout=60)
        assert process.returncode == 1
        assert "stood still while writing" in said.splitlines()[-1]
    assert (folder / "data.txt").read_text() == "mine"
    assert contents(folder.parent) == {"run", "next"}


def test_what_a_killed_replacement_of_another_host_set_aside_comes_back(workspace):
    folder = write(workspace, "old")
    aside = folder.with_name(f".tmp-{'a' * 16}.old-run")
    folder.rename(aside)
    claim = claims.Claim(claims.marked(folder.parent, "a" * 16), "writing", "a" * 16)
    claim.begin()
    write(workspace, "x", "next")
    assert aside.exists()
    claim.path.unlink()
    claim.release()
    write(workspace, "x", "next")
    assert (folder / "data.txt").read_text() == "old"


UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def test_two_pid_namespaces_leave_each_others_files(workspace):
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine makes no PID namespaces")
    with writer(workspace, UNSHARE) as process:
        (half,) = workspace.path("saes", "m").glob(".tmp-*-run")
        outlast(half.parent)
        assert (half / "data.txt").exists()
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    assert contents(half.parent) == {"run", "next"}


def test_the_listing_says_who_is_at_work(workspace):
    with writer(workspace) as process:
        (line,) = listing.scan(workspace.root).under_way
        assert line.state == (
            f"half-written; process {process.pid} on host elsewhere is at work here"
        )
        before = {p: p.stat().st_mtime_ns for p in workspace.root.rglob("*") if p.is_dir()}
        process.kill()
        process.wait()
        end = time.monotonic() + 30
        while "no process is at work here" not in (listing.scan(workspace.root).under_way[0].state):
            assert time.monotonic() < end
            time.sleep(STEP)
        assert {p: p.stat().st_mtime_ns for p in before} == before


# A stage


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


MODEL = SimpleNamespace(
    slug="m-0", contents={"weights": "0"}, weights_hash="0", dtype="float32", device="cpu",
    attention="eager",
)  # fmt: skip


def stage(workspace: Workspace, **options: Any) -> Any:
    ctx = Context(workspace, Notes(), **options)
    return ctx.stage(Quality, MODEL, name="q", config={})  # pyright: ignore[reportArgumentType]


def fill(draft: Any) -> None:
    draft.results = {"layers": {}, "model": "m"}


@pytest.mark.parametrize("doing", [None, "measuring"])
def test_the_same_work_finished_by_another_process_meanwhile_is_taken(workspace, doing):
    ours = stage(workspace)

    def work(draft: Any) -> None:
        # As a process of another host does that took over while this one was suspended.
        theirs.append(stage(workspace).obtain(fill))
        if doing:
            (ours.work / LOCK / "claim-0").unlink()
        (ours.work / "theirs").mkdir(parents=True, exist_ok=True)
        fill(draft)

    theirs: list[Any] = []
    artifact = ours.obtain(work, doing=doing)
    assert artifact.manifest.created == theirs[0].manifest.created
    # Whose the folder is now, it is left to them.
    assert (ours.work / "theirs").exists()


def test_a_stage_whose_claim_was_taken_over_stops_and_clears_nothing(workspace):
    ours = stage(workspace)

    def work(draft: Any, error: Exception | None = None) -> None:
        (ours.work / LOCK / "claim-0").rename(ours.work / LOCK / "of-another")
        (ours.work / "kept").write_text("another's")
        if error:
            raise error
        fill(draft)

    for error in (None, RunFailedError("nan"), FileNotFoundError("gone")):
        with pytest.raises(TakenError, match="another process took over"):
            ours.obtain(lambda draft, error=error: work(draft, error), doing="measuring")
        assert (ours.work / "kept").exists()
        assert not ours.folder.exists()


def test_a_second_look_after_the_claim_finds_what_was_finished_meanwhile(workspace, monkeypatch):
    ours, theirs = stage(workspace), stage(workspace)
    done = type(ours).done
    looks = []

    def done_after_another_finishes(self, *, again=False):
        looks.append(again)
        artifact = done(self, again=again)
        if len(looks) == 1:
            monkeypatch.setattr(type(ours), "done", done)
            theirs.obtain(fill)
            monkeypatch.setattr(type(ours), "done", done_after_another_finishes)
        return artifact

    monkeypatch.setattr(type(ours), "done", done_after_another_finishes)
    artifact = ours.obtain(lambda draft: pytest.fail("worked"), doing="measuring")
    assert artifact.path == theirs.folder
    assert looks == [False, True]


def test_a_run_of_another_host_is_named_and_its_folder_left(workspace, monkeypatch):
    ours = stage(workspace)
    monkeypatch.setenv("RESA_LENS_HOST", "elsewhere")
    with run_lock(ours.work / LOCK, "measuring"):
        monkeypatch.delenv("RESA_LENS_HOST")
        (ours.work / "kept").write_text("another's")
        with pytest.raises(TakenError, match="on host elsewhere is measuring into"):
            ours.obtain(fill, doing="measuring")
        assert (ours.work / "kept").exists()
