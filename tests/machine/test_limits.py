"""Limits of the machine: every command works within them, or ends with one line that names them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from resa_lens.errors import BadInputError
from resa_lens.evals.tasks import parse_tasks
from resa_lens.files import LONGEST_PATH, named_path
from resa_lens.models.host import load_model
from resa_lens.resources import ROOM, data_path, workspace_folder
from resa_lens.saes.hub import find_sae_folder
from resa_lens.texts.prompts import resolve_system_prompt
from resa_lens.texts.tables import read_rows

PACKAGE = Path(__file__).resolve().parents[2] / "resa_lens"
EVAL = ("eval", "--limit", "2", "--max-new-tokens", "4")
LONG_NAMES = {
    "name": "n" * 256,
    "bytes": "ü" * 128,
    "path": "/tmp" + "/d" * 2100,
    "below": f"{'n' * 300}/model",
}


def limited(workspace: Path, *args: str, ulimit: str = "", **variables: str | None):
    """Run a command in a process of its own, under a limit and other variables."""
    code = "from resa_lens.cli import main; main()"
    command = shlex.join([sys.executable, "-c", code, *args, "--workspace", str(workspace)])
    env = {**os.environ, "COLUMNS": "200", **variables}
    return subprocess.run(
        ["bash", "-c", f"{ulimit}\n{command}"], capture_output=True, text=True, timeout=1200,
        env={name: value for name, value in env.items() if value is not None},
    )  # fmt: skip


def error_of(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr[-2000:]
    error = done.stderr[done.stderr.index("error: ") :]
    assert len(error.strip().splitlines()) <= 3, error
    assert "Traceback" not in done.stderr
    return error


# Names and paths


@pytest.mark.parametrize("name", LONG_NAMES.values(), ids=LONG_NAMES)
def test_a_name_or_path_that_is_too_long(name: str) -> None:
    for read in (
        workspace_folder, load_model, find_sae_folder, lambda n: read_rows(Path(n)), named_path,
        lambda n: resolve_system_prompt("@" + n),
    ):  # fmt: skip
        with pytest.raises(BadInputError, match="at most 255 bytes") as raised:
            read(name)
        assert len(str(raised.value)) < 300


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a\0b"])
def test_a_path_that_is_none(name: str) -> None:
    for read in (workspace_folder, load_model, find_sae_folder, lambda n: read_rows(Path(n))):
        with pytest.raises(BadInputError, match=r"cannot be reached|not found|does not exist"):
            read(name)


def test_a_circle_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(BadInputError, match="workspace"):
        workspace_folder(tmp_path / "a")


def test_users_paths_are_read_in_one_place() -> None:
    """`expanduser` and `exists` raise for some names, which is thought of once."""
    places = [
        file.name for file in PACKAGE.rglob("*.py") if ".expanduser()" in file.read_text()
    ]  # fmt: skip
    assert places == ["files.py"]


def test_a_list_of_tasks_may_be_longer_than_a_name() -> None:
    text = "tiny:families=" + "+".join(f"family{i}" for i in range(100))
    assert len(text) > 255
    (spec,) = parse_tasks(text)
    assert spec.families is not None
    assert len(spec.families) == 100


def test_a_workspace_that_leaves_no_room_for_its_files(tmp_path: Path) -> None:
    deep = tmp_path / "/".join(["d" * 100] * ((LONGEST_PATH - ROOM) // 101))
    with pytest.raises(BadInputError, match="leaves no room"):
        workspace_folder(deep)
    assert workspace_folder(tmp_path / "/".join(["d" * 100] * 10))


@pytest.mark.parametrize("length", [81, 255])
def test_a_models_long_name_becomes_a_short_folder_name(tmp_path: Path, length: int) -> None:
    folder = tmp_path / ("m" * length)
    shutil.copytree(data_path("tiny-reasoner"), folder)
    slug = load_model(str(folder)).slug
    assert re.fullmatch(r"m{80}-[0-9a-f]{8}", slug)


@pytest.mark.parametrize(
    "args",
    [
        ("runs", "--workspace", LONG_NAMES["name"]),
        ("doctor", "--model", LONG_NAMES["path"]),
        (*EVAL, "--adapter", LONG_NAMES["name"]),
        (*EVAL, "--tasks", LONG_NAMES["path"]),
        ("train-saes", "--data", LONG_NAMES["name"]),
        ("count-features", "--saes", LONG_NAMES["bytes"]),
        ("compare", LONG_NAMES["name"], "b"),
        ("fit-mixture", LONG_NAMES["path"], "--column", "a"),
        ("merge", LONG_NAMES["name"], "-m", "tiny-reasoner", "--adapter", "x"),
        ("convert", LONG_NAMES["name"], "b", "--to", "saelens"),
    ],
    ids=lambda args: args[0],
)
def test_commands_name_what_is_too_long(args: tuple[str, ...]) -> None:
    from typer.testing import CliRunner

    from resa_lens.cli import app

    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 2, result.exception
    assert "too long" in result.stderr
    assert len(result.stderr[result.stderr.index("error: ") :].strip().splitlines()) <= 3


# Open files and addresses


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ("runs",),
        ("doctor", "--model", "tiny-reasoner"),
        (*EVAL, "--chat-template"),
        ("train-saes", "--layers", "3-5", "--tokens", "512", "--latents", "64"),
    ],
    ids=lambda args: args[0],
)
def test_64_open_files_are_enough(tmp_path: Path, args: tuple[str, ...]) -> None:
    done = limited(tmp_path / "w", *args, ulimit="ulimit -n 64")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("kilobytes", "args"),
    [(200_000, ("runs",)), (200_000, EVAL), (500_000, EVAL), (1_000_000, EVAL)],
    ids=["200 MB runs", "200 MB eval", "500 MB eval", "1 GB eval"],
)
def test_too_few_addresses(tmp_path: Path, kilobytes: int, args: tuple[str, ...]) -> None:
    done = limited(tmp_path / "w", *args, ulimit=f"ulimit -v {kilobytes}")
    error = error_of(done, 1)
    assert f"{kilobytes // 1024} MB of addresses" in error
    assert "ulimit -v" in error


@pytest.mark.parametrize("kilobytes", [400_000, 1_000_000])
def test_doctor_names_too_few_addresses(tmp_path: Path, kilobytes: int) -> None:
    done = limited(tmp_path / "w", "doctor", ulimit=f"ulimit -v {kilobytes}")
    assert done.returncode == 1, done.stderr[-2000:]
    assert "raise ulimit -v" in done.stdout


@pytest.mark.slow
def test_two_gigabytes_of_addresses_are_enough(tmp_path: Path) -> None:
    done = limited(tmp_path / "w", *EVAL, "--chat-template", ulimit="ulimit -v 2000000")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(24, "Too many open files"), "raise ulimit -n"),
        (ImportError("libx.so: cannot open shared object file: Too many open files"), "ulimit -n"),
        (OSError(36, "File name too long", "x" * 300), "too long"),
        (MemoryError(), "no memory is left"),
        (OSError(12, "Cannot allocate memory"), "no memory is left"),
        (ImportError("libx.so: failed to map segment from shared object"), "no memory is left"),
        (RuntimeError("can't start new thread"), "no memory is left"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "no memory"),
        (BadInputError("the value x"), "the value x"),
    ],
    ids=lambda value: (
        f"{type(value).__name__} {value}"[:40] if isinstance(value, Exception) else ""
    ),
)
def test_a_limit_met_anywhere_is_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from resa_lens.machine.exits import limits

    with pytest.raises(SystemExit) as ended, limits():
        raise error
    assert ended.value.code == (2 if isinstance(error, BadInputError) else 1)
    said = capsys.readouterr().err
    assert line in said
    assert len(said.splitlines()) == 1
    assert len(said) < 200


def test_a_panic_of_a_compiled_library_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    from resa_lens.machine.exits import limits

    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(SystemExit) as ended, limits():
        tokenizer.encode("a" * 40 + "b")
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "error: a compiled library gave up" in error
    with pytest.raises(KeyboardInterrupt), limits():
        raise KeyboardInterrupt


def test_other_errors_keep_their_traceback() -> None:
    from resa_lens.machine.exits import limits

    with pytest.raises(RuntimeError, match="a mistake"), limits():
        raise RuntimeError("a mistake")


# Home, temporary files and caches


PLACES: list[dict[str, str | None]] = [
    {"HOME": None}, {"HOME": "/nonexistent"}, {"HOME": "/proc"}, {"HOME": ""},
    {"TMPDIR": "/nonexistent"}, {"TMPDIR": "/proc"}, {"XDG_CACHE_HOME": "/proc"},
    {"HF_HOME": "/proc", "HF_HUB_CACHE": "/proc/hub"},
]  # fmt: skip
IN_CI = ({"HOME": None}, {"TMPDIR": "/proc"}, {"XDG_CACHE_HOME": "/proc"})
"""Of those, where a model answers too; the others are recorded."""


@pytest.mark.parametrize(
    ("args", "variables"),
    [
        *((("runs",), place) for place in PLACES),
        *(
            pytest.param(
                EVAL, place, marks=pytest.mark.slow if place in IN_CI else pytest.mark.recorded
            )
            for place in PLACES
        ),
    ],
    ids=str,
)
def test_no_home_temporary_folder_or_cache(
    tmp_path: Path, args: tuple[str, ...], variables: dict[str, str | None]
) -> None:
    done = limited(tmp_path / "w", *args, **variables)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("variables", PLACES[:1] + PLACES[-2:], ids=str)
def test_doctor_without_home_or_cache(tmp_path: Path, variables: dict[str, str | None]) -> None:
    done = limited(tmp_path / "w", "doctor", "--model", "tiny-reasoner", **variables)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_workspace_below_a_home_that_is_not(tmp_path: Path) -> None:
    done = limited(tmp_path, "runs", "--workspace", "~/w", HOME="/nonexistent")
    assert done.returncode in (0, 2), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
