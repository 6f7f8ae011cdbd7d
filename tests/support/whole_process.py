"""A command in a process of its own, and the most memory that it held."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

PROCESS = """
import sys
from pathlib import Path
from resa_lens.cli import main
sys.argv = ["resa-lens", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
print("peak", peak / 1024, file=sys.stderr)
"""


def run_whole(*options: str) -> tuple[dict[str, Any], float]:
    """Run a command on one thread with --json; return its object and its peak in MB."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, *options, "--threads", "1", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), float(done.stderr.rsplit("peak ", 1)[1])
