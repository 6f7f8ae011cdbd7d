"""What a workspace holds: its artifacts, what is unfinished in it, and what cannot be read.

The folder may be anything: somebody else's, huge, half-written, or changing while it is read.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import streamlit as st

from resa_lens.errors import BadInputError
from resa_lens.workspace import KINDS, MANIFEST, WORK, Manifest, Workspace, how_far, writer

FOLDERS = {
    "saes": "saes",
    "quality": "quality",
    "counts": "counts",
    "stability": "stability",
    "recommendation": "recommendations",
    "activity": "activity",
    "scores": "scores",
    "falsification": "falsified",
    "effects": "effects",
    "attribution": "attributions",
    "ablation": "ablations",
    "matches": "matches",
    "adapter": "adapters",
    "eval": "evals",
    "sweep": "sweeps",
    "model": "models",
}
"""The folder below the workspace, by kind of artifact."""
_BESIDE = ("report.html", "README.md")
MOST_ENTRIES, DEEPEST = 20_000, 4
"""How many files and folders, and how many floors, are looked at: a workspace has far fewer."""


@dataclass(frozen=True)
class Artifact:
    """One complete artifact of the workspace."""

    path: Path
    relative: str
    manifest: Manifest

    @property
    def weights(self) -> str:
        """Hash of the model's weights; of the base model for an adapter."""
        return self.manifest.hashes.get("weights", "")

    @property
    def slug(self) -> str:
        """The model's folder below counts/ and saes/."""
        return self.path.parent.name

    def label(self) -> str:
        """Run and time, to choose by."""
        return f"{self.path.name} ({self.manifest.created.replace('T', ' ')[:16]} UTC)"


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
class Listing:
    """What a workspace holds."""

    root: Path
    artifacts: tuple[Artifact, ...]
    """The newest first."""
    problems: tuple[str, ...]
    """What cannot be read, each with what to do."""
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

    def of(self, kind: str) -> list[Artifact]:
        """The artifacts of a kind, the newest first."""
        return [a for a in self.artifacts if a.manifest.kind == kind]

    def at(self, relative: str) -> Artifact | None:
        """The artifact at a workspace-relative path."""
        return next((a for a in self.artifacts if a.relative == relative), None)


def scan(root: str | None) -> Listing:
    """List a workspace; of a folder that is none, however large, only a bounded part is looked at.

    Raises:
        BadInputError: the path is no folder, or may not be read.
    """
    try:
        workspace = Workspace(root, recover=False)
        exists = workspace.root.is_dir()
        names = sorted(e.name for e in _entries(workspace.root)[0]) if exists else []
    except OSError as error:
        raise BadInputError(
            f"workspace {root} cannot be read: {error.strerror}; choose another --workspace, or "
            "ask for the permission to read it"
        ) from error
    seen = _walk(workspace.root)
    artifacts: list[tuple[int, Artifact]] = []
    problems = list(seen.problems)
    for folder in seen.complete:
        manifest, problem, changed = _manifest_at(workspace.root, folder / MANIFEST)
        if manifest is None:
            problems += [problem] if problem else []
            continue
        relative = str(folder.relative_to(workspace.root))
        artifacts.append((changed, Artifact(folder, relative, manifest)))
    # By what they say of themselves: a checkout sets the files' times anew.
    artifacts.sort(key=lambda item: (item[1].manifest.created, item[0]), reverse=True)
    return Listing(
        workspace.root,
        tuple(artifact for _, artifact in artifacts),
        tuple(problems),
        exists,
        tuple(_unfinished(workspace.root, folder) for folder in seen.unfinished),
        tuple(name for name in names if name not in (*FOLDERS.values(), *_BESIDE)),
        seen.whole,
    )


@dataclass
class _Seen:
    """What a walk through a folder met."""

    complete: list[Path]
    unfinished: list[Path]
    problems: list[str]
    whole: bool = True


def _walk(root: Path) -> _Seen:
    """Look for artifacts and unfinished folders: first in all that resa-lens makes, then beside."""
    seen = _Seen([], [], [])
    looked_at = 0
    known = set(FOLDERS.values())
    waiting = deque([(root, 0, False)])
    while waiting:
        folder, depth, ours = waiting.popleft()
        try:
            found, all_of_it = _entries(folder)
        except FileNotFoundError:
            continue  # removed meanwhile
        except OSError as error:
            if ours or depth == 0:
                seen.problems.append(
                    f"{folder} cannot be read: {error.strerror}; ask for the permission to read it"
                )
            continue
        if depth and any(entry.name == MANIFEST for entry in found):
            seen.complete.append(folder)
            continue
        # An empty folder costs a look too; the root's own entries are counted as they are opened.
        looked_at += 1 + (len(found) if depth else 0)
        seen.whole = seen.whole and all_of_it
        if looked_at > MOST_ENTRIES:
            seen.whole = False
            return seen
        for entry in found:
            if entry.name.startswith((".tmp-", WORK)):
                seen.unfinished.append(Path(entry.path))
            elif depth < DEEPEST and not entry.name.startswith(".") and _is_folder(entry):
                inside = ours or (depth == 0 and entry.name in known)
                # At the front what is ours, so that the bound never cuts it for what is not.
                add = waiting.appendleft if inside else waiting.append
                add((Path(entry.path), depth + 1, inside))
    return seen


def _entries(folder: Path) -> tuple[list[os.DirEntry[str]], bool]:
    """Return a folder's entries by name, and whether these are all: not where there are too many.

    What resa-lens makes in a root comes first, so that no crowd beside it hides it.
    """
    with os.scandir(folder) as stream:
        found = list(islice(stream, MOST_ENTRIES + 1))
    whole = len(found) <= MOST_ENTRIES
    if not whole:
        names = {entry.name for entry in found}
        wanted = [folder / name for name in FOLDERS.values() if name not in names]
        with os.scandir(folder) as stream:
            known = {path.name for path in wanted if path.exists()}
            found += [entry for entry in stream if entry.name in known] if known else []
    return sorted(found, key=lambda entry: entry.name), whole


def state(file: Path) -> int:
    """Return a number that is another one when a file was written or replaced.

    Its time alone is kept by copies that keep times.

    Raises:
        OSError: it is missing or cannot be read.
    """
    found = file.stat()
    return hash((found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in a circle
        return False


def _unfinished(root: Path, folder: Path) -> Unfinished:
    relative = str(folder.relative_to(root))
    if folder.name.startswith(WORK):
        try:
            state = how_far(folder)
        except OSError:
            state = "it changes while it is read"
    else:
        state = "half-written"
    pid = writer(folder)
    at_work = (
        f"process {pid} is at work here"
        if pid
        else "no process is at work here; the same command again "
        + ("goes on" if folder.name.startswith(WORK) else "clears it and begins anew")
    )
    return Unfinished(relative, f"{state}; {at_work}")


def _manifest_at(root: Path, file: Path) -> tuple[Manifest | None, str, int]:
    """A manifest or the problem with it, and when it was written."""
    try:
        changed = file.stat().st_mtime_ns
        manifest, problem = _manifest(str(root), str(file.parent), state(file))
    except FileNotFoundError:  # removed meanwhile: no longer a problem
        return None, "", 0
    except OSError as error:
        what = f"{file} cannot be read: {error.strerror}; ask for the permission to read it"
        return None, what, 0
    if problem and file.relative_to(root).parts[0] not in FOLDERS.values():
        # It may be another program's: nobody is told to remove it.
        problem = f"{file} is not of resa-lens, or of another version; it is left out"
    return manifest, problem, changed


@st.cache_data(show_spinner=False, max_entries=2000)
def _manifest(root: str, folder: str, changed: int) -> tuple[Manifest | None, str]:
    """A manifest, or the problem with it; `changed` is a part of the cache's key."""
    try:
        manifest = Workspace(root, recover=False).manifest(Path(folder))
    except BadInputError as error:
        return None, str(error)
    if manifest is None:
        return None, f"{folder} has no {MANIFEST}"
    if manifest.kind not in KINDS:
        return None, (
            f"{folder}: kind {manifest.kind!r} is unknown to this version; update resa-lens"
        )
    return manifest, ""
