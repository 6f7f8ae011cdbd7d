"""Where the bundled data lies: in a checkout `data/`, in a wheel `resa_lens/_data/`."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from resa_lens.errors import BadInputError
from resa_lens.files import LONGEST_PATH, named_path

_PACKAGE = Path(__file__).resolve().parent


def data_path(relative: str = "") -> Path:
    """Return the path of a bundled file or folder.

    Raises:
        BadInputError: neither the checkout nor the wheel holds it.
    """
    # The wheel's first: beside an installed package `data` may be somebody else's.
    roots = (_PACKAGE / "_data", _PACKAGE.parent / "data")
    for root in roots:
        if (root / relative).exists():
            return root / relative
    raise BadInputError(
        f"bundled file {relative!r} not found; looked in {roots[0]} and {roots[1]}. "
        "Reinstall resa-lens or use a full checkout."
    )


def app_script() -> Path:
    """Return the script that streamlit runs: in a checkout apps/, in a wheel the bundled copy."""
    bundled = _PACKAGE / "_data" / "feature_explorer.py"
    return bundled if bundled.exists() else _PACKAGE.parent / "apps" / "feature_explorer.py"


DEFAULT_FOLDER = "resa-workspace"
VARIABLE = "RESA_LENS_WORKSPACE"
ROOM = 1024
"""Bytes of a path that the names of artifacts and of their files may take."""


def workspace_folder(given: str | Path | None = None) -> Path:
    """Return the whole path of the workspace: as given, by RESA_LENS_WORKSPACE, or the default.

    Raises:
        BadInputError: it is a file, or no path of this machine.
    """
    folder = given or os.environ.get(VARIABLE) or DEFAULT_FOLDER
    path = named_path(folder, "workspace")
    try:
        root = path.resolve()
        is_file = root.exists() and not root.is_dir()
    # No permission, a circle of links, a current folder that was removed.
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInputError(
            f"workspace {str(folder)!r} cannot be reached: {error}; choose another --workspace"
        ) from error
    if is_file:
        raise BadInputError(f"workspace {root} is a file; pass a folder with --workspace")
    if len(os.fsencode(root)) > LONGEST_PATH - ROOM:
        raise BadInputError(
            f"workspace {str(root)[:50]}... is {len(os.fsencode(root))} bytes long, which leaves "
            f"no room for the files in it; use a path of at most {LONGEST_PATH - ROOM}"
        )
    return root


def check_writable(root: Path) -> None:
    """Raise BadInputError where a folder cannot be written, or not be made."""
    place = next(p for p in (root, *root.parents) if p.exists())
    if not place.is_dir():
        raise BadInputError(f"workspace {root}: {place} is a file; pass another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise BadInputError(f"no permission to write {place}; choose another --workspace")
    # Some places, as /proc, permit all and take nothing.
    probe = place / f".probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        if error.errno == errno.ENOSPC:  # what is written later says it
            return
        raise BadInputError(
            f"workspace {root} cannot be written: {error.strerror}; choose another --workspace"
        ) from error
