"""Features for Neuronpedia: its export folder, and the batches of its public upload.

Every object is made by `record` from the schema beside this file, which names each field; of what
the project keeps that a run here does not measure (correlated neurons, attribution values, vectors)
the field is there and empty.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any

from resa_lens.artifacts.feature_tables import STRONGEST
from resa_lens.errors import BadInputError
from resa_lens.exports.tables import Chosen, Feature, Tables
from resa_lens.models.hookpoints import Hookpoint, describe_layer
from resa_lens.publishing import filled

BATCH = 1024
"""Features in one file of the export folder."""
UPLOADED, LOGITS, LONGEST, LABEL = 128, 20, 1024, 512
"""Of one upload: features, logits on each side, tokens of an example, characters of a label."""
CREATOR = "resa-lens"


@cache
def schema() -> dict[str, Any]:
    """Return the schema, as JSON Schema."""
    return json.loads((Path(__file__).parent / "neuronpedia.schema.json").read_text())


def record(kind: str, **values: Any) -> dict[str, Any]:
    """Return an object with every field of its kind; those that are not given have their default.

    Raises:
        KeyError: the kind has no such field, or a field without a default is not given.
    """
    fields = schema()["$defs"][kind]["properties"]
    if unknown := set(values) - set(fields):
        raise KeyError(f"{kind} has no field {', '.join(sorted(unknown))}")
    return {name: values[name] if name in values else fields[name]["default"] for name in fields}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    target: Path
    features: int
    files: int
    skipped: int
    """Features without an example, which an upload cannot hold."""


@dataclass(frozen=True)
class Naming:
    """What things are called there."""

    model: str
    """Lower case letters, digits, - and _."""
    source_set: str
    creator: str = CREATOR

    def source(self, layer: int) -> str:
        """Return the name of a layer's SAE."""
        return f"{layer}-{self.source_set}"


def naming(tables: Tables, source_set: str | None = None, creator: str = CREATOR) -> Naming:
    """Return the names of a run's model and SAEs there.

    Args:
        tables: of the run.
        source_set: of the SAEs; by default the site and the number of latents.
        creator: id of the account there.

    Raises:
        BadInputError: a name that cannot stand there.
    """
    results = tables.run.results
    latents = max(row.latents for row in results.layers)
    name = source_set or f"resa-lens-{results.site.replace('_', '-')}-{latents}"
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,99}", name):
        raise BadInputError(f"source set {name!a:.80}: lower case letters, digits, - and _ alone")
    model = re.sub(r"[^a-z0-9_-]+", "-", results.model.rstrip("/").rsplit("/", 1)[-1].lower())
    return Naming(model.strip("-") or "model", name, creator)


def write_folder(
    tables: Tables,
    target: Path,
    names: Naming,
    chosen: Chosen | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Exported:
    """Write the export folder, whole or not at all: TARGET/{model}/{source}/.

    Args:
        tables: the run.
        target: the folder to make.
        names: of model and SAEs there.
        chosen: features; None for all that fired.
        advance: called with the features written since, after each batch.

    Raises:
        BadInputError: a damaged table.
    """
    count, files = 0, 0
    with filled(target) as folder:
        for layer, features in _by_layer(tables.read(chosen)):
            place = folder / names.model / names.source(layer)
            for name, line in _heads(tables, names, layer).items():
                _write_lines(place / f"{name}.jsonl", [line])
                files += 1
            for number, batch in enumerate(_batches(features, BATCH)):
                lines = {
                    "features": [_feature(f, tables, names) for f in batch],
                    "activations": [a for f in batch for a in _activations(f, tables, names)],
                    "explanations": [e for f in batch for e in _explanations(f, tables, names)],
                }
                for name, objects in lines.items():
                    _write_lines(place / name / f"batch-{number}.jsonl.gz", objects)
                count, files = count + len(batch), files + len(lines)
                advance(len(batch))
    return Exported(target, count, files, 0)


def write_uploads(
    tables: Tables,
    target: Path,
    names: Naming,
    chosen: Chosen | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Exported:
    """Write the bodies of `POST /api/feature/upload-batch`, a file each: TARGET/{source}/.

    Arguments and errors as of `write_folder`.  A feature without an example is left out, as one
    cannot be sent.
    """
    count = files = skipped = 0
    with filled(target) as folder:
        for layer, features in _by_layer(tables.read(chosen)):
            for number, batch in enumerate(_batches(features, UPLOADED)):
                sent = [_uploaded(feature) for feature in batch if feature.examples]
                skipped += len(batch) - len(sent)
                if not sent:
                    continue
                body = {
                    "modelId": names.model, "source": names.source(layer), "features": sent,
                }  # fmt: skip
                file = folder / names.source(layer) / f"batch-{number}.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(body), encoding="utf-8")
                count, files = count + len(sent), files + 1
                advance(len(batch))
    return Exported(target, count, files, skipped)


def _by_layer(features: Iterable[Feature]) -> Iterator[tuple[int, Iterator[Feature]]]:
    """Yield each layer with its features; those of a layer are read before the next one."""
    return groupby(features, key=lambda feature: feature.place[0])


def _batches(features: Iterator[Feature], size: int) -> Iterator[list[Feature]]:
    while batch := list(islice(features, size)):
        yield batch


def _write_lines(file: Path, objects: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(value) + "\n" for value in objects).encode()
    # Without a time inside, the same features make the same bytes.
    file.write_bytes(gzip.compress(text, mtime=0) if file.suffix == ".gz" else text)


def _heads(tables: Tables, names: Naming, layer: int) -> dict[str, dict[str, Any]]:
    """Return release, model, set and source: a line each."""
    run = tables.run
    results, created = run.results, run.manifest.created
    about = (
        f"Sparse autoencoders of {results.model} at {results.site}, measured by resa-lens on "
        f"{sum(results.tokens.values()):,} tokens of {results.documents:,} documents."
    )
    shared = {"creatorId": names.creator, "visibility": "PRIVATE", "createdAt": created}
    release = f"{names.model}-{names.source_set}"
    where = describe_layer(layer, results.n_layers)
    return {
        "release": record(
            "SourceRelease", name=release, description=about, creatorName=names.creator, **shared
        ),
        "model": record(
            "Model", id=names.model, displayNameShort=names.model, displayName=results.model,
            layers=results.n_layers, neuronsPerLayer=0, owner=names.creator, updatedAt=created,
            **shared,
        ),
        "sourceset": record(
            "SourceSet", modelId=names.model, name=names.source_set, description=about,
            type=results.site, creatorName=names.creator, releaseName=release, **shared,
        ),
        "source": record(
            "Source", id=names.source(layer), modelId=names.model, setName=names.source_set,
            num_prompts=results.documents, dataset=run.settings.corpus.source,
            notes=f"{where}, site {results.site}; activity run {run.relative}", **shared,
        ),
    }  # fmt: skip


def _address(feature: Feature, names: Naming) -> dict[str, Any]:
    layer, index = feature.place
    return {"modelId": names.model, "layer": names.source(layer), "index": str(index)}


def _feature(feature: Feature, tables: Tables, names: Naming) -> dict[str, Any]:
    row = feature.row
    heights = row["histogram"] or []
    middles = [(low + high) / 2 for low, high in pairwise(tables.edges)]
    return record(
        "Feature",
        **_address(feature, names),
        creatorId=names.creator,
        createdAt=tables.run.manifest.created,
        maxActApprox=row["max"],
        hookName=Hookpoint(row["layer"], tables.run.results.site).transformer_lens,
        topkCosSimIndices=row["nearest"] or [],
        topkCosSimValues=row["nearest_cosines"] or [],
        neg_str=row["bottom_tokens"] or [],
        neg_values=row["bottom_logits"] or [],
        pos_str=row["top_tokens"] or [],
        pos_values=row["top_logits"] or [],
        frac_nonzero=row["density"],
        freq_hist_data_bar_heights=heights,
        freq_hist_data_bar_values=middles[: len(heights)],
        sourceSetName=names.source_set,
    )


def bins(feature: Feature) -> Iterator[tuple[dict[str, Any], float, float, float]]:
    """Yield each example with its bin: smallest and largest value, share of the firings in it.

    The strongest have none (-1), as there.  The drawn ones fall into thirds of a phase's firings.
    """
    fired = sum(feature.row[name] for name in feature.row if name.startswith("tokens_fired_")) or 1
    ends: dict[tuple[str, str], list[float]] = {}
    for row in feature.examples:
        ends.setdefault((row["phase"], row["interval"]), []).append(row["value"])
    for row in feature.examples:
        if row["interval"] == STRONGEST:
            yield row, -1.0, -1.0, -1.0
            continue
        values = ends[row["phase"], row["interval"]]
        share = feature.row[f"tokens_fired_{row['phase']}"] / fired / 3
        yield row, min(values), max(values), share


def _window(row: dict[str, Any]) -> tuple[list[str], list[float], int]:
    """Return an example's tokens, activations and the place of its peak.

    Raises:
        BadInputError: it has another number of activations than of tokens.
    """
    tokens = [token or "" for token in row["tokens"] or []]
    values = [value or 0.0 for value in row["acts"] or []]
    peak = row["position"] - row["start"]
    if len(tokens) != len(values) or not 0 <= peak < len(tokens):
        raise BadInputError(
            f"example {row['rank']} of feature {row['layer']}:{row['feature']} has {len(tokens)} "
            f"tokens, {len(values)} activations and its peak at {peak}; --force of resa-lens "
            "activity makes the tables anew"
        )
    return tokens, values, peak


def _activations(feature: Feature, tables: Tables, names: Naming) -> Iterator[dict[str, Any]]:
    address = _address(feature, names)
    prefix = "-".join((address["modelId"], address["layer"], address["index"]))
    for row, low, high, share in bins(feature):
        tokens, values, peak = _window(row)
        yield record(
            "Activation",
            **address,
            id=f"{prefix}-{row['rank']}",
            tokens=tokens,
            values=values,
            maxValue=max(values),
            maxValueTokenIndex=values.index(max(values)),
            minValue=min(values),
            creatorId=names.creator,
            createdAt=tables.run.manifest.created,
            dataSource=row["phase"],
            dataIndex=str(row["document"]),
            binMin=low,
            binMax=high,
            binContains=share,
            qualifyingTokenIndex=peak,
        )


def label(feature: Feature) -> str:
    """Return what was found out about a feature as a sentence; empty where nothing was."""
    verdict = feature.verdict
    if verdict is None:
        return f"counted by rule {', '.join(feature.rules)}" if feature.rules else ""
    return f"{verdict.verdict}: {verdict.sentence or verdict.reason}"


def labels(feature: Feature) -> dict[str, str]:
    """Return what is said of a feature, {by which method: text}: a person's label, the verdict."""
    known = {"resa-lens-note": feature.note.label, "resa-lens-verdict": label(feature)}
    return {method: text for method, text in known.items() if text}


def _explanations(feature: Feature, tables: Tables, names: Naming) -> Iterator[dict[str, Any]]:
    address = _address(feature, names)
    prefix = "-".join((address["modelId"], address["layer"], address["index"]))
    for method, text in labels(feature).items():
        yield record(
            "Explanation",
            **address,
            id=f"{prefix}-{method}",
            description=text,
            authorId=names.creator,
            typeName=method,
            notes=feature.note.note or None if method == "resa-lens-note" else None,
            createdAt=tables.run.manifest.created,
        )


def _uploaded(feature: Feature) -> dict[str, Any]:
    """Return a feature of an upload: what goes beyond its limits is cut, the peak stays inside."""
    row, activations = feature.row, []
    for example, low, high, share in bins(feature):
        tokens, values, peak = _window(example)
        first = max(0, min(peak - LONGEST // 2, len(tokens) - LONGEST))
        strongest = example["interval"] == STRONGEST
        activations.append(
            {
                "tokens": tokens[first : first + LONGEST],
                "values": values[first : first + LONGEST],
                "quantileMin": example["value"] if strongest else low,
                "quantileMax": row["max"] if strongest else high,
                "quantileFraction": 1 / max(1, row["tokens_fired"]) if strongest else share,
            }
        )
    return {
        "index": row["feature"],
        "density": row["density"],
        "topLogits": _logits(row, "top"),
        "bottomLogits": _logits(row, "bottom"),
        "explanations": [
            {"text": text[:LABEL], "methodName": method, "modelName": ""}
            for method, text in labels(feature).items()
        ],
        "activations": activations,
    }


def _logits(row: dict[str, Any], side: str) -> list[dict[str, Any]]:
    pairs = zip(row[f"{side}_tokens"] or [], row[f"{side}_logits"] or [], strict=True)
    return [{"token": token, "value": value} for token, value in list(pairs)[:LOGITS]]
