"""Selection in shapes that the data do not decide: what a GPU's queue needs not be waited for.

On a GPU each `nonzero`, boolean index, `bincount` and `.item()` waits until all that was queued is
done, and none can be captured in a CUDA graph.  Here a selection has as many places as it may need;
a place that nothing took has value 0, and the step sends no gradient through it (step.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resa_lens.saes import select
from resa_lens.saes.select import Active, Encoder, margin

CANDIDATES = 4
"""Places for candidates of BatchTopK by the bfloat16 product, as a multiple of those to be kept."""


class Places(NamedTuple):
    """A selection of fixed size, and whether it is too small for what should be in it."""

    active: Active
    overflow: Bool[Tensor, ""] | None = None


def topk_places(encoder: Encoder, x: Float[Tensor, "row d_in"], k: int) -> Active:
    """Return the k largest latents of each row in k places; those not above zero have value 0.

    Args:
        encoder: weights and bias.
        x: activations less b_dec.
        k: of each row.
    """
    columns: list[tuple[Tensor, Tensor]] = []
    for _, piece, pre in select.products(encoder, x):
        wide = min(k if encoder.half is None else k + margin(k), pre.shape[1])
        values, latents = pre.topk(wide, dim=1, sorted=False)
        if encoder.half is not None:
            starts = torch.arange(0, latents.numel() + 1, wide, device=x.device)
            exact = select.exact_values(encoder, piece, starts, latents.flatten())
            values = torch.where(values > 0, exact.view_as(values), 0)
            values, chosen = values.topk(min(k, wide), dim=1, sorted=False)
            latents = latents.gather(1, chosen)
        columns.append((latents, values.float().clamp_min(0)))
    latents, values = (torch.cat(column) for column in zip(*columns, strict=True))
    return Active(_rows_of(latents), latents.flatten(), values.flatten())


def batch_topk_places(encoder: Encoder, x: Float[Tensor, "row d_in"], k: int) -> Places:
    """Return the k x rows largest latents of the batch and their ties, as `select.batch_topk` does.

    Where ties or candidates are more than the places, `overflow` is true and something is missing:
    the caller selects again by `select.batch_topk`.
    """
    total = k * x.shape[0]
    limit = x.new_zeros(())
    kept: list[Active] = []
    overflow = torch.zeros((), dtype=torch.bool, device=x.device)
    for first, piece, pre in select.products(encoder, x):
        off = select.rounding(encoder, piece, pre)
        values = pre.float()
        limit = limit.maximum(
            select.kth_by_counting(values if off is None else values - off, total)
        )
        reach = values if off is None else values + off
        inside = (reach >= limit) & (reach > 0)
        room = min(_with_ties(total if off is None else CANDIDATES * total), pre.numel())
        overflow |= inside.sum() > room
        place = inside.nonzero_static(size=room, fill_value=-1)
        filled = place[:, 0] >= 0
        # Places that nothing took stand behind all rows.
        rows = torch.where(filled, place[:, 0], piece.shape[0] - 1)
        latents = place[:, 1].clamp_min(0)
        if off is None:
            exact = values[rows, latents]
        else:
            starts = select.row_starts(rows, piece.shape[0])
            exact = select.exact_values(encoder, piece, starts, latents)
        kept.append(Active(rows + first, latents, torch.where(filled, exact, 0).clamp_min(0)))
    active = Active(*(torch.cat(column) for column in zip(*kept, strict=True)))
    inside = (active.values >= select.kth_by_counting(active.values, total)) & (active.values > 0)
    room = min(_with_ties(total), active.values.numel())
    overflow |= inside.sum() > room
    place = inside.nonzero_static(size=room, fill_value=-1)[:, 0]
    filled, place = place >= 0, place.clamp_min(0)
    last = x.shape[0] - 1
    return Places(
        Active(
            torch.where(filled, active.rows[place], last),
            torch.where(filled, active.latents[place], 0),
            torch.where(filled, active.values[place], 0),
        ),
        overflow,
    )


def largest_places(wide: Active, n_rows: int, k: int) -> Active:
    """Keep the k largest places of each row, of a selection with equally many in each."""
    values, chosen = wide.values.view(n_rows, -1).topk(k, dim=1, sorted=False)
    latents = wide.latents.view(n_rows, -1).gather(1, chosen)
    return Active(_rows_of(latents), latents.flatten(), values.flatten())


def _rows_of(table: Int[Tensor, "row place"]) -> Int[Tensor, " pair"]:
    rows = torch.arange(table.shape[0], device=table.device)
    return rows[:, None].expand_as(table).flatten()


def _with_ties(places: int) -> int:
    return places + places // 16 + 64


PLACES: dict[str, Callable[[Encoder, Tensor, int], Places]] = {
    "topk": lambda encoder, x, k: Places(topk_places(encoder, x, k)),
    "batchtopk": batch_topk_places,
    "mutual-choice": batch_topk_places,
}
"""By the names in `coder.ACTIVATIONS`."""
