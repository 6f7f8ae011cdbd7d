"""What tunings, sweeps and evaluations will take: SAEs that are missing, updates, answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from resa_lens.artifacts.stage import Context
from resa_lens.evals.config import EngineName
from resa_lens.evals.run import Asked, EvalConfig, answerable, ask
from resa_lens.evals.tasks import EvalItem
from resa_lens.files import named_path
from resa_lens.machine.limits import free_disk_mb
from resa_lens.machine.meters import peak_memory_mb
from resa_lens.machine.plans import DAY, Part, Plan, duration, part_of
from resa_lens.models.hookpoints import Hookpoint, parse_layer, trainable_layers
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseCoder, new_coder
from resa_lens.saes.plan import RESERVE, Meter
from resa_lens.saes.train import SaeConfig
from resa_lens.stages import insertion
from resa_lens.stages.adapters import (
    adapter_mb,
    default_steps,
    elicitation_records,
    questions_of,
)  # fmt: skip
from resa_lens.stages.control_plans import own_answers_part, random_weights_trainings
from resa_lens.stages.controls import MATCHED
from resa_lens.stages.further_plans import Trainings
from resa_lens.stages.recommendation import newest_recommendation
from resa_lens.stages.sae_plan import plan_run, try_report
from resa_lens.stages.sae_quality import report_batches
from resa_lens.stages.saes import SaeRun, find_saes, fit_corpus, open_saes, split_records
from resa_lens.stages.scores import answers_mb
from resa_lens.stages.sweep_jobs import SweepConfig, jobs_of, sweep_questions
from resa_lens.stages.trials import (
    AnswersTrial,
    TuningTrial,
    try_answers,
    try_looks,
    try_tuning,
)
from resa_lens.stages.tune_job import TuneJob, with_sequence
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.tuning.sft import KINDS

HALF = "half as many take"


def plan_of(
    ctx: Context,
    stage: str,
    model: Model,
    parts: Sequence[Part],
    levers: Sequence[str] = (),
    *,
    work_disk_mb: float = 0.0,
    notes: Sequence[str] = (),
) -> Plan:
    """Return the plan of a stage on this machine.

    Args:
        ctx: the workspace, in which nothing is made.
        stage: the command.
        model: the model that was tried.
        parts: one after the other.
        levers: what would make it shorter.
        work_disk_mb: kept while it runs.
        notes: what the figures leave out or assume.
    """
    meter = Meter(model.device)
    if not meter.cuda and parts:
        # What loading took before all parts is of the process, too.
        first = max(parts[0].peak_memory_mb, peak_memory_mb())
        parts = [replace(parts[0], peak_memory_mb=round(first, 1)), *parts[1:]]
    if not meter.cuda:
        levers = (*levers, "a GPU: this is a CPU's time; try --plan there")
    return Plan(
        stage=stage, model=model.name, device=model.device, parts=tuple(parts),
        available_mb=round(meter.now() + meter.available() * (1 - RESERVE), 1),
        free_disk_mb=round(free_disk_mb(ctx.workspace.root), 1),
        work_disk_mb=round(work_disk_mb, 1), levers=tuple(levers), notes=tuple(notes),
    )  # fmt: skip


def answers_part(
    name: str, questions: Sequence[Asked], config: EvalConfig, trial: AnswersTrial, times: int = 1
) -> Part:
    """Return the part of answering all questions, so many times."""
    return part_of(
        name, times * len(questions), "answers", trial.time * times, trial.peak_memory_mb,
        disk_mb=round(times * answers_mb(questions, config), 1), at_most=trial.at_most,
    )  # fmt: skip


def documents_part(
    name: str,
    model: Model,
    point: Hookpoint,
    coder: SparseCoder,
    corpus: CorpusConfig,
    *,
    tokens: int,
    readings: int,
) -> Part:
    """Return the part of an insertion test that reads documents, so many times.

    Args:
        name: the part's.
        model: the model that reads.
        point: where the SAE stands.
        coder: of the size of those that will be inserted.
        corpus: the documents, of which those held out are read.
        tokens: of one reading.
        readings: two for each layer: with worked steps, and without.
    """
    held_out = split_records(corpora.read_records(corpus))[1]
    report = try_report(model, point, coder, report_batches(model, held_out, corpus, tokens))
    return part_of(name, readings, "readings", report.time * readings, report.peak_memory_mb)


def answer_levers(
    questions: Sequence[Asked],
    config: EvalConfig,
    trial: AnswersTrial,
    times: int = 1,
    option: str = "--limit",
) -> list[str]:
    """Say what fewer and shorter answers would save.

    Args:
        questions: all prompts.
        config: how they are asked.
        trial: what answering them once takes.
        times: so often are they answered.
        option: that says in the command how many they are.
    """
    day = int(len(questions) * DAY / max(trial.time.seconds, 1e-9))
    levers = [f"a smaller {option}: {day:,} answers take a day"]
    if trial.at_most:
        half = config.generation.max_new_tokens // 2
        shorter = duration(times * trial.time.seconds / 2)
        levers.append(f"--max-new-tokens {half:,}: at most {shorter}")
    return levers


def fitting_questions(
    model: Model, items: Sequence[EvalItem], config: EvalConfig
) -> tuple[list[Asked], EvalConfig]:
    """Return the prompts that fit a model's context, and the configuration that asks them all."""
    every = replace(config, limit=None, levels=None)
    return answerable(ask(items, every, model.tokenizer), model.tokenizer, model.context)[0], every


def plan_eval(
    ctx: Context,
    model: Model,
    items: Sequence[EvalItem],
    config: EvalConfig,
    engine: EngineName = "hf",
    replicates: int = 1,
) -> Plan:
    """Return what an evaluation will take, from one batch of its answers.

    Args:
        ctx: the workspace, in which nothing is made.
        model: the model, with its adapters.
        items: all that is asked.
        config: how it is asked.
        engine: what would generate; engine hf is tried.
        replicates: how often all is answered.
    """
    questions, every = fitting_questions(model, items, config)
    trial = try_answers(model, questions, every)
    levers = answer_levers(questions, every, trial, replicates)
    if config.samples > 1:
        each = duration(replicates * trial.time.seconds / config.samples)
        levers.append(f"fewer --samples: each takes {each}")
    if replicates > 1:
        levers.append(f"fewer --replicates: each takes {duration(trial.time.seconds)}")
    parts = [answers_part("answers", questions, every, trial, replicates)]
    return plan_of(ctx, "eval", model, parts, levers, notes=engine_notes(engine))


@dataclass(frozen=True)
class MissingSaes:
    """SAEs of a stage that is planned: what training those that are missing takes."""

    run: SaeRun | None
    """Those that are there."""
    coder: SparseCoder
    """One of them, or an untrained one of their size."""
    parts: tuple[Part, ...]
    work_disk_mb: float = 0.0


def missing_saes(
    ctx: Context,
    model: Model,
    layers: Sequence[int],
    config: SaeConfig,
    corpus: CorpusConfig,
    folder: str | None,
    *,
    allow_mismatch: bool = False,
    layer: int | None = None,
) -> MissingSaes:
    """Look for SAEs as a stage does that trains those that are missing, and train none.

    Args:
        ctx: the workspace, in which nothing is made.
        model: the SAEs' model.
        layers: 0-based.
        config: what they are.
        corpus: what they are trained on.
        folder: of SAEs, or a hub id, that the user has.
        allow_mismatch: warn where they do not fit.
        layer: where one is loaded; the first by default.
    """
    layer = layers[0] if layer is None else layer
    point = Hookpoint(layer, config.site)
    run = (
        open_saes(
            ctx, model, named_path(folder, "SAEs"), config.site, allow_mismatch=allow_mismatch,
            corpus=corpus, only=[layer],
        )
        if folder
        else find_saes(ctx, model, config, corpus, layers)
    )  # fmt: skip
    if run is not None:
        return MissingSaes(run, run.coders(model, [layer])[point], ())
    plan = plan_run(ctx, model, layers, config, corpus)
    full = config.for_width(model.d_model)
    assert full.latents is not None
    coder = new_coder(
        model.d_model, full.latents, full.k, seed=0, device=model.device,
        activation=full.activation,
    )  # fmt: skip
    return MissingSaes(None, coder.requires_grad_(False), plan.parts, plan.work_disk_mb)


@dataclass(frozen=True)
class _Trials:
    """What was tried of a tuning or a sweep."""

    target: Model
    layer: int
    """That was tried, 0-based."""
    questions: list[Asked]
    config: EvalConfig
    saes: MissingSaes | None
    """None of a fine-tuning on texts, which needs none."""
    steps: int
    sequence: int
    base: AnswersTrial
    inserted: AnswersTrial | None
    tuning: TuningTrial
    start: tuple[Part, ...]

    @property
    def sae_parts(self) -> tuple[Part, ...]:
        """What training SAEs takes, of those that are missing."""
        return self.saes.parts if self.saes else ()

    @property
    def work_disk_mb(self) -> float:
        """That training them keeps while it runs."""
        return self.saes.work_disk_mb if self.saes else 0.0


def _try(ctx: Context, job: TuneJob, layers: Sequence[int] | None, start_layers: int) -> _Trials:
    """Try all that a tuning is made of, through the middle one of the layers."""
    items, records = questions_of(ctx, job), elicitation_records(job)
    target = ctx.model(job.model, job.base)
    job.check_modules(target, layers or ())
    source = ctx.model(job.source_model) if job.source_model else target
    questions, every = fitting_questions(target, items, job.evaluation)
    site = job.objective.site
    layers = layers or trainable_layers(target.n_layers)
    point = Hookpoint(layers[len(layers) // 2], site)
    saes = None
    if job.control not in KINDS:
        saes = missing_saes(
            ctx, source, layers, replace(job.sae, site=site), job.trigger, job.saes,
            allow_mismatch=job.allow_mismatch, layer=point.layer,
        )  # fmt: skip
    base = try_answers(target, questions, every)
    inserted, start = None, ()
    if start_layers and saes:
        inserted = try_answers(target, questions, every, point, saes.coder)
        limit = min(insertion.SHORT, job.evaluation.limit or insertion.SHORT)
        share = min(1.0, limit / len(items))
        some = questions[: math.ceil(share * len(questions))]
        time = (base.time + inserted.time * (2 * start_layers)) * share
        start = (
            part_of(
                "insertion before the tuning", len(some) * (1 + 2 * start_layers), "answers", time,
                max(base.peak_memory_mb, inserted.peak_memory_mb),
                disk_mb=round((1 + 2 * start_layers) * answers_mb(some, every), 1),
                at_most=base.at_most or inserted.at_most,
            ),
            documents_part(
                "documents before the tuning", target, point, saes.coder, job.elicitation,
                tokens=insertion.SHORT_TOKENS, readings=2 * start_layers,
            ),
        )  # fmt: skip
    tuning = try_tuning(ctx, job, target, records, questions, (point, saes.coder) if saes else None)
    corpus = fit_corpus(job.elicitation, target)
    steps = job.steps or default_steps(target, records, corpus, job.lora)
    return _Trials(
        target,
        point.layer,
        questions,
        every,
        saes,
        steps,
        corpus.sequence,
        base,
        inserted,
        tuning,
        start,
    )


def _tuning_part(
    job: TuneJob, trials: _Trials, tuning: TuningTrial, times: int = 1, name: str = "tuning"
) -> Part:
    time = tuning.update * trials.steps + tuning.looks
    kept = trials.steps // job.lora.checkpoint_every if job.lora.checkpoint_every else 0
    return part_of(
        name, times * trials.steps, "updates", time * times, tuning.peak_memory_mb,
        disk_mb=round(times * (1 + kept) * adapter_mb(trials.target, job), 1),
    )  # fmt: skip


def _control_needs(
    ctx: Context,
    job: TuneJob,
    trials: _Trials,
    control: str | None,
    layers: Sequence[int],
    seeds: Sequence[int],
) -> Trainings:
    """Return what a control needs before its updates."""
    if control == "own-samples":
        return Trainings((own_answers_part(trials.target, elicitation_records(job), len(seeds)),))
    if control == "random-weights" and trials.saes:
        training = replace(job.sae, site=job.objective.site), job.trigger
        return random_weights_trainings(
            ctx, trials.target, layers, seeds, trials.saes.run, trials.saes.coder, training
        )
    return Trainings()


def _tuning_levers(job: TuneJob, trials: _Trials) -> list[str]:
    whole = trials.tuning.update.seconds * trials.steps
    tokens = job.lora.batch * job.lora.accumulation * trials.sequence
    return [
        f"fewer --steps: each takes {duration(trials.tuning.update.seconds)} of "
        f"{tokens:,} tokens; {HALF} {duration(whole / 2)}",
        f"a larger --sequence or --batch: {trials.steps:,} updates of {tokens:,} tokens are many "
        "small ones; as many tokens in fewer updates take less on a wide device",
    ]


def engine_notes(engine: EngineName) -> list[str]:
    """Say whose time a plan has, where another engine than hf will generate."""
    return [] if engine == "hf" else [f"tried with engine hf; {engine} has another time"]


def _notes(job: TuneJob, controls: Sequence[str]) -> list[str]:
    matched = [name for name in controls if name in MATCHED]
    return engine_notes(job.engine) + [f"matching control {name} is not in it" for name in matched]


def plan_tune(ctx: Context, job: TuneJob) -> Plan:
    """Return what a tuning with its scores will take, from a few updates and answers.

    Args:
        ctx: the workspace, in which nothing is made.
        job: what is tuned, and asked.

    Raises:
        BadInputError: as `stages.tuning.tune_run`.
    """
    job = with_sequence(job)
    target = ctx.model(job.model, job.base)
    notes, layers = _notes(job, [job.control] if job.control else []), None
    through = job.control not in KINDS
    if job.layer != "auto":
        layers = [parse_layer(job.layer, target.n_layers)]
    else:
        source = ctx.model(job.source_model) if job.source_model else target
        newest = newest_recommendation(ctx, source, job.objective.site)
        if newest:
            layers = [int(newest.manifest.results["recommended"][0])]
        elif through:
            notes.append("no recommendation is there: counting, which chooses the layer, is short")
    trials = _try(ctx, job, layers, 1 if job.start_check and through else 0)
    needs = _control_needs(ctx, job, trials, job.control, layers or [trials.layer], [ctx.seed])
    parts = [
        *trials.sae_parts, *trials.start, *needs.parts,
        _tuning_part(job, trials, trials.tuning),
        answers_part("answers of the base", trials.questions, trials.config, trials.base),
        answers_part(
            "answers of the tuned", trials.questions, trials.config, trials.tuning.answers
        ),
    ]  # fmt: skip
    levers = _tuning_levers(job, trials) + answer_levers(
        trials.questions, trials.config, trials.base
    )
    work = max(trials.work_disk_mb, needs.work_disk_mb, 2 * 3 * adapter_mb(target, job))
    return plan_of(ctx, "tune", target, parts, levers, work_disk_mb=work, notes=notes)


def plan_sweep(ctx: Context, config: SweepConfig) -> Plan:
    """Return what a sweep will take, one process at it, from the trial of one of its tunings.

    Args:
        ctx: the workspace, in which nothing is made.
        config: the tunings.

    Raises:
        BadInputError: as `stages.sweep.sweep_run`.
    """
    job = with_sequence(config.tune)
    sweep_questions(ctx, job)
    target = ctx.model(job.model, job.base)
    jobs = jobs_of(config, target.n_layers)
    layers = sorted({one.layer for one in jobs if one.layer is not None})
    trials = _try(ctx, job, layers, len(layers) if config.start_check else 0)
    n, answers = len(jobs), trials.tuning.answers
    tunings = [_tuning_part(job, trials, trials.tuning, sum(one.layer is not None for one in jobs))]
    work = max(trials.work_disk_mb, 2 * 3 * adapter_mb(target, job))
    seeds = sorted({one.seed for one in jobs})
    for control in config.controls:
        at = sorted({one.layer for one in jobs if one.control == control and one.layer is not None})
        needs = _control_needs(ctx, job, trials, control, at, seeds)
        tunings += needs.parts
        work = max(work, needs.work_disk_mb)
        if control in KINDS:
            texts = try_tuning(
                ctx, replace(job, control=control), target, elicitation_records(job),
                trials.questions, None,
            )  # fmt: skip
            tunings.append(_tuning_part(job, trials, texts, config.seeds, f"tuning, {control}"))
    parts = [
        *trials.sae_parts, *trials.start,
        answers_part("answers of the base", trials.questions, trials.config, trials.base),
        *tunings,
        answers_part("answers of the tuned", trials.questions, trials.config, answers, n),
        *_looks(ctx, config, trials, layers),
    ]  # fmt: skip
    each = trials.tuning.update.seconds * trials.steps + answers.time.seconds
    per_layer = n / max(1, len(layers))
    levers = [
        f"more workers: {n} tunings are shared by processes that run this command; four take "
        f"{duration(n * each / 4)}",
        f"fewer --seeds: each takes {duration(n * each / config.seeds)}",
        f"fewer --layers: each takes {duration(per_layer * each)}",
        *_tuning_levers(job, trials),
        f"a smaller --limit: half as many answers take {duration(n * answers.time.seconds / 2)}",
    ]
    notes = _notes(job, config.controls)
    return plan_of(ctx, "sweep", target, parts, levers, work_disk_mb=work, notes=notes)


def _looks(ctx: Context, config: SweepConfig, trials: _Trials, layers: Sequence[int]) -> list[Part]:
    """Return the parts that a sweep's tables take besides its tunings and answers."""
    if not layers or not trials.saes:
        return []
    job, target = config.tune, trials.target
    source = ctx.model(job.source_model) if job.source_model else target
    point = Hookpoint(layers[len(layers) // 2], job.objective.site)
    looks = try_looks(
        source, target, point, trials.saes.coder, job, layers, effects=config.effects,
        probes=config.probes,
    )  # fmt: skip
    named = (
        ("counts", looks.counts, True),
        ("causal effects", looks.effects * len(layers), config.effects),
        ("probes of the layers", looks.probes, config.probes),
    )
    return [
        part_of(name, len(layers), "layers", time, looks.peak_memory_mb)
        for name, time, included in named
        if included
    ]
