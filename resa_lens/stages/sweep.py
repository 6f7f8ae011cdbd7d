"""Many tunings, each scored: every layer and seed, and controls beside them.

A sweep is a list of named jobs.  Each job leaves an adapter and an evaluation of its own, so a
killed sweep goes on at the job where it was, and several processes that run the same command share
the jobs: a job belongs to the process that has claimed it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from resa_lens.artifacts.artifact import Artifact, Parent
from resa_lens.artifacts.kinds.sweep import SWEEP, Sweep, SweepTables
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.config import config_dict
from resa_lens.errors import BadInputError, RunFailedError, TakenError
from resa_lens.evals.compare import run_scores
from resa_lens.evals.run import ask
from resa_lens.evals.tasks import EvalItem
from resa_lens.features.config import RULES, CountConfig
from resa_lens.files import read_json, run_lock, write_errors, write_json
from resa_lens.hashes import digest
from resa_lens.machine.plans import duration
from resa_lens.models.host import Model
from resa_lens.progress import Reporter
from resa_lens.stages.adapters import (
    adapter_mb,
    adapter_run,
    elicitation_records,
    questions_of,
)
from resa_lens.stages.attribution import measure_effects
from resa_lens.stages.counts import count_run
from resa_lens.stages.insertion import InsertionRun, gains, starting_point
from resa_lens.stages.layer_probes import measure_probes
from resa_lens.stages.recommendation import sae_quality
from resa_lens.stages.sae_training import saes_for
from resa_lens.stages.saes import SaeRun, as_trained
from resa_lens.stages.scores import (
    FEWER_ANSWERS,
    EvalRun,
    answers_mb,
    note_overlap,
    questions_hash,
    read_result,
)
from resa_lens.stages.sweep_jobs import Job, SweepConfig, jobs_of
from resa_lens.stages.sweep_page import PAGE, write_sweep_page
from resa_lens.stages.sweep_tables import JobScores, analyse, write_tables
from resa_lens.stages.tune_job import with_sequence
from resa_lens.stages.tuning import score_adapter, score_base
from resa_lens.texts import corpora

T = TypeVar("T")
WAIT_S = 2.0
"""Between two looks at the jobs that another process is at."""


@dataclass
class _Board:
    """Where the jobs stand."""

    folder: Path
    jobs: int
    done: dict[str, tuple[Artifact, Artifact]] = field(default_factory=dict)
    """Adapter and evaluation by the job's name."""
    failed: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """Of the jobs that this process has done."""

    def left(self) -> str:
        """Say how many jobs are done and how long the rest would take this process alone."""
        over = len(self.done) + len(self.failed)
        seconds = (self.jobs - over) * sum(self.seconds) / len(self.seconds)
        return f"{over} of {self.jobs}, about {duration(seconds)} left"

    def record(self, job: Job) -> Path:
        return self.folder / "jobs" / f"{job.name}.json"


@dataclass(frozen=True)
class SweepRun:
    """A sweep's results, and the artifact that holds them."""

    artifact: Artifact
    sweep: SweepTables

    @property
    def page(self) -> Path:
        """The page that needs nothing else."""
        return self.artifact.path / PAGE


def sweep_run(ctx: Context, config: SweepConfig) -> SweepRun:
    """Tune and score every job, or go on with a killed sweep, or read the finished one.

    Raises:
        BadInputError: as `stages.tuning.tune_run`, or a single question.
        RunFailedError: no job of a layer could be finished.
    """
    config = replace(config, tune=with_sequence(config.tune))
    shared = config.tune
    items = questions_of(ctx, shared)
    if len(items) < 2:
        raise BadInputError(
            f"{len(items)} question to score: intervals over questions need two or more"
        )
    trigger, elicited = corpora.read_records(shared.trigger), elicitation_records(shared)
    note_overlap(ctx, items, elicited)
    target = ctx.model(shared.model, shared.base)
    source = ctx.model(shared.source_model) if shared.source_model else target
    jobs = jobs_of(config, target.n_layers)
    layers = sorted({job.layer for job in jobs if job.layer is not None})
    site = shared.objective.site
    saes = _in_turn(
        ctx,
        lambda: saes_for(
            ctx,
            source,
            layers,
            replace(shared.sae, site=site),
            shared.trigger,
            shared.saes,
            allow_mismatch=shared.allow_mismatch,
            only=layers,
        ),
    )
    shared = replace(shared, trigger=as_trained(saes, shared.trigger, trigger))
    stage = ctx.stage(
        Sweep,
        target,
        name=f"{shared.objective.preset}-{site}",
        config={
            "objective": shared.objective,
            "lora": shared.lora,
            "steps": shared.steps,
            "trigger": shared.trigger,
            "elicitation": shared.elicitation,
            "evaluation": shared.evaluation,
            "jobs": [asdict(job) for job in jobs],
            "rule": config.rule,
            "effects": config.effects,
            **({"start_check": True} if config.start_check else {}),
            **({"probes": True} if config.probes else {}),
            "seed": ctx.seed,
        },
        data={
            "trigger": corpora.hash_records(trigger),
            "elicitation": corpora.hash_records(elicited),
            "questions": questions_hash(
                items, sampled=shared.evaluation.generation.temperature > 0
            ),
        },
        parents={"saes": saes.parent(layers), "source": Parent(digest(source.contents), "")},
        settings={
            "sweep": config_dict(config),
            "jobs": [asdict(job) for job in jobs],
            "saes": saes.relative,
            "target": target.slug,
            "source": source.slug,
            "questions": questions_hash(items)[:8],
        },
    )

    def complete(artifact: Artifact) -> bool:
        # What failed is tried again.
        return not artifact.manifest.results["failed"]

    def finished() -> bool:
        """Return whether the whole sweep is there: from before, or by another process since."""
        artifact = stage.done(again=True)
        return artifact is not None and complete(artifact)

    began = time.monotonic()
    board = _Board(stage.work, len(jobs))
    start: InsertionRun | None = None
    base: EvalRun | None = None
    if not finished():
        left = sum(not board.record(job).exists() for job in jobs)
        adapters = left * adapter_mb(target, shared)
        stage.expect(0, adapters)
        every = replace(shared.evaluation, limit=None, levels=None)
        answers = answers_mb(ask(items, every, target.tokenizer), every)
        # The base model answers too.
        stage.expect(0, adapters + (left + 1) * answers, FEWER_ANSWERS)
        base = _in_turn(ctx, lambda: score_base(ctx, shared, items))
        if config.start_check:
            start = _in_turn(
                ctx,
                lambda: starting_point(
                    ctx, target, saes, items, shared.elicitation, shared.evaluation, layers,
                    source=source, tasks=shared.eval_source,
                ),
            )  # fmt: skip
        if ctx.force:
            # Not the claims of those who are at it.
            shutil.rmtree(stage.work / "jobs", ignore_errors=True)
        stage.work.mkdir(parents=True, exist_ok=True)
        with stage.as_begun():
            _work_through(ctx, config, jobs, items, saes, board, finished)

    def work(draft: Draft) -> None:
        assert base is not None
        _analyse(ctx, config, jobs, target, source, saes, base, board, start, draft)
        draft.seconds = time.monotonic() - began

    artifact = _in_turn(ctx, lambda: stage.obtain(work, usable=complete))
    shutil.rmtree(stage.work, ignore_errors=True)
    return SweepRun(artifact, artifact.read(SWEEP, SweepTables))


def _analyse(
    ctx: Context,
    config: SweepConfig,
    jobs: Sequence[Job],
    target: Model,
    source: Model,
    saes: SaeRun,
    base: EvalRun,
    board: _Board,
    start: InsertionRun | None,
    draft: Draft,
) -> None:
    """Compute what the finished jobs say, and fill the draft with it."""
    for name, reason in board.failed.items():
        ctx.reporter.note(f"warning: job {name} failed and is left out: {reason}")
    scored = [
        JobScores(job.name, job.layer, job.seed, job.control, adapter.relative, scores.relative)
        for job in jobs
        if job.name in board.done
        for adapter, scores in (board.done[job.name],)
    ]
    if not any(job.control is None for job in scored):
        raise RunFailedError(
            f"sweep: no tuning through an SAE finished; first reason: "
            f"{next(iter(board.failed.values()), 'none')}"
        )
    # One run's texts at a time: answers may be long and runs many.
    runs = {
        job.name: run_scores(job.name, read_result(board.done[job.name][1]).samples)
        for job in scored
    }
    shared = config.tune
    site = shared.objective.site
    layers = sorted({job.layer for job in jobs if job.layer is not None})
    counts = count_run(ctx, source, saes, CountConfig(), layers)
    effects = (
        dict(measure_effects(ctx, source, config.rule, shared.trigger)(saes, counts))
        if config.effects
        else None
    )
    probed = measure_probes(ctx, source, target, shared, layers) if config.probes else {}
    sweep = analyse(
        base=base.result,
        runs=runs,
        jobs=scored,
        failed=board.failed,
        n_layers=target.n_layers,
        counts={rule: counts.counts.table(rule) for rule in RULES},
        rule=config.rule,
        quality=sae_quality(source, saes, shared.trigger, layers).measure(),
        causal=effects,
        insertion=gains(start) if start else None,
        **probed,
        fvu={layer: row["fvu"] for layer, row in saes.quality.items() if layer in layers},
        seed=ctx.seed,
    )
    steps = board.done[scored[0].name][0].manifest.config["steps"]
    draft.parents = [counts.artifact.relative, base.artifact.relative]
    draft.results = {
        "model": target.name,
        "source": source.name,
        "site": site,
        "preset": shared.objective.preset,
        "n_layers": target.n_layers,
        "failed": board.failed,
    }
    if start:
        draft.parents.append(start.artifact.relative)
        draft.results["start"] = start.layers

    def write(folder: Path) -> None:
        write_tables(sweep, base.result, runs, folder)
        title, lead = _title(target, source, config), _lead(config, sweep, steps)
        write_sweep_page(sweep, folder / PAGE, title, lead)

    draft.write(write)


def _in_turn(ctx: Context, work: Callable[[], T]) -> T:
    """Do a piece of work that all jobs need; where another process is at it, wait for its end."""
    waiting = False
    while True:
        try:
            return work()
        except TakenError as error:
            if not waiting:
                ctx.reporter.note(f"waiting: {error}")
            waiting = True
            time.sleep(WAIT_S)


def _title(target: Model, source: Model, config: SweepConfig) -> str:
    through = f" through SAEs of {source.slug}" if source is not target else ""
    objective = config.tune.objective
    return f"{target.slug}{through}: preset {objective.preset}, site {objective.site}"


def _lead(config: SweepConfig, sweep: SweepTables, steps: int) -> str:
    lora = config.tune.lora
    return (
        f"{len(sweep.layers)} layers x {config.seeds} seeds, {sweep.n} questions, learning rate "
        f"{lora.learning_rate:g}, LoRA rank {lora.rank}, {steps} steps."
    )


def _work_through(
    ctx: Context,
    config: SweepConfig,
    jobs: Sequence[Job],
    items: Sequence[EvalItem],
    saes: SaeRun,
    board: _Board,
    finished: Callable[[], bool],
) -> None:
    """Do every job that nobody else is at, until all are done or have failed.

    It also ends where another process has finished the sweep.
    """
    open_jobs = list(jobs)
    # Not metered: each job's own stages are.
    with ctx.reporter.bar(f"sweep, {len(jobs)} tunings", len(jobs)) as advance:
        while open_jobs:
            left = []
            for job in open_jobs:
                if finished():
                    ctx.reporter.note("sweep: done by another process")
                    return
                try:
                    with run_lock(board.folder / "locks" / job.name, wait=False):
                        over = _one(ctx, config, job, items, saes, board)
                except TakenError:
                    over = False
                if over:
                    advance(1)
                else:
                    left.append(job)
            if len(left) == len(open_jobs):
                time.sleep(WAIT_S)
            open_jobs = left


def _one(
    ctx: Context,
    config: SweepConfig,
    job: Job,
    items: Sequence[EvalItem],
    saes: SaeRun,
    board: _Board,
) -> bool:
    """Do a job, or note why it failed; False where another command is at this very work."""
    file = board.record(job)
    if recorded := _recorded(ctx, file):
        board.done[job.name] = recorded
        return True
    shared = config.tune
    tune = replace(
        shared,
        layer="auto" if job.layer is None else str(job.layer),
        reason=f"job {job.name}",
        lora=replace(shared.lora, seed=job.seed),
        elicitation=replace(shared.elicitation, seed=job.seed),
        control=job.control,
        start_check=False,
    )
    # The seed of a control is the job's; of the stages of one job only warnings are said.
    own = replace(ctx, seed=job.seed, reporter=_Warnings(ctx.reporter))
    began, started = time.monotonic(), datetime.now(UTC).isoformat()
    try:
        adapter = adapter_run(own, tune, saes)
        scores = score_adapter(own, tune, adapter, items)
    except TakenError:
        return False
    except RunFailedError as error:
        board.failed[job.name] = str(error)
        return True
    artifacts = adapter.artifact, scores.artifact
    with write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, [[a.relative, a.manifest.identity] for a in artifacts])
    board.done[job.name] = artifacts
    if scores.artifact.manifest.created < started:
        return True  # all was there: by another process, or before a kill
    board.seconds.append(time.monotonic() - began)
    result = scores.result
    ctx.reporter.note(
        f"{job.name}: {100 * result.accuracy:.1f} %, n = {result.n}, {board.seconds[-1]:.0f} s; "
        f"{board.left()}"
    )
    return True


def _recorded(ctx: Context, file: Path) -> tuple[Artifact, Artifact] | None:
    """Return a finished job's adapter and evaluation, where both are still as they were."""
    if not file.exists():
        return None
    artifacts = []
    for relative, identity in read_json(file):
        try:
            artifact = ctx.workspace.read(ctx.workspace.path(relative))
        except BadInputError:
            return None
        if artifact is None or artifact.manifest.identity != identity:
            return None
        if next(artifact.damage(), None):
            return None
        artifacts.append(artifact)
    return artifacts[0], artifacts[1]


class _Warnings(Reporter):
    """Passes on what went wrong and nothing else."""

    def __init__(self, outer: Reporter) -> None:
        self.outer = outer

    def note(self, text: str) -> None:
        """Say one line if it is a warning."""
        if text.startswith("warning"):
            self.outer.note(text)
