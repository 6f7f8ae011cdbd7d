"""Data sets of the hub: whole, as `datasets` keeps them, or their first rows as a stream.

A stream is kept as it comes: it is fetched once, goes on after a kill, and is there offline.

    <cache folder>/streams/<owner>--<name>/<commit>/<first row>.parquet

Each file says in its metadata where the stream goes on behind it, and whether it ends there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from resa_lens import claims
from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.files import run_lock
from resa_lens.hashes import cache_folder
from resa_lens.texts.config import HUB_SETS
from resa_lens.texts.tables import Row, Table, read_table

ROWS_A_FILE = 4096
"""So many rows of a stream are fetched again after a kill, at most."""
TIMEOUT_S = 10
_GOES_ON = b"resa-lens"


def hub_table(repo: str, name: str, rows: int | None = None) -> Table:
    """Return the training split of a hub data set.

    Args:
        repo: its id.
        name: what the user called it, for messages.
        rows: its first rows alone; no more of it are fetched than these.

    Raises:
        BadInputError: it is not in the cache and cannot be fetched.
        RunFailedError: a stream broke off, or cannot be kept.
    """
    folder = None if rows is None else _stream(repo, rows)
    if folder is None:
        return _whole(repo, name).first(rows)
    return read_table(folder).first(rows)


def _whole(repo: str, name: str) -> Table:
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    # Offline, its notes on every new try would bury the error.
    hub_logging.set_verbosity_error()
    try:
        loaded: Any = datasets.load_dataset(repo, split="train")
    except (OSError, ValueError, RuntimeError, DatasetNotFoundError) as error:
        known = "" if name in HUB_SETS else f", no short name ({', '.join(['tiny', *HUB_SETS])})"
        raise BadInputError(
            f"data {name!r} is no file{known}, and the hub's data set {repo} is not in the cache "
            f"and cannot be fetched ({type(error).__name__}).\nWhere there is a network run "
            f"`hf download {repo} --repo-type dataset --local-dir FOLDER`, "
            "copy it here and pass that folder, or one of its files."
        ) from error
    files = tuple(Path(file["filename"]) for file in loaded.cache_files)
    return Table(
        lambda: (Row(row, f"row {number}") for number, row in enumerate(loaded, start=1)),
        lambda: list(loaded.column_names),
        files,
        # Its Arrow files are mapped; without files it is in memory already.
        loaded.data.nbytes if files else 0,
    )


class _Kept(NamedTuple):
    """What is kept of a stream."""

    rows: int = 0
    state: Any = None
    """Where it goes on, as `datasets` says it."""
    ended: bool = False


def _stream(repo: str, rows: int) -> Path | None:
    """Return a folder with the first rows of a data set; None where the hub has none to stream."""
    streams = cache_folder("streams")
    if streams is None:
        raise RunFailedError(
            f"the first {rows:,} rows of {repo} are kept in the cache folder, which cannot be "
            "written; set XDG_CACHE_HOME to another"
        )
    place = streams / repo.replace("/", "--")
    commit = _commit(repo)
    if commit is None:
        known = sorted(place.glob("*/"), key=lambda folder: folder.stat().st_mtime, reverse=True)
        return next((folder for folder in known if _enough(_kept(folder), rows)), None)
    if not _enough(_kept(place / commit), rows):
        with run_lock(place / commit, "fetching"):
            _fetch(place / commit, repo, commit, rows)
    return place / commit


@cache
def _commit(repo: str) -> str | None:
    """Return a data set's newest commit, in a process once; None where the hub has no answer."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repo, timeout=TIMEOUT_S).sha
    except (OSError, ValueError):
        return None


def _enough(kept: _Kept, rows: int) -> bool:
    return kept.ended or kept.rows >= rows


def _kept(folder: Path) -> _Kept:
    """Return how far the files of a stream go without a gap."""
    kept = _Kept()
    while (file := _file(folder, kept.rows)).exists():
        try:
            metadata = pq.read_metadata(file)
            state, ended = json.loads(metadata.metadata[_GOES_ON])
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
            break  # damaged: fetched again
        kept = _Kept(kept.rows + metadata.num_rows, state, ended)
        if ended:
            break
    return kept


def _file(folder: Path, row: int) -> Path:
    return folder / f"{row:012d}.parquet"


def _fetch(folder: Path, repo: str, commit: str, rows: int) -> None:
    """Fetch what is missing of the first rows, from where the kept ones end."""
    import datasets
    from datasets.exceptions import DatasetsError

    kept = _kept(folder)
    for file in folder.glob("*.parquet"):
        if int(file.stem) >= kept.rows and not kept.ended:
            file.unlink()  # behind a damaged one
    going_on = f"; {kept.rows:,} are here" if kept.rows else ""
    claims.say(f"data {repo}: its first {rows:,} rows are fetched{going_on}")
    try:
        stream: Any = datasets.load_dataset(repo, split="train", streaming=True, revision=commit)
        if kept.state is not None:
            stream.load_state_dict(kept.state)
        source = iter(stream)
        while not _enough(kept, rows):
            kept = _keep(folder, kept, source, stream, rows)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise RunFailedError(
            f"the stream of {repo} broke off after {kept.rows:,} of {rows:,} rows: "
            f"{str(error).splitlines()[0][:200] if str(error) else type(error).__name__}\n"
            "What came is kept; run again to go on from there"
        ) from error


def _keep(folder: Path, kept: _Kept, source: Iterator[Any], stream: Any, rows: int) -> _Kept:
    """Write the next rows of a stream into a file; return what is kept then."""
    count = min(ROWS_A_FILE, rows - kept.rows)
    part = list(islice(source, count))
    after = _Kept(kept.rows + len(part), stream.state_dict(), len(part) < count)
    schema = stream.features.arrow_schema if stream.features else None
    table = pa.Table.from_pylist(part, schema=schema)
    goes_on = {_GOES_ON: json.dumps([after.state, after.ended])}
    file = _file(folder, kept.rows)
    draft = file.with_suffix(".part")
    pq.write_table(table.replace_schema_metadata(goes_on), draft)
    draft.replace(file)
    return after
