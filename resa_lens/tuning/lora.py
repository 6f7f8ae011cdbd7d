"""LoRA layers in fewer operations than PEFT's, and a switch for them.

    y = W x + b + s B A drop(x)                (arXiv 2106.09685, section 4.1)

A tuning step of a model of 28 layers calls some hundred such layers twice.  PEFT's forward and
autograd's way back take about sixty operators for each, whatever the width; here one autograd
function takes 25.  Masks are drawn as PEFT's dropout draws them, from the same generator in the
same order; sums are rounded elsewhere.  PEFT keeps the parameters: files and names are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ADAPTER = "default"
"""What PEFT calls the adapter that `add_lora` makes."""
_undrop: Any = torch.ops.aten.native_dropout_backward.default
"""Masks and scales: (values, mask, factor)."""


class AdapterSwitch:
    """Turns a model's adapters off for a while, by a list that is made once.

    PEFT's `disable_adapter` walks the tree of modules on the way in and on the way out, and turns
    the gradients of every adapter off and on again.
    """

    def __init__(self, peft: nn.Module) -> None:
        """List the layers of a model.

        Args:
            peft: the PeftModel; no adapter may be added or taken away later.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.layers = [module for module in peft.modules() if isinstance(module, BaseTunerLayer)]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the base model answer."""
        before = [layer._disable_adapters for layer in self.layers]
        for layer in self.layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, state in zip(self.layers, before, strict=True):
                layer._disable_adapters = state


def shorten_lora(peft: nn.Module) -> int:
    """Let the LoRA layers of a model compute by `LoraProduct`, where they are plain ones.

    Plain is one adapter on a matrix, without DoRA, biases of its own or hooks inside; the others
    stay as PEFT has them.

    Args:
        peft: a PeftModel with the adapter "default", changed in place.

    Returns:
        The number of layers that were changed.
    """
    from peft.tuners.lora.layer import Linear

    layers = [module for module in peft.modules() if type(module) is Linear and _plain(module)]
    for layer in layers:
        vars(layer)["forward"] = _forward(layer)
    return len(layers)


def restore_lora(peft: nn.Module) -> None:
    """Let the LoRA layers of a model compute as PEFT has them."""
    from peft.tuners.lora.layer import Linear

    for module in peft.modules():
        if isinstance(module, Linear):
            vars(module).pop("forward", None)


def _plain(layer: Any) -> bool:
    if set(layer.lora_A) != {ADAPTER} or layer.merged or layer.lora_variant:
        return False
    base, a, b = layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    parts = (base, a, b, layer.lora_dropout[ADAPTER])
    hooks = (part._forward_hooks or part._forward_pre_hooks for part in parts)
    return (
        type(base) is nn.Linear
        and type(a) is type(b) is nn.Linear
        and a.bias is b.bias is None
        and not base.weight.requires_grad
        and type(layer.lora_dropout[ADAPTER]) in (nn.Identity, nn.Dropout)
        and not any(hooks)
    )


def _forward(layer: Any) -> Callable[..., Tensor]:
    base, dropout = layer.base_layer, layer.lora_dropout[ADAPTER]
    a, b, scale = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.scaling[ADAPTER]
    share = getattr(dropout, "p", 0.0)

    def forward(x: Tensor) -> Tensor:
        if layer._disable_adapters:
            return F.linear(x, base.weight, base.bias)
        drop = share if dropout.training else 0.0
        product: Any = LoraProduct.apply(x, base.weight, base.bias, a.weight, b.weight, scale, drop)
        return product

    return forward


class LoraProduct(torch.autograd.Function):
    """y = W x + b + s B A drop(x); gradients to x, A and B, none to the frozen W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*shape d_in"],
        weight: Float[Tensor, "d_out d_in"],
        bias: Float[Tensor, " d_out"] | None,
        a: Float[Tensor, "rank d_in"],
        b: Float[Tensor, "d_out rank"],
        scale: float,
        dropout: float,
    ) -> Float[Tensor, "*shape d_out"]:
        """Compute y in the dtype of x; the adapter's part is summed in the adapter's dtype."""
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, weight, bias)
        kind = y.dtype
        dropped = flat if flat.dtype == a.dtype else flat.to(a.dtype)
        mask = None
        if dropout:
            dropped, mask = torch.native_dropout(dropped, dropout, True)
        inner = F.linear(dropped, a)
        y = (y if kind == a.dtype else y.to(a.dtype)).addmm_(inner, b.mT, alpha=scale)
        ctx.save_for_backward(flat, mask, inner, weight, a, b)
        ctx.scale, ctx.keep, ctx.shape = scale, 1.0 / (1.0 - dropout), x.shape
        return (y if kind == a.dtype else y.to(kind)).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        """Give the gradients that are asked for."""
        flat, mask, inner, weight, a, b = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])
        wide = dy if dy.dtype == a.dtype else dy.to(a.dtype)
        dx = da = db = None
        # With beta 0 the first argument lends its shape alone.
        d_inner = torch.addmm(inner, wide, b, beta=0, alpha=ctx.scale)
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dy, weight)
            if mask is not None:
                dx = dx.addcmul_(torch.mm(d_inner, a), mask, value=ctx.keep)
            elif dx.dtype == a.dtype:
                dx = dx.addmm_(d_inner, a)
            else:
                dx = dx.add_(torch.mm(d_inner, a))
            dx = dx.view(ctx.shape)
        if ctx.needs_input_grad[3]:
            dropped = flat if flat.dtype == a.dtype else flat.to(a.dtype)
            if mask is not None:
                dropped = _undrop(dropped, mask, ctx.keep)
            da = torch.mm(d_inner.mT, dropped)
        if ctx.needs_input_grad[4]:
            db = torch.addmm(b, wide.mT, inner, beta=0, alpha=ctx.scale)
        return dx, None, None, da, db, None, None
