"""Count the bytes of all tensors that live, as operations make them and as they die.

Every storage that an operation gives is followed by a weak reference of torch's own, so what only
the autograd graph holds is counted too.  What an operator takes for itself while it runs is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MB = 2**20


class LiveBytes(TorchDispatchMode):
    """A context that follows the storages of its operations; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._total = 0
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                self.follow(leaf)
        # The dead are counted on until it may matter: the peak is right to within a hundredth.
        if self._total > 1.01 * self.peak:
            self.peak = max(self.peak, self.now())
        return result

    def follow(self, tensor: torch.Tensor) -> None:
        """Count a tensor, once for all that share its storage."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        before = self._sizes.get(key)
        if before is not None:
            self._total -= before[1]
        self._sizes[key] = (StorageWeakRef(storage), size)
        self._total += size

    def now(self) -> int:
        """Return the bytes that live at the moment."""
        self._sizes = {k: v for k, v in self._sizes.items() if not v[0].expired()}
        self._total = sum(size for _, size in self._sizes.values())
        return self._total


def storage_bytes(*modules: torch.nn.Module) -> int:
    """Return the bytes of the weights and buffers of modules, what they share once."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
