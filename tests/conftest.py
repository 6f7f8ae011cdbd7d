"""Shared by all tests: one thread, no network, and one workspace from the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_cli(
    *args: str, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: int = 300
):
    """Run the command line in a process of its own; stdout, stderr and exit code come back."""
    command = [sys.executable, "-c", "from resa_lens.cli import main; main()", *args]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=timeout,
        env={**os.environ, "COLUMNS": "200", **(env or {})},
    )  # fmt: skip


@pytest.fixture(scope="session")
def cli():
    return run_cli


@dataclass(frozen=True)
class Demo:
    """The demo's workspace and what it printed as JSON."""

    workspace: Path
    result: dict[str, Any]
    stderr: str


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`resa-lens demo --budget test`, run once for the whole session."""
    workspace = tmp_path_factory.mktemp("demo") / "workspace"
    done = run_cli("demo", "--budget", "test", "--workspace", str(workspace), "--json")
    assert done.returncode == 0, done.stderr
    return Demo(workspace, json.loads(done.stdout), done.stderr)


@pytest.fixture(scope="session")
def tiny():
    """The bundled model, plain; a test that changes it loads its own."""
    from resa_lens.models.host import load_model

    return load_model("tiny-reasoner")
