"""What each feature does to a measure of the model: by gradient and by patching.

L is a number a document, made of its logits.  With the SAE's error term kept, x = error + sum z_i
d_i, so the gradient of L along a feature is that along its decoder row, and the first-order
prediction of what L changes by when the feature is taken away from every token is

    gradient x activation:   - sum over tokens of z_i (d_i . dL/dx)
    patching:                L(without feature i alone) - L

The two are equal where L is linear in x.  Forward passes only for patching, one backward pass for
the gradient, and no tensor dense in the latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.features.interventions import (
    EncodedBatch,
    sum_masses,
)
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseCoder, encode
from resa_lens.saes.kernels import pair_dots
from resa_lens.stats import (
    Interval,
    bootstrap_mean_interval,
    clopper_pearson,
    holm,
    sign_flip_p_value,
    spearman,
)
from resa_lens.texts.phases import PHASES, PhasedBatch

PATCH_TOKENS = 1024
"""Of the copies of documents that are patched in one forward pass."""

Edit = Callable[[Tensor], Tensor]
"""From the activations [batch, position, d_in] of a place to what stands there instead."""
Forward = Callable[[Int[Tensor, "batch position"], Edit], Float[Tensor, "batch position vocab"]]
"""A forward pass with an edit at one place."""
Metric = Callable[
    [
        Float[Tensor, "batch position vocab"],
        Int[Tensor, "batch position"],
        Int[Tensor, "batch position"],
    ],
    Float[Tensor, " batch"],
]
"""From logits, ids and phases to L of each document; NaN where a document has none."""


def mean_loss(phases: Sequence[str]) -> Metric:
    """Return the metric "mean of -log p(token | before) over a document's tokens of the phases".

    Raises:
        BadInputError: an unknown phase, or none.
    """
    if unknown := [phase for phase in phases or ("",) if phase not in PHASES]:
        raise BadInputError(f"phase {unknown[0]!r} is unknown; use {', '.join(PHASES)}")
    index = [PHASES.index(phase) for phase in phases]

    def metric(logits: Tensor, ids: Tensor, where: Tensor) -> Tensor:
        targets = ids[:, 1:].to(logits.device)
        losses = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
        ).view(targets.shape)
        inside = torch.isin(where[:, 1:], torch.tensor(index)).to(losses)
        counts = inside.sum(1)
        means = (losses * inside).sum(1) / counts.clamp_min(1)
        return torch.where(counts > 0, means, math.nan)

    return metric


def model_forward(model: Model, point: Hookpoint) -> Forward:
    """Return the model's forward pass with an edit at a place."""

    def forward(ids: Tensor, edit: Edit) -> Tensor:
        def hook(acts: Tensor, hook: object = None) -> Tensor:
            return edit(acts)

        with model.bridge.hooks(fwd_hooks=[(point.transformer_lens, hook)]):
            return model.bridge(ids.to(model.device))

    return forward


def unchanged(x: Tensor) -> Tensor:
    """Return x: the edit that edits nothing."""
    return x


@dataclass(frozen=True)
class FeatureEffect:
    """What one feature does to L; positive where L rises without it."""

    feature: int
    mass: float
    """Sum of z |d| over all tokens."""
    active: int
    """Tokens where it is active."""
    documents: int
    """Documents where it is active."""
    gradient: float
    """By gradient x activation; the mean over all documents."""
    patching: float
    """Measured by taking the feature away; the mean over all documents."""
    ci: Interval
    """Of `patching`, by bootstrap over documents."""
    p_value: float
    """Of no change, by flipping the documents' signs."""
    p_corrected: float
    """After Holm's correction over the features listed."""


@dataclass(frozen=True)
class Agreement:
    """How far the gradient says what patching finds, over features."""

    spearman: float | None
    """None with fewer than three features."""
    p_value: float | None
    signs: float | None
    """Share of features whose two figures have the same sign; zeros left out."""
    signs_ci: Interval | None
    signs_n: int
    n: int
    """Features."""


@dataclass(frozen=True)
class Attribution:
    """Effects of features on L at one place, the features with most mass first."""

    effects: tuple[FeatureEffect, ...]
    agreement: Agreement
    documents: int
    tokens: int
    loss: float
    """Mean L over documents, the model as it is."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return asdict(self)


def attribute(
    forward: Forward,
    coder: SparseCoder,
    batches: Sequence[PhasedBatch],
    metric: Metric,
    *,
    features: Sequence[int] | None = None,
    top: int = 20,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> Attribution:
    """Attribute L to features by gradient x activation and by patching.

    Args:
        forward: the model at the SAE's place.
        coder: the frozen SAE, with its decoder.
        batches: documents.
        metric: L.
        features: which ones; by default the `top` with most mass on these documents.
        top: of the default.
        seed: of the intervals and p-values.
        advance: told the number of batches that are finished.

    Raises:
        BadInputError: no document has the metric, no feature is active, or there is none of an
            index.
    """
    if outside := [f for f in features or () if not 0 <= f < coder.num_latents]:
        raise BadInputError(
            f"feature {outside[0]} is out of range: the SAE has features 0 to "
            f"{coder.num_latents - 1}"
        )
    read = [_read(forward, coder, batch, metric) for batch in batches]
    clean = np.concatenate([r.clean for r in read]) if read else np.zeros(0)
    if not np.isfinite(clean).any():
        raise BadInputError(
            "no document has a token of the measured phases; give text with <think> and </think>"
        )
    mass = sum_masses([r.encoded for r in read], coder)
    total = mass.sums.sum(0)
    if features is None:
        order = total.argsort(descending=True, stable=True)[:top].tolist()
        features = [f for f in order if total[f] > 0]
    if not features:
        raise BadInputError("no feature is active on these documents; nothing can be attributed")
    index = torch.tensor(list(features))
    # [feature, document], over all batches.
    gradient, patched, active = [], [], []
    for item in read:
        gradient.append(_by_gradient(item, index))
        patched.append(_by_patching(forward, coder, item, metric, index))
        active.append(_active(item, index))
        advance(1)
    kept = np.isfinite(clean)
    by_gradient, by_patching = (np.concatenate(x, axis=1)[:, kept] for x in (gradient, patched))
    p_values = [sign_flip_p_value(row, seed=seed) for row in by_patching]
    corrected = holm(p_values)
    effects = tuple(
        FeatureEffect(
            feature=int(feature),
            mass=float(total[feature]),
            active=int(mass.active[:, feature].sum()),
            documents=int(np.concatenate(active, axis=1)[row, kept].sum()),
            gradient=float(by_gradient[row].mean()),
            patching=float(by_patching[row].mean()),
            ci=bootstrap_mean_interval(by_patching[row], seed=seed),
            p_value=p_values[row],
            p_corrected=float(corrected[row]),
        )
        for row, feature in enumerate(features)
    )
    return Attribution(
        effects,
        _agreement([e.gradient for e in effects], [e.patching for e in effects], seed),
        documents=int(kept.sum()),
        tokens=int(mass.tokens.sum()),
        loss=float(clean[kept].mean()),
    )


@dataclass(frozen=True)
class _Read:
    """What one forward and one backward pass over a batch leave."""

    encoded: EncodedBatch
    slope: Float[Tensor, " pair"]
    """d_i . dL/dx of each active pair."""
    clean: np.ndarray
    """L of each document."""


def _read(forward: Forward, coder: SparseCoder, batch: PhasedBatch, metric: Metric) -> _Read:
    held: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        held.append(x.detach().requires_grad_(True))
        return held[-1]

    with torch.enable_grad():
        values = metric(forward(batch.ids, leaf), batch.ids, batch.phases)
        known = values[~values.isnan()]
        (grad,) = torch.autograd.grad(known.sum(), held) if len(known) else held[0].new_zeros(1)
    x = held[0].detach().flatten(0, 1)
    acts = encode(coder, x.to(coder.dtype))
    assert coder.W_dec is not None, "the coder was loaded without its decoder"
    flat = grad.expand(held[0].shape).flatten(0, 1).to(coder.dtype).contiguous()
    slope = pair_dots(flat, coder.W_dec, acts.starts, acts.latents)
    return _Read(EncodedBatch(batch, acts), slope, values.detach().double().cpu().numpy())


def _cells(item: _Read, index: Int[Tensor, " feature"]) -> tuple[Tensor, Tensor]:
    """Return which pairs are of the features, and their cell in [feature, document]."""
    batch, acts = item.encoded
    place = torch.full((acts.d_sae,), -1)
    place[index] = torch.arange(len(index))
    of_pair = place[acts.latents.cpu()]
    keep = of_pair >= 0
    documents = acts.rows.cpu() // batch.ids.shape[1]
    return keep, of_pair[keep] * batch.ids.shape[0] + documents[keep]


def _per_cell(item: _Read, index: Int[Tensor, " feature"], values: Tensor) -> np.ndarray:
    keep, cells = _cells(item, index)
    shape = (len(index), item.encoded.batch.ids.shape[0])
    kept = values.detach().double().cpu()[keep]
    return torch.bincount(cells, kept, math.prod(shape)).view(shape).numpy()


def _by_gradient(item: _Read, index: Int[Tensor, " feature"]) -> np.ndarray:
    return _per_cell(item, index, -item.slope * item.encoded.acts.values)


def _active(item: _Read, index: Int[Tensor, " feature"]) -> np.ndarray:
    return _per_cell(item, index, (item.encoded.acts.values > 0).double()) > 0


@torch.no_grad()
def _by_patching(
    forward: Forward,
    coder: SparseCoder,
    item: _Read,
    metric: Metric,
    index: Int[Tensor, " feature"],
) -> np.ndarray:
    """Return the change of L, [feature, document]: a copy of a document for each active feature."""
    assert coder.W_dec is not None
    batch, acts = item.encoded
    n, length = batch.ids.shape
    keep, cells = _cells(item, index)
    rows, latents = acts.rows.cpu()[keep], acts.latents.cpu()[keep]
    values = acts.values.cpu()[keep]
    found, copy_of = cells.unique(return_inverse=True)
    changes = np.zeros(len(index) * n)
    step = max(1, PATCH_TOKENS // length)
    for first in range(0, len(found), step):
        documents = found[first : first + step] % n
        mine = (copy_of >= first) & (copy_of < first + len(documents))
        delta = torch.zeros(len(documents), length, coder.d_in)
        taken = values[mine, None] * coder.W_dec[latents[mine].to(coder.device)].cpu()
        # A pair is one token of one copy: no two meet.
        delta[copy_of[mine] - first, rows[mine] % length] = -taken

        def without(x: Tensor, delta: Tensor = delta) -> Tensor:
            return (x + delta.to(x.device)).to(x.dtype)

        logits = forward(batch.ids[documents], without)
        after = metric(logits, batch.ids[documents], batch.phases[documents])
        changes[found[first : first + step].numpy()] = (
            after.double().cpu().numpy() - item.clean[documents.numpy()]
        )
    return changes.reshape(len(index), n)


def _agreement(gradient: Sequence[float], patching: Sequence[float], seed: int) -> Agreement:
    first, second = np.asarray(gradient), np.asarray(patching)
    rho = p_value = None
    if len(first) >= 3:
        rho, p_value = spearman(first, second, seed=seed)
    signed = (first != 0) & (second != 0)
    n = int(signed.sum())
    same = int((np.sign(first) == np.sign(second))[signed].sum())
    return Agreement(
        rho,
        p_value,
        same / n if n else None,
        clopper_pearson(same, n) if n else None,
        n,
        len(first),
    )
