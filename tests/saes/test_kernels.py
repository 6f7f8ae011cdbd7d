"""The sparse products against dense ones; the Triton kernel against the eager form."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from resa_lens.saes import kernels
from resa_lens.saes.kernels import (
    by_latent,
    kernel_path,
    native_bf16,
    pair_dots,
    pair_dots_gather,
    row_starts,
    weighted_rows,
)


def pairs(n_rows: int = 20, d_sae: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged pairs: rows of 0 to 9 latents, out of order within a row."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 10, (n_rows,), generator=generator)
    rows = torch.repeat_interleave(torch.arange(n_rows), counts)
    return rows, torch.randint(0, d_sae, (len(rows),), generator=generator)


@pytest.mark.parametrize("kernel", [pair_dots, pair_dots_gather])
def test_pair_dots_are_the_dense_products(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resa_lens.saes.kernels.GATHER_BYTES", 3 * 2 * 16 * 4)
    rows, latents = pairs()
    a, b = torch.randn(20, 16), torch.randn(50, 16)
    found = kernel(a, b, row_starts(rows, 20), latents)
    torch.testing.assert_close(found, (a @ b.T)[rows, latents])
    none = torch.zeros(0, dtype=torch.long)
    assert kernel(a, b, torch.zeros(21, dtype=torch.long), none).numel() == 0


def test_weighted_rows_are_the_dense_product() -> None:
    rows, latents = pairs()
    weights, table = torch.rand(len(rows)), torch.randn(50, 16)
    dense = torch.zeros(20, 50).index_put_((rows, latents), weights, accumulate=True)
    found = weighted_rows(table, row_starts(rows, 20), latents, weights)
    torch.testing.assert_close(found, dense @ table)


def test_by_latent_turns_the_pattern_around() -> None:
    rows, latents = pairs()
    weights, table = torch.rand(len(rows)), torch.randn(20, 16)
    dense = torch.zeros(20, 50).index_put_((rows, latents), weights, accumulate=True)
    turned = by_latent(rows, latents, 50)
    found = weighted_rows(table, turned.starts, turned.rows, weights[turned.order])
    torch.testing.assert_close(found, dense.T @ table)
    wide = by_latent(rows, latents + 60_000, 65_536)
    assert torch.equal(wide.order, turned.order)


@pytest.mark.parametrize("shape", [(40, 12), (300, 7), (701, 1000), (2048, 256)])
def test_row_dots_are_vecdot_s_to_the_bit(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = torch.randn(shape), torch.randn(shape)
    expected = torch.linalg.vecdot(a, b)
    for size in (1, 2**12, 2**20):
        monkeypatch.setattr(kernels, "CACHE_BYTES", size)
        assert torch.equal(kernels.row_dots(a, b), expected)


def test_says_whether_the_cpu_has_bfloat16() -> None:
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    assert native_bf16() == ("avx512_bf16" in flags or "amx_tile" in flags)


TRITON = """
import torch
from resa_lens.saes.kernels import pair_dots_gather, row_starts
from resa_lens.saes.triton_kernels import pair_dots_triton
torch.manual_seed(0)
for d in (16, 24, 100):
    counts = torch.randint(0, 10, (20,))
    rows = torch.repeat_interleave(torch.arange(20), counts)
    latents = torch.randint(0, 50, (len(rows),))
    a, b = torch.randn(20, d), torch.randn(50, d)
    starts = row_starts(rows, 20)
    ours, eager = pair_dots_triton(a, b, starts, latents), pair_dots_gather(a, b, starts, latents)
    torch.testing.assert_close(ours, eager)
print("agree")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (285 MB); docs/log.md has the run in its interpreter",
)
def test_triton_agrees_with_eager() -> None:
    """In Triton's interpreter, which needs no GPU."""
    done = subprocess.run(
        [sys.executable, "-c", TRITON],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.stdout.strip() == "agree", done.stderr


def fake_triton(monkeypatch: pytest.MonkeyPatch, kernel: object) -> None:
    kernels.triton_failure.cache_clear()
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    module = SimpleNamespace(pair_dots_triton=kernel)
    monkeypatch.setitem(sys.modules, "resa_lens.saes.triton_kernels", module)


def broken(*_: object) -> torch.Tensor:
    raise RuntimeError("Failed to find C compiler.\n  Please specify\n  via CC")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (pair_dots_gather, None),
        (broken, "RuntimeError: Failed to find C compiler. Please specify via CC"),
        (lambda a, *_: a.new_zeros(3), "its products are wrong on this machine"),
    ],
    ids=["works", "no compiler", "wrong"],
)
def test_triton_is_tried_and_not_only_found(
    kernel: object, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_triton(monkeypatch, kernel)
    assert kernels.triton_failure("cpu") == reason
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T")
    monkeypatch.setattr(kernels, "triton_failure", lambda device: reason)
    assert kernel_path("cuda") == f"NVIDIA-T, {'eager' if reason else 'triton'}"


def test_without_triton_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.triton_failure.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels.triton_failure("cpu") == "it is not installed"
    kernels.triton_failure.cache_clear()
