"""Short trials of long work, on the model that will do it: answers, updates of a tuning, looks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from resa_lens.artifacts.stage import Context
from resa_lens.evals.engines import HFEngine
from resa_lens.evals.engines.hf import longest_first
from resa_lens.evals.run import Asked, EvalConfig, score
from resa_lens.features.effects import causal_effects
from resa_lens.features.exclusive import count_features
from resa_lens.machine.plans import Trial, timed
from resa_lens.models.activation_change import activation_change
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes.baselines import Replacement, substitute
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.plan import Meter
from resa_lens.stages.attribution import CONTROLS, EFFECT_TOKENS, document_batches, held_out
from resa_lens.stages.layer_probes import documents
from resa_lens.stages.saes import fit_corpus, phased_corpus
from resa_lens.stages.tune_job import TuneJob
from resa_lens.texts import corpora
from resa_lens.texts.corpora import Record
from resa_lens.tuning.collapse import LOOKS
from resa_lens.tuning.gradient_probe import gradient_probe
from resa_lens.tuning.loop import fit
from resa_lens.tuning.sft import examples, sft_batches
from resa_lens.tuning.train import prepare_sft, save_adapter, tune

ANSWER_SECONDS = 20.0
"""Of a batch of answers that is tried: where it takes longer, the rest is reckoned."""
UPDATES = 3
"""Of a tuning that is tried; the first one allocates and is not counted."""


@dataclass(frozen=True)
class AnswersTrial:
    """What answering all questions takes."""

    time: Trial
    peak_memory_mb: float
    tokens: int
    """That all answers have together, by those that were tried."""
    at_most: bool
    """Whether the tried answers were cut off, so that the longest length was reckoned with."""


def try_answers(
    model: Model,
    questions: Sequence[Asked],
    config: EvalConfig,
    point: Hookpoint | None = None,
    inserted: SparseCoder | Replacement | None = None,
) -> AnswersTrial:
    """Answer and grade up to three batches of the questions, and reckon the others by them.

    The engine answers the longest prompts first, and a batch takes as long as its longest answer:
    tried are its first batch, which takes the most memory, its middle and its last, by Simpson's
    rule.  Where one is cut off, it stands for all.

    Args:
        model: the model that answers.
        questions: all prompts that fit the model's context.
        config: how they are asked.
        point: where something stands in the activations' place.
        inserted: what stands there.
    """
    generation = config.generation
    engine = HFEngine(model.model, model.tokenizer)
    rows = min(len(questions), generation.batch_size)
    total = len(questions) / rows
    encoded = model.tokenizer([one.prompt for one in questions])["input_ids"]
    order = [questions[i] for i in longest_first(encoded)]
    starts = (0, (len(order) - rows) // 2, len(order) - rows) if total > 1 else (0,)
    limit = min(ANSWER_SECONDS, generation.timeout or ANSWER_SECONDS)
    asking = replace(generation, timeout=limit)

    def put(acts: Tensor, hook: object = None) -> Tensor:
        assert inserted is not None
        return substitute(inserted, acts)

    batches: list[tuple[Trial, int]] = []
    cut = False
    with ExitStack() as hooks, Meter(model.device).peak() as peak:
        if point is not None:
            hooks.enter_context(model.bridge.hooks(fwd_hooks=[(point.transformer_lens, put)]))
        # Which tokens can end an answer is worked out once.
        engine.generate([order[0].prompt], replace(generation, max_new_tokens=1))
        for start in starts:
            some = order[start : start + rows]
            with timed(model.device) as trial:
                answers = engine.generate([one.prompt for one in some], asking)
                score(some, answers, extraction=config.extraction)
            lengths = [answer.tokens for answer in answers]
            batches.append((trial[0], sum(lengths)))
            if cut := any(answer.timed_out for answer in answers):
                longer = generation.max_new_tokens / max(1, *lengths)
                if generation.timeout is not None:
                    longer = min(longer, generation.timeout / limit)
                batches = [(trial[0] * longer, round(longer * sum(lengths)))]
                break
    shares = (1 / 6, 4 / 6, 1 / 6) if len(batches) == 3 else (1.0,)
    whole, tokens = Trial(), 0.0
    for share, (seconds, written) in zip(shares, batches, strict=True):
        whole += seconds * (share * total)
        tokens += written * (share * total)
    return AnswersTrial(whole, peak[0], round(tokens), cut)


@dataclass(frozen=True)
class TuningTrial:
    """What the updates of a tuning take, and its answers."""

    update: Trial
    looks: Trial
    """At the loss, over the whole run, where both sides of the objective may move."""
    peak_memory_mb: float
    answers: AnswersTrial


def try_tuning(
    ctx: Context,
    job: TuneJob,
    target: Model,
    records: Sequence[Record],
    questions: Sequence[Asked],
    through: tuple[Hookpoint, SparseCoder] | None,
) -> TuningTrial:
    """Take a few updates and answer a batch with their adapters; nothing is left of them.

    Args:
        ctx: the device and the dtype.
        job: what is tuned.
        target: loaded, and left as it is.
        records: that are tuned on.
        questions: the questions.
        through: where the SAE is inserted, and one of its size; None of a fine-tuning on texts.
    """
    corpus = fit_corpus(job.elicitation, target)
    marks: list[tuple[str, float, float]] = []

    def mark(what: str) -> None:
        marks.append((what, time.perf_counter(), time.process_time()))

    options: Any = {"device": ctx.device, "dtype": ctx.dtype, "weights_of": target}
    with Meter(target.device).peak() as peak:
        fresh = load_model(job.model, base=job.base, **options)
        updates = UPDATES * job.lora.accumulation * job.lora.batch
        size = {"tokens": updates * corpus.sequence, "batch": job.lora.batch}
        marking: Any = {
            "advance": lambda _: mark("begun"), "trackers": [lambda _: mark("updated")],
        }  # fmt: skip
        if through:
            point, coder = through
            batches = corpora.batches(fresh.tokenizer, records, corpus, **size)
            peft, _ = tune(
                fresh, coder, point, batches, UPDATES, job.objective, job.lora, **marking
            )
        else:
            # Own answers are drawn later; packed, they are as many tokens.
            items = examples(records, "cot" if job.control == "cot" else "cot-free")
            peft, loss_of = prepare_sft(fresh.model, job.objective.targets, job.lora)
            fit(
                peft, sft_batches(fresh.tokenizer, items, corpus, **size), UPDATES, loss_of,
                job.lora, device=fresh.device, **marking,
            )  # fmt: skip
    with TemporaryDirectory() as folder:
        save_adapter(peft, Path(folder), target.folder)
        del peft, fresh
        adapted = load_model(folder, base=job.base or job.model, **options)
        answers = try_answers(adapted, questions, job.evaluation)
    spans = [
        (second[0], Trial(second[1] - first[1], second[2] - first[2]))
        for first, second in pairwise(marks)
    ]
    steps = sorted((t for what, t in spans if what == "updated"), key=lambda t: t.seconds)
    looks = sorted((t for what, t in spans if what == "begun"), key=lambda t: t.seconds)
    # The slowest is the first.
    return TuningTrial(steps[(len(steps) - 1) // 2], looks[0] * LOOKS, peak[0], answers)


@dataclass(frozen=True)
class LooksTrial:
    """What the tables of a sweep take besides its tunings."""

    counts: Trial
    """Of all layers."""
    effects: Trial
    """Of one layer; none where no effects are measured."""
    probes: Trial
    """Of all layers; none where nothing is probed."""
    peak_memory_mb: float


def try_looks(
    source: Model,
    target: Model,
    point: Hookpoint,
    coder: SparseCoder,
    job: TuneJob,
    layers: Sequence[int],
    *,
    effects: bool,
    probes: bool,
) -> LooksTrial:
    """Count at one layer, and measure its effect and the probes on a few batches.

    Args:
        source: the SAEs' model.
        target: the model that is tuned.
        point: the layer that is tried.
        coder: an SAE of the size of its own.
        job: what the sweep's tunings share.
        layers: of the sweep, 0-based.
        effects: whether causal effects are measured.
        probes: whether gradients, and changes of activations, are.
    """
    device, times = source.device, dict.fromkeys(("counts", "effects", "probes"), Trial())
    with Meter(device).peak() as peak:
        with timed(device) as trial:
            count_features(source, {point: coder})
        times["counts"] = trial[0] * len(layers)
        if effects:
            corpus = phased_corpus(job.trigger, source)
            batches = document_batches(source, held_out(corpus), corpus, EFFECT_TOKENS)
            some = batches[: max(1, len(batches) // 8)]
            with timed(device) as trial:
                causal_effects(source, {point: coder}, {point.layer: (0,)}, some, controls=CONTROLS)
            times["effects"] = trial[0] * (len(batches) / len(some))
        if probes:
            texts = documents(target, job.elicitation)
            # Two: of one there is no standard error.
            some = texts[:2]
            with timed(device) as trial:
                gradient_probe(target, some)
                if source is not target:
                    points = [Hookpoint(layer, point.site) for layer in layers]
                    activation_change(source, target, some, points)
            times["probes"] = trial[0] * (len(texts) / len(some))
    return LooksTrial(**times, peak_memory_mb=peak[0])
