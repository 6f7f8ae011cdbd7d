"""A sweep does its jobs once, goes on after kill -9, and is shared by processes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from resa_lens import claims
from resa_lens.artifacts.artifact import Parent
from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError, RunFailedError, TakenError
from resa_lens.evals.run import EvalConfig
from resa_lens.files import run_lock
from resa_lens.jobs import joblist
from resa_lens.jobs.joblist import JobList
from resa_lens.progress import Reporter
from resa_lens.saes.train import SaeConfig
from resa_lens.stages import sweep as sweeps
from resa_lens.stages import sweep_tunings
from resa_lens.stages.scores import load_eval_items
from resa_lens.stages.sweep import sweep_join, sweep_run
from resa_lens.stages.sweep_jobs import SweepConfig, jobs_of
from resa_lens.stages.tune_job import TuneJob
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.tuning.loop import TuneConfig
from resa_lens.tuning.objective import preset

LAYERS = (4, 5)


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def prepared(demo, tmp_path_factory) -> Path:
    """The demo's SAEs alone: adapters and evaluations are the sweep's own."""
    place = tmp_path_factory.mktemp("sweep") / "workspace"
    shutil.copytree(demo.workspace / "saes", place / "saes")
    return place


def config(**changes) -> SweepConfig:
    tune = TuneJob(
        model="tiny-reasoner",
        lora=TuneConfig(rank=4, learning_rate=1e-3),
        sae=SaeConfig(),
        steps=2,
        evaluation=EvalConfig(limit=12),
    )
    given = {"layers": LAYERS, "seeds": 2, "effects": False, **changes}
    return SweepConfig(tune=tune, **given)


@pytest.fixture
def ctx(prepared, tmp_path) -> Context:
    place = tmp_path / "workspace"
    shutil.copytree(prepared, place)
    return Context(Workspace(place), Notes())


def test_the_jobs_are_named_seed_by_seed():
    jobs = jobs_of(config(controls=("noise", "cot-free"), control_layers=(4,)), 12)
    first = ["L04-s0", "L05-s0", "L04-noise-s0", "cot-free-s0"]
    assert [job.name for job in jobs] == first + [name.replace("s0", "s1") for name in first]
    assert jobs[3].layer is None
    # By default all but the first and the last layer, controls at two depths.
    jobs = jobs_of(SweepConfig(TuneJob("m"), seeds=1, controls=("pca",)), 12)
    assert [job.layer for job in jobs if job.control is None] == list(range(1, 11))
    assert [job.layer for job in jobs if job.control] == [4, 7]


def test_a_layer_where_nothing_is_tuned_is_not_checked():
    tuning = TuneJob("m", objective=preset("reference"))
    asked = SweepConfig(tuning, layers=(3,), seeds=1, controls=("cot-free",), control_layers=(11,))
    assert [job.name for job in jobs_of(asked, 12)] == ["L03-s0", "cot-free-s0"]
    with pytest.raises(BadInputError, match="layer 11"):
        jobs_of(replace(asked, controls=("noise",)), 12)


def test_a_sweep_scores_every_job_and_is_read_again(ctx):
    asked = config(seeds=1, controls=("none", "cot-free"), control_layers=(4,))
    run = sweep_run(ctx, asked)
    folder, made = run.artifact.path, run.sweep
    names = {job["name"] for job in made.jobs}
    assert names == {job.name for job in jobs_of(asked, 12)}
    assert [row["layer"] for row in made.layers] == list(LAYERS)
    assert {row["control"] for row in made.controls} == {"none", "cot-free"}
    none = next(row for row in made.controls if row["control"] == "none")
    assert none["difference"] == 0  # nothing trains without an SAE
    for job in made.jobs:
        for kind in ("adapter", "eval"):
            assert ctx.workspace.read(ctx.workspace.path(job[kind])).manifest.kind == kind
    assert {p.name for p in folder.iterdir()} == {
        "manifest.json", "sweep.json", "scores.csv", "answers.parquet", "sweep.html",
    }  # fmt: skip
    assert not list(folder.parent.glob(".work-*"))
    # The jobs' cost is the jobs' own, not that of what comes after them.
    artifacts = ctx.workspace.artifacts()
    spent = {a.manifest.kind: a.manifest.cost["seconds"] for a in artifacts if a.manifest.cost}
    assert spent["counts"] < spent["adapter"]
    # Of the evaluation's stages nothing is said, of each job one line.
    assert sum(line.startswith("L0") for line in ctx.reporter.lines) == 3
    again = sweep_run(ctx, asked)
    assert (again.artifact.path, again.sweep) == (folder, made)
    assert "done before" in ctx.reporter.lines[-1]
    keys = {"jobs", "scores", "selectors"}
    assert keys <= set(made.to_dict())
    assert set(made.to_dict()["scores"][0]) == {"layer", "seed", "accuracy", "n"}


@pytest.mark.slow
def test_a_failed_job_is_named_and_left_out_and_tried_again(ctx, monkeypatch):
    real = sweep_tunings.adapter_run

    def fails(own, tune, saes):
        if tune.layer == "5":
            raise RunFailedError("the loss is nan")
        return real(own, tune, saes)

    monkeypatch.setattr(sweep_tunings, "adapter_run", fails)
    made = sweep_run(ctx, config(seeds=1)).sweep
    assert made.failed == {"L05-s0": "the loss is nan"}
    assert [row["layer"] for row in made.layers] == [4]
    assert any("L05-s0 failed" in line for line in ctx.reporter.lines)
    monkeypatch.setattr(sweep_tunings, "adapter_run", real)
    whole = sweep_run(ctx, config(seeds=1)).sweep
    assert whole.failed == {}
    assert [row["layer"] for row in whole.layers] == [4, 5]


def test_a_worker_that_joins_leaves_what_another_is_at_and_the_last_one_writes(ctx, monkeypatch):
    monkeypatch.setattr(joblist, "WAIT_S", 0.01)
    asked = config(seeds=1)
    stage = sweeps._plan(ctx, asked).stage
    with run_lock(stage.work / "locks" / "L04-s0"):
        first = sweep_join(ctx, asked)
    assert (first.jobs, first.left, first.run) == (["L05-s0"], ["L04-s0"], None)
    assert not stage.folder.exists()
    # A killed one begins where the jobs stand; what another command counts is waited for.
    count_run, counts = sweeps.count_run, []

    def taken_at_first(*args):
        counts.append(args)
        if len(counts) == 1:
            raise TakenError("process 1 is counting")
        return count_run(*args)

    monkeypatch.setattr(sweeps, "count_run", taken_at_first)
    last = sweep_join(ctx, asked)
    assert len(counts) == 2
    assert (last.jobs, last.left) == (["L04-s0"], [])
    assert [job["name"] for job in last.run.sweep.jobs] == ["L04-s0", "L05-s0"]
    assert not stage.work.exists()
    late = sweep_join(ctx, asked)
    assert (late.jobs, late.left) == ([], [])
    assert late.run.sweep == last.run.sweep == sweep_run(ctx, asked).sweep


def test_a_worker_that_joins_leaves_the_tables_to_the_one_that_is_at_them(ctx, monkeypatch):
    asked = config(seeds=1)
    plan = sweeps._plan(ctx, asked)
    for name in plan.jobs.names:
        plan.jobs.fail(name, "not tried")
    monkeypatch.setattr(JobList, "retry", lambda *_: None)
    with run_lock(plan.stage.work / "locks" / "tables"):
        share = sweep_join(ctx, asked)
    assert (share.jobs, share.left, share.run) == ([], [], None)


@pytest.mark.slow
def test_what_is_damaged_before_the_tables_is_made_again(ctx, monkeypatch):
    asked, damaged = config(seeds=1, layers=(4,)), []
    real = sweeps._Plan.gather

    def gather(plan, **options):
        record = plan.jobs.record("L04-s0")
        adapter = ctx.workspace.path(json.loads(record.read_text())[0][0])
        (adapter / "adapter_config.json").write_text("{}")
        damaged.append(adapter)
        return real(plan, **options)

    monkeypatch.setattr(sweeps._Plan, "gather", gather)
    assert len(sweep_run(ctx, asked).sweep.jobs) == 1
    assert next(ctx.workspace.read(damaged[0]).damage(), None) is None


@pytest.mark.slow
def test_one_job_in_a_worker_of_its_own_is_that_of_the_sweep(ctx, tmp_path):
    """What Ray's workers are told is enough, and makes the same artifacts."""
    asked = config(seeds=1, controls=("cot-free",), layers=(4,))
    plan = sweeps._plan(ctx, asked)
    remote = pickle.loads(pickle.dumps(plan.remote()))
    assert len(pickle.dumps(remote)) < 20_000
    apart = {name: remote(name) for name in plan.jobs.names}
    made = sweep_run(ctx, asked).sweep
    assert {job["name"]: [job["adapter"], job["eval"]] for job in made.jobs} == {
        name: [path for path, _ in pair] for name, pair in apart.items()
    }
    # Found, and not made a second time.
    assert not any(line.startswith("L04") for line in ctx.reporter.lines)


def test_other_data_is_another_sweep_and_test_questions_in_it_are_told(tmp_path, monkeypatch):
    folders = []

    def work(plan, **_):
        folders.append(plan.jobs.folder.name)
        raise RunFailedError("far enough")

    notes = Notes()
    own = Context(Workspace(tmp_path / "workspace"), notes)
    saes = SimpleNamespace(
        relative="saes", parent=lambda layers: Parent("0" * 64, "saes"), artifact=None
    )
    monkeypatch.setattr(sweeps, "saes_for", lambda *_, **__: saes)
    monkeypatch.setattr(sweeps, "score_base", lambda *_: (tmp_path, None))
    monkeypatch.setattr(sweeps._Plan, "share", work)
    data = tmp_path / "data.jsonl"
    plain = config()
    asked = replace(plain, tune=replace(plain.tune, elicitation=CorpusConfig(source=str(data))))
    known = load_eval_items("tiny", plain.tune.evaluation)[3]
    for question in ("What is 1+1?", "What is 1+2?", f" {known.question}\n"):
        data.write_text(json.dumps({"question": question, "answer": "2"}) + "\n")
        with pytest.raises(RunFailedError, match="far enough"):
            sweep_run(own, asked)
    assert len(set(folders)) == 3
    told = [line for line in notes.lines if "stand in the tuning data" in line]
    assert [line[:33] for line in told] == ["warning: 1 of 12 questions to sco"]


def test_one_question_is_refused_before_any_work(tmp_path):
    own = Context(Workspace(tmp_path / "workspace"), Notes())
    asked = config()
    one = replace(asked, tune=replace(asked.tune, evaluation=EvalConfig(limit=1)))
    with pytest.raises(BadInputError, match="1 question to score"):
        sweep_run(own, one)
    assert not (tmp_path / "workspace").exists()


def test_bad_input(ctx):
    with pytest.raises(BadInputError, match="control 'magic' is unknown"):
        config(controls=("magic",))
    with pytest.raises(BadInputError, match="seeds 0 is out of range"):
        config(seeds=0)
    with pytest.raises(BadInputError, match="rule 'most'"):
        config(rule="most")
    with pytest.raises(BadInputError, match="layer 12: the model has 0 to 11"):
        sweep_run(ctx, config(layers=(12,)))


COMMAND = (
    "sweep", "--layers", "4,5", "--seeds", "2", "--steps", "3", "--limit", "12", "--rank", "4",
    "--learning-rate", "1e-3", "--no-effects", "--json",
)  # fmt: skip


def start(workspace: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "resa_lens", *COMMAND, *more, "--workspace", str(workspace)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def results(text: str) -> dict:
    """What does not depend on where and when."""
    made = json.loads(text)
    return {key: made[key] for key in ("jobs", "scores", "layers", "selectors", "power", "n")}


@pytest.mark.recorded
def test_killed_sweeps_go_on_to_the_same_result(prepared, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, killed):
        shutil.copytree(prepared, place)
    out, err = start(whole).communicate(timeout=300)
    wanted = results(out)
    kills = 0
    for records in (1, 3):
        process = start(killed)
        deadline = time.monotonic() + 200
        while len(list(killed.glob("sweeps/.work-*/jobs/*.json"))) < records:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert not list(killed.glob("sweeps/*/sweep.json"))
    kept = {p: p.stat().st_mtime_ns for p in killed.glob("adapters/*/manifest.json")}
    out, err = start(killed).communicate(timeout=300)
    assert results(out) == wanted, err
    # What was finished is not made again.
    assert len(kept) >= 3
    assert all(p.stat().st_mtime_ns == made for p, made in kept.items())
    assert kills == 2


@pytest.mark.recorded
def test_two_processes_share_the_jobs(prepared, tmp_path):
    place = tmp_path / "workspace"
    shutil.copytree(prepared, place)
    both = [start(place, "--seeds", "5") for _ in range(2)]
    ended = [process.communicate(timeout=400) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    first, second = (results(out) for out, _ in ended)
    assert first == second
    done = [sum(line.startswith("L0") for line in err.splitlines()) for _, err in ended]
    assert min(done) >= 1
    assert sum(done) == 10


@pytest.mark.recorded
def test_four_workers_of_two_hosts_two_killed_and_one_suspended(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("RESA_LENS_CLAIM_INTERVAL", "0.5")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for place in (alone, shared):
        shutil.copytree(prepared, place)
    out, err = start(alone).communicate(timeout=300)
    expected = results(out)

    def at_work() -> dict[int, tuple[str, Path]]:
        """Host and claim of each process that is at a job."""
        owners = {}
        for claim in shared.glob("sweeps/.work-*/locks/*/claim-*"):
            with suppress(FileNotFoundError):
                owner = claims.read(claim)[1]
                if owner:
                    owners[owner.process] = owner.host, claim
        return owners

    workers = {}
    try:
        for number, host in enumerate(("a", "b", "a", "b")):
            monkeypatch.setenv("RESA_LENS_HOST", host)
            workers[number] = start(shared)
        blows = {0: signal.SIGKILL, 1: signal.SIGKILL, 2: signal.SIGSTOP}
        deadline = time.monotonic() + 300
        while blows:
            busy = at_work()
            for number in list(blows):
                assert time.monotonic() < deadline
                assert workers[number].poll() is None, workers[number].communicate()
                # In the middle of a job, never between two.
                if workers[number].pid in busy:
                    workers[number].send_signal(blows.pop(number))
            time.sleep(0.01)
        out, err = workers[3].communicate(timeout=300)
        assert workers[3].returncode == 0, err
        assert results(out) == expected
        workers[2].send_signal(signal.SIGCONT)
        out, err = workers[2].communicate(timeout=300)
        assert workers[2].returncode == 0, err
        assert results(out) == expected
    finally:
        for process in workers.values():
            process.kill()
            process.communicate()
    adapters = [list(place.glob("adapters/*/manifest.json")) for place in (alone, shared)]
    assert len(adapters[0]) == len(adapters[1])
