"""How a run began: what it needs to go on to the same bits, and what an unfinished one is of.

What is kept lies where the stage put it: checkpoints of the run or of its groups, lines of answers,
tables of arms.  Each that names a machine is looked at, besides the run's own record.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from resa_lens.artifacts.manifest import flat
from resa_lens.artifacts.walk import WORK
from resa_lens.artifacts.workspace import has_progress, how_far, writer
from resa_lens.errors import BadInputError, DamagedError
from resa_lens.files import read_json, write_errors, write_json
from resa_lens.saes.checkpoint import STATE, check_machine, machine, newest

BEGUN = "begun.json"
COST = "cost.json"
"""What an unfinished run has taken so far, in all of its processes."""


def record_run(work: Path, ingredients: Mapping[str, Any], device: str, exact: bool) -> None:
    """Write how a run begins: its ingredients, threads, kernels, torch, and --deterministic."""
    # Another process may finish a shared sweep, and clear its folder, meanwhile.
    with write_errors(work), suppress(FileNotFoundError):
        value = {**machine(device), "deterministic": exact, "ingredients": dict(ingredients)}
        # Processes that share a sweep write it at the same time.
        own = work / f".{BEGUN}-{secrets.token_hex(4)}"
        write_json(own, value)
        own.replace(work / BEGUN)


def keep_cost(work: Path, cost: Mapping[str, Any]) -> None:
    """Write what an unfinished run has taken so far.

    A disk that is full or away is the run's to find: what it took is not worth its end.
    """
    with suppress(OSError):
        write_json(work / COST, cost)


def kept_cost(work: Path) -> dict[str, Any]:
    """Return what an unfinished run took before, as a meter writes it; empty where none is known.

    Raises:
        DamagedError: the record is damaged; it may be removed.
    """
    file = work / COST
    if not file.exists():
        return {}
    cost = read_json(file)
    names = ("seconds", "cpu_seconds", "peak_rss_mb")
    try:
        numbers = [*(cost[name] for name in names), *cost["joules"].values()]
    except (TypeError, KeyError, AttributeError):
        numbers = [None]
    if not all(isinstance(number, int | float) and number >= 0 for number in numbers):
        raise DamagedError(
            f"{file} is damaged; remove it, and what the run took before is not counted"
        )
    return cost


def records(work: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield what says how an unfinished run was computed, the run's own record first."""
    checkpoints = (newest(place) for place in (work, *sorted(work.glob("group-*"))))
    for file in (work / BEGUN, *(c / STATE for c in checkpoints if c)):
        if file.exists():
            value = read_json(file)
            if not isinstance(value, dict):
                raise DamagedError(f"{file} is damaged; start anew with --force")
            yield file.parent, value
    answers = work / "answers.jsonl"
    if answers.is_file():
        with answers.open("rb") as stream:
            first = stream.readline(2**16)
        # Without its end a kill cut it short; a damaged one is the reader's to refuse.
        if first.endswith(b"\n"):
            try:
                yield work, dict(json.loads(first)["settings"])
            except (ValueError, KeyError, TypeError, RecursionError):
                return


def restore_run(work: Path, device: str, threads: int | None, exact: bool) -> tuple[int, bool]:
    """Return the threads of an unfinished run, and whether it began with --deterministic.

    Args:
        work: its folder.
        device: where it goes on.
        threads: of --threads, or None.
        exact: whether --deterministic is given.

    Raises:
        BadInputError: it cannot go on to the same bits here; both values are named.
    """
    begun, began_exact = torch.get_num_threads(), exact
    states = list(records(work))
    for number, (place, state) in enumerate(states, 1):
        # The last is nearest to what is kept: answers may have other threads than their process.
        usable = threads if number == len(states) else None
        begun = check_machine(state, place, device, usable) or begun
        if device.startswith("cuda") and exact and state.get("deterministic") is False:
            raise BadInputError(
                f"the run in {place} began without --deterministic: it cannot become exact.\n"
                "Leave --deterministic out, or start anew with --force."
            )
        began_exact = began_exact or bool(state.get("deterministic"))
    return begun, began_exact


def unfinished_like(work: Path, ingredients: Mapping[str, Any]) -> str | None:
    """Describe an unfinished run of the same kind and model with other options, or None."""
    for other in sorted(work.parent.glob(f"{WORK}*")):
        try:
            value = read_json(other / BEGUN)["ingredients"]
            alike = all(value[key] == ingredients[key] for key in ("kind", "model"))
        except (DamagedError, BadInputError, KeyError, TypeError):
            continue
        # One that is at work now is another's; this process's own was interrupted in it.
        at_work = writer(other) not in (None, os.getpid())
        if not alike or other == work or at_work or not has_progress(other):
            continue
        theirs, mine = flat(value), flat(ingredients)
        different = [
            f"{key.rpartition('.')[2]} {theirs.get(key)!s:.20} there, {mine.get(key)!s:.20} here"
            for key in sorted({*theirs, *mine})
            if theirs.get(key) != mine.get(key)
        ]
        return f"{other} ({how_far(other)}; {', '.join(different[:3])})"
    return None
