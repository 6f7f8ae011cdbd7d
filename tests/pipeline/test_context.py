"""What every stage gets from the context: here, the cost of metered work."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from resa_lens.pipeline.context import Context
from resa_lens.workspace import Workspace

MODEL = SimpleNamespace(weights_hash="0" * 64, device="cpu", dtype="float32")


@pytest.fixture
def ctx(tmp_path) -> Context:
    return Context(Workspace(tmp_path))


def test_a_manifest_holds_what_was_metered_since_the_last(ctx):
    with ctx.bar("first", 1):
        time.sleep(0.05)
    with ctx.metered():
        time.sleep(0.05)
    first = ctx.manifest("eval", MODEL, config={}, results={"tokens": 7})
    assert first.cost["seconds"] == pytest.approx(0.1, abs=0.05)
    assert first.cost["tokens"] == 7
    assert ctx.manifest("eval", MODEL, config={}).cost == {}


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
        assert own.manifest("eval", MODEL, config={}).cost["seconds"] > 0.04
    assert ctx.manifest("sweep", MODEL, config={}).cost["seconds"] > 0.04
