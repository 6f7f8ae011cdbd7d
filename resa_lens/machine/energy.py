"""Counters of energy: RAPL of the processor, NVML or nvidia-smi of a GPU; never an estimate.

Written out rather than taken from a library of the field: those that were looked at estimate from
tables of powers where no counter is readable, or look up where they run over the network.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
READ_ERRORS = (OSError, ValueError, RuntimeError, subprocess.SubprocessError)
"""What reading a counter may raise; NVML's errors are made RuntimeErrors."""


@dataclass(frozen=True)
class Counter:
    """A counter of energy: of the whole device, whoever uses it."""

    name: str
    read: Callable[[], float]
    """Joules since some time in the past."""
    wraps_at: float | None = None
    """Where it starts again at 0; None: never."""

    def between(self, before: float, after: float) -> float:
        """Return the joules between two reads less than one wrap apart."""
        if after >= before or self.wraps_at is None:
            return after - before
        return after + self.wraps_at - before


def rapl_counters(root: Path = POWERCAP) -> tuple[list[Counter], str]:
    """Return the CPU packages' (and their memory's) counters, or why there are none."""
    counters, reason = [], "no RAPL counters here"
    for folder in sorted(root.glob("*rapl:*")) if root.is_dir() else ():
        try:
            name = (folder / "name").read_text().strip()
            # Cores and graphics are parts of their package, psys holds it; DRAM is besides.
            if not name.startswith(("package", "dram")):
                continue
            wraps_at = float((folder / "max_energy_range_uj").read_text()) / 1e6
            counter = Counter(f"cpu {folder.name} {name}", _microjoules(folder), wraps_at)
            counter.read()
        except (OSError, ValueError) as error:
            denied = isinstance(error, PermissionError)
            reason = "RAPL counters need root's permission" if denied else f"RAPL: {error}"
            continue
        counters.append(counter)
    return counters, "" if counters else reason


def _microjoules(folder: Path) -> Callable[[], float]:
    return lambda: float((folder / "energy_uj").read_text()) / 1e6


def gpu_counters(uuid: str) -> tuple[list[Counter], str]:
    """Return the counter of a GPU, by NVML or by sampling nvidia-smi's power, or why there is none.

    Args:
        uuid: as CUDA names the device, with or without "GPU-".
    """
    uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    reason = "neither pynvml nor nvidia-smi is here"
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        pynvml: Any = None
    if pynvml is not None:
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

            def joules() -> float:
                try:
                    return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
                except pynvml.NVMLError as error:
                    raise RuntimeError(f"NVML: {error}") from error

            joules()
            return [Counter("gpu", joules)], ""
        except (pynvml.NVMLError, RuntimeError) as error:
            reason = str(error)
    if program := shutil.which("nvidia-smi"):
        counter = Counter("gpu (power sampled)", _integral(_watts(program, uuid)))
        try:
            counter.read()
            return [counter], ""
        except READ_ERRORS as error:
            reason = f"nvidia-smi: {error}"
    return [], reason


def _watts(program: str, uuid: str) -> Callable[[], float]:
    command = [program, "-i", uuid, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]

    def read() -> float:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
        return float(done.stdout.strip())

    return read


def _integral(watts: Callable[[], float]) -> Callable[[], float]:
    """Turn a power into a counter of energy, by the trapezoid rule over its reads."""
    total, last = [0.0], [(time.monotonic(), math.nan)]

    def read() -> float:
        now, power = time.monotonic(), watts()
        then, before = last[0]
        if not math.isnan(before):
            total[0] += (now - then) * (before + power) / 2
        last[0] = (now, power)
        return total[0]

    return read
