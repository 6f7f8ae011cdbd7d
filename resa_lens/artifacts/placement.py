"""How this process computes with a model: threads, float32 products, kernels; said in one line."""

from __future__ import annotations

from collections.abc import Callable

import torch

from resa_lens.machine.precision import choose_products
from resa_lens.models.host import Model
from resa_lens.saes.kernels import triton_failure

NARROW = 256
"""Up to this width one thread is faster than several: the products are too small to share."""


def place(model: Model, threads: int | None, note: Callable[[str], None]) -> None:
    """Choose by a model and its device, and say what it is and where it runs.

    Args:
        model: just loaded.
        threads: as asked; None for what suits its width.
        note: tells the user.
    """
    usual = 1 if model.d_model <= NARROW else max(1, torch.get_num_threads())
    torch.set_num_threads(threads := threads or usual)
    note(
        f"model {model.slug}: {model.n_layers} layers x {model.d_model}, {model.dtype} on "
        f"{model.device} ({model.reason}), {threads} thread{'s' if threads > 1 else ''}, "
        f"float32 products in {choose_products(model.device, model.dtype)}"
    )
    if model.device.startswith("cuda") and (reason := triton_failure(model.device)):
        note(f"the SAEs' products run on plain torch, Triton cannot be used here: {reason}")
