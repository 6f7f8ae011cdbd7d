"""What the pages read of a workspace: checked once for each state of a file, never written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import streamlit as st
from pydantic import BaseModel

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.commands import kind_of
from resa_lens.artifacts.kinds.activity import Activity
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.listing import Listing
from resa_lens.artifacts.listing import scan as scan_folder
from resa_lens.artifacts.manifest import MANIFEST
from resa_lens.artifacts.workspace import Workspace

Schema = TypeVar("Schema", bound=BaseModel)


def scan(root: str) -> Listing:
    """List a workspace, reading each manifest once for each state of it; see `listing.scan`."""
    workspace = Workspace(root)
    return scan_folder(
        root,
        lambda folder: _artifact(str(workspace.root), str(folder), state(folder / MANIFEST)),
    )


# Resources are shared by all sessions and never copied: nobody changes them.
@st.cache_resource(show_spinner=False, max_entries=2000)
def _artifact(root: str, folder: str, changed: int) -> Artifact | None:
    return Workspace(root).read(Path(folder))


def state(file: Path) -> int:
    """Return a number that is another one when a file was written or replaced; 0 if it is missing.

    Its time alone is kept by copies that keep times.
    """
    try:
        now = file.stat()
    except OSError:
        return 0
    return hash((now.st_mtime_ns, now.st_ctime_ns, now.st_size, now.st_ino))


def version(artifact: Artifact) -> tuple[object, ...]:
    """Return what results are cached by: another value once a file of an artifact was replaced."""
    states = [state(artifact.path / name) for name in artifact.kind.files]
    return str(artifact.path), artifact.manifest.created, *states


Hashes = dict[str | type[Any], Callable[[Any], Any]]
HASHES: Hashes = {Artifact: version}
"""Of streamlit's caches: what is made of artifacts is made once for each state of their files."""


@st.cache_resource(show_spinner=False, max_entries=200, hash_funcs=HASHES)
def read(artifact: Artifact, name: str, schema: type[Schema]) -> Schema:
    """Read a JSON file of an artifact, once for each state of it; see `Artifact.read`."""
    return artifact.read(name, schema)


def saes_path(artifact: Artifact) -> str:
    """Return the path of the SAEs that an artifact was made from, "" without any."""
    return next((path for path in artifact.manifest.parents if kind_of(path) is Saes), "")


def features_of(listing: Listing, saes: str) -> dict[str, str]:
    """Return the address of the features of SAEs, which their path names: their newest activity."""
    runs = (a for a in listing.of(Activity) if saes and saes in a.manifest.parents)
    return next(({"run": run.relative} for run in runs), {})
