"""What every stage gets from the context and the skeleton: here, the cost of metered work."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from resa_lens.artifacts.kinds.stability import Stability
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.artifacts.workspace import Workspace

RESULTS = {"verdict": "v", "reason": "r", "tables": 1, "site": "mlp_out", "model": "m",
           "n_layers": 12}  # fmt: skip


@pytest.fixture
def ctx(tmp_path) -> Context:
    return Context(Workspace(tmp_path))


def stage(ctx: Context, tiny, number: int):
    return ctx.stage(Stability, tiny, name="mlp_out", config={"number": number})


def test_a_manifest_holds_what_its_stage_metered_and_no_more(ctx, tiny):
    with ctx.bar("before", 1):
        time.sleep(0.5)

    def work(draft: Draft) -> None:
        with ctx.bar("first", 1):
            time.sleep(0.05)
        with ctx.metered():
            time.sleep(0.05)
        draft.results = {**RESULTS, "tokens": 7}

    cost = stage(ctx, tiny, 1).obtain(work).manifest.cost
    assert 0.1 <= cost["seconds"] < 0.4
    assert cost["tokens"] == 7


def test_a_stage_inside_a_stage_has_its_own_costs(ctx, tiny):
    inner = []

    def part(draft: Draft) -> None:
        with ctx.bar("inner", 1):
            time.sleep(0.2)
        draft.results = RESULTS

    def whole(draft: Draft) -> None:
        with ctx.bar("outer", 1):
            time.sleep(0.05)
        inner.append(stage(ctx, tiny, 2).obtain(part))
        draft.results = RESULTS

    outer = stage(ctx, tiny, 1).obtain(whole)
    assert inner[0].manifest.cost["seconds"] >= 0.2
    assert 0.05 <= outer.manifest.cost["seconds"] < 0.2


def test_work_inside_metered_work_counts_once(ctx):
    with ctx.bar("outer", 1), ctx.bar("inner", 1):
        time.sleep(0.05)
    assert len(ctx.spent) == 1
    with pytest.raises(ValueError, match="broken"), ctx.bar("outer", 1):
        raise ValueError("broken")
    assert not ctx.metering


def test_a_stage_with_its_own_context_has_its_own_costs(ctx):
    with ctx.bar("sweep", 1):
        own = replace(ctx, seed=3)
        with own.bar("job", 1):
            time.sleep(0.05)
        assert own.spent[0]["seconds"] > 0.04
    assert ctx.spent[0]["seconds"] > 0.04
