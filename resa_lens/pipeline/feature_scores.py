"""Scores of every feature between reasoning text and other text, tested and corrected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from resa_lens import corpora
from resa_lens.activations import stream_activations
from resa_lens.corpora import CorpusConfig, Record
from resa_lens.errors import BadInputError
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
    CORRECTIONS,
    DRAWS,
    SCORES,
    Scored,
    check_scores,
    check_words,
    intervals,
)
from resa_lens.hookpoints import Hookpoint
from resa_lens.models import Model
from resa_lens.phases import PHASES, phased_batches, phased_texts
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.feature_files import SCORE_GROUP
from resa_lens.pipeline.feature_files import SCORE_SCHEMA as SCHEMA
from resa_lens.pipeline.saes import FIT_BYTES, SaeRun, fit_corpus, split_records
from resa_lens.prompts import resolve_system_prompt
from resa_lens.saes.coder import SparseActs, SparseCoder, encode
from resa_lens.workspace import config_dict, digest, read_json, write_json

NO_STEPS = "no-steps"
TOKENS = 16_384
INTERVAL_DRAWS = 500
LEVEL = 0.05


@dataclass(frozen=True)
class ScoreConfig:
    """Which scores, on which text, against which nulls."""

    scores: tuple[str, ...] | None = None
    """Names in SCORES; None for all that the text allows."""
    other: str | None = None
    """None: the thoughts against the prompt and answer of the same documents.  Else whole documents
    with steps against documents without: `no-steps` takes half of the records for each, any other
    value is a data source whose questions stand with their answers alone."""
    tokens: int = TOKENS
    words: tuple[str, ...] | None = None
    """Reasoning words of reason_score; None: those of the bundled set for it, else English ones."""
    window: tuple[int, int] = WINDOW
    """Tokens before and after a reasoning word."""
    draws: int = DRAWS
    """Of each null; the smallest p-value is 2 / (draws + 1), 1 / (draws + 1) one-sided."""
    correction: str = "bh"
    """bh (false discovery rate) or holm (any false call), over all layers' features of a score."""
    top: int = 20
    """Features a score that are named, with intervals."""
    count: CountConfig = field(default_factory=CountConfig)
    """The prompt of the exclusive rules."""


@dataclass(frozen=True)
class LabelledBatch:
    """Tokens with what the scores need to know of them, each [batch x position] but for the ids."""

    ids: Int[Tensor, "batch position"]
    reasoning: Bool[Tensor, " token"]
    documents: Int[Tensor, " token"]
    keep: Bool[Tensor, " token"]
    windows: Bool[Tensor, "word token"]


def score_run(
    ctx: Context,
    model: Model,
    run: SaeRun,
    corpus: CorpusConfig,
    config: ScoreConfig,
    layers: Sequence[int] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Score the features of each layer, or read the finished scores.

    Args:
        ctx: the workspace and who to tell.
        model: the model the SAEs stand in.
        run: the SAEs.
        corpus: the reasoning text: held-out records with their steps.
        config: scores, other text and nulls.
        layers: all of the run by default.

    Returns:
        The folder (scores.parquet holds every feature) and its summary: design, sizes, and for
        each score the number of features tested and called, and the top features.

    Raises:
        BadInputError: an unknown score or correction, data without steps, or too little text.
    """
    check_scores(config.scores or ())
    if config.correction not in CORRECTIONS:
        raise BadInputError(
            f"correction {config.correction!r} is unknown; use {' or '.join(CORRECTIONS)}"
        )
    corpus = fit_corpus(corpus, model)
    words = config.words
    if words is None:
        words = TINY_WORDS if corpus.source == "tiny" else REASONING_WORDS
    groups = _records(corpus, config.other)
    chosen = sorted(p.layer for p in run.points if layers is None or p.layer in layers)
    identity = {
        "score": {
            **{key: value for key, value in config_dict(config).items() if key != "top"},
            "words": words,
            "count": {**asdict(config.count), "prompt": resolve_system_prompt(config.count.prompt)},
        },
        "saes": ctx.workspace.relative(run.folder),
        "corpus": config_dict(corpus),
        "data": [corpora.hash_records(records) for records in groups],
        "layers": chosen,
        "seed": ctx.seed,
        "dtype": model.dtype,
    }
    folder = ctx.workspace.path("scores", model.slug, f"{run.points[0].site}-{digest(identity)}")
    if run.manifest and not run.warnings and ctx.done(folder, run.folder):
        held = read_json(folder / "summary.json")
        # Fewer are shown than were kept; more need their intervals.
        if held["top"] >= config.top:
            ctx.reporter.note(f"scores: done before, in {folder}")
            for score in held["scores"]:
                score["top"] = score["top"][: config.top]
            return folder, {**held, "top": config.top}
    batches = labelled_batches(model, groups, corpus, config.tokens, words, config.window)
    names, left_out = _possible(config.scores, words, batches)
    for name, reason in left_out.items():
        ctx.reporter.note(f"{name} is left out: {reason.removeprefix(f'{name}: ')}")
    prompt = tag_prompt(model, config.count) if set(names) & set(RULES) else None
    found: dict[int, dict[str, Scored]] = {}
    bounds: dict[tuple[int, str, int], list[float]] = {}
    design, sizes = "", {}
    many = "s" if len(chosen) > 1 else ""
    label = f"scores of {len(chosen)} layer{many}, {config.draws} draws of each null"
    with ctx.bar(label, len(chosen)) as advance:
        for point, evidence in _evidence(model, run, chosen, batches, words, prompt, config.count):
            design, sizes = evidence.design, evidence.sizes(evidence.reasoning)
            seed = [ctx.seed, point.layer]
            found[point.layer] = {n: SCORES[n](evidence, config.draws, seed) for n in names}
            for name, scored in found[point.layer].items():
                top = scored.features[_ranked(scored.p, scored.values)[: config.top]]
                drawn = intervals(name, evidence, top.tolist(), draws=INTERVAL_DRAWS, seed=seed)
                for feature, ci in zip(top.tolist(), drawn.tolist(), strict=True):
                    bounds[point.layer, name, feature] = ci
            advance(1)
    table = _table(found, names, config.correction)
    summary: dict[str, Any] = {
        "design": design,
        **sizes,
        "correction": config.correction,
        "draws": config.draws,
        "top": config.top,
        "words": list(words),
        "left_out": left_out,
        "scores": [_summary(table, name, bounds, config) for name in names],
    }
    called = {s["score"]: s["significant"] for s in summary["scores"]}
    manifest = ctx.manifest(
        "scores",
        model,
        config=identity,
        parents=[identity["saes"]],
        results={
            "site": run.points[0].site,
            "model": model.name,
            "layers": chosen,
            "significant": called,
            "warnings": list(run.warnings),
        },
    )
    with ctx.workspace.artifact(folder, manifest) as target:
        pq.write_table(table, target / "scores.parquet", row_group_size=SCORE_GROUP)
        write_json(target / "summary.json", summary)
    return folder, summary


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
    source = corpora.load_records(
        corpus.source, question_column=corpus.question_column, answer_column=corpus.answer_column
    )
    held = [record for record in split_records(source)[1] if record.steps]
    if not held:
        raise BadInputError(
            f"data {corpus.source!r} has no steps: only the answer would stand between the think "
            "tags, which is no reasoning text; give data with a column steps"
        )
    if other is None:
        return [held]
    if other == NO_STEPS:
        return [held[::2], [replace(record, steps="") for record in held[1::2]]]
    rest = split_records(corpora.load_records(other))[1]
    return [held, [replace(record, steps="") for record in rest]]


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
    made, first = [], 0
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
            made.append(
                LabelledBatch(
                    batch.ids,
                    (thinks if len(groups) == 1 else apart).flatten(),
                    batch.documents.flatten() + first,
                    ~torch.isin(batch.ids, torch.tensor(special)).flatten(),
                    torch.cat(near, dim=1),
                )
            )
        first += len(texts)
    return made


def _windows(
    tokenizer: Any, text: str, length: int, words: Sequence[str], window: tuple[int, int]
) -> Bool[Tensor, "word position"]:
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    # Behind the text stands the end of the sequence; a long document is cut.
    return word_windows(text, [*offsets, (len(text), len(text))][:length], words, window)


def _possible(
    asked: Sequence[str] | None, words: Sequence[str], batches: Sequence[LabelledBatch]
) -> tuple[list[str], dict[str, str]]:
    """Return the scores that the text allows, and why the others are left out.

    Raises:
        BadInputError: a score that was asked for by its name is not possible.
    """
    names = list(dict.fromkeys(asked or SCORES))
    if "reason_score" in names:
        windows = torch.cat([batch.windows[:, batch.keep] for batch in batches], dim=1).numpy()
        try:
            check_words(words, windows)
        except BadInputError as error:
            if asked:
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
    for coders in _groups(model, run, layers):
        made = {point: Accumulator(coder.num_latents, words) for point, coder in coders.items()}
        on_prompt: dict[Hookpoint, PromptActs] = {}
        if prompt is not None:
            for acts in _encoded(model, coders, [torch.tensor([prompt.ids])]):
                on_prompt = {
                    p: PromptActs(a, prompt, count.threshold, count.ignore_first)
                    for p, a in acts.items()
                }
        ids = [batch.ids for batch in batches]
        for batch, acts in zip(batches, _encoded(model, coders, ids), strict=True):
            for point, found in acts.items():
                made[point].add(found, batch.reasoning, batch.documents, batch.keep, batch.windows)
        for point in list(made):
            yield point, made.pop(point).evidence(on_prompt.get(point))


def _encoded(
    model: Model, coders: dict[Hookpoint, SparseCoder], ids: Sequence[Tensor]
) -> Iterator[dict[Hookpoint, SparseActs]]:
    """Active latents of each batch, tokens end to end."""
    for batch in stream_activations(model, ids, list(coders)):
        yield {
            point: encode(coders[point], acts.flatten(0, 1).float())
            for point, acts in batch.acts.items()
        }


def _groups(
    model: Model, run: SaeRun, layers: Sequence[int]
) -> Iterator[dict[Hookpoint, SparseCoder]]:
    """Load encoders, as many at once as `FIT_BYTES` allows."""
    held: dict[Hookpoint, SparseCoder] = {}
    for layer in layers:
        held |= run.coders(model, [layer], decoder=False)
        size = sum(t.nbytes for coder in held.values() for t in coder.state_dict().values())
        if size >= FIT_BYTES:
            yield held
            held = {}
    if held:
        yield held


def _ranked(p: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Order by p, and among equals (the smallest that the draws allow) from the largest value."""
    return np.lexsort((-values, p))


def _table(found: dict[int, dict[str, Scored]], names: Sequence[str], correction: str) -> pa.Table:
    parts = []
    for name in names:
        scored = {layer: by_name[name] for layer, by_name in sorted(found.items())}
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
        for key in SCHEMA.names[len(columns) :]:
            columns[key] = np.repeat([s.sizes[key] for s in scored.values()], counts)
        parts.append(pa.table(columns, schema=SCHEMA))
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
