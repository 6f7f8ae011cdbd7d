"""Identities of artifacts, without the work that makes them; changed files; moved workspaces."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resa_lens.artifacts.stage import Context, Stage
from resa_lens.artifacts.workspace import Workspace
from resa_lens.stages.job_stage import JobStage
from resa_lens.stages.saes import SaeRun
from resa_lens.texts import corpora


class _Asked(BaseException):
    """Carries the identity out of a stage."""


def identity_of(stage: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Return the identity of the last artifact that a stage asks for; nothing is made."""

    def obtain(self: Stage, *_: Any, **__: Any) -> None:
        raise _Asked(self.identity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "obtain", obtain)
        patch.setattr(JobStage, "obtain", lambda self, *_: obtain(self.stage))
        try:
            stage(*args, **options)
        except _Asked as asked:
            return str(asked)
    raise AssertionError("no artifact was asked for")


def changed_byte(run: SaeRun, place: Path, layer: int) -> SaeRun:
    """Return a copy of SAEs, one byte of the last tensor of a layer changed."""
    for point in run.points:
        shutil.copytree(run.place(point), place / point.sparsify)
        if point.layer == layer:
            file = place / point.sparsify / "sae.safetensors"
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
    return replace(run, folder=place, artifact=None, places={}, relative="")


def moved(ctx: Context, place: Path) -> Context:
    """Return a context in a copy of the workspace: the runs renamed, every file touched."""
    shutil.copytree(ctx.workspace.root, place)
    for manifest in sorted(place.rglob("manifest.json")):
        folder = manifest.parent
        folder.rename(folder.with_name(f"renamed-{folder.name}"))
    for file in place.rglob("*"):
        os.utime(file, (1, 1))
    return replace(ctx, workspace=Workspace(place))


def data_file(place: Path, count: int = 24) -> Path:
    """Write records with steps of the bundled set to a file."""
    records = [vars(record) for record in corpora.load_records("tiny") if record.steps]
    write_rows(place, records[:count])
    return place


def write_rows(place: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a .jsonl file."""
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
