"""What a workspace cost: of each stage and in all, in USD where a device has a price.

Prices come from a table (data/prices.csv or the user's) or there are none; the paper's figures
stand beside.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resa_lens.artifacts.artifact import KINDS, Artifact
from resa_lens.artifacts.commands import kind_of
from resa_lens.artifacts.kinds.adapter import Adapter
from resa_lens.artifacts.kinds.eval import Eval
from resa_lens.artifacts.manifest import Manifest
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError, DamagedError
from resa_lens.files import named_path
from resa_lens.machine.meters import watt_hours
from resa_lens.models.files import hash_files
from resa_lens.resources import data_path
from resa_lens.texts.tables import read_rows


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
    prices = []
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
        prices.append(Price(str(row["device"]).strip(), price, *rest))
    return prices


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

    for device_name in (hardware, device):
        for price in prices:
            if device_name and plain(price.device) == plain(device_name):
                return price
    return None


def usd(cost: Mapping[str, Any], prices: Sequence[Price]) -> float | None:
    """Return what a stage cost, or None where its device has no price."""
    price = price_of(cost.get("hardware", ""), cost.get("device", ""), prices)
    if price is None:
        return None
    return price.usd_per_hour * cost["seconds"] / 3600 * cost.get("devices", 1)


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
        counted = sum(n for n in counted.values() if isinstance(n, int))  # by phase
    tokens = counted if isinstance(counted, int) else None
    processes = manifest.results.get("processes", 1)
    cost = {
        "seconds": manifest.seconds,
        "peak_rss_mb": manifest.peak_memory_mb,
        "device": manifest.device.split(":")[0],
        "devices": processes if isinstance(processes, int) else 1,
        "energy_not_readable": ["not recorded"],
        **manifest.cost,
    }
    if not isinstance(cost.get("tokens"), int):
        cost["tokens"] = tokens
    # A run that was killed and went on: what came before the last call was not metered.
    if manifest.cost and manifest.seconds > 1.05 * cost["seconds"] + 1:
        cost |= {"seconds": manifest.seconds, "joules": {}}
        cost["energy_not_readable"] = [
            *cost["energy_not_readable"],
            "not metered before a kill",
        ]
    return Spent(path, manifest.kind, cost)


def costs_of(workspace: Workspace, adapter: str | None) -> tuple[list[Spent], list[str]]:
    """Return the cost of everything, or of what an adapter took, and what cannot be read.

    Args:
        workspace: the workspace.
        adapter: the adapter's folder, or its name in adapters/.

    Raises:
        BadInputError: as `lineage_costs`.
    """
    problems: list[str] = []
    if adapter is None:
        return workspace_costs(workspace, problems=problems), problems
    named = named_path(adapter, "adapter")
    folder = named if named.exists() else workspace.path(Adapter.folder, adapter)
    return lineage_costs(workspace, folder, problems=problems), problems


def workspace_costs(workspace: Workspace, *, problems: list[str] | None = None) -> list[Spent]:
    """Return the cost of every artifact, the newest first.

    Args:
        workspace: the workspace.
        problems: takes a sentence for each artifact that cannot be read.
    """
    return [
        spent(artifact.relative, artifact.manifest)
        for artifact in workspace.artifacts(problems=problems)
        if artifact.manifest.kind not in OF_OTHERS
    ]


def lineage_costs(
    workspace: Workspace, folder: Path, *, problems: list[str] | None = None
) -> list[Spent]:
    """Return the cost of an adapter: its parents', its own, its evaluations' and the base's.

    An evaluation of the base counts where it asked the same as one of the adapter.  What also
    served others, as the SAEs of other layers in the same run, counts whole.

    Args:
        workspace: the workspace.
        folder: the adapter's.
        problems: takes a sentence for each parent that is missing, and each evaluation that cannot
            be read.

    Raises:
        BadInputError: no adapter of this project, or a damaged one.
    """
    adapter = workspace.read(folder)
    if adapter is None or adapter.manifest.kind != Adapter.name:
        raise BadInputError(f"{folder} is not an adapter that tune made (adapters/<run>)")
    chain: dict[str, Artifact] = {}
    waiting = [adapter]
    while waiting:
        artifact = waiting.pop(0)
        if artifact.relative in chain:
            continue
        chain[artifact.relative] = artifact
        for path in artifact.manifest.parents:
            parent = workspace.read(workspace.root / path)
            if parent and kind_of(path) is not parent.kind:
                raise DamagedError(f"{parent.path} is of kind {parent.manifest.kind}")
            if parent:
                waiting.append(parent)
            elif problems is not None and not Path(path).is_absolute():
                problems.append(f"{workspace.root / path} is missing: it counts nothing")
    base = str(adapter.manifest.config.get("base_hash"))
    own = hash_files([adapter.file("adapter_model.safetensors")])
    adapted = hashlib.sha256(f"{base}{own}".encode()).hexdigest()
    runs = workspace.artifacts(Eval, problems=problems)
    of_adapter = [run for run in runs if run.weights == adapted]
    questions = [_question_of(run.manifest) for run in of_adapter]
    of_base = [
        run for run in runs if run.weights == base and _question_of(run.manifest) in questions
    ]
    return [spent(a.relative, a.manifest) for a in (*chain.values(), *of_base, *of_adapter)]


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
    """Return one summary a kind of artifact, in the order of the work."""
    kinds = [*KINDS, *sorted({item.kind for item in items} - set(KINDS))]
    groups = {kind: [item for item in items if item.kind == kind] for kind in kinds}
    return [summary(kind, group, prices) for kind, group in groups.items() if group]


def in_papers_columns(items: Sequence[Spent], prices: Sequence[Price]) -> dict[str, Summary]:
    """Return training (of SAEs and adapters), evaluation, what the paper has not, and all."""
    training = [item for item in items if item.kind in TRAINING]
    evaluation = [item for item in items if item.kind in EVALUATION]
    other = [item for item in items if item.kind not in (*TRAINING, *EVALUATION)]
    parts = {"training": training, "evaluation": evaluation, "other": other, "total": list(items)}
    return {name: summary(name, part, prices) for name, part in parts.items()}


def used_prices(items: Sequence[Spent], prices: Sequence[Price]) -> list[Price]:
    """Return the prices that the artifacts' devices have, each once."""
    used = (price_of(i.cost.get("hardware", ""), i.cost["device"], prices) for i in items)
    return list(dict.fromkeys(price for price in used if price is not None))


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


def report(items: Sequence[Spent], prices: Sequence[Price]) -> dict[str, Any]:
    """Return the costs by stage, in the paper's columns and one by one, as JSON has them."""
    return {
        "stages": [asdict(stage) for stage in by_stage(items, prices)],
        **{name: asdict(part) for name, part in in_papers_columns(items, prices).items()},
        "artifacts": [asdict(item) for item in items],
        "prices": [asdict(price) for price in used_prices(items, prices)],
        "unpriced": unpriced(items, prices),
        "energy_not_readable": why_no_energy(items),
        "paper": paper_costs(),
    }
