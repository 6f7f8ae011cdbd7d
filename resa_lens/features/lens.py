"""What a feature's decoder direction says: to the vocabulary, and beside the other directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.models.host import Model

BLOCK_BYTES = 64 * 2**20
"""Of logits or cosines held at once."""
BINS = 40
"""Of the histogram of a direction's logits, of equal width from its lowest to its highest one."""
_BINNED = 2**21
"""Logits that are sorted into bins at once: 8 MB of them, and as much of their bins."""


class Lens(NamedTuple):
    """Tokens that a direction raises and lowers most, the strongest first, and all by value."""

    top: Int[Tensor, "direction token"]
    top_logits: Float[Tensor, "direction token"]
    bottom: Int[Tensor, "direction token"]
    bottom_logits: Float[Tensor, "direction token"]
    histogram: Int[Tensor, "direction bin"]
    """Tokens of the vocabulary in each of `BINS` bins, from the lowest logit to the highest."""


@torch.no_grad()
def logit_lens(model: Model, directions: Float[Tensor, "direction d_model"], top: int = 10) -> Lens:
    """Return the logit lens of directions: unembed(norm(direction)), less what zero gives.

    The final norm takes away the direction's length, so logits of features can be compared; what it
    gives for zero (its bias, and the unembedding's) belongs to no direction.

    Args:
        model: the host.
        directions: decoder rows at a site of the residual stream.
        top: tokens on each side.

    Raises:
        BadInputError: directions of another width, or more tokens than the vocabulary has.
    """
    if directions.shape[1] != model.d_model:
        raise BadInputError(
            f"directions of width {directions.shape[1]}: the model's is {model.d_model}"
        )
    norm, unembed = model.bridge.ln_final, model.bridge.unembed
    # Logits are asked for by two positions: TransformerLens' parts take [batch, position, d_model].
    dtype = model.model.dtype
    nothing = torch.zeros(1, 1, model.d_model, dtype=dtype, device=model.device)
    zero = unembed(norm(nothing)).float()
    vocabulary = zero.shape[-1]
    if not 1 <= top <= vocabulary:
        raise BadInputError(f"top {top}: the vocabulary has {vocabulary} tokens")
    parts = []
    for some in directions.split(max(1, BLOCK_BYTES // (4 * vocabulary))):
        moved = some.to(model.device, dtype)[None]
        logits = (unembed(norm(moved)).float() - zero)[0]
        high, low = logits.topk(top), logits.topk(top, largest=False)
        counts = _histograms(logits, low.values[:, 0], high.values[:, 0])
        parts.append((high.indices, high.values, low.indices, low.values, counts))
    if not parts:
        none = torch.zeros(0, top)
        return Lens(none.long(), none, none.long(), none, torch.zeros(0, BINS, dtype=torch.long))
    return Lens(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _histograms(
    logits: Float[Tensor, "direction token"],
    lowest: Float[Tensor, " direction"],
    highest: Float[Tensor, " direction"],
) -> Int[Tensor, "direction bin"]:
    """Count each direction's logits by value; a direction whose logits are all equal fills one bin.

    Args:
        logits: of all tokens.
        lowest: of each direction, the lower edge of its first bin.
        highest: the upper edge of its last bin, which belongs to it.
    """
    scale = BINS / (highest - lowest).clamp_min(torch.finfo(torch.float32).tiny)
    rows = max(1, _BINNED // logits.shape[1])
    counts = torch.zeros(logits.shape[0], BINS, dtype=torch.long, device=logits.device)
    for first in range(0, logits.shape[0], rows):
        part = slice(first, first + rows)
        bins = ((logits[part] - lowest[part, None]) * scale[part, None]).int()
        # Rounding, and the highest logit itself, would stand in a bin of its own.
        bins.clamp_(0, BINS - 1)
        # One count of all rows: each has its own numbers of bins.
        bins += BINS * torch.arange(len(bins), dtype=bins.dtype, device=bins.device)[:, None]
        counts[part] = torch.bincount(bins.flatten(), minlength=BINS * len(bins)).view(-1, BINS)
    return counts


@torch.no_grad()
def nearest_directions(
    directions: Float[Tensor, "latent d"], features: Sequence[int], count: int = 5
) -> tuple[Int[Tensor, "feature count"], Float[Tensor, "feature count"]]:
    """Return each feature's nearest other directions of the same SAE, and their cosines.

    Args:
        directions: decoder rows.
        features: which of them are asked for.
        count: how many neighbours; fewer where the SAE has fewer.

    Raises:
        BadInputError: a feature beyond the SAE's latents.
    """
    size = directions.shape[0]
    if outside := [f for f in features if not 0 <= f < size]:
        raise BadInputError(f"feature {outside[0]} is out of range: the SAE has 0 to {size - 1}")
    unit = directions.float() / directions.float().norm(dim=1, keepdim=True).clamp_min(1e-12)
    count = min(count, size - 1)
    index = torch.tensor(list(features), dtype=torch.long, device=unit.device)
    found = []
    for some in index.split(max(1, BLOCK_BYTES // (4 * size))):
        cosines = unit[some] @ unit.mT
        cosines[torch.arange(some.numel(), device=unit.device), some] = -torch.inf
        found.append(cosines.topk(count))
    if not found:
        return torch.zeros(0, count, dtype=torch.long), torch.zeros(0, count)
    return (
        torch.cat([part.indices for part in found]).cpu(),
        torch.cat([part.values for part in found]).cpu(),
    )
