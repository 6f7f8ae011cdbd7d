"""A list of jobs: each done once by whatever workers there are, none lost with a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from resa_lens import claims
from resa_lens.errors import BadInputError, RunFailedError, TakenError
from resa_lens.files import run_lock
from resa_lens.jobs import joblist
from resa_lens.jobs.joblist import JobList

WORKER = """
import errno, fcntl, json, os, resource, sys, time
from pathlib import Path
from resa_lens.files import write_errors
from resa_lens.jobs import joblist
from resa_lens.jobs.joblist import JobList

def no_locks(*_):
    raise OSError(errno.ENOLCK, "no locks")

folder, n, seconds, stay, locks = Path(sys.argv[1]), *map(float, sys.argv[2:6])
if not locks:
    fcntl.flock = no_locks
joblist.WAIT_S = 0.2

def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

def append(name, line):
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\\n".encode())
    os.close(descriptor)

def work(name):
    append("begun.txt", name)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(seconds / 10)
    with write_errors(folder):  # as every stage before it publishes
        append("done.txt", name)
    return int(name[1:]) ** 2

jobs = JobList(folder / "work", tuple(f"j{i}" for i in range(int(n))))
started = cpu()
mine = jobs.share(work, stay=bool(stay))
print(json.dumps({"jobs": mine, "left": jobs.open(), "cpu": cpu() - started}))
"""
"""FOLDER JOBS SECONDS STAY LOCKS: a worker of fake jobs; a job's result is its number's square."""


class Crew:
    """Workers of one folder, ended with the test."""

    def __init__(self, folder: Path, jobs: int, seconds: float, *, stay=True, locks=True) -> None:
        self.folder, self.jobs = folder, jobs
        self.words = [str(folder), str(jobs), str(seconds), str(int(stay)), str(int(locks))]
        self.processes: list[subprocess.Popen] = []

    def start(self, host: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *self.words], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "RESA_LENS_HOST": host},
        )  # fmt: skip
        self.processes.append(process)
        return process

    def end(self, process: subprocess.Popen) -> dict:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return json.loads(out)

    def lines(self, name: str) -> Counter[str]:
        return Counter((self.folder / name).read_text().split())

    def results(self) -> dict[str, int]:
        files = (self.folder / "work" / "jobs").glob("*.json")
        return {file.stem: json.loads(file.read_text()) for file in files}

    def expected(self) -> dict[str, int]:
        return {f"j{i}": i**2 for i in range(self.jobs)}

    def busy(self) -> set[int]:
        """Numbers of the processes that are at a job."""
        numbers = set()
        for claim in (self.folder / "work").glob("locks/*/claim-*"):
            with suppress(FileNotFoundError):
                owner = claims.read(claim)[1]
                numbers |= {owner.process} if owner else set()
        return numbers

    def strike(self, process: subprocess.Popen, blow: signal.Signals) -> None:
        """Send a signal in the middle of a job, never between two."""
        deadline = time.monotonic() + 60
        while process.pid not in self.busy():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(blow)


@contextmanager
def crew(*args, **options) -> Iterator[Crew]:
    workers = Crew(*args, **options)
    try:
        yield workers
    finally:
        for process in workers.processes:
            process.kill()
            process.communicate()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("RESA_LENS_CLAIM_INTERVAL", "0.1")
    monkeypatch.setattr(joblist, "WAIT_S", 0.02)
    claims._LOOKS.clear()


@pytest.mark.parametrize("locks", [True, False])
def test_sixteen_workers_do_two_hundred_jobs_once_each(tmp_path, locks, monkeypatch):
    # The machine may be so busy that a worker stands still for a while and is no dead one.
    monkeypatch.setenv("RESA_LENS_CLAIM_INTERVAL", "2" if locks else "0.5")
    with crew(tmp_path, 200, 0.01, locks=locks) as workers:
        started = [workers.start(f"host-{i % 4}") for i in range(16)]
        ended = [workers.end(process) for process in started]
    assert workers.results() == workers.expected()
    assert set(workers.lines("begun.txt").values()) == {1}
    assert workers.lines("done.txt") == workers.lines("begun.txt")
    assert sorted(name for one in ended for name in one["jobs"]) == sorted(workers.expected())
    assert sum(one["cpu"] for one in ended) / 200 < 0.5


def test_what_workers_of_two_hosts_were_at_when_they_died_is_done_by_the_others(tmp_path):
    with crew(tmp_path, 8, 0.1) as workers:
        # Each is struck before the next one starts: none finds the list empty.
        for host in ("a", "a", "b"):
            workers.strike(workers.start(host), signal.SIGKILL)
        suspended = workers.start("b")
        workers.strike(suspended, signal.SIGSTOP)
        # Of a host where none was killed: only counters tell it anything.
        last = workers.end(workers.start("c"))
        assert last["left"] == []
        assert workers.results() == workers.expected()
        suspended.send_signal(signal.SIGCONT)
        woken = workers.end(suspended)
    # The woken one's job is the other's by now: it was begun twice and published once.
    assert set(workers.lines("done.txt").values()) == {1}
    assert set(workers.lines("done.txt")) == set(workers.expected())
    twice = [name for name, times in workers.lines("begun.txt").items() if times > 1]
    assert 1 <= len(twice) <= 4
    assert not set(woken["jobs"]) & set(last["jobs"])


def test_a_worker_that_does_not_stay_leaves_when_others_are_at_the_rest(tmp_path):
    with crew(tmp_path, 2, 0.5, stay=False) as workers:
        first = workers.start("a")
        workers.strike(first, signal.SIGCONT)
        ended = [workers.end(process) for process in (workers.start("b"), first)]
    assert sorted(name for one in ended for name in one["jobs"]) == ["j0", "j1"]
    # Whoever ends last sees that nothing is left, and may gather the results.
    assert [] in [one["left"] for one in ended]


def test_a_worker_that_does_not_stay_takes_over_what_a_dead_one_left(tmp_path):
    with crew(tmp_path, 3, 0.3, stay=False) as workers:
        dead = workers.start("a")
        workers.strike(dead, signal.SIGKILL)
        dead.wait()
        last = workers.end(workers.start("b"))
    assert sorted(last["jobs"]) == ["j0", "j1", "j2"]
    assert last["left"] == []
    assert workers.results() == workers.expected()


def jobs_in(folder: Path, *names: str, **options) -> JobList:
    return JobList(folder / "work", names, **options)


def test_a_failed_job_is_over_and_says_why_until_it_is_tried_again(tmp_path):
    jobs, seen = jobs_in(tmp_path, "a", "b"), []

    def work(name: str) -> str:
        seen.append(name)
        if seen == ["a"]:
            raise RunFailedError("the loss is nan")
        return f"{name} is done"

    assert jobs.share(work) == ["a", "b"]
    assert (jobs.failed(), jobs.open()) == ({"a": "the loss is nan"}, [])
    assert json.loads(jobs.record("b").read_text()) == "b is done"
    jobs.retry(jobs.failed())
    assert (jobs.failed(), jobs.open()) == ({}, ["a"])
    assert jobs.share(work) == ["a"]
    assert seen == ["a", "b", "a"]


def test_bad_input_ends_the_worker_and_leaves_the_job_open(tmp_path):
    jobs = jobs_in(tmp_path, "a")

    def work(name: str) -> None:
        raise BadInputError("no such data")

    with pytest.raises(BadInputError, match="no such data"):
        jobs.share(work)
    assert (jobs.open(), jobs.failed()) == (["a"], {})
    assert jobs.share(str) == ["a"]


def test_outcomes_of_one_job(tmp_path):
    jobs = jobs_in(tmp_path, "a")

    def taken(name: str) -> None:
        raise TakenError("process 1 is tuning")

    assert jobs.do("a", taken) == "taken"
    with run_lock(jobs.folder / "locks" / "a"):
        assert jobs.do("a", str) == "taken"
        # Without staying there is nothing to wait for: the holder lives.
        assert jobs.share(str, stay=False) == []
    assert jobs.open() == ["a"]
    assert jobs.do("a", str) == "done"
    assert jobs.do("a", taken) == "over"


def test_a_worker_that_does_not_stay_leaves_work_that_another_command_is_at(tmp_path):
    looks: list[int] = []
    jobs = jobs_in(tmp_path, "a", "b", closed=lambda: len(looks) > 9 or looks.append(1) or False)

    def work(name: str) -> None:
        if name == "a":
            raise TakenError("another command is training")

    assert jobs.share(work, stay=False) == ["b"]
    assert jobs.open() == ["a"]
    assert len(looks) < 9


def test_a_list_that_is_closed_meanwhile_begins_nothing(tmp_path):
    seen: list[str] = []
    # The one that gathers the results clears the folder: every job then looks open.
    jobs = jobs_in(tmp_path, "a", "b", "c", closed=lambda: len(seen) == 1)
    assert jobs.share(seen.append) == ["a"]
    assert jobs.do("b", seen.append) == "over"
    assert seen == ["a"]


def test_progress_counts_every_job_once(tmp_path):
    steps: list[int] = []
    jobs = jobs_in(tmp_path, "a", "b", "c")
    jobs.do("b", str)
    jobs.fail("c", "no reason")
    assert jobs.share(str, advance=steps.append) == ["a"]
    assert sum(steps) == 3
    assert steps[0] == 2
