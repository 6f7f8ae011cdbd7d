"""A second module over a model's weights, for what changes a module: adapters, a bridge, hooks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from resa_lens.models.bridge import plain_name


def twin(model: PreTrainedModel, config: Any) -> PreTrainedModel | None:
    """Return a plain model whose parameters are views of another's: no weight is copied.

    Each parameter is an object of its own, so that one model may be frozen and the other not;
    their numbers are the same memory.  Adapters beside the weights, hooks and wrappers are the
    twin's own; who writes into its weights writes into both.

    Args:
        model: loaded, without adapters; a bridge may be around its modules.
        config: its configuration as its files have it, since a bridge changes the loaded one.

    Returns:
        The twin in evaluation mode, or None where a weight of it has no counterpart: of an
        architecture that keeps tensors outside of its parameters and buffers.
    """
    plain = copy.deepcopy(config)
    # Files of a format without it, and of adapters' bases, leave it out.
    plain.architectures = list(model.config.architectures or []) or None
    with torch.device("meta"):
        second = AutoModelForCausalLM.from_config(plain, dtype=model.dtype, trust_remote_code=False)
    weights = {
        plain_name(name): value for name, value in model.named_parameters(remove_duplicate=False)
    }
    buffers = {
        plain_name(name): value for name, value in model.named_buffers(remove_duplicate=False)
    }
    tied: dict[int, nn.Parameter] = {}
    for name, own in list(second.named_parameters(remove_duplicate=False)):
        other = weights.get(name)
        if other is None or other.shape != own.shape:
            return None
        if id(other) not in tied:
            tied[id(other)] = nn.Parameter(other.data)
        _put(second, name, tied[id(other)])
    for name, own in list(second.named_buffers(remove_duplicate=False)):
        other = buffers.get(name)
        if other is None or other.shape != own.shape:
            return None
        _put(second, name, other.detach().clone())
    if any(isinstance(value, Tensor) and value.is_meta for part in second.modules()
           for value in vars(part).values()):  # fmt: skip
        return None
    second.generation_config = copy.deepcopy(model.generation_config)
    return second.eval()


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    place, _, last = name.rpartition(".")
    setattr(model.get_submodule(place), last, value)
