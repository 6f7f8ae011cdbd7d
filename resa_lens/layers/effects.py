"""Effects by layer with their standard errors: read from a table, and held against zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats as distributions

from resa_lens import stats
from resa_lens.errors import BadInputError
from resa_lens.layers.mixture import ALPHA

Effect = float | tuple[float, float] | tuple[float, float, float]
"""Of a layer: a value, or a value beyond its control with its standard error and, where they are
few, the degrees of freedom of that error."""


def above_zero(
    layers: Sequence[int], values: np.ndarray, errors: np.ndarray, freedom: np.ndarray
) -> tuple[list[int], int, str]:
    """Return layers whose value is above zero, largest first, the clearest one, and its figures."""
    t = np.divide(values, errors, out=np.zeros_like(values), where=errors > 0)
    p = stats.holm(distributions.t.sf(t, freedom))
    order = sorted(range(len(layers)), key=lambda i: (-values[i], layers[i]))
    above = [i for i in order if p[i] <= ALPHA]
    best = above[0] if above else int(p.argmin())
    test = f"one-sided, Holm's correction for {len(layers)} layers"
    figures = f"{values[best]:.3g} (standard error {errors[best]:.2g}, p = {p[best]:.2g}, {test})"
    return [layers[i] for i in above], layers[best], figures


def effects_of(
    table: Mapping[int, Effect] | None, name: str = "causal"
) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray] | None:
    """Layers, values, standard errors and their freedom, each [L]; None without standard errors."""
    pairs = {layer: v for layer, v in (table or {}).items() if isinstance(v, Sequence)}
    if not pairs:
        return None
    if missing := sorted(set(table or {}) - set(pairs)):
        raise BadInputError(
            f"{name}, layer {missing[0]} (0-based) has no standard error: give all or none"
        )
    for layer, pair in pairs.items():
        if len(pair) not in (2, 3) or min(pair[2:], default=1.0) <= 0:
            raise BadInputError(
                f"{name}, layer {layer} (0-based): {pair} is no (effect, standard error), or these "
                "with degrees of freedom above 0"
            )
        value, error = pair[:2]
        if error < 0 or (error == 0 and value != 0):
            raise BadInputError(
                f"{name}, layer {layer} (0-based): standard error {error:g} of the effect "
                f"{value:g}: give one above 0"
            )
    rows = [(*pair, np.inf)[:3] for pair in pairs.values()]
    values, errors, freedom = np.array(rows, dtype=np.float64).T
    return list(pairs), values, errors, freedom
