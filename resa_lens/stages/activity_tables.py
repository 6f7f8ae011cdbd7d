"""Feature activity as rows of its tables (`artifacts.feature_tables`), and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from resa_lens.artifacts.feature_tables import (
    DOCUMENT_SCHEMA,
    EDGES,
    EXAMPLE_SCHEMA,
    EXAMPLES,
    FEATURE_SCHEMA,
    FEATURES,
)
from resa_lens.features.activity import Activity, Density, bin_edges
from resa_lens.features.lens import Lens
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.texts.phases import PHASES, PhasedBatches

DOCUMENTS_AT_ONCE = 8192
"""Of a row group of the documents' table."""


class Documents:
    """The documents of an activity run, by number."""

    def __init__(self, batches: PhasedBatches, tokenizer: Any) -> None:
        self.batches = batches
        size = 2**20
        parts = (batches.ids[i : i + size] for i in range(0, batches.tokens, size))
        seen = sorted({token for part in parts for token in np.unique(part).tolist()})
        self.text = {token: tokenizer.decode([token]) for token in seen}

    def __len__(self) -> int:
        """Return the number of documents."""
        return self.batches.documents

    def __getitem__(self, number: int) -> tuple[list[int], list[int]]:
        """Return the ids and the phases of a document's tokens."""
        return self.batches.document(number)

    def write(self, file: Path) -> None:
        """Write them all, a row group in memory at a time."""
        with pq.ParquetWriter(file, DOCUMENT_SCHEMA) as writer:
            for first in range(0, len(self), DOCUMENTS_AT_ONCE):
                numbers = range(first, min(first + DOCUMENTS_AT_ONCE, len(self)))
                columns = [numbers, *zip(*(self[number] for number in numbers), strict=True)]
                arrays = [
                    pa.array(c, f.type) for c, f in zip(columns, DOCUMENT_SCHEMA, strict=True)
                ]
                writer.write_table(pa.table(arrays, schema=DOCUMENT_SCHEMA))


def feature_rows(
    activity: Activity,
    point: Hookpoint,
    density: Density,
    features: Sequence[int],
    lens: Lens | None,
    nearest: tuple[torch.Tensor, torch.Tensor] | None,
    tokenizer: Any,
) -> pa.Table:
    """Return the rows of some features of one layer.

    Args:
        activity: the figures.
        point: the layer.
        density: over all tokens.
        features: ascending, each of which fired.
        lens: of these features, or None.
        nearest: their neighbours and cosines, or None.
        tokenizer: writes the lens' tokens.
    """
    tally = activity.tallies[point]
    index = torch.tensor(list(features), dtype=torch.long, device=tally.fired.device)
    fired = tally.fired[:, index].double()
    sums, maxima = tally.sums[:, index], tally.maxima[:, index]
    total = fired.sum(0)
    columns: dict[str, Any] = {
        "layer": [point.layer] * len(features),
        "feature": list(features),
        "tokens_fired": total.long().tolist(),
        "documents_fired": tally.documents[index].tolist(),
        "density": density.value[index].tolist(),
        "density_se": density.se[index].tolist(),
        "mean": (sums.sum(0) / total).tolist(),
        "max": maxima.amax(0).tolist(),
        "histogram": tally.histogram[index].tolist(),
    }
    for i, phase in enumerate(PHASES):
        columns |= {
            f"tokens_fired_{phase}": fired[i].long().tolist(),
            f"density_{phase}": (fired[i] / max(1, activity.tokens[i])).tolist(),
            f"mean_{phase}": (sums[i] / fired[i].clamp_min(1)).tolist(),
            f"max_{phase}": maxima[i].tolist(),
        }
    for side in ("top", "bottom"):
        ids = getattr(lens, side).tolist() if lens else None
        columns[f"{side}_tokens"] = _texts(ids, tokenizer) if ids else [None] * len(features)
        logits = getattr(lens, f"{side}_logits").tolist() if lens else [None] * len(features)
        columns[f"{side}_logits"] = logits
    others, cosines = nearest or (None, None)
    columns["nearest"] = [None] * len(features) if others is None else others.tolist()
    columns["nearest_cosines"] = [None] * len(features) if cosines is None else cosines.tolist()
    return pa.table({n: columns[n] for n in FEATURE_SCHEMA.names}, schema=_feature_schema())


def _texts(rows: list[list[int]], tokenizer: Any) -> list[list[str]]:
    text = {token: tokenizer.decode([token]) for token in {t for row in rows for t in row}}
    return [[text[token] for token in row] for row in rows]


def example_rows(
    activity: Activity, point: Hookpoint, alive: Sequence[int], documents: Documents
) -> pa.Table:
    """Return the table of one layer's strongest examples."""
    tally, config = activity.tallies[point], activity.config
    index = torch.tensor(list(alive), dtype=torch.long, device=tally.fired.device)
    names = ("top", "top_documents", "top_positions", "windows")
    peaks = [getattr(tally, name)[index].tolist() for name in names]
    columns: dict[str, list[Any]] = {name: [] for name in EXAMPLE_SCHEMA.names}
    for feature, values, numbers, positions, windows in zip(alive, *peaks, strict=True):
        for rank, (value, number, position, window) in enumerate(
            zip(values, numbers, positions, windows, strict=True)
        ):
            if number < 0:
                break
            ids, phases = documents[number]
            start = max(0, position - config.before)
            end = min(len(ids), position + config.after + 1)
            first = start - (position - config.before)
            row = (
                point.layer, feature, rank, number, position, PHASES[phases[position]], value,
                start, [documents.text[token] for token in ids[start:end]],
                window[first : first + end - start],
            )  # fmt: skip
            for name, cell in zip(EXAMPLE_SCHEMA.names, row, strict=True):
                columns[name].append(cell)
    return pa.table(columns, schema=EXAMPLE_SCHEMA)


@contextmanager
def layer_writer(folder: Path) -> Iterator[Callable[[pa.Table, pa.Table], None]]:
    """Open one layer's tables; the function yielded appends a row group to each."""
    with (
        pq.ParquetWriter(folder / FEATURES, _feature_schema()) as features,
        pq.ParquetWriter(folder / EXAMPLES, EXAMPLE_SCHEMA) as examples,
    ):

        def write(rows: pa.Table, shown: pa.Table) -> None:
            features.write_table(rows)
            examples.write_table(shown)

        yield write


def join_tables(layers: Sequence[Path], folder: Path) -> None:
    """Append the layers' tables in their order, one row group in memory at a time."""
    for name in (FEATURES, EXAMPLES):
        with pq.ParquetWriter(folder / name, pq.read_schema(layers[0] / name)) as writer:
            for layer in layers:
                with pq.ParquetFile(layer / name) as file:
                    for group in range(file.num_row_groups):
                        writer.write_table(file.read_row_group(group))


def _feature_schema() -> pa.Schema:
    edges = ",".join(f"{edge:.6g}" for edge in bin_edges().tolist())
    return FEATURE_SCHEMA.with_metadata({EDGES: edges})
