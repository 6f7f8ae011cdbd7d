"""What a stage costs: time, tokens, peak memory, energy where it is readable, USD where priced.

    with cost.meter(device) as spent:
        ...
        spent.tokens = count
    manifest.cost = spent.to_dict()

Nothing is estimated: energy comes from counters of the hardware or is "not readable", with the
reason, and USD from a table of prices (data/prices.csv or the user's) or not at all.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resa_lens.energy import READ_ERRORS, Counter, gpu_counters, rapl_counters
from resa_lens.errors import BadInputError
from resa_lens.model_files import hash_files
from resa_lens.resources import data_path
from resa_lens.tables import read_rows
from resa_lens.workspace import KINDS, Manifest, Workspace, peak_memory_mb

INTERVAL_S = 0.5
"""Between two looks at memory and counters; a RAPL counter wraps after some minutes."""
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
def meter(device: str = "cpu", *, devices: int = 1, tokens: int | None = None) -> Iterator[Meter]:
    """Measure a block of work; the meter's figures are complete after it.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        devices: devices at work, all of one kind, of which this process drives one.
        tokens: read or written by the work, where that is known before.
    """
    counters, reason = rapl_counters()
    unreadable = (f"cpu: {reason}",) if reason else ()
    if device.startswith("cuda"):
        import torch

        found, reason = gpu_counters(str(torch.cuda.get_device_properties(device).uuid))
        counters = [*counters, *found]
        unreadable += (f"gpu: {reason}",) if reason else ()
    made = Meter(device, counters, unreadable, tokens, devices)
    for outer in _OPEN:
        if outer.on_gpu:
            outer.fold_cuda()
    made.start()
    _OPEN.append(made)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL_S):
            made.look()

    watcher = threading.Thread(target=watch, name="cost-meter", daemon=True)
    watcher.start()
    try:
        yield made
    finally:
        done.set()
        watcher.join()
        made.stop()
        _OPEN.remove(made)


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


# Prices


@dataclass(frozen=True)
class Price:
    """What an hour of one device costs."""

    device: str
    """A GPU's name as its driver gives it, a processor's, or "cpu" or "cuda" for any."""
    usd_per_hour: float
    source: str
    date: str


def read_prices(path: Path | None = None) -> list[Price]:
    """Read a table of prices: columns device, usd_per_hour, source, date.

    Args:
        path: a .csv (or .jsonl, .parquet) file; by default data/prices.csv.

    Raises:
        BadInputError: no such file, a column is missing, or a price is not a number of 0 or more.
    """
    path = path or data_path("prices.csv")
    made = []
    for number, row in enumerate(read_rows(path), start=1):
        if missing := {"device", "usd_per_hour"} - {k for k, v in row.items() if v is not None}:
            raise BadInputError(f"{path}, row {number} has no {sorted(missing)[0]}")
        try:
            price = float(row["usd_per_hour"])
        except (TypeError, ValueError):
            price = math.nan
        if not 0 <= price < math.inf:
            raise BadInputError(
                f"{path}, row {number}: usd_per_hour {row['usd_per_hour']!r} is no price; use a "
                "number of 0 or more"
            )
        rest = (str(row.get(key) or "not said") for key in ("source", "date"))
        made.append(Price(str(row["device"]).strip(), price, *rest))
    return made


def one_price(usd_per_hour: float) -> list[Price]:
    """Return a table with one price for every device: the user's.

    Raises:
        BadInputError: it is not a finite number.
    """
    if not 0 <= usd_per_hour < math.inf:
        raise BadInputError(f"--usd-per-hour {usd_per_hour} is no price; use a number of 0 or more")
    return [Price(kind, usd_per_hour, "as given", "now") for kind in ("cpu", "cuda")]


def price_of(hardware: str, device: str, prices: Sequence[Price]) -> Price | None:
    """Return the price of a device by its full name, else by its kind ("cpu", "cuda").

    A part of a name is no match: an H100 is sold as several products at several prices.
    """

    def plain(name: str) -> str:
        return " ".join(name.casefold().removeprefix("nvidia ").split())

    for wanted in (hardware, device):
        for price in prices:
            if wanted and plain(price.device) == plain(wanted):
                return price
    return None


def usd(cost: Mapping[str, Any], prices: Sequence[Price]) -> float | None:
    """Return what a stage cost, or None where its device has no price."""
    price = price_of(cost.get("hardware", ""), cost.get("device", ""), prices)
    if price is None:
        return None
    return price.usd_per_hour * cost["seconds"] / 3600 * cost.get("devices", 1)


def watt_hours(cost: Mapping[str, Any]) -> float | None:
    """Return the energy of all counters, or None where none was readable."""
    joules = cost.get("joules") or {}
    return sum(joules.values()) / JOULES_PER_WH if joules else None


# What a workspace cost

TRAINING, EVALUATION = ("saes", "adapter"), ("eval",)
"""Kinds of artifacts in the paper's two columns; its training includes that of the SAEs."""
OF_OTHERS = ("sweep", "model")
"""Kinds whose time is that of other artifacts, or of no stage."""


@dataclass(frozen=True)
class Spent:
    """What one artifact cost."""

    path: str
    kind: str
    cost: dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """What several artifacts cost together."""

    stage: str
    artifacts: int
    metered: int
    """How many were metered; the time of the others may be a part of theirs."""
    seconds: float
    tokens: int | None
    peak_rss_mb: float
    peak_cuda_mb: float | None
    watt_hours: float | None
    """Of those whose energy was readable."""
    energy_read: int
    """How many those are."""
    usd: float | None
    """None where a device of theirs has no price."""


def spent(path: str, manifest: Manifest) -> Spent:
    """Return an artifact's cost, of one that was not metered what its manifest holds else."""
    counted = manifest.results.get("tokens")
    if manifest.kind == "activity" and isinstance(counted, dict):
        counted = sum(counted.values())  # by phase
    tokens = counted if isinstance(counted, int) else None
    held = {
        "seconds": manifest.seconds,
        "peak_rss_mb": manifest.peak_memory_mb,
        "device": manifest.device.split(":")[0],
        "devices": manifest.results.get("processes", 1),
        "energy_not_readable": ["not recorded"],
        **manifest.cost,
    }
    if not isinstance(held.get("tokens"), int):
        held["tokens"] = tokens
    # A run that was killed and went on: what came before the last call was not metered.
    if manifest.cost and manifest.seconds > 1.05 * held["seconds"] + 1:
        held |= {"seconds": manifest.seconds, "joules": {}}
        held["energy_not_readable"] = [
            *held["energy_not_readable"],
            "not metered before a kill",
        ]
    return Spent(path, manifest.kind, held)


def workspace_costs(workspace: Workspace) -> list[Spent]:
    """Return the cost of every artifact, the newest first."""
    found = workspace.find("") if workspace.root.is_dir() else []
    return [
        spent(workspace.relative(folder), manifest)
        for folder, manifest in found
        if manifest.kind not in OF_OTHERS
    ]


def lineage_costs(workspace: Workspace, adapter: Path) -> list[Spent]:
    """Return the cost of an adapter: its parents', its own, its evaluations' and the base's.

    An evaluation of the base counts where it asked the same as one of the adapter.  What also
    served others, as the SAEs of other layers in the same run, counts whole.

    Raises:
        BadInputError: no adapter of this project.
    """
    manifest = workspace.manifest(adapter) if adapter.is_dir() else None
    if manifest is None or manifest.kind != "adapter":
        raise BadInputError(f"{adapter} is not an adapter that tune made (adapters/<run>)")
    chain: dict[str, Manifest] = {}
    waiting = [(workspace.relative(adapter), manifest)]
    while waiting:
        path, held = waiting.pop(0)
        if path in chain:
            continue
        chain[path] = held
        for parent in held.parents:
            if found := workspace.manifest(workspace.root / parent):
                waiting.append((parent, found))
    base = str(manifest.config.get("base_hash"))
    own = hash_files([adapter / "adapter_model.safetensors"])
    adapted = hashlib.sha256(f"{base}{own}".encode()).hexdigest()
    runs = [(workspace.relative(f), m) for f, m in workspace.find("evals", "eval")]
    of_adapter = {p: m for p, m in runs if m.hashes.get("weights") == adapted}
    asked = [_question_of(m) for m in of_adapter.values()]
    of_base = {
        p: m for p, m in runs if m.hashes.get("weights") == base and _question_of(m) in asked
    }
    return [spent(path, m) for path, m in {**chain, **of_base, **of_adapter}.items()]


def _question_of(manifest: Manifest) -> dict[str, Any]:
    return {key: value for key, value in manifest.config.items() if key not in ("model", "lora")}


def summary(stage: str, items: Sequence[Spent], prices: Sequence[Price]) -> Summary:
    """Sum the costs of artifacts; of memory the largest peak."""
    costs = [item.cost for item in items]
    tokens = [c["tokens"] for c in costs if c["tokens"] is not None]
    energies = [e for c in costs if (e := watt_hours(c)) is not None]
    cuda = [p for c in costs if (p := c.get("peak_cuda_mb")) is not None]
    amounts = [usd(c, prices) for c in costs]
    return Summary(
        stage=stage,
        artifacts=len(items),
        metered=sum(bool(c.get("cpu_seconds")) for c in costs),
        seconds=sum(c["seconds"] for c in costs),
        tokens=sum(tokens) if tokens else None,
        peak_rss_mb=max((c["peak_rss_mb"] for c in costs), default=0.0),
        peak_cuda_mb=max(cuda, default=None),
        watt_hours=sum(energies) if energies else None,
        energy_read=len(energies),
        usd=None if None in amounts else sum(a for a in amounts if a is not None),
    )


def by_stage(items: Sequence[Spent], prices: Sequence[Price]) -> list[Summary]:
    """Return one summary a kind of artifact, in the order of `KINDS`, the others last."""
    kinds = sorted({item.kind for item in items}, key=lambda k: ([*KINDS, k].index(k), k))
    return [summary(kind, [i for i in items if i.kind == kind], prices) for kind in kinds]


def in_papers_columns(items: Sequence[Spent], prices: Sequence[Price]) -> dict[str, Summary]:
    """Return training (of SAEs and adapters), evaluation, what the paper has not, and all."""
    training = [item for item in items if item.kind in TRAINING]
    evaluation = [item for item in items if item.kind in EVALUATION]
    other = [item for item in items if item.kind not in (*TRAINING, *EVALUATION)]
    parts = {"training": training, "evaluation": evaluation, "other": other, "total": list(items)}
    return {name: summary(name, part, prices) for name, part in parts.items()}


def used_prices(items: Sequence[Spent], prices: Sequence[Price]) -> list[Price]:
    """Return the prices that the artifacts' devices have, each once."""
    found = (price_of(i.cost.get("hardware", ""), i.cost["device"], prices) for i in items)
    return list(dict.fromkeys(price for price in found if price is not None))


def unpriced(items: Sequence[Spent], prices: Sequence[Price]) -> list[str]:
    """Return the devices that have no price."""
    return sorted(
        {
            item.cost.get("hardware") or item.cost["device"]
            for item in items
            if usd(item.cost, prices) is None
        }
    )


def why_no_energy(items: Sequence[Spent]) -> list[str]:
    """Return the reasons for which energy was not read, each once."""
    reasons = [r for item in items for r in item.cost.get("energy_not_readable", [])]
    return list(dict.fromkeys(reasons))


def paper_costs(path: Path | None = None) -> list[dict[str, Any]]:
    """Return the paper's Table 2 as printed: experiment, train_usd, eval_usd, total_usd."""
    with (path or data_path("paper/table2_cost.csv")).open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    keys = ("train_usd", "eval_usd", "total_usd")
    return [{"experiment": r["experiment"], **{k: float(r[k]) for k in keys}} for r in rows]
