"""Norms of a bridge without the work for hooks that nobody has put there.

TransformerBridge gives the scale and the normalised activations of each norm to hooks of their own:
it computes them beside the model's own norm, in every pass.  Where these hooks are empty that can
be left out, and the root mean square norm

    y = w x / sqrt(mean(x^2) + eps)            (arXiv 1910.07467, equation 4)

needs no graph: its gradient to x is written down.  The values are the model's to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def shorten_norms(bridge: nn.Module) -> int:
    """Let the norms of a bridge compute what the model's own give, and nothing for empty hooks.

    A norm stays as it is where it is no frozen root mean square norm, or where `RmsNorm` does not
    give its values to the bit on a sample.

    Args:
        bridge: a TransformerBridge, changed in place.

    Returns:
        The number of norms that were changed.
    """
    from transformer_lens.model_bridge.generalized_components.normalization import (
        NormalizationBridge,
    )

    changed = 0
    for module in bridge.modules():
        if not isinstance(module, NormalizationBridge):
            continue
        part: Any = module.original_component
        if part is not None and module.use_native_layernorm_autograd and _is_rms(part):
            vars(module)["forward"] = _forward(module, part)
            changed += 1
    return changed


@torch.no_grad()
def _is_rms(part: Any) -> bool:
    """Whether a module is a root mean square norm of frozen weights, tried on two sizes of rows."""
    weight, eps = getattr(part, "weight", None), getattr(part, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or weight.requires_grad:
        return False
    if not isinstance(eps, float) or getattr(part, "bias", None) is not None:
        return False
    ramp = torch.linspace(-2, 3, 2 * len(weight), device=weight.device).view(2, -1)
    sample = torch.cat([ramp, 1e-3 * ramp]).to(weight.dtype)
    return torch.equal(part(sample), RmsNorm.apply(sample, weight, eps))


def _forward(module: Any, part: Any) -> Callable[..., Tensor]:
    whole = module.forward
    hooks = (module.hook_scale, module.hook_normalized)

    def forward(hidden_states: Tensor, **options: Any) -> Tensor:
        if any(hook.fwd_hooks or hook.bwd_hooks for hook in hooks):
            return whole(hidden_states, **options)
        y: Any = RmsNorm.apply(module.hook_in(hidden_states), part.weight, part.variance_epsilon)
        return module.hook_out(y)

    return forward


class RmsNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps) over the last axis; no gradient to w."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*shape d"], weight: Float[Tensor, " d"], eps: float
    ) -> Float[Tensor, "*shape d"]:
        """Normalise in single precision and give the dtype of x, then times w."""
        wide = x if x.dtype == torch.float32 else x.float()
        inverse = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        y = wide * inverse
        return weight * (y if y.dtype == x.dtype else y.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        """Give dx = (h - n mean(h n)) / rms, with h = w dy and n = x / rms."""
        x, inverse, weight = ctx.saved_tensors
        h = grads[0] * weight
        h = h if h.dtype == torch.float32 else h.float()
        n = x * inverse
        dx = h.addcmul_(n, (h * n).mean(-1, keepdim=True), value=-1).mul_(inverse)
        return (dx if dx.dtype == x.dtype else dx.to(x.dtype)), None, None
