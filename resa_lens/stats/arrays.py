"""What the other files of this folder share: types, defaults and checks of arguments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from resa_lens.errors import BadInputError

Seed = int | Sequence[int]
Interval = tuple[float, float]
Floats = NDArray[np.float64]

DRAWS = 10_000
CHUNK = 4_000_000  # elements held at once while resampling: 32 MB


def vector_of(values: ArrayLike, name: str) -> Floats:
    """Finite floats [n] from values [n], or from [n, samples] averaged over samples."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 2 and array.shape[1] > 0:
        finite = bool(np.isfinite(array).all())
        array = array.mean(axis=1)
    else:
        finite = bool(np.isfinite(array).all())
    if array.ndim != 1 or array.size == 0:
        raise BadInputError(f"{name} has shape {np.shape(values)}: give [n] or [n, samples], n > 0")
    if not finite:
        raise BadInputError(
            f"{name} holds a value that is not finite: every score must be a number"
        )
    return array


def check_level(level: float) -> None:
    """Raise BadInputError where level is no confidence level."""
    if not 0.0 < level < 1.0:
        raise BadInputError(f"level {level} is no confidence level: give one between 0 and 1")
