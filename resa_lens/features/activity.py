"""Where, how often and how strongly every feature fires, over any documents with phases.

One pass over the documents serves all layers.  From each batch's active latents, a list of (token,
latent, value), each layer keeps per feature:

    tokens fired, sum and maximum of the activation by phase (prompt, think, answer)
    documents fired in, and what the standard error of the density over documents needs
    a histogram of the activation in half octaves
    the strongest documents, each with the activations around its peak

No array of batch x sequence x latents is made: what is held grows with the latents alone, and
`needed_bytes` says how much before the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.features.checks import check_features
from resa_lens.features.config import ActivityConfig as ActivityConfig
from resa_lens.models.activations import check_hookpoints, stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.progress import Advance
from resa_lens.saes.coder import SparseActs, SparseCoder, encode, encoder_of
from resa_lens.saes.kernels import by_latent
from resa_lens.texts.phases import PHASES, PhasedBatch, phase_counts

LOWEST, OCTAVES = -10, 24
BINS = 2 * OCTAVES
"""Of the histogram: from 2^-10 to 2^14, two an octave; what lies outside is in the end bins."""
CONTEXT = 8
"""Tokens that make two peaks the same example."""
_PRIME = 1_000_003
_EXPONENT = 127  # of 1.0 in float32
_HALF_OCTAVE = 22  # bits below the exponent and the first bit of the mantissa


def bin_edges() -> Float[Tensor, " bins+1"]:
    """Return the edges of the histogram's bins: 2^e, 1.5 x 2^e, 2^(e+1), ..."""
    octaves = 2.0 ** torch.arange(LOWEST, LOWEST + OCTAVES + 1)
    return torch.stack([octaves, 1.5 * octaves], 1).flatten()[: BINS + 1]


def needed_bytes(d_in: int, d_sae: int, config: ActivityConfig) -> int:
    """Return what one layer holds: its encoder, also in bfloat16, and its figures."""
    encoder = 6 * d_sae * (d_in + 1)
    figures = len(PHASES) * (8 + 8 + 4) + 8 + 16 + 4 * BINS
    return encoder + d_sae * (figures + config.examples * (4 + 8 + 8 + 8 + 4 * config.window))


def contexts_of(ids: Int[Tensor, "batch position"]) -> Int[Tensor, "batch position"]:
    """Return a number for the last `CONTEXT` tokens up to each one; equal texts have equal ones."""
    # 0 is what stands before a document, so a text that begins later is another one.
    padded = F.pad(ids + 1, (CONTEXT - 1, 0))
    found = torch.zeros_like(ids)
    for back in range(CONTEXT):
        # Wraps around in 64 bits.
        found = found * _PRIME + padded[:, back : back + ids.shape[1]]
    return found


class Tally:
    """The figures of one layer; tensors over its latents, added to batch by batch."""

    def __init__(self, d_sae: int, config: ActivityConfig, device: str = "cpu") -> None:
        self.d_sae, self.config = d_sae, config
        n, phases = config.examples, len(PHASES)

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.fired = zeros(phases, d_sae)
        self.sums = zeros(phases, d_sae, dtype=torch.double)
        self.maxima = zeros(phases, d_sae, dtype=torch.float)
        self.documents = zeros(d_sae)
        # Over documents: sum of fired^2, and of fired x tokens.
        self.squares = zeros(d_sae, dtype=torch.double)
        self.products = zeros(d_sae, dtype=torch.double)
        self.histogram = zeros(d_sae, BINS, dtype=torch.int32)
        self.top = zeros(d_sae, n, dtype=torch.float)
        self.top_documents = zeros(d_sae, n) - 1
        self.top_positions = zeros(d_sae, n)
        self.top_contexts = zeros(d_sae, n)
        self.windows = zeros(d_sae, n, config.window, dtype=torch.float)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def scalars(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides."""
        return {}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take what `scalars` gave."""

    @torch.no_grad()
    def add(
        self,
        acts: SparseActs,
        phases: Int[Tensor, " row"],
        documents: Int[Tensor, " row"],
        contexts: Int[Tensor, " row"],
        length: int,
    ) -> None:
        """Add one batch.

        Args:
            acts: active latents; row i is token i of the batch, document by document.
            phases: of each token, an index into `PHASES`.
            documents: the number of each token's document.
            contexts: a number for the text that ends in each token (`contexts_of`): of documents
                whose peaks have the same, one is an example.
            length: tokens of each document.
        """
        if self.config.threshold > 0:
            kept = acts.values > self.config.threshold
            acts = acts._replace(
                rows=acts.rows[kept], latents=acts.latents[kept], values=acts.values[kept]
            )
        if not acts.values.numel():
            return
        order, rows, _ = by_latent(acts.rows, acts.latents, self.d_sae)
        latents, values = acts.latents[order], acts.values[order].float()
        ones = torch.ones_like(latents)
        place = phases[rows] * self.d_sae + latents
        self.fired.view(-1).index_add_(0, place, ones)
        self.sums.view(-1).index_add_(0, place, values.double())
        self.maxima.view(-1).scatter_reduce_(0, place, values, "amax")
        bins = (values.view(torch.int32) >> _HALF_OCTAVE) - 2 * (_EXPONENT + LOWEST)
        bins = latents * BINS + bins.clamp(0, BINS - 1)
        self.histogram.view(-1).index_add_(0, bins, ones.int())
        # Sorted by latent, then by token: each feature's stay in a document is one segment.
        begins = torch.ones_like(latents, dtype=torch.bool)
        begins[1:] = (latents[1:] != latents[:-1]) | (rows[1:] // length != rows[:-1] // length)
        segment = begins.long().cumsum(0) - 1
        feature = latents[begins]
        fired = torch.bincount(segment, minlength=feature.numel()).double()
        self.documents.index_add_(0, feature, torch.ones_like(feature))
        self.squares.index_add_(0, feature, fired.square())
        self.products.index_add_(0, feature, fired * length)
        peaks = torch.zeros_like(fired, dtype=torch.float)
        peaks.scatter_reduce_(0, segment, values, "amax")
        if bool((wanted := peaks > self.top[feature, -1]).any()):
            # The first token that reaches its segment's peak.
            at_peak = (values == peaks[segment]).nonzero()[:, 0]
            first = torch.full_like(feature, rows.numel())
            first.scatter_reduce_(0, segment[at_peak], at_peak, "amin")
            index = self._candidates(feature, peaks, contexts[rows[first]], wanted)
            token = rows[first[index]]
            held = {
                "top_documents": documents[token],
                "top_positions": token % length,
                "top_contexts": contexts[token],
                "windows": self._windows(latents, rows, values, feature[index], token, length),
            }
            self._keep_best(feature[index], peaks[index], held)

    def _candidates(
        self,
        feature: Int[Tensor, " segment"],
        peaks: Float[Tensor, " segment"],
        contexts: Int[Tensor, " segment"],
        wanted: Bool[Tensor, " segment"],
    ) -> Int[Tensor, " candidate"]:
        """Return the segments that go into their feature's list, by feature, the strongest first.

        No more than the list is long, of equal peaks the earlier document, and of equal contexts
        the first that came: half of the documents of a corpus may begin with one system prompt.
        """
        index = wanted.nonzero()[:, 0]
        known = self.top_contexts[feature[index]] == contexts[index, None]
        known &= self.top_documents[feature[index]] >= 0
        index = index[~known.any(1)]
        index = index[peaks[index].argsort(descending=True, stable=True)]
        index = index[contexts[index].argsort(stable=True)]
        index = index[feature[index].argsort(stable=True)]
        if index.numel():
            new = torch.ones_like(index, dtype=torch.bool)
            new[1:] = (feature[index[1:]] != feature[index[:-1]]) | (
                contexts[index[1:]] != contexts[index[:-1]]
            )
            index = index[new].sort().values
        index = index[peaks[index].argsort(descending=True, stable=True)]
        index = index[feature[index].argsort(stable=True)]
        _, slot, counts = torch.unique_consecutive(
            feature[index], return_inverse=True, return_counts=True
        )
        rank = torch.arange(index.numel(), device=index.device) - (counts.cumsum(0) - counts)[slot]
        return index[rank < self.config.examples]

    def _keep_best(
        self,
        owner: Int[Tensor, " candidate"],
        peaks: Float[Tensor, " candidate"],
        held: Mapping[str, Tensor],
    ) -> None:
        """Merge candidates, ordered as `_candidates` gives them, into their features' lists."""
        changed, slot, counts = torch.unique_consecutive(
            owner, return_inverse=True, return_counts=True
        )
        rank = torch.arange(owner.numel(), device=owner.device) - (counts.cumsum(0) - counts)[slot]
        n = self.config.examples
        fresh = self.top.new_full((changed.numel(), n), -1.0)
        fresh[slot, rank] = peaks
        # What is empty on the left is 0, on the right -1: a feature's list is filled up in order.
        both = torch.cat([self.top[changed], fresh], 1)
        best, chosen = (part[:, :n] for part in both.sort(dim=1, descending=True, stable=True))
        for name, new in held.items():
            table = getattr(self, name)
            old = table[changed]
            added = torch.zeros_like(old)
            added[slot, rank] = new
            pick = chosen[(...,) + (None,) * (old.ndim - 2)].expand(-1, -1, *old.shape[2:])
            table[changed] = torch.cat([old, added], 1).gather(1, pick)
        self.top[changed] = best

    def _windows(
        self,
        latents: Int[Tensor, " pair"],
        rows: Int[Tensor, " pair"],
        values: Float[Tensor, " pair"],
        feature: Int[Tensor, " example"],
        token: Int[Tensor, " example"],
        length: int,
    ) -> Float[Tensor, "example window"]:
        """Return a feature's activations around a token, 0 beyond its document."""
        size = int(rows.max()) + length + 1
        keys = latents * size + rows
        steps = torch.arange(-self.config.before, self.config.after + 1, device=token.device)
        around = token[:, None] + steps
        inside = (around // length) == (token // length)[:, None]
        wanted = feature[:, None] * size + around.clamp_min(0)
        found = torch.searchsorted(keys, wanted).clamp(max=keys.numel() - 1)
        return torch.where(inside & (keys[found] == wanted), values[found], 0.0)


@dataclass(frozen=True)
class Activity:
    """The figures of some layers over the same documents."""

    tallies: Mapping[Hookpoint, Tally]
    tokens: tuple[int, ...]
    """Tokens of each phase."""
    documents: int
    squares: float
    """Sum over documents of the tokens squared."""
    config: ActivityConfig


class Store(Protocol):
    """Where checkpoints lie (saes/checkpoint.py)."""

    def load(self, trainers: Mapping[Hookpoint, Any]) -> int:
        """Restore the newest checkpoint; return the batches that it holds."""
        ...

    def keep(self, step: int, steps: int, trainers: Mapping[Hookpoint, Any]) -> None:
        """Write a checkpoint if one is due after this batch."""
        ...


def measure_activity(
    model: Model,
    coders: Mapping[Hookpoint, SparseCoder],
    batches: Sequence[PhasedBatch],
    config: ActivityConfig | None = None,
    *,
    store: Store | None = None,
    advance: Advance | None = None,
) -> Activity:
    """Run documents through the model and tally every feature at every place.

    Args:
        model: the host.
        coders: by place; encoders are enough.
        batches: documents with phases (`phases.phased_batches`).
        config: what is kept.
        store: checkpoints; a killed run goes on from its last one, to the same figures.
        advance: called with the number of batches done.

    Raises:
        BadInputError: no document, no place, or an SAE of another width.
    """
    config = config or ActivityConfig()
    check_hookpoints(model, list(coders))
    if not batches:
        raise BadInputError("no document was given; activity needs at least one")
    for point in coders:
        check_features(model, point, (), coders)
    tallies = {
        point: Tally(int(coder.num_latents or 0), config, model.device)
        for point, coder in coders.items()
    }
    done = store.load(tallies) if store else 0
    if advance and done:
        advance(done)
    encoders = {point: encoder_of(coder) for point, coder in coders.items()}
    left = range(done, len(batches))
    stream = stream_activations(model, (batches[i].ids for i in left), list(coders))
    # Each batch is looked up twice, so that none but the one at hand is in memory.
    for index, held in zip(left, stream, strict=True):
        batch = batches[index]
        phases = batch.phases.flatten().to(model.device)
        documents = batch.documents.flatten().to(model.device)
        contexts = contexts_of(batch.ids).flatten().to(model.device)
        for point, tally in tallies.items():
            # Released layer by layer: at the end only the figures are left.
            x = held.acts.pop(point).flatten(0, 1).float()
            acts = encode(coders[point], x, prepared=encoders[point])
            tally.add(acts, phases, documents, contexts, batch.ids.shape[1])
        if store:
            store.keep(index + 1, len(batches), tallies)
        if advance:
            advance(1)
    shapes = [tuple(batch.ids.shape) for batch in batches]
    return Activity(
        tallies=tallies,
        tokens=tuple(phase_counts(batches)),
        documents=sum(rows for rows, _ in shapes),
        squares=float(sum(rows * length**2 for rows, length in shapes)),
        config=config,
    )


@dataclass(frozen=True)
class Density:
    """Share of tokens at which a feature fires, with its standard error over documents."""

    value: Float[Tensor, " d_sae"]
    se: Float[Tensor, " d_sae"]
    """Linearised ratio estimator with documents as the units; 0 for one document."""


def density(activity: Activity, point: Hookpoint) -> Density:
    """Return the density over all tokens."""
    tally, total = activity.tallies[point], sum(activity.tokens)
    share = tally.fired.sum(0).double() / total
    n = activity.documents
    # sum over documents of (fired - share x tokens)^2
    left = tally.squares - 2 * share * tally.products + share.square() * activity.squares
    scale = n / (n - 1) if n > 1 else 0.0
    return Density(share, (left.clamp_min(0) * scale).sqrt() / total)
