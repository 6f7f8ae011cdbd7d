"""The tables of features as files: their schemas, and reading them by row group.

    activity/   features.parquet    a row a feature that fired, sorted by layer and feature
                examples.parquet    places at which it fires, by phase and interval: the tokens
                                    around each with their activations
                documents.parquet   every document's tokens and phases
    scores/     scores.parquet      a row a score, layer and feature, sorted so

Row groups hold few features, so a reader that wants one feature reads a group of each file.
Nothing here loads torch: the app reads by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resa_lens.errors import BadInputError
from resa_lens.texts.prompts import PHASES

STRONGEST = "strongest"
THIRDS = ("lower third", "middle third", "upper third")
"""Of the places that were drawn in a phase, by their activation."""
INTERVALS = (STRONGEST, *reversed(THIRDS))
LENS_HISTOGRAM = "lens_histogram"
"""Column with the counts of a feature's logits over the vocabulary."""
ADDED = {"fires_on": 2, "fires_on_share": 2, "fires_on_mean": 2, "interval": 2, LENS_HISTOGRAM: 3}
"""Recipe of the activity since which a column is written; older tables are read without it."""
GROUP = 1024
"""Features in one row group of the activity's tables."""
FEATURES, EXAMPLES, DOCUMENTS = "features.parquet", "examples.parquet", "documents.parquet"
EDGES = b"histogram_edges"
"""Key of the histogram's edges in the metadata of features.parquet."""

FEATURE_SCHEMA = pa.schema(
    [
        ("layer", pa.int32()),
        ("feature", pa.int32()),
        ("tokens_fired", pa.int64()),
        ("documents_fired", pa.int64()),
        ("density", pa.float64()),
        ("density_se", pa.float64()),
        ("mean", pa.float32()),
        ("max", pa.float32()),
        *[
            (f"{name}_{phase}", kind)
            for phase in PHASES
            for name, kind in (
                ("tokens_fired", pa.int64()),
                ("density", pa.float64()),
                ("mean", pa.float32()),
                ("max", pa.float32()),
            )
        ],
        ("histogram", pa.list_(pa.int32())),
        ("fires_on", pa.list_(pa.string())),
        ("fires_on_share", pa.list_(pa.float32())),
        ("fires_on_mean", pa.list_(pa.float32())),
        ("top_tokens", pa.list_(pa.string())),
        ("top_logits", pa.list_(pa.float32())),
        ("bottom_tokens", pa.list_(pa.string())),
        ("bottom_logits", pa.list_(pa.float32())),
        (LENS_HISTOGRAM, pa.list_(pa.int32())),
        ("nearest", pa.list_(pa.int32())),
        ("nearest_cosines", pa.list_(pa.float32())),
    ]
)
"""Densities are shares of tokens, `density_se` is over documents; means are over the tokens where
the feature fires, 0 where it does not.  `fires_on` are the tokens at which it fires most often,
with their share of its firings and the mean activation there.  The histogram's edges are in the
file's metadata.  The lens and the neighbours are null where they were not computed; the bins of the
lens' histogram are of equal width, from the lowest logit (the first of `bottom_logits`) to the
highest (the first of `top_logits`)."""

EXAMPLE_SCHEMA = pa.schema(
    [
        ("layer", pa.int32()),
        ("feature", pa.int32()),
        ("interval", pa.string()),
        ("rank", pa.int32()),
        ("document", pa.int32()),
        ("position", pa.int32()),
        ("phase", pa.string()),
        ("value", pa.float32()),
        ("start", pa.int32()),
        ("tokens", pa.list_(pa.string())),
        ("acts", pa.list_(pa.float32())),
    ]
)
"""`interval` is one of `INTERVALS`; `rank` counts a feature's examples, the strongest first, then
those drawn, in the order of the draw.  `position` is the peak's in its document, `start` that of
the first token shown.  Activations beside the peak have half precision."""

DOCUMENT_SCHEMA = pa.schema(
    [("document", pa.int32()), ("ids", pa.list_(pa.int32())), ("phases", pa.list_(pa.int8()))]
)

SCORE_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int32()),
        pa.field("feature", pa.int32()),
        pa.field("score", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("null", pa.float64()),
        pa.field("p", pa.float64()),
        pa.field("q", pa.float64()),
        pa.field("active_tokens", pa.int64()),
        pa.field("active_documents", pa.int64()),
        pa.field("reasoning_tokens", pa.int64()),
        pa.field("other_tokens", pa.int64()),
        pa.field("reasoning_documents", pa.int64()),
        pa.field("other_documents", pa.int64()),
    ]
)
"""A row a score, layer and feature that is active at all; for the rules, active on the prompt."""
SCORE_GROUP = 65_536
"""Rows in one row group of the scores."""
TEXT_GROUPS = 400
"""Row groups of examples that one search reads at most: six layers of 65,536 features."""
SEPARATOR = "\x1f"
"""Between tokens that are searched one by one."""
_BATCH = 32  # row groups that one thread reads at once

Array = NDArray[Any]


def keys_of(layers: Array, features: Array) -> NDArray[np.int64]:
    """Return the keys of features: the layer and the number in one integer."""
    return (layers.astype(np.int64) << 32) | features.astype(np.int64)


@dataclass(frozen=True)
class Groups:
    """A parquet file of features, and what its row groups hold."""

    file: Path
    metadata: pq.FileMetaData
    schema: pa.Schema
    low: NDArray[np.int64]
    """[group, 2]: smallest layer and feature of each row group."""
    high: NDArray[np.int64]
    """The largest ones."""
    scores: tuple[tuple[str, str] | None, ...]
    """First and last score of each group; None where unknown, or there is no such column."""
    written: tuple[int, int]
    """When, and how many bytes: another file in its place has its groups elsewhere."""

    @property
    def rows(self) -> int:
        """All rows."""
        return self.metadata.num_rows

    def of(
        self,
        layer: int | None = None,
        features: Sequence[int] | None = None,
        score: str | None = None,
    ) -> list[int]:
        """Return the row groups that can hold a layer, some of its features, a score."""
        mask = np.ones(len(self.low), dtype=bool)
        if layer is not None:
            mask = (self.low[:, 0] <= layer) & (layer <= self.high[:, 0])
        if features is not None:
            indices = np.asarray(features)
            near = (self.low[:, 1, None] <= indices) & (indices <= self.high[:, 1, None])
            # A group with more than one layer says nothing of the features of each.
            mask &= near.any(1) | (self.low[:, 0] != self.high[:, 0])
        if score is not None:
            mask &= [ends is None or ends[0] <= score <= ends[1] for ends in self.scores]
        return np.flatnonzero(mask).tolist()

    def holding(self, keys: Array) -> list[int]:
        """Return the row groups that can hold some features, given by their sorted `keys_of`."""
        low, high = self.low, self.high
        first = np.searchsorted(keys, keys_of(low[:, 0], low[:, 1]), side="left")
        last = np.searchsorted(keys, keys_of(high[:, 0], high[:, 1]), side="right")
        # The smallest feature of a group with two layers need not be of the smaller layer.
        return np.flatnonzero((last > first) | (low[:, 0] != high[:, 0])).tolist()

    def read(self, groups: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """Read row groups, in full or some columns.

        Raises:
            BadInputError: the file is damaged, or another one since it was opened.
        """
        names = self.schema.names if columns is None else list(columns)
        try:
            with pq.ParquetFile(self.file, metadata=self.metadata) as stream:
                rows = stream.read_row_groups(list(groups), names)
            if _written(self.file) == self.written:
                return rows
            raise BadInputError(f"{self.file} was written anew while it was read; read it again")
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.file) from error

    def find(self, layer: int, feature: int) -> list[dict[str, Any]]:
        """Read the rows of one feature.

        Raises:
            BadInputError: the file is damaged.
        """
        return self.rows_of(layer, [feature]).to_pylist()

    def rows_of(
        self, layer: int, features: Sequence[int] | None = None, names: Sequence[str] | None = None
    ) -> pa.Table:
        """Read the rows of a layer, or of some of its features.

        Raises:
            BadInputError: the file is damaged.
        """
        rows = self.read(self.of(layer, features), names)
        # By masks: a filter by an expression loads pyarrow's engine for data sets, 0.1 s.
        mine = rows["layer"].to_numpy() == layer
        if features is not None:
            mine &= np.isin(rows["feature"].to_numpy(), list(features))
        return rows.filter(pa.array(mine))

    def in_batches(
        self, groups: Sequence[int], column: str, use: Callable[[pa.Table], Any]
    ) -> list[Any]:
        """Read a column of row groups by several threads, and use each part of it."""
        names = ["layer", "feature", column]
        batches = [groups[first : first + _BATCH] for first in range(0, len(groups), _BATCH)]
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda batch: use(self.read(batch, names)), batches))


def open_groups(file: Path, schema: pa.Schema) -> Groups:
    """Read what a file says of its row groups.

    Args:
        file: with the columns layer and feature.
        schema: columns that it must have, with their types.

    Raises:
        BadInputError: missing, damaged, or without these columns.
    """
    try:
        written = _written(file)
        with pq.ParquetFile(file) as statistics:
            metadata, own = statistics.metadata, statistics.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file) from error
    for field in schema:
        if field.name in ADDED and field.name not in own.names:
            continue
        if field.name not in own.names or own.field(field.name).type != field.type:
            raise BadInputError(
                f"{file} has no column {field.name} of type {field.type}; it is of another "
                "version or program: --force makes it anew"
            )
    places = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]

    def ends(name: str) -> list[tuple[Any, Any] | None]:
        if name not in places:
            return [None] * len(groups)
        statistics = [group.column(places[name]).statistics for group in groups]
        return [(s.min, s.max) if s is not None and s.has_min_max else None for s in statistics]

    # Where nothing is known, a group can hold anything.
    both = [[pair or (0, 2**31 - 1) for pair in ends(name)] for name in ("layer", "feature")]
    bounds = np.array(both, dtype=np.int64).reshape(2, len(groups), 2)
    low, high = bounds[:, :, 0].T, bounds[:, :, 1].T
    return Groups(file, metadata, own, low, high, tuple(ends("score")), written)


def _written(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_mtime_ns, state.st_size


def read_feature(
    folder: Path, layer: int, feature: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return one feature's row and its examples, the strongest first.

    Raises:
        BadInputError: the feature never fired there, the layer was not measured, or a damaged file.
    """
    rows = open_groups(folder / FEATURES, FEATURE_SCHEMA).find(layer, feature)
    if not rows:
        raise BadInputError(
            f"feature {feature} at layer {layer} (0-based) fired on none of the documents of "
            f"{folder}, or its layer was not measured"
        )
    return rows[0], examples_of(open_groups(folder / EXAMPLES, EXAMPLE_SCHEMA), layer, feature)


def examples_of(groups: Groups, layer: int, feature: int) -> list[dict[str, Any]]:
    """Return one feature's examples, the strongest first, then those drawn.

    Raises:
        BadInputError: the file is damaged.
    """
    # Of recipe 1 all examples are the strongest.
    rows = [{"interval": STRONGEST, **row} for row in groups.find(layer, feature)]
    return sorted(rows, key=lambda row: row["rank"] or 0)


def density_interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return the 95 % interval of a feature's density over all tokens, documents the units."""
    half = 1.96 * row["density_se"]
    return max(0.0, row["density"] - half), min(1.0, row["density"] + half)


def search(
    open_table: Callable[[str], Groups], text: str, keys: Array
) -> tuple[NDArray[np.int8], bool]:
    """Look for a text in the tokens that features raise, and around their strongest activations.

    Args:
        open_table: opens a table of the activity by its name.
        text: in any case; in an example it may go over several tokens.
        keys: of the features, sorted.

    Returns:
        For each feature 0, 1 (in what it raises), 2 (in an example) or 3; and whether the examples
        were searched, which they are in up to `TEXT_GROUPS` row groups.
    """
    where, whole = np.zeros(keys.size, dtype=np.int8), True
    for bit, (name, column, separator) in enumerate(
        ((FEATURES, "top_tokens", SEPARATOR), (EXAMPLES, "tokens", ""))
    ):
        groups = open_table(name)
        near = groups.holding(keys)
        if name == EXAMPLES and len(near) > TEXT_GROUPS:
            whole = False
            continue
        use = partial(_matching, keys=keys, column=column, separator=separator, text=text)
        for hits in groups.in_batches(near, column, use):
            where[hits] |= 1 << bit
    return where, whole


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


def raised(groups: Groups, keys: Array) -> list[list[str | None]]:
    """Return the tokens that each of some features raises, the most first; none if unknown."""

    def tokens(rows: pa.Table) -> dict[int, list[str | None]]:
        own = keys_of(rows["layer"].to_numpy(), rows["feature"].to_numpy())
        places = np.flatnonzero(np.isin(own, keys))
        lists = rows["top_tokens"].take(pa.array(places)).to_pylist()
        return dict(zip(own[places].tolist(), lists, strict=True))

    parts = groups.in_batches(groups.holding(np.sort(keys)), "top_tokens", tokens)
    by_key = {key: names for part in parts for key, names in part.items()}
    return [by_key.get(int(key)) or [] for key in keys]


def edges_of(schema: pa.Schema, where: Path) -> list[float]:
    """Return the edges of the histogram's bins, as the schema of features.parquet holds them.

    Raises:
        BadInputError: it holds none.
    """
    edges = (schema.metadata or {}).get(EDGES)
    try:
        return [float(edge) for edge in (edges or b"").decode().split(",")]
    except ValueError as error:
        raise BadInputError(
            f"{where} says nothing of its histogram's bins; --force makes it anew"
        ) from error


def histogram_edges(folder: Path) -> list[float]:
    """Return the edges of the histogram's bins.

    Raises:
        BadInputError: the table is missing, damaged or holds none.
    """
    file = folder / FEATURES
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file) from error
    return edges_of(schema, file)


def _damaged(file: Path) -> BadInputError:
    return BadInputError(f"{file} is missing or damaged; --force makes it anew")
