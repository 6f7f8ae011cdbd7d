"""Folders and files that appear whole: filled beside their place, published by a rename.

What is being filled has a temporary name that bears the token of a claim (`resa_lens.claims`).  A
killed process leaves the old state, and who writes there next clears what it left behind.  Several
processes and hosts may write: what another one published meanwhile is never replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from resa_lens import claims
from resa_lens.errors import BadInputError, TakenError
from resa_lens.files import read_regular, write_errors

TEMPORARY = re.compile(r"\.tmp-([0-9a-f]+)(\.old)?-(.+)")
"""What is being filled under the claim of a token, or with `.old` the folder that it replaces."""
Seal = tuple[int, bytes]


@contextlib.contextmanager
def filled(place: Path, *, seal: str = "", others: bool = False) -> Iterator[Path]:
    """Yield the path of a folder or a file to make; complete, it takes its place.

    Args:
        place: of the folder or the file; folders above it come into being.
        seal: file in the folder that tells it from an earlier one at the same place.
        others: clear too what killed processes left of others than `place`; else these may be
            other programs' files of such names.

    Raises:
        BadInputError: no permission to write here.
        TakenError: another process published a folder here meanwhile, or took over.
        RunFailedError: the disk is full, or another write error; all is as before.
    """
    new = [p for p in (place.parent, *place.parent.parents) if not p.exists()]
    complete = False
    try:
        with write_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            put_back(place)
            _clear_stale(place.parent, None if others else place.name)
            before = _seal(place, seal)
            with claims.mark(place.parent).kept() as claim:
                temporary = place.parent / f".tmp-{claim.token}-{place.name}"
                try:
                    yield temporary
                    claims.prove()
                    if temporary.is_dir():
                        _publish(temporary, place, before, seal)
                    else:
                        temporary.replace(place)
                    complete = True
                finally:
                    _remove(temporary)
    finally:
        if not complete:
            for parent in new:
                with contextlib.suppress(OSError):
                    parent.rmdir()


_EXCHANGE = 2
"""RENAME_EXCHANGE of Linux' renameat2."""


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders at one stroke; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here = -100  # AT_FDCWD
    return rename(here, os.fsencode(first), here, os.fsencode(second), _EXCHANGE) == 0


def _seal(place: Path, name: str) -> Seal | None:
    """Return what tells a folder from another at its place; None where nothing is."""
    try:
        number = place.lstat().st_ino
    except OSError:
        return None
    try:
        # It may be damaged: a pipe, a device, without end.
        return number, read_regular(place / name)
    except BadInputError:
        return number, b""


def _publish(temporary: Path, place: Path, before: Seal | None, seal: str) -> None:
    """Give a complete folder its place; what stood there `before` it is replaced.

    Raises:
        TakenError: another process has published there since.
    """
    standing = _seal(place, seal)
    if standing is None:
        try:
            # Never replaces a folder that holds something.
            temporary.rename(place)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise _written_meanwhile(place) from error
        return
    if standing != before:
        raise _written_meanwhile(place)
    if _exchange(temporary, place):
        return
    old = temporary.with_name(temporary.name.replace("-" + place.name, ".old-" + place.name, 1))
    place.rename(old)
    try:
        temporary.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _written_meanwhile(place: Path) -> TakenError:
    return TakenError(f"another process wrote {place} meanwhile; the same command again reads it")


def put_back(place: Path) -> None:
    """Rename the folder that a killed process had set aside to its place, if that is empty."""
    if place.exists():
        return
    for aside in place.parent.glob(f".tmp-*.old-{place.name}"):
        match = TEMPORARY.fullmatch(aside.name)
        if match and match[3] == place.name and _is_left(aside.parent, match[1]):
            with contextlib.suppress(OSError):
                aside.rename(place)
                return


def _is_left(parent: Path, token: str) -> bool:
    """Return whether the process that wrote under a token is known to be gone."""
    return claims.is_alive(claims.marked(parent, token)) is False


def _clear_stale(parent: Path, only: str | None) -> None:
    """Remove what killed processes left, of all places or of one.

    Of another host's process that shows only while it is watched: its files may stay until then.
    """
    for stale in parent.glob(".tmp-*"):
        match = TEMPORARY.fullmatch(stale.name)
        if not match or only not in (None, match[3]) or not _is_left(parent, match[1]):
            continue
        if match[2]:
            put_back(parent / match[3])
        _remove(stale)
        claims.marked(parent, match[1]).unlink(missing_ok=True)
    for claim in parent.glob(".claim-*"):
        # Among other programs' files only what says by itself to be of a process of this host.
        if (only is None or claims.is_of_here(claim)) and claims.is_alive(claim) is False:
            claim.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
