"""What a stage takes: time, tokens, peak memory, and energy where it is readable.

    with meter(device) as spent:
        ...
        spent.tokens = count
    manifest.cost = spent.to_dict()

Nothing is estimated: energy comes from counters of the hardware or is "not readable", with the
reason.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from resa_lens.machine.energy import READ_ERRORS, Counter, gpu_counters, rapl_counters

INTERVAL_S = 0.5
"""Between two looks at memory and counters; a RAPL counter wraps after some minutes."""
KEEP_S = 5.0
"""Between two records of what a work has taken so far: what a kill takes from its cost at most."""
JOULES_PER_WH = 3600.0


@dataclass
class Meter:
    """Measures from `start` to `stop`; what it holds in between is what was seen so far."""

    device: str = "cpu"
    counters: Sequence[Counter] = ()
    unreadable: tuple[str, ...] = ()
    """Why energy of the CPU or the GPU is not among the counters."""
    tokens: int | None = None
    """Set by the stage; None where it reads none."""
    devices: int = 1
    """Devices at work, all of one kind, of which this process drives one."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss_mb: float = 0.0
    peak_cuda_mb: float | None = None
    joules: dict[str, float] = field(default_factory=dict)
    _began: tuple[float, float, float] = (0.0, 0.0, 0.0)
    _reads: dict[str, float] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    @property
    def on_gpu(self) -> bool:
        """Whether the work is done on a CUDA device."""
        return self.device.startswith("cuda")

    def start(self) -> None:
        """Begin to count."""
        if self.on_gpu:
            import torch

            self.peak_cuda_mb = 0.0
            torch.cuda.reset_peak_memory_stats(self.device)
        self._began = (time.perf_counter(), time.process_time(), peak_memory_mb())
        self._reads = {counter.name: counter.read() for counter in self.counters}
        self.joules = dict.fromkeys(self._reads, 0.0)
        self.look()

    def look(self) -> None:
        """Take in what has happened since the last look."""
        with self._lock:
            began, cpu, _ = self._began
            self.seconds = time.perf_counter() - began
            self.cpu_seconds = time.process_time() - cpu
            self.peak_rss_mb = max(self.peak_rss_mb, _resident_mb())
            if self.on_gpu:
                self.fold_cuda()
            for counter in self.counters:
                try:
                    now = counter.read()
                except READ_ERRORS as error:
                    # A gap would be taken for no energy.
                    self.joules.pop(counter.name, None)
                    self.counters = [c for c in self.counters if c is not counter]
                    self.unreadable += (f"{counter.name} failed on the way: {error}",)
                    continue
                self.joules[counter.name] += counter.between(self._reads[counter.name], now)
                self._reads[counter.name] = now

    def fold_cuda(self) -> None:
        """Take in the peak of the GPU's memory before somebody resets it."""
        import torch

        peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        self.peak_cuda_mb = max(self.peak_cuda_mb or 0.0, peak)

    def stop(self) -> None:
        """Take in the last stretch."""
        self.look()
        # The process's own mark is exact, but it is of this stretch only where it rose in it.
        if (mark := peak_memory_mb()) > self._began[2]:
            self.peak_rss_mb = max(self.peak_rss_mb, mark)

    def to_dict(self) -> dict[str, Any]:
        """Return the values for a manifest."""
        return {
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "tokens": self.tokens,
            "peak_rss_mb": round(self.peak_rss_mb, 1),
            "peak_cuda_mb": None if self.peak_cuda_mb is None else round(self.peak_cuda_mb, 1),
            "joules": {name: round(value, 3) for name, value in self.joules.items()},
            "energy_not_readable": list(self.unreadable),
            "device": self.device.split(":")[0],
            "hardware": hardware_name(self.device),
            "devices": self.devices,
        }


_OPEN: list[Meter] = []
"""The meters at work, the outermost first: an inner one resets the peak that an outer one reads."""


@contextmanager
def meter(
    device: str = "cpu",
    *,
    devices: int = 1,
    tokens: int | None = None,
    keep: Callable[[Meter], None] = lambda running: None,
) -> Iterator[Meter]:
    """Measure a block of work; the meter's figures are complete after it.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        devices: devices at work, all of one kind, of which this process drives one.
        tokens: read or written by the work, where that is known before.
        keep: called every `KEEP_S`, by another thread, with what was seen so far.
    """
    counters, reason = rapl_counters()
    unreadable = (f"cpu: {reason}",) if reason else ()
    if device.startswith("cuda"):
        import torch

        gpu, reason = gpu_counters(str(torch.cuda.get_device_properties(device).uuid))
        counters = [*counters, *gpu]
        unreadable += (f"gpu: {reason}",) if reason else ()
    running = Meter(device, counters, unreadable, tokens, devices)
    for outer in _OPEN:
        if outer.on_gpu:
            outer.fold_cuda()
    running.start()
    _OPEN.append(running)
    done = threading.Event()

    def watch() -> None:
        kept = 0.0
        while not done.wait(INTERVAL_S):
            running.look()
            if running.seconds - kept >= KEEP_S:
                kept = running.seconds
                keep(running)

    watcher = threading.Thread(target=watch, name="cost-meter", daemon=True)
    watcher.start()
    try:
        yield running
    finally:
        done.set()
        watcher.join()
        running.stop()
        _OPEN.remove(running)


def _resident_mb() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0  # not Linux: the process's mark alone
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def hardware_name(device: str) -> str:
    """Return what the device is, as its driver or the processor names it."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def combined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the cost of parts done one after another: sums, and the largest peak.

    Energy that one part could not read is not known of the whole.
    """
    parts = [part for part in parts if part]
    if not parts:
        return {}
    peaks = {
        key: max(known) if (known := [p[key] for p in parts if p.get(key) is not None]) else None
        for key in ("peak_rss_mb", "peak_cuda_mb")
    }
    tokens = [p["tokens"] for p in parts if p.get("tokens") is not None]
    names = set.intersection(*(set(p.get("joules", {})) for p in parts))
    reasons = [reason for p in parts for reason in p.get("energy_not_readable", [])]
    if not names and not reasons:
        reasons = ["not recorded"]
    return {
        **parts[-1],
        **peaks,
        "seconds": round(sum(p.get("seconds", 0.0) for p in parts), 3),
        "cpu_seconds": round(sum(p.get("cpu_seconds", 0.0) for p in parts), 3),
        "tokens": sum(tokens) if tokens else None,
        "joules": {n: round(sum(p["joules"][n] for p in parts), 3) for n in sorted(names)},
        "energy_not_readable": list(dict.fromkeys(reasons)),
    }


@dataclass
class Work:
    """A piece of work that is metered but for the works within it, which are metered themselves."""

    device: str
    devices: int
    keep: Callable[[dict[str, Any]], None] = lambda cost: None
    """Called now and then, and at the end of a stretch, with what it cost so far."""
    parts: list[dict[str, Any]] = field(default_factory=list)
    """What its stretches cost, those of earlier processes before them."""
    _stretch: ExitStack = field(default_factory=ExitStack)
    _meter: Meter | None = None

    def go_on(self) -> None:
        """Begin a stretch."""
        self._meter = self._stretch.enter_context(
            meter(
                self.device,
                devices=self.devices,
                keep=lambda running: self.keep(combined([*self.parts, running.to_dict()])),
            )
        )

    def pause(self) -> None:
        """End the stretch."""
        self._stretch.close()
        if self._meter is not None:
            self.parts.append(self._meter.to_dict())
            self.keep(self.cost())

    def cost(self) -> dict[str, Any]:
        """Return what the work cost, once it is over."""
        return combined(self.parts)


class Works:
    """The works that a process is at, one within another: each second is one work's alone."""

    def __init__(self) -> None:
        self._open: list[Work] = []

    @contextmanager
    def meter(
        self,
        device: str = "cpu",
        *,
        devices: int = 1,
        before: Mapping[str, Any] = MappingProxyType({}),
        keep: Callable[[dict[str, Any]], None] = lambda cost: None,
    ) -> Iterator[Work]:
        """Meter a work as `meter` does, and none that it stands in meanwhile.

        Args:
            device: as of `meter`.
            devices: as of `meter`.
            before: what the work cost in earlier processes, as `keep` was called with it.
            keep: called now and then with what it cost so far, by another thread too.
        """
        work = Work(device, devices, keep, [dict(before)] if before else [])
        for outer in self._open[-1:]:
            outer.pause()
        self._open.append(work)
        work.go_on()
        try:
            yield work
        finally:
            work.pause()
            self._open.remove(work)
            for outer in self._open[-1:]:
                outer.go_on()


def watt_hours(cost: Mapping[str, Any]) -> float | None:
    """Return the energy of all counters, or None where none was readable."""
    joules = cost.get("joules") or {}
    return sum(joules.values()) / JOULES_PER_WH if joules else None


def peak_memory_mb() -> float:
    """Return the process's peak resident memory in MB."""
    import resource

    # Linux' ru_maxrss begins at the size of the process that started this one.
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        mark = next(line for line in lines if line.startswith("VmHWM:"))
        return round(int(mark.split()[1]) / 1024, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 if sys.platform != "darwin" else 1024**2), 1)
