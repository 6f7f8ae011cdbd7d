"""The two optimizers of SAE training, one tensor at a time.

A gradient is as large as the matrix it belongs to.  Here each is used up before the next is made,
so a layer never holds two; and the update of signum behind its average is three fused passes.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from resa_lens.errors import BadInputError


class Optimizer(Protocol):
    """Updates named tensors in place."""

    def begin(self, rate: float) -> None:
        """Open a step with its learning rate."""
        ...

    def update(self, name: str, gradient: Tensor) -> None:
        """Update one tensor; the gradient is overwritten."""
        ...

    def moved(self, name: str) -> None:
        """Take note that a tensor was set from outside."""
        ...

    def finish(self) -> None:
        """Leave in the tensors what is to be kept, once training is over."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the state's tensors, by name; loading copies into them."""
        ...

    def scalars(self) -> dict[str, float]:
        """Return the rest of the state."""
        ...

    def load_scalars(self, values: dict[str, float]) -> None:
        """Put back what `scalars` gave."""
        ...


class Signum:
    """Sign descent under a schedule-free average (arXiv 2405.15682, momentum 0.95).

    sparsify runs this as ScheduleFreeWrapper(SignSGD), in about a dozen passes over the weights.
    With x the average, z the iterate and y = (1 - m) z + m x the point where gradients are taken,
    one step in exact arithmetic is

        y <- (1 - c) y + c z - (1 - m + m c) rate s,    z <- z - rate s,    s = sign(gradient)

    with c the weight of the newest iterate, rate_max^2 over the sum of all so far.
    """

    def __init__(self, params: dict[str, Tensor], momentum: float = 0.95) -> None:
        self.y = params
        self.z = {name: value.clone() for name, value in params.items()}
        self.momentum = momentum
        self.rate = self.rate_max = self.weight_sum = self.share = 0.0

    def begin(self, rate: float) -> None:
        """Open a step with its learning rate."""
        self.rate, self.rate_max = rate, max(rate, self.rate_max)
        weight = self.rate_max**2
        self.weight_sum += weight
        self.share = weight / self.weight_sum if self.weight_sum else 0.0

    def update(self, name: str, gradient: Tensor) -> None:
        """Update one tensor; the gradient is overwritten by its sign."""
        y, z, sign, c = self.y[name], self.z[name], gradient.sign_(), self.share
        y.lerp_(z, c)
        y.add_(sign, alpha=-self.rate * (1 - self.momentum + self.momentum * c))
        z.add_(sign, alpha=-self.rate)

    def moved(self, name: str) -> None:
        """Begin the iterate where the tensor is now; otherwise the first step takes it back."""
        self.z[name].copy_(self.y[name])

    def finish(self) -> None:
        """Put the average x in place of y."""
        for name, y in self.y.items():
            y.lerp_(self.z[name], 1 - 1 / self.momentum)

    def tensors(self) -> dict[str, Tensor]:
        """Return the iterates."""
        return {f"z.{name}": value for name, value in self.z.items()}

    def scalars(self) -> dict[str, float]:
        """Return the sums that decide the next average."""
        return {"rate_max": self.rate_max, "weight_sum": self.weight_sum}

    def load_scalars(self, values: dict[str, float]) -> None:
        """Put back what `scalars` gave."""
        self.rate_max, self.weight_sum = values["rate_max"], values["weight_sum"]


class Adam:
    """torch's Adam, one a tensor, so that gradients need not live together."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        self.params = params
        self.inner: dict[str, torch.optim.Adam] = {}
        for name, value in params.items():
            self.inner[name] = torch.optim.Adam([value], lr=0.0, fused=True)
            self.inner[name].state[value] = {
                "step": torch.zeros((), device=value.device),
                "exp_avg": torch.zeros_like(value),
                "exp_avg_sq": torch.zeros_like(value),
            }

    def begin(self, rate: float) -> None:
        """Open a step with its learning rate."""
        for optimizer in self.inner.values():
            optimizer.param_groups[0]["lr"] = rate

    def update(self, name: str, gradient: Tensor) -> None:
        """Update one tensor."""
        self.params[name].grad = gradient
        self.inner[name].step()
        self.params[name].grad = None

    def moved(self, name: str) -> None:
        """Do nothing: the moments are of gradients."""

    def finish(self) -> None:
        """Leave the weights as they are."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments and the count of steps."""
        return {
            f"{key}.{name}": value
            for name, optimizer in self.inner.items()
            for key, value in optimizer.state[self.params[name]].items()
        }

    def scalars(self) -> dict[str, float]:
        """Return nothing: the count of steps is a tensor."""
        return {}

    def load_scalars(self, values: dict[str, float]) -> None:
        """Do nothing."""


OPTIMIZERS: dict[str, type[Signum] | type[Adam]] = {"signum": Signum, "adam": Adam}
STATE_COPIES = {"signum": 2, "adam": 3}
"""How many times the weights are held: themselves and the state."""


def rate_at(step: int, steps: int, rate: float, schedule: str, warmup: int) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then the schedule to zero."""
    if step < warmup:
        return rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return rate * max(0.0, 1 - done)
    if schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return rate


def new_optimizer(name: str, params: dict[str, Tensor]) -> Any:
    """Return an optimizer by its name; raise BadInputError for an unknown one."""
    if name not in OPTIMIZERS:
        raise BadInputError(f"optimizer {name!r} is unknown; use {' or '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](params)
