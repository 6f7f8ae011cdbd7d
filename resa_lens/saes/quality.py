"""How good an SAE is: on the activations, and in the model when it is put in their place.

Per phase of the documents (prompt, thoughts, answer) and over all:

    FVU                 sum |x - x~|^2 / sum |x - mean|^2, the mean over the phase's tokens
    explained variance  1 - FVU
    L0                  active latents a token
    dead share          latents that fired on none of the phase's tokens (say of how many)
    dense share         latents that fired on more than a tenth of them
    loss change         next-token loss with the reconstruction inserted, minus without, in nats
    KL                  D_KL(clean || inserted) of the next-token distribution, in nats
    loss recovered      (L_ablated - L_inserted) / (L_ablated - L_clean); ablated is zero at every
                        position (SAEBench's convention)

Losses and KL belong to the phase of the token that is predicted.  Everything is counted in sparse
form; no [token, d_sae] array is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resa_lens.machine.hardware import MB
from resa_lens.machine.needs import LOGIT_MB
from resa_lens.models.activations import (
    check_hookpoints,
    ordinary,
    special_ids,
    stream_activations,
)
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.baselines import Replacement, substitute
from resa_lens.saes.coder import SparseActs, SparseCoder, decode, encode, reconstruct
from resa_lens.texts.phases import PHASES, PhasedBatch

ALL = "all"
DENSE = 0.1
"""A latent that fires on more than this share of the tokens is dense."""
LOGIT_BYTES = int(LOGIT_MB * MB)
"""Of float32 logits in each piece while distributions are compared: about five are held at once."""


@dataclass(frozen=True)
class PhaseQuality:
    """An SAE's figures on the tokens of one phase; None where a figure has no meaning."""

    tokens: int
    """Tokens that FVU, L0, dead and dense shares are of."""
    documents: int
    fvu: float | None
    """None where the activations do not vary."""
    explained_variance: float | None
    l0: float | None
    """None, with the two shares, for a control without latents."""
    dead_share: float | None
    """Of latents that fired on none of `tokens`: with few tokens, rare latents count as dead."""
    dense_share: float | None
    predicted: int
    """Tokens that loss and KL are of: all but each document's first."""
    loss: float | None
    """Without the SAE, nats a token."""
    loss_change: float | None
    loss_change_se: float | None
    """Standard error over documents; None for one document."""
    ablation_change: float | None
    """Loss with zeros inserted, minus without: what there is to recover."""
    ablation_change_se: float | None
    loss_recovered: float | None
    """None where zeros do not raise the loss by two standard errors: a ratio to noise says nothing
    (one MLP of a model that reasons in small steps can be left out unnoticed)."""
    kl: float | None
    kl_se: float | None


@dataclass(frozen=True)
class Quality:
    """An SAE's figures by phase, and over all tokens under "all"; a phase without tokens lacks."""

    phases: Mapping[str, PhaseQuality]

    @property
    def all(self) -> PhaseQuality:
        """The figures over all tokens."""
        return self.phases[ALL]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the figures for JSON and tables."""
        return {name: asdict(figures) for name, figures in self.phases.items()}


@torch.no_grad()
def measure_quality(
    model: Model,
    coders: Mapping[Hookpoint, SparseCoder | Replacement],
    batches: Sequence[PhasedBatch],
) -> dict[Hookpoint, Quality]:
    """Measure SAEs, or controls in their place, on documents with phases (phases.py).

    One pass without an SAE, and two for each place: with its reconstruction, and with zeros.

    Args:
        model: the host.
        coders: by the place where they stand; each is measured alone.
        batches: what `phased_batches` makes.

    Raises:
        BadInputError: no place, or one beyond the model's layers.
    """
    check_hookpoints(model, list(coders))
    tallies = {point: _Tally() for point in coders}
    for batch in batches:
        ids = batch.ids.to(model.device)
        clean, acts = _forward(model, ids, list(coders))
        losses = _losses(clean, ids)
        for point, coder in coders.items():
            x = acts.pop(point)
            flat = x.flatten(0, 1).float()
            # What stands before the hook is as it was, so the reconstruction is that of the clean
            # activations: no second encoding.
            if isinstance(coder, SparseCoder):
                latents = encode(coder, flat)
                output = decode(coder, latents)
            else:
                latents, output = None, substitute(coder, flat)
            # Logits of one pass at a time beside the clean ones: they are most of the memory.
            without = _losses(_replaced(model, ids, point, torch.zeros_like(x)), ids)
            inserted = _replaced(model, ids, point, output.reshape(x.shape).to(x.dtype))
            figures = [losses, _losses(inserted, ids), without, _kl(clean, inserted)]
            del inserted
            tallies[point].add(batch, flat, output, latents, torch.stack(figures))
    return {point: tally.quality() for point, tally in tallies.items()}


def _forward(
    model: Model, ids: Int[Tensor, "batch position"], points: Sequence[Hookpoint]
) -> tuple[Float[Tensor, "batch position vocab"], dict[Hookpoint, Tensor]]:
    acts: dict[Hookpoint, Tensor] = {}

    def keep(point: Hookpoint, tensor: Tensor, hook: object = None) -> None:
        acts[point] = tensor

    hooks = [(point.transformer_lens, partial(keep, point)) for point in points]
    with model.bridge.hooks(fwd_hooks=hooks):
        return model.bridge(ids), acts


def _replaced(
    model: Model,
    ids: Int[Tensor, "batch position"],
    point: Hookpoint,
    value: Float[Tensor, "batch position d_model"],
) -> Float[Tensor, "batch position vocab"]:
    def put(tensor: Tensor, hook: object = None) -> Tensor:
        return value

    with model.bridge.hooks(fwd_hooks=[(point.transformer_lens, put)]):
        return model.bridge(ids)


def _rows(logits: Float[Tensor, "batch position vocab"]) -> Iterator[tuple[int, slice]]:
    """Cut each sequence's predicting positions so that few logits are copied, as float32."""
    last = logits.shape[1] - 1
    step = max(1, LOGIT_BYTES // (4 * logits.shape[-1]))
    return (
        (row, slice(first, min(first + step, last)))
        for row in range(logits.shape[0])
        for first in range(0, last, step)
    )


def _losses(
    logits: Float[Tensor, "batch position vocab"], ids: Int[Tensor, "batch position"]
) -> Float[Tensor, " predicted"]:
    targets = ids[:, 1:]
    parts = [
        F.cross_entropy(logits[rows].float(), targets[rows], reduction="none")
        for rows in _rows(logits)
    ]
    return torch.cat(parts).double().cpu() if parts else torch.zeros(0, dtype=torch.double)


def _kl(
    p: Float[Tensor, "batch position vocab"], q: Float[Tensor, "batch position vocab"]
) -> Float[Tensor, " predicted"]:
    parts = []
    for rows in _rows(p):
        log_p = F.log_softmax(p[rows].float(), dim=-1)
        log_q = F.log_softmax(q[rows].float(), dim=-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts).double().cpu() if parts else torch.zeros(0, dtype=torch.double)


@dataclass
class _Variance:
    """Running sums for an FVU."""

    n: int = 0
    x: Tensor | float = 0.0
    xx: float = 0.0
    error: float = 0.0

    def add(self, x: Float[Tensor, "row d"], made: Float[Tensor, "row d"]) -> None:
        self.n += x.shape[0]
        self.x = self.x + x.double().sum(0).cpu()
        self.xx += x.double().pow(2).sum().item()
        self.error += (x.double() - made.double()).pow(2).sum().item()

    def __add__(self, other: _Variance) -> _Variance:
        return _Variance(
            self.n + other.n, self.x + other.x, self.xx + other.xx, self.error + other.error
        )

    @property
    def variance(self) -> float:
        if not isinstance(self.x, Tensor):
            return 0.0
        return self.xx - self.x.pow(2).sum().item() / self.n

    @property
    def fvu(self) -> float | None:
        # Below this the difference of the two sums is rounding.
        varies = self.variance > 1e-12 * self.xx
        return self.error / self.variance if varies else None


@dataclass
class _Tally:
    """What one SAE leaves of all batches: sums by phase, and by document and phase."""

    variance: list[_Variance] = field(default_factory=lambda: [_Variance() for _ in PHASES])
    fired: Int[Tensor, "phase d_sae"] | None = None
    l0: list[int] = field(default_factory=lambda: [0] * len(PHASES))
    documents: list[set[int]] = field(default_factory=lambda: [set() for _ in PHASES])
    predicted: list[dict[int, Float[Tensor, " figure"]]] = field(
        default_factory=lambda: [{} for _ in PHASES]
    )
    """By document: number of tokens, sums of the losses clean, inserted, ablated, and of the KL."""

    def add(
        self,
        batch: PhasedBatch,
        x: Float[Tensor, "token d_model"],
        made: Float[Tensor, "token d_model"],
        found: SparseActs | None,
        figures: Float[Tensor, "figure predicted"],
    ) -> None:
        phases, documents = batch.phases.flatten(), batch.documents.flatten()
        targets, owners = batch.phases[:, 1:].flatten(), batch.documents[:, 1:].flatten()
        if found is not None and self.fired is None:
            self.fired = torch.zeros(len(PHASES), found.d_sae, dtype=torch.long)
        of_pair = phases[found.rows.cpu()] if found is not None else None
        for phase in range(len(PHASES)):
            mask = phases == phase
            if not mask.any():
                continue
            self.variance[phase].add(x[mask.to(x.device)], made[mask.to(x.device)])
            self.documents[phase] |= set(documents[mask].tolist())
            if found is not None and of_pair is not None and self.fired is not None:
                latents = found.latents.cpu()[of_pair == phase]
                self.fired[phase] += torch.bincount(latents, minlength=found.d_sae)
                self.l0[phase] += latents.numel()
            self._add_predicted(phase, targets == phase, owners, figures)

    def _add_predicted(
        self,
        phase: int,
        mask: Bool[Tensor, " predicted"],
        owners: Int[Tensor, " predicted"],
        figures: Float[Tensor, "figure predicted"],
    ) -> None:
        entry = self.predicted[phase]
        numbers, place = owners[mask].unique(return_inverse=True)
        sums = torch.zeros(len(numbers), 1 + len(figures), dtype=torch.double)
        ones = torch.ones(1, int(mask.sum()), dtype=torch.double)
        sums.index_add_(0, place, torch.cat([ones, figures[:, mask]]).mT)
        for number, row in zip(numbers.tolist(), sums, strict=True):
            entry[number] = entry[number] + row if number in entry else row

    def quality(self) -> Quality:
        phases = {
            name: self._figures([phase])
            for phase, name in enumerate(PHASES)
            if self.variance[phase].n
        }
        return Quality({**phases, ALL: self._figures(list(range(len(PHASES))))})

    def _figures(self, phases: list[int]) -> PhaseQuality:
        variance = sum((self.variance[p] for p in phases), _Variance())
        n, fvu = variance.n, variance.fvu
        l0 = dead = dense = None
        if self.fired is not None and n:
            fired = self.fired[phases].sum(0)
            l0 = sum(self.l0[p] for p in phases) / n
            dead = (fired == 0).double().mean().item()
            dense = (fired > DENSE * n).double().mean().item()
        rows: dict[int, Tensor] = {}
        for phase in phases:
            for number, row in self.predicted[phase].items():
                rows[number] = rows[number] + row if number in rows else row
        table = torch.stack(list(rows.values())) if rows else torch.zeros(0, 5).double()
        counts = table[:, 0]
        clean, _ = _mean_se(table[:, 1], counts)
        change, change_se = _mean_se(table[:, 2] - table[:, 1], counts)
        ablation, ablation_se = _mean_se(table[:, 3] - table[:, 1], counts)
        kl, kl_se = _mean_se(table[:, 4], counts)
        recovered = None
        if change is not None and ablation is not None and ablation > 2 * (ablation_se or 0.0):
            recovered = (ablation - change) / ablation
        return PhaseQuality(
            tokens=n,
            documents=len(set().union(*(self.documents[p] for p in phases))),
            fvu=fvu,
            explained_variance=None if fvu is None else 1 - fvu,
            l0=l0,
            dead_share=dead,
            dense_share=dense,
            predicted=int(counts.sum()),
            loss=clean,
            loss_change=change,
            loss_change_se=change_se,
            ablation_change=ablation,
            ablation_change_se=ablation_se,
            loss_recovered=recovered,
            kl=kl,
            kl_se=kl_se,
        )


def _mean_se(
    sums: Float[Tensor, " document"], counts: Float[Tensor, " document"]
) -> tuple[float | None, float | None]:
    """Return the mean a token and its standard error over documents of unequal length.

    The mean is a ratio of two sums over documents; its error is the linearised one (Cochran,
    Sampling Techniques, 1977, section 6.4).
    """
    total, n = counts.sum().item(), sums.numel()
    if not total:
        return None, None
    mean = sums.sum().item() / total
    if n < 2:
        return mean, None
    spread = (sums - mean * counts).pow(2).sum().item() * n / (n - 1)
    return mean, math.sqrt(spread) / total


@torch.no_grad()
def measure_fvu(
    model: Model,
    coders: Mapping[Hookpoint, SparseCoder],
    batches: Iterable[Int[Tensor, "batch position"]],
    *,
    include_special: bool = False,
) -> dict[Hookpoint, tuple[float, float]]:
    """Return (FVU, L0) a hookpoint over all the sequences; NaN where there was none.

    FVU = sum |x - x~|^2 / sum |x - mean(x)|^2, the mean over all tokens given, without BOS, EOS and
    padding unless `include_special`.
    """
    special = torch.tensor([], dtype=torch.long) if include_special else special_ids(model)
    sums = {point: _Variance() for point in coders}
    active = dict.fromkeys(coders, 0)
    for batch in stream_activations(model, batches, list(coders)):
        for point, coder in coders.items():
            x = batch.acts[point].flatten(0, 1).float()
            x = x[ordinary(batch.ids, special).to(x.device)]
            acts = encode(coder, x)
            sums[point].add(x, decode(coder, acts))
            active[point] += acts.values.numel()
    return {
        point: (tally.error / max(tally.variance, 1e-12), active[point] / tally.n)
        if tally.n
        else (math.nan, math.nan)
        for point, tally in sums.items()
    }


@torch.no_grad()
def loss_change(
    model: Model,
    coders: Mapping[Hookpoint, SparseCoder],
    batches: Sequence[Int[Tensor, "batch position"]],
) -> dict[Hookpoint, float]:
    """Return, for each SAE, the change of the next-token loss when its reconstruction is inserted.

    In nats a token, over all the batches; the lowest is the SAE that the model notices least.
    """
    plain = sum(_loss(model.bridge(ids.to(model.device)), ids) for ids in batches)
    changes = {}
    for point, coder in coders.items():
        hook = (point.transformer_lens, partial(_insert, coder))
        with model.bridge.hooks(fwd_hooks=[hook]):
            inserted = sum(_loss(model.bridge(ids.to(model.device)), ids) for ids in batches)
        changes[point] = (inserted - plain) / max(1, len(batches))
        # The next one may be loaded now.
        del coder, hook
    return changes


def _insert(
    coder: SparseCoder, acts: Float[Tensor, "batch position d_model"], hook: object = None
) -> Float[Tensor, "batch position d_model"]:
    return reconstruct(coder, acts)


def _loss(
    logits: Float[Tensor, "batch position vocab"], ids: Int[Tensor, "batch position"]
) -> float:
    targets = ids[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets).item()
