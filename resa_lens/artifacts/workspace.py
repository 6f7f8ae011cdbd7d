"""The workspace: one folder of artifacts, each with a manifest, written whole or not at all.

    saes/<model>/<run>/<hookpoint>/{cfg.json, sae.safetensors}
    counts/<model>/<run>/  recommendations/<model>/<run>/  adapters/<run>/  evals/<run>/

An artifact is a folder that appears whole (`resa_lens.publishing`).  Several processes and hosts
may write; reading writes nothing.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

from resa_lens import claims
from resa_lens.artifacts import kinds as kinds  # registers them
from resa_lens.artifacts.artifact import KINDS, Artifact, Kind
from resa_lens.artifacts.manifest import LARGEST, MANIFEST, SHOWN, Manifest, read_manifest, sealed
from resa_lens.artifacts.walk import Walk
from resa_lens.errors import BadInputError, DamagedError
from resa_lens.files import read_regular, write_json
from resa_lens.hashes import file_hash
from resa_lens.machine.meters import peak_memory_mb
from resa_lens.publishing import TEMPORARY, filled
from resa_lens.resources import check_writable, workspace_folder

LOCK = "whole"
"""Of a resumable run's folder: the folder of its lock, which outlives what is cleared."""


class Workspace:
    """A folder of artifacts; it comes into being with its first artifact."""

    def __init__(self, root: str | Path | None = None) -> None:
        """Name a workspace; nothing is read or written.

        Args:
            root: the folder; by default RESA_LENS_WORKSPACE, else ./resa-workspace.

        Raises:
            BadInputError: the path is a file, or no path of this machine.
        """
        self.root = workspace_folder(root)

    def check_writable(self) -> None:
        """Raise BadInputError where nothing can be written: before long work, not after it."""
        check_writable(self.root)

    def path(self, *parts: str) -> Path:
        """Return the path of an artifact; the parts may not lead out of the workspace.

        Raises:
            BadInputError: they do.
        """
        path = self.root.joinpath(*parts)
        if not path.resolve().is_relative_to(self.root):
            raise BadInputError(f"path {'/'.join(parts)!r} leads out of the workspace")
        return path

    def relative(self, path: Path) -> str:
        """Return a path as manifests hold it: relative to the workspace where it lies inside."""
        path = path.resolve()
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)

    # Reading

    def read(self, folder: Path) -> Artifact | None:
        """Return the artifact in a folder, or None where there is none.

        Raises:
            DamagedError: the manifest is damaged, or was changed.
            BadInputError: it is of a newer schema, or there is no permission to read it.
        """
        file = folder / MANIFEST
        # A folder that is replaced just now is missing for an instant where a file system
        # cannot exchange two.
        for attempt in (0, 1):
            if _is_there(file):
                break
            if attempt or not any(folder.parent.glob(f".tmp-*.old-{folder.name}")):
                return None
            time.sleep(0.05)
        return Artifact(folder, self.relative(folder), read_manifest(file))

    def folder_of_id(self, kind: type[Kind], digits: str) -> Path | None:
        """Return the one folder of a kind whose identity begins with these digits, if there is."""
        if not re.fullmatch("[0-9a-f]{4,12}", digits):
            return None
        folders = Walk(self.root).folders(kind)
        known = [f for f in folders if f.name.rpartition("-")[2].startswith(digits)]
        return known[0] if len(known) == 1 else None

    def artifacts(
        self,
        kind: type[Kind] | None = None,
        *,
        problems: list[str] | None = None,
        schemas: bool = False,
    ) -> list[Artifact]:
        """Return the complete artifacts of a kind, or of all, the newest first.

        Args:
            kind: of the artifacts; all by default.
            problems: takes a sentence for each artifact that cannot be read.
            schemas: whether results and settings must be as the kind says.
        """
        walk = Walk(self.root, problems=[] if problems is None else problems)
        for one in [kind] if kind else KINDS.values():
            walk.take(one, self.read, schemas=schemas)
        return walk.newest_first()

    def lookup(self, kind: type[Kind], identity: str, preferred: Path) -> Artifact | None:
        """Return the artifact of an identity: at its preferred place, else wherever it lies.

        Raises:
            DamagedError: a folder that bears the identity in its name is damaged, and no other
                artifact has it.
        """
        damaged: DamagedError | None = None
        mark = f"-{identity[:SHOWN]}"
        others = (folder for folder in Walk(self.root).folders(kind) if folder != preferred)
        # By name first: a folder that a person has renamed is the exception.
        for folder in (preferred, *sorted(others, key=lambda f: not f.name.endswith(mark))):
            named = folder == preferred or folder.name.endswith(mark)
            try:
                # Of the others most are neither parsed nor checked.
                if not named and identity.encode() not in read_regular(folder / MANIFEST, LARGEST):
                    continue
                artifact = self.read(folder)
            except DamagedError as error:
                damaged = damaged or (error if folder.name.endswith(mark) else None)
                continue
            except BadInputError:
                continue
            if artifact and artifact.manifest.identity == identity:
                return artifact
        if damaged:
            raise damaged
        return None

    # Writing

    @contextlib.contextmanager
    def artifact(self, folder: Path, manifest: Manifest) -> Iterator[Path]:
        """Fill a new artifact: yields a temporary folder that takes its place at the end.

        Raises:
            BadInputError: no permission to write here.
            TakenError: another process wrote the same meanwhile; the workspace is as that left it.
            RunFailedError: the disk is full, or another write error; the workspace is as before.
        """
        companions = KINDS[manifest.kind].beside if manifest.kind in KINDS else ()
        began = time.monotonic()
        # A folder that is no workspace may hold other programs' files of such names.
        inside = Path(self.relative(folder)).parts[0] in {kind.folder for kind in KINDS.values()}
        # Only writes may fail as "disk full": an OSError of a computation inside the block
        # is a write too, because callers compute first and write here.
        with filled(folder, seal=MANIFEST, others=inside) as temporary:
            temporary.mkdir()
            yield temporary
            manifest.seconds = manifest.seconds or round(time.monotonic() - began, 3)
            manifest.peak_memory_mb = peak_memory_mb()
            manifest.files = {
                str(file.relative_to(temporary)): file_hash(file, cached=False)
                for file in sorted(temporary.rglob("*"))
                if file.is_file() and file.name not in companions
            }
            write_json(temporary / MANIFEST, sealed(manifest))


def _is_there(file: Path) -> bool:
    try:
        file.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        raise BadInputError(f"{file} cannot be read: {error.strerror}") from error
    return True


def writer(folder: Path) -> str | None:
    """Name the process that is at work in an unfinished folder; None: it was killed.

    Raises:
        OSError: its claim cannot be read.
    """
    match = TEMPORARY.fullmatch(folder.name)
    claim = claims.marked(folder.parent, match[1]) if match else claims.newest(folder / LOCK)
    if claim is None or claims.is_alive(claim) is False:
        return None
    return claims.name(claim)


def has_progress(folder: Path) -> bool:
    """Return whether an unfinished run has left something to go on from."""
    answers = folder / "answers.jsonl"
    if answers.is_file():
        # The first line is the run's settings.
        with answers.open("rb") as stream:
            if len(list(zip(stream, range(2), strict=False))) == 2:
                return True
    marks = ("checkpoint-*", "group-*/checkpoint-*", "*/figures.json", "*.parquet", "jobs/*.json",
             "generations.jsonl")  # fmt: skip
    return any(any(folder.glob(mark)) for mark in marks)


def how_far(folder: Path) -> str:
    """Say how far an unfinished run came, by what it has kept."""

    def several(n: int, what: str) -> str:
        return f"{n} {what}{'' if n == 1 else 's'}"

    places = (folder, *folder.glob("group-*"))
    steps = [p.name.rpartition("-")[2] for place in places for p in place.glob("checkpoint-*")]
    # A tuning on a model's own answers has steps once it has all of these.
    if not steps and (folder / "answers.jsonl").is_file():
        # The first line is the run's settings.
        with (folder / "answers.jsonl").open("rb") as stream:
            lines = sum(block.count(b"\n") for block in iter(lambda: stream.read(2**20), b""))
        return several(max(0, lines - 1), "answer")
    if (folder / "locks").is_dir():
        return several(len(list((folder / "jobs").glob("*.json"))), "job")
    if arms := len(list(folder.glob("*.parquet"))):
        return several(arms, "arm")
    return f"step {max((int(step) for step in steps if step.isdigit()), default=0)}"
