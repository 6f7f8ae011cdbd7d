"""The table of features: filtered, sorted, and no more of it made than is shown.

Columns of one layer, or of all, are read once and kept as arrays; 26 layers of 65,536 features are
1.7 million rows.  Texts are read only of the row groups that can matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st
from numpy.typing import NDArray

from resa_lens.app.data import Artifact
from resa_lens.app.features_data import (
    SCORES,
    Source,
    changed,
    opened,
    stored,
)
from resa_lens.app.features_stored import CountedFeatures, ScoreSummary, Verdicts
from resa_lens.app.features_text import Array, groups_with, keys_of, raised, search, where_in
from resa_lens.errors import BadInputError
from resa_lens.pipeline.feature_files import EXAMPLES, FEATURES
from resa_lens.plots import RULE_NAMES, VERDICT_COLOURS
from resa_lens.prompts import PHASES

PAGE = 1000
"""Rows that are shown."""
RULES = tuple(RULE_NAMES)
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
    """A key of ORDERS."""
    reverse: bool = False


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
class Found:
    """The rows that match."""

    shown: pd.DataFrame
    """The first `PAGE` of them."""
    total: int
    """Features at these layers."""
    columns: dict[str, Array]
    """Of all features that can match; shared with other queries."""
    index: Array
    """The rows that match, in order."""
    notes: tuple[str, ...]
    """What the table leaves out, and why."""

    @property
    def matching(self) -> int:
        """How many match."""
        return self.index.size

    @property
    def order(self) -> list[tuple[int, int]]:
        """Layer and feature of each row shown."""
        first = self.index[:PAGE]
        layers, features = (self.columns[name][first].tolist() for name in ("layer", "feature"))
        return list(zip(layers, features, strict=True))


def score_names(source: Source) -> dict[str, tuple[Artifact, str]]:
    """Return the scores that can be chosen: the run and the score's name, by what is shown.

    Raises:
        BadInputError: a summary is missing or damaged.
    """
    found: dict[str, tuple[Artifact, str]] = {}
    for place, run in enumerate(source.scores):
        for held in stored(ScoreSummary, run.path / "summary.json").scores:
            shown = f"{held.score} ({run.path.name})" if place else held.score
            found[shown] = run, held.score
    return found


def select(source: Source, query: Query) -> Found:
    """Return the rows that match, in order.

    Raises:
        BadInputError: a file is missing or damaged.
    """
    files = [file for name in (FEATURES, EXAMPLES) if (file := source.file(name))]
    if source.counts:
        files.append(source.counts.path / "features.json")
    if source.verdicts:
        files.append(source.verdicts.path / "verdicts.json")
    if query.score:
        files.append(score_names(source)[query.score][0].path / SCORES)
    state = tuple((str(file), changed(file)) for file in files)
    return _select(source.key, state, query, _source=source)


@st.cache_resource(show_spinner=False, max_entries=12)
def _select(key: str, state: tuple[Any, ...], query: Query, _source: Source) -> Found:
    base = state[: len(state) - bool(query.score)]
    # Few features are counted or tested: then the others' rows are not even read.
    named = query.rule in RULES or query.verdict in VERDICTS
    columns, silent = _base(key, base, query.layer, named, _source)
    kept = _kept(columns, query)
    notes: tuple[str, ...] = ()
    if query.score:
        columns = columns | _scores(key, state, query.layer, named, query.score, _source, columns)
        if query.significant:
            kept &= np.nan_to_num(columns["q"], nan=1.0) < LEVEL
    index = np.flatnonzero(kept)
    if query.find:
        keys = keys_of(columns["layer"][index], columns["feature"][index])
        where, notes = search(_source, query.find, keys)
        columns = {**columns, "found": np.zeros(len(kept), np.int8)}
        columns["found"][index] = where
        index = index[where > 0]
    index = index[_order(columns, index, query)].astype(np.int32)
    total = _total(_source, query.layer) + silent
    return Found(_shown(_source, columns, index[:PAGE]), total, columns, index, notes)


def _kept(columns: dict[str, Array], query: Query) -> NDArray[np.bool_]:
    low, high = query.density
    kept = np.ones(len(columns["layer"]), dtype=bool)
    if (low, high) != (0.0, 1.0):
        kept &= (columns["density"] >= low) & (columns["density"] <= high)
    if query.rule in RULES:
        kept &= columns["rules"] & (1 << RULES.index(query.rule)) > 0
    if query.phase in PHASES:
        kept &= columns["most"] == PHASES.index(query.phase)
    elif query.phase == THINKING:
        kept &= columns["thoughts"] > 2 / 3
    if query.verdict == UNTESTED:
        kept &= columns["verdict"] == len(VERDICTS)
    elif query.verdict in VERDICTS:
        kept &= columns["verdict"] == VERDICTS.index(query.verdict)
    return kept


def _order(columns: dict[str, Array], index: Array, query: Query) -> Array:
    """Return the order of the rows; among equals that of layer and feature."""
    if query.order == "layer" or (query.order == "score" and "value" not in columns):
        order = np.arange(index.size)
        return order[::-1] if query.reverse else order
    if query.order == "verdict":
        ranks = np.array([*reversed(range(len(VERDICTS))), len(VERDICTS)])
        values = ranks[columns["verdict"][index]]
    else:
        values = -columns["value" if query.order == "score" else query.order][index]
    # What has no value stands last in either direction.
    unknown = np.isnan(values)
    values = np.where(unknown, np.inf, -values if query.reverse else values)
    return np.argsort(values, kind="stable")


def _total(source: Source, layer: int | None) -> int:
    """How many features fired at a layer, or at all."""
    file = source.file(FEATURES)
    if file is None:
        return 0
    groups = opened(file)
    held = groups.of(layer)
    if layer is None or (groups.low[held, 0] == groups.high[held, 0]).all():
        return sum(groups.metadata.row_group(group).num_rows for group in held)
    return int((groups.read(held, ["layer"])["layer"].to_numpy() == layer).sum())


@st.cache_resource(show_spinner=False, max_entries=6)
def _base(
    key: str, state: tuple[Any, ...], layer: int | None, named: bool, _source: Source
) -> tuple[dict[str, Array], int]:
    """Columns of one layer's features, or of all: what can be filtered and sorted by.

    Args:
        key: with the next one what the cache goes by.
        state: the files and when they were written.
        layer: 0-based, or None for all.
        named: only the features that are counted or tested.
        _source: the runs.

    Returns:
        The columns, sorted by layer and feature, and how many of these features are in no row of
        the file: counted ones that fired on none of the documents.
    """
    layers = _source.layers if layer is None else [layer]
    rules = _rules(_source, layers)
    verdicts = _verdicts(_source, layers)
    wanted = np.union1d(_in(rules), _in(verdicts))
    columns = _sorted(_read(_source, layer, wanted if named else None))
    keys = keys_of(columns["layer"], columns["feature"])
    silent = wanted[~where_in(keys, wanted)[1]]
    if silent.size:
        measured = _source.activity is not None
        columns = _sorted(_with_silent(columns, silent, measured=measured))
        keys = keys_of(columns["layer"], columns["feature"])
    columns["rules"] = np.zeros(keys.size, dtype=np.int8)
    columns["rules"][np.searchsorted(keys, _in(rules))] = list(rules.values())
    columns["verdict"] = np.full(keys.size, len(VERDICTS), dtype=np.int8)
    columns["verdict"][np.searchsorted(keys, _in(verdicts))] = list(verdicts.values())
    by_phase = [columns.pop(f"density_{phase}") for phase in PHASES]
    columns["most"] = _densest(by_phase)
    columns["thoughts"] = _thoughts(by_phase, _source.tokens)
    return columns, silent.size


def _sorted(columns: dict[str, Array]) -> dict[str, Array]:
    keys = keys_of(columns["layer"], columns["feature"])
    if keys.size < 2 or (keys[1:] > keys[:-1]).all():
        return columns
    order = np.argsort(keys, kind="stable")
    return {name: values[order] for name, values in columns.items()}


def _read(source: Source, layer: int | None, wanted: Array | None) -> dict[str, Array]:
    names = ["layer", "feature", "density", "max", *[f"density_{phase}" for phase in PHASES]]
    file = source.file(FEATURES)
    if file is None:
        kinds = {"layer": np.int32, "feature": np.int32}
        return {name: np.zeros(0, kinds.get(name, np.float32)) for name in names}
    groups = opened(file)
    chosen = groups.of(layer)
    if wanted is not None:
        chosen = sorted(set(chosen) & set(groups_with(groups, wanted)))
    held = groups.read(chosen, names)
    columns = {name: held[name].to_numpy() for name in names}
    mine = None
    if wanted is not None:
        mine = where_in(wanted, keys_of(columns["layer"], columns["feature"]))[1]
    elif layer is not None and (columns["layer"] != layer).any():
        mine = columns["layer"] == layer
    if mine is not None:
        columns = {name: values[mine] for name, values in columns.items()}
    # Half the memory; four digits are shown.
    return {n: v.astype(np.float32) if v.dtype.kind == "f" else v for n, v in columns.items()}


def _with_silent(columns: dict[str, Array], silent: Array, *, measured: bool) -> dict[str, Array]:
    made = {"layer": silent >> 32, "feature": silent & 0xFFFFFFFF}
    value = 0.0 if measured else np.nan
    return {
        name: np.concatenate(
            [values, made.get(name, np.full(silent.size, value)).astype(values.dtype)]
        )
        for name, values in columns.items()
    }


def _in(named: dict[int, int]) -> NDArray[np.int64]:
    return np.fromiter(named, np.int64, len(named))


def _rules(source: Source, layers: Sequence[int]) -> dict[int, int]:
    """The rules that count a feature as bits, by layer and feature."""
    found: dict[int, int] = {}
    if source.counts is None:
        return found
    for row in stored(CountedFeatures, source.counts.path / "features.json").layers:
        if row.layer in layers:
            for bit, rule in enumerate(RULES):
                for feature in row.features.get(rule, ()):
                    key = (row.layer << 32) | feature
                    found[key] = found.get(key, 0) | 1 << bit
    return found


def _verdicts(source: Source, layers: Sequence[int]) -> dict[int, int]:
    """The verdict's number, by layer and feature."""
    if source.verdicts is None:
        return {}
    held = stored(Verdicts, source.verdicts.path / "verdicts.json").features
    return {
        (v.layer << 32) | v.feature: VERDICTS.index(v.verdict)
        for v in held
        if v.layer in layers and v.verdict in VERDICTS
    }


def _densest(by_phase: Sequence[Array]) -> Array:
    """The number of each feature's densest phase; len(PHASES) where it never fires."""
    most, top = np.full(by_phase[0].size, len(PHASES), dtype=np.int8), np.zeros_like(by_phase[0])
    for place, values in enumerate(by_phase):
        most[values > top] = place
        np.fmax(top, values, out=top)
    return most


def _thoughts(by_phase: Sequence[Array], tokens: dict[str, int]) -> Array:
    """Density in thoughts over that plus the density elsewhere: 0 to 1, 0.5 if they are equal."""
    thinks = by_phase[PHASES.index("think")]
    others = {p: tokens.get(p, 0) for p in PHASES if p != "think"}
    total = max(1, sum(others.values()))
    both = thinks.copy()
    for phase, weight in others.items():
        both += by_phase[PHASES.index(phase)] * np.float32(weight / total)
    return np.divide(thinks, both, out=np.full_like(both, np.nan), where=both > 0)


@st.cache_resource(show_spinner=False, max_entries=6)
def _scores(
    key: str,
    state: tuple[Any, ...],
    layer: int | None,
    named: bool,
    score: str,
    _source: Source,
    _columns: dict[str, Array],
) -> dict[str, Array]:
    """Value, p and q of a score beside the rows; NaN where a feature has none."""
    run, name = score_names(_source)[score]
    groups = opened(run.path / SCORES)
    names = ["layer", "feature", "score", "value", "p", "q"]
    held = groups.read(groups.of(layer, score=name), names)
    held = held.filter(pc.field("score") == name)
    found = {n: held[n].to_numpy() for n in names if n != "score"}
    keys = keys_of(found["layer"], found["feature"])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    wanted = keys_of(_columns["layer"], _columns["feature"])
    place, hit = where_in(keys, wanted)
    made = {}
    for n in ("value", "p", "q"):
        made[n] = np.full(wanted.size, np.nan)
        made[n][hit] = found[n][order][place[hit]]
    return made


def _shown(source: Source, columns: dict[str, Array], index: Array) -> pd.DataFrame:
    """Some rows as a person reads them."""
    first = {name: values[index] for name, values in columns.items()}
    rules = ["", *RULES]
    strictest = [
        next((bit + 1 for bit in range(len(RULES)) if value >> bit & 1), 0)
        for value in first["rules"].tolist()
    ]
    made: dict[str, Any] = {
        "layer": first["layer"],
        "feature": first["feature"],
        "counted by": [rules[place] for place in strictest],
        "verdict": [(*VERDICTS, "")[place] for place in first["verdict"].tolist()],
        "density, %": 100 * first["density"],
        "most in": [(*PHASES, "")[place] for place in first["most"].tolist()],
        "in thoughts": first["thoughts"],
        "strongest": first["max"],
    }
    if "value" in first:
        made |= {"score": first["value"], "p": first["p"], "q": first["q"]}
    if "found" in first:
        places = ("", "raises", "examples", "both")
        made["found in"] = [places[place] for place in first["found"].tolist()]
    made["raises"] = raised(source, first["layer"], first["feature"])
    return pd.DataFrame(made)


def as_csv(found: Found) -> bytes:
    """All rows that match, as CSV: numbers as they are filtered by.

    Raises:
        BadInputError: nothing matches.
    """
    from pyarrow import csv

    if not found.matching:
        raise BadInputError("no feature matches; there is nothing to download")
    held = {name: values[found.index] for name, values in found.columns.items()}
    columns: dict[str, Any] = {"layer": held["layer"], "feature": held["feature"]}
    for bit, rule in enumerate(RULES):
        columns[f"counted_{rule}"] = (held["rules"] >> bit & 1).astype(np.int8)
    columns["verdict"] = _named([*VERDICTS, UNTESTED], held["verdict"])
    columns["densest_in"] = _named([*PHASES, ""], held["most"])
    columns |= {name: held[name] for name in ("density", "thoughts", "max")}
    columns |= {name: held[name] for name in ("value", "p", "q") if name in held}
    out = pa.BufferOutputStream()
    csv.write_csv(pa.table(columns), out)
    return out.getvalue().to_pybytes()


def _named(names: Sequence[str], numbers: Array) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(names)).cast(pa.string())


def counted_at_all(source: Source) -> bool:
    """Return whether a rule counts any feature at the layers that were measured.

    Raises:
        BadInputError: the counts are missing or damaged.
    """
    return bool(_rules(source, source.layers))


def beside(
    source: Source, layer: int, feature: int, order: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Return the features before and after one: in a list that holds it, else of its layer.

    Raises:
        BadInputError: the table is missing or damaged.
    """
    if (layer, feature) in order:
        place = order.index((layer, feature))
        before = order[place - 1] if place else None
        return before, order[place + 1] if place + 1 < len(order) else None
    numbers = _read(source, layer, None)["feature"]
    lower, higher = numbers[numbers < feature], numbers[numbers > feature]
    return (
        (layer, int(lower.max())) if lower.size else None,
        (layer, int(higher.min())) if higher.size else None,
    )
