"""Time the main job against its targets: `python benchmarks/main_job.py`.

Targets (two CPU cores): demo under 600 s, `--help` under 1 s, recommend-layers with trained SAEs
under 30 s.  Whole processes, wall clock; prints a row a command and where the demo's time goes.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import typer

CLI = [sys.executable, "-c", "from resa_lens.cli import main; main()"]


def timed(*args: str) -> tuple[float, str]:
    """Return the seconds of one command and its stdout."""
    began = time.monotonic()
    done = subprocess.run([*CLI, *args], capture_output=True, text=True, check=True)
    return time.monotonic() - began, done.stdout


def main(budget: str = "full", runs: int = 5) -> None:
    """Print the figures as a table."""
    with tempfile.TemporaryDirectory() as folder:
        place = ["--workspace", f"{folder}/workspace"]
        demo, _ = timed("demo", "--budget", budget, *place, "--json")
        parts: dict[str, float] = {}
        for file in Path(folder).rglob("manifest.json"):
            manifest = json.loads(file.read_text())
            kind = manifest["kind"]
            parts[kind] = parts.get(kind, 0.0) + manifest["seconds"]
        recommend = [timed("recommend-layers", *place, "--force", "--json")[0] for _ in range(runs)]
        usage = [timed("--help")[0] for _ in range(runs)]
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"{'command':44} {'seconds':>9} {'target':>8}")
    rows = [
        (f"resa-lens demo --budget {budget} (1 run)", demo, 600.0),
        (f"recommend-layers, SAEs trained (median of {runs})", statistics.median(recommend), 30.0),
        (f"resa-lens --help (median of {runs})", statistics.median(usage), 1.0),
    ]
    for name, seconds, target in rows:
        print(f"{name:44} {seconds:9.2f} {target:8.0f}  {'met' if seconds < target else 'MISSED'}")
    print("of the demo:", ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in parts.items()))


if __name__ == "__main__":
    typer.run(main)
