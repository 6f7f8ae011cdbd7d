"""How products of float32 matrices are computed: on a GPU the format of the factors is a choice.

TF32 keeps ten bits of a factor's fraction, bfloat16 seven, float32 twenty-three.  A model in
bfloat16 is rounded more than TF32 rounds, so beside one TF32 costs nothing that is seen; a model
that is asked for in float32 is asked for because its digits matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FULL, TF32 = "float32", "TF32"
_SETTINGS = {FULL: "highest", TF32: "high"}


def choose_products(device: str, dtype: str) -> str:
    """Set how this process multiplies float32 matrices, by its model; return the format's name.

    Args:
        device: that the model is on.
        dtype: of the model.
    """
    chosen = TF32 if device.startswith("cuda") and dtype != "float32" else FULL
    torch.set_float32_matmul_precision(_SETTINGS[chosen])
    return chosen


def products() -> str:
    """Return the format in which factors of float32 products are now."""
    return FULL if torch.get_float32_matmul_precision() == _SETTINGS[FULL] else TF32


@contextmanager
def full_products() -> Iterator[None]:
    """Multiply float32 matrices as they are: which latent is active is decided at zero."""
    before = torch.get_float32_matmul_precision()
    if before == _SETTINGS[FULL]:
        yield
        return
    torch.set_float32_matmul_precision(_SETTINGS[FULL])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
