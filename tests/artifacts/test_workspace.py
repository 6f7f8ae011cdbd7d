from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from resa_lens import claims
from resa_lens import publishing as module
from resa_lens.artifacts.kinds.counts import Counts
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.manifest import SCHEMA_VERSION, Manifest, sealed
from resa_lens.artifacts.workspace import Workspace
from resa_lens.config import config_dict
from resa_lens.errors import BadInputError, DamagedError, RunFailedError
from resa_lens.files import read_json, write_errors, write_json
from resa_lens.hashes import digest

LEFT, LIVE = "0" * 16, "1" * 16
"""Tokens of temporary names: of a process that is gone, and of one that is at work."""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "ws")


def new_manifest(**fields: Any) -> Manifest:
    return Manifest(kind="saes", config={"k": 32}, **fields)


def make(workspace: Workspace, *parts: str, text: str = "whole", **fields: Any) -> Path:
    folder = workspace.path(*parts)
    with workspace.artifact(folder, new_manifest(**fields)) as temporary:
        (temporary / "data.txt").write_text(text)
    return folder


def names(workspace: Workspace) -> list[str]:
    return [artifact.path.name for artifact in workspace.artifacts(Saes)]


def tree(root: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with its contents."""
    return {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")
    }


def assert_short(error: BaseException, *named: str) -> None:
    message = str(error)
    assert message.count("\n") < 3
    for text in named:
        assert text in message


# Whole or not at all


def test_an_artifact_appears_whole_with_its_manifest(workspace):
    folder = workspace.path("saes", "m", "run")
    with workspace.artifact(folder, new_manifest(seed=7)) as temporary:
        (temporary / "data.txt").write_text("x")
        assert not folder.exists()
        assert temporary.parent == folder.parent
    assert sorted(p.name for p in folder.iterdir()) == ["data.txt", "manifest.json"]
    assert [p.name for p in folder.parent.iterdir()] == ["run"]
    artifact = workspace.read(folder)
    assert artifact is not None
    manifest = artifact.manifest
    assert list(manifest.files) == ["data.txt"]
    assert (manifest.kind, manifest.config, manifest.seed) == ("saes", {"k": 32}, 7)
    assert manifest.schema_version == SCHEMA_VERSION
    assert manifest.versions["torch"] == metadata.version("torch")
    assert manifest.peak_memory_mb > 10
    assert manifest.command


def test_an_exception_inside_leaves_no_trace_and_no_new_parents(workspace):
    def fail(*parts: str) -> None:
        with workspace.artifact(workspace.path(*parts), new_manifest()) as temporary:
            (temporary / "half").write_text("half")
            raise KeyError("in the middle")

    with pytest.raises(KeyError):
        fail("saes", "m", "run")
    assert not workspace.root.exists()
    make(workspace, "saes", "m", "other")
    before = tree(workspace.root)
    with pytest.raises(KeyError):
        fail("saes", "m2", "run")
    assert tree(workspace.root) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, OSError])
def test_the_old_artifact_survives_a_failed_replacement(workspace, error):
    folder = make(workspace, "saes", "m", "run", text="old")
    before = tree(workspace.root)
    with (  # noqa: PT012
        pytest.raises((error, RunFailedError)),
        workspace.artifact(folder, new_manifest()) as temporary,
    ):
        (temporary / "data.txt").write_text("new")
        raise error
    assert tree(workspace.root) == before


def test_the_old_artifact_survives_a_failing_rename(workspace, monkeypatch):
    folder = make(workspace, "saes", "m", "run", text="old")
    before = tree(workspace.root)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target == folder and (self / "data.txt").read_text() == "new":
            raise OSError(errno.EIO, "input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    with pytest.raises(RunFailedError):
        make(workspace, "saes", "m", "run", text="new")
    assert tree(workspace.root) == before


def test_a_replacement_holds_nothing_of_the_old_artifact(workspace):
    folder = make(workspace, "saes", "m", "run", text="old")
    (folder / "extra").write_text("old")
    make(workspace, "saes", "m", "run", text="new")
    assert sorted(p.name for p in folder.iterdir()) == ["data.txt", "manifest.json"]
    assert (folder / "data.txt").read_text() == "new"
    assert [p.name for p in folder.parent.iterdir()] == ["run"]


def test_outside_a_workspace_only_the_artifacts_own_leftovers_are_cleared(tmp_path):
    place = Workspace(tmp_path)
    own, foreign = (tmp_path / f".tmp-{LEFT}-{name}" for name in ("model", "theirs"))
    own.mkdir()
    foreign.mkdir()
    with place.artifact(tmp_path / "model", Manifest(kind="model", config={})):
        pass
    assert not own.exists()
    assert foreign.exists()


def test_temporary_folders_of_dead_runs_are_cleared_and_of_live_ones_kept(workspace):
    folder = make(workspace, "saes", "m", "run")
    stale = [folder.parent / f".tmp-{LEFT}-{name}" for name in ("run", "with-dashes")]
    kept = folder.parent / f".tmp-{LIVE}-run"
    foreign = folder.parent / ".tmp-notes"
    for path in (*stale, kept, foreign):
        path.mkdir()
        (path / "half").write_text("half")
    claim = claims.Claim(claims.marked(folder.parent, LIVE), "writing", LIVE)
    claim.begin()
    with claim.kept():
        make(workspace, "saes", "m", "next")
        assert not any(path.exists() for path in stale)
        assert (kept / "half").exists()
        assert foreign.exists()
        assert set(names(workspace)) == {"run", "next"}


KILLED = """
import os, signal, sys
from importlib import metadata
from pathlib import Path
from resa_lens import claims
from resa_lens import publishing as module
from resa_lens.artifacts.workspace import Manifest, Workspace

where, moment = sys.argv[1:]
workspace = Workspace(where)
folder = workspace.path("saes", "m", "run")
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
real = Path.rename

def rename(self, target):
    if target == folder and moment == "between renames":
        die()
    return real(self, target)

Path.rename = rename
# As on a file system that cannot exchange two folders at one stroke.
module._exchange = lambda first, second: False
with workspace.artifact(folder, Manifest(kind="saes", config={})) as temporary:
    (temporary / "data.txt").write_text("new")
    if moment == "inside":
        die()
"""


@pytest.mark.parametrize("moment", ["inside", "between renames"])
def test_a_killed_run_leaves_the_old_state(workspace, moment):
    folder = make(workspace, "saes", "m", "run", text="old")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(workspace.root), moment],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(p.name.startswith(".tmp-") for p in folder.parent.iterdir())
    after = Workspace(workspace.root)
    # Reading repairs nothing: the next command that writes there does.
    before = tree(workspace.root)
    assert names(after) == ([] if moment == "between renames" else ["run"])
    assert tree(workspace.root) == before
    make(after, "saes", "m", "other")
    assert sorted(p.name for p in folder.parent.iterdir()) == ["other", "run"]
    assert (folder / "data.txt").read_text() == "old"


def test_a_run_killed_before_its_first_artifact_leaves_an_empty_workspace(workspace):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(workspace.root), "inside"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names(Workspace(workspace.root)) == []
    assert workspace.read(workspace.path("saes", "m", "run")) is None


# Write errors


def full_disk(*_args: Any, **_options: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
@pytest.mark.parametrize("replacing", [False, True])
def test_a_full_disk_is_a_failure_and_the_workspace_is_as_before(workspace, error, replacing):
    folder = workspace.path("saes", "m", "run")
    if replacing:
        make(workspace, "saes", "m", "run", text="old")
    before = tree(workspace.root)
    with (  # noqa: PT012
        pytest.raises(RunFailedError) as caught,
        workspace.artifact(folder, new_manifest()) as temporary,
    ):
        (temporary / "data.txt").write_text("part")
        raise error
    assert_short(caught.value, "disk is full", str(folder))
    assert caught.value.exit_code == 1
    assert tree(workspace.root) == before
    assert workspace.root.exists() == replacing


@pytest.mark.parametrize("call", ["mkdir", "write_text", "replace", "rename"])
def test_a_disk_that_fills_up_at_any_call(workspace, monkeypatch, call):
    make(workspace, "saes", "m", "other")
    before = tree(workspace.root)
    with monkeypatch.context() as patched:
        patched.setattr(Path, call, full_disk)
        with (
            pytest.raises(RunFailedError, match="disk is full"),
            workspace.artifact(workspace.path("saes", "m2", "run"), new_manifest()),
        ):
            pass
    assert tree(workspace.root) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_real_write_to_a_full_device(workspace):
    with (  # noqa: PT012
        pytest.raises(RunFailedError, match="disk is full"),
        workspace.artifact(workspace.path("saes", "m", "run"), new_manifest()) as temporary,
    ):
        (temporary / "data.bin").symlink_to("/dev/full")
        (temporary / "data.bin").write_bytes(b"x" * 100)
    assert not workspace.root.exists()


def test_real_tensors_are_written_whole(workspace):
    folder = workspace.path("saes", "m", "run")
    with workspace.artifact(folder, new_manifest()) as temporary:
        save_file({"w": torch.arange(5.0)}, temporary / "sae.safetensors")
    assert load_file(folder / "sae.safetensors")["w"].tolist() == [0, 1, 2, 3, 4]


def test_no_permission_is_bad_input_and_names_the_place(workspace, monkeypatch):
    make(workspace, "saes", "m", "other")
    before = tree(workspace.root)

    def denied(self: Path, *_args: Any, **_options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", denied)
        with (
            pytest.raises(BadInputError) as caught,
            workspace.artifact(workspace.path("saes", "m2", "run"), new_manifest()),
        ):
            pass
    assert_short(caught.value, "no permission", "saes/m2", "--workspace")
    assert caught.value.exit_code == 2
    assert tree(workspace.root) == before


def test_a_read_only_disk_is_bad_input_and_any_other_write_error_a_failure(tmp_path):
    with pytest.raises(BadInputError, match="read-only"), write_errors(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system")
    with pytest.raises(RunFailedError, match="input/output"), write_errors(tmp_path):
        raise OSError(errno.EIO, "input/output error")
    with pytest.raises(KeyError), write_errors(tmp_path):
        raise KeyError("not a write")


def test_permission_is_checked_before_long_work(tmp_path, monkeypatch):
    place = Workspace(tmp_path / "a" / "b")
    place.check_writable()
    assert not (tmp_path / "a").exists()
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    with pytest.raises(BadInputError) as caught:
        place.check_writable()
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
    assert_short(caught.value, str(tmp_path), "no permission")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    place = Workspace(tmp_path / "ws")
    with pytest.raises(BadInputError, match="no permission"):
        place.check_writable()
    with pytest.raises(BadInputError, match="no permission"):
        make(place, "saes", "m", "run")
    tmp_path.chmod(0o700)


# Reading


def test_artifacts_are_complete_ones_of_a_kind_the_newest_first(workspace):
    assert workspace.artifacts(Saes) == []
    for name in ("first", "second", "third"):
        make(workspace, "saes", "m", name)
    # By what the manifests say: a copy sets the files' times anew.
    os.utime(workspace.path("saes", "m", "first", "manifest.json"))
    folder = workspace.path("counts", "m", "c")
    with workspace.artifact(folder, Manifest(kind="counts", config={})):
        pass
    workspace.path("saes", "m", "incomplete").mkdir()
    assert names(workspace) == ["third", "second", "first"]
    assert [a.path.name for a in workspace.artifacts(Counts)] == ["c"]
    assert [a.path.name for a in workspace.artifacts()] == ["c", "third", "second", "first"]


def test_a_workspace_below_a_folder_named_like_a_temporary_one_finds_its_artifacts(tmp_path):
    place = Workspace(tmp_path / ".tmp-1-place" / "ws")
    folder = make(place, "saes", "m", "run")
    assert [artifact.path for artifact in place.artifacts(Saes)] == [folder]


def test_an_artifact_is_looked_up_by_its_identity_wherever_it_lies(workspace):
    identity = digest({"a": 1})
    folder = make(workspace, "saes", "m", "run", identity=identity, ingredients={"a": 1})
    preferred = workspace.path("saes", "other", f"run-{identity[:12]}")
    assert workspace.lookup(Saes, identity, folder).path == folder
    assert workspace.lookup(Saes, identity, preferred).path == folder
    folder.rename(folder.parent / "renamed")
    assert workspace.lookup(Saes, identity, preferred).path.name == "renamed"
    assert workspace.lookup(Saes, digest({"a": 2}), preferred) is None


def test_of_other_artifacts_none_is_parsed_for_a_lookup(workspace, monkeypatch):
    for i in range(8):
        make(workspace, "saes", "m", f"run{i}", identity=digest({"a": i}), ingredients={"a": i})
    folder = workspace.path("saes", "m", "run3")
    read, folders = Workspace.read, []

    def counting(self, folder):
        folders.append(folder)
        return read(self, folder)

    monkeypatch.setattr(Workspace, "read", counting)
    missing = workspace.path("saes", "m", "missing")
    assert workspace.lookup(Saes, digest({"a": 9}), missing) is None
    assert workspace.lookup(Saes, digest({"a": 3}), missing).path == folder
    assert folders == [missing, missing, folder]


def test_a_reader_beside_a_replacing_writer_always_finds_the_artifact(workspace):
    folder = make(workspace, "saes", "m", "run", text="0")
    script = (
        "import sys\nfrom resa_lens.artifacts.workspace import Manifest, Workspace\n"
        "space = Workspace(sys.argv[1])\n"
        "for i in range(60):\n"
        "    with space.artifact(space.path('saes', 'm', 'run'), "
        "Manifest(kind='saes', config={})) as t:\n"
        "        (t / 'data.txt').write_text(str(i))\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(workspace.root)])
    reads = 0
    while writer.poll() is None:
        assert workspace.read(folder) is not None
        reads += 1
    assert writer.returncode == 0
    assert reads > 100


def test_a_newer_schema_is_refused_and_asks_for_an_update(workspace):
    folder = make(workspace, "saes", "m", "run")
    file = folder / "manifest.json"
    for newer in (
        {**json.loads(file.read_text()), "schema_version": SCHEMA_VERSION + 1},
        {"schema_version": SCHEMA_VERSION + 1, "unlike": "this version's"},
    ):
        file.write_text(json.dumps(newer))
        with pytest.raises(BadInputError) as caught:
            workspace.read(folder)
        assert_short(caught.value, str(file), f"schema {SCHEMA_VERSION + 1}", "update resa-lens")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"kind": "saes"}',
        b"\xff\xfe",
        b"\0" * 40,
        b"[" * 100_000,
        b'{"schema_version": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_damaged_manifest_is_refused_with_its_name(workspace, content):
    folder = make(workspace, "saes", "m", "run")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedError) as caught:
        workspace.read(folder)
    assert_short(caught.value, str(folder / "manifest.json"))
    problems: list[str] = []
    assert workspace.artifacts(problems=problems) == []
    assert problems == [str(caught.value)]


def test_a_manifest_that_is_no_regular_file_is_named_and_nothing_hangs(workspace):
    folder = make(workspace, "saes", "m", "run")
    file = folder / "manifest.json"
    for replace in (file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero"),
                    lambda: file.symlink_to(file)):  # fmt: skip
        file.unlink()
        replace()
        with pytest.raises(DamagedError, match=r"manifest\.json"):
            workspace.read(folder)
        if file.is_dir():
            file.rmdir()
            file.touch()


def test_a_changed_byte_of_manifest_or_file_is_named(workspace):
    folder = make(workspace, "saes", "m", "run", identity=digest({}))
    artifact = workspace.read(folder)
    assert list(artifact.damage()) == []
    (folder / "data.txt").write_text("whale")
    (message,) = artifact.damage()
    assert str(folder / "data.txt") in message
    with pytest.raises(DamagedError, match="was changed"):
        artifact.file("data.txt")
    (folder / ".DS_Store").touch()
    assert artifact.foreign() == [".DS_Store"]
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"k": 32', '"k": 31'))
    with pytest.raises(DamagedError, match="was changed"):
        workspace.read(folder)


def test_a_manifest_of_another_identity_than_its_ingredients_is_refused(workspace):
    folder = make(workspace, "saes", "m", "run", identity=digest({"a": 2}), ingredients={"a": 1})
    with pytest.raises(DamagedError, match="another identity"):
        workspace.read(folder)


def test_fields_of_a_later_minor_version_are_kept(workspace):
    folder = make(workspace, "saes", "m", "run")
    value = {**read_json(folder / "manifest.json"), "colour": "blue"}
    write_json(folder / "manifest.json", sealed(Manifest.model_validate(value)))
    artifact = workspace.read(folder)
    assert artifact is not None
    assert artifact.manifest.model_dump()["colour"] == "blue"


def test_paths_that_lead_out_of_the_workspace_are_refused(workspace, tmp_path):
    make(workspace, "saes", "m", "run")
    (tmp_path / "outside").mkdir()
    (workspace.root / "link").symlink_to(tmp_path / "outside")
    for parts in (("..",), ("saes", "..", "..", "x"), ("/etc",), ("link", "x"), ("../ws2",)):
        with pytest.raises(BadInputError) as caught:
            workspace.path(*parts)
        assert_short(caught.value, "out of the workspace", parts[-1])
    assert workspace.path("saes", "..", "counts").resolve() == workspace.root / "counts"


def test_the_root_from_the_argument_the_environment_or_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RESA_LENS_WORKSPACE", raising=False)
    assert Workspace().root == tmp_path / "resa-workspace"
    monkeypatch.setenv("RESA_LENS_WORKSPACE", str(tmp_path / "env"))
    assert Workspace().root == tmp_path / "env"
    assert Workspace(tmp_path / "given").root == tmp_path / "given"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInputError, match="is a file"):
        Workspace(tmp_path / "file")
    with pytest.raises(BadInputError, match="is a file"):
        Workspace(tmp_path / "file" / "below").check_writable()


def test_manifests_hold_relative_paths_inside_and_absolute_ones_outside(workspace, tmp_path):
    folder = make(workspace, "saes", "m", "run")
    assert workspace.relative(folder) == "saes/m/run"
    assert workspace.relative(tmp_path / "elsewhere") == str(tmp_path / "elsewhere")


# JSON and identity


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "value.json"
    write_json(file, {"a": 1})
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_json(file, {"a": 2})
    assert read_json(file) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]
    file.write_text("{")
    with pytest.raises(BadInputError, match=r"value\.json is damaged"):
        read_json(file)
    with pytest.raises(BadInputError, match=r"absent\.json is missing"):
        read_json(tmp_path / "absent.json")


def test_the_digest_is_of_content_not_of_order():
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest({})) == 64
    int(digest({"a": 1}), 16)
    with pytest.raises(TypeError, match="not JSON serializable"):
        digest({"a": object()})


def test_configs_become_plain_mappings():
    from resa_lens.texts.corpora import CorpusConfig

    assert config_dict(CorpusConfig(seed=9))["seed"] == 9
    assert config_dict({"a": 1}) == {"a": 1}
    with pytest.raises(TypeError, match="list"):
        config_dict([1])
