"""The table of features: filtered, sorted, and no more of it made than is shown.

Columns of one layer, or of all, are read once and kept as arrays; 26 layers of 65,536 features are
1.7 million rows.  Texts are read only of what is shown or can match.  A feature's key is
its layer and its number in one integer, so that tables can be joined by sorting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import streamlit as st
from numpy.typing import NDArray

from resa_lens.app import data
from resa_lens.app.features.data import HASHES, SCORES, Source, opened
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.feature_tables import FEATURES, keys_of, raised, search
from resa_lens.artifacts.kinds.counts import RULES
from resa_lens.artifacts.kinds.scores import ScoreSummary
from resa_lens.errors import BadInputError
from resa_lens.figures.plots import VERDICT_COLOURS
from resa_lens.figures.tokens import visible
from resa_lens.texts.prompts import PHASES

Array = NDArray[Any]
PAGE = 200
"""Rows of a page."""
RAISED = 5
"""Tokens of the logit lens in the table."""
VERDICTS = tuple(VERDICT_COLOURS)
UNTESTED = "not tested"
EVERY, THINKING = "every feature", "twice as dense in thoughts"
LEVEL = 0.05
"""A score is called significant below this q."""


@dataclass(frozen=True)
class Query:
    """What is asked of the table."""

    layer: int | None = None
    rule: str = EVERY
    phase: str = EVERY
    """A phase in which a feature is densest, or THINKING."""
    verdict: str = EVERY
    score: str | None = None
    """A name that `score_names` gives."""
    significant: bool = False
    find: str = ""
    """Text in the tokens that a feature raises, or around its strongest activations."""
    density: tuple[float, float] = (0.0, 1.0)
    order: str = "layer"
    """A key of ORDERS, or LISTED."""
    reverse: bool = False
    only: tuple[tuple[int, int], ...] | None = None
    """Layers and features of a list, in its order; None for all."""


LISTED = "list"
"""The order of `Query.only`."""
ORDERS = {
    "verdict": "verdict, what survives first",
    "thoughts": "part in thoughts",
    "density": "density",
    "max": "strongest activation",
    "score": "score",
    "layer": "layer and feature",
}
"""By what the table can be sorted; largest first but for the verdict and the layer."""


@dataclass(frozen=True)
class Selection:
    """The rows that match."""

    total: int
    """Features at these layers."""
    rows: pd.DataFrame
    """All features that can match, by their keys; shared with other queries."""
    index: Array
    """The places of the rows that match, in order."""
    notes: tuple[str, ...]
    """What the table leaves out, and why."""

    @property
    def matching(self) -> int:
        """How many match."""
        return self.index.size


def score_names(source: Source) -> dict[str, tuple[Artifact, str]]:
    """Return the scores that can be chosen: the run and the score's name, by what is shown.

    Raises:
        BadInputError: a summary is missing or damaged.
    """
    names: dict[str, tuple[Artifact, str]] = {}
    for place, run in enumerate(source.scores):
        for totals in data.read(run, "summary.json", ScoreSummary).scores:
            label = f"{totals.score} ({run.path.name})" if place else totals.score
            names[label] = run, totals.score
    return names


@st.cache_resource(show_spinner=False, max_entries=12, hash_funcs=HASHES)
def select(source: Source, query: Query) -> Selection:
    """Return the rows that match, in order.

    Raises:
        BadInputError: a file is missing or damaged.
    """
    # Few features are counted or tested: then the others' rows are not even read.
    named = query.rule in RULES or query.verdict in VERDICTS
    only = None
    if query.only is not None:
        chosen = [(layer, f) for layer, f in query.only if query.layer in (None, layer)]
        only = tuple((layer << 32) | feature for layer, feature in chosen)
    rows, silent = _base(source, query.layer, named, only)
    if query.score:
        rows = rows.join(_scores(source, query.layer, query.score))
    index, notes = np.flatnonzero(_kept(rows, query)), ()
    if query.find:
        where, notes = _search(source, query.find, rows.index.to_numpy()[index])
        rows = rows.assign(where=np.zeros(len(rows), np.int8))
        rows.iloc[index, -1] = where
        index = index[where > 0]
    index = index[_order(rows.iloc[index], query, only)].astype(np.int32)
    total = _total(source, query.layer) + silent if only is None else len(rows)
    return Selection(total, rows, index, notes)


def _search(source: Source, text: str, keys: Array) -> tuple[Array, tuple[str, ...]]:
    """Return where a text stands for each feature, and what was left out; see `search`."""
    if source.activity is None or not keys.size:
        return np.zeros(keys.size, np.int8), ()
    where, whole = search(partial(opened, source.activity), text, keys)
    note = (
        "Searched in the tokens that features raise; choose a layer or a rule to search in "
        "their examples too."
    )
    return where, () if whole else (note,)


@st.cache_resource(show_spinner=False, max_entries=24, hash_funcs=HASHES)
def page_of(source: Source, query: Query, first: int = 0) -> pd.DataFrame:
    """Return up to `PAGE` of the rows that match, from the first, as a person reads them.

    Raises:
        BadInputError: a file is missing or damaged.
    """
    selection = select(source, query)
    return _readable(source, selection.rows.iloc[selection.index[first : first + PAGE]])


def _kept(rows: pd.DataFrame, query: Query) -> NDArray[np.bool_]:
    low, high = query.density
    kept = np.ones(len(rows), dtype=bool)
    if (low, high) != (0.0, 1.0):
        kept &= rows["density"].between(low, high)
    if query.rule in RULES:
        kept &= rows["rules"] & (1 << RULES.index(query.rule)) > 0
    if query.phase in PHASES:
        kept &= rows["most"] == PHASES.index(query.phase)
    elif query.phase == THINKING:
        kept &= rows["thoughts"] > 2 / 3
    if query.verdict in (*VERDICTS, UNTESTED):
        kept &= rows["verdict"] == (*VERDICTS, UNTESTED).index(query.verdict)
    if query.score and query.significant:
        kept &= rows["q"] < LEVEL
    return np.asarray(kept)


def _order(rows: pd.DataFrame, query: Query, only: Sequence[int] | None) -> Array:
    """Return the order of the rows; among equals that of layer and feature."""
    if query.order == LISTED and only is not None:
        order = np.argsort(pd.Index(only).get_indexer(rows.index))
        return order[::-1] if query.reverse else order
    if query.order == "layer" or (query.order == "score" and "value" not in rows):
        order = np.arange(len(rows))
        return order[::-1] if query.reverse else order
    if query.order == "verdict":
        ranks = np.array([*reversed(range(len(VERDICTS))), len(VERDICTS)])
        values = ranks[rows["verdict"]]
    else:
        values = -rows["value" if query.order == "score" else query.order].to_numpy()
    # What has no value stands last in either direction.
    values = np.where(np.isnan(values), np.inf, -values if query.reverse else values)
    return np.argsort(values, kind="stable")


def _total(source: Source, layer: int | None) -> int:
    """How many features fired at a layer, or at all."""
    if source.activity is None:
        return 0
    groups = opened(source.activity, FEATURES)
    near = groups.of(layer)
    if layer is None or (groups.low[near, 0] == groups.high[near, 0]).all():
        return sum(groups.metadata.row_group(group).num_rows for group in near)
    return int((groups.read(near, ["layer"])["layer"].to_numpy() == layer).sum())


@st.cache_resource(show_spinner=False, max_entries=6, hash_funcs=HASHES)
def _base(
    source: Source, layer: int | None, named: bool, only: tuple[int, ...] | None
) -> tuple[pd.DataFrame, int]:
    """What one layer's features, or all, can be filtered and sorted by.

    Args:
        source: the runs.
        layer: 0-based, or None for all.
        named: only the features that are counted or tested.
        only: the keys of a list's features, or None for all.

    Returns:
        The rows by their keys, in order, and how many of these features are in no row of the file:
        counted or listed ones that fired on none of the documents.
    """
    layers = source.layers if layer is None else [layer]
    judged = pd.DataFrame(
        {
            "rules": pd.Series(_rules(source, layers), dtype=np.int8),
            "verdict": pd.Series(_verdicts(source, layers), dtype=np.int8),
        }
    )
    chosen = judged.index
    if only is not None:
        chosen = pd.Index(only, dtype=np.int64).sort_values()
        judged = judged.loc[judged.index.isin(chosen)]
    rows = _read(source, layer, None if only is None and not named else chosen.to_numpy())
    read, names = len(rows), chosen.to_numpy().astype(np.int64)
    if (missing := ~_places(rows.index.to_numpy(), names)[1]).any():
        never = 0.0 if source.activity else np.nan
        rows = rows.reindex(rows.index.union(np.unique(names[missing])), fill_value=never)
    keys = rows.index.to_numpy()
    rows["layer"] = (keys >> 32).astype(np.int32)
    rows["feature"] = (keys & 0xFFFFFFFF).astype(np.int32)
    for name, none in (("rules", 0), ("verdict", len(VERDICTS))):
        rows[name] = np.full(len(rows), none, np.int8)
        values = judged[name].dropna().astype(np.int8)
        rows.iloc[_places(keys, values.index.to_numpy())[0], -1] = values
    by_phase = [rows.pop(f"density_{phase}").to_numpy() for phase in PHASES]
    # The number of each feature's densest phase; len(PHASES) where it never fires.
    whole = np.nan_to_num(np.stack(by_phase))
    rows["most"] = np.where(whole.max(0) > 0, whole.argmax(0), len(PHASES)).astype(np.int8)
    rows["thoughts"] = _thoughts(by_phase, source.tokens)
    return rows, len(rows) - read


def _read(source: Source, layer: int | None, keys: Array | None) -> pd.DataFrame:
    """Read one layer's features, or all, or those of some keys."""
    names = ["layer", "feature", "density", "max", *[f"density_{phase}" for phase in PHASES]]
    if source.activity is None:
        return pd.DataFrame(columns=names[2:], index=np.zeros(0, np.int64), dtype=np.float32)
    groups = opened(source.activity, FEATURES)
    near = groups.of(layer)
    if keys is not None:
        near = sorted(set(near) & set(groups.holding(keys)))
    # One group after the other, and in half the memory; four digits are shown.
    parts = [_compact(groups.read([group], names)) for group in near] or [
        (np.zeros(0, np.int64), np.zeros((len(names) - 2, 0), np.float32))
    ]
    own = np.concatenate([part[0] for part in parts])
    values = np.concatenate([part[1] for part in parts], axis=1)
    del parts
    pa.default_memory_pool().release_unused()
    table = pd.DataFrame(dict(zip(names[2:], values, strict=True)), index=own, copy=False)
    if not (own[1:] > own[:-1]).all():  # not as our writer leaves it
        table = _unique(table.sort_index())
    if keys is not None:
        return table.loc[table.index.isin(keys)]
    return table if layer is None else table.loc[layer << 32 : (layer + 1 << 32) - 1]


def _compact(rows: pa.Table) -> tuple[Array, NDArray[np.float32]]:
    """Return the keys of rows, and their columns behind layer and feature, a row a column."""
    keys = keys_of(rows["layer"].to_numpy(), rows["feature"].to_numpy())
    columns = [rows[name].to_numpy().astype(np.float32) for name in rows.column_names[2:]]
    return keys, np.stack(columns)


def _places(keys: Array, some: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Return where some keys stand among sorted ones, and which of them do; no table of all."""
    places = np.searchsorted(keys, some)
    present = places < keys.size
    present[present] = keys[places[present]] == some[present]
    return places, present


def _rules(source: Source, layers: Sequence[int]) -> dict[int, int]:
    """The rules that count a feature as bits, by its key."""
    rules: dict[int, int] = {}
    for row in source.counted().layers:
        if row.layer in layers:
            for bit, rule in enumerate(RULES):
                for feature in row.features.get(rule, ()):
                    key = (row.layer << 32) | feature
                    rules[key] = rules.get(key, 0) | 1 << bit
    return rules


def _verdicts(source: Source, layers: Sequence[int]) -> dict[int, int]:
    """The verdict's number, by the feature's key."""
    judged = source.judged()
    return {
        (v.layer << 32) | v.feature: VERDICTS.index(v.verdict)
        for v in (judged.features if judged else ())
        if v.layer in layers and v.verdict in VERDICTS
    }


def _thoughts(by_phase: Sequence[Array], tokens: dict[str, int]) -> Array:
    """Density in thoughts over that plus the density elsewhere: 0 to 1, 0.5 if they are equal."""
    thinks = by_phase[PHASES.index("think")]
    others = {p: tokens.get(p, 0) for p in PHASES if p != "think"}
    total = max(1, sum(others.values()))
    both = thinks.copy()
    for phase, weight in others.items():
        both += by_phase[PHASES.index(phase)] * np.float32(weight / total)
    return np.divide(thinks, both, out=np.full_like(both, np.nan), where=both > 0)


@st.cache_resource(show_spinner=False, max_entries=6, hash_funcs=HASHES)
def _scores(source: Source, layer: int | None, score: str) -> pd.DataFrame:
    """Value, p and q of a score by the features' keys."""
    run, name = score_names(source)[score]
    groups = opened(run, SCORES)
    names = ["layer", "feature", "score", "value", "p", "q"]
    rows = groups.read(groups.of(layer, score=name), names)
    rows = rows.filter(pa.array(rows["score"].to_numpy() == name))
    keys = keys_of(rows["layer"].to_numpy(), rows["feature"].to_numpy())
    return _unique(pd.DataFrame({n: rows[n].to_numpy() for n in names[3:]}, index=keys))


def _unique(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a key: a damaged file may hold more, and could not be joined."""
    return rows.loc[~rows.index.duplicated()]


def _readable(source: Source, rows: pd.DataFrame) -> pd.DataFrame:
    """Some rows as a person reads them."""
    strictest = [
        next((rule for bit, rule in enumerate(RULES) if value >> bit & 1), "")
        for value in rows["rules"].tolist()
    ]
    table: dict[str, Any] = {
        "layer": rows["layer"],
        "feature": rows["feature"],
        "counted by": strictest,
        "verdict": np.array([*VERDICTS, ""], dtype=object)[rows["verdict"]],
        "density, %": 100 * rows["density"],
        "most in": np.array([*PHASES, ""], dtype=object)[rows["most"]],
        "in thoughts": rows["thoughts"],
        "strongest": rows["max"],
    }
    if "value" in rows:
        table |= {"score": rows["value"], "p": rows["p"], "q": rows["q"]}
    if "where" in rows:
        places = np.array(["", "raises", "examples", "both"], dtype=object)
        table["found in"] = places[rows["where"]]
    table["raises"] = ""
    if source.activity and len(rows):
        listed = raised(opened(source.activity, FEATURES), rows.index.to_numpy())
        table["raises"] = ["  ".join(visible(t or "") for t in names[:RAISED]) for names in listed]
    return pd.DataFrame(table).reset_index(drop=True)


def as_csv(selection: Selection) -> bytes:
    """Return all rows that match, as CSV: numbers as they are filtered by.

    Raises:
        BadInputError: nothing matches.
    """
    from pyarrow import csv

    if not selection.matching:
        raise BadInputError("no feature matches; there is nothing to download")
    rows = selection.rows.iloc[selection.index]
    rules = rows["rules"].to_numpy()
    counted = {f"counted_{rule}": rules >> bit & 1 for bit, rule in enumerate(RULES)}
    columns: dict[str, Any] = {
        **rows[["layer", "feature"]],
        **counted,
        "verdict": _named([*VERDICTS, UNTESTED], rows["verdict"]),
        "densest_in": _named([*PHASES, ""], rows["most"]),
        **rows[[n for n in ("density", "thoughts", "max", "value", "p", "q") if n in rows]],
    }
    out = pa.BufferOutputStream()
    csv.write_csv(pa.table(columns), out)
    return out.getvalue().to_pybytes()


def _named(names: Sequence[str], numbers: pd.Series) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(names)).cast(pa.string())


def counted_at_all(source: Source) -> bool:
    """Return whether a rule counts any feature at the layers that were measured.

    Raises:
        BadInputError: the counts are missing or damaged.
    """
    return bool(_rules(source, source.layers))


def neighbours(
    source: Source, layer: int, feature: int, query: Query | None = None
) -> tuple[tuple[int, int] | None, tuple[int, int] | None, bool]:
    """Return the features before and after one, and whether they are of a list that has it.

    Args:
        source: the runs.
        layer: 0-based.
        feature: of that layer.
        query: of the list; without one, or where it does not have the feature, they are those of
            its layer.

    Raises:
        BadInputError: the table is missing or damaged.
    """
    key, keys = (layer << 32) | feature, np.zeros(0, np.int64)
    if query is not None:
        selection = select(source, query)
        keys = selection.rows.index.to_numpy()[selection.index]
    listed = bool((keys == key).any())
    if not listed:
        near = _read(source, layer, None).index.to_numpy()
        keys = np.insert(near[near != key], np.searchsorted(near, key), key)
    place = int(np.flatnonzero(keys == key)[0])
    before, after = (
        (int(keys[n]) >> 32, int(keys[n]) & 0xFFFFFFFF) if 0 <= n < keys.size else None
        for n in (place - 1, place + 1)
    )
    return before, after, listed
