"""The manifest of an artifact: what it was made from, and the hash of each of its files."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from resa_lens.errors import BadInputError, DamagedError
from resa_lens.files import parse_json, read_regular
from resa_lens.hashes import digest
from resa_lens.machine.meters import peak_memory_mb

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
LARGEST = 64 * 2**20
"""Bytes of a manifest, at most."""
SHOWN = 12
"""Hexadecimal digits of an identity in the name of a folder."""
_TRACKED = ("resa-lens", "torch", "transformers", "transformer-lens", "eai-sparsify", "peft")


class Cost(BaseModel):
    """What `machine.meters.Meter.to_dict` measured, as far as it is there."""

    seconds: FiniteFloat = 0.0
    cpu_seconds: FiniteFloat = 0.0
    tokens: Any = None
    """A number; of the first versions' activity, numbers by phase."""
    peak_rss_mb: FiniteFloat = 0.0
    peak_cuda_mb: FiniteFloat | None = None
    joules: dict[str, FiniteFloat] = Field(default_factory=dict)
    energy_not_readable: list[str] = Field(default_factory=list)
    device: str = ""
    hardware: str = ""
    devices: int = 1


class Ingredients(BaseModel):
    """The parts of an identity, as far as they are there."""

    model: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)
    parents: dict[str, str] = Field(default_factory=dict)


class Manifest(BaseModel):
    """What made an artifact: everything that is needed to make it again and to recognise it."""

    model_config = ConfigDict(extra="allow")

    schema_version: int = SCHEMA_VERSION
    kind: str
    """The name of a kind of artifact (`artifacts.kinds`)."""
    identity: str = ""
    """SHA-256 of the ingredients; without one, as in schema 1, the origin is not verifiable."""
    ingredients: dict[str, Any] = Field(default_factory=dict)
    """The parts of the identity in the clear: kind, recipe, model, dtype, configuration, data and
    the identities of the parents."""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 by the path of each file below the artifact's folder."""
    config: dict[str, Any]
    """All settings, those that change no result too."""
    results: dict[str, Any] = Field(default_factory=dict)
    command: list[str] = Field(default_factory=lambda: [Path(sys.argv[0]).name, *sys.argv[1:]])
    options: dict[str, Any] = Field(default_factory=dict)
    """Of that command, as a file for its `--config` holds them; without defaults."""
    parents: list[str] = Field(default_factory=list)
    """Workspace-relative paths of the artifacts that this one was made from."""
    hashes: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the weights and the data."""
    seed: int = 0
    threads: int = 0
    deterministic: bool = False
    """Whether it was made with deterministic algorithms alone: the same bits on CUDA too."""
    device: str = "cpu"
    dtype: str = "float32"
    products: str = "float32"
    """The format in which the factors of float32 products were: float32, or TF32 on a GPU."""
    kernel_path: str = "eager"
    versions: dict[str, str] = Field(default_factory=lambda: package_versions())
    platform: str = Field(default_factory=platform.platform)
    commit: str | None = Field(default_factory=lambda: current_commit())
    created: str = Field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="microseconds")
    )
    seconds: FiniteFloat = 0.0
    peak_memory_mb: FiniteFloat = Field(default_factory=peak_memory_mb)
    cost: dict[str, Any] = Field(default_factory=dict)
    """What `machine.meters.Meter.to_dict` measured; empty where the stage was not metered."""

    @field_validator("cost")
    @classmethod
    def _cost(cls, value: dict[str, Any]) -> dict[str, Any]:
        Cost.model_validate(value)
        return value

    @field_validator("ingredients")
    @classmethod
    def _ingredients(cls, value: dict[str, Any]) -> dict[str, Any]:
        Ingredients.model_validate(value)
        return value

    @property
    def exact(self) -> bool:
        """Whether it was made to the same bits that the same work gives again."""
        return self.deterministic or not self.device.startswith("cuda")

    @property
    def verifiable(self) -> bool:
        """Whether the manifest says by contents what the artifact was made from."""
        return bool(self.identity)


def sealed(manifest: Manifest) -> dict[str, Any]:
    """Return a manifest's JSON value with a checksum over all of it."""
    value = json.loads(json.dumps(manifest.model_dump(mode="json", exclude={"checksum"})))
    return {**value, "checksum": digest(value)}


def read_manifest(file: Path) -> Manifest:
    """Read a manifest and check it against its checksum and its own ingredients.

    Raises:
        DamagedError: missing, not a manifest, or changed since it was written.
        BadInputError: of a newer schema.
    """
    value = parse_json(read_regular(file, LARGEST), file)
    # First of all: a newer schema may lack what this one needs.
    version = value.get("schema_version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BadInputError(
            f"{file} has schema {version}, this version reads up to {SCHEMA_VERSION}; update "
            "resa-lens"
        )
    try:
        manifest = Manifest.model_validate(value)
    except (ValidationError, RecursionError) as error:
        raise DamagedError(f"{file} is not a manifest of resa-lens; remove its folder") from error
    # With a checksum it is no older one, whatever version it names.
    if manifest.schema_version >= 2 or "checksum" in value:
        _check(file, value, manifest)
    return manifest


def _check(file: Path, value: Mapping[str, Any], manifest: Manifest) -> None:
    rest = {key: item for key, item in value.items() if key != "checksum"}
    try:
        computed = digest(rest)
    except RecursionError as error:
        raise DamagedError(f"{file} is damaged: it is nested too deeply") from error
    if value.get("checksum") != computed:
        raise DamagedError(
            f"{file} was changed since it was written; the command that made it makes it again"
        )
    if manifest.verifiable and manifest.identity != digest(manifest.ingredients):
        raise DamagedError(f"{file} names another identity than that of its ingredients")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their names with dots; an empty one is a value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    parts = (flat(item, f"{prefix}.{key}" if prefix else key) for key, item in value.items())
    return {key: item for part in parts for key, item in part.items()}


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide a result, and Python's."""
    versions = {"python": platform.python_version()}
    for name in _TRACKED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def current_commit() -> str | None:
    """Return the commit of the checkout the package runs from, or None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(  # noqa: S603
        ["git", "-C", str(root), "rev-parse", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
