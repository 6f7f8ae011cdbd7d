"""Hashes of contents: of values, of files, and a cache of the latter in the user's cache folder.

The cache may be absent, damaged or read-only: then files are read.  Its key is what a file system
says of a file's state (device, inode, size, both times), never a name.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from resa_lens.files import open_regular

SMALL = 2**18
"""Bytes up to which reading a file is as quick as asking the cache."""
SETTLED_S = 2.0
"""A file that changed so recently may change again within the resolution of its times."""


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value, 64 hex digits, whatever the order of its keys.

    Raises:
        TypeError: a value that JSON does not have: its text might hold an address or a path.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path, *, cached: bool = True) -> str:
    """Return the SHA-256 of a regular file's bytes, 64 hex digits.

    Args:
        path: the file; links are followed.
        cached: take a known hash of the same state of the same file; False reads every byte.

    Raises:
        DamagedError: missing, or not a regular file.
        BadInputError: no permission to read it.
    """
    with open_regular(path) as descriptor:
        before = os.fstat(descriptor)
        key = _state_key(before)
        large = cached and before.st_size > SMALL
        if large and (known := _look_up(key)):
            return known
        computed = hashlib.sha256()
        while block := os.read(descriptor, 1 << 20):
            computed.update(block)
        after = os.fstat(descriptor)
        settled = time.time() - max(after.st_mtime, after.st_ctime) > SETTLED_S
        if large and settled and _state_key(after) == key:
            _remember(key, computed.hexdigest())
        return computed.hexdigest()


def file_state(path: Path) -> str:
    """Return what a file system says of a file's state; another content has another one.

    Raises:
        OSError: it is missing, or may not be looked at.
    """
    return _state_key(path.stat())


def _state_key(state: os.stat_result) -> str:
    parts = state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
    return ":".join(map(str, parts))


def cache_file() -> Path | None:
    """Return the file of the cache, or None where this user has no home."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "resa-lens" / "hashes.sqlite"
    try:
        return Path.home() / ".cache" / "resa-lens" / "hashes.sqlite"
    except RuntimeError:
        return None


def cache_folder(name: str) -> Path | None:
    """Return a folder beside that file, or None where that is not to be written."""
    file = cache_file()
    if file is None:
        return None
    folder = file.parent / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def _open() -> sqlite3.Connection | None:
    file = cache_file()
    if file is None:
        return None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(file, timeout=1)
        connection.execute("CREATE TABLE IF NOT EXISTS hashes (key TEXT PRIMARY KEY, hash TEXT)")
        return connection
    except (OSError, sqlite3.Error):
        return None


def _look_up(key: str) -> str | None:
    connection = _open()
    if connection is None:
        return None
    with closing(connection):
        try:
            row = connection.execute("SELECT hash FROM hashes WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error:
            return None
    return str(row[0]) if row else None


def _remember(key: str, value: str) -> None:
    connection = _open()
    if connection is None:
        return
    with closing(connection):
        try:
            with connection:
                connection.execute("INSERT OR REPLACE INTO hashes VALUES (?, ?)", (key, value))
        except sqlite3.Error:
            return
