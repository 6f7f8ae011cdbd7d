"""What this machine has: memory, cores and the instructions that matter; without torch."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path

MB = 2**20
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""Those that change how fast SAEs train on a CPU; the last two are ARM's."""


def available_mb() -> float:
    """Return the MB that this process may still take."""
    free = _meminfo()
    limit, used = _cgroup()
    free = free if limit is None else min(free, limit - used)
    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    if addresses != resource.RLIM_INFINITY and (statm := Path("/proc/self/statm")).exists():
        pages = int(statm.read_text().split()[0])
        free = min(free, (addresses - pages * os.sysconf("SC_PAGE_SIZE")) / MB)
    return free


def _meminfo() -> float:
    file = Path("/proc/meminfo")
    if not file.exists():
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages / MB
    for line in file.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _cgroup() -> tuple[float | None, float]:
    """Return the container's limit and use in MB, (None, 0) where there is none."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        if Path(limit).exists() and Path(used).exists():
            text = Path(limit).read_text().strip()
            if text.isdigit() and int(text) < 2**60:
                return int(text) / MB, int(Path(used).read_text()) / MB
    return None, 0.0


def cores() -> int:
    """Return the CPU cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed or 1, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no container, or one without a quota
    return allowed or 1


def processor() -> tuple[str, tuple[str, ...]]:
    """Return the processor's name and which of `INSTRUCTIONS` it has."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []  # not Linux
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    return name, tuple(word for word in INSTRUCTIONS if word in flags)


def nvidia_driver() -> str | None:
    """Return the version of the NVIDIA driver, or None where there is none."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
