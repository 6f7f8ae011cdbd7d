"""Cost: the meter against known work, energy counters that wrap, prices, sums along a lineage."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from resa_lens.artifacts import costs as cost
from resa_lens.artifacts.costs import (
    Price,
    lineage_costs,
    paper_costs,
    price_of,
    read_prices,
    summary,
    usd,
    workspace_costs,
)
from resa_lens.artifacts.manifest import Manifest
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError
from resa_lens.files import write_json
from resa_lens.machine import energy, meters
from resa_lens.machine.energy import Counter, gpu_counters, rapl_counters
from resa_lens.machine.meters import combined, meter
from resa_lens.resources import data_path

MB = 2**20


@pytest.fixture(autouse=True)
def no_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine can read must not decide the tests."""
    monkeypatch.setattr(meters, "rapl_counters", lambda: ([], "no RAPL counters here"))


# Meter


def test_time_tokens_and_cpu_time_of_known_work() -> None:
    with meter() as spent:
        began = time.process_time()
        while time.process_time() - began < 0.2:
            pass
        time.sleep(0.3)
        spent.tokens = 17
    held = spent.to_dict()
    assert held["seconds"] >= 0.5
    assert 0.2 <= held["cpu_seconds"] < held["seconds"]
    assert (held["tokens"], held["device"], held["devices"]) == (17, "cpu", 1)
    assert held["joules"] == {}
    assert held["energy_not_readable"] == ["cpu: no RAPL counters here"]
    assert held["peak_cuda_mb"] is None
    assert json.loads(json.dumps(held)) == held


THREE_STAGES = """
import json, time
from resa_lens.machine.meters import meter
MB, peaks = 2**20, []
for megabytes in (300, 0, 500):
    with meter() as spent:
        block = bytearray(b"1") * (megabytes * MB)
        del block
    peaks.append(spent.peak_rss_mb)
print(json.dumps(peaks))
"""


def test_peak_memory_is_the_stages_own_and_not_an_earlier_ones() -> None:
    """In a process of its own: where the mark stands already decides what it can show."""
    done = subprocess.run(
        [sys.executable, "-c", THREE_STAGES], capture_output=True, text=True, check=True
    )
    large, small, larger = json.loads(done.stdout)
    assert small < large - 280
    assert larger - small > 480


def test_a_peak_below_the_processs_mark_is_seen_by_sampling(monkeypatch) -> None:
    monkeypatch.setattr(meters, "INTERVAL_S", 0.02)
    block = bytearray(b"\1") * (600 * MB)
    del block
    with meter() as spent:
        before = spent.peak_rss_mb
        block = bytearray(b"\1") * (200 * MB)
        time.sleep(0.2)
        del block
    assert 150 < spent.peak_rss_mb - before < 300


def test_a_failing_stage_leaves_no_meter_at_work() -> None:
    import threading

    with pytest.raises(ValueError, match="stage"), meter() as spent:
        raise ValueError("stage")
    assert spent.seconds > 0
    assert meters._OPEN == []
    assert not [t for t in threading.enumerate() if t.name == "cost-meter"]


def test_parts_of_a_resumed_stage_are_summed_and_their_peaks_are_not() -> None:
    first = {
        "seconds": 2.0, "cpu_seconds": 1.0, "tokens": 100, "peak_rss_mb": 900.0,
        "peak_cuda_mb": None, "joules": {"cpu": 10.0, "gpu": 5.0}, "energy_not_readable": [],
        "device": "cpu", "hardware": "A", "devices": 1,
    }  # fmt: skip
    second = {**first, "seconds": 3.0, "tokens": 50, "peak_rss_mb": 700.0, "joules": {"cpu": 1.0}}
    both = combined([first, {}, second])
    assert (both["seconds"], both["cpu_seconds"], both["tokens"]) == (5.0, 2.0, 150)
    assert both["peak_rss_mb"] == 900
    assert both["joules"] == {"cpu": 11.0}, "energy that one part did not read is not known"
    assert combined([]) == {}
    assert combined([first]) == first


class FakeCuda:
    """A device of which the tests set the allocated memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0
        fake = {
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.now),
            "max_memory_allocated": lambda device: self.peak,
            "get_device_name": lambda device: "NVIDIA L40S",
            "get_device_properties": lambda device: types.SimpleNamespace(uuid="abc"),
        }
        for name, function in fake.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(meters, "gpu_counters", lambda uuid: ([], f"no counter of {uuid}"))

    def allocate(self, megabytes: int) -> None:
        self.now += megabytes * MB
        self.peak = max(self.peak, self.now)


def test_gpu_memory_and_name_and_an_inner_meter_hides_no_peak(monkeypatch) -> None:
    gpu = FakeCuda(monkeypatch)
    gpu.allocate(10)
    with meter("cuda:0", devices=2) as outer:
        gpu.allocate(90)
        gpu.allocate(-90)
        with meter("cuda") as inner:
            gpu.allocate(20)
            gpu.allocate(-20)
    held = outer.to_dict()
    assert (held["peak_cuda_mb"], inner.to_dict()["peak_cuda_mb"]) == (100, 30)
    assert (held["device"], held["hardware"], held["devices"]) == ("cuda", "NVIDIA L40S", 2)
    assert held["energy_not_readable"] == ["cpu: no RAPL counters here", "gpu: no counter of abc"]


# Energy


def powercap(root: Path, **domains: tuple[str, int]) -> Path:
    for folder, (name, microjoules) in domains.items():
        place = root / folder.replace("_", ":").replace("rapl", "intel-rapl")
        place.mkdir(parents=True)
        (place / "name").write_text(name + "\n")
        (place / "energy_uj").write_text(f"{microjoules}\n")
        (place / "max_energy_range_uj").write_text("262143328850\n")
    return root


def test_rapl_counts_packages_and_memory_and_nothing_twice(tmp_path: Path) -> None:
    root = powercap(
        tmp_path, rapl_0=("package-0", 5_000_000), rapl_0_0=("core", 3_000_000),
        rapl_0_1=("dram", 700_000), rapl_1=("psys", 9_000_000), rapl_2=("package-1", 1_000_000),
    )  # fmt: skip
    found, reason = rapl_counters(root)
    assert reason == ""
    assert [c.name.split()[-1] for c in found] == ["package-0", "dram", "package-1"]
    assert [c.read() for c in found] == pytest.approx([5.0, 0.7, 1.0])
    assert found[0].wraps_at == pytest.approx(262143.32885)


def test_counters_that_cannot_be_read_are_said(tmp_path: Path, monkeypatch) -> None:
    assert rapl_counters(tmp_path / "absent") == ([], "no RAPL counters here")
    root = powercap(tmp_path / "there", rapl_0=("package-0", 5))
    real = Path.read_text

    def denied(self: Path, *args: Any, **options: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", denied)
        assert rapl_counters(root) == ([], "RAPL counters need root's permission")
    (root / "intel-rapl:0" / "energy_uj").write_text("broken")
    assert "broken" in rapl_counters(root)[1]


def counting(values: list[float], wraps_at: float | None) -> Counter:
    left = list(values)
    return Counter("cpu", lambda: left.pop(0) if len(left) > 1 else left[0], wraps_at)


def test_a_wrap_around_is_counted_through(monkeypatch) -> None:
    counter = counting([90.0, 95.0, 3.0, 60.0, 10.0, 10.0], 100.0)
    monkeypatch.setattr(meters, "rapl_counters", lambda: ([counter], ""))
    monkeypatch.setattr(meters, "INTERVAL_S", 60.0)
    with meter() as spent:
        for _ in range(3):
            spent.look()
    assert spent.joules == {"cpu": pytest.approx(5 + 8 + 57 + 50)}
    assert spent.to_dict()["energy_not_readable"] == []
    assert meters.watt_hours(spent.to_dict()) == pytest.approx(120 / 3600, rel=1e-3)


def test_the_watcher_sees_a_wrap_within_a_long_stage(monkeypatch) -> None:
    """A counter that wraps every 0.5 s, and a stage of some wraps."""
    began = time.monotonic()
    counter = Counter("cpu", lambda: (100 * (time.monotonic() - began)) % 50, 50.0)
    monkeypatch.setattr(meters, "rapl_counters", lambda: ([counter], ""))
    monkeypatch.setattr(meters, "INTERVAL_S", 0.02)
    with meter() as spent:
        time.sleep(1.2)
    assert spent.joules["cpu"] == pytest.approx(100 * spent.seconds, rel=0.1)


def test_a_counter_that_fails_on_the_way_gives_no_figure(monkeypatch) -> None:
    reads = [1.0, 2.0]

    def read() -> float:
        if not reads:
            raise OSError("gone")
        return reads.pop(0)

    monkeypatch.setattr(meters, "rapl_counters", lambda: ([Counter("cpu", read)], ""))
    monkeypatch.setattr(meters, "INTERVAL_S", 60.0)
    with meter() as spent:
        pass
    assert spent.joules == {}
    assert spent.to_dict()["energy_not_readable"] == ["cpu failed on the way: gone"]


class NVMLError(Exception):
    pass


def fake_nvml(monkeypatch: pytest.MonkeyPatch, millijoules: list[float | Exception]) -> list[str]:
    asked: list[str] = []

    def total(handle: str) -> float:
        value = millijoules.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    module = types.ModuleType("pynvml")
    vars(module).update(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or uuid,
        nvmlDeviceGetTotalEnergyConsumption=total,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return asked


def test_a_gpus_energy_is_nvmls_counter(monkeypatch) -> None:
    asked = fake_nvml(monkeypatch, [1000.0, 3000.0])
    found, reason = gpu_counters("1234")
    assert (reason, asked) == ("", ["GPU-1234"])
    assert found[0].read() == 3.0


def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(energy.shutil, "which", lambda name: str(program))


def test_without_nvml_a_gpus_power_is_integrated(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    smi(tmp_path, monkeypatch, 'test "$2" = GPU-1234 && echo 250.0')
    found, reason = gpu_counters("GPU-1234")
    assert reason == ""
    began, first = time.monotonic(), found[0].read()
    time.sleep(0.2)
    joules, seconds = found[0].read() - first, time.monotonic() - began
    assert joules == pytest.approx(250 * seconds, rel=0.3)


def test_the_trapezoid_rule(monkeypatch) -> None:
    times, watts = iter([0.0, 10.0, 12.0, 16.0]), iter([100.0, 200.0, 0.0])
    monkeypatch.setattr(energy.time, "monotonic", lambda: next(times))
    read = energy._integral(lambda: next(watts))
    assert [read(), read(), read()] == [0.0, 300.0, 700.0]


def test_a_gpu_whose_energy_is_not_readable_says_why(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(energy.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_counters("1") == ([], "neither pynvml nor nvidia-smi is here")
    fake_nvml(monkeypatch, [NVMLError("Not Supported")])
    assert gpu_counters("1") == ([], "NVML: Not Supported")
    smi(tmp_path, monkeypatch, "echo '[N/A]'")
    fake_nvml(monkeypatch, [NVMLError("Not Supported")])
    found, reason = gpu_counters("1")
    assert found == []
    assert "nvidia-smi" in reason
    assert "N/A" in reason


# Prices


def test_the_table_that_is_shipped_names_source_and_date_of_each_price() -> None:
    prices = read_prices()
    assert len({p.device for p in prices}) == len(prices)
    for price in prices:
        assert price.usd_per_hour > 0
        assert price.source != "not said"
        assert price.date[:2] == "20"
    # What the paper says of its own hardware (section 2, Overall Budget).
    for device in ("NVIDIA L40S", "NVIDIA RTX 6000 Ada Generation"):
        found = price_of(device, "cuda", prices)
        assert found is not None
        assert (found.usd_per_hour, "2506.09967" in found.source) == (1.0, True)
    assert price_of("AMD EPYC 7763", "cpu", prices) is None, "no price is made up for a processor"


def test_the_papers_figures_follow_from_its_price() -> None:
    """20 minutes on two L40S at 1 USD an hour, which Table 2 rounds to 1 USD."""
    spent = {"seconds": 1200.0, "device": "cuda", "hardware": "NVIDIA L40S", "devices": 2}
    amount = usd(spent, read_prices())
    assert amount == pytest.approx(2 / 3)
    table = {row["experiment"]: row for row in paper_costs()}
    assert round(amount) == table["Total: Best Resa Model"]["train_usd"] == 1


def test_a_price_is_found_by_the_whole_name_or_the_kind() -> None:
    prices = [Price("H100", 2.0, "s", "d"), Price("cuda", 1.0, "s", "d"), Price("CPU", 0.1, "", "")]

    def found(hardware: str, device: str) -> float | None:
        price = price_of(hardware, device, prices)
        return None if price is None else price.usd_per_hour

    assert found("NVIDIA H100", "cuda") == 2.0
    assert found("nvidia  h100", "cuda") == 2.0
    assert found("NVIDIA H100 PCIe", "cuda") == 1.0, "another product at another price"
    assert found("", "cpu") == 0.1
    assert found("", "tpu") is None


def test_tables_of_prices_that_are_none(tmp_path: Path) -> None:
    table = tmp_path / "prices.csv"
    for text, named in (
        ("device,usd_per_hour\ncpu,cheap\n", "row 1: usd_per_hour 'cheap'"),
        ("device,usd_per_hour\ncpu,-1\n", "'-1'"),
        ("device,usd_per_hour\ncpu,nan\n", "'nan'"),
        ("device,usd_per_hour\ncpu,1\ncuda\n", "row 2 has no usd_per_hour"),
        ("price\n3\n", "row 1 has no device"),
    ):
        table.write_text(text)
        with pytest.raises(BadInputError, match=named.replace("(", r"\(")):
            read_prices(table)
    with pytest.raises(BadInputError, match="does not exist"):
        read_prices(tmp_path / "absent.csv")
    table.write_text("device,usd_per_hour\nMy card,0.25\n")
    assert read_prices(table) == [Price("My card", 0.25, "not said", "not said")]
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(BadInputError, match="usd-per-hour"):
            cost.one_price(bad)


def test_the_papers_table_is_as_printed() -> None:
    rows = paper_costs()
    assert len(rows) == 18
    off = [r["experiment"] for r in rows if r["train_usd"] + r["eval_usd"] != r["total_usd"]]
    assert off == ["Hypothesis: Modularity (in Table 5)"]
    assert rows == paper_costs(data_path("paper/table2_cost.csv"))


# A workspace


def put(workspace: Workspace, path: str, kind: str, **fields: Any) -> Path:
    folder = workspace.path(*path.split("/"))
    fields = {"config": {}, "seconds": 10.0, "device": "cpu", **fields}
    with workspace.artifact(folder, Manifest(kind=kind, **fields)) as place:
        if kind == "adapter":
            (place / "adapter_model.safetensors").write_bytes(path.encode())
    return folder


def metered(seconds: float, **fields: Any) -> dict[str, Any]:
    return {
        "seconds": seconds, "cpu_seconds": seconds, "tokens": None, "peak_rss_mb": 100.0,
        "peak_cuda_mb": None, "joules": {"cpu": 3600.0}, "energy_not_readable": [],
        "device": "cpu", "hardware": "X", "devices": 1, **fields,
    }  # fmt: skip


@pytest.fixture
def filled(tmp_path: Path) -> Workspace:
    """Two SAE runs, two adapters, evaluations of base and adapters, and what else there is."""
    space = Workspace(tmp_path / "space")
    put(space, "saes/m/used", "saes", results={"tokens": 1000, "processes": 2})
    put(space, "saes/m/unused", "saes", results={"tokens": 7})
    put(
        space, "recommendations/m/r", "recommendation", parents=["saes/m/used", "counts/gone"],
        results={"tokens": {"<think>": 3}}, seconds=4.0, cost=metered(4.0),
    )  # fmt: skip
    questions = {"eval": {"limit": 5}, "questions": "q1"}
    for name in ("one", "two"):
        path = f"adapters/{name}"
        put(
            space, path, "adapter", parents=["saes/m/used", "recommendations/m/r"],
            config={"base_hash": "base"}, cost=metered(20.0, tokens=500, peak_rss_mb=300.0),
        )  # fmt: skip
        own = hashlib.sha256(path.encode()).hexdigest()
        weights = hashlib.sha256(f"base{own}".encode()).hexdigest()
        put(
            space, f"evals/{name}", "eval", config={**questions, "model": name},
            hashes={"weights": weights}, results={"tokens": 60},
        )  # fmt: skip
    put(space, "evals/base", "eval", config={**questions, "model": "m"}, hashes={"weights": "base"})
    other = {"eval": {"limit": 900}, "questions": "q2", "model": "m"}
    put(space, "evals/base-other", "eval", config=other, hashes={"weights": "base"})
    put(space, "sweeps/s", "sweep", seconds=9999.0)
    return space


def test_tokens_by_phase_are_summed(tmp_path: Path) -> None:
    """As the manifests of activity hold them, also where they were metered."""
    space = Workspace(tmp_path / "space")
    phases = {"prompt": 5, "think": 7, "answer": 1}
    put(space, "activity/m/a", "activity", results={"tokens": phases}, cost=metered(1.0))
    put(
        space, "activity/m/b", "activity", results={"tokens": phases},
        cost=metered(1.0, tokens=phases),
    )  # fmt: skip
    (stage,) = cost.by_stage(workspace_costs(space), [])
    assert stage.tokens == 26


def test_the_whole_workspace_by_stage(filled: Workspace) -> None:
    items = workspace_costs(filled)
    stages = {s.stage: s for s in cost.by_stage(items, cost.one_price(3600.0))}
    assert list(stages) == ["saes", "recommendation", "adapter", "eval"], "no sweep: its jobs count"
    saes = stages["saes"]
    assert (saes.artifacts, saes.metered, saes.seconds, saes.tokens) == (2, 0, 20.0, 1007)
    assert saes.usd == pytest.approx(10 * 2 + 10), "one run on two devices"
    assert (saes.watt_hours, saes.energy_read) == (None, 0)
    adapters = stages["adapter"]
    assert (adapters.seconds, adapters.tokens, adapters.metered) == (40.0, 1000, 2)
    assert (adapters.watt_hours, adapters.energy_read) == (pytest.approx(2.0), 2)
    assert adapters.peak_rss_mb == 300
    assert stages["recommendation"].tokens is None
    columns = cost.in_papers_columns(items, cost.one_price(3600.0))
    seconds = {name: part.seconds for name, part in columns.items()}
    assert seconds == {"training": 60.0, "evaluation": 40.0, "other": 4.0, "total": 104.0}
    parts = [columns[name].usd for name in ("training", "evaluation", "other")]
    assert sum(p for p in parts if p is not None) == pytest.approx(columns["total"].usd)


def test_the_lineage_of_one_adapter(filled: Workspace) -> None:
    items = lineage_costs(filled, filled.path("adapters", "one"))
    assert sorted(item.path for item in items) == [
        "adapters/one", "evals/base", "evals/one", "recommendations/m/r", "saes/m/used",
    ]  # fmt: skip
    assert summary("all", items, []).seconds == 10 + 4 + 20 + 10 + 10


def test_the_lineage_of_what_is_no_adapter(filled: Workspace) -> None:
    for place in (filled.path("saes", "m", "used"), filled.path("adapters", "absent")):
        with pytest.raises(BadInputError, match="not an adapter"):
            lineage_costs(filled, place)


def test_without_a_price_of_every_device_there_is_no_sum(filled: Workspace) -> None:
    items = workspace_costs(filled)
    some = [Price("X", 1.0, "s", "d")]
    stages = {s.stage: s for s in cost.by_stage(items, some)}
    assert stages["adapter"].usd == pytest.approx(40 / 3600)
    assert stages["saes"].usd is None
    assert cost.in_papers_columns(items, some)["total"].usd is None
    assert cost.unpriced(items, some) == ["cpu"]
    assert cost.used_prices(items, some) == some


def test_a_manifest_from_before_costs_is_read(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    folder = put(space, "evals/old", "eval")
    held = json.loads((folder / "manifest.json").read_text())
    write_json(
        folder / "manifest.json",
        {**{k: v for k, v in held.items() if k not in ("cost", "checksum")}, "schema_version": 1},
    )
    artifact = space.read(folder)
    assert artifact is not None
    assert artifact.manifest.cost == {}
    assert not artifact.verifiable
    item = workspace_costs(space)[0]
    assert (item.cost["seconds"], item.cost["device"]) == (10.0, "cpu")
    assert cost.why_no_energy([item]) == ["not recorded"]


def test_an_empty_workspace_costs_nothing(tmp_path: Path) -> None:
    assert workspace_costs(Workspace(tmp_path / "absent")) == []


def test_a_run_that_was_killed_costs_its_whole_time() -> None:
    """The meter saw the last call alone, `seconds` all of them."""
    measured = {"seconds": 10.0, "joules": {"package-0": 50.0}, "energy_not_readable": []}
    fields = {"kind": "adapter", "config": {}, "seed": 0, "threads": 1, "device": "cpu"}
    fields |= {"dtype": "float32", "kernel_path": "plain", "hashes": {}, "cost": measured}
    whole = cost.spent("a", Manifest(**fields, seconds=9.5)).cost
    assert (whole["seconds"], whole["joules"]) == (10.0, {"package-0": 50.0})
    killed = cost.spent("a", Manifest(**fields, seconds=40.0)).cost
    assert (killed["seconds"], killed["joules"]) == (40.0, {})
    assert killed["energy_not_readable"] == ["not metered before a kill"]
