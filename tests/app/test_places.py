"""Which workspace is opened, and what the app says of one that is none."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import kind_examples
import pytest
from app_driver import ROOT, SCRIPT, texts
from typer.testing import CliRunner

from resa_lens.app.places import argument
from resa_lens.artifacts.places import candidates
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app as command
from resa_lens.cli import start as cli_start
from resa_lens.errors import BadInputError
from resa_lens.machine import ports
from resa_lens.resources import VARIABLE, data_path


def fill(root: Path, relative: str = "counts/m-0/r", kind: str = "counts") -> Path:
    """A workspace with one artifact."""
    space = Workspace(root)
    made = kind_examples.manifest(kind, hashes={"weights": "0" * 64})
    with space.artifact(space.path(*relative.split("/")), made):
        pass
    return root


# Which one


def test_given_then_named_then_here_then_the_bundled_one(tmp_path: Path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    bundled = data_path("workspace").resolve()
    (only,) = candidates(None).values()
    assert only.root == bundled
    assert "ships with resa-lens" in only.why
    assert "no ./resa-workspace" in only.why
    (tmp_path / "resa-workspace").mkdir()
    here, other = candidates(None).values()
    assert (here.root, other.root) == (tmp_path / "resa-workspace", bundled)
    assert here.why == "./resa-workspace is here"
    monkeypatch.setenv(VARIABLE, "named")
    named = next(iter(candidates(None).values()))
    assert (named.root, named.why) == (tmp_path / "named", f"named by {VARIABLE}")
    given = next(iter(candidates("given").values()))
    assert (given.root, given.why) == (tmp_path / "given", "given with --workspace")
    # The bundled one itself is not offered twice.
    assert [place.root for place in candidates(str(bundled)).values()] == [bundled]


def test_the_argument_after_two_dashes():
    assert argument(["--workspace", "x", "--other"]) == "x"
    assert argument(["--workspace=x"]) == "x"
    assert argument([]) is None
    with pytest.raises(BadInputError, match="--workspace names no folder"):
        argument(["--workspace"])


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
    from resa_lens.app.overview import page as overview_page

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
    from resa_lens.app.overview import page as overview_page

    monkeypatch.setattr(overview_page, "show", lambda listing: Path(tmp_path, "gone").read_text())
    assert "gone cannot be read: No such file or directory" in texts(
        open_page(fill(tmp_path), "overview")
    )


# How it starts


def test_the_app_imports_nothing_heavy():
    code = (
        "import sys, json\nimport resa_lens.app.explorer, resa_lens.app.overview.page\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    heavy = {"torch", "transformers", "transformer_lens", "sklearn", "datasets", "scipy.stats",
             "scipy.special", "scipy.optimize"}  # fmt: skip
    assert not heavy & loaded
    # The other pages wait until they are shown.
    assert "resa_lens.app.lab.page" not in loaded


def test_the_first_page_is_shown_without_what_takes_long_to_load():
    # scipy.stats takes a second of a processor, which the first page's reader would wait for.
    code = (
        "import sys\nfrom streamlit.testing.v1 import AppTest\n"
        "app = AppTest.from_file('apps/feature_explorer.py', default_timeout=120).run()\n"
        "assert not app.exception and app.metric\n"
        "print(sorted({'torch', 'scipy.stats', 'scipy.optimize', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def start(monkeypatch, *args: str) -> tuple[list[str], str, int]:
    """What `resa-lens app` would run, what it says, and its exit code."""
    run: list[list[str]] = []

    def execv(path: str, words: list[str]) -> None:
        run.append(words)
        raise SystemExit(0)

    monkeypatch.setattr(ports.os, "execv", execv)
    done = CliRunner().invoke(command, ["app", *args])
    return (run[0] if run else []), done.stderr, done.exit_code


def test_the_command_says_the_workspace_and_the_address_first(tmp_path: Path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ports, "_taken", lambda port: "")
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
        monkeypatch.setattr(ports, "PORT", port)
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

    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: Answer())
    assert "perhaps another `resa-lens app`" in ports._holder(8501)


def test_without_streamlit_and_with_a_file(tmp_path: Path, monkeypatch):
    (tmp_path / "file").touch()
    _, said, code = start(monkeypatch, "--workspace", str(tmp_path / "file"))
    assert (code, "is a file" in said) == (2, True)
    monkeypatch.setattr(cli_start.importlib.util, "find_spec", lambda name: None)
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


def test_another_folder_is_opened_from_the_page_and_by_a_link(open_page, tmp_path: Path):
    other = fill(tmp_path / "other")
    app = open_page(data_path("workspace"), "overview")
    app.text_input(key="workspace").set_value(str(other)).run()
    assert f"workspace: {other}\n(opened here)" in texts(app)
    assert f"workspace: {other}" in texts(open_page(tmp_path, "layers", workspace=str(other)))
    file = tmp_path / "file"
    file.write_text("x")
    wrong = open_page(data_path("workspace"), "overview", workspace=str(file))
    assert "is a file; pass a folder" in texts(wrong)
    assert f"workspace: {data_path('workspace')}" in texts(wrong)
