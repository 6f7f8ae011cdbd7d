"""Features of one run's SAEs looked for in another's: of another seed, or of another model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from resa_lens import corpora
from resa_lens.activations import stream_activations
from resa_lens.corpora import CorpusConfig
from resa_lens.errors import BadInputError
from resa_lens.features.evidence import sparse_rows
from resa_lens.features.exclusive import CountConfig, count_features
from resa_lens.features.matching import (
    agreement,
    check_threshold,
    follow,
    found_of,
    match_activations,
    match_directions,
)
from resa_lens.hookpoints import Hookpoint, describe_layer
from resa_lens.models import Model
from resa_lens.phases import PhasedBatch, phased_batches, phased_texts
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.saes import SaeRun, fit_corpus, open_saes, sae_run, split_records
from resa_lens.prompts import resolve_system_prompt
from resa_lens.saes.coder import SparseCoder, encode
from resa_lens.saes.stability import THRESHOLD
from resa_lens.workspace import config_dict, digest, read_json, write_json

TOKENS = 16_384
SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int32()),
        pa.field("feature", pa.int32()),
        pa.field("fires", pa.bool_()),
        pa.field("cosine_match", pa.int32()),
        pa.field("cosine", pa.float64()),
        pa.field("correlation_match", pa.int32()),
        pa.field("correlation", pa.float64()),
    ]
)
"""A row a layer and feature of the first run; null where there is no match."""


@dataclass(frozen=True)
class MatchConfig:
    """How features are matched."""

    threshold: float = THRESHOLD
    """A feature is found where its match is above it: cosine and correlation alike."""
    tokens: int = TOKENS
    """Of shared text, for the correlations."""
    count: CountConfig = field(default_factory=CountConfig)
    """Whose counted features are followed one by one."""


@dataclass(frozen=True)
class Side:
    """A model and SAEs in it."""

    model: Model
    run: SaeRun

    def coder(self, layer: int) -> dict[Hookpoint, SparseCoder]:
        """Load the SAE of one layer."""
        return self.run.coders(self.model, [layer])


def open_run(
    ctx: Context, model: Model, name: str, site: str, layers: Sequence[int] | None = None
) -> SaeRun:
    """Open SAEs by the name of their run in the workspace, its last part, or their folder.

    `seed:1` is the newest run of that seed.

    Raises:
        BadInputError: neither a folder nor the name of one run of this model and site.
    """
    if Path(name).expanduser().is_dir():
        return open_saes(ctx, model, Path(name).expanduser(), site, only=layers)
    runs = [
        (folder, manifest)
        for folder, manifest in ctx.workspace.find(f"saes/{model.slug}", "saes")
        if manifest.results.get("site") == site
    ]
    named = [run for run in runs if run[0].name == name or run[0].name.endswith(f"-{name}")]
    if name.startswith("seed:"):
        named = [run for run in runs if str(run[1].config["sae"]["seed"]) == name[5:]][:1]
    if len(named) != 1:
        known = ", ".join(folder.name for folder, _ in runs) or "none"
        raise BadInputError(
            f"{name!r} is no folder and {'names several runs' if named else 'no run'} of "
            f"{model.slug} at site {site}; there: {known}"
        )
    folder, manifest = named[0]
    points = [Hookpoint(q["layer"], site) for q in manifest.results["layers"]]
    return sae_run(folder, points, manifest, fresh=False)


def match_run(
    ctx: Context,
    first: Side,
    second: Side,
    corpus: CorpusConfig,
    config: MatchConfig,
    layers: Sequence[int] | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
    """Match the features of the first run in the second, layer by layer, or read what was found.

    Args:
        ctx: the workspace and who to tell.
        first: whose features are looked for.
        second: where.
        corpus: whose held-out records, with their steps where they have them, both models read.
        config: threshold, text and the rules' prompt.
        layers: of both; by default all that both have.

    Returns:
        The folder (matches.parquet holds every feature), and a row a layer: what was found by
        cosine (None, with the reason, across widths) and by correlation, each with its null, their
        agreement, and every counted feature of the first with its matches.

    Raises:
        BadInputError: no layer in common, other tokenizers, or a threshold that is none.
    """
    check_threshold(config.threshold)
    model = first.model
    own: Any = model.tokenizer
    theirs: Any = second.model.tokenizer
    if own.get_vocab() != theirs.get_vocab():
        raise BadInputError(
            f"{model.name} and {second.model.name} have different tokenizers; features can only be "
            "matched on the same tokens"
        )
    chosen = _shared_layers(first, second, layers)
    corpus = fit_corpus(fit_corpus(corpus, model), second.model)
    records = split_records(corpora.load_records(corpus.source))[1]
    identity = {
        "match": {
            **config_dict(config),
            "count": {**asdict(config.count), "prompt": resolve_system_prompt(config.count.prompt)},
        },
        "saes": [ctx.workspace.relative(side.run.folder) for side in (first, second)],
        "weights": [side.model.weights_hash for side in (first, second)],
        "corpus": config_dict(corpus),
        "data": corpora.hash_records(records),
        "layers": chosen,
        "seed": ctx.seed,
        "dtype": model.dtype,
    }
    site = first.run.points[0].site
    folder = ctx.workspace.path("matches", model.slug, f"{site}-{digest(identity)}")
    known = all(side.run.manifest and not side.run.warnings for side in (first, second))
    if known and ctx.done(folder, first.run.folder, second.run.folder):
        ctx.reporter.note(f"matches: done before, in {folder}")
        return folder, read_json(folder / "matches.json")
    batches = phased_batches(
        own, phased_texts(records, corpus), tokens=config.tokens, longest=corpus.sequence
    )
    rows, tables = [], []
    with ctx.bar(f"matching {len(chosen)} layers", len(chosen)) as advance:
        for layer in chosen:
            row, table = _match_layer(first, second, layer, batches, config, ctx.seed)
            rows.append(row)
            tables.append(table)
            advance(1)
    manifest = ctx.manifest(
        "matches",
        model,
        config=identity,
        parents=identity["saes"],
        results={
            "site": site,
            "models": [side.model.name for side in (first, second)],
            "layers": {
                str(row["layer"]): {
                    name: row[name] and row[name]["share"] for name in ("cosine", "correlation")
                }
                for row in rows
            },
        },
    )
    with ctx.workspace.artifact(folder, manifest) as target:
        pq.write_table(pa.concat_tables(tables), target / "matches.parquet")
        write_json(target / "matches.json", rows)
    return folder, read_json(folder / "matches.json")


def _shared_layers(first: Side, second: Side, layers: Sequence[int] | None) -> list[int]:
    held = [{p.layer for p in side.run.points} for side in (first, second)]
    chosen = sorted(held[0] & held[1] if layers is None else set(layers))
    for side, has in zip((first, second), held, strict=True):
        if missing := [layer for layer in chosen if layer not in has]:
            raise BadInputError(
                f"{side.run.folder} has no SAE at "
                f"{describe_layer(missing[0], side.model.n_layers)}; it has layers "
                f"{', '.join(map(str, sorted(has)))}"
            )
    if not chosen:
        raise BadInputError("the two runs have no layer in common; nothing to match")
    return chosen


def _match_layer(
    first: Side,
    second: Side,
    layer: int,
    batches: Sequence[PhasedBatch],
    config: MatchConfig,
    seed: int,
) -> tuple[dict[str, Any], pa.Table]:
    coders = first.coder(layer), second.coder(layer)
    own, other = (next(iter(held.values())) for held in coders)
    acts = _activations(first, second, coders, batches)
    fires, fires_there = (np.diff(side.indptr) > 0 for side in acts)
    cosine = reason = None
    if own.d_in == other.d_in:
        assert own.W_dec is not None, "the coder was loaded without its decoder"
        assert other.W_dec is not None, "the coder was loaded without its decoder"
        cosine = match_directions(own.W_dec, other.W_dec, threshold=config.threshold, seed=seed)
    else:
        reason = f"widths {own.d_in} and {other.d_in} have no cosine; only activations are compared"
    correlation = match_activations(*acts, threshold=config.threshold)
    by_name = {"cosine": cosine, "correlation": correlation}
    named = [
        count_features(side.model, held, config.count).layers[0].features
        for side, held in zip((first, second), coders, strict=True)
    ]
    row = {
        "layer": layer,
        "name": describe_layer(layer, first.model.n_layers),
        "latents": [own.num_latents, other.num_latents],
        "firing": [int(fires.sum()), int(fires_there.sum())],
        "tokens": sum(batch.ids.numel() for batch in batches),
        "threshold": config.threshold,
        "cosine": None if cosine is None else asdict(found_of(cosine)),
        "cosine_firing": None if cosine is None else asdict(found_of(cosine, fires)),
        "cosine_reason": reason,
        "correlation": asdict(found_of(correlation, fires)),
        "agreement": None if cosine is None else agreement(cosine, correlation),
        "features": follow(named[0], by_name, named[1]),
    }
    columns: dict[str, Any] = {
        "layer": np.full(fires.size, layer), "feature": np.arange(fires.size), "fires": fires
    }  # fmt: skip
    for name, matches in by_name.items():
        none = np.ones(fires.size, dtype=bool) if matches is None else matches.indices < 0
        indices, values = (
            np.zeros((2, fires.size)) if matches is None else (matches.indices, matches.values)
        )
        columns[f"{name}_match"] = pa.array(indices.astype(np.int32), pa.int32(), mask=none)
        columns[name] = pa.array(values, pa.float64(), mask=none)
    return row, pa.table(columns, schema=SCHEMA)


def _activations(
    first: Side,
    second: Side,
    coders: tuple[dict[Hookpoint, SparseCoder], dict[Hookpoint, SparseCoder]],
    batches: Sequence[PhasedBatch],
) -> list[sparse.csr_array]:
    """Activations of both sides on the same tokens, each [feature, token]."""
    ids = [batch.ids for batch in batches]
    made = []
    for side, held in zip((first, second), coders, strict=True):
        ((point, coder),) = held.items()
        rows = [
            sparse_rows(encode(coder, batch.acts[point].flatten(0, 1).float()))
            for batch in stream_activations(side.model, ids, [point])
        ]
        made.append(sparse.csr_array(sparse.csr_array(sparse.vstack(rows)).T))
    return made
