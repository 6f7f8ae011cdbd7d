"""The benchmark scripts run at small shapes; a few real kills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import full_shape

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.recorded


def run(script: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *options],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_killed_runs_end_in_the_same_bits() -> None:
    # Twenty runs are recorded in docs/log.md; each is killed up to three times.
    out = run("kill_resume.py", "--runs", "1", "--seed", "7", "--tokens", "30720")
    assert out.count("bit-identical") == 1
    assert "DIFFERENT" not in out


def test_speed_of_a_step_and_of_a_whole_training() -> None:
    shape = ["--width", "64", "--latents", "256", "--k", "8", "--rounds", "2"]
    step = run("sae_speed.py", "step", *shape, "--tokens", "128", "--fvu-steps", "5")
    # At so small a shape no ratio means anything; that all were measured does.
    times = re.findall(r"^(?:resa-lens|sparsify|floor).* ([\d.]+) ms$", step, re.MULTILINE)
    assert len(times) == 5
    assert all(float(value) > 0 for value in times)
    assert "FVU on 512 fresh tokens" in step
    # Of 1,000 no number of heads of 64 is a divisor; 60 is narrower than one.
    many = run("sae_speed.py", "sweep", "--shapes", "64,256,8,128 60,251,8,64", "--rounds", "2")
    assert len(re.findall(r"^\| (?:64|60) \|", many, re.MULTILINE)) == 2
    assert many.count("the worst:") == 2
    shape[1] = "60"
    whole = run(
        "sae_speed.py", "end-to-end", *shape,
        "--n-layers", "3", "--steps", "2", "--batch", "2", "--sequence", "32", "--vocab", "128",
    )  # fmt: skip
    assert "all layers: sparsify / ours" in whole
    assert "floor with a bf16 product" in whole


def test_every_command_of_the_guide_at_a_small_shape(tmp_path: Path) -> None:
    shape = ["--layers", "3", "--width", "64", "--vocabulary", "2048", "--latents", "256"]
    table = run("full_shape.py", *shape, "--folder", str(tmp_path))
    commands = re.findall(r"^\| `([a-z-]+)[^`]*` \| 0 \|", table, re.MULTILINE)
    assert len(commands) == len(full_shape.COMMANDS)
    guide = (ROOT / "docs" / "how-to-r1-distill.md").read_text()
    assert {*commands} == {*re.findall(r"^resa-lens ([a-z-]+)", guide, re.MULTILINE)} - {"app"}


@pytest.mark.slow
def test_formats_are_written_for_the_peers(tmp_path: Path) -> None:
    assert "written" in run("check_formats.py", "write", str(tmp_path))
    assert len(list(tmp_path.rglob("sae_weights.safetensors"))) == 4
    assert len(list(tmp_path.rglob("ae.pt"))) == 4


@pytest.mark.slow
def test_tuning_against_the_authors_loop() -> None:
    shape = [
        "--width",
        "64",
        "--n-layers",
        "4",
        "--vocab",
        "500",
        "--tokens",
        "128",
        "--rounds",
        "2",
    ]
    out = run("tuning_speed.py", *shape, "--latents", "256", "--dropout", "0")
    # At so small a shape no ratio means anything; that both loops compute the same does.
    found = re.search(r"largest relative difference of a loss (\S+)", out)
    assert found is not None
    assert float(found[1]) < 1e-4
    assert len(re.findall(r"s an update", out)) == 3


def test_memory_of_the_chunked_kl() -> None:
    # The script itself ends with 1 where memory or gradients miss their targets.
    out = run("tuning_memory.py", "--vocab", "60000", "--tokens", "1024")
    assert out.count(": met") == 2


def test_waiting_for_the_app() -> None:
    if not Path("/usr/bin/chromium").exists():
        pytest.skip("/usr/bin/chromium is not installed; install chromium to time the app")
    out = run("app_speed.py", "--layers", "2", "--latents", "1024", "--rounds", "1")
    times = dict(re.findall(r"^(\S.*?) +([\d.]+) s", out, re.MULTILINE))
    assert len(times) == 16
    assert all(float(seconds) > 0 for seconds in times.values())


def test_all_parts_of_the_gpu_script_run_at_a_tiny_shape(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    done = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), str(table)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TINY": "1", "PYTHON": sys.executable},
        check=False,
    )
    assert done.returncode == 0, done.stderr + table.read_text()
    text = table.read_text()
    assert text.count("### ") == 8
    assert len(re.findall(r"^    ended after \d+ s$", text, re.MULTILINE)) >= 7
    assert "| k-th of all, by counting |" in text
    assert "| chunked, loss and gradients |" in text
    assert "| `doctor" in text
