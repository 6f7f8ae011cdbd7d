"""Selection against dense formulas, exact and by bfloat16 candidates, in pieces and at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resa_lens.machine import determinism
from resa_lens.saes import select
from resa_lens.saes.select import Active, Encoder, above, batch_topk, half_precision, topk


def encoder(latents: int = 300, width: int = 24, half: bool = False) -> Encoder:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(latents, width, generator=generator) / width**0.5
    bias = 0.1 * torch.randn(latents, generator=generator)
    return Encoder(weight, bias, (weight.bfloat16(), bias.bfloat16()) if half else None)


def rows(count: int = 70, width: int = 24) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def dense(found: Active, shape: tuple[int, int]) -> torch.Tensor:
    made = torch.zeros(shape)
    made[found.rows, found.latents] = found.values
    return made


def pre_activations(held: Encoder, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ held.weight.T + held.bias)


def by_rows(pre: torch.Tensor, k: int) -> torch.Tensor:
    top = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter_(1, top.indices, top.values)


@pytest.fixture(params=["numpy", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's partition, and the form that other devices take, run here on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(determinism, "on_cpu", lambda tensor: False)
    return request.param


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("pieces", [False, True])
def test_topk_is_the_dense_topk(
    path: str, half: bool, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        monkeypatch.setattr(select, "PRODUCT_BYTES", 9 * 300 * 4)
    held, x = encoder(half=half), rows()
    found = topk(held, x, 8)
    torch.testing.assert_close(dense(found, (70, 300)), by_rows(pre_activations(held, x), 8))
    assert torch.equal(found.rows, found.rows.sort(stable=True).values)
    assert found.values.dtype == torch.float32


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("pieces", [False, True])
def test_batch_topk_is_the_dense_one(
    path: str, half: bool, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        monkeypatch.setattr(select, "PRODUCT_BYTES", 9 * 300 * 4)
    held, x = encoder(half=half), rows()
    # A token far longer than the others: its rounding errors are as large as their activations.
    x[5] *= 300
    found = batch_topk(held, x, 8)
    pre = pre_activations(held, x)
    top = pre.flatten().topk(8 * 70)
    expected = torch.zeros(70 * 300).scatter_(0, top.indices, top.values).view(70, 300)
    scale = torch.ones(70, 1)
    scale[5] = 300
    torch.testing.assert_close(dense(found, (70, 300)) / scale, expected / scale)
    assert torch.equal(found.rows, found.rows.sort(stable=True).values)


@pytest.mark.parametrize("half", [False, True])
def test_above_a_threshold(half: bool) -> None:
    held, x = encoder(half=half), rows()
    pre = pre_activations(held, x)
    found = above(held, x, 1.3)
    torch.testing.assert_close(dense(found, (70, 300)), torch.where(pre > 1.3, pre, 0))


def test_never_more_than_k_and_never_zero(path: str) -> None:
    """Equal latents tie; rows with few positive latents give fewer than k."""
    held, x = encoder(), rows()
    weight = held.weight[:1].expand(300, -1).contiguous()
    tied = topk(Encoder(weight, torch.zeros(300)), x, 8)
    counts = torch.bincount(tied.rows, minlength=70)
    assert set(counts.tolist()) == {0, 8}
    few = topk(Encoder(held.weight, held.bias - 2.0), x, 8)
    assert (few.values > 0).all()
    expected = (pre_activations(Encoder(held.weight, held.bias - 2.0), x) > 0).sum(1).clamp_max(8)
    assert torch.equal(torch.bincount(few.rows, minlength=70), expected)
    none = topk(Encoder(held.weight, held.bias - 100), x, 8)
    assert none.values.numel() == 0


def test_candidates_miss_nothing_on_heavy_tails() -> None:
    """4,608 latents, k 32: the selection by candidates against the exact one, row by row."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4608, 64, generator=generator)
    weight /= weight.norm(dim=1, keepdim=True)
    chosen = torch.randint(4608, (1000, 24), generator=generator)
    sizes = torch.rand(1000, 24, generator=generator).pow(3) * 6
    x = (weight[chosen] * sizes[:, :, None]).sum(1)
    bias = torch.zeros(4608)
    exact = topk(Encoder(weight, bias), x, 32)
    fast = topk(Encoder(weight, bias, (weight.bfloat16(), bias.bfloat16())), x, 32)
    a, b = dense(exact, (1000, 4608)), dense(fast, (1000, 4608))
    differ = (a > 0) != (b > 0)
    # Only near ties may differ: latents whose values are equal to four digits.
    assert differ.sum() <= 4
    torch.testing.assert_close(a.sum(1), b.sum(1), rtol=1e-4, atol=0)


def test_half_is_left_out_where_the_cpu_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held = encoder()
    monkeypatch.setattr(select, "native_bf16", lambda: False)
    assert half_precision(held.weight, held.bias) is None
    monkeypatch.setattr(select, "native_bf16", lambda: True)
    made = half_precision(held.weight, held.bias)
    assert made is not None
    assert made[0].dtype == torch.bfloat16


def partitioned(numbers: np.ndarray, count: int, smallest: np.generic) -> np.ndarray:
    """The rule as it is said: all numbers from the count-th largest of their row on."""
    limit = np.sort(numbers, axis=1)[:, -count]
    return np.flatnonzero(numbers >= np.maximum(limit, smallest)[:, None])


@pytest.mark.parametrize("latents", [300, 512 * 4, 512 * 5 + 7, 4608])
@pytest.mark.parametrize("count", [1, 48, 200])
@pytest.mark.parametrize("kind", ["random", "tied", "negative", "few", "same", "one group"])
def test_maxima_of_groups_change_no_selection(kind: str, count: int, latents: int) -> None:
    generator = np.random.default_rng(0)
    drawn = generator.standard_normal((9, latents)).astype(np.float32)
    if kind == "tied":
        drawn = np.round(drawn * 2) / 2
    elif kind == "negative":
        drawn = -np.abs(drawn) - np.float32(0.1)
    elif kind == "few":
        drawn[:, count // 2 :] = -1
    elif kind == "same":
        drawn[:] = 1
    elif kind == "one group":
        # All the largest are where a group's maximum says least of them.
        drawn[:, ::512] += 50
    for numbers, smallest in (
        (drawn, np.nextafter(np.float32(0), np.float32(1))),
        (torch.from_numpy(drawn).bfloat16().view(torch.int16).numpy(), np.int16(1)),
    ):
        expected = partitioned(numbers, count, smallest)
        assert np.array_equal(select._reaching(numbers, count, smallest), expected)


@pytest.mark.parametrize("kind", ["distinct", "tied", "few", "negative", "none"])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_largest_of_each_row_of_pairs(kind: str, k: int, path: str) -> None:
    generator = torch.Generator().manual_seed(k)
    mask = torch.rand(11, 60, generator=generator) < (0.05 if kind == "few" else 0.5)
    mask[3] = False
    if kind == "none":
        mask[:] = False
    table = torch.where(mask, torch.randn(11, 60, generator=generator), 0)
    if kind == "tied":
        table = (2 * table).round() / 2
    elif kind == "negative":
        table = -table.abs()
    rows, latents = mask.nonzero(as_tuple=True)
    found = select.largest_of_each_row(rows, latents, table[rows, latents], 11, k)
    assert (found.values > 0).all()
    pairs = found.rows * 60 + found.latents
    assert (pairs.diff() > 0).all()
    assert torch.equal(table[found.rows, found.latents], found.values)
    # Which of equals is kept is open; how many and how large is not.
    expected = by_rows(table.clamp_min(0), k)
    kept = dense(found, (11, 60))
    assert torch.equal(kept.sort(dim=1).values, expected.sort(dim=1).values)


def test_no_zero_is_active_where_the_smallest_floats_are_flushed_to_zero() -> None:
    rows, latents = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1])
    values = torch.tensor([0.0, -1.0, 2.0, 0.0, 0.0])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush them")
    try:
        active = select.largest_of_each_row(rows, latents, values, 2, 2)
    finally:
        torch.set_flush_denormal(False)
    assert (active.rows.tolist(), active.latents.tolist()) == ([0], [2])
