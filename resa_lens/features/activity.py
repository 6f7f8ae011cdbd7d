"""Where, how often and how strongly every feature fires, over any documents with phases.

One pass over the documents serves all layers.  From each batch's active latents, a list of (token,
latent, value), each layer keeps per feature:

    tokens fired, sum and maximum of the activation by phase (prompt, think, answer)
    documents fired in, and what the standard error of the density over documents needs
    a histogram of the activation in half octaves
    the tokens at which it fires
    in each phase the strongest places and places drawn from all, with the activations around them

No array of batch x sequence x latents is made: what is held grows with the latents alone, and
`needed_bytes` says how much before the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.features.checks import check_features
from resa_lens.features.config import ActivityConfig as ActivityConfig
from resa_lens.features.examples import Examples, Firings, FiringTokens
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
    figures = len(PHASES) * (8 + 8 + 4) + 8 + 16 + 4 * BINS + FiringTokens.bytes_of(config)
    return encoder + d_sae * (figures + len(PHASES) * Examples.bytes_of(config))


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
        phases = len(PHASES)

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
        self.examples = Examples(phases * d_sae, config, device)
        self.firing_tokens = FiringTokens(d_sae, config, device)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        for part in ("examples", "firing_tokens"):
            tensors |= {f"{part}.{n}": value for n, value in getattr(self, part).tensors().items()}
        return tensors

    def scalars(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides."""
        return {"firing_tokens": self.firing_tokens.used}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take what `scalars` gave."""
        self.firing_tokens.used = int(scalars["firing_tokens"])

    @torch.no_grad()
    def add(
        self,
        acts: SparseActs,
        tokens: Int[Tensor, " row"],
        phases: Int[Tensor, " row"],
        documents: Int[Tensor, " row"],
        contexts: Int[Tensor, " row"],
        length: int,
    ) -> None:
        """Add one batch.

        Args:
            acts: active latents; row i is token i of the batch, document by document.
            tokens: their numbers in the vocabulary.
            phases: of each token, an index into `PHASES`.
            documents: the number of each token's document.
            contexts: a number for the text that ends in each token (`contexts_of`): of places
                with the same, one is an example.
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
        self.firing_tokens.add(latents, tokens[rows], values)
        # Sorted by latent, then by token: each feature's stay in a document is one segment.
        numbers = documents[rows]
        new_document = torch.ones_like(latents, dtype=torch.bool)
        new_document[1:] = (latents[1:] != latents[:-1]) | (numbers[1:] != numbers[:-1])
        segment = new_document.long().cumsum(0) - 1
        feature = latents[new_document]
        fired = torch.bincount(segment, minlength=feature.numel()).double()
        self.documents.index_add_(0, feature, torch.ones_like(feature))
        self.squares.index_add_(0, feature, fired.square())
        self.products.index_add_(0, feature, fired * length)
        # And of each stay in a phase of a document the strongest place may be an example.
        new_phase = new_document
        new_phase[1:] |= place[1:] != place[:-1]
        firings = Firings(latents, rows, values, place, documents, contexts, length)
        self.examples.add(firings, new_phase.long().cumsum(0) - 1)


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
        tokens = batch.ids.flatten().to(model.device)
        phases = batch.phases.flatten().to(model.device)
        documents = batch.documents.flatten().to(model.device)
        contexts = contexts_of(batch.ids).flatten().to(model.device)
        for point, tally in tallies.items():
            # Released layer by layer: at the end only the figures are left.
            x = held.acts.pop(point).flatten(0, 1).float()
            acts = encode(coders[point], x, prepared=encoders[point])
            tally.add(acts, tokens, phases, documents, contexts, batch.ids.shape[1])
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
