"""Rotary positions in fewer operations than transformers' (arXiv 2104.09864, equation 34).

    y = x cos + r(x) sin,   r(x1, x2) = (-x2, x1) of the halves of a head

transformers slices, negates, joins and multiplies, and autograd undoes each with zeros of the full
size.  Here the halves change places and the sign is that of the sines: r(x) sin = (x2, x1) sin',
sin' = (-sin1, sin2).  The values are transformers' to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import FunctionType, MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NAME = "apply_rotary_pos_emb"
"""What transformers' attentions call, from their own module."""


def shorten_rotary(model: nn.Module) -> int:
    """Let the attentions of a model turn queries and keys by `Rotation`.

    Each gets a forward of its own with another `apply_rotary_pos_emb`; the class stays as it is.
    An attention is left alone where that function gives other values on a sample.

    Args:
        model: changed in place.

    Returns:
        The number of attentions that were changed.
    """
    changed, apply = 0, _apply()
    for module in model.modules():
        forward: Any = type(module).forward
        if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
            continue
        theirs, size = forward.__globals__.get(NAME), getattr(module, "head_dim", None)
        if not callable(theirs) or not isinstance(size, int) or not _alike(theirs, size):
            continue
        own = FunctionType(
            forward.__code__, {**forward.__globals__, NAME: apply}, forward.__name__,
            forward.__defaults__, forward.__closure__,
        )  # fmt: skip
        own.__kwdefaults__ = forward.__kwdefaults__
        vars(module)["forward"] = MethodType(own, module)
        changed += 1
    return changed


@torch.no_grad()
def _alike(theirs: Callable[..., Any], size: int) -> bool:
    """Whether transformers' function and this one give the same on heads of a size."""
    if size % 2:
        return False
    ramp = torch.linspace(-3, 2, 5 * 3 * size)
    heads = ramp.view(1, 5, 3, size)
    angles = ramp[: 3 * size].view(1, 3, size)
    inputs = (heads[:, :4], heads[:, 4:], angles.cos(), angles.sin())
    try:
        expected = theirs(*inputs)
    except (TypeError, ValueError, RuntimeError):
        return False
    if not all(map(torch.equal, _apply()(*inputs), expected)):
        return False
    with suppress(TypeError, ValueError, RuntimeError):
        theirs(*inputs[:2], *(angle[..., : size // 2] for angle in inputs[2:]))
        return False  # it turns a part of each head, where there are angles for no more
    return True


def _apply() -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a function like transformers' that makes the sines' signs once for a pass's layers."""
    latest: list[Tensor] = []

    def apply(
        q: Float[Tensor, "batch head position d"],
        k: Float[Tensor, "batch head position d"],
        cos: Float[Tensor, "batch position d"],
        sin: Float[Tensor, "batch position d"],
        unsqueeze_dim: int = 1,
    ) -> tuple[Tensor, Tensor]:
        if not latest or latest[0] is not sin:
            low, high = sin.chunk(2, -1)
            latest[:] = sin, cos.unsqueeze(unsqueeze_dim), torch.cat((-low, high), -1).unsqueeze(
                unsqueeze_dim
            )  # fmt: skip
        turned: Any = [Rotation.apply(x, *latest[1:]) for x in (q, k)]
        return turned[0], turned[1]

    return apply


class Rotation(torch.autograd.Function):
    """y = x cos + (x2, x1) sin', with no gradient to the angles."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "batch head position d"],
        cos: Float[Tensor, "batch 1 position d"],
        signed: Float[Tensor, "batch 1 position d"],
    ) -> Float[Tensor, "batch head position d"]:
        """Turn each pair of coordinates by its angle."""
        ctx.save_for_backward(cos, signed)
        return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(signed))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        """Turn the gradient back."""
        cos, signed = ctx.saved_tensors
        dy = grads[0]
        return (dy * cos).add_((dy * signed).roll(dy.shape[-1] // 2, -1)), None, None
