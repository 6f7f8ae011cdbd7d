"""Triton kernels for CUDA devices; beside each stands the eager form in kernels.py.

Without a GPU they run in Triton's interpreter (TRITON_INTERPRET=1), which is how the tests compare
them with the eager form.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor


@triton.jit
def _pair_dots(a, b, starts, latents, out, d, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + row)
    last = tl.load(starts + row + 1)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    # The row stays in registers while its latents pass by.
    x = tl.load(a + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    for pair in range(first, last):
        latent = tl.load(latents + pair).to(tl.int64)
        w = tl.load(b + latent * d + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + pair, tl.sum(x * w, axis=0))


def pair_dots_triton(
    a: Float[Tensor, "row d"],
    b: Float[Tensor, "latent d"],
    starts: Int[Tensor, " row+1"],
    latents: Int[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """Return a[row] . b[latent] for each pair; one program a row, no temporary."""
    out = torch.empty(latents.numel(), dtype=torch.float32, device=a.device)
    if out.numel():
        block = triton.next_power_of_2(a.shape[1])
        launch: Any = _pair_dots
        launch[(a.shape[0],)](
            a.contiguous(), b.contiguous(), starts, latents, out, a.shape[1], BLOCK=block
        )
    return out
