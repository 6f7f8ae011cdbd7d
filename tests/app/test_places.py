"""Which workspace is opened, what is read of it, and what the app says of one that is none."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from app_driver import SCRIPT, edit, state, texts
from typer.testing import CliRunner

from resa_lens.app import data, listing, places
from resa_lens.cli import app as command
from resa_lens.cli import workspace as cli_workspace
from resa_lens.errors import BadInputError
from resa_lens.resources import data_path
from resa_lens.workspace import MANIFEST, Manifest, Workspace


def fill(root: Path, relative: str = "counts/m-0/r", kind: str = "counts") -> Path:
    """A workspace with one artifact."""
    space = Workspace(root)
    made = Manifest(kind=kind, config={}, hashes={"weights": "0" * 64})
    with space.artifact(space.path(*relative.split("/")), made):
        pass
    return root


# Which one


def test_given_then_named_then_here_then_the_bundled_one(tmp_path: Path, monkeypatch):
    monkeypatch.delenv(places.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    bundled = data_path("workspace").resolve()
    (only,) = places.found(None).values()
    assert only.root == bundled
    assert "ships with resa-lens" in only.why
    assert "no ./resa-workspace" in only.why
    (tmp_path / "resa-workspace").mkdir()
    here, other = places.found(None).values()
    assert (here.root, other.root) == (tmp_path / "resa-workspace", bundled)
    assert here.why == "./resa-workspace is here"
    monkeypatch.setenv(places.VARIABLE, "named")
    named = next(iter(places.found(None).values()))
    assert (named.root, named.why) == (tmp_path / "named", f"named by {places.VARIABLE}")
    given = next(iter(places.found("given").values()))
    assert (given.root, given.why) == (tmp_path / "given", "given with --workspace")
    # The bundled one itself is not offered twice.
    assert [place.root for place in places.found(str(bundled)).values()] == [bundled]


def test_the_argument_after_two_dashes():
    assert places.argument(["--workspace", "x", "--other"]) == "x"
    assert places.argument(["--workspace=x"]) == "x"
    assert places.argument([]) is None
    with pytest.raises(BadInputError, match="--workspace names no folder"):
        places.argument(["--workspace"])


# What is read of it


def test_a_folder_that_is_no_workspace_is_not_crawled(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(listing, "MOST_ENTRIES", 300)
    for folder in range(40):
        place = tmp_path / f"photos{folder}"
        place.mkdir()
        for file in range(20):
            (place / f"{file}.jpg").touch()
    fill(tmp_path)
    held = listing.scan(str(tmp_path))
    assert not held.whole
    # What resa-lens makes is looked at first, however much else there is.
    assert [a.relative for a in held.artifacts] == ["counts/m-0/r"]
    assert held.others[0] == "photos0"


def test_a_crowd_of_empty_folders_ends_too(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(listing, "MOST_ENTRIES", 200)
    for folder in range(400):
        (tmp_path / f"empty{folder}").mkdir()
    fill(tmp_path)
    opened = []
    scan = os.scandir
    monkeypatch.setattr(listing.os, "scandir", lambda path: opened.append(path) or scan(path))
    held = listing.scan(str(tmp_path))
    assert not held.whole
    assert [a.relative for a in held.artifacts] == ["counts/m-0/r"]
    assert len(opened) < 250


def test_a_file_in_another_ones_place_is_read_anew(tmp_path: Path):
    """Copies that keep times, as of an archive, keep the size too where only a digit differs."""
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    one.write_text('{"accuracy": 0.5, "n": 9, "ci": [0, 1]}')
    other.write_text('{"accuracy": 0.7, "n": 9, "ci": [0, 1]}')
    for file in (one, other):
        os.utime(file, ns=(10**18, 10**18))
    assert data.read(data.StoredScore, one).accuracy == 0.5
    other.replace(one)
    assert data.read(data.StoredScore, one).accuracy == 0.7


def test_deep_and_circular_folders_end(tmp_path: Path):
    deep = tmp_path / "a" / "b" / "c" / "d" / "e" / "f"
    deep.mkdir(parents=True)
    (deep / MANIFEST).write_text("{}")
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    held = listing.scan(str(tmp_path))
    assert (held.artifacts, held.problems, held.whole) == ((), (), True)


def test_nobody_is_told_to_remove_another_programs_file(tmp_path: Path):
    (tmp_path / "webapp").mkdir()
    (tmp_path / "webapp" / MANIFEST).write_text('{"name": "a web app"}')
    fill(tmp_path)
    (problem,) = listing.scan(str(tmp_path)).problems
    assert "webapp" in problem
    assert "left out" in problem
    assert "remove its folder" not in problem
    (tmp_path / "counts" / "m-0" / "r" / MANIFEST).write_text("[]")
    assert any("remove its folder" in text for text in listing.scan(str(tmp_path)).problems)


def test_newer_schemas_and_unknown_kinds_are_said(tmp_path: Path):
    fill(tmp_path)
    fill(tmp_path, "evals/e", "eval")
    edit(tmp_path / "counts" / "m-0" / "r" / MANIFEST, lambda m: m.update(schema_version=99))
    edit(tmp_path / "evals" / "e" / MANIFEST, lambda m: m.update(kind="dream"))
    newer, unknown = sorted(listing.scan(str(tmp_path)).problems)
    assert "has schema 99" in newer
    assert "kind 'dream' is unknown to this version; update resa-lens" in unknown


def test_unfinished_folders_say_how_far_and_who(tmp_path: Path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    work = tmp_path / "saes" / "m-0" / ".work-r"
    (work / "group-0" / "checkpoint-40").mkdir(parents=True)
    (work / "lock").write_text(str(os.getpid()))
    (tmp_path / "evals" / f".tmp-{ended.pid}-e").mkdir(parents=True)
    evals, saes = sorted(listing.scan(str(tmp_path)).under_way, key=lambda u: u.relative)
    assert saes.state == f"step 40; process {os.getpid()} is at work here"
    assert "half-written; no process is at work here" in evals.state
    assert (saes.folder, evals.folder) == ("saes", "evals")


def test_a_folder_without_permission(tmp_path: Path, monkeypatch):
    fill(tmp_path)
    real = os.scandir

    def scandir(path):
        if Path(path).name == "counts":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(listing.os, "scandir", scandir)
    (problem,) = listing.scan(str(tmp_path)).problems
    assert "counts cannot be read: Permission denied" in problem
    refuse = PermissionError(13, "Permission denied")
    monkeypatch.setattr(listing.os, "scandir", lambda path: (_ for _ in ()).throw(refuse))
    with pytest.raises(BadInputError, match="cannot be read: Permission denied"):
        listing.scan(str(tmp_path))


def test_an_artifact_that_goes_while_it_is_read(tmp_path: Path, monkeypatch):
    fill(tmp_path)
    real = listing._walk

    def walk(root):
        seen = real(root)
        shutil.rmtree(tmp_path / "counts")
        return seen

    monkeypatch.setattr(listing, "_walk", walk)
    held = listing.scan(str(tmp_path))
    assert (held.artifacts, held.problems) == ((), ())


# What the page says


@pytest.mark.parametrize(
    ("make", "said", "code"),
    [
        (lambda p: p / "absent", "There is no workspace at", "resa-lens demo --workspace"),
        (lambda p: (p / "e").mkdir() or p / "e", "is empty", "resa-lens demo --workspace"),
        (
            lambda p: (p / "home" / "music").mkdir(parents=True) or p / "home",
            "is not a workspace of resa-lens: it holds music and no artifact",
            "resa-lens demo --workspace resa-workspace",
        ),
        (
            lambda p: (p / "u" / "saes" / ".work-r").mkdir(parents=True) or p / "u",
            "1 unfinished folder(s)",
            "resa-lens demo --workspace",
        ),
    ],
)
def test_workspaces_with_nothing_to_show(tmp_path: Path, open_page, make, said: str, code: str):
    app = open_page(make(tmp_path), "overview")
    assert said in texts(app)
    assert code in app.code[0].value


def test_a_file_is_said_without_a_traceback(tmp_path: Path, open_page):
    (tmp_path / "file").touch()
    assert "is a file; pass a folder with --workspace" in texts(
        open_page(tmp_path / "file", "overview")
    )


def test_a_workspace_that_is_removed_while_the_app_is_open(tmp_path: Path, open_page):
    root = fill(tmp_path / "w")
    app = open_page(root, "overview")
    assert "counts" in str(app.dataframe[-1].value["kind"].tolist())
    shutil.rmtree(root)
    app.run()
    assert "There is no workspace at" in texts(app)


def test_an_error_of_ours_is_reported_and_shows_no_traceback(
    tmp_path: Path, open_page, monkeypatch
):
    from resa_lens.app import overview_page

    def fail(listing):
        raise ZeroDivisionError("the inside of it")

    monkeypatch.setattr(overview_page, "show", fail)
    app = open_page(fill(tmp_path), "overview")
    shown = "\n".join(element.value for element in app.text)
    assert shown.count("please report them") == 1
    # It still is an error: tests see it, and streamlit writes its traceback to the terminal.
    (error,) = app.exception
    assert "the inside of it" not in error.message
    assert not list(error.stack_trace)


def test_a_file_that_goes_while_a_page_reads_it(tmp_path: Path, open_page, monkeypatch):
    from resa_lens.app import overview_page

    monkeypatch.setattr(overview_page, "show", lambda listing: Path(tmp_path, "gone").read_text())
    assert "gone cannot be read: No such file or directory" in texts(
        open_page(fill(tmp_path), "overview")
    )


# How it starts


def test_the_app_imports_nothing_heavy():
    code = (
        "import sys, json\nimport resa_lens.app.explorer, resa_lens.app.overview_page\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    heavy = {"torch", "transformers", "transformer_lens", "sklearn", "datasets", "scipy.stats",
             "scipy.special", "scipy.optimize"}  # fmt: skip
    assert not heavy & loaded
    # The other pages wait until they are shown.
    assert "resa_lens.app.lab_page" not in loaded


def start(monkeypatch, *args: str) -> tuple[list[str], str, int]:
    """What `resa-lens app` would run, what it says, and its exit code."""
    run: list[list[str]] = []

    def execv(path: str, words: list[str]) -> None:
        run.append(words)
        raise SystemExit(0)

    monkeypatch.setattr(cli_workspace.os, "execv", execv)
    done = CliRunner().invoke(command, ["app", *args])
    return (run[0] if run else []), done.stderr, done.exit_code


def test_the_command_says_the_workspace_and_the_address_first(tmp_path: Path, monkeypatch):
    monkeypatch.delenv(places.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_workspace, "_taken", lambda port: "")
    words, said, code = start(monkeypatch, "--no-browser", "--workspace", "w")
    assert code == 0
    assert said.splitlines()[0] == f"workspace: {tmp_path / 'w'} (given with --workspace)"
    assert "http://localhost:8501" in said.splitlines()[1]
    assert "--server.address=localhost" in words
    assert "--server.headless=true" in words
    assert "--browser.gatherUsageStats=false" in words
    assert words[-3:] == ["--", "--workspace", "w"]
    words, said, _ = start(monkeypatch)
    assert "the example that ships with resa-lens" in said
    assert "--server.headless=false" in words
    assert "--" not in words


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        words, said, code = start(monkeypatch, "--port", str(port))
        assert (words, code) == ([], 2)
        assert f"port {port} is taken by another program" in said
        assert "leave it out for the next free one" in said
        monkeypatch.setattr(cli_workspace, "PORT", port)
        words, said, code = start(monkeypatch)
    assert code == 0
    assert f"port {port} is taken by another program; using {port + 1}" in said
    assert f"--server.port={port + 1}" in words


def test_who_holds_a_port_is_said_where_it_answers(monkeypatch):
    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

    monkeypatch.setattr(cli_workspace.urllib.request, "urlopen", lambda *a, **k: Answer())
    assert "perhaps another `resa-lens app`" in cli_workspace._holder(8501)


def test_without_streamlit_and_with_a_file(tmp_path: Path, monkeypatch):
    (tmp_path / "file").touch()
    _, said, code = start(monkeypatch, "--workspace", str(tmp_path / "file"))
    assert (code, "is a file" in said) == (2, True)
    monkeypatch.setattr(cli_workspace.importlib.util, "find_spec", lambda name: None)
    _, said, code = start(monkeypatch)
    assert (code, "pip install 'resa-lens[app]'" in said) == (2, True)


def test_settings_beside_the_script_hold_from_any_folder(tmp_path: Path):
    code = (
        "from streamlit import config\n"
        f"config._main_script_path = {str(SCRIPT)!r}\n"
        "config.get_config_options(force_reparse=True)\n"
        "print([config.get_option(n) for n in ('server.address', 'browser.gatherUsageStats', "
        "'server.showEmailPrompt', 'client.showErrorDetails')])"
    )
    env = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env,
        timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "['localhost', False, False, 'none']", done.stderr


def test_the_first_page_reads_a_large_workspace_soon(tmp_path: Path):
    made = Manifest(kind="eval", config={}, hashes={"weights": "0" * 64}).model_dump_json()
    for number in range(300):
        folder = tmp_path / "evals" / f"e{number:03}"
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text(made)
    before = state(tmp_path)
    assert len(listing.scan(str(tmp_path)).artifacts) == 300
    began = time.perf_counter()
    listing.scan(str(tmp_path))
    assert time.perf_counter() - began < 1.0
    assert state(tmp_path) == before
