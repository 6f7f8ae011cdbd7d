"""What tuning keeps in memory: one copy of the model, and nothing of the tuning while it scores."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_cases import CORPUS, LAYER, Materials, run_of

from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.evals.run import EvalConfig
from resa_lens.stages import tuning
from resa_lens.stages.tune_job import TuneJob
from resa_lens.tuning import passes
from resa_lens.tuning.loop import TuneConfig


def alive() -> Iterator[torch.Tensor]:
    """All tensors that something refers to."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is asked for its class
        for each in gc.get_objects():
            plain = type(each) in (torch.Tensor, torch.nn.Parameter)
            if plain and each.layout is torch.strided:
                yield each
                if each.is_leaf and each.grad is not None:
                    yield each.grad


def size(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes, each storage once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


@pytest.mark.slow
def test_one_copy_of_the_model_and_nothing_of_the_tuning_while_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = size(alive())
    loop: list[int] = []
    scoring: list[tuple[int, int, bool]] = []
    loss_of, score = passes.Passes.__call__, tuning.eval_run

    def watched_loss(self: passes.Passes, ids: torch.Tensor) -> Any:
        loop.append(size(alive()) - before)
        return loss_of(self, ids)

    def watched_score(ctx: Context, model: Any, *args: Any, **options: Any) -> Any:
        weights = size(iter([*model.model.parameters(), *model.model.buffers()]))
        graphs = any(tensor.grad_fn is not None for tensor in alive())
        scoring.append((size(alive()) - before, weights, graphs))
        return score(ctx, model, *args, **options)

    monkeypatch.setattr(passes.Passes, "__call__", watched_loss)
    monkeypatch.setattr(tuning, "eval_run", watched_score)
    plain = Materials(tmp_path).plain
    job = TuneJob(
        "tiny-reasoner", str(LAYER), lora=TuneConfig(rank=2),
        elicitation=replace(CORPUS, source=str(plain.records)), steps=3, allow_mismatch=True,
        evaluation=EvalConfig(limit=4),
    )  # fmt: skip
    tuning.tune_run(Context(Workspace(tmp_path / "workspace")), job, run_of(plain.saes))
    assert len(loop) == 3
    for total, weights, graphs in scoring:
        # Model and adapters; a second model or a batch's activations (256 x 128 x 12 layers x 4
        # bytes at the least) would be above it.
        assert weights <= total < weights + 100_000
        assert not graphs
    # The adapters with their gradients and AdamW's averages, the SAE and the batch come on top.
    assert max(loop) < 1.15 * scoring[0][1]
