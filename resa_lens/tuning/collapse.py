"""Collapse: a tuning without an anchor that makes both sides alike by destroying them.

Preset paper asks that the model with the SAE and the model without it agree, and nothing else.  At
large steps they come to agree on nonsense: the divergence falls and the answers are gone
(docs/findings.md).  So the loss of the model without the SAE is looked at ten times a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

LOOKS = 10
"""In a run."""
TIMES, NATS = 2.0, 0.5
"""A loss that is so many times the base's, and so much above it, is a collapse."""
PROBE_ROWS, PROBE_TOKENS = 4, 256
"""Of the first batch: few enough that the logits of a large vocabulary fit beside the rest."""
GOOD = "good."


@torch.no_grad()
def document_loss(bridge: Any, ids: Int[Tensor, "batch position"]) -> float:
    """Return the next-token loss of documents without the SAE, nats a token, dropout off."""
    modes = {module: module.training for module in bridge.modules()}
    bridge.eval()
    try:
        losses = []
        for row in ids[:PROBE_ROWS, :PROBE_TOKENS].split(1):
            logits = bridge(row)[0, :-1].float()
            losses.append(F.cross_entropy(logits, row[0, 1:]).item())
        return sum(losses) / len(losses)
    finally:
        for module, training in modes.items():
            module.training = training


@dataclass
class CollapseWatch:
    """Remembers the last adapters that were well, and says when they no longer are."""

    loss: Callable[[], float]
    """Of the adapted model on a probe."""
    base: float
    """Of the model without adapters on the same probe."""
    step: int = 0
    """The update after which the remembered adapters were well; 0 are fresh ones."""
    seen: float = 0.0
    """The loss that was a collapse."""
    good: dict[str, Tensor] = field(default_factory=dict)

    def remember(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Take a copy of adapters that are well."""
        self.step = step
        self.good = {name: value.detach().clone() for name, value in weights.items()}

    def due(self, step: int, steps: int) -> bool:
        """Return whether the loss is looked at after an update."""
        return step % max(1, steps // LOOKS) == 0 or step == steps

    def collapsed(self, step: int, weights: Mapping[str, Tensor]) -> bool:
        """Look at the loss; where it is too high put the last good adapters back."""
        loss = self.loss()
        if not math.isfinite(loss):
            return False  # the loop names it, as any loss that is no number
        if loss <= max(TIMES * self.base, self.base + NATS):
            self.remember(step, weights)
            return False
        self.seen = loss
        self.restore(weights)
        return True

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Put the remembered adapters in place."""
        for name, value in weights.items():
            value.copy_(self.good[name])

    def tensors(self) -> dict[str, Tensor]:
        """Return what a state keeps of the remembered adapters."""
        return {f"{GOOD}{name}": value for name, value in self.good.items()}

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Take the remembered adapters from a state."""
        kept = {name: value for name, value in tensors.items() if name.startswith(GOOD)}
        self.step = step
        for name, value in kept.items():
            plain = name.removeprefix(GOOD)
            self.good[plain] = value.to(self.good[plain])
