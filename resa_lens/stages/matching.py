"""Features of one run's SAEs looked for in another's: of another seed, or of another model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.matches import MATCH_SCHEMA, Matches
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.config import result_fields
from resa_lens.errors import BadInputError
from resa_lens.features.evidence import sparse_rows
from resa_lens.features.exclusive import count_features
from resa_lens.features.matching import (
    agreement,
    check_threshold,
    follow,
    found_of,
    match_activations,
    match_directions,
)
from resa_lens.files import named_path
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint, describe_layer
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseCoder, encode
from resa_lens.stages.config import MatchConfig as MatchConfig
from resa_lens.stages.saes import (
    SaeRun,
    fit_corpus,
    open_saes,
    phased_corpus,
    sae_run,
    split_records,
)
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.texts.phases import PhasedBatch, phased_batches, phased_texts

TABLE = "matches.parquet"


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
    if named_path(name, "SAEs").is_dir():
        return open_saes(ctx, model, named_path(name, "SAEs"), site, only=layers)
    runs = [
        artifact
        for artifact in ctx.workspace.artifacts(Saes, schemas=True)
        if artifact.manifest.results.get("site") == site
        and artifact.weights == model.weights_hash
        # An older one does not say more.
        and artifact.manifest.ingredients.get("model", model.contents) == model.contents
    ]
    named = [run for run in runs if run.path.name == name or run.path.name.endswith(f"-{name}")]
    if name.startswith("seed:"):
        named = [run for run in runs if str(run.manifest.config["sae"]["seed"]) == name[5:]][:1]
    if len(named) != 1:
        known = ", ".join(run.path.name for run in runs) or "none"
        raise BadInputError(
            f"{name!r} is no folder and {'names several runs' if named else 'no run'} of "
            f"{model.slug} at site {site}; there: {known}"
        )
    return sae_run(named[0], site)


@dataclass(frozen=True)
class MatchRun:
    """What was matched, and the artifact whose table holds every feature."""

    artifact: Artifact
    layers: list[dict[str, Any]]
    """A row a layer: the matches by cosine (None, with the reason, across widths) and by
    correlation, each with its null, their agreement, and every counted feature of the first run
    with its matches."""


def match_run(
    ctx: Context,
    first: Side,
    second: Side,
    corpus: CorpusConfig,
    config: MatchConfig,
    layers: Sequence[int] | None = None,
) -> MatchRun:
    """Match the features of the first run in the second, layer by layer, or read the result.

    Args:
        ctx: the workspace and who to tell.
        first: whose features are looked for.
        second: where.
        corpus: whose held-out records, with their steps where they have them, both models read.
        config: threshold, text and the rules' prompt.
        layers: of both; by default all that both have.

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
    shared = _shared_layers(first, second, layers)
    corpus = phased_corpus(fit_corpus(corpus, model), second.model)
    records = split_records(corpora.read_records(corpus))[1]
    stage = ctx.stage(
        Matches,
        model,
        name=first.run.site,
        config={
            "match": result_fields(config),
            "corpus": corpus,
            "layers": shared,
            "seed": ctx.seed,
            "other_model": {"contents": second.model.contents, "dtype": second.model.dtype},
        },
        data={"data": corpora.hash_records(records)},
        parents={"saes": first.run.parent(shared), "other_saes": second.run.parent(shared)},
    )

    def work(draft: Draft) -> None:
        sizes = [side.run.size_mb(shared) for side in (first, second)]
        # The table has a row a latent, of which an SAE holds two vectors.
        draft.expect(
            sum(max(size.values()) for size in sizes), 5 * sum(sizes[0].values()) / model.d_model
        )
        batches = phased_batches(
            own, phased_texts(records, corpus), tokens=config.tokens, longest=corpus.sequence
        )
        rows, tables = [], []
        with ctx.bar(f"matching {len(shared)} layers", len(shared)) as advance:
            for layer in shared:
                row, table = _match_layer(first, second, layer, batches, config, ctx.seed)
                rows.append(row)
                tables.append(table)
                advance(1)
        draft.results = {
            "site": first.run.site,
            "models": [side.model.name for side in (first, second)],
            "layers": {
                str(row["layer"]): {
                    name: row[name] and row[name]["share"] for name in ("cosine", "correlation")
                }
                for row in rows
            },
        }
        draft.settings = {"saes": [first.run.relative, second.run.relative]}
        draft.json("matches.json", rows)
        draft.write(lambda target: pq.write_table(pa.concat_tables(tables), target / TABLE))

    artifact = stage.obtain(work)
    return MatchRun(artifact, artifact.value("matches.json"))


def _shared_layers(first: Side, second: Side, layers: Sequence[int] | None) -> list[int]:
    both = set(first.run.layers) & set(second.run.layers)
    shared = sorted(both if layers is None else set(layers))
    for side in (first, second):
        if missing := [layer for layer in shared if layer not in side.run.layers]:
            raise BadInputError(
                f"{side.run.folder} has no SAE at "
                f"{describe_layer(missing[0], side.model.n_layers)}; it has layers "
                f"{', '.join(map(str, sorted(side.run.layers)))}"
            )
    if not shared:
        raise BadInputError("the two runs have no layer in common; nothing to match")
    return shared


def _match_layer(
    first: Side,
    second: Side,
    layer: int,
    batches: Sequence[PhasedBatch],
    config: MatchConfig,
    seed: int,
) -> tuple[dict[str, Any], pa.Table]:
    coders = first.coder(layer), second.coder(layer)
    own, other = (next(iter(side.values())) for side in coders)
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
        count_features(side.model, coder, config.count).layers[0].features
        for side, coder in zip((first, second), coders, strict=True)
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
    return row, pa.table(columns, schema=MATCH_SCHEMA)


def _activations(
    first: Side,
    second: Side,
    coders: tuple[dict[Hookpoint, SparseCoder], dict[Hookpoint, SparseCoder]],
    batches: Sequence[PhasedBatch],
) -> list[sparse.csr_array]:
    """Activations of both sides on the same tokens, each [feature, token]."""
    ids = [batch.ids for batch in batches]
    acts = []
    for side, loaded in zip((first, second), coders, strict=True):
        ((point, coder),) = loaded.items()
        rows = [
            sparse_rows(encode(coder, batch.acts[point].flatten(0, 1).float()))
            for batch in stream_activations(side.model, ids, [point])
        ]
        acts.append(sparse.csr_array(sparse.csr_array(sparse.vstack(rows)).T))
    return acts
