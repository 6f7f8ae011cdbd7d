"""What it costs to share a list of jobs: CPU and file operations a job, a look at the workspace.

    python -m benchmarks.many_jobs share [--jobs 1000] [--workers 64] [--seconds 1.0]
    python -m benchmarks.many_jobs lookup [--artifacts 1000]

`share` starts workers on fake jobs that only wait, each worker as if it were a host of its own, so
that all they know of each other comes through the folder.  It counts how often each job was begun.
`lookup` searches a workspace for an identity that it does not hold, as a job does for its adapter
and for its evaluation before it makes them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from resa_lens.jobs.joblist import JobList
from resa_lens.resources import data_path

OPERATIONS = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
"""What Python tells an audit hook; a `stat` is not among it."""


def cpu_seconds() -> float:
    """Return the CPU that this process has taken."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def work_through(folder: Path, n: int, seconds: float) -> None:
    """Be one worker, and print what it did and took."""
    jobs = JobList(folder, tuple(f"j{i:04d}" for i in range(n)))
    operations: Counter[str] = Counter()
    sys.addaudithook(
        lambda event, args: (
            operations.update([event])
            if event in OPERATIONS and str(folder) in str(args[0] if args else "")
            else None
        )
    )
    before = cpu_seconds()
    done = jobs.share(lambda name: time.sleep(seconds), stay=False)
    print(json.dumps({"done": done, "cpu": cpu_seconds() - before, "operations": operations}))


def share(n: int, workers: int, seconds: float) -> None:
    """Let workers share jobs, and print what a job costs beyond its own work."""
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, "-m", "benchmarks.many_jobs", "worker", place, str(n)]
        began = time.monotonic()
        crew = [
            subprocess.Popen(
                [*words, str(seconds)], stdout=subprocess.PIPE, text=True,
                env={**os.environ, "RESA_LENS_HOST": f"host-{i}"},
            )
            for i in range(workers)
        ]  # fmt: skip
        ended = [json.loads(process.communicate()[0]) for process in crew]
        wall = time.monotonic() - began
        records = len(list(Path(place).glob("jobs/*.json")))
    begun = Counter(name for one in ended for name in one["done"])
    operations = sum((Counter(one["operations"]) for one in ended), Counter())
    cpu = 1000 * sum(one["cpu"] for one in ended) / n
    per_job = sum(operations.values()) / n
    print(f"{n} jobs of {seconds:g} s, {workers} workers: {wall:.0f} s (alone {n * seconds:.0f} s)")
    print(f"finished {records}, done more than once {sum(x > 1 for x in begun.values())}")
    print(f"a job costs {cpu:.0f} ms of CPU and {per_job:.0f} file operations:")
    print("  " + ", ".join(f"{name} {times / n:.1f}" for name, times in operations.most_common()))


def lookup(n: int) -> None:
    """Print what a search for an identity costs beside so many artifacts."""
    from resa_lens.artifacts.kinds.adapter import Adapter
    from resa_lens.artifacts.workspace import Workspace

    shipped = next(data_path("workspace").glob("adapters/*/manifest.json"))
    with tempfile.TemporaryDirectory() as place:
        for i in range(n):
            folder = Path(place) / "adapters" / f"m-{i:012x}"
            folder.mkdir(parents=True)
            shutil.copy(shipped, folder)
        workspace, before = Workspace(place), cpu_seconds()
        assert workspace.lookup(Adapter, "0" * 64, Path(place) / "adapters" / "m-new") is None
        print(f"a search beside {n} artifacts: {1000 * (cpu_seconds() - before):.0f} ms of CPU")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parts = parser.add_subparsers(dest="part", required=True)
    shared = parts.add_parser("share")
    shared.add_argument("--jobs", type=int, default=1000)
    shared.add_argument("--workers", type=int, default=64)
    shared.add_argument("--seconds", type=float, default=1.0)
    parts.add_parser("lookup").add_argument("--artifacts", type=int, default=1000)
    worker = parts.add_parser("worker")
    worker.add_argument("folder", type=Path)
    worker.add_argument("jobs", type=int)
    worker.add_argument("seconds", type=float)
    args = parser.parse_args()
    if args.part == "share":
        share(args.jobs, args.workers, args.seconds)
    elif args.part == "lookup":
        lookup(args.artifacts)
    else:
        work_through(args.folder, args.jobs, args.seconds)


if __name__ == "__main__":
    main()
