"""Shared by all tests: one thread, no network, and one workspace from the demo."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from filelock import FileLock

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


@pytest.fixture(scope="session", autouse=True)
def small_starting_point() -> int:
    """Before each tuning fewer documents are looked at: it is most of a short tuning's time."""
    from resa_lens.stages import insertion

    tokens, insertion.SHORT_TOKENS = insertion.SHORT_TOKENS, 512
    return tokens


@pytest.fixture
def whole_starting_point(small_starting_point: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many documents as in a process of its own, where what that made is to be found."""
    from resa_lens.stages import insertion

    monkeypatch.setattr(insertion, "SHORT_TOKENS", small_starting_point)


@pytest.fixture(scope="session")
def cli():
    return run_cli


@dataclass(frozen=True)
class Demo:
    """The demo's workspace and what it printed as JSON."""

    workspace: Path
    result: dict[str, Any]
    stderr: str


def run_demo(workspace: Path) -> Demo:
    """`resa-lens demo --budget test`, about half a minute of a core."""
    # A machine that is shared may take ten times as long.
    done = run_cli(
        "demo", "--budget", "test", "--workspace", str(workspace), "--json", timeout=900
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Demo(workspace, json.loads(done.stdout), done.stderr)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Demo:
    """The demo, run once for all processes; each works on its own copy, which is as good."""
    workspace = tmp_path_factory.mktemp("demo") / "workspace"
    if worker_id == "master":
        return run_demo(workspace)
    # The folder above is that of this run of pytest, and of all of its processes.
    shared = tmp_path_factory.getbasetemp().parent / "shared-demo"
    output = shared / "output.json"
    with FileLock(f"{shared}.lock"):
        if not output.exists():
            made = run_demo(shared / "workspace")
            output.write_text(json.dumps([made.result, made.stderr]))
    shutil.copytree(shared / "workspace", workspace)
    old, new = str(shared / "workspace"), str(workspace)
    # What names its place: the command's output and the page.
    page = workspace / "report.html"
    page.write_text(page.read_text().replace(old, new))
    return Demo(workspace, *json.loads(output.read_text().replace(old, new)))


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in vLLM's place, for this process and for those that it starts."""
    if importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed: the recorded tests are of it")
    place = str(ROOT / "tests" / "support" / "fake_vllm")
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("PYTHONPATH", place, prepend=os.pathsep)


@pytest.fixture(scope="session")
def tiny():
    """The bundled model, plain; a test that changes it loads its own."""
    from resa_lens.models.host import load_model

    return load_model("tiny-reasoner")
