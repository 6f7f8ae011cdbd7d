"""One walk through a workspace: its artifacts, and a sentence for each that cannot be read.

Only the folders of the kinds are walked.  What vanishes meanwhile is passed over; of a folder that
is no workspace, however large, only a bounded part is looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from resa_lens.artifacts.artifact import KINDS, Artifact, Kind
from resa_lens.artifacts.manifest import MANIFEST
from resa_lens.errors import BadInputError

WORK = ".work-"
"""Before the name of a folder in which a long run keeps what it has finished, to go on from."""
MOST = 20_000
"""Folders and files that are looked at: a workspace has far fewer."""


@dataclass
class Walk:
    """One walk, and what it has met so far."""

    root: Path
    left: int = field(default_factory=lambda: MOST)
    """Entries that may still be looked at."""
    whole: bool = True
    """False where there is more than was looked at."""
    artifacts: list[Artifact] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    """Folders that a run is filling, or left when it was killed."""

    def folders(self, kind: type[Kind]) -> Iterator[Path]:
        """Yield the folders that may hold an artifact of a kind, sorted by name."""
        places = self._inside(self.root / kind.folder)
        if not kind.by_model:
            yield from places
            return
        for place in places:
            if os.path.lexists(place / MANIFEST):
                self.problems.append(
                    f"{place} lies where the folders of models do; move it into one of them"
                )
            else:
                yield from self._inside(place)

    def take(
        self, kind: type[Kind], read: Callable[[Path], Artifact | None], *, schemas: bool = False
    ) -> None:
        """Read the artifacts of a kind, and note what is wrong with the others.

        Args:
            kind: of the artifacts.
            read: reads the artifact in a folder.
            schemas: whether results and settings must be as the kind says.
        """
        for folder in self.folders(kind):
            try:
                artifact = read(folder)
                if artifact and artifact.manifest.kind == kind.name:
                    if schemas:
                        _ = artifact.results, artifact.settings
                    self.artifacts.append(artifact)
                    continue
            except BadInputError as error:
                # Removed meanwhile it is no problem.
                if not _vanished(folder / MANIFEST):
                    self.problems.append(" ".join(str(error).split()))
                continue
            except OSError as error:
                if not isinstance(error, FileNotFoundError):
                    self._refused(folder, error)
                continue
            if artifact is None:
                if _holds_one(folder, kind):
                    self.problems.append(f"{folder} has no {MANIFEST}: its origin is not known")
            elif artifact.manifest.kind in KINDS:
                self.problems.append(
                    f"{folder} is of kind {artifact.manifest.kind}; move it into "
                    f"{artifact.kind.folder}"
                )
            else:
                self.problems.append(
                    f"{folder}: kind {artifact.manifest.kind!r:.80} is unknown to this version; "
                    "update resa-lens"
                )

    def newest_first(self) -> list[Artifact]:
        """Return the artifacts by what they say of themselves, not by the times of files."""
        return sorted(self.artifacts, key=lambda a: (a.manifest.created, a.relative), reverse=True)

    def _inside(self, place: Path) -> Iterator[Path]:
        """Yield the folders in a folder; what is unfinished there is kept apart."""
        try:
            names, whole = bounded_names(place, self.left)
        except (FileNotFoundError, NotADirectoryError):
            return  # removed meanwhile, or never there
        except OSError as error:
            self._refused(place, error)
            return
        self.left -= len(names)
        self.whole = self.whole and whole
        for name in names:
            if name.startswith((".tmp-", WORK)):
                self.unfinished.append(place / name)
            elif not name.startswith(".") and _is_folder(place / name):
                yield place / name

    def _refused(self, place: Path, error: OSError) -> None:
        self.problems.append(
            f"{place} cannot be read: {error.strerror}; ask for the permission to read it"
        )


def bounded_names(folder: Path, most: int) -> tuple[list[str], bool]:
    """Return the names in a folder, sorted, and whether these are all."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in islice(entries, most + 1))
    return names[:most], len(names) <= most


def _holds_one(folder: Path, kind: type[Kind]) -> bool:
    """Return whether a folder holds a file of a kind; any file, where the kind names none."""
    if kind.files:
        return any(os.path.lexists(folder / name) for name in kind.files)
    try:
        return any((folder / name).is_file() for name in bounded_names(folder, MOST)[0])
    except OSError:
        return False


def _vanished(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # no permission to look
        return False
    return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no permission above it, or a link that leads round in a circle
        return False
