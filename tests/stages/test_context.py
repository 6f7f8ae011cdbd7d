"""What every stage gets from the context and the skeleton: here, the cost of metered work."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import pytest

from resa_lens.artifacts.begun import COST, keep_cost
from resa_lens.artifacts.kinds.stability import Stability
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.artifacts.workspace import LOCK, Workspace
from resa_lens.errors import BadInputError, DamagedError
from resa_lens.machine import meters

RESULTS = {"verdict": "v", "reason": "r", "tables": 1, "site": "mlp_out", "model": "m",
           "n_layers": 12}  # fmt: skip


@pytest.fixture
def ctx(tmp_path) -> Context:
    return Context(Workspace(tmp_path))


def stage(ctx: Context, tiny, number: int):
    return ctx.stage(Stability, tiny, name="mlp_out", config={"number": number})


def test_a_manifest_holds_what_its_stage_took_and_no_more(ctx, tiny):
    with ctx.bar("before", 1):
        time.sleep(0.5)

    def work(draft: Draft) -> None:
        with ctx.bar("first", 1):
            time.sleep(0.05)
        # With a bar or without: all of the work is metered.
        time.sleep(0.05)
        draft.results = {**RESULTS, "tokens": 7}

    manifest = stage(ctx, tiny, 1).obtain(work).manifest
    assert 0.1 <= manifest.cost["seconds"] < 0.4
    assert manifest.cost["tokens"] == 7
    assert manifest.seconds == manifest.cost["seconds"]


@pytest.mark.parametrize("own", [False, True], ids=["context", "copy"])
def test_a_stage_inside_a_stage_has_its_own_costs(ctx, tiny, own):
    inner = []

    def part(draft: Draft) -> None:
        time.sleep(0.3)
        draft.results = RESULTS

    def whole(draft: Draft) -> None:
        time.sleep(0.05)
        inner.append(stage(replace(ctx, seed=3) if own else ctx, tiny, 2).obtain(part))
        time.sleep(0.05)
        draft.results = RESULTS

    outer = stage(ctx, tiny, 1).obtain(whole).manifest
    assert inner[0].manifest.cost["seconds"] >= 0.3
    assert 0.1 <= outer.cost["seconds"] < 0.3


def test_a_stage_that_fails_leaves_the_meter_to_the_outer_one(ctx, tiny):
    def part(draft: Draft) -> None:
        time.sleep(0.3)
        raise BadInputError("broken")

    def whole(draft: Draft) -> None:
        with pytest.raises(BadInputError, match="broken"):
            stage(ctx, tiny, 2).obtain(part)
        time.sleep(0.05)
        draft.results = RESULTS

    outer = stage(ctx, tiny, 1).obtain(whole).manifest
    assert 0.05 <= outer.cost["seconds"] < 0.3


def test_what_other_processes_took_is_in_the_seconds(ctx, tiny):
    def work(draft: Draft) -> None:
        draft.results, draft.seconds = RESULTS, 40.0

    manifest = stage(ctx, tiny, 1).obtain(work).manifest
    assert manifest.seconds == 40.0
    assert manifest.cost["seconds"] < 1


def test_a_killed_run_counts_what_it_took_before(ctx, tiny, monkeypatch, tmp_path_factory):
    """Of any kind that goes on: the record is written on the way, not at the end."""
    monkeypatch.setattr(meters, "INTERVAL_S", 0.01)
    monkeypatch.setattr(meters, "KEEP_S", 0.02)
    run, as_killed = stage(ctx, tiny, 1), tmp_path_factory.mktemp("killed") / "work"

    def killed(draft: Draft) -> None:
        time.sleep(0.5)
        (draft.work / "piece.parquet").touch()
        shutil.copytree(draft.work, as_killed, ignore=shutil.ignore_patterns(LOCK))
        raise BadInputError("the end")

    def quick(draft: Draft) -> None:
        draft.results = RESULTS

    with pytest.raises(BadInputError, match="the end"):
        run.obtain(killed, doing="trying")
    shutil.rmtree(run.work)
    shutil.copytree(as_killed, run.work)
    before = json.loads((run.work / COST).read_text())
    assert 0.3 < before["seconds"] < 0.8

    for wrong in ("[]", '{"seconds": 1}', *(json.dumps({**before, "seconds": x})
                                            for x in ("5", None, -1.0, float("nan")))):  # fmt: skip
        (run.work / COST).write_text(wrong)
        with pytest.raises(DamagedError, match=r"cost\.json is damaged"):
            run.obtain(quick, doing="trying")
    shutil.copy(as_killed / COST, run.work)
    manifest = run.obtain(quick, doing="trying").manifest
    for name in ("seconds", "cpu_seconds"):
        assert before[name] <= manifest.cost[name] < before[name] + 0.3
    assert manifest.seconds == manifest.cost["seconds"]
    assert not run.work.exists()


def test_a_run_that_begins_anew_counts_itself_alone(ctx, tiny):
    run = stage(ctx, tiny, 1)
    run.work.mkdir(parents=True)
    keep_cost(run.work, {"seconds": 9.0, "cpu_seconds": 9.0, "peak_rss_mb": 1.0, "joules": {}})

    def quick(draft: Draft) -> None:
        draft.results = RESULTS

    forced = replace(ctx, force=True)
    manifest = stage(forced, tiny, 1).obtain(quick, doing="trying").manifest
    assert manifest.cost["seconds"] < 5
