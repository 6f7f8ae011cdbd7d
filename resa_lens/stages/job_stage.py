"""An artifact that is gathered from independent jobs.

The jobs are a list in the artifact's work folder (`jobs.joblist`): this process does them, or equal
workers on a shared workspace do, or Ray.  How they were done is no part of what the artifact is.
"""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.stage import Context, Draft, Stage
from resa_lens.errors import ResaLensError, TakenError
from resa_lens.files import run_lock
from resa_lens.jobs import joblist
from resa_lens.jobs.cluster import Cluster, hand_out
from resa_lens.jobs.joblist import JobList, Work
from resa_lens.models.host import Model
from resa_lens.progress import Advance

T = TypeVar("T")


@dataclass(frozen=True)
class Share(Generic[T]):
    """What one of several equal workers did."""

    jobs: list[str]
    """Names of the jobs that it did."""
    left: list[str]
    """Jobs that other workers were at when it left."""
    run: T | None
    """The whole; None where another worker writes it."""

    def to_dict(self) -> dict[str, list[str]]:
        """Return the names for JSON."""
        return {"jobs": self.jobs, "left": self.left}


class JobStage(ABC):
    """A stage with its jobs: a subclass says what they are and what becomes of them."""

    ctx: Context
    stage: Stage
    all_needed = False
    """Whether nothing can be gathered where a job failed."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of all jobs; there may be none."""

    @abstractmethod
    def work(self) -> Work:
        """Return what does a job in this process."""

    @abstractmethod
    def remote(self) -> Work:
        """Return what does a job in a worker of Ray: names, paths and settings alone."""

    @abstractmethod
    def outcome(self, name: str) -> str | None:
        """Say what a job that has ended in a worker came to; None where it is not whole."""

    @abstractmethod
    def tables(self, draft: Draft) -> None:
        """Fill the artifact with what the finished jobs say."""

    @abstractmethod
    def prepare(self, *, wait: bool) -> None:
        """Do what comes before the jobs.

        Args:
            wait: for another process that is at a piece of it; else go on without.
        """

    def will_do(self, artifact: Artifact) -> bool:
        """Return whether a finished artifact will do."""
        return True

    def bar(self, by: str = "") -> AbstractContextManager[Advance]:
        """Open a progress bar over the jobs; `by` says who does them, where it is not this process.

        It is not metered: each job's own stages are.
        """
        n = len(self.names)
        return self.ctx.reporter.bar(f"{self.stage.noun}, {n} jobs{by}", n)

    @property
    def jobs(self) -> JobList:
        """The jobs, and where they stand."""
        return JobList(self.stage.work, self.names, self.finished, self.all_needed)

    def finished(self) -> bool:
        """Return whether the whole is there: from before, or by another process since."""
        artifact = self.stage.done(again=True)
        return artifact is not None and self.will_do(artifact)

    def obtain(self, cluster: Cluster | None = None) -> Artifact:
        """Do every job that no other process does, wait for the others, and gather them.

        Args:
            cluster: a Ray cluster that does the jobs in place of this process.

        Raises:
            BadInputError: of the jobs, or no Ray cluster.
            RunFailedError: of the jobs or of what becomes of them.
        """
        if self.names and not self.finished():
            self._prepare()
            with self._begun():
                self.hand_out(cluster) if cluster else self.share()
        artifact = self.gather()
        assert artifact is not None
        return artifact

    def join(self) -> Share[Artifact]:
        """Do what no other worker is at, and leave when nothing is left to take.

        The worker that ends last gathers the results.

        Raises:
            BadInputError: as `obtain`.
            RunFailedError: as `obtain`.
        """
        done: list[str] = []
        if self.names and not self.finished():
            self._prepare(wait=False)
            with self._begun():
                done = self.share(stay=False)
            if not self.finished() and (left := self.jobs.open()):
                return Share(done, left, None)
        return Share(done, [], self.gather(wait=False))

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """Work on the jobs; where that fails before any is over, nothing is left of it."""
        try:
            with self.stage.as_begun():
                yield
        except ResaLensError:
            jobs = self.jobs
            if len(jobs.open()) == len(jobs.names) and not jobs.at_work():
                shutil.rmtree(self.stage.work, ignore_errors=True)
            raise

    def _prepare(self, *, wait: bool = True) -> None:
        jobs = self.jobs
        if self.ctx.force:
            # Not the claims of those who are at it.
            jobs.retry(jobs.names)
        # What failed is tried again.
        jobs.retry(jobs.failed())
        self.prepare(wait=wait)
        self.stage.work.mkdir(parents=True, exist_ok=True)

    def share(self, *, stay: bool = True) -> list[str]:
        """Do the jobs that nobody else is at; see `JobList.share`."""
        with self.bar() as advance:
            done = self.jobs.share(self.work(), stay=stay, advance=advance)
        if self.finished():
            self.ctx.reporter.note(f"{self.stage.noun}: done by another process")
        return done

    def hand_out(self, cluster: Cluster) -> None:
        """Let a Ray cluster do the jobs."""
        jobs, n = self.jobs, len(self.names)
        with self.bar(" by Ray") as advance:
            advance(n - len(jobs.open()))

            def ended(name: str) -> None:
                if outcome := self.outcome(name):
                    self.ctx.reporter.note(f"{name}: {outcome}; {n - len(jobs.open())} of {n}")
                    advance(1)

            hand_out(cluster, jobs, self.remote(), ended)

    def gather(self, *, wait: bool = True) -> Artifact | None:
        """Write what the finished jobs say, or read it.

        Args:
            wait: for another process that gathers now; else return None.
        """

        def gathered() -> Artifact | None:
            with ExitStack() as stack:
                if self.names and not self.finished():
                    place = self.stage.work / "locks" / "tables"
                    try:
                        stack.enter_context(run_lock(place, "gathering the results"))
                    except TakenError:
                        if wait:
                            raise
                        return None
                # What another command is at is waited for in any case.
                artifact = self.stage.obtain(self.tables, usable=self.will_do)
                shutil.rmtree(self.stage.work, ignore_errors=True)
                return artifact

        return in_turn(self.ctx, gathered)


def worker_context(ctx: Context, model: Model) -> dict[str, Any]:
    """Return the fields of a context for a worker of Ray, which computes with as many threads.

    Its device may be another one than this process's.  Its dtype is that of `model`, which was
    opened here: dtype is part of an identity, and "auto" differs with the device.
    """
    names = ("seed", "device", "force", "deterministic", "command", "options")
    fields = {name: getattr(ctx, name) for name in names}
    return {**fields, "dtype": model.dtype, "threads": torch.get_num_threads()}


def in_turn(ctx: Context, work: Callable[[], T], *, wait: bool = True) -> T | None:
    """Do a piece of work that all workers need, after another process that is at it.

    Return None where another process is, and this one does not wait.
    """
    waiting = False
    while True:
        try:
            return work()
        except TakenError as error:
            if not wait:
                return None
            if not waiting:
                ctx.reporter.note(f"waiting: {error}")
            waiting = True
            time.sleep(joblist.WAIT_S)
