"""What ablating a layer's features does to the loss, beside random features of equal mass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.features.attribution import (
    Edit,
    Forward,
    Metric,
    mean_loss,
    model_forward,
    unchanged,
)
from resa_lens.features.checks import check_features
from resa_lens.features.interventions import (
    EncodedBatch,
    encode_batches,
    listed,
    matched_controls,
    sum_masses,
    weighted_decoder,
)
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseCoder
from resa_lens.stats import difference_from_sets, permutation_p_value
from resa_lens.texts.phases import PhasedBatch


@dataclass(frozen=True)
class Effect:
    """What ablating a layer's features does to the loss, beyond random features of equal mass."""

    value: float
    """Change with the features ablated minus that with random ones; mean over documents, nats."""
    se: float
    """Standard error, for other documents and for other random sets."""
    freedom: float
    """Degrees of freedom of `se` (Welch and Satterthwaite)."""
    n: int
    """Documents."""
    control: float
    """Change with random features ablated: mean over sets and documents."""
    target: float
    """Change with the features ablated."""
    p_value: float
    """Two-sided, of the features being one more random set: Student's t of value / se."""
    rank_p: float
    """(1 + random sets that change the loss at least as much) / (1 + sets)."""
    features: int
    controls: int


def causal_effects(
    model: Model,
    coders: Mapping[Hookpoint, SparseCoder],
    features: Mapping[int, Sequence[int]],
    batches: Sequence[PhasedBatch],
    *,
    phases: Sequence[str] = ("think", "answer"),
    controls: int = 5,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[int, Effect]:
    """Measure, layer by layer, how the loss changes when features are ablated at every token.

    Forward passes only: one to read, one with the features ablated, and one for each random set.
    A layer without features changes nothing: its effect is 0 with no error.

    Args:
        model: the host.
        coders: the SAEs, one a layer.
        features: by layer, for example those that a rule counts.
        batches: documents.
        phases: the loss is the mean over a document's tokens of these phases.
        controls: random sets a layer (`interventions.matched_controls`), two or more: how far they
            differ among themselves is what chance gives.
        seed: of the sets.
        advance: told the number of layers that are finished.

    Returns:
        {layer: effect}, for every layer that has an SAE.

    Raises:
        BadInputError: a feature out of range, a layer without SAE, or fewer than two documents with
            the phases.
    """
    metric = mean_loss(phases)
    points = {point.layer: point for point in coders}
    if controls < 2:
        raise BadInputError(f"controls is {controls}; use at least 2 random sets")
    for layer, chosen in features.items():
        place = points.get(layer) or Hookpoint(layer, next(iter(coders)).site)
        check_features(model, place, chosen, coders)
    clean = None
    found: dict[int, Effect] = {}
    for point, coder in sorted(coders.items()):
        chosen = tuple(features.get(point.layer, ()))
        encoded = list(encode_batches(model, point, coder, batches))
        forward = model_forward(model, point)
        if clean is None:
            clean = _losses(forward, coder, encoded, metric, ())
        found[point.layer] = _effect(forward, coder, chosen, encoded, metric, clean, controls, seed)
        advance(1)
    return found


def _effect(
    forward: Forward,
    coder: SparseCoder,
    chosen: tuple[int, ...],
    encoded: Sequence[EncodedBatch],
    metric: Metric,
    clean: np.ndarray,
    controls: int,
    seed: int,
) -> Effect:
    kept = np.isfinite(clean)
    if not kept.any():
        raise BadInputError(
            "no document has a token of the measured phases; give text with <think> and </think>"
        )
    n = int(kept.sum())
    if n < 2:
        raise BadInputError("one document gives no standard error; give two or more")
    if not chosen:
        return Effect(0.0, 0.0, n - 1.0, n, 0.0, 0.0, 1.0, 1.0, 0, 0)
    sets = matched_controls(sum_masses(encoded, coder), chosen, draws=controls, seed=seed)
    target = (_losses(forward, coder, encoded, metric, chosen) - clean)[kept]
    random = np.stack(
        [(_losses(forward, coder, encoded, metric, drawn) - clean)[kept] for drawn in sets]
    )
    beyond = difference_from_sets(target, random)
    return Effect(
        value=beyond.value,
        se=beyond.se,
        freedom=beyond.freedom,
        n=n,
        control=float(random.mean()),
        target=float(target.mean()),
        p_value=beyond.p_value,
        rank_p=permutation_p_value(abs(float(target.mean())), np.abs(random.mean(1))),
        features=len(chosen),
        controls=controls,
    )


@torch.no_grad()
def _losses(
    forward: Forward,
    coder: SparseCoder,
    encoded: Sequence[EncodedBatch],
    metric: Metric,
    chosen: Sequence[int],
) -> np.ndarray:
    """Return L of each document with the features ablated at every token."""
    return np.concatenate(
        [
            metric(forward(batch.ids, _ablation(coder, item, chosen)), batch.ids, batch.phases)
            .double()
            .cpu()
            .numpy()
            for item in encoded
            for batch in [item.batch]
        ]
    )


def _ablation(coder: SparseCoder, item: EncodedBatch, chosen: Sequence[int]) -> Edit:
    """Return the edit that takes features away, from the latents that were read before.

    What stands before the place is as it was, so its activations are those that were encoded.
    """
    if not chosen:
        return unchanged
    index = torch.tensor(list(chosen), device=item.acts.latents.device)
    taken = weighted_decoder(coder, listed(item.acts, index))

    def edit(x: Tensor) -> Tensor:
        return (x - taken.view(x.shape)).to(x.dtype)

    return edit
