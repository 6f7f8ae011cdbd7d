"""Who gets the k x N places of a batch: Feature Choice, and latents that get too few.

After "Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders" (arXiv
2411.02124).  Of that paper the abstract and the introduction's beginning, and public reviews, could
be read here.  They say: a code is a matching of N tokens with the latents under a budget of k x N;
TopK gives each token k latents; Feature Choice gives each latent at most m tokens; Mutual Choice
has no other limit than the budget, which is BatchTopK (arXiv 2412.06410), the same computation; the
densities of most latents follow Zipf's law except at the lower end; and an auxiliary loss
generalises AuxK from dead to under-used latents.  The rest is **our reading**:

- m tokens a latent add up to k x N in every batch: even, or by Zipf's law (the r-th most wanted
  latent gets a share in proportion to 1 / r, one token at least and the whole batch at most);
- a latent is wanted by the tokens on which it exceeds a bar that is the same for all latents (the
  mean of what the latents' last places took in the batch before): how often it was chosen would
  only repeat what it was given;
- after training a latent is active above a threshold of its own: the mean of its last place over
  the last batches, all of them scaled by one number so that k latents a token are active;
- a latent is under-used where its density lies below half of the line that fits the logarithms of
  the upper half of the densities and their ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.machine import determinism
from resa_lens.saes import select
from resa_lens.saes.config import SaeConfig
from resa_lens.saes.select import Active, Encoder

UNDER = 0.5
"""Of the density that Zipf's law gives a rank; below it a latent is under-used."""
RECENT = 32
"""Batches over which the last places are averaged."""


class Chosen(NamedTuple):
    """What Feature Choice took of a batch."""

    active: Active
    lowest: Float[Tensor, " latent"]
    """The value at each latent's last place; 0 where fewer tokens than its places are above zero,
    infinite where it has no place."""
    demand: Float[Tensor, " latent"] | None = None
    """Tokens on which each latent exceeds the bar, where one was given."""


class Places(NamedTuple):
    """How many tokens of a batch each latent gets, and the bar above which it is wanted."""

    counts: Int[Tensor, " latent"]
    bar: float | None = None


def check_places(config: SaeConfig, rows: int) -> None:
    """Refuse Feature Choice where a batch holds fewer places than there are latents.

    Args:
        config: with latents and k filled in.
        rows: tokens of a batch, of all processes together.

    Raises:
        BadInputError: some latents could never be chosen.
    """
    latents = config.latents or 0
    if config.activation == "feature-choice" and config.k * rows < latents:
        raise BadInputError(
            f"feature-choice divides k x tokens, {config.k} x {rows} a batch, among {latents} "
            "latents, less than one each; raise --batch or --k, or lower --latents"
        )


def even_places(latents: int, total: int) -> Int[Tensor, " latent"]:
    """Return places that differ by one at most and add up to the total, spread over the latents."""
    marks = np.arange(latents + 1, dtype=np.int64) * total // latents
    return torch.from_numpy(np.diff(marks))


def zipf_places(latents: int, rows: int, total: int) -> Int[Tensor, " latent"]:
    """Return places by rank that fall as 1 / rank and add up to the total.

    Each latent gets one place, and what is left by Zipf's law; what the first ones would get beyond
    the rows goes to the others.  With fewer places than latents they are even.

    Args:
        latents: how many.
        rows: of the batch, the most places that a latent can use.
        total: places, at most rows x latents.
    """
    if total < latents:
        return even_places(latents, total)
    spare, most = total - latents, rows - 1
    weight = 1 / np.arange(1, latents + 1)
    left = weight[::-1].cumsum()[::-1]
    # With the first j full, the rest shares what they leave.
    scale = (spare - np.arange(latents) * most) / left
    first = int((scale * weight <= most * (1 + 1e-9)).argmax())
    marks = np.rint(np.minimum(most, scale[first] * weight).cumsum()).astype(np.int64)
    marks[-1] = spare
    return torch.from_numpy(1 + np.diff(marks, prepend=0))


@torch.no_grad()
def feature_choice(
    encoder: Encoder, x: Float[Tensor, "row d_in"], places: Int[Tensor, " latent"] | int,
    bar: float | None = None,
) -> Chosen:  # fmt: skip
    """Return the largest tokens of each latent, those of them that are above zero.

    Ties at a last place come along, as in `batch_topk`.  The product is taken in pieces of latents,
    so that a piece holds all tokens of its latents.

    Args:
        encoder: weights and bias.
        x: activations less b_dec, the whole batch.
        places: tokens that each latent gets, or k: k x rows / latents each.
        bar: of `Chosen.demand`.
    """
    weight, bias = encoder.half or (encoder.weight, encoder.bias)
    latents, rows = weight.shape[0], x.shape[0]
    if isinstance(places, int):
        places = even_places(latents, places * rows)
    places = places.to(x.device)
    step = max(1, select.PRODUCT_BYTES // (max(1, rows) * weight.element_size()))
    if x.device.type != "cpu":
        step = max(step, min(latents, 4096))
    columns = x.to(weight.dtype).mT
    parts, demand = [], []
    for first in range(0, latents, step):
        part = slice(first, first + step)
        pre = torch.addmm(bias[part, None], weight[part], columns)
        if bar is not None:
            # A product counts faster than a sum of truth values.
            demand.append((pre > bar).float() @ pre.new_ones(rows, dtype=torch.float))
        piece = Encoder(encoder.weight[part], encoder.bias[part], encoder.half and (weight, bias))
        off = select.rounding(piece, x, pre.mT)
        sure = reach = pre.float()
        if off is not None:
            sure, reach = sure - off.mT, reach + off.mT
        limit = _last_places(sure, places[part])
        which, tokens = ((reach >= limit[:, None]) & (reach > 0)).nonzero(as_tuple=True)
        parts.append(Active(tokens, which + first, pre[which, tokens].float()))
    pairs = Active(*(torch.cat(column) for column in zip(*parts, strict=True)))
    # Row by row, the latents of a row in their order.
    order = _stable_order(pairs.rows, rows)
    pairs = Active(*(column[order] for column in pairs))
    if encoder.half is not None:
        pairs = pairs._replace(values=select.exact(encoder, x, pairs.rows, pairs.latents))
        pairs = Active(*(column[pairs.values > 0] for column in pairs))
        lowest = last_values(pairs.latents, pairs.values, places)
        kept = pairs.values >= lowest[pairs.latents]
        pairs = Active(*(column[kept] for column in pairs))
    else:
        lowest = _least(pairs, places)
    return Chosen(pairs, lowest, torch.cat(demand) if demand else None)


def _stable_order(numbers: Int[Tensor, " pair"], count: int) -> Int[Tensor, " pair"]:
    """Return the order that sorts numbers below a count, equal ones as they come.

    NumPy sorts 16 bits by counting, a fifth of the time that torch's comparisons take.
    """
    if determinism.on_cpu(numbers) and count <= 1 << 16:
        return torch.from_numpy(np.argsort(numbers.numpy().astype(np.uint16), kind="stable"))
    return numbers.to(torch.int32).argsort(stable=True)


def _last_places(
    pre: Float[Tensor, "latent row"], places: Int[Tensor, " latent"]
) -> Float[Tensor, " latent"]:
    """Return each latent's value at its last place, infinite without one."""
    rows = pre.shape[1]
    limit = pre.new_full((pre.shape[0],), float("inf"))
    limit[places >= rows] = -float("inf")
    if not determinism.on_cpu(pre):
        ordered = pre.sort(dim=1, descending=True).values
        at = (places - 1).clamp(0, rows - 1)
        inner = (places > 0) & (places < rows)
        return torch.where(inner, ordered.gather(1, at[:, None])[:, 0], limit)
    numbers = pre.numpy()
    kinds, kind = np.unique(places.numpy(), return_inverse=True)
    for number, count in enumerate(kinds):
        if not 0 < count < rows:
            continue
        chosen = np.flatnonzero(kind == number)
        table = numbers if len(kinds) == 1 else numbers[chosen]
        at = rows - count
        limit[torch.from_numpy(chosen)] = torch.from_numpy(
            np.ascontiguousarray(np.partition(table, at, axis=1)[:, at])
        )
    return limit


def _least(pairs: Active, places: Int[Tensor, " latent"]) -> Float[Tensor, " latent"]:
    """Return `Chosen.lowest` of latents whose places are those that were found."""
    lowest = pairs.values.new_full(places.shape, float("inf"))
    lowest.scatter_reduce_(0, pairs.latents, pairs.values, "amin")
    used = torch.bincount(pairs.latents, minlength=places.numel())
    return torch.where(used < places, torch.zeros_like(lowest), lowest)


def last_values(
    latents: Int[Tensor, " pair"], values: Float[Tensor, " pair"], places: Int[Tensor, " latent"]
) -> Float[Tensor, " latent"]:
    """Return the value at each latent's last place among pairs above zero, as `Chosen.lowest`."""
    order = values.argsort(descending=True, stable=True)
    order = order[_stable_order(latents[order], places.numel())]
    used = torch.bincount(latents, minlength=places.numel())
    starts = used.cumsum(0) - used
    full = (used >= places) & (places > 0)
    lowest = torch.where(places > 0, 0.0, float("inf")).to(values)
    lowest[full] = values[order[(starts + places - 1)[full]]]
    return lowest


def under_used(density: Float[Tensor, " latent"]) -> Bool[Tensor, " latent"]:
    """Return the latents that are active less often than Zipf's law gives their rank.

    The law is log density = a - s log rank, fitted by least squares to the upper half of the
    latents that were active at all; under-used are those of the others whose density lies below
    `UNDER` of it, the dead with them (our reading of arXiv 2411.02124).

    Args:
        density: share of the tokens on which each latent is active.
    """
    values, order = density.double().cpu().sort(descending=True, stable=True)
    upper = int((values > 0).sum()) // 2
    mask = torch.zeros(density.shape, dtype=torch.bool)
    if upper < 2:
        mask = density.cpu() <= 0
        return mask.to(density.device)
    ranks = torch.arange(1, values.numel() + 1, dtype=torch.double).log()
    x, y = ranks[:upper], values[:upper].log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).pow(2).sum()
    expected = (y.mean() + slope * (ranks - x.mean())).exp()
    mask[order[upper:]] = (values < UNDER * expected)[upper:]
    return mask.to(density.device)


class Usage:
    """What a training keeps of how much its latents are used, beside when each fired last.

    Only what the configuration needs is kept, so that checkpoints of others stay as they are.
    """

    def __init__(self, config: SaeConfig, latents: int, device: torch.device) -> None:
        self.k = config.k
        self.chooses = config.activation == "feature-choice"
        self.by_zipf = self.chooses and config.allocation == "zipf"
        self.counts = bool(config.auxk_alpha) and config.aux == "zipf"

        def zeros(kept: bool, *shape: int) -> Tensor | None:
            return torch.zeros(shape, device=device) if kept else None

        self.density = zeros(self.counts, latents)
        """Share of the tokens on which a latent is active, over the window of the dead."""
        self.lowest = zeros(self.chooses, latents)
        """A latent's last place, over `RECENT` batches."""
        self.demand = zeros(self.by_zipf, latents)
        """Share of the tokens on which a latent exceeds the bar."""
        self.bar = zeros(self.by_zipf)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold, to be written or copied into."""
        names = ("density", "lowest", "demand", "bar")
        return {f"usage.{n}": v for n in names if (v := getattr(self, n)) is not None}

    def places(self, rows: int) -> Places | None:
        """Return how a batch of so many rows is divided; None where latents do not choose."""
        if self.lowest is None:
            return None
        latents = self.lowest.numel()
        if self.demand is None or self.bar is None:
            return Places(even_places(latents, self.k * rows))
        order = self.demand.cpu().argsort(descending=True, stable=True)
        counts = torch.empty(latents, dtype=torch.long)
        counts[order] = zipf_places(latents, rows, self.k * rows)
        return Places(counts, self.bar.item())

    def note(self, fired: Tensor | None, chosen: Chosen | None, rows: int, step: int,
             window: float) -> None:  # fmt: skip
        """Take a step into the averages.

        Args:
            fired: [latent], tokens on which each latent was active; where densities are kept.
            chosen: of Feature Choice, over the rows of all processes.
            rows: of the step, of all processes.
            step: its number, from 1.
            window: tokens that densities are of; as many as there were before it is full.
        """
        if self.density is not None and fired is not None:
            share = max(rows / window, 1 / step)
            self.density.lerp_(fired.float() / rows, min(1.0, share))
        if chosen is None or self.lowest is None:
            return
        newest = torch.where(chosen.lowest.isfinite(), chosen.lowest, self.lowest)
        self.lowest.lerp_(newest, 1 / min(step, RECENT))
        if self.demand is not None and self.bar is not None and chosen.demand is not None:
            self.demand.lerp_(chosen.demand / rows, max(rows / window, 1 / step))
            self.bar.copy_(newest.mean())
