"""The nearest feature in the SAEs of another seed: by decoder direction, and by activity.

By direction the search is strict; by activity it is lenient, for any two features that answer to
the same tag correlate over the trials' places.  So beside that correlation stands the one with the
other SAE's other layers: on tiny-reasoner 48 % of layer 5's counted features found such a partner
at the same layer of another seed, and 43 and 38 % at its layers 3 and 8 (and none a direction).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resa_lens.features.matching import best_matches
from resa_lens.features.responses import Responses
from resa_lens.features.words import NO, UNDETERMINED, YES
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.stats import Interval

FOUND_AGAIN = 0.7
"""Decoder cosine, or correlation over the trials' places, from which a feature is alike."""


@dataclass(frozen=True)
class Counterpart:
    """The feature of another seed's SAE that comes nearest."""

    cosine: float
    """Largest cosine of the decoder directions, over all its features."""
    feature: int
    correlation: float | None
    """Largest correlation of activations at the trials' places, over the features that it counts;
    None where it counts none or nothing varies."""
    correlated: int | None
    elsewhere: float | None = None
    """The same correlation at the other SAE's other layers, the median of them: what features that
    cannot be the same have in common by answering to one tag.  None with one layer."""
    agreement: tuple[int, int] | None = None
    """In how many trials both are active, of those in which the feature is."""
    places: int = 0
    """Places that the correlation is taken over."""

    @property
    def found(self) -> bool:
        """Whether either is large enough for a feature alike."""
        return self.same_direction or (self.correlation or 0.0) >= FOUND_AGAIN

    @property
    def correlation_ci(self) -> Interval | None:
        """Fisher's 95 % interval of the correlation, as if activations were normal."""
        if self.correlation is None or self.places < 5:
            return None
        z = math.atanh(min(max(self.correlation, -1 + 1e-9), 1 - 1e-9))
        reach = 1.959964 / math.sqrt(self.places - 3)
        return math.tanh(z - reach), math.tanh(z + reach)

    @property
    def needs(self) -> str:
        """Whether the feature needs its own SAE: yes, no or undetermined.

        No where the direction is there or the correlation's interval lies above `FOUND_AGAIN`, yes
        where there is no such direction and the interval lies below.
        """
        ci = self.correlation_ci
        if self.same_direction or (self.found and ci is None):
            return NO
        if ci is None:
            return YES
        return NO if ci[0] >= FOUND_AGAIN else YES if ci[1] < FOUND_AGAIN else UNDETERMINED

    @property
    def same_direction(self) -> bool:
        """Whether the decoder direction is there, which chance does not give."""
        return self.cosine >= FOUND_AGAIN


@torch.no_grad()
def counterparts(
    responses: Responses,
    other: Responses,
    directions: Callable[[Hookpoint], tuple[Tensor, Tensor]],
) -> dict[Hookpoint, dict[int, Counterpart]]:
    """Look for each feature in the SAEs of another seed: by decoder direction, and by activity.

    Args:
        responses: of the features in question.
        other: responses to the same trials of the features that the other SAEs count.
        directions: gives both SAEs' decoders [d_sae, d_in] at a place; asked for one place after
            the other, because those of a large model fill a machine together.
    """
    partners: dict[Hookpoint, dict[int, Counterpart]] = {}
    for point, listed in responses.features.items():
        if not listed or point not in other.features:
            continue
        mine, theirs = directions(point)
        matches, cosines = best_matches(mine[list(listed)], theirs)
        names = other.features[point]
        values = responses.values[point]
        best, where = _best_correlations(values, other.values[point])
        others = [
            _best_correlations(values, there)[0] for q, there in other.values.items() if q != point
        ]
        active, theirs_active = (side.amax(1) > 0 for side in (values, other.values[point]))
        elsewhere = torch.stack(others).nanmedian(0).values if others else None
        partners[point] = {}
        for i, feature in enumerate(listed):
            finite = bool(best[i].isfinite())
            typical = None if elsewhere is None or elsewhere[i].isnan() else float(elsewhere[i])
            partners[point][feature] = Counterpart(
                float(cosines[i]),
                int(matches[i]),
                float(best[i]) if finite else None,
                int(names[int(where[i])]) if finite else None,
                typical,
                _agreement(active[:, i], theirs_active[:, int(where[i])]) if finite else None,
                values[:, :, i].numel(),
            )
    return partners


def _agreement(
    mine: Bool[Tensor, " trial"], theirs: Bool[Tensor, " trial"]
) -> tuple[int, int] | None:
    return (int((mine & theirs).sum()), int(mine.sum())) if mine.any() else None


def _best_correlations(
    a: Float[Tensor, "trial place m"], b: Float[Tensor, "trial place n"]
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"]]:
    """Return each feature's largest Pearson correlation, over all places of all trials, and whose.

    NaN where it does not vary, or nothing of b does.
    """
    if not b.shape[2]:
        return torch.full(a.shape[2:], torch.nan).double(), torch.zeros(a.shape[2:]).long()
    x, y = (side.flatten(0, 1).double() - side.flatten(0, 1).double().mean(0) for side in (a, b))
    r = (x.mT @ y) / (x.norm(dim=0)[:, None] * y.norm(dim=0))
    best, where = r.nan_to_num(-2.0).max(1)
    return best.masked_fill(best < -1.5, torch.nan), where
