"""The workspace: one folder of artifacts, each with a manifest, written whole or not at all.

    saes/<model>/<run>/<hookpoint>/{cfg.json, sae.safetensors}
    counts/<model>/<run>/  recommendations/<model>/<run>/  adapters/<run>/  evals/<run>/

An artifact is a folder.  It is filled under a temporary name beside its place and renamed when it
is complete, so a killed run leaves the old state, and the next run clears what it left behind.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resa_lens.errors import BadInputError, RunFailedError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
DEFAULT_FOLDER = "resa-workspace"
KINDS = (
    "saes",
    "quality",
    "counts",
    "stability",
    "recommendation",
    "activity",
    "scores",
    "falsification",
    "effects",
    "attribution",
    "ablation",
    "matches",
    "adapter",
    "eval",
    "sweep",
    "model",
)
"""Kinds of artifacts; a reader that meets another one is older than what wrote it."""
_TEMPORARY = re.compile(r"\.tmp-(\d+)(\.old)?-(.+)")
"""A folder being filled by a process, or with `.old` the artifact that it is replacing."""
WORK = ".work-"
"""Before the name of a folder in which a long run keeps what it has finished, to go on from."""
_TRACKED = ("resa-lens", "torch", "transformers", "transformer-lens", "eai-sparsify", "peft")


class Manifest(BaseModel):
    """What made an artifact: everything that is needed to make it again."""

    model_config = ConfigDict(extra="allow")

    schema_version: int = SCHEMA_VERSION
    kind: str
    """One of `KINDS`."""
    config: dict[str, Any]
    results: dict[str, Any] = Field(default_factory=dict)
    command: list[str] = Field(default_factory=lambda: [Path(sys.argv[0]).name, *sys.argv[1:]])
    parents: list[str] = Field(default_factory=list)
    """Workspace-relative paths of the artifacts that this one was made from."""
    hashes: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the weights and the data."""
    seed: int = 0
    threads: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    kernel_path: str = "eager"
    versions: dict[str, str] = Field(default_factory=lambda: package_versions())
    platform: str = Field(default_factory=platform.platform)
    commit: str | None = Field(default_factory=lambda: current_commit())
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0
    peak_memory_mb: float = Field(default_factory=lambda: peak_memory_mb())
    cost: dict[str, Any] = Field(default_factory=dict)
    """What `cost.Meter.to_dict` measured; empty where the stage was not metered."""


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide a result, and Python's."""
    found = {"python": platform.python_version()}
    for name in _TRACKED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def current_commit() -> str | None:
    """Return the commit of the checkout the package runs from, or None outside one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(  # noqa: S603
        ["git", "-C", str(root), "rev-parse", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


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


def digest(value: Any) -> str:
    """Return 8 hex digits of a JSON-able value's SHA-256: the identity of a configuration."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Workspace:
    """A folder of artifacts; it comes into being with its first artifact."""

    def __init__(self, root: str | Path | None = None, *, recover: bool = True) -> None:
        self.recovers = recover
        chosen = root or os.environ.get("RESA_LENS_WORKSPACE") or DEFAULT_FOLDER
        self.root = Path(chosen).expanduser().resolve()
        if self.root.exists() and not self.root.is_dir():
            raise BadInputError(f"workspace {self.root} is a file; pass a folder with --workspace")
        # A run killed between the two renames of a replacement left the old artifact set aside.
        # A reader that may not write, as the app, leaves that to the next command.
        for aside in self.root.rglob(".tmp-*.old-*") if recover else ():
            _put_back(aside)

    def check_writable(self) -> None:
        """Raise BadInputError where nothing can be written: before long work, not after it."""
        place = next(p for p in (self.root, *self.root.parents) if p.exists())
        if not place.is_dir():
            raise BadInputError(f"workspace {self.root}: {place} is a file; pass another folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise BadInputError(f"no permission to write {place}; choose another --workspace")

    def path(self, *parts: str) -> Path:
        """Return the path of an artifact; the parts may not lead out of the workspace."""
        path = self.root.joinpath(*parts)
        if not path.resolve().is_relative_to(self.root):
            raise BadInputError(f"path {'/'.join(parts)!r} leads out of the workspace")
        return path

    def relative(self, path: Path) -> str:
        """Return a path as manifests hold it: relative to the workspace where it lies inside."""
        path = path.resolve()
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)

    def manifest(self, folder: Path) -> Manifest | None:
        """Return an artifact's manifest, or None where there is no complete artifact.

        Raises:
            BadInputError: the manifest is damaged or of a newer schema.
        """
        file = folder / MANIFEST
        if not file.exists():
            return None
        try:
            value = json.loads(file.read_text())
            # First of all: a newer schema may lack what this one needs.
            version = value.get("schema_version") if isinstance(value, dict) else None
            if isinstance(version, int) and version > SCHEMA_VERSION:
                raise BadInputError(
                    f"{file} has schema {version}, this version reads up to "
                    f"{SCHEMA_VERSION}; update resa-lens"
                )
            return Manifest.model_validate(value)
        except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BadInputError(
                f"{file} is not a manifest of resa-lens; remove its folder"
            ) from error

    def find(
        self, kind_folder: str, kind: str | None = None, *, unread: list[str] | None = None
    ) -> list[tuple[Path, Manifest]]:
        """Return the complete artifacts below a folder, the newest first.

        Args:
            kind_folder: relative to the workspace; "" is all of it.
            kind: of the artifacts; all by default.
            unread: takes the messages of manifests that cannot be read.

        Raises:
            BadInputError: a manifest cannot be read, and `unread` is not given.
        """
        found = []
        for file in self.path(kind_folder).rglob(MANIFEST):
            if any(part.startswith(".tmp-") for part in file.relative_to(self.root).parts):
                continue
            try:
                manifest = self.manifest(file.parent)
            except BadInputError as error:
                if unread is None:
                    raise
                unread.append(str(error))
                continue
            if manifest and (kind is None or manifest.kind == kind):
                found.append((file.parent, manifest))
        found.sort(key=lambda item: (item[0] / MANIFEST).stat().st_mtime_ns, reverse=True)
        return found

    @contextlib.contextmanager
    def artifact(self, folder: Path, manifest: Manifest) -> Iterator[Path]:
        """Fill a new artifact: yields a temporary folder that is renamed to `folder` at the end.

        Raises:
            BadInputError: no permission to write here.
            RunFailedError: the disk is full, or another write error; the workspace is as before.
        """
        made = [p for p in (folder.parent, *folder.parent.parents) if not p.exists()]
        temporary = folder.parent / f".tmp-{os.getpid()}-{folder.name}"
        began = time.monotonic()
        done = False
        try:
            with write_errors(folder):
                folder.parent.mkdir(parents=True, exist_ok=True)
                # A folder that is no workspace may hold other programs' files of such names.
                _clear_stale(folder.parent, None if self.recovers else folder.name)
                # Of a killed run that had this process's number, as happens in containers.
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
            # Only writes may fail as "disk full": an OSError of a computation inside the block
            # is a write too, because callers compute first and write here.
            with write_errors(folder):
                yield temporary
                manifest.seconds = manifest.seconds or round(time.monotonic() - began, 3)
                manifest.peak_memory_mb = peak_memory_mb()
                write_json(temporary / MANIFEST, manifest.model_dump(mode="json"))
                _replace(temporary, folder)
            done = True
        finally:
            if not done:
                shutil.rmtree(temporary, ignore_errors=True)
                for parent in made:
                    with contextlib.suppress(OSError):
                        parent.rmdir()


def _replace(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    old = folder.parent / f".tmp-{os.getpid()}.old-{folder.name}"
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear_stale(parent: Path, only: str | None) -> None:
    """Remove what killed runs left, of all artifacts or of one: their process is gone."""
    for stale in parent.glob(".tmp-*"):
        found = _TEMPORARY.fullmatch(stale.name)
        if found and only not in (None, found[3]):
            continue
        if found and not _put_back(stale) and not _alive(int(found[1])):
            shutil.rmtree(stale, ignore_errors=True)


def _put_back(aside: Path) -> bool:
    """Rename the artifact that a killed run had set aside to its place, if that is empty."""
    found = _TEMPORARY.fullmatch(aside.name)
    if not found or not found[2] or _alive(int(found[1])):
        return False
    place = aside.parent / found[3]
    if place.exists():
        return False
    with contextlib.suppress(OSError):
        aside.rename(place)
        return True
    return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def writer(folder: Path) -> int | None:
    """Return the process that is at work in an unfinished folder, or None: it was killed."""
    if found := _TEMPORARY.fullmatch(folder.name):
        pid = int(found[1])
    else:
        try:
            pid = int((folder / "lock").read_text())
        except (OSError, ValueError):
            return None
    return pid if _alive(pid) else None


def how_far(folder: Path) -> str:
    """Say how far an unfinished run came, by what it has kept."""

    def several(n: int, what: str) -> str:
        return f"{n} {what}{'' if n == 1 else 's'}"

    if (folder / "answers.jsonl").exists():
        # The first line is the run's settings.
        with (folder / "answers.jsonl").open("rb") as stream:
            lines = sum(block.count(b"\n") for block in iter(lambda: stream.read(2**20), b""))
        return several(max(0, lines - 1), "answer")
    if (folder / "locks").is_dir():
        return several(len(list((folder / "jobs").glob("*.json"))), "job")
    if arms := len(list(folder.glob("*.parquet"))):
        return several(arms, "arm")
    places = (folder, *folder.glob("group-*"))
    steps = [p.name.rpartition("-")[2] for place in places for p in place.glob("checkpoint-*")]
    return f"step {max((int(step) for step in steps if step.isdigit()), default=0)}"


@contextlib.contextmanager
def write_errors(where: Path) -> Iterator[None]:
    """Turn write errors into the project's: no permission is bad input, a full disk a failure."""
    from safetensors import SafetensorError

    try:
        yield
    except PermissionError as error:
        raise BadInputError(
            f"no permission to write {error.filename or where}; choose another --workspace"
        ) from error
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if code == errno.EROFS:
            raise BadInputError(
                f"{where} is on a read-only disk; choose another --workspace"
            ) from error
        full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        what = "the disk is full" if full else str(error)
        raise RunFailedError(
            f"writing {where} failed: {what}; the workspace is as it was before"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        BadInputError: missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BadInputError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} is damaged: {error}") from error


def config_dict(config: Any) -> dict[str, Any]:
    """Return a frozen dataclass as a plain mapping for a manifest."""
    from dataclasses import asdict, is_dataclass

    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    if isinstance(config, Mapping):
        return dict(config)
    raise TypeError(f"{type(config).__name__} is not a configuration")
