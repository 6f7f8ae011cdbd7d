"""Texts of the features' table: searched and shown, read in the row groups that can matter.

By several threads, and only of the features that are asked for.  A feature's key is its layer and
its number in one integer.
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

from resa_lens.app.features.data import Source, opened
from resa_lens.artifacts.feature_tables import EXAMPLES, FEATURES, Groups
from resa_lens.figures.tokens import visible

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
    """
    where = np.zeros(keys.size, dtype=np.int8)
    notes: tuple[str, ...] = ()
    if source.activity is None or not keys.size:
        return where, notes
    for bit, (name, column, separator) in enumerate(
        ((FEATURES, "top_tokens", SEPARATOR), (EXAMPLES, "tokens", ""))
    ):
        groups = opened(source.activity, name)
        near = groups_with(groups, keys)
        if name == EXAMPLES and len(near) > TEXT_GROUPS:
            notes = (
                "Searched in the tokens that features raise; choose a layer or a rule to search in "
                "their examples too.",
            )
            continue
        use = partial(_matching, keys=keys, column=column, separator=separator, text=text)
        for hits in _in_batches(groups, near, column, use):
            where[hits] |= 1 << bit
    return where, notes


def raised(source: Source, keys: Array) -> list[str]:
    """Return the tokens that each of some features raises most; empty where that is unknown."""
    if source.activity is None or not keys.size:
        return [""] * keys.size

    def texts(rows: pa.Table) -> dict[int, str]:
        own = keys_of(rows["layer"].to_numpy(), rows["feature"].to_numpy())
        places = np.flatnonzero(np.isin(own, keys))
        tokens = rows["top_tokens"].take(pa.array(places)).to_pylist()
        return {
            int(own[place]): "  ".join(visible(token or "") for token in (listed or [])[:RAISED])
            for place, listed in zip(places, tokens, strict=True)
        }

    groups = opened(source.activity, FEATURES)
    parts = _in_batches(groups, groups_with(groups, np.sort(keys)), "top_tokens", texts)
    by_key = {key: text for part in parts for key, text in part.items()}
    return [by_key.get(int(key), "") for key in keys]


def _in_batches(
    groups: Groups, near: Sequence[int], column: str, use: Callable[[pa.Table], Any]
) -> list[Any]:
    """Read a column of row groups by several threads, and use each part of it."""
    batches = [near[first : first + _BATCH] for first in range(0, len(near), _BATCH)]
    with ThreadPoolExecutor() as pool:
        return list(
            pool.map(lambda batch: use(groups.read(batch, ["layer", "feature", column])), batches)
        )


def _matching(table: pa.Table, keys: Array, column: str, separator: str, text: str) -> Array:
    """Return the places in `keys` of the rows whose tokens, joined, hold the text in any case."""
    own = keys_of(table["layer"].to_numpy(), table["feature"].to_numpy())
    places = np.searchsorted(keys, own).clip(max=keys.size - 1)
    # Only the few features that are asked for: to join every row's tokens took most of the time.
    near = keys[places] == own
    lists = table[column].filter(pa.array(near)).combine_chunks()
    whole = pc.call_function("binary_join", [lists, pa.scalar(separator)])
    hit = pc.call_function(
        "match_substring", [whole], pc.MatchSubstringOptions(text, ignore_case=True)
    )
    # A null, where no lens was computed, is no hit.
    return places[near][hit.fill_null(False).to_numpy(zero_copy_only=False)]
