"""Many tunings, each scored: every layer and seed, and controls beside them.

A sweep is a list of named jobs.  Each job leaves an adapter and an evaluation of its own, so a
killed sweep goes on at the job where it was, and several processes that run the same command share
the jobs: a job belongs to whoever holds its lock.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from resa_lens.corpora import CorpusConfig, Record, hash_records, load_records
from resa_lens.errors import BadInputError, RunFailedError, TakenError
from resa_lens.evals.compare import run_scores
from resa_lens.evals.tasks import EvalItem
from resa_lens.features.exclusive import RULES, CountConfig
from resa_lens.hookpoints import trainable_layers
from resa_lens.layers.selectors import Effect
from resa_lens.models import Model
from resa_lens.pipeline.adapters import TuneJob, adapter_run, elicitation_records
from resa_lens.pipeline.attribution import measure_effects
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.discovery import count_run
from resa_lens.pipeline.sae_training import saes_for
from resa_lens.pipeline.saes import SaeRun, probe_batches, split_records
from resa_lens.pipeline.scores import load_eval_items, note_overlap, read_eval
from resa_lens.pipeline.sweep_page import PAGE, write_sweep_page
from resa_lens.pipeline.sweep_tables import JobScores, Sweep, analyse, write_tables
from resa_lens.pipeline.tuning import score_adapter, score_base
from resa_lens.progress import Reporter
from resa_lens.saes.checkpoint import run_lock
from resa_lens.saes.quality import loss_change
from resa_lens.tuning.sft import KINDS
from resa_lens.workspace import MANIFEST, config_dict, digest, read_json, write_errors, write_json

T = TypeVar("T")
WORK = ".work-"
WAIT_S = 2.0
"""Between two looks at the jobs that another process is at."""


@dataclass(frozen=True)
class SweepConfig:
    """Which tunings: layers x seeds, and controls at some layers x seeds."""

    tune: TuneJob
    """What every job shares; layer, seed and control are the job's own."""
    layers: tuple[int, ...] | None = None
    """0-based; all but the first and the last where not given."""
    seeds: int = 3
    """Of adapters, dropout and the order of the data: `tune.lora.seed` and those after it."""
    controls: tuple[str, ...] = ()
    control_layers: tuple[int, ...] | None = None
    """Where controls stand in an SAE's place; a third and two thirds of the layers by default."""
    rule: str = "all"
    """Whose counts the selectors see."""
    effects: bool = True
    """Measure causal effects by layer, for the selectors causal and blend."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadInputError: no seed, or an unknown rule or control.
        """
        if self.seeds < 1:
            raise BadInputError(f"seeds is {self.seeds}; use at least 1")
        if self.rule not in RULES:
            raise BadInputError(f"rule {self.rule!r} is unknown; use {', '.join(RULES)}")
        for name in self.controls:
            replace(self.tune, control=name)


@dataclass(frozen=True)
class Job:
    """One tuning of a sweep."""

    name: str
    layer: int | None
    """0-based; None where no SAE is used."""
    seed: int
    control: str | None = None


@dataclass
class _Board:
    """Where the jobs stand."""

    folder: Path
    jobs: int
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """Of the jobs that this process has done."""

    def left(self) -> str:
        """Say how many jobs are done and how long the rest would take this process alone."""
        over = len(self.done) + len(self.failed)
        minutes = (self.jobs - over) * sum(self.seconds) / len(self.seconds) / 60
        return f"{over} of {self.jobs}, about {minutes:.0f} min left"

    def record(self, job: Job) -> Path:
        return self.folder / "jobs" / f"{job.name}.json"


def jobs_of(config: SweepConfig, n_layers: int) -> list[Job]:
    """Return the jobs, seed by seed, so that a part of a sweep is a smaller sweep.

    Raises:
        BadInputError: a layer that the model does not have.
    """
    layers = config.layers if config.layers is not None else tuple(trainable_layers(n_layers))
    at = config.control_layers
    if at is None:
        at = tuple(dict.fromkeys(layers[len(layers) * i // 3] for i in (1, 2)))
    for layer in (*layers, *at):
        if not 0 <= layer < n_layers:
            raise BadInputError(f"layer {layer}: the model has 0 to {n_layers - 1} (0-based)")
    first = config.tune.lora.seed
    jobs = []
    for seed in range(first, first + config.seeds):
        jobs += [Job(f"L{layer:02d}-s{seed}", layer, seed) for layer in layers]
        for name in config.controls:
            if name in KINDS:
                jobs.append(Job(f"{name}-s{seed}", None, seed, name))
            else:
                jobs += [Job(f"L{x:02d}-{name}-s{seed}", x, seed, name) for x in at]
    return jobs


def sweep_run(ctx: Context, config: SweepConfig) -> tuple[Path, Sweep]:
    """Tune and score every job, or go on with a killed sweep, or read the finished one.

    Raises:
        BadInputError: as `pipeline.tuning.adapter_run`, or a single question.
        RunFailedError: no job of a layer could be finished.
    """
    shared = config.tune
    items = load_eval_items(shared.eval_source, shared.evaluation)
    if len(items) < 2:
        raise BadInputError(
            f"{len(items)} question to score: intervals over questions need two or more"
        )
    trigger, elicited = _records(shared.trigger), elicitation_records(shared)
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
    identity = {
        "sweep": config_dict(config),
        "jobs": [asdict(job) for job in jobs],
        "saes": ctx.workspace.relative(saes.folder),
        "target": target.slug,
        "source": source.slug,
        "questions": digest([[i.id, i.question, i.answer] for i in items]),
        # The configuration names a file, not what stands in it.
        "data": [hash_records(trigger), hash_records(elicited)],
        "dtype": target.dtype,
    }
    folder = ctx.workspace.path(
        "sweeps", f"{target.slug}-{shared.objective.preset}-{site}-{digest(identity)}"
    )
    # What failed is tried again.
    if (done := ctx.done(folder, saes.folder)) and not done.results["failed"]:
        ctx.reporter.note(f"sweep: done before, in {folder}")
        return folder, Sweep.read(folder)
    work = folder.parent / f"{WORK}{folder.name}"
    base_folder, base = _in_turn(ctx, lambda: score_base(ctx, shared, items))
    board = _Board(work, len(jobs))
    if ctx.force:
        shutil.rmtree(work, ignore_errors=True)
    began = time.monotonic()

    def finished() -> bool:
        """Whether another process has done the whole sweep meanwhile, and cleared its work."""
        found = ctx.done(folder, saes.folder)
        return found is not None and not found.results["failed"]

    if not _work_through(ctx, config, jobs, items, saes, board, finished):
        ctx.reporter.note(f"sweep: done by another process, in {folder}")
        shutil.rmtree(work, ignore_errors=True)
        return folder, Sweep.read(folder)
    for name, reason in board.failed.items():
        ctx.reporter.note(f"warning: job {name} failed and is left out: {reason}")
    made = [
        JobScores(job.name, job.layer, job.seed, job.control, **board.done[job.name])
        for job in jobs
        if job.name in board.done
    ]
    if not any(job.control is None for job in made):
        raise RunFailedError(
            f"sweep: no tuning through an SAE finished; first reason: "
            f"{next(iter(board.failed.values()), 'none')}"
        )
    # One run's texts at a time: answers may be long and runs many.
    runs = {
        job.name: run_scores(job.name, read_eval(ctx, ctx.workspace.path(job.eval)).samples)
        for job in made
    }
    counts_folder, counts = count_run(ctx, source, saes, CountConfig(), layers)
    sweep = analyse(
        base=base,
        runs=runs,
        jobs=made,
        failed=board.failed,
        n_layers=target.n_layers,
        counts={rule: counts.table(rule) for rule in RULES},
        rule=config.rule,
        quality=_quality(source, saes, shared.trigger, trigger, layers),
        causal=_effects(ctx, source, saes, counts, config),
        fvu={layer: q["fvu"] for layer, q in saes.quality.items() if layer in layers},
        seed=ctx.seed,
    )
    first = ctx.workspace.manifest(ctx.workspace.path(made[0].adapter))
    lead = _lead(config, sweep, first.config["steps"] if first else 0)
    manifest = ctx.manifest(
        "sweep",
        target,
        config=identity,
        parents=[
            ctx.workspace.relative(saes.folder),
            ctx.workspace.relative(counts_folder),
            ctx.workspace.relative(base_folder),
        ],
        results={
            "model": target.name,
            "source": source.name,
            "site": site,
            "preset": shared.objective.preset,
            "n_layers": target.n_layers,
            "failed": board.failed,
        },
    )
    manifest.seconds = round(time.monotonic() - began, 3)
    with ctx.workspace.artifact(folder, manifest) as temporary:
        write_tables(sweep, base, runs, temporary)
        write_sweep_page(sweep, temporary / PAGE, _title(target, source, config), lead)
    shutil.rmtree(work, ignore_errors=True)
    return folder, sweep


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


def _lead(config: SweepConfig, sweep: Sweep, steps: int) -> str:
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
) -> bool:
    """Do every job that nobody else is at, until all are done or have failed.

    Returns:
        False where the sweep was finished by another process.
    """
    open_jobs = list(jobs)
    # Not metered: each job's own stages are.
    with ctx.reporter.bar(f"sweep, {len(jobs)} tunings", len(jobs)) as advance:
        while open_jobs:
            left = []
            for job in open_jobs:
                if finished():
                    return False
                with _mine(board, job) as mine:
                    if not mine or not _one(ctx, config, job, items, saes, board):
                        left.append(job)
                        continue
                    advance(1)
            if len(left) == len(open_jobs):
                time.sleep(WAIT_S)
            open_jobs = left
    return True


@contextmanager
def _mine(board: _Board, job: Job) -> Iterator[bool]:
    """Hold a job's lock; False where another process is at it."""
    with ExitStack() as held:
        try:
            held.enter_context(run_lock(board.folder / "locks" / job.name))
        except TakenError:
            yield False
            return
        yield True


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
    if file.exists():
        held = read_json(file)
        adapter, scored = (ctx.workspace.path(held[key]) for key in ("adapter", "eval"))
        parents = [] if job.layer is None else [saes.folder]
        if replace(ctx, force=False).done(adapter, *parents) and ctx.workspace.manifest(scored):
            board.done[job.name] = held
            return True
    shared = config.tune
    tune = replace(
        shared,
        layer="auto" if job.layer is None else str(job.layer),
        reason=f"job {job.name}",
        lora=replace(shared.lora, seed=job.seed),
        elicitation=replace(shared.elicitation, seed=job.seed),
        control=job.control,
    )
    # The seed of a control is the job's; of the stages of one job only warnings are said.
    own = replace(ctx, seed=job.seed, reporter=_Warnings(ctx.reporter))
    began, started = time.monotonic(), time.time()
    try:
        adapter = adapter_run(own, tune, saes)
        eval_folder, result = score_adapter(own, tune, adapter, items)
    except TakenError:
        return False
    except RunFailedError as error:
        board.failed[job.name] = str(error)
        return True
    held = {
        "adapter": ctx.workspace.relative(adapter.folder),
        "eval": ctx.workspace.relative(eval_folder),
    }
    with write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, held)
    board.done[job.name] = held
    if (eval_folder / MANIFEST).stat().st_mtime < started:
        return True  # all was there: by another process, or before a kill
    board.seconds.append(time.monotonic() - began)
    ctx.reporter.note(
        f"{job.name}: {100 * result.accuracy:.1f} %, n = {result.n}, {board.seconds[-1]:.0f} s; "
        f"{board.left()}"
    )
    return True


class _Warnings(Reporter):
    """Passes on what went wrong and nothing else."""

    def __init__(self, outer: Reporter) -> None:
        self.outer = outer

    def note(self, text: str) -> None:
        """Say one line if it is a warning."""
        if text.startswith("warning"):
            self.outer.note(text)


def _records(corpus: CorpusConfig) -> list[Record]:
    return load_records(
        corpus.source, question_column=corpus.question_column, answer_column=corpus.answer_column
    )


def _quality(
    source: Model,
    saes: SaeRun,
    trigger: CorpusConfig,
    records: list[Record],
    layers: Sequence[int],
) -> dict[int, float]:
    held = split_records(records)[1]
    changes = loss_change(source, saes.coders(source, layers), probe_batches(source, held, trigger))
    return {point.layer: change for point, change in changes.items()}


def _effects(
    ctx: Context, source: Model, saes: SaeRun, counts: Any, config: SweepConfig
) -> dict[int, Effect] | None:
    if not config.effects:
        return None
    return dict(measure_effects(ctx, source, config.rule, config.tune.trigger)(saes, counts))
