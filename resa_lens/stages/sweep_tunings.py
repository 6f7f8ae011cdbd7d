"""One job of a sweep: tune adapters and score them, here or in a worker of Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError
from resa_lens.evals.tasks import EvalItem
from resa_lens.files import read_json
from resa_lens.jobs.joblist import JobList
from resa_lens.machine.plans import duration
from resa_lens.models.host import Model
from resa_lens.progress import SILENT, Reporter
from resa_lens.stages.adapters import adapter_run, questions_of
from resa_lens.stages.job_stage import worker_context
from resa_lens.stages.sae_training import saes_for
from resa_lens.stages.saes import SaeRun, sae_run
from resa_lens.stages.sweep_jobs import Job
from resa_lens.stages.tune_job import TuneJob
from resa_lens.stages.tuning import score_adapter


@dataclass
class Tunings:
    """The tunings of a sweep with what they share; called with a job's name, it does the job."""

    ctx: Context
    tune: TuneJob
    """What every job shares; layer, seed and control are the job's own."""
    jobs: Sequence[Job]
    items: Sequence[EvalItem]
    """The questions that each is scored on."""
    saes: SaeRun
    board: JobList
    """Where all jobs stand."""
    seconds: list[float] = field(default_factory=list)
    """Of the jobs that this process has done."""

    def __call__(self, name: str) -> list[list[str]]:
        """Tune and score a job; return path and identity of its adapter and of its evaluation.

        Raises:
            TakenError: another command is at this very work.
            RunFailedError: as `stages.adapters.adapter_run`.
        """
        job = next(job for job in self.jobs if job.name == name)
        shared = self.tune
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
        own = replace(self.ctx, seed=job.seed, reporter=_Warnings(self.ctx.reporter))
        began, started = time.monotonic(), datetime.now(UTC).isoformat()
        adapter = adapter_run(own, tune, self.saes)
        scores = score_adapter(own, tune, adapter, self.items)
        # Else all was there: by another process, or before a kill.
        if scores.artifact.manifest.created >= started:
            self.seconds.append(time.monotonic() - began)
            result = scores.result
            self.ctx.reporter.note(
                f"{name}: {100 * result.accuracy:.1f} %, n = {result.n}, {self.seconds[-1]:.0f} s; "
                f"{self._left()}"
            )
        return [[a.relative, a.manifest.identity] for a in (adapter.artifact, scores.artifact)]

    def _left(self) -> str:
        """Say how many jobs are done and how long the rest would take this process alone."""
        n = len(self.board.names)
        left = len(self.board.open()) - 1
        seconds = left * sum(self.seconds) / len(self.seconds)
        return f"{n - left} of {n}, about {duration(seconds)} left"


def recorded(ctx: Context, file: Path) -> tuple[Artifact, Artifact] | None:
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


@dataclass(frozen=True)
class RemoteTunings:
    """The tunings of a sweep for a worker of Ray: names, paths and settings, and nothing opened.

    Called with a job's name, it opens model and SAEs and does the job.
    """

    workspace: str
    folder: str
    """Where the jobs stand."""
    tune: TuneJob
    jobs: tuple[Job, ...]
    saes: str
    """Their folder, as manifests hold it."""
    context: dict[str, Any]
    """Fields of `Context`."""

    @classmethod
    def of(cls, tunings: Tunings, target: Model) -> RemoteTunings:
        """Return the same jobs for a worker; `target` is the model that is tuned."""
        ctx = tunings.ctx
        return cls(
            str(ctx.workspace.root), str(tunings.board.folder), tunings.tune, tuple(tunings.jobs),
            tunings.saes.relative, worker_context(ctx, target),
        )  # fmt: skip

    def __call__(self, name: str) -> list[list[str]]:
        """Do a job as `Tunings` does.

        Raises:
            BadInputError: the model or the SAEs cannot be opened on this node.
            RunFailedError: as of `Tunings`.
        """
        ctx = Context(Workspace(self.workspace), SILENT, **self.context)
        tune, site = self.tune, self.tune.objective.site
        artifact = None if tune.saes else ctx.workspace.read(ctx.workspace.path(self.saes))
        if artifact:
            saes = sae_run(artifact, site)
        else:
            # The SAE of this job alone: given ones are held to their places when they are opened.
            layer = next(job.layer for job in self.jobs if job.name == name)
            layers = [] if layer is None else [layer]
            source = ctx.model(tune.source_model or tune.model, self._base)
            saes = saes_for(
                ctx, source, layers, replace(tune.sae, site=site), tune.trigger, tune.saes,
                allow_mismatch=tune.allow_mismatch, only=layers,
            )  # fmt: skip
        board = JobList(Path(self.folder), tuple(job.name for job in self.jobs))
        return Tunings(ctx, tune, self.jobs, questions_of(ctx, tune), saes, board)(name)

    @property
    def _base(self) -> str | None:
        return None if self.tune.source_model else self.tune.base


class _Warnings(Reporter):
    """Passes on what went wrong and nothing else."""

    def __init__(self, outer: Reporter) -> None:
        self.outer = outer

    def note(self, text: str) -> None:
        """Say one line if it is a warning."""
        if text.startswith("warning"):
            self.outer.note(text)
