"""The benchmark of the verdict at few draws; its 200 draws stand in docs/findings.md."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "verdict_power.py"


@pytest.fixture(scope="module")
def benchmark_script():
    spec = importlib.util.spec_from_file_location("verdict_power", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["verdict_power"] = module
    spec.loader.exec_module(module)
    return module


def test_profiles_are_what_their_names_say(benchmark_script):
    rng = np.random.default_rng(0)
    by = {scenario.name: scenario.draw(rng, 4000) for scenario in benchmark_script.scenarios()}
    planted = by["planted, 150"]
    assert (planted.sum(axis=1) == 150).all()
    assert set((np.sort(planted.mean(axis=0).argsort()[-3:]) + 1).tolist()) == {5, 14, 23}
    for name, ratio in (("flat, 150", 25 / 26), ("clumped noise, variance/mean 2, 150", 2.0),
                        ("clumped noise, variance/mean 4, 150", 4.0)):  # fmt: skip
        assert by[name].mean() == pytest.approx(150 / 26, rel=0.02)
        assert (by[name].var(axis=0) / by[name].mean(axis=0)).mean() == pytest.approx(
            ratio, rel=0.05
        )
    trend = by["linear trend 1 to 3, 150"].mean(axis=0)
    assert trend[-1] / trend[0] == pytest.approx(3.0, rel=0.1)
    # Wandering: no layer is special over the draws, but neighbours go together within one.
    wandering = by["wandering rates (2 layers, sd 0.5), 150"]
    assert np.ptp(wandering.mean(axis=0)) < 1.0
    assert np.corrcoef(wandering[:, 10], wandering[:, 11])[0, 1] > 0.3
    assert by["planted in proportion, 150, 10 layers"].shape == (4000, 10)


@pytest.mark.recorded
def test_the_script_meets_its_targets_at_few_draws():
    for only in ("flat, 150", "planted, 150", "clumped noise, variance/mean 4"):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "--draws", "60", "--null-draws", "99", "--only", only],
            capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        assert "targets: met" in done.stdout
        rows = [line for line in done.stdout.splitlines() if line.startswith(f"| {only}")]
        assert rows
        for row in rows:
            hits = int(row.split("|")[3].split()[0])
            assert hits >= 55 if only.startswith("planted") else hits <= 7
