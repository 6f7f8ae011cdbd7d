"""Which workspace is opened where none is named, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from resa_lens.errors import BadInputError
from resa_lens.resources import DEFAULT_FOLDER, VARIABLE, data_path, workspace_folder

BUNDLED = "workspace"
"""Below data/: what `data/make_workspace.sh` made."""


@dataclass(frozen=True)
class Place:
    """A workspace that can be opened."""

    root: Path
    why: str
    """How it came to be the one."""


def candidates(folder: str | None) -> dict[str, Place]:
    """Return the workspaces at hand, by how they came to be, the one to open first.

    One that is named is opened whatever it holds: that it is missing or empty is said there.

    Args:
        folder: as --workspace names it.

    Raises:
        BadInputError: the folder is a file or no path of this machine; or none is at hand, and
            this installation lacks the bundled one.
    """
    places: dict[str, Place] = {}
    if named := folder or os.environ.get(VARIABLE):
        why = "given with --workspace" if folder else f"named by {VARIABLE}"
        places["given"] = Place(workspace_folder(named), why)
    elif Path(DEFAULT_FOLDER).is_dir():
        places["here"] = Place(workspace_folder(DEFAULT_FOLDER), f"./{DEFAULT_FOLDER} is here")
    try:
        root = data_path(BUNDLED).resolve()
    except BadInputError:
        if places:
            return places
        raise
    if not any(place.root == root for place in places.values()):
        why = "the example that ships with resa-lens"
        if not places:
            why += f": no other was given, and no ./{DEFAULT_FOLDER}"
        places["bundled"] = Place(root, why)
    return places
