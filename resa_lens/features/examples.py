"""Places at which features fire, kept while documents stream by: the strongest, and drawn ones.

Lists keep the places of a feature in a phase that rank highest.  By activation these are its
strongest ones.  By a hash of the feature and the text before the place, which is as
good as a number drawn for each, they are drawn evenly from all that it fires at; and of places with
the same text before them, which half of a corpus' documents may begin with, one is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.features.config import ActivityConfig

_PRIMES = (-7046029254386353131, -4658895280553007687)
"""Of splitmix64, as signed numbers: products wrap around in 64 bits."""
_BITS = 24
"""Of a draw: every number of them is exact in float32."""


@dataclass(frozen=True)
class Firings:
    """Active latents of one batch, sorted by latent, then by token."""

    latents: Int[Tensor, " pair"]
    rows: Int[Tensor, " pair"]
    """Tokens of the batch, document by document."""
    values: Float[Tensor, " pair"]
    lists: Int[Tensor, " pair"]
    """Phase and latent as one number, phase x d_sae + latent."""
    documents: Int[Tensor, " row"]
    contexts: Int[Tensor, " row"]
    """A number for the text that ends in each token; equal texts have equal ones."""
    length: int
    """Tokens of each document."""

    def draws(self) -> Float[Tensor, " pair"]:
        """Return a number above 0 for each, as if drawn; equal for a feature at equal texts."""
        mixed = self.contexts[self.rows] + self.latents * _PRIMES[0]
        for prime in _PRIMES:
            mixed = (mixed ^ (mixed >> 31)) * prime
        return ((mixed >> (64 - _BITS)) & (2**_BITS - 1)).float() + 1


class Examples:
    """Of each feature in each phase the strongest places, and as many drawn from all.

    A list a phase and latent, first those of the strongest places, then as many of the drawn ones;
    no two places of a list stand after the same text.
    """

    def __init__(self, lists: int, config: ActivityConfig, device: str = "cpu") -> None:
        self.config, self.n, self.half = config, config.examples, lists

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(2 * lists, config.examples, *shape, dtype=dtype, device=device)

        self.ranks = zeros(dtype=torch.float)
        """Above 0 where there is a place; descending."""
        self.values = zeros(dtype=torch.float)
        self.documents = zeros(dtype=torch.int) - 1
        self.positions = zeros(dtype=torch.int)
        self.contexts = zeros(dtype=torch.long)
        # Shown as colours: three digits do.
        self.windows = zeros(config.window, dtype=torch.half)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @staticmethod
    def bytes_of(config: ActivityConfig) -> int:
        """Return what one feature takes in one phase."""
        return 2 * config.examples * (4 + 4 + 4 + 4 + 8 + 2 * config.window)

    def add(self, firings: Firings, stay: Int[Tensor, " pair"]) -> None:
        """Take in the places of a batch.

        Args:
            firings: of the batch.
            stay: of a feature in a phase of a document, to which each place belongs: of each the
                strongest place may be one of the strongest.
        """
        values = firings.values
        tops = values.new_zeros(int(stay[-1]) + 1).scatter_reduce_(0, stay, values, "amax")
        # The first place that reaches its stay's peak.
        at_top = (values == tops[stay]).nonzero()[:, 0]
        peak = torch.full_like(tops, values.numel(), dtype=torch.long)
        peak.scatter_reduce_(0, stay[at_top], at_top, "amin")
        peak = peak[tops > self.ranks[firings.lists[peak], -1]]
        # Every place is drawn: of equal texts the draw is the same, and would always hide what is
        # drawn lower in the same stay.
        draws = firings.draws()
        drawn = (draws > self.ranks[self.half + firings.lists, -1]).nonzero()[:, 0]
        place = torch.cat([peak, drawn])
        ranks = torch.cat([values[peak], draws[drawn]])
        lists = torch.cat([firings.lists[peak], self.half + firings.lists[drawn]])
        contexts = firings.contexts[firings.rows[place]]
        index = self._candidates(lists, ranks, contexts)
        if not index.numel():
            return
        place = place[index]
        token = firings.rows[place]
        self._keep(
            lists[index],
            ranks[index],
            {
                "values": values[place],
                "documents": firings.documents[token].int(),
                "positions": (token % firings.length).int(),
                "contexts": contexts[index],
                "windows": self._windows(firings, place),
            },
        )

    def _candidates(
        self,
        lists: Int[Tensor, " place"],
        ranks: Float[Tensor, " place"],
        contexts: Int[Tensor, " place"],
    ) -> Int[Tensor, " candidate"]:
        """Return the places that go into their lists, by list, the highest first.

        No more than the list is long, of equal ranks the earlier document, and of equal contexts
        the first that came.
        """
        known = self.contexts[lists] == contexts[:, None]
        known &= self.documents[lists] >= 0
        index = (~known.any(1)).nonzero()[:, 0]
        index = index[ranks[index].argsort(descending=True, stable=True)]
        if index.numel():
            # One number for list and context: a sort less, and equal for others once in 2^64.
            text = contexts[index] * _PRIMES[0] + lists[index] * _PRIMES[1]
            text, order = text.sort(stable=True)
            new = torch.ones_like(index, dtype=torch.bool)
            new[1:] = text[1:] != text[:-1]
            index = index[order[new].sort().values]
        index = index[lists[index].argsort(stable=True)]
        return index[_place_in_group(lists[index])[1] < self.n]

    def _keep(
        self,
        lists: Int[Tensor, " candidate"],
        ranks: Float[Tensor, " candidate"],
        places: dict[str, Tensor],
    ) -> None:
        """Merge candidates, ordered as `_candidates` gives them, into their lists."""
        slot, rank = _place_in_group(lists)
        changed = torch.unique_consecutive(lists)
        fresh = self.ranks.new_full((changed.numel(), self.n), -1.0)
        fresh[slot, rank] = ranks
        # What is empty on the left is 0, on the right -1: a list is filled up in order.
        both = torch.cat([self.ranks[changed], fresh], 1)
        best, chosen = (
            part[:, : self.n] for part in both.sort(dim=1, descending=True, stable=True)
        )
        for name, new in places.items():
            table = getattr(self, name)
            old = table[changed]
            added = torch.zeros_like(old)
            added[slot, rank] = new
            pick = chosen[(...,) + (None,) * (old.ndim - 2)].expand(-1, -1, *old.shape[2:])
            table[changed] = torch.cat([old, added], 1).gather(1, pick)
        self.ranks[changed] = best

    def _windows(
        self, firings: Firings, places: Int[Tensor, " example"]
    ) -> Float[Tensor, "example window"]:
        """Return the feature's activations around each place, 0 beyond its document."""
        before, after = self.config.before, self.config.after
        steps = torch.arange(-before, after + 1, device=places.device)
        # Sorted by feature and token: those nearby stand no further away in the list.
        near = places[:, None] + steps
        there = near.clamp(0, firings.rows.numel() - 1)
        own = firings.rows[places][:, None]
        shift, position = firings.rows[there] - own, own % firings.length
        inside = (near == there) & (firings.latents[there] == firings.latents[places][:, None])
        inside &= shift >= -position.clamp(max=before)
        inside &= shift <= (firings.length - 1 - position).clamp(max=after)
        windows = torch.zeros(near.shape, dtype=torch.half, device=places.device)
        example, column = inside.nonzero(as_tuple=True)
        values = firings.values[there[example, column]].clamp(max=torch.finfo(torch.half).max)
        windows[example, shift[example, column] + before] = values.half()
        return windows


class FiringTokens:
    """The tokens at which each feature fires, with how often and how strongly.

    Each time that the table is full, the `config.firing_tokens` most frequent of each feature are
    kept: of a feature that fires at more, one that is rare at first may be counted too low.
    """

    def __init__(self, d_sae: int, config: ActivityConfig, device: str = "cpu") -> None:
        self.n, self.used = config.firing_tokens, 0
        size = 2 * self.n * d_sae
        self.keys = torch.zeros(size, dtype=torch.long, device=device)
        """Latent and token as one number."""
        self.counts = torch.zeros(size, dtype=torch.int, device=device)
        self.sums = torch.zeros(size, dtype=torch.double, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""
        return {"keys": self.keys, "counts": self.counts, "sums": self.sums}

    @staticmethod
    def bytes_of(config: ActivityConfig) -> int:
        """Return what one feature takes."""
        return 2 * config.firing_tokens * (8 + 4 + 8)

    def add(
        self,
        latents: Int[Tensor, " pair"],
        tokens: Int[Tensor, " pair"],
        values: Float[Tensor, " pair"],
    ) -> None:
        """Add the firings of one batch."""
        keys, counts, sums = _summed((latents << 32) | tokens, None, values.double())
        if self.used + keys.numel() > self.keys.numel():
            old = (part[: self.used] for part in (self.keys, self.counts, self.sums))
            keys, counts, sums = (
                torch.cat(parts) for parts in zip(old, (keys, counts, sums), strict=True)
            )
            keys, counts, sums = self._most_frequent(*_summed(keys, counts, sums))
            self.used = 0
        end = self.used + keys.numel()
        for table, new in ((self.keys, keys), (self.counts, counts), (self.sums, sums)):
            table[self.used : end] = new
        self.used = end

    def table(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return latent, token, count and sum; by latent, the most frequent first."""
        parts = (self.keys[: self.used], self.counts[: self.used], self.sums[: self.used])
        keys, counts, sums = self._most_frequent(*_summed(*parts))
        return keys >> 32, keys & (2**32 - 1), counts, sums

    def _most_frequent(
        self, keys: Tensor, counts: Tensor, sums: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the most frequent tokens of each feature; of equal ones the lower number."""
        order = counts.argsort(descending=True, stable=True)
        order = order[(keys[order] >> 32).argsort(stable=True)]
        order = order[_place_in_group(keys[order] >> 32)[1] < self.n]
        return keys[order], counts[order], sums[order]


def _summed(keys: Tensor, counts: Tensor | None, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add up what has the same key; each one counts once without counts."""
    unique, group = keys.unique(return_inverse=True)
    total = torch.zeros_like(unique, dtype=torch.int)
    total.index_add_(
        0, group, torch.ones_like(group, dtype=torch.int) if counts is None else counts
    )
    return unique, total, torch.zeros_like(unique, dtype=torch.double).index_add_(0, group, sums)


def _place_in_group(groups: Int[Tensor, " item"]) -> tuple[Tensor, Tensor]:
    """Return the number of each item's group, of sorted ones, and its place in that."""
    _, slot, sizes = torch.unique_consecutive(groups, return_inverse=True, return_counts=True)
    places = torch.arange(groups.numel(), device=groups.device)
    return slot, places - (sizes.cumsum(0) - sizes)[slot]
