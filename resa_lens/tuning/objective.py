"""The objective of SAE-Tuning (paper, eq. 8) and every way in which paper and code differ.

    minimise over the adapters  D_KL( y~ , y ),   y~ with the SAE inserted, y without

`paper` follows the text, `reference` the authors' code (spec, section 7), and `distil` has a frozen
model with the SAE teach the adapted one without it; each difference is an option of its own.

With LoRA dropout (Table 7: 0.05) the two passes draw different masks, so once the adapters are not
zero a part of the KL is dropout noise; `--dropout 0` takes it away.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from resa_lens.models.hookpoints import Hookpoint
from resa_lens.saes.baselines import Replacement, substitute
from resa_lens.saes.coder import SparseCoder
from resa_lens.tuning.config import ATTENTION as ATTENTION
from resa_lens.tuning.config import MLP as MLP
from resa_lens.tuning.config import PRESETS as PRESETS
from resa_lens.tuning.config import Objective as Objective
from resa_lens.tuning.config import preset as preset


class Insertion:
    """The hook that puts the reconstruction of an SAE, or a control, in place of activations.

    One serves one pass: it keeps what it saw, so that the FVU at the hook costs no pass of its own.
    Gradient checkpointing calls it again while it goes backwards; a control that draws noise then
    draws the same.
    """

    def __init__(self, coder: SparseCoder | Replacement, *, gradient: bool) -> None:
        self.coder, self.gradient = coder, gradient
        self.states: list[Tensor] | None = None
        self.fvu: Tensor | None = None
        """Sum |x - x~|^2 / sum |x - mean(x)|^2 over the batch's tokens."""

    def __call__(
        self, acts: Float[Tensor, "batch position d_model"], hook: object = None
    ) -> Float[Tensor, "batch position d_model"]:
        """Return what stands in the activations' place."""
        own = generators(self.coder)
        if self.states is None:
            self.states = [generator.get_state() for generator in own]
        else:
            for generator, state in zip(own, self.states, strict=True):
                generator.set_state(state)
        with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):
            made = substitute(self.coder, acts)
        if self.fvu is None:
            with torch.no_grad():
                x = acts.flatten(0, -2).float()
                error = (made.flatten(0, -2).float() - x).pow_(2).sum()
                self.fvu = error / (x - x.mean(0)).pow_(2).sum().clamp_min_(1e-12)
        return made


def generators(coder: SparseCoder | Replacement) -> list[torch.Generator]:
    """Return the generators that a control draws from: noise has one of its own."""
    parts = coder.modules() if isinstance(coder, nn.Module) else ()
    held = (getattr(part, "generator", None) for part in parts)
    return [generator for generator in held if isinstance(generator, torch.Generator)]


def kl_divergence(
    p_logits: Float[Tensor, "batch position vocab"],
    q_logits: Float[Tensor, "batch position vocab"],
    reduction: str = "mean",
) -> Float[Tensor, ""]:
    """Return D_KL(p || q) in nats: the mean over tokens, or the sum a sequence ("sum")."""
    log_p = F.log_softmax(p_logits.float(), dim=-1)
    log_q = F.log_softmax(q_logits.float(), dim=-1)
    total = (log_p.exp() * (log_p - log_q)).sum()
    rows = p_logits[..., 0].numel() if reduction == "mean" else p_logits.shape[0]
    return total / rows


def tuning_loss(
    bridge: Any,
    peft: Any,
    ids: Int[Tensor, "batch position"],
    point: Hookpoint,
    coder: SparseCoder | Replacement,
    objective: Objective,
) -> Float[Tensor, ""]:
    """Return the loss of one batch as it is defined: two whole passes, and the logits of both.

    The trainer's `passes.Passes` computes the same with less.

    Args:
        bridge: TransformerBridge over the PEFT model's inner model.
        peft: the PeftModel, whose adapters can be switched off.
        ids: token ids.
        point: where the SAE is inserted.
        coder: the frozen SAE, or a control in its place (saes/baselines.py).
        objective: see `Objective`.
    """
    hook = Insertion(coder, gradient=objective.sae_gradient)
    with bridge.hooks(fwd_hooks=[(point.transformer_lens, hook)]):
        if objective.teacher == "base":
            with torch.no_grad(), peft.disable_adapter():
                with_sae = bridge(ids)
        else:
            with_sae = bridge(ids)
    with torch.set_grad_enabled(objective.reference_gradient and torch.is_grad_enabled()):
        if objective.reference == "base":
            with peft.disable_adapter():
                without = bridge(ids)
        else:
            without = bridge(ids)
    if objective.direction == "sae||reference":
        return kl_divergence(with_sae, without, objective.reduction)
    return kl_divergence(without, with_sae, objective.reduction)
