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
from numpy.typing import NDArray

from resa_lens.artifacts.feature_tables import (
    DOCUMENT_SCHEMA,
    EDGES,
    EXAMPLE_SCHEMA,
    EXAMPLES,
    FEATURE_SCHEMA,
    FEATURES,
    LENS_HISTOGRAM,
    STRONGEST,
    THIRDS,
)
from resa_lens.features.activity import Activity, Density, Tally, bin_edges
from resa_lens.features.examples import Examples
from resa_lens.features.lens import Lens
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.texts.phases import PHASES, PhasedBatches

DOCUMENTS_AT_ONCE = 8192
"""Of a row group of the documents' table."""

Array = NDArray[Any]
FIRES_ON = 10
"""Tokens of a feature in the tables, at most."""


class Documents:
    """The documents of an activity run, by number."""

    def __init__(self, batches: PhasedBatches, tokenizer: Any) -> None:
        self.batches = batches
        self.lengths = np.diff(batches.ends, prepend=0)
        self.begins = batches.ends - self.lengths
        size = 2**20
        parts = (batches.ids[i : i + size] for i in range(0, batches.tokens, size))
        self._seen = np.unique(np.concatenate([np.unique(part) for part in parts]))
        self.text = {token: tokenizer.decode([token]) for token in self._seen.tolist()}
        self._texts = pa.array(list(self.text.values()), pa.string())

    def __len__(self) -> int:
        """Return the number of documents."""
        return self.batches.documents

    def __getitem__(self, number: int) -> tuple[list[int], list[int]]:
        """Return the ids and the phases of a document's tokens."""
        return self.batches.document(number)

    def phases(self, tokens: Array) -> Array:
        """Return the phase of tokens, which are counted over all documents."""
        return self.batches.phases[tokens]

    def texts(self, tokens: Array) -> pa.Array:
        """Return tokens, which are counted over all documents, as texts."""
        codes = np.searchsorted(self._seen, self.batches.ids[tokens])
        return self._texts.take(pa.array(codes))

    def write(self, file: Path) -> None:
        """Write them all, a row group in memory at a time."""
        with pq.ParquetWriter(file, DOCUMENT_SCHEMA, compression="zstd") as writer:
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
    documents: Documents,
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
        documents: know the text of the tokens at which features fire.
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
    columns |= _firing_tokens(tally, features, total.tolist(), documents)
    for side in ("top", "bottom"):
        ids = getattr(lens, side).tolist() if lens else None
        columns[f"{side}_tokens"] = _texts(ids, tokenizer) if ids else [None] * len(features)
        logits = getattr(lens, f"{side}_logits").tolist() if lens else [None] * len(features)
        columns[f"{side}_logits"] = logits
    columns[LENS_HISTOGRAM] = lens.histogram.tolist() if lens else [None] * len(features)
    others, cosines = nearest or (None, None)
    columns["nearest"] = [None] * len(features) if others is None else others.tolist()
    columns["nearest_cosines"] = [None] * len(features) if cosines is None else cosines.tolist()
    return pa.table({n: columns[n] for n in FEATURE_SCHEMA.names}, schema=_feature_schema())


def _texts(rows: list[list[int]], tokenizer: Any) -> list[list[str]]:
    text = {token: tokenizer.decode([token]) for token in {t for row in rows for t in row}}
    return [[text[token] for token in row] for row in rows]


def _firing_tokens(
    tally: Tally, features: Sequence[int], fired: Sequence[float], documents: Documents
) -> dict[str, list[list[Any]]]:
    """Return the columns that say at which tokens features fire, the most frequent first."""
    latents, tokens, counts, sums = (part.cpu().numpy() for part in tally.firing_tokens.table())
    firsts, ends = (np.searchsorted(latents, list(features), side) for side in ("left", "right"))
    names = ("fires_on", "fires_on_share", "fires_on_mean")
    columns: dict[str, list[list[Any]]] = {name: [] for name in names}
    for first, end, total in zip(firsts, np.minimum(ends, firsts + FIRES_ON), fired, strict=True):
        columns["fires_on"].append([documents.text[token] for token in tokens[first:end].tolist()])
        columns["fires_on_share"].append((counts[first:end] / total).tolist())
        columns["fires_on_mean"].append((sums[first:end] / counts[first:end]).tolist())
    return columns


def example_rows(
    activity: Activity, point: Hookpoint, alive: Sequence[int], documents: Documents
) -> pa.Table:
    """Return the table of some features' examples in one layer."""
    tally, config = activity.tallies[point], activity.config
    features = np.array(alive, dtype=np.int64)
    parts = [_places(tally.examples, drawn, features, tally.d_sae) for drawn in (0, 1)]
    every = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    # A feature's strongest places stand first, then the drawn ones.
    order = np.lexsort((-every["ranks"], every["drawn"], every["feature"]))
    rows = {name: column[order] for name, column in every.items()}
    numbers, positions = rows["documents"], rows["positions"]
    starts = np.maximum(0, positions - config.before)
    lengths = np.minimum(documents.lengths[numbers], positions + config.after + 1) - starts
    ends = lengths.cumsum()
    inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    tokens = np.repeat(documents.begins[numbers] + starts, lengths) + inside
    columns = np.repeat(config.before - positions + starts, lengths) + inside
    acts = rows["windows"][np.repeat(np.arange(len(numbers)), lengths), columns]
    # The peak itself as it is: half precision would make 0 of a very weak one.
    acts = acts.astype(np.float32)
    acts[ends - lengths + positions - starts] = rows["values"]
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    first = np.searchsorted(rows["feature"], rows["feature"])
    phases = documents.phases(documents.begins[numbers] + positions)
    content = {
        "layer": np.full(len(numbers), point.layer),
        "feature": rows["feature"],
        "interval": _names((STRONGEST, *THIRDS), _intervals(rows)),
        "rank": np.arange(len(numbers)) - first,
        "document": numbers,
        "position": positions,
        "phase": _names(PHASES, phases),
        "value": rows["values"],
        "start": starts,
        "tokens": pa.ListArray.from_arrays(offsets, documents.texts(tokens)),
        "acts": pa.ListArray.from_arrays(offsets, pa.array(acts)),
    }
    return pa.table(
        [pa.array(content[f.name], f.type) if isinstance(content[f.name], np.ndarray)
         else content[f.name] for f in EXAMPLE_SCHEMA],
        schema=EXAMPLE_SCHEMA,
    )  # fmt: skip


def _names(names: Sequence[str], codes: Array) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(codes))


def _places(examples: Examples, drawn: int, features: Array, d_sae: int) -> dict[str, Array]:
    """Return the strongest or the drawn places of some features as columns."""
    lists = (np.arange(len(PHASES))[:, None] * d_sae + features).ravel()
    kept = torch.from_numpy(lists + drawn * examples.half).to(examples.ranks.device)
    there = (examples.ranks[kept] > 0).cpu().numpy()
    columns = {
        name: tensor[kept].cpu().numpy()[there]
        for name, tensor in examples.tensors().items()
        if name != "contexts"
    }
    own = np.broadcast_to(lists[:, None], there.shape)[there]
    return {
        **columns,
        "feature": own % d_sae,
        "list": own,
        "drawn": np.full(len(own), drawn),
    }


def _intervals(rows: dict[str, Array]) -> Array:
    """Return 0 for each of the strongest places, 1 to 3 for the thirds of those that were drawn."""
    group = 2 * rows["list"] + rows["drawn"]
    order = np.lexsort((rows["values"], group))
    _, first, sizes = np.unique(group[order], return_index=True, return_counts=True)
    place = np.arange(len(group)) - np.repeat(first, sizes)
    third = np.empty(len(group), dtype=np.int64)
    third[order] = len(THIRDS) * place // np.repeat(sizes, sizes)
    return np.where(rows["drawn"] == 1, 1 + third, 0)


def _writer(file: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a table; bytes of floats stand apart by their place, which makes it a fifth smaller."""
    others, floats = [], []
    for field in schema:
        inner = field.type.value_type if pa.types.is_list(field.type) else field.type
        path = field.name if inner is field.type else f"{field.name}.list.element"
        (floats if pa.types.is_floating(inner) else others).append(path)
    columns: dict[str, Any] = {"use_dictionary": others, "use_byte_stream_split": floats}
    return pq.ParquetWriter(file, schema, compression="zstd", compression_level=9, **columns)


@contextmanager
def layer_writer(folder: Path) -> Iterator[Callable[[pa.Table, pa.Table], None]]:
    """Open one layer's tables; the function yielded appends a row group to each."""
    with (
        _writer(folder / FEATURES, _feature_schema()) as features,
        _writer(folder / EXAMPLES, EXAMPLE_SCHEMA) as examples,
    ):

        def write(rows: pa.Table, shown: pa.Table) -> None:
            features.write_table(rows)
            examples.write_table(shown)

        yield write


def join_tables(layers: Sequence[Path], folder: Path) -> None:
    """Append the layers' tables in their order, one row group in memory at a time."""
    for name in (FEATURES, EXAMPLES):
        with _writer(folder / name, pq.read_schema(layers[0] / name)) as writer:
            for layer in layers:
                with pq.ParquetFile(layer / name) as file:
                    for group in range(file.num_row_groups):
                        writer.write_table(file.read_row_group(group))


def _feature_schema() -> pa.Schema:
    edges = ",".join(f"{edge:.6g}" for edge in bin_edges().tolist())
    return FEATURE_SCHEMA.with_metadata({EDGES: edges})
