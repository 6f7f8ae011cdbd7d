"""Gradient probe: which layers the tuning data would move first, before any step.

Aletheia (arXiv 2604.15351) ranks layers by a short probe of gradients on the task's data and puts
LoRA onto the top ones.  Neither its abstract nor the digests at hand give the norm; what stands
here is what the authors' public package computes (aletheia-lora 0.1.2, module `probe`): the norm of
each weight's own gradient, summed over a layer's weights and over batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from resa_lens.errors import BadInputError
from resa_lens.models.bridge import plain_name
from resa_lens.models.hookpoints import module_layer
from resa_lens.models.host import Model

Means = dict[int, tuple[float, float]]
"""{0-based layer: (mean over batches, its standard error)}."""


def gradient_probe(model: Model, batches: Iterable[Int[Tensor, "batch position"]]) -> Means:
    """Return the sum of the norms of a layer's weight gradients, by layer, mean over batches.

    What aletheia-lora 0.1.2 computes, up to its sum over batches in place of the mean, which
    changes no ranking.

    Args:
        model: the model that would be tuned; it is left as it was.
        batches: token ids, without padding; the package takes five of one sequence each.

    Raises:
        BadInputError: fewer than two batches.
    """
    unique: dict[int, tuple[int, nn.Parameter]] = {}
    for name, weight in model.model.named_parameters():
        if (layer := module_layer(plain_name(name))) is not None:
            unique.setdefault(weight.data_ptr(), (layer, weight))
    weights = list(unique.values())
    trainable = [weight.requires_grad for _, weight in weights]

    def norms(loss: Tensor) -> dict[int, float]:
        grads = torch.autograd.grad(loss, [weight for _, weight in weights], allow_unused=True)
        sums: dict[int, float] = {}
        for (layer, _), grad in zip(weights, grads, strict=True):
            norm = 0.0 if grad is None else float(grad.double().norm())
            sums[layer] = sums.get(layer, 0.0) + norm
        return sums

    try:
        for _, weight in weights:
            weight.requires_grad_(True)
        return over_batches(model, batches, norms)
    finally:
        for (_, weight), before in zip(weights, trainable, strict=True):
            weight.requires_grad_(before)


def over_batches(
    model: Model,
    batches: Iterable[Int[Tensor, "batch position"]],
    measure: Callable[[Tensor], dict[int, float]],
) -> Means:
    """Return the mean over batches of what a measure makes of each batch's loss.

    The loss is that of the next token, nats, mean over a batch's tokens.

    Args:
        model: it is left as it was.
        batches: token ids, without padding.
        measure: takes the loss, with its graph; returns {0-based layer: value}.

    Raises:
        BadInputError: fewer than two batches.
    """
    rows: list[dict[int, float]] = []
    with torch.enable_grad():
        for ids in batches:
            ids = ids.to(model.device)
            logits = model.model(ids).logits[:, :-1].float()
            rows.append(measure(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())))
    if len(rows) < 2:
        raise BadInputError(
            f"{len(rows)} batch of gradients: a standard error needs two or more; give more data"
        )
    means: Means = {}
    for layer in sorted(rows[0]):
        values = np.array([row[layer] for row in rows])
        means[layer] = float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size))
    return means
