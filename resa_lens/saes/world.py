"""The processes that train together: ranks, and the sums that they share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process among `size`; alone, every exchange leaves its tensor as it is."""

    rank: int = 0
    size: int = 1

    def sum_(self, value: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def rows(self, value: Tensor) -> int:
        """Return the rows of all ranks together, which need not have as many each."""
        if self.size == 1:
            return value.shape[0]
        return int(self.sum_(torch.tensor(value.shape[0], device=value.device)))

    def any_(self, value: Tensor) -> Tensor:
        """Or over the ranks; returns a new boolean tensor."""
        if self.size == 1:
            return value
        counts = value.to(torch.int32)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        return counts.bool()

    def part(self, ids: Int[Tensor, "batch position"]) -> Int[Tensor, "part position"]:
        """Return this rank's sequences of a global batch."""
        if ids.shape[0] % self.size:
            raise BadInputError(
                f"a batch of {ids.shape[0]} sequences does not divide among {self.size} processes; "
                f"use --batch {self.size * max(1, ids.shape[0] // self.size)}"
            )
        return ids.tensor_split(self.size)[self.rank] if self.size > 1 else ids

    def to_owner(self, x: Float[Tensor, "row d"], owner: int) -> Tensor | None:
        """Collect every rank's rows on one rank, in the ranks' order; None on the others."""
        if self.size == 1:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if owner == self.rank else None
        dist.gather(x, parts, dst=owner)
        return None if parts is None else torch.cat(parts)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def first(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0 before the others do it: they find what it has made."""
        if self.size == 1:
            return work()
        if self.rank == 0:
            value = work()
            self.barrier()
            return value
        self.barrier()
        return work()

    def agree(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = World()


PATIENCE = timedelta(days=7)
"""How long processes wait for one that does a piece for all, such as training SAEs or drawing
answers; after ten minutes NCCL would give up.  Where a process dies, torchrun ends the others."""


def join_world(device: str) -> World:
    """Join the processes started by torchrun or accelerate launch; alone without them."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    return World(dist.get_rank(), size)


def local_device(asked: str) -> str:
    """Return the device of this process: under torchrun, the GPU of its local rank."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or asked not in ("auto", "cuda") or not torch.cuda.is_available():
        return asked
    torch.cuda.set_device(int(local))
    return f"cuda:{local}"
