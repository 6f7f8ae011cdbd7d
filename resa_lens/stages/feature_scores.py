"""Scores of every feature between reasoning text and other text, tested and corrected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.feature_tables import SCORE_GROUP, SCORE_SCHEMA
from resa_lens.artifacts.kinds.scores import Scores
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.config import result_fields
from resa_lens.errors import BadInputError
from resa_lens.features.contrast_nulls import split_labels
from resa_lens.features.evidence import (
    REASONING_WORDS,
    TINY_WORDS,
    WINDOW,
    Accumulator,
    Evidence,
    PromptActs,
    word_windows,
)
from resa_lens.features.exclusive import RULES, CountConfig, TaggedPrompt, tag_prompt
from resa_lens.features.scores import (
    CONTRASTS,
    CORRECTIONS,
    SCORES,
    Scored,
    check_scores,
    check_words,
    intervals,
    null_of,
)
from resa_lens.machine.hardware import MB
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseActs, SparseCoder, encode
from resa_lens.stages.config import NO_STEPS
from resa_lens.stages.config import ScoreConfig as ScoreConfig
from resa_lens.stages.saes import FIT_BYTES, SaeRun, in_groups, phased_corpus, split_records
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig, Record
from resa_lens.texts.phases import PHASES, phased_batches, phased_texts

INTERVAL_DRAWS = 500
LEVEL = 0.05
LITTLE = 0.05
"""Share of the labels' variance below which the contrasts have next to nothing to test."""


@dataclass(frozen=True)
class LabelledBatch:
    """Tokens with what the scores need to know of them, each [batch x position] but for the ids."""

    ids: Int[Tensor, "batch position"]
    reasoning: Bool[Tensor, " token"]
    documents: Int[Tensor, " token"]
    keep: Bool[Tensor, " token"]
    windows: Bool[Tensor, "word token"]


@dataclass(frozen=True)
class ScoreRun:
    """The scores' summary, and the artifact whose table holds every feature."""

    artifact: Artifact
    summary: dict[str, Any]
    """Design, sizes, and for each score the number of features tested and called, and the top."""


def score_run(
    ctx: Context,
    model: Model,
    run: SaeRun,
    corpus: CorpusConfig,
    config: ScoreConfig,
    layers: Sequence[int] | None = None,
) -> ScoreRun:
    """Score the features of each layer, or read the finished scores.

    Args:
        ctx: the workspace and who to tell.
        model: the model the SAEs stand in.
        run: the SAEs.
        corpus: the reasoning text: held-out records with their steps.
        config: scores, other text and nulls.
        layers: all of the run by default.

    Raises:
        BadInputError: an unknown score or correction, data without steps, or too little text.
    """
    check_scores(config.scores or ())
    if config.correction not in CORRECTIONS:
        raise BadInputError(
            f"correction {config.correction!r} is unknown; use {' or '.join(CORRECTIONS)}"
        )
    corpus = phased_corpus(corpus, model)
    words = config.words
    if words is None:
        words = TINY_WORDS if corpus.source == "tiny" else REASONING_WORDS
    groups = _records(corpus, config.other)
    places = sorted(p.layer for p in run.points if layers is None or p.layer in layers)
    score = result_fields(replace(config, words=words))
    # Fewer are shown than were kept; more need their intervals.
    del score["top"]
    stage = ctx.stage(
        Scores,
        model,
        name=run.site,
        config={"score": score, "corpus": corpus, "layers": places, "seed": ctx.seed},
        data={
            part: corpora.hash_records(records)
            for part, records in zip(("data", "other"), groups, strict=False)
        },
        parents={"saes": run.parent(places)},
        noun="scores",
    )

    def work(draft: Draft) -> None:
        sizes = [size / 2 for size in run.size_mb(places).values()]
        # The table has at most a row a score and latent, of which an SAE holds two vectors.
        rows = len(config.scores or SCORES) * sum(sizes) / model.d_model
        draft.expect(min(sum(sizes), FIT_BYTES / MB + max(sizes)), 16 * rows)
        batches = labelled_batches(model, groups, corpus, config.tokens, words, config.window)
        names, left_out = _possible(config.scores, words, batches)
        for name, reason in left_out.items():
            ctx.reporter.note(f"{name} is left out: {reason.removeprefix(f'{name}: ')}")
        prompt = tag_prompt(model, config.count) if set(names) & set(RULES) else None
        scores: dict[int, dict[str, Scored]] = {}
        bounds: dict[tuple[int, str, int], list[float]] = {}
        design, sizes, informative = "", {}, 0.0
        many = "s" if len(places) > 1 else ""
        label = f"scores of {len(places)} layer{many}, {config.draws} draws of each null"
        stream = _evidence(model, run, places, batches, words, prompt, config.count)
        with ctx.bar(label, len(places)) as advance:
            for point, evidence in stream:
                if not design:  # the text is every layer's
                    design, sizes = evidence.design, evidence.sizes(evidence.reasoning)
                    informative = split_labels(evidence).informative
                seed = [ctx.seed, point.layer]
                scores[point.layer] = {n: SCORES[n](evidence, config.draws, seed) for n in names}
                for name, scored in scores[point.layer].items():
                    top = scored.features[_ranked(scored.p, scored.values)[: config.top]]
                    drawn = intervals(name, evidence, top.tolist(), draws=INTERVAL_DRAWS, seed=seed)
                    for feature, ci in zip(top.tolist(), drawn.tolist(), strict=True):
                        bounds[point.layer, name, feature] = ci
                advance(1)
        if informative < LITTLE and set(names) & set(CONTRASTS):
            ctx.reporter.note(
                "reasoning text stands at nearly the same positions of every document: position "
                f"leaves {100 * informative:.1f} % of its variance, so the contrast scores can "
                "hardly call a feature; give documents that differ, or --other-data"
            )
        table = _table(scores, names, config.correction)
        summaries = [_summary(table, name, bounds, config) for name in names]
        draft.results = {
            "site": run.site,
            "model": model.name,
            "layers": places,
            "significant": {one["score"]: one["significant"] for one in summaries},
            "warnings": list(run.warnings),
        }
        draft.settings = {"saes": run.relative, "other": config.other}
        draft.json(
            "summary.json",
            {
                "design": design,
                **sizes,
                "informative": informative,
                "nulls": {name: null_of(name, design) for name in names},
                "correction": config.correction,
                "draws": config.draws,
                "top": config.top,
                "words": list(words),
                "left_out": left_out,
                "scores": summaries,
            },
        )
        draft.write(
            lambda target: pq.write_table(
                table, target / "scores.parquet", row_group_size=SCORE_GROUP, compression="zstd"
            )
        )

    def enough(artifact: Artifact) -> bool:
        return artifact.value("summary.json")["top"] >= config.top

    artifact = stage.obtain(work, usable=enough)
    summary = artifact.value("summary.json")
    for row in summary["scores"]:
        row["top"] = row["top"][: config.top]
    return ScoreRun(artifact, {**summary, "top": config.top})


def check_text(corpus: CorpusConfig, other: str | None = None) -> None:
    """Refuse text that cannot be scored, before SAEs are trained on it.

    Raises:
        BadInputError: no record has steps, or a source cannot be read.
    """
    _records(corpus, other)


def _records(corpus: CorpusConfig, other: str | None) -> list[list[Record]]:
    """Records that become documents: of the reasoning text, and of the other text if it is apart.

    Raises:
        BadInputError: no record has steps.
    """
    records = split_records(corpora.read_records(corpus))[1]
    reasoning = [record for record in records if record.steps]
    if not reasoning:
        raise BadInputError(
            f"data {corpus.source!r} has no steps: only the answer would stand between the think "
            "tags, which is no reasoning text; give data with a column steps"
        )
    if other is None:
        return [reasoning]
    if other == NO_STEPS:
        return [reasoning[::2], [replace(record, steps="") for record in reasoning[1::2]]]
    rest = split_records(corpora.load_records(other))[1]
    return [reasoning, [replace(record, steps="") for record in rest]]


def labelled_batches(
    model: Model,
    groups: Sequence[Sequence[Record]],
    corpus: CorpusConfig,
    tokens: int,
    words: Sequence[str],
    window: tuple[int, int] = WINDOW,
) -> list[LabelledBatch]:
    """Tokenise documents and label their tokens.

    Args:
        model: whose tokenizer, and whose device the labels go to.
        groups: records of one corpus, whose thoughts are the reasoning text; or of two, the first
            of which is reasoning text as a whole.
        corpus: the form of the documents.
        tokens: in all; each group has its part.
        words: reasoning words.
        window: tokens before and after them.

    The beginning- and end-of-sequence tokens are left out: they are no text, and the first holds
    activations of another size.
    """
    tokenizer: Any = model.tokenizer
    special = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    labelled, first = [], 0
    for number, records in enumerate(groups):
        texts = list(phased_texts(records, corpus))
        batches = phased_batches(
            tokenizer, texts, tokens=max(1, tokens // len(groups)), longest=corpus.sequence
        )
        for batch in batches:
            near = [
                _windows(tokenizer, texts[int(row[0])], batch.ids.shape[1], words, window)
                for row in batch.documents
            ]
            thinks = batch.phases == PHASES.index("think")
            apart = torch.full_like(thinks, number == 0)
            labelled.append(
                LabelledBatch(
                    batch.ids,
                    (thinks if len(groups) == 1 else apart).flatten(),
                    batch.documents.flatten() + first,
                    ~torch.isin(batch.ids, torch.tensor(special)).flatten(),
                    torch.cat(near, dim=1),
                )
            )
        first += len(texts)
    return labelled


def _windows(
    tokenizer: Any, text: str, length: int, words: Sequence[str], window: tuple[int, int]
) -> Bool[Tensor, "word position"]:
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    # Behind the text stands the end of the sequence; a long document is cut.
    return word_windows(text, [*offsets, (len(text), len(text))][:length], words, window)


def _possible(
    scores: Sequence[str] | None, words: Sequence[str], batches: Sequence[LabelledBatch]
) -> tuple[list[str], dict[str, str]]:
    """Return the scores that the text allows, and why the others are left out.

    Raises:
        BadInputError: a score that was asked for by its name is not possible.
    """
    names = list(dict.fromkeys(scores or SCORES))
    if "reason_score" in names:
        windows = torch.cat([batch.windows[:, batch.keep] for batch in batches], dim=1).numpy()
        try:
            check_words(words, windows)
        except BadInputError as error:
            if scores:
                raise
            names.remove("reason_score")
            return names, {"reason_score": str(error)}
    return names, {}


def _evidence(
    model: Model,
    run: SaeRun,
    layers: Sequence[int],
    batches: Sequence[LabelledBatch],
    words: Sequence[str],
    prompt: TaggedPrompt | None,
    count: CountConfig,
) -> Iterator[tuple[Hookpoint, Evidence]]:
    """Stream the text once for as many SAEs as fit, and yield what each makes of it."""
    for coders in in_groups(run, model, layers, decoder=False):
        sums = {point: Accumulator(coder.num_latents, words) for point, coder in coders.items()}
        on_prompt: dict[Hookpoint, PromptActs] = {}
        if prompt is not None:
            for acts in _encoded(model, coders, [torch.tensor([prompt.ids])]):
                on_prompt = {
                    p: PromptActs(a, prompt, count.threshold, count.ignore_first)
                    for p, a in acts.items()
                }
        ids = [batch.ids for batch in batches]
        for batch, acts in zip(batches, _encoded(model, coders, ids), strict=True):
            for point, active in acts.items():
                sums[point].add(active, batch.reasoning, batch.documents, batch.keep, batch.windows)
        for point in list(sums):
            yield point, sums.pop(point).evidence(on_prompt.get(point))


def _encoded(
    model: Model, coders: dict[Hookpoint, SparseCoder], ids: Sequence[Tensor]
) -> Iterator[dict[Hookpoint, SparseActs]]:
    """Active latents of each batch, tokens end to end."""
    for batch in stream_activations(model, ids, list(coders)):
        yield {
            point: encode(coders[point], acts.flatten(0, 1).float())
            for point, acts in batch.acts.items()
        }


def _ranked(p: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Order by p, and among equals (the smallest that the draws allow) from the largest value."""
    return np.lexsort((-values, p))


def _table(scores: dict[int, dict[str, Scored]], names: Sequence[str], correction: str) -> pa.Table:
    parts = []
    for name in names:
        scored = {layer: by_name[name] for layer, by_name in sorted(scores.items())}
        p = np.concatenate([s.p for s in scored.values()])
        q = CORRECTIONS[correction](p) if p.size else p
        counts = [s.features.size for s in scored.values()]
        columns: dict[str, Any] = {
            "layer": np.repeat(list(scored), counts),
            "feature": np.concatenate([s.features for s in scored.values()]),
            "score": [name] * p.size,
            "value": np.concatenate([s.values for s in scored.values()]),
            "null": np.concatenate([s.null for s in scored.values()]),
            "p": p,
            "q": q,
            "active_tokens": np.concatenate([s.active_tokens for s in scored.values()]),
            "active_documents": np.concatenate([s.active_documents for s in scored.values()]),
        }
        for key in SCORE_SCHEMA.names[len(columns) :]:
            columns[key] = np.repeat([s.sizes[key] for s in scored.values()], counts)
        parts.append(pa.table(columns, schema=SCORE_SCHEMA))
    return pa.concat_tables(parts)


def _summary(
    table: pa.Table, name: str, bounds: dict[tuple[int, str, int], list[float]], config: ScoreConfig
) -> dict[str, Any]:
    rows = table.filter(pa.array(np.array(table["score"]) == name))
    p, q, values = (rows[key].to_numpy() for key in ("p", "q", "value"))
    chance: dict[str, Any] = {}
    if name in RULES:
        # What chance would name: the sum of the features' own chances.
        expected = float(rows["null"].to_numpy().sum())
        rows = rows.filter(pa.array(values > 0))
        chance = {"named": rows.num_rows, "named_by_chance": expected}
    top, order = [], _ranked(rows["p"].to_numpy(), rows["value"].to_numpy())
    for row in rows.take(order[: config.top]).to_pylist():
        ci = bounds[row["layer"], name, row["feature"]]
        top.append({**row, "ci": ci if np.isfinite(ci).all() else None})
    return {
        "score": name,
        "tested": int(p.size),
        "significant": int((q < LEVEL).sum()),
        "smallest_p": float(p.min()) if p.size else 1.0,
        **chance,
        "top": top,
    }
