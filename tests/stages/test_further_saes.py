"""The trainings of a falsification are jobs: equal workers share them, and Ray may do them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from resa_lens import claims
from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import LOCK, Workspace
from resa_lens.errors import BadInputError, RunFailedError, TakenError
from resa_lens.features.exclusive import CountConfig
from resa_lens.features.falsify import FalsifyConfig
from resa_lens.files import run_lock
from resa_lens.jobs import joblist
from resa_lens.jobs.cluster import Cluster
from resa_lens.models import host
from resa_lens.progress import Reporter
from resa_lens.saes.train import SaeConfig
from resa_lens.stages import falsification, further_saes, job_stage, sae_training
from resa_lens.stages.counts import count_run
from resa_lens.stages.falsification import FalsificationRun, falsify_join, falsify_run
from resa_lens.stages.further_saes import OTHER_SEED, RANDOM_WEIGHTS
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.saes import find_saes
from resa_lens.texts.corpora import CorpusConfig

LAYERS = [4]
SAE = SaeConfig(latents=512, k=16, tokens=8192)
FEW = FalsifyConfig(texts=4, shuffles=3)
BOTH = [OTHER_SEED, RANDOM_WEIGHTS]


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def opened(place: Path, tiny) -> Context:
    ctx = Context(Workspace(place), Notes())
    ctx.models["tiny-reasoner|"] = tiny
    return ctx


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny) -> Path:
    """SAEs with counted features, and nothing beside them."""
    place = tmp_path_factory.mktemp("prepared") / "workspace"
    ctx = opened(place, tiny)
    saes = train_run(ctx, tiny, LAYERS, SAE, CorpusConfig())
    counts = count_run(ctx, tiny, saes, CountConfig(), LAYERS)
    assert any(counts.counts.layers[0].features.values()), "nothing is counted: shows nothing"
    return place


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory, tiny) -> FalsificationRun:
    """What one process comes to."""
    return falsify_run(*ingredients(prepared, tmp_path_factory.mktemp("alone") / "w", tiny))


def ingredients(prepared: Path, place: Path, tiny) -> tuple:
    """Return the arguments of `falsify_run` in a copy of the prepared workspace."""
    if not place.exists():
        shutil.copytree(prepared, place)
    ctx = opened(place, tiny)
    saes = find_saes(ctx, tiny, SAE, CorpusConfig(), LAYERS)
    assert saes is not None
    return ctx, tiny, saes, count_run(ctx, tiny, saes, CountConfig(), LAYERS), FEW


@pytest.fixture
def given(prepared, tmp_path, tiny) -> tuple:
    return ingredients(prepared, tmp_path / "w", tiny)


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The models on which SAEs are trained from now on."""
    names, plain = [], further_saes.train_job

    def train(ctx, job, **options):
        run = plain(ctx, job, **options)
        names.extend([job.model.name] * run.fresh)
        return run

    monkeypatch.setattr(further_saes, "train_job", train)
    return names


def stage_of(given: tuple) -> falsification._Falsification:
    plain = falsification.PLAIN_TEXTS
    return falsification._stage(*given, plain_texts=plain, other_seed=True, random_weights=True)


def facts(run: FalsificationRun | None) -> dict[str, Any]:
    """Return all that does not depend on where and when."""
    assert run is not None
    manifest = run.artifact.manifest
    files = {name: digest for name, digest in manifest.files.items() if name.endswith(".json")}
    return {
        "features": run.features, "summary": run.summary, "trials": run.trials,
        "skipped": run.skipped, "identity": manifest.identity, "parents": manifest.parents,
        "files": files, "names": sorted(manifest.files),
    }  # fmt: skip


def test_a_worker_that_joins_trains_what_no_other_is_at_and_the_last_one_judges(
    given, alone, trained, monkeypatch
):
    monkeypatch.setattr(joblist, "WAIT_S", 0.01)
    stage = stage_of(given).stage
    with run_lock(stage.work / "locks" / OTHER_SEED):
        first = falsify_join(*given)
    assert (first.jobs, first.left, first.run) == ([RANDOM_WEIGHTS], [OTHER_SEED], None)
    assert not stage.folder.exists()
    last = falsify_join(*given)
    assert (last.jobs, last.left) == ([OTHER_SEED], [])
    assert facts(last.run) == facts(alone)
    assert len(trained) == 2
    assert not stage.work.exists()
    # Nothing is left to do: nobody waits, and nothing is trained.
    late = falsify_join(*given)
    assert (late.jobs, late.left) == ([], [])
    assert facts(late.run) == facts(alone)
    assert len(trained) == 2


def test_saes_that_are_there_are_not_trained_and_another_workers_verdicts_not_waited_for(
    given, alone, trained
):
    falsify_run(*given)
    shutil.rmtree(given[0].workspace.path("falsified"))
    assert len(trained) == 2
    stage = stage_of(given)
    assert stage.names == (RANDOM_WEIGHTS,)
    with run_lock(stage.stage.work / "locks" / "tables"):
        share = falsify_join(*given)
    assert (share.left, share.run) == ([], None)
    assert facts(falsify_join(*given).run) == facts(alone)
    assert len(trained) == 2


def test_without_jobs_no_folder_is_made_for_them(given, monkeypatch):
    stages: list[Path] = []
    plain = job_stage.JobStage.gather

    def gather(stage, **options):
        stages.append(stage.stage.work)
        assert not stages[-1].exists()
        return plain(stage, **options)

    monkeypatch.setattr(job_stage.JobStage, "gather", gather)
    share = falsify_join(*given, other_seed=False, random_weights=False)
    assert stages
    assert (share.jobs, share.left) == ([], [])
    assert share.run is not None


def test_a_training_that_fails_ends_the_run_and_is_tried_again(given, alone, monkeypatch):
    plain = further_saes.train_job

    def fails(ctx, job, **options):
        if "random" in job.model.name:
            raise RunFailedError("the loss is nan")
        return plain(ctx, job, **options)

    monkeypatch.setattr(further_saes, "train_job", fails)
    with pytest.raises(RunFailedError, match="the loss is nan"):
        falsify_run(*given)
    monkeypatch.setattr(further_saes, "train_job", plain)
    assert facts(falsify_run(*given)) == facts(alone)


def test_texts_that_cannot_be_used_are_refused_before_any_training(given, trained):
    with pytest.raises(BadInputError, match="plain"):
        falsify_run(*given, plain_texts=["one alone"])
    assert trained == []
    assert not given[0].workspace.path("falsified").exists()


def training_lock(given: tuple, alone: FalsificationRun) -> AbstractContextManager[None]:
    """Take the other seed's training itself, as `train-saes` does."""
    ctx, _, saes, *_ = given
    (relative,) = (
        parent
        for parent in alone.artifact.manifest.parents
        if parent.startswith("saes/") and parent != saes.relative and "random" not in parent
    )
    folder = ctx.workspace.path(relative)
    return run_lock(folder.with_name(f".work-{folder.name}") / LOCK)


def test_a_worker_that_joins_leaves_a_training_to_another_command(given, alone):
    with training_lock(given, alone):
        share = falsify_join(*given, random_weights=False)
    assert (share.jobs, share.left, share.run) == ([], [OTHER_SEED], None)
    lines = given[0].reporter.lines
    assert sum(line.startswith(f"{OTHER_SEED}: ") for line in lines) == 1
    assert not any(line.startswith("another seed's SAEs") for line in lines)


def test_a_look_at_a_training_of_another_command_reads_no_data_and_says_nothing_new(
    given, alone, monkeypatch
):
    plain, jobs = further_saes.sae_job, []
    monkeypatch.setattr(further_saes, "sae_job", lambda *args: jobs.append(args) or plain(*args))

    def train(*_):
        raise RunFailedError("far enough")

    monkeypatch.setattr(sae_training, "_train_groups", train)
    further = stage_of(given).further
    with training_lock(given, alone):
        for _ in range(3):
            with pytest.raises(TakenError):
                further(OTHER_SEED)
    with pytest.raises(RunFailedError, match="far enough"):
        further(OTHER_SEED)
    assert len(jobs) == 1
    lines = given[0].reporter.lines
    assert sum(line.startswith(f"{OTHER_SEED}: ") for line in lines) == 1
    assert sum(line.startswith("another seed's SAEs") for line in lines) == 1


def test_workers_of_another_device_train_in_the_drivers_dtype_and_nothing_is_trained_twice(
    given, alone, trained, monkeypatch
):
    """Without Ray or a GPU: "auto" resolves and random weights come out as on another device."""
    plain, draw, names = host.choose_device, further_saes.random_weights_model, []

    def choose(device, dtype):
        return plain(device, "bfloat16" if dtype == "auto" else dtype)

    def drawn(model, *args, **options):
        random = draw(model, *args, **options)
        random.weights_hash = "0" * 64
        return random

    def hand_out(cluster, jobs, work, notify):
        packed = pickle.dumps(work)
        with monkeypatch.context() as there:
            there.setattr(host, "choose_device", choose)
            there.setattr(further_saes, "random_weights_model", drawn)
            for name in jobs.open():
                assert jobs.do(name, pickle.loads(packed)) == "done"
                names.append(json.loads(jobs.record(name).read_text()))

    monkeypatch.setattr(job_stage, "hand_out", hand_out)
    monkeypatch.setattr(Cluster, "connected", lambda _: nullcontext())
    run = falsify_run(*given, cluster=Cluster())
    assert len(trained) == 2
    assert set(names) < set(run.artifact.manifest.parents)
    assert (run.features, run.summary) == (alone.features, alone.summary)


def test_what_a_worker_of_ray_is_told_is_enough(given, alone, monkeypatch):
    """Without Ray: each job is done by what is left of it in a pickle."""
    ended: list[str] = []

    def hand_out(cluster, jobs, work, notify):
        packed = pickle.dumps(work)
        assert len(packed) < 20_000
        for name in jobs.open():
            assert jobs.do(name, pickle.loads(packed)) == "done"
            ended.append(name)
            notify(name)

    monkeypatch.setattr(job_stage, "hand_out", hand_out)
    monkeypatch.setattr(Cluster, "connected", lambda _: nullcontext())
    ctx = given[0]
    assert facts(falsify_run(*given, cluster=Cluster())) == facts(alone)
    assert ended == BOTH
    for number, name in enumerate(BOTH, 1):
        assert any(
            line.startswith(f"{name}: SAEs in saes/") and line.endswith(f"{number} of 2")
            for line in ctx.reporter.lines
        )
    # The driver opens them where the records say.
    for name in BOTH:
        assert any(line.startswith(f"{name}: using ") for line in ctx.reporter.lines)


COMMAND = (
    "falsify", "--layers", "4", "--latents", "512", "--k", "16", "--tokens", "8192",
    "--texts", "4", "--shuffles", "3", "--json",
)  # fmt: skip


@contextmanager
def workers(place: Path, n: int, *how: str) -> Iterator[list[subprocess.Popen]]:
    """Start equal workers, or the driver of a cluster; none outlives the test."""
    words = [*COMMAND, "--workspace", str(place), *(how or ("--join",))]
    crew = [
        subprocess.Popen(
            [sys.executable, "-m", "resa_lens", *words], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(n)
    ]  # fmt: skip
    try:
        yield crew
    finally:
        for process in crew:
            process.kill()
            process.communicate()


def at_work(place: Path) -> dict[int, str]:
    """The trainings that are under way, by the process that is at each."""
    owners = {}
    for claim in place.glob("falsified/*/.work-*/locks/*/claim-*"):
        with suppress(FileNotFoundError):
            if owner := claims.read(claim)[1]:
                owners[owner.process] = claim.parent.name
    return owners


def trainings(place: Path) -> int:
    return len(list(place.glob("saes/*/*/manifest.json")))


def ended_as(place: Path, out: str, alone: FalsificationRun) -> bool:
    """Whether a worker's verdicts are those of one process."""
    value = json.loads(out)
    whole = {"features": alone.features, "summary": alone.summary, "trials": alone.trials}
    identities = {
        json.loads(file.read_text())["identity"]
        for file in place.glob("falsified/*/*/manifest.json")
    }
    return (
        {key: value[key] for key in whole} == json.loads(json.dumps(whole))
        and identities == {alone.artifact.manifest.identity}
        and not list(place.glob("falsified/*/.work-*"))
    )


@pytest.mark.recorded
def test_two_workers_train_each_control_once_and_come_to_what_one_process_does(
    prepared, alone, tmp_path
):
    place = tmp_path / "w"
    shutil.copytree(prepared, place)
    with workers(place, 2) as crew:
        ended = [process.communicate(timeout=300) for process in crew]
        assert [process.returncode for process in crew] == [0, 0], ended
    values = [json.loads(out) for out, _ in ended]
    assert sorted(name for value in values for name in value["joined"]["jobs"]) == BOTH
    assert trainings(place) == 3
    assert any("features" in v and ended_as(place, out, alone)
               for v, (out, _) in zip(values, ended, strict=True))  # fmt: skip


@pytest.mark.slow
def test_a_worker_takes_over_the_training_of_one_that_is_killed_in_it(prepared, alone, tmp_path):
    place = tmp_path / "w"
    shutil.copytree(prepared, place)
    with workers(place, 2) as crew:
        deadline = time.monotonic() + 200
        while len(busy := at_work(place)) < 2:
            assert time.monotonic() < deadline
            assert all(p.poll() is None for p in crew), [p.communicate() for p in crew if p.poll()]
            time.sleep(0.005)
        assert sorted(busy.values()) == BOTH
        killed, other = crew
        assert killed.pid in busy
        killed.send_signal(signal.SIGKILL)
        out, err = other.communicate(timeout=300)
        assert other.returncode == 0, err
    assert sorted(json.loads(out)["joined"]["jobs"]) == BOTH
    assert trainings(place) == 3
    assert ended_as(place, out, alone)


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed here")
@pytest.mark.recorded
def test_ray_trains_the_controls_side_by_side_and_a_killed_driver_is_begun_again(
    prepared, alone, tmp_path
):
    place = tmp_path / "w"
    shutil.copytree(prepared, place)
    with workers(place, 1, "--ray", "local") as (driver,):
        deadline = time.monotonic() + 200
        while len(busy := at_work(place)) < 2:
            assert time.monotonic() < deadline
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.005)
        assert sorted(busy.values()) == BOTH
        driver.send_signal(signal.SIGKILL)
    with workers(place, 1, "--ray", "local") as (driver,):
        out, err = driver.communicate(timeout=300)
        assert driver.returncode == 0, err
    assert trainings(place) == 3
    assert ended_as(place, out, alone)
