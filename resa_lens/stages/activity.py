"""Feature activity over a corpus or over the model's own generations, kept as tables."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.feature_tables import (
    DOCUMENTS,
    EXAMPLES,
    FEATURES,
    GROUP,
    LENS_HISTOGRAM,
    density_interval,
    histogram_edges,
    read_feature,
)
from resa_lens.artifacts.kinds.activity import Activity as ActivityKind
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.errors import BadInputError
from resa_lens.evals.config import GenerationConfig, TextEngine
from resa_lens.evals.engines.choice import engine_part, generated_by
from resa_lens.evals.run import EvalConfig, answerable, ask
from resa_lens.evals.tasks import load_questions
from resa_lens.features.activity import (
    Activity,
    ActivityConfig,
    density,
    measure_activity,
    needed_bytes,
)
from resa_lens.features.lens import logit_lens, nearest_directions
from resa_lens.files import read_json, write_errors, write_json
from resa_lens.machine.plans import Trial, duration, timed
from resa_lens.models.hookpoints import Hookpoint, describe_layer
from resa_lens.models.host import Model
from resa_lens.saes.checkpoint import Checkpoints, newest
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.plan import MB, RESERVE, Meter
from resa_lens.stages.activity_tables import (
    Documents,
    example_rows,
    feature_rows,
    join_tables,
    layer_writer,
)
from resa_lens.stages.generations import documents_of_answers
from resa_lens.stages.saes import SaeRun, phased_corpus
from resa_lens.stages.scores import check_new_tokens, questions_hash, unanswerable_text
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.texts.phases import (
    PHASES,
    PhasedBatch,
    PhasedBatches,
    phase_counts,
    phased_texts,
    stored_batches,
)

TOKENS = 100_000
"""Of the documents, by default."""
LENS_PRODUCTS = 2e11
"""Multiplications of one layer's lens and neighbours up to which every feature gets them."""
ROOM_MB = 128
"""What the tables' row groups take in Python and Arrow, and what allocators keep of the
temporaries of a pass: 100 to 140 MB where it was measured."""
FIGURES, TOKENISED = "figures.json", "documents"


@dataclass(frozen=True)
class ActivityRun:
    """The figures of every layer, and the artifact that holds the tables."""

    artifact: Artifact
    layers: list[dict[str, Any]]
    tokens: dict[str, int]
    """By phase."""
    documents: int
    resumed_at: int
    """Batches that a killed run had done, over its passes; 0 where none was killed."""


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
    engine: TextEngine = "hf",
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
        engine: what generates them.
        memory_limit_mb: what the process may take; layers that do not fit together are measured
            one group after the other.

    Raises:
        BadInputError: no document, an engine without generations or that is not installed, an SAE
            that does not fit, or a memory too small for one layer.
        TakenError: another process is at this measurement.
    """
    if engine != "hf" and not generations:
        raise BadInputError(f"engine {engine} generates, and nothing is: ask for generations")
    corpus = phased_corpus(corpus, model)
    points = [p for p in saes.points if layers is None or p.layer in layers]
    measured = [point.layer for point in points]
    records, items = [], []
    if generations:
        check_new_tokens(model, max_new_tokens)
        items = load_questions(
            corpus.source, limit=generations, seed=corpus.seed,
            question_column=corpus.question_column, answer_column=corpus.answer_column,
            first=corpus.rows,
        )  # fmt: skip
        prompts, left_out = answerable(ask(items, EvalConfig()), model.tokenizer, model.context)
        if left_out:
            ctx.note_once([unanswerable_text(left_out, len(items), model)])
            items = [one.item for one in prompts]
    else:
        records = corpora.read_records(corpus)
        ctx.note_once(corpora.doubtful(records, corpus.source))
    stage = ctx.stage(
        ActivityKind,
        model,
        name=saes.site,
        config={
            "activity": config,
            "layers": measured,
            "corpus": corpus,
            "tokens": None if generations else tokens,
            "generations": [generations, max_new_tokens] if generations else None,
            **engine_part(engine),
        },
        data={"questions": questions_hash(items)}
        if generations
        else {"data": corpora.hash_records(records)},
        parents={"saes": saes.parent(measured)},
    )

    def work(draft: Draft) -> None:
        if generations:
            answers = GenerationConfig(max_new_tokens=max_new_tokens)
            texts = documents_of_answers(ctx, model, items, answers, engine, draft.work)
            written = {"generated_by": generated_by(model, answers, engine)}
            longest = model.context
            # All of them: no document has more tokens than bytes, but for its end.
            most = sum(len(text.encode()) + 1 for text in texts)
        else:
            texts, longest, most = phased_texts(records, corpus), corpus.sequence, tokens
            written = {}
        with write_errors(draft.work):
            batches = stored_batches(
                draft.work / TOKENISED, model.tokenizer, texts, tokens=most, longest=longest
            )
        documents = Documents(batches, model.tokenizer)
        job = _Job(ctx, model, saes, batches, config, documents, draft)
        rows, resumed, planned = job.measure(points, memory_limit_mb)
        counts = phase_counts(batches)
        draft.results = {
            "layers": rows,
            "tokens": dict(zip(PHASES, counts, strict=True)),
            "documents": len(documents),
            "site": saes.site,
            "model": model.name,
            "n_layers": model.n_layers,
            "planned_memory_mb": planned,
            "resumed_at": resumed,
            **written,
        }
        draft.settings = {"saes": saes.relative}
        draft.write(lambda target: documents.write(target / DOCUMENTS))
        places = [job.place(point) for point in points]
        draft.write(lambda target: join_tables(places, target))

    artifact = stage.obtain(work, doing="measuring activity")
    shown = ("layers", "tokens", "documents", "resumed_at")
    return ActivityRun(artifact, *(artifact.manifest.results[key] for key in shown))


@dataclass(frozen=True)
class ActivityTrial:
    """What one layer takes."""

    time: Trial
    """Of one token."""
    top_mb: float
    """The process's peak with one layer."""
    layer_mb: float
    """Each layer's encoder and figures."""
    latents: int
    available_mb: float

    def groups(self, layers: int, limit_mb: float | None) -> tuple[float, float, int]:
        """Divide layers into groups of nearly equal size that fit the memory.

        Args:
            layers: how many.
            limit_mb: what the process may take; by default what is free.

        Returns:
            MB at the peak, MB available, and the number of groups.

        Raises:
            BadInputError: the memory is too small for one layer.
        """
        limit = self.available_mb if limit_mb is None else limit_mb
        fitting = int((limit - self.top_mb) // self.layer_mb) + 1
        if fitting < 1:
            raise BadInputError(
                f"one layer of {self.latents} latents needs {self.top_mb:.0f} MB at the peak, "
                f"{limit:.0f} MB are available; keep fewer --examples, or give a larger "
                "--memory-limit"
            )
        passes = -(-layers // fitting)
        most = -(-layers // passes)
        return self.top_mb + (most - 1) * self.layer_mb, self.available_mb, passes


def try_activity(
    model: Model,
    coders: Mapping[Hookpoint, SparseCoder],
    batch: PhasedBatch,
    config: ActivityConfig,
) -> ActivityTrial:
    """Measure one layer on a batch.

    Args:
        model: the host.
        coders: of one layer.
        batch: the largest of all that will be read.
        config: what is kept of each feature.
    """
    meter, (coder,) = Meter(model.device), coders.values()

    def measure() -> Trial:
        with timed(model.device) as trial:
            measure_activity(model, coders, [batch], config)
        return trial[0]

    measure()  # allocates and warms up
    base = meter.now()
    with meter.peak() as reached:
        one = min(measure(), measure(), key=lambda trial: trial.seconds)
    width, size = model.d_model, int(coder.num_latents or 0)
    tokens = batch.ids.numel()
    each = (needed_bytes(width, size, config) + 4 * tokens * width) / MB
    available = meter.now() + meter.available() * (1 - RESERVE)
    top = max(reached[0], base) + each + ROOM_MB
    return ActivityTrial(one * (1 / tokens), top, each, size, available)


@dataclass(frozen=True)
class _Job:
    """SAEs that are measured on documents, and where what is finished is kept."""

    ctx: Context
    model: Model
    saes: SaeRun
    batches: PhasedBatches
    config: ActivityConfig
    documents: Documents
    draft: Draft

    @property
    def work(self) -> Path:
        """Where the run keeps what it has finished."""
        return self.draft.work

    def place(self, point: Hookpoint) -> Path:
        """Return the folder of one layer; it is finished where it has its figures."""
        return self.work / f"layer-{point.layer}"

    def measure(
        self, points: Sequence[Hookpoint], limit_mb: float | None
    ) -> tuple[list[dict[str, Any]], int, float]:
        """Measure group by group; a finished layer lies in its folder and is out of memory.

        Returns:
            The figures by layer, the batches that a killed run had done, and the planned MB.
        """
        rows = [read_json(f) for p in points if (f := self.place(p) / FIGURES).exists()]
        resumed = len(self.batches) if rows else 0
        finished = {row["layer"] for row in rows}
        left = [point for point in points if point.layer not in finished]
        groups, planned = self.plan(left, limit_mb) if left else ([], 0.0)
        # A layer's tallies do not depend on the others of its group: fewer go on from its
        # checkpoint where memory is less now.
        for group in groups:
            place = self.group(group)
            if (begun := self.begun(group)) and begun.parent != place:
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(begun, place / begun.name)
        label = f"activity of {len(left)} layers"
        with self.ctx.bar(label, len(groups) * len(self.batches)) as advance:
            for group in groups:
                place = self.group(group)
                checkpoint = newest(place)
                resumed += int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
                activity = measure_activity(
                    self.model,
                    self.saes.coders(self.model, [p.layer for p in group], decoder=False),
                    self.batches,
                    self.config,
                    store=Checkpoints(place, self.model.device),
                    advance=advance,
                )
                for point in group:
                    rows.append(_row(activity, point))
                    target = self.place(point)
                    with write_errors(target):
                        target.mkdir(exist_ok=True)
                        self.write_tables(target, point, activity)
                        # Last: with it the layer is finished.
                        write_json(target / FIGURES, rows[-1])
        return sorted(rows, key=lambda row: row["layer"]), resumed, planned

    def group(self, points: Sequence[Hookpoint]) -> Path:
        """Return the folder of the checkpoints of layers that are measured together."""
        return self.work / f"group-{'-'.join(str(point.layer) for point in points)}"

    def begun(self, points: Sequence[Hookpoint]) -> Path | None:
        """Return the furthest checkpoint that holds all these layers, or None."""
        names = [f"{point.sparsify}.safetensors" for point in points]
        kept = [c for place in self.work.glob("group-*") if (c := newest(place))]
        kept = [c for c in kept if all((c / name).exists() for name in names)]
        return max(kept, key=lambda c: int(c.name.rsplit("-", 1)[1]), default=None)

    def plan(
        self, points: Sequence[Hookpoint], limit_mb: float | None
    ) -> tuple[list[list[Hookpoint]], float]:
        """Divide the layers by a probe of the largest batch, and say what the run needs.

        Returns:
            The groups, and MB at the peak.

        Raises:
            BadInputError: the memory is too small for one layer.
        """
        coders = self.saes.coders(self.model, [points[0].layer], decoder=False)
        trial = try_activity(self.model, coders, self.batches[self.batches.largest], self.config)
        peak, available, passes = trial.groups(len(points), limit_mb)
        count = -(-len(points) // passes)
        # Layers that a killed run measured together stay together where they fit.
        blocks, rest = [], list(points)
        for place in sorted(p for p in self.work.glob("group-*") if newest(p)):
            blocks.append([p for p in rest if str(p.layer) in place.name.split("-")])
            rest = [p for p in rest if p not in blocks[-1]]
        groups = [
            block[i : i + count] for block in (*blocks, rest) for i in range(0, len(block), count)
        ]
        passes = len(groups)
        tokens = self.batches.tokens
        seconds = trial.time.seconds * len(points) * tokens
        # Two checkpoints of a group while it runs, and the tables, which hold less than tallies.
        self.draft.expect(0, (2 * count + len(points)) * trial.layer_mb)
        note = f" in {passes} passes over the documents" if passes > 1 else ""
        self.ctx.reporter.note(
            f"expected: at most {duration(seconds)}{note}, {peak:.0f} MB of memory at "
            f"the peak ({available:.0f} MB available); {tokens} tokens"
        )
        return groups, round(peak, 1)

    def write_tables(self, folder: Path, point: Hookpoint, activity: Activity) -> None:
        """Write one layer's tables, a row group of features in memory at a time."""
        model = self.model
        alive = (activity.tallies[point].fired.sum(0) > 0).nonzero()[:, 0].tolist()
        directions = self.saes.coders(model, [point.layer])[point].W_dec
        assert directions is not None
        vocabulary = int(model.model.config.get_text_config().vocab_size)
        products = len(alive) * model.d_model * max(vocabulary, directions.shape[0])
        # On a GPU the products cost seconds; on a CPU the features of a wide SAE would take an
        # hour.
        affordable = model.device.startswith("cuda") or products <= LENS_PRODUCTS
        share = density(activity, point)
        with layer_writer(folder) as write:
            for some in (alive[i : i + GROUP] for i in range(0, len(alive), GROUP)):
                lens = near = None
                if affordable:
                    lens = logit_lens(model, directions[some], min(10, vocabulary))
                    near = nearest_directions(directions, some)
                write(
                    feature_rows(
                        activity, point, share, some, lens, near, model.tokenizer, self.documents
                    ),
                    example_rows(activity, point, some, self.documents),
                )
        pa.default_memory_pool().release_unused()


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


def feature_page(
    model: Model, saes: SaeRun, run: ActivityRun, layer: int, feature: int
) -> dict[str, Any]:
    """Return everything that is known of one feature; what the tables lack is computed.

    Raises:
        BadInputError: no SAE at the layer, a feature beyond its latents, or one that never fired.
    """
    coder = saes.coders(model, [layer])[Hookpoint(layer, saes.site)]
    if feature >= (size := int(coder.num_latents or 0)):
        raise BadInputError(
            f"feature {feature} at {describe_layer(layer, model.n_layers)} is out of range: its "
            f"SAE has latents 0 to {size - 1}"
        )
    for name in (FEATURES, EXAMPLES):
        run.artifact.file(name)
    row, examples = read_feature(run.artifact.path, layer, feature)
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
        row[LENS_HISTOGRAM] = lens.histogram[0].tolist()
        near, cosines = nearest_directions(coder.W_dec, [feature])
        row["nearest"], row["nearest_cosines"] = near[0].tolist(), cosines[0].tolist()
    interval, edges = list(density_interval(row)), histogram_edges(run.artifact.path)
    return {**row, "density_ci": interval, "histogram_edges": edges, "examples": examples}
