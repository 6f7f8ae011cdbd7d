"""Feature activity over a corpus or over the model's own generations, kept as tables."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from resa_lens import corpora, prompts
from resa_lens.corpora import CorpusConfig
from resa_lens.errors import BadInputError
from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.evals.tasks import load_questions
from resa_lens.features.activity import (
    Activity,
    ActivityConfig,
    density,
    measure_activity,
    needed_bytes,
)
from resa_lens.features.lens import logit_lens, nearest_directions
from resa_lens.hookpoints import Hookpoint, describe_layer, parse_layer
from resa_lens.models import Model
from resa_lens.phases import PHASES, PhasedBatch, phased_batches, phased_texts
from resa_lens.pipeline.activity_tables import (
    DOCUMENTS,
    GROUP,
    Documents,
    example_rows,
    feature_rows,
    histogram_edges,
    join_tables,
    layer_writer,
    read_feature,
)
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.saes import SaeRun, fit_corpus
from resa_lens.saes.checkpoint import Checkpoints, newest, restore_threads, run_lock
from resa_lens.saes.plan import MB, RESERVE, Meter
from resa_lens.workspace import config_dict, digest, read_json, write_errors, write_json

TOKENS = 100_000
"""Of the documents, by default."""
LENS_PRODUCTS = 2e11
"""Multiplications of one layer's lens and neighbours up to which every feature gets them."""
ROOM_MB = 128
"""What the tables' row groups take in Python and Arrow, and what allocators keep of the
temporaries of a pass: 100 to 140 MB where it was measured."""
FIGURES = "figures.json"
CHUNK = 64
"""Questions that are answered between two writes of the generations."""


@dataclass(frozen=True)
class ActivityRun:
    """Where the tables lie, and the figures of every layer."""

    folder: Path
    layers: list[dict[str, Any]]
    tokens: dict[str, int]
    """By phase."""
    documents: int
    seconds: float
    resumed_at: int
    """Batches that a killed run had done, over its passes; 0 if this began anew."""


def activity_run(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    corpus: CorpusConfig,
    config: ActivityConfig,
    *,
    layers: Sequence[int] | None = None,
    tokens: int = TOKENS,
    generations: int = 0,
    max_new_tokens: int = 256,
    memory_limit_mb: float | None = None,
) -> ActivityRun:
    """Tally every feature over documents, go on with a killed run, or read the finished one.

    Args:
        ctx: the workspace and who to tell.
        model: the host.
        saes: one SAE a layer.
        corpus: whose records become documents, with their steps where they have them.
        config: what is kept of each feature.
        layers: 0-based; all that the run has by default.
        tokens: of the corpus' documents, at most.
        generations: answer so many questions of the corpus' test set, greedily, and look at these
            documents in place of the corpus.
        max_new_tokens: of one generation.
        memory_limit_mb: what the process may take; layers that do not fit together are measured
            one group after the other.

    Raises:
        BadInputError: no document, an SAE that does not fit, or a memory too small for one layer.
    """
    corpus = fit_corpus(corpus, model)
    points = [p for p in saes.points if layers is None or p.layer in layers]
    identity = {
        "activity": config_dict(config),
        "saes": ctx.workspace.relative(saes.folder),
        "layers": [p.layer for p in points],
        "corpus": config_dict(corpus),
        "tokens": tokens,
        "generations": [generations, max_new_tokens] if generations else None,
        "dtype": model.dtype,
    }
    site = saes.points[0].site
    folder = ctx.workspace.path("activity", model.slug, f"{site}-{digest(identity)}")
    if saes.manifest and (made := ctx.done(folder, saes.folder)):
        ctx.reporter.note(f"activity: done before, in {folder}")
        held = made.results
        return ActivityRun(
            folder, held["layers"], held["tokens"], held["documents"], made.seconds, 0
        )
    work = folder.parent / f".work-{folder.name}"
    began = time.monotonic()
    with run_lock(work, "measuring activity"):
        if ctx.force:
            for part in work.iterdir():
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        threads = [restore_threads(g, model.device, ctx.threads) for g in work.glob("group-*")]
        if any(threads):
            ctx.reporter.note(f"activity: going on with the run in {work}")
        texts: Sequence[str] | Iterator[str]
        if generations:
            texts = _generate(ctx, model, corpus, generations, max_new_tokens, work)
            # All of them: no document has more tokens than bytes, but for its end.
            tokens = sum(len(text.encode()) + 1 for text in texts)
        else:
            records = corpora.load_records(
                corpus.source,
                question_column=corpus.question_column,
                answer_column=corpus.answer_column,
            )
            texts = phased_texts(records, corpus)
        batches = phased_batches(
            model.tokenizer, texts, tokens=tokens, longest=_longest(model, corpus, generations)
        )
        documents = Documents(batches, model.tokenizer)
        finished = {p: read_json(f) for p in points if (f := _figures(work, p)).exists()}
        left = [p for p in points if p not in finished]
        groups, planned = [], 0.0
        if left:
            groups, planned = _plan(ctx, model, saes, left, batches, config, memory_limit_mb)
        fresh, resumed = _measure(ctx, model, saes, groups, batches, config, documents, work)
        rows = sorted([*finished.values(), *fresh], key=lambda row: row["layer"])
        resumed += len(batches) if finished else 0
        phases = torch.cat([batch.phases.flatten() for batch in batches])
        counts = torch.bincount(phases, minlength=len(PHASES)).tolist()
        by_phase: dict[str, int] = dict(zip(PHASES, counts, strict=True))
        manifest = ctx.manifest(
            "activity",
            model,
            config=identity,
            parents=[identity["saes"]],
            results={
                "layers": rows,
                "tokens": by_phase,
                "documents": len(documents.rows),
                "site": site,
                "model": model.name,
                "n_layers": model.n_layers,
                "planned_memory_mb": planned,
            },
        )
        manifest.seconds = round(time.monotonic() - began, 3)
        with ctx.workspace.artifact(folder, manifest) as target:
            documents.write(target / DOCUMENTS)
            join_tables([_figures(work, p).parent for p in points], target)
    shutil.rmtree(work, ignore_errors=True)
    return ActivityRun(folder, rows, by_phase, len(documents.rows), manifest.seconds, resumed)


def _figures(work: Path, point: Hookpoint) -> Path:
    """Return the file whose being there says that a layer is finished."""
    return work / f"layer-{point.layer}" / FIGURES


def _longest(model: Model, corpus: CorpusConfig, generations: int) -> int | None:
    """Return where documents are cut: the model's context for its own generations."""
    if not generations:
        return corpus.sequence
    return getattr(model.model.config.get_text_config(), "max_position_embeddings", None)


def _generate(
    ctx: Context, model: Model, corpus: CorpusConfig, count: int, longest: int, work: Path
) -> list[str]:
    """Answer questions greedily; what a killed run had answered is read."""
    items = load_questions(corpus.source, limit=count, seed=corpus.seed)
    asked = [prompts.question_prompt(item.question) for item in items]
    file = work / "generations.jsonl"
    made: list[str] = []
    if file.exists():
        for line in file.read_text().splitlines():
            # The last line of a killed run may be half a line.
            try:
                made.append(json.loads(line))
            except json.JSONDecodeError:
                break
    made = made[: len(made) // CHUNK * CHUNK] if len(made) < len(asked) else made
    engine = HFEngine(model.model, model.tokenizer)
    config = GenerationConfig(max_new_tokens=longest)
    with ctx.bar(f"answering {len(asked)} questions", len(asked)) as advance:
        advance(len(made))
        for first in range(len(made), len(asked), CHUNK):
            some = asked[first : first + CHUNK]
            answers = engine.generate(some, config)
            made += [p + a.text for p, a in zip(some, answers, strict=True)]
            with write_errors(file):
                temporary = file.with_suffix(".tmp")
                temporary.write_text("".join(json.dumps(text) + "\n" for text in made))
                temporary.replace(file)
            advance(len(some))
    return made


def _plan(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    points: Sequence[Hookpoint],
    batches: Sequence[PhasedBatch],
    config: ActivityConfig,
    limit_mb: float | None,
) -> tuple[list[list[Hookpoint]], float]:
    """Divide the layers by a probe of the largest batch; say what the run needs, and return MB."""
    meter = Meter(model.device)
    probe = max(batches, key=lambda batch: batch.ids.numel())
    first = points[:1]
    coders = saes.coders(model, [p.layer for p in first], decoder=False)
    measure_activity(model, coders, [probe], config)  # allocates and warms up
    base = meter.now()
    with meter.peak() as reached:
        began = time.perf_counter()
        measure_activity(model, coders, [probe], config)
        one = time.perf_counter() - began
        began = time.perf_counter()
        measure_activity(model, coders, [probe], config)
        one = min(one, time.perf_counter() - began)
    width, size = model.d_model, int(coders[first[0]].num_latents or 0)
    acts = 4 * probe.ids.numel() * width
    each = (needed_bytes(width, size, config) + acts) / MB
    top = max(reached[0], base) + each + ROOM_MB
    available = meter.now() + meter.available() * (1 - RESERVE)
    limit = available if limit_mb is None else limit_mb
    fitting = int((limit - top) // each) + 1
    if fitting < 1:
        raise BadInputError(
            f"one layer of {size} latents needs {top:.0f} MB at the peak, {limit:.0f} MB are "
            "available; keep fewer --examples, or give more memory"
        )
    passes = -(-len(points) // fitting)
    count = -(-len(points) // passes)
    groups = [list(points[i : i + count]) for i in range(0, len(points), count)]
    tokens = sum(batch.ids.numel() for batch in batches)
    seconds = one * len(points) * tokens / probe.ids.numel()
    peak = top + (count - 1) * each
    note = f" in {passes} passes over the documents" if passes > 1 else ""
    ctx.reporter.note(
        f"expected: at most {seconds:.0f} s{note}, {peak:.0f} MB of memory at "
        f"the peak ({available:.0f} MB available); {tokens} tokens"
    )
    return groups, round(peak, 1)


def _measure(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    groups: Sequence[Sequence[Hookpoint]],
    batches: Sequence[PhasedBatch],
    config: ActivityConfig,
    documents: Documents,
    work: Path,
) -> tuple[list[dict[str, Any]], int]:
    """Measure group by group; a finished layer lies in the work folder and is out of memory."""
    rows: list[dict[str, Any]] = []
    resumed = 0
    label = f"activity of {sum(map(len, groups))} layers"
    with ctx.bar(label, len(groups) * len(batches)) as advance:
        for group in groups:
            place = work / f"group-{'-'.join(str(p.layer) for p in group)}"
            held = newest(place)
            resumed += int(held.name.rsplit("-", 1)[1]) if held else 0
            found = measure_activity(
                model,
                saes.coders(model, [p.layer for p in group], decoder=False),
                batches,
                config,
                store=Checkpoints(place, model.device),
                advance=advance,
            )
            for point in group:
                rows.append(_row(found, point))
                target = _figures(work, point).parent
                with write_errors(target):
                    target.mkdir(exist_ok=True)
                    _write_layer(target, model, saes, point, found, documents)
                    # Last: with it the layer is finished.
                    write_json(target / FIGURES, rows[-1])
    return rows, resumed


def _row(activity: Activity, point: Hookpoint) -> dict[str, Any]:
    """Return one layer's figures."""
    tally = activity.tallies[point]
    fired = tally.fired
    alive = fired.sum(0) > 0
    share = density(activity, point).value[alive]
    # Not torch.quantile, which is limited to 16 M values and fails on none.
    ranked = share.sort().values
    quartiles = (
        [float(ranked[int(q * (len(ranked) - 1))]) for q in (0.25, 0.5, 0.75)]
        if len(ranked)
        else []
    )
    tokens = torch.tensor(activity.tokens, device=fired.device).clamp_min(1)
    rates = fired / tokens[:, None]
    elsewhere = (fired.sum(0) - fired[1]) / max(1, sum(activity.tokens) - activity.tokens[1])
    return {
        "layer": point.layer,
        "latents": tally.d_sae,
        "alive": int(alive.sum()),
        "l0": float(fired.sum()) / sum(activity.tokens),
        "density_quartiles": quartiles,
        "dense": int((share > 0.1).sum()),
        "thinking": int((rates[1] > 2 * elsewhere).sum()),
        "prompt_only": int(((fired[0] > 0) & (fired[1:].sum(0) == 0)).sum()),
    }


def _write_layer(
    folder: Path,
    model: Model,
    saes: SaeRun,
    point: Hookpoint,
    activity: Activity,
    documents: Documents,
) -> None:
    """Write one layer's tables, a row group of features in memory at a time."""
    alive = (activity.tallies[point].fired.sum(0) > 0).nonzero()[:, 0].tolist()
    directions = saes.coders(model, [point.layer])[point].W_dec
    assert directions is not None
    vocabulary = int(model.model.config.get_text_config().vocab_size)
    products = len(alive) * model.d_model * max(vocabulary, directions.shape[0])
    # On a GPU the products cost seconds; on a CPU the features of a wide SAE would take an hour.
    affordable = model.device.startswith("cuda") or products <= LENS_PRODUCTS
    share = density(activity, point)
    with layer_writer(folder) as write:
        for some in (alive[i : i + GROUP] for i in range(0, len(alive), GROUP)):
            lens = near = None
            if affordable:
                lens = logit_lens(model, directions[some], min(10, vocabulary))
                near = nearest_directions(directions, some)
            write(
                feature_rows(activity, point, share, some, lens, near, model.tokenizer),
                example_rows(activity, point, some, documents),
            )
    pa.default_memory_pool().release_unused()


def parse_feature(text: str, n_layers: int) -> tuple[int, int]:
    """Read LAYER:FEATURE; the layer is 0-based, or 1-based as in 13th:62.

    Raises:
        BadInputError: it has no such form, or the layer is outside the model.
    """
    layer, colon, feature = text.partition(":")
    if not colon or not feature.strip().isdigit():
        raise BadInputError(f"feature {text!r} is none; write LAYER:FEATURE, for example 5:62")
    return parse_layer(layer, n_layers), int(feature)


def feature_page(
    model: Model, saes: SaeRun, run: ActivityRun, layer: int, feature: int
) -> dict[str, Any]:
    """Return everything that is known of one feature; what the tables lack is computed.

    Raises:
        BadInputError: no SAE at the layer, a feature beyond its latents, or one that never fired.
    """
    coder = saes.coders(model, [layer])[Hookpoint(layer, saes.points[0].site)]
    if feature >= (size := int(coder.num_latents or 0)):
        raise BadInputError(
            f"feature {feature} at {describe_layer(layer, model.n_layers)} is out of range: its "
            f"SAE has latents 0 to {size - 1}"
        )
    row, examples = read_feature(run.folder, layer, feature)
    assert coder.W_dec is not None
    if row["top_tokens"] is None:
        vocabulary = int(model.model.config.get_text_config().vocab_size)
        lens = logit_lens(model, coder.W_dec[[feature]], min(10, vocabulary))
        for side, ids, logits in (
            ("top", lens.top, lens.top_logits),
            ("bottom", lens.bottom, lens.bottom_logits),
        ):
            row[f"{side}_tokens"] = [model.tokenizer.decode([t]) for t in ids[0].tolist()]
            row[f"{side}_logits"] = logits[0].tolist()
        near, cosines = nearest_directions(coder.W_dec, [feature])
        row["nearest"], row["nearest_cosines"] = near[0].tolist(), cosines[0].tolist()
    half = 1.96 * row["density_se"]
    interval = [max(0.0, row["density"] - half), min(1.0, row["density"] + half)]
    edges = histogram_edges(run.folder)
    return {**row, "density_ci": interval, "histogram_edges": edges, "examples": examples}
