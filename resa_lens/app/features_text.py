"""Texts of features: searched and read in the row groups that can matter, by several threads.

A feature's key is its layer and its number in one integer, so that tables can be joined by sorting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from resa_lens.app.features_data import Source, opened
from resa_lens.app.tokens import visible
from resa_lens.pipeline.feature_files import EXAMPLES, FEATURES, Groups

TEXT_GROUPS = 400
"""Row groups of examples that one search reads at most: six layers of 65,536 features."""
RAISED = 5
"""Tokens of the logit lens in the table."""
SEPARATOR = "\x1f"
"""Between tokens that are searched one by one."""
_BATCH = 32  # row groups that one thread reads at once

Array = NDArray[Any]


def keys_of(layers: Array, features: Array) -> NDArray[np.int64]:
    """Return the keys of features."""
    return (layers.astype(np.int64) << 32) | features.astype(np.int64)


def where_in(keys: Array, wanted: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Return where keys stand among sorted ones, and whether they are there."""
    if not keys.size:
        return np.zeros(wanted.size, dtype=np.int64), np.zeros(wanted.size, dtype=bool)
    place = np.searchsorted(keys, wanted).clip(max=keys.size - 1)
    return place, keys[place] == wanted


def groups_with(groups: Groups, keys: Array) -> list[int]:
    """Return the row groups that can hold some of the features, given by their sorted keys."""
    low, high = groups.low, groups.high
    first = np.searchsorted(keys, keys_of(low[:, 0], low[:, 1]), side="left")
    last = np.searchsorted(keys, keys_of(high[:, 0], high[:, 1]), side="right")
    # The smallest feature of a group with two layers need not be of the smaller layer.
    return np.flatnonzero((last > first) | (low[:, 0] != high[:, 0])).tolist()


def search(source: Source, text: str, keys: Array) -> tuple[NDArray[np.int8], tuple[str, ...]]:
    """Look for a text in the tokens that features raise, and around their strongest activations.

    Args:
        source: the runs.
        text: in any case; in an example it may go over several tokens.
        keys: of the features, sorted.

    Returns:
        For each feature 0, 1 (in what it raises), 2 (in an example) or 3; and what was left out.

    Raises:
        BadInputError: a table is missing or damaged.
    """
    found = np.zeros(keys.size, dtype=np.int8)
    notes: tuple[str, ...] = ()
    for bit, (name, column, between) in enumerate(
        ((FEATURES, "top_tokens", SEPARATOR), (EXAMPLES, "tokens", ""))
    ):
        if (file := source.file(name)) is None:
            continue
        groups = opened(file)
        near = groups_with(groups, keys)
        if name == EXAMPLES and len(near) > TEXT_GROUPS:
            notes = (
                "Searched in the tokens that features raise; choose a layer or a rule to search in "
                "their examples too.",
            )
            continue
        use = partial(_matching, column=column, between=between, text=text)
        if hits := _in_batches(near, _reader(groups, column, use)):
            found[np.isin(keys, np.concatenate(hits))] |= 1 << bit
    return found, notes


def raised(source: Source, layers: Array, features: Array) -> list[str]:
    """Return the tokens that each of some features raises most; empty where that is unknown.

    Raises:
        BadInputError: the table is missing or damaged.
    """
    file = source.file(FEATURES)
    if file is None or not layers.size:
        return [""] * layers.size
    wanted = keys_of(layers, features)

    def texts(held: pa.Table) -> dict[int, str]:
        keys = keys_of(held["layer"].to_numpy(), held["feature"].to_numpy())
        mine = np.flatnonzero(np.isin(keys, wanted))
        tokens = held["top_tokens"].take(pa.array(mine)).to_pylist()
        return {
            int(keys[row]): "  ".join(visible(token or "") for token in (shown or [])[:RAISED])
            for row, shown in zip(mine, tokens, strict=True)
        }

    groups = opened(file)
    near = groups_with(groups, np.sort(wanted))
    found: dict[int, str] = {}
    for part in _in_batches(near, _reader(groups, "top_tokens", texts)):
        found |= part
    return [found.get(int(key), "") for key in wanted]


def _reader(
    groups: Groups, column: str, use: Callable[[pa.Table], Any]
) -> Callable[[Sequence[int]], Any]:
    return lambda batch: use(groups.read(batch, ["layer", "feature", column]))


def _in_batches(near: Sequence[int], read: Callable[[Sequence[int]], Any]) -> list[Any]:
    batches = [near[first : first + _BATCH] for first in range(0, len(near), _BATCH)]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(read, batches))


def _matching(held: pa.Table, column: str, between: str, text: str) -> Array:
    """Return the keys of the rows whose tokens, joined, hold the text in any case."""
    lists = held[column].combine_chunks()
    whole = pc.call_function("binary_join", [lists, pa.scalar(between)])
    hit = pc.call_function(
        "match_substring", [whole], pc.MatchSubstringOptions(text, ignore_case=True)
    )
    rows = held.filter(hit)  # a null, where no lens was computed, is no hit
    return keys_of(rows["layer"].to_numpy(), rows["feature"].to_numpy())
