"""A reading of the gradient probe that the product does not use: the gradients of fresh adapters.

The note from which the selector `gradient-probe` was built had no formula, and read it as the
squared norm of the gradient of fresh LoRA matrices B at zero, a parameter, mean over batches.  With
y = W x + s B A x and B = 0 that gradient is s sum_t (dL/dy_t) (A x_t)^T, so nothing has to be
trained and the model is as it was.  benchmarks/planted_blocks.py judges it beside the authors' own
(`resa_lens.tuning.gradient_probe`), which does better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from resa_lens.errors import BadInputError
from resa_lens.models.bridge import plain_name
from resa_lens.models.hookpoints import module_layer
from resa_lens.models.host import Model
from resa_lens.tuning.config import ATTENTION, MLP, TuneConfig
from resa_lens.tuning.gradient_probe import Means, over_batches
from resa_lens.tuning.train import lora_targets

PROJECTIONS = (*ATTENTION, *MLP)


def lora_gradients(
    model: Model,
    batches: Iterable[Int[Tensor, "batch position"]],
    *,
    targets: Sequence[str] = PROJECTIONS,
    config: TuneConfig | None = None,
) -> Means:
    """Return the gradient energy of fresh LoRA adapters, by layer.

    The loss is that of the next token, nats, mean over a batch's tokens.

    Args:
        model: the model that would be tuned; it is left as it was.
        batches: token ids, without padding; of whatever the tuning data are.
        targets: modules that would get adapters, as `tune` names them.
        config: rank, alpha and seed of the adapters; A is drawn as PEFT draws it, uniform in
            +- 1/sqrt(d_in), so that another seed gives another sample of the same thing.

    Raises:
        BadInputError: fewer than two batches, a module that the model has not, or one that its
            forward pass goes around.
    """
    config = config or TuneConfig()
    endings = tuple(lora_targets(model.model, tuple(targets)))
    modules = {
        name: module
        for name, module in _matrices(model.model)
        if any(name == ending or name.endswith(f".{ending}") for ending in endings)
    }
    generator = torch.Generator().manual_seed(config.seed)
    adapters = {name: _Adapter(config, generator) for name in modules}
    handles = [module.register_forward_hook(adapters[name].add) for name, module in modules.items()]

    def energies(loss: Tensor) -> dict[int, float]:
        if unused := [name for name, adapter in adapters.items() if adapter.B is None]:
            raise BadInputError(
                f"{model.name}: the forward pass goes around {unused[0]}; name other --targets"
            )
        weights = {name: adapter.B for name, adapter in adapters.items() if adapter.B is not None}
        grads = torch.autograd.grad(loss, list(weights.values()))
        sums: dict[int, float] = {}
        sizes: dict[int, int] = {}
        for name, grad in zip(weights, grads, strict=True):
            layer = module_layer(name)
            assert layer is not None  # `_matrices` takes no others
            sums[layer] = sums.get(layer, 0.0) + float(grad.double().pow(2).sum())
            sizes[layer] = sizes.get(layer, 0) + grad.numel()
        return {layer: total / sizes[layer] for layer, total in sums.items()}

    try:
        return over_batches(model, batches, energies)
    finally:
        for handle in handles:
            handle.remove()


class _Adapter:
    """LoRA on one module, B at zero: the output is unchanged and has a gradient towards B."""

    def __init__(self, config: TuneConfig, generator: torch.Generator) -> None:
        self.rank, self.scale = config.rank, config.alpha / config.rank
        self.generator = generator
        self.A: Tensor | None = None
        self.B: Tensor | None = None

    def add(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return y + s B A x."""
        x = inputs[0].float()
        if self.A is None or self.B is None:
            bound = 1 / math.sqrt(x.shape[-1])
            drawn = torch.rand((self.rank, x.shape[-1]), generator=self.generator)
            self.A = (bound * (2 * drawn - 1)).to(x.device)
            self.B = torch.zeros((output.shape[-1], self.rank), device=x.device, requires_grad=True)
        return output + (self.scale * (x @ self.A.T) @ self.B.T).to(output.dtype)


def _matrices(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules that hold a matrix of their own, by their names without a bridge's."""
    named: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        plain = plain_name(name)
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.ndim == 2 and module_layer(plain) is not None:
            named.setdefault(id(module), (plain, module))
    return list(named.values())
