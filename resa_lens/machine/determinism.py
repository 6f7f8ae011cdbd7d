"""The same bits on CUDA too: `--deterministic`, and sums that keep the promise.

A CPU's operations are deterministic for a number of threads.  On CUDA some add in the order in
which threads happen to end, so without the option two runs agree within that noise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch take only deterministic operations in the block; it refuses where it has none."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or before:
        yield
        return
    prepare_cublas()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def prepare_cublas() -> None:
    """Give cuBLAS the workspace that makes it deterministic; it reads this at its first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def on_cpu(tensor: Tensor) -> bool:
    """Whether a call has done its work when it returns: elsewhere a look at a result waits."""
    return tensor.device.type == "cpu"


def sum_by_index(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the sum of the values of each index, as a weighted bincount does.

    On CUDA that waits for the largest index, and adds in any order; `index_add_` does not wait, and
    sorts first where deterministic algorithms are asked for.
    """
    if not on_cpu(values):
        return values.new_zeros(size).index_add_(0, index, values)
    return torch.bincount(index, values, minlength=size)


def cumulative_sum(values: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """Return the cumulative sum; on CUDA it has no deterministic form, so the CPU takes it."""
    if _replaced(values):
        return values.cpu().cumsum(dim, dtype=dtype).to(values.device)
    return values.cumsum(dim, dtype=dtype)


def _replaced(values: Tensor) -> bool:
    return values.is_cuda and torch.are_deterministic_algorithms_enabled()
