"""The one streaming reader: token batches in, activations at hookpoints out.

Every later stage reads activations here.  The model's forward pass stops after the last block that
is asked for; nothing is written to disk and one batch is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import POST, Hookpoint, describe_layer
from resa_lens.models.host import Model
from resa_lens.texts.prompts import TAGS


@dataclass(frozen=True)
class ActivationBatch:
    """One batch of tokens with its activations."""

    ids: Int[Tensor, "batch position"]
    acts: dict[Hookpoint, Float[Tensor, "batch position d_model"]]


def check_hookpoints(model: Model, hookpoints: Sequence[Hookpoint]) -> None:
    """Raise BadInputError for no hookpoint, or one that the model has not."""
    if not hookpoints:
        raise BadInputError("no hookpoint was given; name at least one layer")
    for point in hookpoints:
        if point.layer >= model.n_layers:
            raise BadInputError(
                f"{describe_layer(point.layer, model.n_layers)} is out of range: {model.name} "
                f"has layers 0 to {model.n_layers - 1}"
            )
        if point.site not in model.names.sites:
            before = next((site for site, post in POST.items() if post == point.site), None)
            same = f", where {before} is what is added to the stream" if before else ""
            raise BadInputError(
                f"{model.name} has no site {point.site}{same}; use {', '.join(model.names.sites)}"
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


def special_ids(model: Model) -> Int[Tensor, " special"]:
    """Return the ids of BOS, EOS and padding, whose activations are outliers; never a think tag."""
    tokenizer: Any = model.tokenizer
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    chosen = sorted(i for i in ids if isinstance(i, int))
    return torch.tensor(
        [i for i in chosen if tokenizer.convert_ids_to_tokens(i) not in TAGS], dtype=torch.long
    )


def ordinary(
    ids: Int[Tensor, "batch position"], special: Int[Tensor, " special"]
) -> Bool[Tensor, " row"]:
    """Return which tokens of a batch, row by row, are none of the special ones.

    Where there is nothing else, all of them count.
    """
    kept = ~torch.isin(ids.flatten(), special.to(ids.device))
    return kept if kept.any() else torch.ones_like(kept)


def _keep(
    acts: dict[Hookpoint, Tensor], point: Hookpoint, tensor: Tensor, hook: object = None
) -> None:
    acts[point] = tensor.detach()
