"""Many tunings, each scored: every layer and seed, and controls beside them.

A sweep is a list of named jobs (`jobs.joblist`).  Each job leaves an adapter and an evaluation of
its own, so a killed sweep goes on at the job where it was, and several processes that run the same
command share the jobs: a job belongs to the process that has claimed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from resa_lens.artifacts.artifact import Artifact, Parent
from resa_lens.artifacts.kinds.sweep import SWEEP, Sweep, SweepTables
from resa_lens.artifacts.stage import Context, Draft, Stage
from resa_lens.config import config_dict
from resa_lens.errors import RunFailedError
from resa_lens.evals.compare import run_scores
from resa_lens.evals.engines.choice import engine_part
from resa_lens.evals.run import ask
from resa_lens.evals.tasks import EvalItem
from resa_lens.features.config import RULES, CountConfig
from resa_lens.hashes import digest
from resa_lens.jobs.cluster import Cluster
from resa_lens.models.host import Model
from resa_lens.stages.adapters import adapter_mb, elicitation_records
from resa_lens.stages.attribution import measure_effects
from resa_lens.stages.counts import count_run
from resa_lens.stages.insertion import InsertionRun, gains, starting_point
from resa_lens.stages.job_stage import JobStage, Share, in_turn
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
from resa_lens.stages.sweep_jobs import Job, SweepConfig, jobs_of, sweep_questions
from resa_lens.stages.sweep_page import PAGE, write_sweep_page
from resa_lens.stages.sweep_tables import JobScores, analyse, write_tables
from resa_lens.stages.sweep_tunings import RemoteTunings, Tunings, recorded
from resa_lens.stages.tune_job import with_sequence
from resa_lens.stages.tuning import score_base
from resa_lens.texts import corpora
from resa_lens.tuning.sft import examples


@dataclass(frozen=True)
class SweepRun:
    """A sweep's results, and the artifact that holds them."""

    artifact: Artifact
    sweep: SweepTables

    @property
    def page(self) -> Path:
        """The page that needs nothing else."""
        return self.artifact.path / PAGE


def sweep_run(ctx: Context, config: SweepConfig, *, cluster: Cluster | None = None) -> SweepRun:
    """Tune and score every job, or go on with a killed sweep, or read the finished one.

    Args:
        ctx: the workspace and who to tell.
        config: what is tuned.
        cluster: a Ray cluster that does the jobs; by default this process does, with all others
            that run the same sweep.

    Raises:
        BadInputError: as `stages.tuning.tune_run`, a single question, or no Ray cluster.
        RunFailedError: no job of a layer could be finished.
    """
    # A cluster that cannot be reached shows before long work.
    with cluster.connected() if cluster else nullcontext():
        return _read(_plan(ctx, config).obtain(cluster))


def sweep_join(ctx: Context, config: SweepConfig) -> Share[SweepRun]:
    """Do what no other worker of the same sweep is at; see `JobStage.join`.

    Raises:
        BadInputError: as `sweep_run`.
        RunFailedError: as `sweep_run`.
    """
    share = _plan(ctx, config).join()
    return Share(share.jobs, share.left, _read(share.run) if share.run else None)


def _read(artifact: Artifact) -> SweepRun:
    return SweepRun(artifact, artifact.read(SWEEP, SweepTables))


def _plan(ctx: Context, config: SweepConfig) -> _Plan:
    """Open what all jobs of a sweep share, and name the sweep; SAEs that are missing are trained.

    Raises:
        BadInputError: as `sweep_run`.
    """
    config = replace(config, tune=with_sequence(config.tune))
    shared = config.tune
    items = sweep_questions(ctx, shared)
    trigger, elicited = corpora.read_records(shared.trigger), elicitation_records(shared)
    note_overlap(ctx, items, elicited)
    target = ctx.model(shared.model, shared.base)
    source = ctx.model(shared.source_model) if shared.source_model else target
    jobs = jobs_of(config, target.n_layers)
    layers = sorted({job.layer for job in jobs if job.layer is not None})
    shared.check_modules(target, layers)
    for control in {"cot", "cot-free"}.intersection(config.controls):
        examples(elicited, control)
    site = shared.objective.site
    saes = in_turn(
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
    assert saes is not None
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
            **engine_part(shared.engine),
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
    before = stage.done(again=True)
    return _Plan(
        ctx, replace(config, tune=shared), items, target, source, saes, jobs, stage,
        before.manifest.created if before else None,
    )  # fmt: skip


@dataclass(frozen=True)
class _Plan(JobStage):
    """A sweep with everything opened that its jobs share."""

    ctx: Context
    config: SweepConfig
    """Its `tune` is settled: lengths and shares of the data are what they are."""
    items: Sequence[EvalItem]
    target: Model
    source: Model
    saes: SaeRun
    tunings: Sequence[Job]
    stage: Stage
    before: str | None
    """When the sweep that was there at the start was made."""

    @property
    def layers(self) -> list[int]:
        """The layers that are tuned through, 0-based."""
        return sorted({job.layer for job in self.tunings if job.layer is not None})

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tunings."""
        return tuple(job.name for job in self.tunings)

    def will_do(self, artifact: Artifact) -> bool:
        """Return whether a finished sweep will do: one that misses no job that could be had."""
        # What failed is tried again, but not what has failed in another process just now.
        return not artifact.manifest.results["failed"] or artifact.manifest.created != self.before

    def base(self) -> EvalRun:
        """Score the base model, or read its scores."""
        return score_base(self.ctx, self.config.tune, self.items)

    def start(self) -> InsertionRun | None:
        """Insert each SAE and tune nothing, where that is asked for."""
        shared = self.config.tune
        if not self.config.start_check:
            return None
        return starting_point(
            self.ctx, self.target, self.saes, self.items, shared.elicitation, shared.evaluation,
            self.layers, source=self.source, tasks=shared.eval_source,
        )  # fmt: skip

    def prepare(self, *, wait: bool) -> None:
        """Compare the jobs with the free disk, and score the base model."""
        ctx, shared = self.ctx, self.config.tune
        left = len(self.jobs.open())
        adapters = left * adapter_mb(self.target, shared)
        self.stage.expect(0, adapters)
        every = replace(shared.evaluation, limit=None, levels=None)
        answers = answers_mb(ask(self.items, every, self.target.tokenizer), every)
        # The base model answers too.
        self.stage.expect(0, adapters + (left + 1) * answers, FEWER_ANSWERS)
        in_turn(ctx, self.base, wait=wait)
        in_turn(ctx, self.start, wait=wait)

    def work(self) -> Tunings:
        """Return what does a job in this process."""
        shared = self.config.tune
        return Tunings(self.ctx, shared, self.tunings, self.items, self.saes, self.jobs)

    def remote(self) -> RemoteTunings:
        """Return what does a job in a worker of Ray."""
        return RemoteTunings.of(self.work(), self.target)

    def outcome(self, name: str) -> str | None:
        """Say what a tuning scored."""
        if (scored := recorded(self.ctx, self.jobs.record(name))) is None:
            return None
        results = scored[1].manifest.results
        return f"{100 * results['accuracy']:.1f} %, n = {results['n']}"

    def results(self) -> dict[str, tuple[Artifact, Artifact]]:
        """Return adapter and evaluation of each finished job; what is damaged is made again."""
        jobs = self.jobs
        while True:
            failed = jobs.failed()
            pairs = {
                name: recorded(self.ctx, jobs.record(name))
                for name in jobs.names
                if name not in failed
            }
            whole = {name: pair for name, pair in pairs.items() if pair}
            if len(whole) == len(pairs):
                return whole
            jobs.retry(set(pairs) - set(whole))
            with self.stage.as_begun():
                self.share()

    def tables(self, draft: Draft) -> None:
        """Compute what the finished jobs say, and fill the draft with it."""
        base, start, done = self.base(), self.start(), self.results()
        _analyse(self, base, start, done, self.jobs.failed(), draft)


def _analyse(
    plan: _Plan,
    base: EvalRun,
    start: InsertionRun | None,
    done: Mapping[str, tuple[Artifact, Artifact]],
    failed: Mapping[str, str],
    draft: Draft,
) -> None:
    """Compute what the finished jobs say, and fill the draft with it."""
    ctx, config, target, source, saes = plan.ctx, plan.config, plan.target, plan.source, plan.saes
    for name, reason in failed.items():
        ctx.reporter.note(f"warning: job {name} failed and is left out: {reason}")
    scored = [
        JobScores(job.name, job.layer, job.seed, job.control, adapter.relative, scores.relative)
        for job in plan.tunings
        if job.name in done
        for adapter, scores in (done[job.name],)
    ]
    if not any(job.control is None for job in scored):
        raise RunFailedError(
            f"sweep: no tuning through an SAE finished; first reason: "
            f"{next(iter(failed.values()), 'none')}"
        )
    # One run's texts at a time: answers may be long and runs many.
    runs = {
        job.name: run_scores(job.name, read_result(done[job.name][1]).samples) for job in scored
    }
    shared = config.tune
    site = shared.objective.site
    layers = plan.layers
    counts = count_run(ctx, source, saes, CountConfig(), layers)
    effects = (
        dict(measure_effects(ctx, source, config.rule, shared.trigger)(saes, counts))
        if config.effects
        else None
    )
    probed = measure_probes(source, target, shared, layers) if config.probes else {}
    sweep = analyse(
        base=base.result,
        runs=runs,
        jobs=scored,
        failed=dict(failed),
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
    steps = done[scored[0].name][0].manifest.config["steps"]
    draft.parents = [counts.artifact.relative, base.artifact.relative]
    draft.results = {
        "model": target.name,
        "source": source.name,
        "site": site,
        "preset": shared.objective.preset,
        "n_layers": target.n_layers,
        "failed": dict(failed),
    }
    if start:
        draft.parents.append(start.artifact.relative)
        draft.results["start"] = start.layers

    def write(folder: Path) -> None:
        write_tables(sweep, base.result, runs, folder)
        title, lead = _title(target, source, config), _lead(config, sweep, steps)
        write_sweep_page(sweep, folder / PAGE, title, lead)

    draft.write(write)


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
