"""What is installed, what is missing, and whether the main job can run here.

Torch stays unloaded unless there is a GPU to ask it about.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from resa_lens.errors import BadInputError
from resa_lens.machine import hardware as machine
from resa_lens.machine.needs import Needs, Shape, needs_of
from resa_lens.resources import check_writable, data_path, workspace_folder

OK, NOTE, PROBLEM = "ok", "note", "problem"
EXTRAS = {
    "app": "the feature explorer",
    "notebooks": "the notebooks",
    "eval": "evaluation by lighteval",
    "vllm": "evaluation by vLLM",
    "dev": "the tests",
}
APART = {"eval": ("lighteval", ".venv-eval"), "vllm": ("vllm", ".venv-vllm")}
"""Extras whose packages do not fit beside the others', and where their environment lies."""
LEAST_MEMORY_MB, LEAST_DISK_MB = 1500, 500
"""What the main job takes on the bundled model, with room to spare."""
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    area: str
    name: str
    found: str
    state: str = OK
    """`OK`, `NOTE` (worth knowing) or `PROBLEM` (the main job cannot run)."""
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that was looked at, and what of it a program reads."""

    findings: tuple[Finding, ...]
    devices: tuple[dict[str, Any], ...]
    engines: dict[str, bool]
    available_mb: float
    """Of the machine's memory."""
    free_disk_mb: float
    """Where the workspace lies, or will lie."""

    @property
    def problems(self) -> list[Finding]:
        """What keeps the main job from running."""
        return [finding for finding in self.findings if finding.state == PROBLEM]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "ok": not self.problems,
            "findings": [asdict(finding) for finding in self.findings],
            "problems": [{"what": f"{f.name}: {f.found}", "remedy": f.remedy}
                         for f in self.problems],
            "devices": list(self.devices),
            "engines": self.engines,
            "available_mb": round(self.available_mb, 1),
            "free_disk_mb": round(self.free_disk_mb, 1),
        }  # fmt: skip


def diagnose(workspace: str | None = None) -> Diagnosis:
    """Look at the installation, the machine and the workspace.

    Raises:
        BadInputError: the workspace is a file.
    """
    findings = [_python(), *_bundled(), *_packages(), *_extras()]
    findings += _processor()
    available = machine.available_mb()
    findings.append(_memory(available))
    devices, notes = _devices()
    findings += notes
    engines, notes = _engines()
    findings += notes
    findings += _hub()
    free, notes = _workspace(workspace)
    findings += notes
    return Diagnosis(tuple(findings), tuple(devices), engines, available, free)


def _python() -> Finding:
    return Finding("installation", "Python", platform.python_version())


def tested_versions() -> dict[str, str]:
    """Return {package: version} that the tests ran with; empty where the list is not at hand."""
    for file in (_ROOT / "resa_lens" / "_data" / "constraints.txt", _ROOT / "constraints.txt"):
        if file.exists():
            lines = (line.strip() for line in file.read_text().splitlines())
            pairs = (line.split("==") for line in lines if "==" in line and line[0] != "#")
            return {_canonical(name): version for name, version in pairs}
    return {}


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _requirements() -> Iterator[tuple[Requirement, str]]:
    """The packages that resa-lens asks for, each with its extra, "" of the core."""
    try:
        written = metadata.requires("resa-lens") or []
    except metadata.PackageNotFoundError:
        return
    for text in written:
        needed = Requirement(text)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            yield needed, ""
            continue
        for extra in EXTRAS:
            if needed.marker.evaluate({"extra": extra}):
                yield needed, extra


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    """The core's packages against what is asked for and what was tested."""
    tested = tested_versions()
    findings = []
    for needed, extra in _requirements():
        if extra:
            continue
        version, pin = _installed(needed.name), tested.get(_canonical(needed.name))
        requirement = f"=={pin}" if pin else str(needed.specifier)
        remedy = f"pip install '{needed.name}{requirement}'"
        if version is None:
            findings.append(Finding("packages", needed.name, "missing", PROBLEM, remedy))
        elif not needed.specifier.contains(version, prereleases=True):
            message = f"{version}, outside {needed.specifier}"
            findings.append(Finding("packages", needed.name, message, PROBLEM, remedy))
        elif pin and version.partition("+")[0] != pin:
            message = f"{version}; tested with {pin}"
            findings.append(Finding("packages", needed.name, message, NOTE, remedy))
        else:
            findings.append(Finding("packages", needed.name, version))
    if not findings:
        what = "resa-lens is not installed here, only run from its folder"
        findings.append(Finding("packages", "resa-lens", what, NOTE, "pip install -e ."))
    return findings


def _extras() -> list[Finding]:
    """Optional packages: what each is for, and the command that installs it."""
    missing: dict[str, list[str]] = {extra: [] for extra in EXTRAS}
    for needed, extra in _requirements():
        if extra and needed.name != "resa-lens" and _installed(needed.name) is None:
            missing[extra].append(needed.name)
    findings = []
    for extra, what in EXTRAS.items():
        name = f"extra {extra}"
        lacking = missing[extra]
        if not lacking:
            findings.append(Finding("extras", name, f"installed: {what}"))
            continue
        if extra in APART:
            engine, folder = APART[extra]
            if _environment(folder):
                findings.append(Finding("extras", name, f"in {folder}: {what}"))
                continue
            remedy = f"benchmarks/install_engine.sh {engine} {folder}"
        else:
            remedy = f"pip install 'resa-lens[{extra}]'"
        message = f"missing: {', '.join(lacking)} ({what})"
        findings.append(Finding("extras", name, message, NOTE, remedy))
    return findings


def _environment(folder: str) -> Path | None:
    """An engine's own environment, here or beside the checkout."""
    places = (Path(folder), _ROOT / folder)
    return next((p for p in places if (p / "bin" / "python").exists()), None)


def _bundled() -> list[Finding]:
    findings = []
    for relative, what in (("tiny-reasoner", "bundled model"), ("tiny", "bundled questions")):
        try:
            data_path(relative)
        except BadInputError:
            remedy = "install resa-lens again, or use a full checkout"
            findings.append(Finding("installation", what, "missing", PROBLEM, remedy))
        else:
            findings.append(Finding("installation", what, relative))
    return findings


def _processor() -> list[Finding]:
    name, instructions = machine.processor()
    cores = machine.cores()
    has = ", ".join(instructions) or "none of those that matter here"
    bf16 = {"avx512_bf16", "amx_bf16", "bf16"} & set(instructions)
    message = has if bf16 else f"{has}; without bfloat16 in the CPU, wide SAEs train more slowly"
    threads = os.environ.get("OMP_NUM_THREADS")
    return [
        Finding("machine", "CPU", f"{name}, {cores} core(s)"),
        Finding("machine", "instructions", message),
        Finding(
            "machine", "threads",
            f"{threads} (OMP_NUM_THREADS)" if threads
            else f"{cores}, one for models up to width 256; --threads sets it",
        ),
    ]  # fmt: skip


def _memory(available: float) -> Finding:
    message = f"{available / 1024:.1f} GB free"
    if available >= LEAST_MEMORY_MB:
        return Finding("machine", "memory", message)
    takes = f"`resa-lens demo` takes about {LEAST_MEMORY_MB / 1000:.1f} GB"
    remedy = f"end other programs, or raise ulimit -v: {takes}"
    return Finding("machine", "memory", message, PROBLEM, remedy)


def _devices() -> tuple[list[dict[str, Any]], list[Finding]]:
    """CUDA devices by torch, where a driver is there to have any."""
    cpu = Finding("devices", "cpu", "usable, float32")
    build = _installed("torch") or ""
    driver = machine.nvidia_driver()
    if driver is None:
        return [], [cpu, Finding("devices", "cuda", "no NVIDIA driver on this machine")]
    if build.endswith("+cpu"):
        message = f"NVIDIA driver {driver}, but torch {build} is the build without CUDA"
        remedy = f"pip install torch=={build.partition('+')[0]} (the build with CUDA)"
        return [], [cpu, Finding("devices", "cuda", message, NOTE, remedy)]
    import torch

    if not torch.cuda.is_available():
        message = f"NVIDIA driver {driver}, but torch {torch.__version__} finds no device"
        remedy = "update the driver to one for CUDA " + str(torch.version.cuda)
        return [], [cpu, Finding("devices", "cuda", message, NOTE, remedy)]
    devices, findings = [], [cpu]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = (value / machine.MB for value in torch.cuda.mem_get_info(index))
        devices.append(
            {"device": f"cuda:{index}", "name": properties.name, "free_mb": round(free, 1),
             "memory_mb": round(total, 1), "capability": f"{properties.major}.{properties.minor}"}
        )  # fmt: skip
        message = (
            f"{properties.name}, {free / 1024:.1f} of {total / 1024:.1f} GB free, "
            f"compute capability {properties.major}.{properties.minor}"
        )
        findings.append(Finding("devices", f"cuda:{index}", message))
    triton = _installed("triton")
    if triton:
        findings.append(Finding("devices", "Triton kernels", triton))
    else:
        findings.append(
            Finding("devices", "Triton kernels", "missing: SAEs train on slower kernels", NOTE,
                    "pip install triton")
        )  # fmt: skip
    return devices, findings


def _engines() -> tuple[dict[str, bool], list[Finding]]:
    """The engines that score a model: here, or in an environment of their own."""
    hf = all(_installed(name) for name in ("torch", "transformers"))
    usable, findings = {"hf": hf}, []
    state, remedy = (OK, "") if hf else (PROBLEM, "pip install resa-lens")
    findings.append(Finding("engines", "hf", "usable" if hf else "missing", state, remedy))
    for extra, (engine, folder) in APART.items():
        place = _environment(folder)
        if importlib.util.find_spec(engine):
            usable[engine] = True
            findings.append(
                Finding("engines", engine, f"usable, {_installed(engine) or 'installed'}")
            )
        elif place:
            usable[engine] = True
            message = f"usable as {place}/bin/resa-lens eval --engine {engine}"
            findings.append(Finding("engines", engine, message))
        else:
            usable[engine] = False
            message = f"not usable: see extra {extra}"
            findings.append(Finding("engines", engine, message, NOTE))
    return usable, findings


def _hub() -> list[Finding]:
    """The cache of downloaded models, and whether anything may be downloaded."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    try:
        models = sorted(p.name for p in cache.glob("models--*"))
        message = f"{cache}: {len(models)} model(s)"
    except OSError as error:
        message = f"{cache} cannot be read: {error.strerror}"
    offline = constants.is_offline_mode()
    mode = "on: only models in the cache are found" if offline else "off"
    return [Finding("hub", "cache", message), Finding("hub", "offline mode", mode)]


def _workspace(given: str | None) -> tuple[float, list[Finding]]:
    root = workspace_folder(given)
    place = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(place).free / machine.MB
    message = str(root) if root.exists() else f"{root} (to be made)"
    try:
        check_writable(root)
    except BadInputError as error:
        remedy = "choose another folder with --workspace or RESA_LENS_WORKSPACE"
        findings = [Finding("workspace", "folder", str(error), PROBLEM, remedy)]
    else:
        findings = [Finding("workspace", "folder", message)]
    room = f"{free / 1024:.1f} GB free"
    if free < LEAST_DISK_MB:
        remedy = "free some, or choose another disk with --workspace"
        findings.append(Finding("workspace", "disk", room, PROBLEM, remedy))
    else:
        findings.append(Finding("workspace", "disk", room))
    return free, findings


def needs_here(diagnosis: Diagnosis, shape: Shape, latents: int | None = None) -> Needs:
    """Return what a model will need on the machine that was looked at: on its first GPU, if any.

    Args:
        diagnosis: of the machine.
        shape: of the model.
        latents: of an SAE; by default set by the model's width.
    """
    gpu = diagnosis.devices[0] if diagnosis.devices else None
    return needs_of(
        shape,
        device=gpu["device"] if gpu else "cpu",
        available_mb=gpu["free_mb"] if gpu else diagnosis.available_mb,
        free_disk_mb=diagnosis.free_disk_mb,
        latents=latents,
    )
