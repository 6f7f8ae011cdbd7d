"""Do two profiles over layers agree: the places of their components, and their ranks.

The paper sets the means of two mixtures side by side, 4.9, 14.5, 22.7 for counts and 5.6, 15.1,
23.0 for scores, and calls them aligned.  Means of three Gaussians over 26 layers are never far
apart, so the difference means something only beside that of a shuffled profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from resa_lens import stats
from resa_lens.layers import MixtureFit
from resa_lens.layers.nulls import alignment_null
from resa_lens.layers.paper import paper_weights
from resa_lens.stats import Floats

ALPHA = 0.05


@dataclass(frozen=True)
class Alignment:
    """Agreement of a fit with another."""

    value: float | None
    """Largest difference of the sorted means, in layers; None where they cannot be paired."""
    p: float | None
    """Share of shuffles of the first profile whose means come at least as close."""
    draws: int
    components: tuple[int, int]
    """K of each."""
    spearman: float | None
    """Of the two profiles over the layers in common; None with fewer than three."""
    spearman_p: float | None
    """Two-sided, the first profile shuffled."""
    n: int
    """Layers in common."""
    reason: str
    """One sentence."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def align(a: MixtureFit, b: MixtureFit, *, draws: int = stats.DRAWS, seed: int = 0) -> Alignment:
    """Compare the component means of two fits, and the ranks of the two profiles.

    Args:
        a: its profile is the one that is shuffled over its layers and refitted, with its recipe.
        b: its means stay.
        draws: shuffles, of either test.
        seed: of the shuffles.
    """
    rho, rho_p, n = _ranks(a, b, draws, seed)
    sizes = (a.k, b.k)
    ranks = "" if rho is None else f"Spearman {rho:+.3f}, p = {rho_p:.2g}, over {n} layers"
    if a.k != b.k or a.k == 0:
        why = f"{a.k} and {b.k} components cannot be paired"
        if a.k == b.k:
            why = "neither fit has a component"
        elif 0 in sizes:
            why = f"the {'second' if a.k else 'first'} fit has no component"
        reason = f"No means to compare: {why}{'; ' + ranks if ranks else ''}."
        return Alignment(None, None, 0, sizes, rho, rho_p, n, reason)
    null = alignment_null(
        [part.mean for part in a.components],
        [part.mean for part in b.components],
        _mass(a),
        a.layers,
        draws=draws,
        seed=[seed, 6],
        recipe=a.recipe,
        random_state=a.seed,
    )
    close = "closer than chance" if null.p <= ALPHA else "no closer than chance"
    reason = (
        f"The sorted means differ by at most {null.value:.3f} layers, {close}: of {draws} shuffles "
        f"of the first profile {100 * null.p:.1f} % do as well{'; ' + ranks if ranks else ''}."
    )
    return Alignment(null.value, null.p, draws, sizes, rho, rho_p, n, reason)


def _mass(fit: MixtureFit) -> Floats:
    """What the fit's Gaussians were fitted to [L]: counts, or scores above their floor."""
    values = np.asarray(fit.values)
    if fit.kind == "counts" or fit.recipe == "paper":
        return paper_weights(values, fit.kind, fit.baseline)
    floor = values.min() if fit.baseline is None else fit.baseline
    return np.clip(values - floor, 0.0, None)


def _ranks(
    a: MixtureFit, b: MixtureFit, draws: int, seed: int
) -> tuple[float | None, float | None, int]:
    first, second = (dict(zip(fit.layers, fit.values, strict=True)) for fit in (a, b))
    return rank_agreement(first, second, draws, seed)


def rank_agreement(
    a: Mapping[int, float], b: Mapping[int, float], draws: int, seed: int
) -> tuple[float | None, float | None, int]:
    """Spearman of two profiles over the layers in common, its p, and how many layers those are."""
    common = sorted(a.keys() & b.keys())
    if len(common) < 3:
        return None, None, len(common)
    sides = [[float(table[layer]) for layer in common] for table in (a, b)]
    return *stats.spearman(sides[0], sides[1], draws, [seed, 7]), len(common)
