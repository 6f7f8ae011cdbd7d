"""The format of float32 products: chosen by device and dtype, said in a line, in the manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resa_lens.artifacts import placement
from resa_lens.artifacts.kinds.quality import Quality
from resa_lens.artifacts.placement import place
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.artifacts.workspace import Workspace
from resa_lens.machine.precision import choose_products, full_products, products
from resa_lens.saes.select import Encoder, topk


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("device", "dtype", "chosen"),
    [
        ("cpu", "float32", "float32"),
        ("cpu", "bfloat16", "float32"),
        ("cuda", "bfloat16", "TF32"),
        ("cuda:1", "float16", "TF32"),
        ("cuda", "float32", "float32"),
    ],
)
def test_the_format_follows_device_and_dtype(device: str, dtype: str, chosen: str) -> None:
    assert choose_products(device, dtype) == products() == chosen
    with full_products():
        assert products() == "float32"
    assert products() == chosen


def test_an_exact_selection_is_exact_beside_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    addmm = torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda *args, **named: (seen.append(products()), addmm(*args, **named))[1]
    )
    choose_products("cuda", "bfloat16")
    weight = torch.randn(20, 8)
    topk(Encoder(weight, torch.zeros(20)), torch.randn(5, 8), 3)
    assert seen == ["float32"]


def stand_in(device: str, dtype: str) -> Any:
    # No GPU is needed: nothing is computed.
    return SimpleNamespace(
        slug="m-0", contents={"weights": "0"}, weights_hash="0", dtype=dtype, device=device,
        reason="as asked", n_layers=2, d_model=8,
    )  # fmt: skip


def test_one_line_says_it_and_the_manifest_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    model, failures = stand_in("cuda", "bfloat16"), iter([None, "RuntimeError: no compiler"])
    monkeypatch.setattr(placement, "triton_failure", lambda device: next(failures))
    place(model, 1, notes.append)
    assert notes == [
        "model m-0: 2 layers x 8, bfloat16 on cuda (as asked), 1 thread, float32 products in TF32"
    ]

    def work(draft: Draft) -> None:
        draft.results = {"layers": {}, "model": "m"}

    made = Context(Workspace(tmp_path)).stage(Quality, model, name="q", config={}).obtain(work)
    assert made.manifest.products == "TF32"
    assert "products" not in made.manifest.ingredients
    place(model, 1, notes.append)
    assert len(notes) == 3
    assert notes[2].endswith("Triton cannot be used here: RuntimeError: no compiler")
