"""Jobs handed out by Ray: one task a job, in a process of its own with its own resources.

A task is given names and paths.  What it makes lies in the workspace, which all nodes mount, so
nothing of it passes through Ray's object store, and its claim keeps it apart from any other worker.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resa_lens.errors import BadInputError, ResaLensError
from resa_lens.jobs import joblist
from resa_lens.jobs.joblist import JobList, Work

INSTALL = (
    "--ray needs Ray, which is not installed here; "
    '`pip install -c constraints.txt "resa-lens[ray]"` installs it'
)
REACH_S = 10.0
"""Seconds that the head of a cluster may take to answer."""
LONGEST_S = 300.0
"""Between two looks at jobs that are taken, after a look that was long: the cluster was busy."""
LOCAL = "local"
"""In place of an address: a cluster of this machine alone, for this command."""


@dataclass(frozen=True)
class Cluster:
    """Where Ray runs, and what of it one job takes."""

    address: str = LOCAL
    """As of `ray.init`: host:port, "auto" for the cluster of this machine, or "local"."""
    cpus: int = 1
    gpus: float | None = None
    """May be a part of one; None: one where the cluster has any, else none."""

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Connect to the cluster, or start a local one; a notebook's connection is used and stays.

        Raises:
            BadInputError: there is none.
        """
        ray = _import()
        if ray.is_initialized():
            yield
            return
        check_ray(self.address)
        # Nothing of a run is sent anywhere.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = {"include_dashboard": False} if self.address == LOCAL else {}
        # Ray says on stdout, which is the result's, that a worker died.
        with redirect_stdout(sys.stderr):
            try:
                ray.init(address=self.address, log_to_driver=False, logging_level="error", **own)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise BadInputError(
                    f"--ray {self.address}: no connection ({reason});\n"
                    f"give host:port of the head of a cluster, auto, or {LOCAL}"
                ) from error
            try:
                yield
            finally:
                ray.shutdown()


def check_ray(address: str) -> None:
    """Raise BadInputError where Ray cannot be imported, or nothing answers at its address."""
    _import()
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        if address in (LOCAL, "auto"):
            return
        raise BadInputError(f"--ray {address!r} is no address; give host:port, auto or {LOCAL}")
    # Ray itself would try for minutes.
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise BadInputError(
            f"--ray {address}: nothing answers there ({error}); give host:port of the head of a "
            f"cluster, auto, or {LOCAL}"
        ) from error


def hand_out(
    cluster: Cluster,
    jobs: JobList,
    work: Work,
    ended: Callable[[str], None],
) -> None:
    """Let Ray do the open jobs, until each is over; a job whose worker dies is begun again.

    Args:
        cluster: where, and with what.
        jobs: the jobs; their folder and the workspace lie at the same path on every node.
        work: does a job in a worker, so it can be pickled and holds names and paths alone.
        ended: called with each job's name as its task ends, in the order in which they do.

    Raises:
        BadInputError: no Ray, no cluster at the address, or a job that refuses its input.
        RunFailedError: as of `JobList.do`.
    """
    ray = _import()
    with cluster.connected():
        gpus = cluster.gpus
        if gpus is None:
            gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))
        # A fresh process for every job: it leaves no memory of a GPU behind.
        task = ray.remote(num_cpus=cluster.cpus, num_gpus=gpus, max_calls=1)(_do)
        while (left := jobs.open()) and not jobs.closed():
            outcomes, began = set(), time.monotonic()
            tasks = {task.remote(str(jobs.folder), name, work): name for name in left}
            while tasks:
                ready = ray.wait(list(tasks), num_returns=1)[0][0]
                name = tasks.pop(ready)
                outcomes.add(_outcome(ray, ready, jobs, name))
                ended(name)
            if outcomes == {"taken"}:
                time.sleep(pause(time.monotonic() - began))


def pause(seconds: float) -> float:
    """Return how long to wait after a look at jobs that all were taken, which took `seconds`.

    A look starts a process for each and opens a model there, so the pause is the longer part.
    """
    return max(joblist.WAIT_S, min(2 * seconds, LONGEST_S))


def _do(folder: str, name: str, work: Work) -> str:
    """Do one job; this runs in a worker."""
    # A worker that died on another host has a claim still, which only time refutes.
    return JobList(Path(folder), (name,)).do(name, work, wait=True)


def _outcome(ray: Any, task: Any, jobs: JobList, name: str) -> str:
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ResaLensError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        # Ray has begun it again as often as it does: its worker dies each time, or has no memory.
        jobs.fail(name, " ".join(str(error).split())[:300])
        return "done"


def _import() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "ray":
            raise BadInputError(INSTALL) from error
        raise BadInputError(f"Ray is installed and cannot be imported: {error}") from error
