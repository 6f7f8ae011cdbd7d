"""Do two trainings find the same directions?

The share of one SAE's decoder directions whose best match in the other has a cosine above 0.7, both
ways.  Beside it stands what random directions of the same number and width would give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.saes.coder import SparseCoder
from resa_lens.stats import Interval, wilson_interval
from resa_lens.stats.directions import null_share

THRESHOLD = 0.7
BLOCK_BYTES = 32 * 2**20
"""Of the cosines held at once: of 65,536 x 65,536 there would be 17 GB."""


@dataclass(frozen=True)
class Matched:
    """One SAE's directions in the other."""

    share: float
    """Of the directions, those whose best match exceeds the threshold."""
    n: int
    """Directions, dead latents included."""
    ci: Interval
    """Wilson's 95 % interval, as if the latents were independent draws."""
    null: float
    """The share expected of as many random unit directions against as many."""
    mean_cosine: float
    """Of the best matches."""


@dataclass(frozen=True)
class Stability:
    """Two SAEs of one place, both ways."""

    a_in_b: Matched
    b_in_a: Matched
    threshold: float

    @property
    def share(self) -> float:
        """Mean of the two ways."""
        return (self.a_in_b.share + self.b_in_a.share) / 2

    def to_dict(self) -> dict[str, Any]:
        """Return everything, and the mean of the two ways."""
        return {"share": self.share, **asdict(self)}


def decoder_stability(
    coders_a: Mapping[Hookpoint, SparseCoder],
    coders_b: Mapping[Hookpoint, SparseCoder],
    threshold: float = THRESHOLD,
) -> dict[Hookpoint, Stability]:
    """Compare two runs' decoders, at every place that both have.

    Args:
        coders_a: of one seed.
        coders_b: of another.
        threshold: a direction is found again where the best cosine is above it.

    Raises:
        BadInputError: no place in common, another width, or a threshold that is no cosine.
    """
    if not 0 < threshold < 1:
        raise BadInputError(f"threshold {threshold} is no cosine between 0 and 1")
    shared = sorted(set(coders_a) & set(coders_b))
    if not shared:
        raise BadInputError("the two runs have no layer and site in common; nothing to compare")
    return {p: _compare(p, coders_a[p], coders_b[p], threshold) for p in shared}


class Best(NamedTuple):
    """Of each row the most similar row of another table."""

    indices: Int[Tensor, " row"]
    cosines: Float[Tensor, " row"]


def best_pairs(a: Float[Tensor, "m d"], b: Float[Tensor, "n d"]) -> tuple[Best, Best]:
    """Return each row's nearest row of the other by cosine, both ways, the first of equals.

    A row of zeros has the cosine 0 with every row, and its index says nothing.
    """
    a, b = (
        side.detach().float() / side.detach().float().norm(dim=1, keepdim=True).clamp_min(1e-12)
        for side in (a, b)
    )
    b = b.to(a.device)
    of_a, of_b = (
        Best(
            torch.zeros(side.shape[0], dtype=torch.long, device=a.device),
            torch.full((side.shape[0],), -torch.inf, device=a.device),
        )
        for side in (a, b)
    )
    # Squares of 2,896: blocks of both sides stay small, and each product serves both ways.
    edge = int((BLOCK_BYTES / 4) ** 0.5)
    for i in range(0, a.shape[0], edge):
        for j in range(0, b.shape[0], edge):
            cosines = a[i : i + edge] @ b[j : j + edge].mT
            _keep_better(of_a, i, cosines.max(1), j)
            _keep_better(of_b, j, cosines.max(0), i)
    return of_a, of_b


def _keep_better(best: Best, start: int, found: tuple[Tensor, Tensor], offset: int) -> None:
    """Put a block's best rows in the place of worse ones; `offset` is the block's first row."""
    values, indices = found
    part = slice(start, start + values.numel())
    better = values > best.cosines[part]
    best.indices[part] = torch.where(better, indices + offset, best.indices[part])
    best.cosines[part] = torch.where(better, values, best.cosines[part])


def best_cosines(
    a: Float[Tensor, "m d"], b: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " n"]]:
    """Return each row's largest cosine with a row of the other; a row of zeros has none (0)."""
    of_a, of_b = best_pairs(a, b)
    return of_a.cosines, of_b.cosines


def _compare(point: Hookpoint, a: SparseCoder, b: SparseCoder, threshold: float) -> Stability:
    assert a.W_dec is not None, "the coder was loaded without its decoder"
    assert b.W_dec is not None, "the coder was loaded without its decoder"
    if a.d_in != b.d_in:
        raise BadInputError(
            f"the SAEs at {point.sparsify} have widths {a.d_in} and {b.d_in}: compare two "
            "trainings on one model"
        )
    cosines = best_cosines(a.W_dec, b.W_dec)

    def matched(best: Tensor, others: int) -> Matched:
        hits, n = int((best > threshold).sum()), best.numel()
        null = null_share(others, a.d_in, threshold)
        return Matched(hits / n, n, wilson_interval(hits, n), null, best.mean().item())

    return Stability(
        matched(cosines[0], b.W_dec.shape[0]), matched(cosines[1], a.W_dec.shape[0]), threshold
    )
