"""Random kills over the commands, on one host and two, end in the artifacts of unkilled runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "kills.py"
QUICK = "train-saes,eval,eval of replicates,convert"
"""Of the commands, some whose runs take seconds; the others are in the recorded runs."""


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("kills", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "kills", module)
    spec.loader.exec_module(module)
    return module


def run(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "\n0 chains differ" in done.stdout
    assert "the time is over" not in done.stdout
    return done.stdout


def test_every_command_that_writes_can_be_killed(kills: Any) -> None:
    from resa_lens.cli import app

    command: Any = get_command(app)
    killed = {argv[0] for argv in kills.COMMANDS.values()}
    assert killed | {*kills.WITHOUT_FILES} == set(command.commands)
    assert not killed & {*kills.WITHOUT_FILES}


def test_every_command_is_one_that_the_command_line_takes(kills: Any) -> None:
    """Of this script and of the guard's, whose whole runs are recorded by hand."""
    from benchmarks import guard
    from resa_lens.cli import app

    command: Any = get_command(app)
    for name, *arguments in (*kills.READY, *kills.COMMANDS.values(), *guard.COMMANDS.values()):
        command.commands[name].make_context(name, list(arguments))


def test_a_difference_is_seen_and_seconds_are_none(kills: Any) -> None:
    def artifact(identity: str, seconds: str, weights: str) -> dict[str, Any]:
        files = {"results.json": seconds, "weights": weights}
        return {"evals/a": (identity, files, {"results.json": {"n": 1}, "weights": weights})}

    whole = artifact("i", "1 s", "w")
    assert kills.differences(whole, artifact("i", "2 s", "w")) == ([], 1, 1)
    for other in (artifact("j", "1 s", "w"), artifact("i", "1 s", "v"), {}):
        assert len(kills.differences(whole, other)[0]) == 1


@pytest.mark.slow
def test_six_random_kills_on_one_host_and_two_end_in_the_same_bits() -> None:
    out = run("--one", "2", "--two", "4", "--seed", "5", "--only", QUICK, "--interval", "0.1")
    assert [int(n) for n in re.findall(r"(\d+) kills and", out)] == [2, 4]


@pytest.mark.recorded
def test_sixty_random_kills_over_all_commands_end_in_the_same_bits() -> None:
    out = run("--one", "20", "--two", "40", "--seed", "1")
    assert [int(n) for n in re.findall(r"(\d+) kills and", out)] == [20, 40]
