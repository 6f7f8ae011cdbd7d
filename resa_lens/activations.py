"""The one streaming reader: token batches in, activations at hookpoints out.

Every later stage reads activations here.  The model's forward pass stops after the last block that
is asked for; nothing is written to disk and one batch is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.hookpoints import Hookpoint, describe_layer
from resa_lens.models import Model


@dataclass(frozen=True)
class ActivationBatch:
    """One batch of tokens with its activations."""

    ids: Int[Tensor, "batch position"]
    acts: dict[Hookpoint, Float[Tensor, "batch position d_model"]]


def check_hookpoints(model: Model, hookpoints: Sequence[Hookpoint]) -> None:
    """Raise BadInputError for no hookpoint or one beyond the model's layers."""
    if not hookpoints:
        raise BadInputError("no hookpoint was given; name at least one layer")
    for point in hookpoints:
        if point.layer >= model.n_layers:
            raise BadInputError(
                f"{describe_layer(point.layer, model.n_layers)} is out of range: {model.name} "
                f"has layers 0 to {model.n_layers - 1}"
            )


def stream_activations(
    model: Model,
    batches: Iterable[Int[Tensor, "batch position"]],
    hookpoints: Sequence[Hookpoint],
) -> Iterator[ActivationBatch]:
    """Yield the activations of each batch of token ids at the hookpoints, without gradients.

    Args:
        model: the host; its bridge is booted on first use.
        batches: token ids, each [batch, position], without padding.
        hookpoints: where to read.

    Raises:
        BadInputError: no hookpoint, or one beyond the model's layers.
    """
    check_hookpoints(model, hookpoints)
    stop = max(point.layer for point in hookpoints) + 1
    # Past the last block there is no block to stop at; with no return the logits are dropped.
    stop_at = stop if stop < model.n_layers else None
    for ids in batches:
        acts: dict[Hookpoint, Tensor] = {}
        hooks = [(point.transformer_lens, partial(_keep, acts, point)) for point in hookpoints]
        with torch.no_grad(), model.bridge.hooks(fwd_hooks=hooks):
            model.bridge(ids.to(model.device), return_type=None, stop_at_layer=stop_at)
        yield ActivationBatch(ids, acts)


def _keep(
    acts: dict[Hookpoint, Tensor], point: Hookpoint, tensor: Tensor, hook: object = None
) -> None:
    acts[point] = tensor.detach()
