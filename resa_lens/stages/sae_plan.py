"""What training SAEs will take: own thoughts, training, checkpoints and the quality report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resa_lens.artifacts.stage import Context
from resa_lens.errors import BadInputError
from resa_lens.machine.hardware import MB
from resa_lens.machine.limits import free_disk_mb
from resa_lens.machine.plans import (
    DAY,
    Part,
    Plan,
    Trial,
    duration,
    part_of,
    timed,
    write_seconds,
)  # fmt: skip
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.checkpoint import COST, planned_writes
from resa_lens.saes.coder import SparseCoder, new_coder
from resa_lens.saes.plan import RESERVE, Meter, TrainingPlan, plan_training
from resa_lens.saes.quality import measure_quality
from resa_lens.saes.train import SaeConfig, keep_pretrained
from resa_lens.saes.world import ALONE, World
from resa_lens.stages.own_thoughts import chosen, try_thoughts
from resa_lens.stages.sae_job import SaeJob, sae_job
from resa_lens.stages.sae_quality import report_batches
from resa_lens.stages.saes import packed
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.texts.phases import PhasedBatch


def plan_run(
    ctx: Context,
    model: Model,
    layers: Sequence[int],
    config: SaeConfig,
    corpus: CorpusConfig,
    *,
    source: str | None = None,
    memory_limit_mb: float | None = None,
    world: World = ALONE,
    report: bool = False,
    seeds: int = 1,
) -> Plan:
    """Return what the run will need, from a short trial of its parts; trains nothing.

    Args:
        ctx: the workspace, in which nothing is made.
        model: as of `train_run`, like those that follow.
        layers: 0-based.
        config: defaults are filled in here.
        corpus: the trigger data.
        source: the SAEs to begin with.
        memory_limit_mb: what the process may take.
        world: the processes that would train together.
        report: whether a quality report follows.
        seeds: runs, one after the other.
    """
    job = sae_job(ctx, model, layers, config, corpus, source)
    own = 0, Trial()
    if job.corpus.own_thoughts:
        count = len(chosen(job.training, job.corpus))
        own = count, try_thoughts(model, job.training, job.corpus)
    with packed(model, job.corpus):
        if job.config.mode == "pretrained":
            return _plan_pretrained(ctx, job, memory_limit_mb, report)
        return plan_job(
            ctx, job, memory_limit_mb, world, report=report, own_thoughts=own, seeds=seeds
        )[1]


def plan_job(
    ctx: Context,
    job: SaeJob,
    memory_limit_mb: float | None,
    world: World,
    *,
    report: bool,
    **more: Any,
) -> tuple[TrainingPlan, Plan]:
    """Return the needs of a training, and with all that belongs to it.

    Args:
        ctx: the workspace, where the disk is tried.
        job: what is trained.
        memory_limit_mb: what the process may take.
        world: the processes that train together.
        report: whether a quality report follows.
        more: as of `plan_of_training`.
    """
    training = plan_training(
        job.model, job.layers, job.config, next(job.batches()), job.steps,
        memory_limit_mb=memory_limit_mb, processes=world.size,
    )  # fmt: skip
    trial = _try_report(job, _blank(job)) if report and world.rank == 0 else None
    return training, plan_of_training(
        ctx, job.model, training, layers=job.layers, tokens=job.tokens, report=trial, **more
    )


def _blank(job: SaeJob) -> SparseCoder:
    """Return an untrained SAE of the job's size."""
    config = job.config
    assert config.latents is not None
    return new_coder(
        job.model.d_model, config.latents, config.k, seed=0, device=job.model.device,
        activation=config.activation,
    )  # fmt: skip


def _try_report(job: SaeJob, coder: SparseCoder) -> ReportTrial:
    point = Hookpoint(job.layers[len(job.layers) // 2], job.config.site)
    return try_report(
        job.model, point, coder, report_batches(job.model, job.held_out_records, job.corpus)
    )


def pretrained_mb(job: SaeJob, memory_limit_mb: float | None) -> float:
    """Return the MB of one of the SAEs that are taken as they are.

    Raises:
        BadInputError: the process may not take as much as reading and copying one needs.
    """
    assert job.initial is not None
    coder = next(iter(job.initial.values()))
    each = sum(tensor.nbytes for tensor in coder.state_dict().values()) / MB
    peak = Meter(job.model.device).now() + 2 * each
    if memory_limit_mb is not None and peak > memory_limit_mb:
        raise BadInputError(
            f"one SAE of {each:.0f} MB needs {peak:.0f} MB at the peak, {memory_limit_mb:.0f} MB "
            "are available; use a larger --memory-limit"
        )
    return each


def _plan_pretrained(
    ctx: Context, job: SaeJob, memory_limit_mb: float | None, report: bool
) -> Plan:
    """Return what taking SAEs as they are needs, from the first of them."""
    assert job.initial is not None
    each = pretrained_mb(job, memory_limit_mb)
    model, meter = job.model, Meter(job.model.device)
    available = memory_limit_mb or meter.now() + meter.available() * (1 - RESERVE)
    point = Hookpoint(job.layers[0], job.config.site)
    with meter.peak() as peak, timed(model.device) as trial:
        coder = job.initial[point]
        keep_pretrained(model, [point], {point: coder}, job.held_out())
    count, disk = len(job.layers), ctx.workspace.root
    time = (trial[0] + Trial(write_seconds(disk, each))) * count
    size = {"disk_mb": round(count * each, 1)}
    parts = [part_of("measuring and copying", count, "SAEs", time, peak[0], **size)]
    if report:
        one = _try_report(job, coder)
        parts.append(part_of("quality report", count, "SAEs", one.time * count, one.peak_memory_mb))
    return Plan(
        stage="train-saes", model=model.name, device=model.device, parts=tuple(parts),
        available_mb=round(available, 1),
        free_disk_mb=round(free_disk_mb(disk), 1), details={"layers": list(job.layers)},
        levers=(f"fewer --layers: each takes {duration(time.seconds / count)}",),
    )  # fmt: skip


@dataclass(frozen=True)
class ReportTrial:
    """What one layer's quality report takes."""

    time: Trial
    peak_memory_mb: float


def try_report(
    model: Model, point: Hookpoint, coder: SparseCoder, batches: Sequence[PhasedBatch]
) -> ReportTrial:
    """Measure one SAE on the report's largest batch, whose logits are most of its memory.

    Args:
        model: the host.
        point: where the SAE stands.
        coder: of the size of those that will be measured; its weights do not matter.
        batches: all that the report reads.
    """
    by_size = sorted(batches, key=lambda batch: batch.ids.numel())
    first, last = by_size[0], by_size[-1]

    def measure(batch: PhasedBatch) -> Trial:
        with timed(model.device) as trial:
            measure_quality(model, {point: coder}, [batch])
        return trial[0]

    with Meter(model.device).peak() as peak:
        measure(last)  # allocates and warms up
        long, short = measure(last), measure(first)
    # A batch takes what a short one takes, and more with its tokens.
    few, many = first.ids.numel(), last.ids.numel()
    beyond = sum(batch.ids.numel() - few for batch in batches) / max(1, many - few)
    rise = Trial(
        max(0.0, long.seconds - short.seconds), max(0.0, long.cpu_seconds - short.cpu_seconds)
    )
    return ReportTrial(short * len(batches) + rise * beyond, peak[0])


def plan_of_training(
    ctx: Context,
    model: Model,
    training: TrainingPlan,
    *,
    tokens: int,
    layers: Sequence[int],
    own_thoughts: tuple[int, Trial] = (0, Trial()),
    report: ReportTrial | None = None,
    seeds: int = 1,
) -> Plan:
    """Return the plan of a run, from what was tried.

    Args:
        ctx: the workspace, where the disk is tried.
        model: the source model.
        training: of one seed.
        tokens: of one pass.
        layers: 0-based.
        own_thoughts: how many the model writes, and what they take.
        report: what the quality report of one layer takes; None where there is none.
        seeds: runs, one after the other; the report is of the first.
    """
    place, passes = ctx.workspace.root, len(training.groups)
    one = write_seconds(place, training.checkpoint_mb)
    writes = passes * planned_writes(training.time.seconds / passes, one, training.steps)
    # The processor waits for the disk.
    written = Trial(writes * one, 0.0)
    peak = training.peak_memory_mb
    parts: list[Part] = []
    count, time = own_thoughts
    if count:
        parts.append(part_of("own thoughts", seeds * count, "answers", time * seeds, peak))
    parts += [
        part_of(
            f"training {len(layers)} SAEs", seeds * passes * tokens, "tokens",
            training.time * seeds, peak, disk_mb=round(seeds * training.disk_mb, 1),
        ),
        part_of("checkpoints", seeds * writes, "writes", written * seeds, peak),
    ]  # fmt: skip
    if report is not None:
        parts.append(
            part_of(
                "quality report", len(layers), "SAEs", report.time * len(layers),
                report.peak_memory_mb,
            )
        )  # fmt: skip
    return Plan(
        stage="train-saes", model=model.name, device=model.device, parts=tuple(parts),
        available_mb=training.available_mb, free_disk_mb=round(free_disk_mb(place), 1),
        work_disk_mb=training.work_disk_mb, passes=passes,
        levers=_levers(model, training, tokens, len(layers), seeds),
        details={
            "groups": training.groups, "steps": training.steps,
            "forward_seconds": training.forward.seconds,
            "step_seconds": training.step.seconds, "own_thoughts_seconds": round(time.seconds, 2),
            "checkpoint_mb": training.checkpoint_mb, "checkpoint_seconds": round(one, 3),
            "checkpoint_share": COST, "layers": list(layers),
        },
    )  # fmt: skip


def _levers(
    model: Model, training: TrainingPlan, tokens: int, layers: int, seeds: int
) -> tuple[str, ...]:
    """Say what each option would save, from the trial's own figures."""
    whole, passes = seeds * training.time.seconds, len(training.groups)
    day = int(tokens * DAY / max(whole, 1e-9))
    each = seeds * training.steps * training.step.seconds
    again = seeds * training.steps * training.forward.seconds
    levers = [
        f"fewer --tokens: {day:,} take a day",
        f"fewer --layers: each of the {layers} takes {duration(each)}",
        f"fewer --latents: half as many take up to {duration(each * layers / 2)} less",
    ]
    if passes > 1:
        levers.append(
            f"more memory: each of the {passes} passes runs the model for {duration(again)}, "
            f"and one would do"
        )
    if seeds > 1:
        levers.append(f"fewer --seeds: each takes {duration(whole / seeds)}")
    levers.append(
        f"processes: two under torchrun take {duration(whole / 2)} and what they exchange"
    )
    if not model.device.startswith("cuda"):
        levers.append("a GPU: this is a CPU's time; try --plan there")
    return tuple(levers)
