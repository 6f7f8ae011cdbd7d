"""The sparse products of an SAE: what stands where a dense one would be mostly zeros.

A batch's active latents are pairs (row, latent) in compressed rows.  With k of d_sae latents active
in each row, three products over these pairs make the whole step, forward and backward, and none
builds a [row, k, d_in] or [row, d_sae] temporary:

- `pair_dots`: one dot product a pair (a sampled dense-dense product);
- `weighted_rows`: a weighted sum of a table's rows for each bag (a sparse-dense product);
- `by_latent`: the pairs sorted by latent, so that a weight gradient is `weighted_rows` again, over
  segments, in place of scattered adds.

On a CUDA device `pair_dots` is a Triton kernel where a trial of it succeeds, and a gather in pieces
where it does not.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.machine import determinism

GATHER_BYTES = 64 * 2**20
"""Largest temporary of the gather that stands in where there is no better kernel."""

CACHE_BYTES = 2**20
"""Of a core's cache: what is worked on at once."""


@cache
def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    return bool(
        torch.cpu._is_avx512_bf16_supported()
        or (hasattr(torch.cpu, "_is_amx_tile_supported") and torch.cpu._is_amx_tile_supported())
    )


@cache
def triton_failure(device: str) -> str | None:
    """Try the Triton kernel on a device; return why it cannot be used, None where it can.

    That Triton is installed says little: it needs a compiler, a driver and a card that it knows.
    """
    if importlib.util.find_spec("triton") is None:
        return "it is not installed"
    try:
        from resa_lens.saes.triton_kernels import pair_dots_triton

        a = torch.arange(1.0, 33.0, device=device).view(2, 16)
        starts, latents = (torch.tensor(v, device=device) for v in ([0, 2, 3], [1, 0, 1]))
        products = pair_dots_triton(a, a, starts, latents)
        if not torch.allclose(products, pair_dots_gather(a, a, starts, latents)):
            return "its products are wrong on this machine"
    except Exception as error:  # noqa: BLE001 - its compiler raises what it likes
        text = " ".join(str(error).split()) or "no reason given"
        return f"{type(error).__name__}: {text[:160]}"
    return None


def kernel_path(device: str) -> str:
    """Name the kernels in use: a run is only resumed on the ones it began with."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device).replace(" ", "-")
        return f"{name}, {'eager' if triton_failure(device) else 'triton'}"
    product = "bf16 candidates" if native_bf16() else "fp32"
    return f"cpu {torch.backends.cpu.get_cpu_capability()}, {product}"


def row_starts(rows: Int[Tensor, " pair"], n_rows: int) -> Int[Tensor, " n_rows+1"]:
    """Return where each row begins among pairs that are sorted by row."""
    starts = torch.zeros(n_rows + 1, dtype=torch.long, device=rows.device)
    if determinism.on_cpu(rows):
        counts = torch.bincount(rows, minlength=n_rows)
    else:
        # There bincount waits, to see the largest index.
        counts = torch.zeros(n_rows, dtype=torch.long, device=rows.device)
        counts.index_add_(0, rows, torch.ones_like(rows))
    torch.cumsum(counts, 0, out=starts[1:])
    return starts


def pair_dots(
    a: Float[Tensor, "row d"],
    b: Float[Tensor, "latent d"],
    starts: Int[Tensor, " row+1"],
    latents: Int[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """Return a[row] . b[latent] for each pair.

    Args:
        a: one vector a row.
        b: one vector a latent.
        starts: where each row's pairs begin, and the end.
        latents: the pairs' latents, row by row.
    """
    if a.device.type == "cuda":
        if not triton_failure(str(a.device)):
            from resa_lens.saes.triton_kernels import pair_dots_triton

            return pair_dots_triton(a, b, starts, latents)
        return pair_dots_gather(a, b, starts, latents)
    with warnings.catch_warnings():
        # "Sparse CSR tensor support is in beta state."
        warnings.filterwarnings("ignore", message=".*Sparse CSR.*")
        pattern = torch.sparse_csr_tensor(
            starts,
            latents,
            torch.zeros(latents.numel(), dtype=a.dtype),
            size=(a.shape[0], b.shape[0]),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, a, b.mT, beta=0.0).values()


def pair_dots_gather(
    a: Float[Tensor, "row d"],
    b: Float[Tensor, "latent d"],
    starts: Int[Tensor, " row+1"],
    latents: Int[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """Return `pair_dots` by gathering both sides in pieces of bounded size."""
    rows = torch.repeat_interleave(
        torch.arange(a.shape[0], device=a.device), starts.diff(), output_size=latents.numel()
    )
    piece = max(1, GATHER_BYTES // (2 * a.shape[1] * a.element_size()))
    dots = [
        (a[r] * b[m]).sum(1) for r, m in zip(rows.split(piece), latents.split(piece), strict=True)
    ]
    return torch.cat(dots) if dots else a.new_zeros(0)


def row_dots(a: Float[Tensor, "row d"], b: Float[Tensor, "row d"]) -> Float[Tensor, " row"]:
    """Return a[row] . b[row], to the bits of `linalg.vecdot`.

    On a CPU in pieces that stay in the cache: there vecdot writes out all products first, as many
    as there are weights, which takes five to fifteen times as long.
    """
    if not determinism.on_cpu(a):
        return torch.linalg.vecdot(a, b)
    dots = a.new_empty(len(a))
    size = max(1, CACHE_BYTES // (a.shape[1] * a.element_size()))
    products = torch.empty_like(a[:size])
    for row in range(0, len(a), size):
        part = slice(row, row + size)
        piece = torch.mul(a[part], b[part], out=products[: len(a[part])])
        torch.sum(piece, 1, out=dots[part])
    return dots


def weighted_rows(
    table: Float[Tensor, "entry d"],
    starts: Int[Tensor, " bag+1"],
    entries: Int[Tensor, " pair"],
    weights: Float[Tensor, " pair"],
) -> Float[Tensor, "bag d"]:
    """Return sum over a bag's pairs of weight x table[entry], for each bag."""
    return F.embedding_bag(
        entries,
        table,
        starts,
        mode="sum",
        per_sample_weights=weights.to(table.dtype),
        include_last_offset=True,
    )


class ByLatent(NamedTuple):
    """Pairs sorted by latent; the order within a latent is that of the rows."""

    order: Int[Tensor, " pair"]
    rows: Int[Tensor, " pair"]
    starts: Int[Tensor, " latent+1"]


def by_latent(rows: Int[Tensor, " pair"], latents: Int[Tensor, " pair"], d_sae: int) -> ByLatent:
    """Sort pairs by latent; stable, so sums do not depend on chance."""
    # Narrow keys sort faster.
    keys = latents.to(torch.int16) if d_sae <= 2**15 else latents.to(torch.int32)
    order = keys.argsort(stable=True)
    return ByLatent(order, rows[order], row_starts(latents, d_sae))
