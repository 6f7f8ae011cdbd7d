"""Ray hands jobs out: what one command line says without it, and a real local cluster of two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from resa_lens import claims
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.jobs import cluster
from resa_lens.jobs.cluster import Cluster, hand_out
from resa_lens.jobs.joblist import JobList

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed here")


def refused(*options: str, command: str = "sweep") -> str:
    done = CliRunner().invoke(app, [command, *options])
    assert done.exit_code == 2
    return done.stderr


def test_without_ray_one_line_says_how_to_get_it(monkeypatch, tmp_path):
    # As Python itself has it of a module that cannot be found.
    monkeypatch.setitem(sys.modules, "ray", None)
    text = refused("--ray", "local", "--workspace", str(tmp_path / "w"))
    assert "--ray needs Ray, which is not installed here" in text
    assert "resa-lens[ray]" in text
    assert len(text.strip().splitlines()) == 1
    assert not (tmp_path / "w").exists()


def test_a_ray_that_cannot_be_imported_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('libray.so: cannot open it')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert "cannot be imported: libray.so: cannot open it" in refused("--ray", "local")


@pytest.fixture
def any_ray(monkeypatch):
    """A module of this name: what is refused needs no more of it."""
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))


@pytest.mark.parametrize("command", ["sweep", "falsify"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--join", "--ray", "local"), "--join and --ray local: give one"),
        (("--join", "--force"), "--force with --join"),
        (("--ray", "local", "--force"), "--force with --ray"),
        (("--gpus-per-job", "0.5"), "--gpus-per-job 0.5 goes with --ray"),
        (("--ray", "cluster"), "--ray 'cluster' is no address"),
        (("--ray", "127.0.0.1:9"), "--ray 127.0.0.1:9: nothing answers there"),
        (("--ray", "ray://127.0.0.1:many"), "nothing answers there"),
        (("--ray", "local", "--gpus-per-job", "-1"), "--gpus-per-job -1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(any_ray, command, options, text):
    assert text in refused(*options, command=command)


def test_a_look_at_taken_jobs_takes_less_time_than_the_pause_after_it(tmp_path, monkeypatch):
    """Without Ray: to start a process takes 20 s, and the third look finds the job free."""
    clock, pauses = [0.0], []

    def remote(*_):
        clock[0] += 20
        if len(pauses) < 2:
            return "taken"
        jobs.fail("a", "no reason")
        return "done"

    fake = SimpleNamespace(
        is_initialized=lambda: True,
        cluster_resources=dict,
        remote=lambda **_: lambda _: SimpleNamespace(remote=remote),
        wait=lambda tasks, num_returns: (tasks, []),
        get=str,
    )
    monkeypatch.setattr(cluster, "_import", lambda: fake)
    monkeypatch.setattr(
        cluster, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=pauses.append)
    )
    jobs = JobList(tmp_path, ("a",))
    hand_out(Cluster(), jobs, str, lambda _: None)
    assert pauses == [40.0, 40.0]


WORK = """
import json, os, time
from pathlib import Path

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.files import write_errors


def append(file, line):
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\\n".encode())
    os.close(descriptor)


class Work:
    def __init__(self, folder, seconds):
        self.folder, self.seconds = folder, seconds

    def __call__(self, name):
        place = Path(self.folder)
        append(place / "begun.txt", f"{name} {os.getpid()}")
        time.sleep(self.seconds)
        if name == "diverges":
            raise RunFailedError("the loss is nan")
        if name == "bad":
            raise BadInputError("no such data")
        if name == "dies":
            os.kill(os.getpid(), 9)
        with write_errors(place):
            append(place / "done.txt", name)
        return len(name)
"""
"""A module that driver and workers import: fake jobs, whose results are their names' lengths."""
DRIVER = """
import sys
from pathlib import Path

from ray_work import Work
from resa_lens.jobs.cluster import Cluster, hand_out
from resa_lens.jobs.joblist import JobList

folder, seconds, *names = sys.argv[1:]
jobs = JobList(Path(folder) / "work", tuple(names))
ended = []
hand_out(Cluster("local"), jobs, Work(folder, float(seconds)), ended.append)
print(*ended)
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "ray_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    paths = (str(tmp_path), str(Path(cluster.__file__).parents[2]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("RESA_LENS_CLAIM_INTERVAL", "0.2")
    return tmp_path


def drive(place: Path, seconds: float, *names: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(place), str(seconds), *names], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def lines(place: Path, name: str) -> list[str]:
    file = place / name
    return file.read_text().splitlines() if file.exists() else []


def until(place: Path, begun: int, driver: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while len(lines(place, "begun.txt")) < begun:
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.05)


def results(place: Path) -> dict[str, int]:
    return {f.stem: json.loads(f.read_text()) for f in (place / "work" / "jobs").glob("*.json")}


NAMES = ("a", "bb", "ccc", "dddd", "eeeee", "ffffff")
WHOLE = {name: len(name) for name in NAMES}


@needs_ray
@pytest.mark.recorded
def test_a_killed_worker_loses_the_job_it_was_at_and_nothing_else(place):
    driver = drive(place, 1.0, *NAMES)
    until(place, 2, driver)
    name, process = lines(place, "begun.txt")[1].split()
    os.kill(int(process), signal.SIGKILL)
    out, err = driver.communicate(timeout=200)
    assert driver.returncode == 0, err
    assert results(place) == WHOLE
    assert sorted(out.split()) == sorted(NAMES)
    begun = [line.split()[0] for line in lines(place, "begun.txt")]
    assert begun.count(name) == 2
    assert len(begun) == len(NAMES) + 1
    assert sorted(lines(place, "done.txt")) == sorted(NAMES)
    # Each job had a process of its own.
    assert len({line.split()[1] for line in lines(place, "begun.txt")}) == len(begun)


@needs_ray
@pytest.mark.recorded
def test_a_killed_driver_is_begun_again_where_it_was(place):
    driver = drive(place, 1.0, *NAMES)
    until(place, 4, driver)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    kept = results(place)
    assert kept
    assert kept != WHOLE
    again = drive(place, 0.1, *NAMES)
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    assert results(place) == WHOLE
    assert sorted(lines(place, "done.txt")) == sorted(NAMES)
    assert not set(out.split()) & set(kept)


@needs_ray
@pytest.mark.recorded
def test_failures_bad_input_and_workers_that_always_die(place):
    from ray_work import Work  # pyright: ignore[reportMissingImports]

    jobs = JobList(place / "work", ("diverges", "dies", "fine"))
    ended: list[str] = []
    hand_out(Cluster("local"), jobs, Work(str(place), 0.0), ended.append)
    assert sorted(ended) == ["dies", "diverges", "fine"]
    assert results(place) == {"fine": 4}
    assert jobs.failed()["diverges"] == "the loss is nan"
    assert "died" in jobs.failed()["dies"]
    with pytest.raises(BadInputError, match="no such data"):
        hand_out(Cluster("local"), JobList(place / "work", ("bad",)), Work(str(place), 0.0), print)


SWEEP = (
    "sweep", "--layers", "4,5", "--seeds", "2", "--steps", "3", "--limit", "12", "--rank", "4",
    "--learning-rate", "1e-3", "--no-effects", "--json", "--workspace",
)  # fmt: skip


def sweep(workspace: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "resa_lens", *SWEEP, str(workspace), *options], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def at_work(workspace: Path) -> list[int]:
    """Numbers of the processes that are at a job of a sweep."""
    numbers = []
    for claim in workspace.glob("sweeps/.work-*/locks/*-s*/claim-*"):
        with suppress(FileNotFoundError):
            owner = claims.read(claim)[1]
            numbers += [owner.process] if owner else []
    return numbers


@needs_ray
@pytest.mark.recorded
def test_a_sweep_whose_worker_and_driver_are_killed_ends_as_that_of_one_process(
    demo, tmp_path, monkeypatch
):
    import shutil

    for name in ("alone", "shared"):
        shutil.copytree(demo.workspace / "saes", tmp_path / name / "saes")
    out, err = sweep(tmp_path / "alone").communicate(timeout=600)
    expected = json.loads(out)
    shared = tmp_path / "shared"
    for blow in ("worker", "driver"):
        driver = sweep(shared, "--ray", "local")
        deadline = time.monotonic() + 300
        while not (busy := at_work(shared)):
            assert time.monotonic() < deadline
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.05)
        if blow == "worker":
            os.kill(busy[0], signal.SIGKILL)
            # Its job is begun again, and another one ends.
            while not list(shared.glob("sweeps/.work-*/jobs/*.json")):
                assert time.monotonic() < deadline
                assert driver.poll() is None, driver.communicate()
                time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    driver = sweep(shared, "--ray", "local")
    out, err = driver.communicate(timeout=600)
    assert driver.returncode == 0, err
    ended = json.loads(out)
    for key in ("jobs", "scores", "layers", "selectors", "power", "n"):
        assert ended[key] == expected[key], key
    identities = [
        {json.loads(file.read_text())["identity"] for file in (tmp_path / name).glob(glob)}
        for glob in ("adapters/*/manifest.json", "evals/*/manifest.json")
        for name in ("alone", "shared")
    ]
    assert identities[0] == identities[1]
    assert identities[2] == identities[3]
