"""What a workspace holds: its artifacts, what is unfinished in it, and what cannot be read.

The folder may be anything: somebody else's, huge, half-written, or changing while it is read.
Only the folders of the kinds are walked, and nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resa_lens.artifacts.artifact import KINDS, Artifact, Kind
from resa_lens.artifacts.kinds.adapter import Adapter
from resa_lens.artifacts.kinds.eval import Eval, adapter_of, by_adapter, is_adapted, is_as_tuned
from resa_lens.artifacts.walk import WORK, Walk, bounded_names
from resa_lens.artifacts.workspace import Workspace, how_far, writer
from resa_lens.errors import BadInputError

UNVERIFIABLE = "origin not verifiable"
"""Said of an artifact that does not say by contents what it was made from."""
_FILES = ("report.html", "README.md")
"""Beside the kinds' folders, of ours."""


@dataclass(frozen=True)
class Unfinished:
    """A folder that a run is filling, or left when it was killed."""

    relative: str
    state: str
    """How far it came, and whether somebody is at work there."""

    @property
    def folder(self) -> str:
        """Below the workspace, for example "saes"."""
        return self.relative.partition("/")[0]


@dataclass(frozen=True)
class Tuning:
    """An adapter with its scores before and after, on the same questions."""

    adapter: Artifact
    base: Artifact
    tuned: Artifact

    @property
    def control(self) -> str | None:
        """What stood in the SAE's place."""
        return self.adapter.settings.control


@dataclass(frozen=True)
class Listing:
    """What a workspace holds."""

    root: Path
    artifacts: tuple[Artifact, ...]
    """Those whose results and settings are as their kinds say, the newest first."""
    problems: tuple[str, ...]
    """What cannot be read, a line each, with what to do."""
    exists: bool
    under_way: tuple[Unfinished, ...] = ()
    """Folders that a run is filling, or left when it was killed."""
    others: tuple[str, ...] = ()
    """Names in the folder itself that no run of resa-lens makes."""
    whole: bool = True
    """False where the folder holds more than was looked at."""

    @property
    def unfinished(self) -> int:
        """How many folders are unfinished."""
        return len(self.under_way)

    def of(self, kind: type[Kind], weights: str | None = None) -> list[Artifact]:
        """Return the artifacts of a kind, the newest first; all or those of a model's weights."""
        of_kind = (a for a in self.artifacts if a.manifest.kind == kind.name)
        return [a for a in of_kind if weights in (None, a.weights)]

    def at(self, relative: str) -> Artifact | None:
        """Return the artifact at a workspace-relative path."""
        return next((a for a in self.artifacts if a.relative == relative), None)

    def made_of(self, parent: Artifact, kind: type[Kind]) -> list[Artifact]:
        """Return the artifacts of a kind that were made from an artifact, the newest first."""
        return [a for a in self.of(kind) if is_parent(parent, a)]

    def parent(self, child: Artifact, kind: type[Kind]) -> Artifact | None:
        """Return what an artifact was made from, of a kind, where it is in the workspace."""
        return next((a for a in self.of(kind) if is_parent(a, child)), None)

    def tunings(self, weights: str) -> list[Tuning]:
        """Return the scored adapters of a model, by the hash of its weights, the newest first."""
        adapters, bases = self.of(Adapter, weights), self.of(Eval, weights)
        known = by_adapter(adapters)
        pairs: dict[str, Tuning] = {}
        for tuned in self.of(Eval):
            adapter = adapter_of(tuned, known)
            base = next((a for a in bases if a.settings == tuned.settings), None)
            if adapter and base and is_as_tuned(tuned):
                pairs.setdefault(adapter.relative, Tuning(adapter, base, tuned))
        return [pairs[adapter.relative] for adapter in adapters if adapter.relative in pairs]


def is_parent(parent: Artifact, child: Artifact) -> bool:
    """Return whether an artifact was made from another: by its identity, or its path."""
    if parent.relative in child.manifest.parents:
        return True
    if not parent.verifiable or not child.verifiable:
        return False
    return parent.manifest.identity in child.manifest.ingredients.get("parents", {}).values()


def named(listing: Listing, text: str) -> Artifact:
    """Return the artifact that a person means by its id, its path or its folder's name.

    Raises:
        BadInputError: there is none, or several.
    """
    path = os.path.normpath(text)
    alike = [
        a
        for a in listing.artifacts
        if path in (a.relative, a.path.name, str(a.path), os.path.relpath(a.path))
        or (len(text) >= 4 and (a.manifest.identity or short_id(a)).startswith(text))
    ]
    if len(alike) == 1:
        return alike[0]
    if alike:
        ids = ", ".join(short_id(a) for a in alike[:8])
        raise BadInputError(f"{text!r} names {len(alike)} artifacts ({ids}); give more of the id")
    raise BadInputError(
        f"{text!a:.80} is no artifact in {listing.root}; give an id of `resa-lens runs`, or a path"
    )


def short_id(artifact: Artifact) -> str:
    """Return the first digits of an artifact's identity, which its folder's name ends with."""
    return (artifact.manifest.identity or artifact.path.name.rpartition("-")[2])[:8]


def name_of(artifact: Artifact, *, one_based: bool = False) -> str:
    """Return what a person tells an artifact by, among others of its kind and model."""
    detail = artifact.kind.detail(artifact, one_based=one_based) or artifact.kind.title
    day = artifact.manifest.created[:16].replace("T", " ")
    return ", ".join(part for part in (detail, day, short_id(artifact)) if part)


def row(
    listing: Listing, artifact: Artifact, *, verifying: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Return what a person needs to choose an artifact, and what it takes.

    Args:
        listing: where the artifact is.
        artifact: the artifact.
        verifying: read every byte of it, tell this so, and say what is damaged or foreign.
    """
    manifest, results, subject = artifact.manifest, artifact.results, artifact
    score = None
    if artifact.kind is Eval:
        score = f"{100 * results.accuracy:.1f} %"
        if is_adapted(artifact):
            subject = adapter_of(artifact, by_adapter(listing.of(Adapter))) or artifact
    layer = getattr(subject.results, "layer", None)
    chosen = getattr(results, "recommended", None)
    control = getattr(subject.settings, "control", None) or getattr(results, "control", None)
    if not isinstance(control, str):  # of an ablation it is a figure
        control = None
    whole: dict[str, Any] = {}
    if verifying:
        verifying(f"verifying {artifact.relative}")
        whole = {"damaged": list(artifact.damage(cached=False)), "foreign": artifact.foreign()}
    return {
        "kind": manifest.kind, "path": artifact.relative, "created": manifest.created,
        "megabytes": megabytes(artifact.path), "seconds": manifest.seconds,
        "verifiable": artifact.verifiable, "id": short_id(artifact),
        "layer": chosen[0] if chosen else layer, "control": control, "score": score, **whole,
    }  # fmt: skip


def unfinished_row(listing: Listing, work: Unfinished) -> dict[str, Any]:
    """Return the like of `row` for a folder that is not finished."""
    kind = f"{work.folder}, unfinished ({work.state.partition(';')[0]})"
    size = megabytes(listing.root / work.relative)
    rest = {"created": "", "seconds": 0.0, "id": "", "layer": None, "control": None, "score": None}
    return {"kind": kind, "path": work.relative, "megabytes": size, **rest}


def megabytes(folder: Path) -> float:
    """Return the size of a folder's files; what vanishes while they are counted is passed over."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += (Path(place) / name).lstat().st_size
    return round(size / 2**20, 2)


def scan(root: str | Path | None, read: Callable[[Path], Artifact | None] | None = None) -> Listing:
    """List a workspace; of a folder that is none, however large, only a bounded part is looked at.

    Args:
        root: the folder; by default as of `Workspace`.
        read: reads the artifact in a folder; `Workspace.read` by default.

    Raises:
        BadInputError: the path is no folder, or may not be read.
    """
    workspace = Workspace(root)
    root = workspace.root
    walk = Walk(root)
    try:
        exists = root.is_dir()
        names, whole = bounded_names(root, walk.left) if exists else ([], True)
    except OSError as error:
        raise BadInputError(
            f"workspace {root} cannot be read: {error.strerror}; choose another"
        ) from error
    walk.whole = whole
    for kind in KINDS.values():
        walk.take(kind, read or workspace.read, schemas=True)
    ours = {*_FILES, *(kind.folder for kind in KINDS.values())}
    return Listing(
        root,
        tuple(walk.newest_first()),
        tuple(walk.problems),
        exists,
        tuple(_unfinished(root, folder) for folder in walk.unfinished),
        tuple(name for name in names if name not in ours and not name.startswith(".")),
        walk.whole,
    )


def _unfinished(root: Path, folder: Path) -> Unfinished:
    resumable = folder.name.startswith(WORK)
    state, process = "half-written", None
    try:
        state = how_far(folder) if resumable else state
        process = writer(folder)
    except OSError:
        state = "it changes while it is read"
    at_work = f"{process} is at work here"
    if process is None:
        again = "goes on" if resumable else "clears it and begins anew"
        at_work = f"no process is at work here; the same command again {again}"
    return Unfinished(str(folder.relative_to(root)), f"{state}; {at_work}")
