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

from collections.abc import Sequence
from dataclasses import dataclass
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
        rows = self.read(self.of(layer, [feature]))
        mine = (pc.field("layer") == layer) & (pc.field("feature") == feature)
        return rows.filter(mine).to_pylist()


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
    examples = open_groups(folder / EXAMPLES, EXAMPLE_SCHEMA).find(layer, feature)
    # Of recipe 1 all examples are the strongest.
    examples = [{"interval": STRONGEST, **row} for row in examples]
    return rows[0], sorted(examples, key=lambda row: row["rank"])


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
