"""One training step of one SAE: losses, and each weight's gradient in turn, by hand.

    FVU = |x - x~|^2 / |x - mean(x)|^2                                     (paper, eq. 5)
    loss = FVU + alpha AuxK + Multi-TopK FVU / 8                           (sparsify's weights)

AuxK (arXiv 2406.04093, A.2): the dead latents' own top-k reconstructs what the living left over.
The same term revives under-used latents in place of dead ones (allocation.py).
Multi-TopK (the same, 6.2): a second reconstruction from the top 4k.  Both send gradients to the
encoder: the derivative of a latent's value is 1 where it is active, whichever top-k chose it.

By hand, because a backward pass by autograd would hold a dense gradient of each matrix at once;
written out, every weight gradient is a sum of weighted rows, made when its tensor is updated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from resa_lens.machine import determinism
from resa_lens.machine.determinism import sum_by_index
from resa_lens.saes.allocation import Chosen, Places, even_places, feature_choice, last_values
from resa_lens.saes.coder import ACTIVATIONS, BATCH_TOPK, Coder
from resa_lens.saes.kernels import by_latent, pair_dots, row_dots, row_starts, weighted_rows
from resa_lens.saes.select import (
    Active,
    Encoder,
    batch_topk,
    kth_largest,
    largest_of_each_row,
    topk,
)
from resa_lens.saes.static import PLACES, largest_places, topk_places
from resa_lens.saes.world import ALONE, World

MULTI_TOPK = 4
MULTI_TOPK_WEIGHT = 1 / 8


@dataclass(frozen=True)
class Loss:
    """Which terms the loss has besides the FVU."""

    auxk_alpha: float = 0.0
    """Weight of the AuxK loss; 1/32 in arXiv 2406.04093."""
    multi_topk: bool = False


class Term(NamedTuple):
    """One reconstruction's part of the gradients."""

    active: Active
    slope: Float[Tensor, " active"]
    """d loss / d value of each active latent."""
    pull: Float[Tensor, "row d_in"]
    """d loss / d reconstruction."""
    with_b_dec: bool
    """Whether the reconstruction holds b_dec; AuxK's does not: it rebuilds an error."""


class Step(NamedTuple):
    """Losses of a step and what its gradients are made of."""

    fvu: Float[Tensor, ""]
    auxk: Float[Tensor, ""]
    multi_topk: Float[Tensor, ""]
    fired: Bool[Tensor, " d_sae"]
    centred: Float[Tensor, "row d_in"]
    terms: tuple[Term, ...]
    """The first is the reconstruction's own."""
    overflow: Bool[Tensor, ""] | None = None
    """Whether a selection in places had too few of them: take the step again, without places."""
    chosen: Chosen | None = None
    """Of Feature Choice, over the rows of all ranks; its active latents are this rank's."""


def total_variance(x: Float[Tensor, "row d_in"], world: World = ALONE) -> Float[Tensor, ""]:
    """Return sum |x - mean(x)|^2, the mean and the sum over the rows of all ranks."""
    # torch.var along the rows is ten times slower on a CPU.
    mean = world.sum_(x.sum(0)) / world.rows(x)
    return world.sum_((x - mean).pow_(2).sum())


@torch.no_grad()
def forward_step(
    coder: Coder,
    x: Float[Tensor, "row d_in"],
    loss: Loss,
    *,
    half: tuple[Tensor, Tensor] | None = None,
    dead: Bool[Tensor, " d_sae"] | None = None,
    world: World = ALONE,
    places: bool = False,
    shares: Places | None = None,
) -> Step:
    """Return the losses on a batch and the terms of their gradients.

    Args:
        coder: the SAE being trained.
        x: activations, this rank's part of the batch.
        loss: which terms.
        half: encoder weights and bias in bfloat16, for the search of candidates.
        dead: latents that AuxK revives.
        world: over whose rows the losses are taken.
        places: select in shapes that the data do not decide (static.py); AuxK does not.
        shares: of Feature Choice, how the rows of all ranks are divided; even if left out.
    """
    weight, bias, W_dec = coder.encoder.weight, coder.encoder.bias, coder.W_dec
    assert W_dec is not None
    encoder = Encoder(weight, bias, half)
    centred = x - coder.b_dec
    variance = total_variance(x, world).clamp_min(torch.finfo(x.dtype).tiny)
    k, n_rows = coder.cfg.k, x.shape[0]
    wide = overflow = chosen = None
    if loss.multi_topk:
        widest = min(MULTI_TOPK * k, coder.num_latents)
        wide = (topk_places if places else topk)(encoder, centred, widest)
    if coder.cfg.activation == "feature-choice":
        chosen = _choose(coder, encoder, centred, world, shares)
        active = chosen.active
    elif wide is not None and coder.cfg.activation == "topk":
        largest = largest_places(wide, n_rows, k) if places else None
        active = largest or largest_of_each_row(*wide, n_rows, k)
    elif places:
        active, overflow = PLACES[coder.cfg.activation](encoder, centred, k)
    else:
        active = _select(coder, encoder, centred, world)
    rebuilt = weighted_rows(W_dec, row_starts(active.rows, n_rows), active.latents, active.values)
    error = x - rebuilt - coder.b_dec
    terms = [_term(active, error.mul(-2 / variance), W_dec)]
    fvu = world.sum_(error.pow(2).sum()) / variance
    none = torch.zeros((), device=x.device)
    auxk, multi = none, none
    if wide is not None:
        rows = weighted_rows(W_dec, row_starts(wide.rows, n_rows), wide.latents, wide.values)
        off = x - rows - coder.b_dec
        multi = world.sum_(off.pow(2).sum()) / variance
        terms.append(_term(wide, off.mul_(-2 * MULTI_TOPK_WEIGHT / variance), W_dec))
    if loss.auxk_alpha and dead is not None and (n_dead := int(dead.sum())):
        index = dead.nonzero()[:, 0]
        among = Encoder(weight[index], bias[index], half and (half[0][index], half[1][index]))
        heuristic = max(1, x.shape[1] // 2)
        revived = topk(among, centred, min(heuristic, n_dead))
        revived = Active(revived.rows, index[revived.latents], revived.values)
        rows = weighted_rows(
            W_dec, row_starts(revived.rows, n_rows), revived.latents, revived.values
        )
        off = rows - error
        scale = min(n_dead / heuristic, 1.0)
        auxk = scale * world.sum_(off.pow(2).sum()) / variance
        # The error is a constant here: AuxK may not pull at the living latents.
        terms.append(_term(revived, off.mul_(2 * loss.auxk_alpha * scale / variance), W_dec, False))
    if places:
        fired = sum_by_index(active.latents, (active.values > 0).float(), coder.num_latents) > 0
    else:
        fired = torch.zeros(coder.num_latents, dtype=torch.bool, device=x.device)
        fired[active.latents] = True
    return Step(fvu, auxk, multi, world.any_(fired), centred, tuple(terms), overflow, chosen)


def _select(coder: Coder, encoder: Encoder, centred: Tensor, world: World) -> Active:
    k, activation = coder.cfg.k, coder.cfg.activation
    if ACTIVATIONS[activation] is not BATCH_TOPK or world.size == 1:
        return ACTIVATIONS[activation].train(encoder, centred, k)
    # The largest of all ranks' rows may lie with one rank.
    total = world.rows(centred)
    active = batch_topk(encoder, centred, min(coder.num_latents, -(-k * total // centred.shape[0])))
    values = torch.cat([part.to(centred.device) for part in world.gather(active.values.cpu())])
    kept = active.values >= kth_largest(values, k * total)
    return Active(*(part[kept] for part in active))


def _choose(
    coder: Coder, encoder: Encoder, centred: Tensor, world: World, places: Places | None
) -> Chosen:
    if places is None:
        total = coder.cfg.k * world.rows(centred)
        places = Places(even_places(coder.num_latents, total))
    chosen = feature_choice(encoder, centred, places.counts, places.bar)
    if world.size == 1:
        return chosen
    # The largest of all ranks' rows may lie with one rank.
    active, device = chosen.active, centred.device
    parts: list[tuple[Tensor, Tensor]] = world.gather((active.latents.cpu(), active.values.cpu()))
    latents, values = (torch.cat(column).to(device) for column in zip(*parts, strict=True))
    lowest = last_values(latents, values, places.counts.to(device))
    kept = active.values >= lowest[active.latents]
    demand = chosen.demand if chosen.demand is None else world.sum_(chosen.demand)
    return Chosen(Active(*(part[kept] for part in active)), lowest, demand)


def _term(
    active: Active, pull: Float[Tensor, "row d_in"], W_dec: Tensor, with_b_dec: bool = True
) -> Term:
    starts = row_starts(active.rows, pull.shape[0])
    slope = pair_dots(pull, W_dec, starts, active.latents)
    if not determinism.on_cpu(slope):
        # A place that nothing took has no slope.
        slope = torch.where(active.values > 0, slope, 0)
    return Term(active, slope, pull, with_b_dec)


def gradients(coder: Coder, step: Step, world: World = ALONE) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's name and gradient; the caller may update it before the next.

    The decoder's gradient has no part along the decoder's directions, whose length is fixed.
    """
    W_dec = coder.W_dec
    assert W_dec is not None
    d_sae = coder.num_latents
    # Not as a decorator: torch's keeps what a generator gave until it gives the next.
    with torch.no_grad():
        bias = torch.zeros_like(coder.encoder.bias)
        b_dec = torch.zeros_like(coder.b_dec)
        for term in step.terms:
            bias += sum_by_index(term.active.latents, term.slope, d_sae)
            if term.with_b_dec:
                b_dec += term.pull.sum(0)
        world.sum_(bias)
        world.sum_(b_dec)
        # The encoder sees x - b_dec.
        b_dec -= bias @ coder.encoder.weight
        sorted_terms = [(by_latent(t.active.rows, t.active.latents, d_sae), t) for t in step.terms]
        decoder = _summed(
            weighted_rows(t.pull, s.starts, s.rows, t.active.values[s.order])
            for s, t in sorted_terms
        )
        world.sum_(decoder)
        along = row_dots(decoder, W_dec)
        decoder.addcmul_(W_dec, along[:, None], value=-1)
    yield "W_dec", decoder
    del decoder
    with torch.no_grad():
        encoder = _summed(
            weighted_rows(step.centred, s.starts, s.rows, t.slope[s.order]) for s, t in sorted_terms
        )
        world.sum_(encoder)
    yield "encoder.weight", encoder
    del encoder
    yield "encoder.bias", bias
    yield "b_dec", b_dec


def _summed(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total += part
    return total
