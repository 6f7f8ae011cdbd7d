"""Deterministic work: the mode is on in the block alone, and replacements add up to the same."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from resa_lens.artifacts.kinds.quality import Quality
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.artifacts.workspace import Workspace
from resa_lens.machine import determinism
from resa_lens.machine.determinism import cumulative_sum, deterministic, sum_by_index


def test_the_mode_is_on_in_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with suppress(KeyError), deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with deterministic(True):
            pass
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_replacements_are_the_same_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 7, (50,), generator=generator)
    values = torch.rand(50, generator=generator, dtype=torch.double)
    plain = sum_by_index(index, values, 9), cumulative_sum(values)
    # As on CUDA, where the plain forms have no deterministic algorithm.
    with patch.object(determinism, "_replaced", lambda _: True):
        others = sum_by_index(index, values, 9), cumulative_sum(values)
    for one, other in zip(plain, others, strict=True):
        assert torch.allclose(one, other, rtol=1e-14)
        assert one.shape == other.shape


@pytest.mark.parametrize(
    ("device", "before", "now", "anew"),
    [
        ("cuda:0", False, True, True),
        ("cuda:0", True, True, False),
        ("cuda:0", False, False, False),
        ("cuda:0", True, False, False),
        ("cpu", False, True, False),
    ],
)
def test_what_cuda_made_without_the_promise_is_not_done_before_with_it(
    tmp_path: Path, device: str, before: bool, now: bool, anew: bool
) -> None:
    # No GPU is needed: the manifest says where an artifact was made.
    model: Any = SimpleNamespace(
        slug="m-0", contents={"weights": "0"}, weights_hash="0", dtype="float32", device=device,
        attention="eager",
    )  # fmt: skip
    runs, notes = [], []

    def work(draft: Draft) -> None:
        runs.append(torch.are_deterministic_algorithms_enabled())
        draft.results = {"layers": {}, "model": "m"}

    for exact in (before, now):
        ctx = Context(Workspace(tmp_path), deterministic=exact)
        ctx.reporter = SimpleNamespace(note=notes.append)  # type: ignore[assignment]
        artifact = ctx.stage(Quality, model, name="q", config={}).obtain(work)
    assert runs == ([before, now] if anew else [before])
    assert artifact.manifest.deterministic == (now if anew else before)
    said = [line for line in notes if "without --deterministic" in line]
    assert len(said) == anew
    # The same identity: it took the other's place.
    assert len(Workspace(tmp_path).artifacts()) == 1


def test_a_float_sum_by_index_has_one_home() -> None:
    """On CUDA neither a weighted bincount nor a cumulative sum of floats is deterministic."""
    assert torch.equal(
        sum_by_index(torch.tensor([2, 0, 2]), torch.tensor([1.0, 2.0, 4.0]), 4),
        torch.tensor([2.0, 0.0, 5.0, 0.0]),
    )
