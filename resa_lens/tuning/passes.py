"""The loss of SAE-Tuning with no work done twice: what the trainer computes in every step.

`objective.tuning_loss` says what is computed; `Passes` gives the same loss and gradients

- without logits: the KL goes through the head a few tokens at a time (kl.py);
- with the blocks below the hook computed once, where both passes are the same there
  (`shared_block`);
- with the FVU at the hook from what the hook sees anyway.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.models.hookpoints import Hookpoint
from resa_lens.saes.baselines import Replacement
from resa_lens.saes.coder import SparseCoder
from resa_lens.tuning.kl import (
    HEAD_INPUT,
    CompiledSlopes,
    chunked_kl,
    find_head,
    keep_head_input,
)
from resa_lens.tuning.lora import AdapterSwitch
from resa_lens.tuning.objective import Insertion, Objective, generators, kl_divergence

BLOCK_OUTPUT = "blocks.{n}.hook_resid_post"


def shared_block(objective: Objective, point: Hookpoint, peft: Any) -> int | None:
    """Return the last block that is the same in both passes, or None.

    Below the hook the passes differ in nothing but the adapters.  They are the same there

    - where these adapters are zero and stay so: all gradient would have to pass the SAE at a
      block's output, or the reference, and neither lets it.  Their dropout acts on nothing then;
    - where both passes have the adapters on and no dropout draws different masks for them.
    """
    at_output = point.site == "resid_post"
    block = point.layer if at_output else point.layer - 1
    adapters_drop, model_drops = _dropout(peft)
    if block < 0 or model_drops:
        return None
    learns = objective.sae_gradient or not at_output or objective.reference_learns
    if not learns and _zero_up_to(block, peft):
        return block
    alike = objective.reference == objective.teacher == "adapted"
    return block if alike and not adapters_drop else None


def _zero_up_to(block: int, peft: Any) -> bool:
    for name, parameter in peft.named_parameters():
        found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
        if (found and int(found[1]) > block) or not parameter.requires_grad:
            continue
        # B A x is zero where B is; of another kind of adapter it is not known.
        if "lora_A" not in name and ("lora_B" not in name or bool(parameter.any())):
            return False
    return True


def _dropout(peft: Any) -> tuple[bool, bool]:
    """Return whether the adapters have dropout, and whether the model itself has."""
    active = [n for n, m in peft.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    own = bool(getattr(peft.config, "attention_dropout", 0.0))
    adapters = [name for name in active if "lora_dropout" in name]
    return bool(adapters), own or len(adapters) < len(active)


def checkpoint_blocks(model: Any, **options: Any) -> None:
    """Let a model of transformers compute its blocks' activations again on the way back.

    Args:
        model: plain or wrapped by PEFT; changed in place, at work while it trains.
        options: of `torch.utils.checkpoint`.
    """
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, **options}
    )
    # transformers makes the embeddings require gradients, for the reentrant kind alone;
    # they would flow through blocks that have no use for them.
    model.disable_input_require_grads()


class Passes:
    """Loss and metrics of a batch; the adapters must be fresh, or zero below a blocked hook."""

    def __init__(
        self,
        bridge: Any,
        peft: Any,
        point: Hookpoint,
        coder: SparseCoder | Replacement,
        objective: Objective,
        *,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.bridge, self.adapters, self.point = bridge, AdapterSwitch(peft), point
        self.coder, self.objective = coder, objective
        self.head, reason = find_head(bridge)
        if self.head is None:
            note(f"KL over the logits of all tokens at once, which takes more memory: {reason}")
        self.slopes = CompiledSlopes(note) if compiled else None
        self.shared = shared_block(objective, point, peft) if self._blocks_give_tensors() else None
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        """The context in which a block of the current pass is computed again."""
        if gradient_checkpointing:
            checkpoint_blocks(
                bridge.original_model, context_fn=lambda: (nullcontext(), self.around())
            )

    def __call__(
        self, ids: Int[Tensor, "batch position"]
    ) -> tuple[Float[Tensor, ""], dict[str, float | Tensor]]:
        """Return the loss and what is logged of it."""
        objective = self.objective
        insertion = Insertion(self.coder, gradient=objective.sae_gradient)
        for generator in generators(self.coder):
            # Of the global generator, so that a resumed run draws the same.
            generator.manual_seed(int(torch.randint(2**62, ())))
        with_sae, without = (
            (self._with_sae(ids, insertion), self._without(ids))
            if self.shared is None
            else self._from_shared(ids, insertion, self.shared)
        )
        loss = self._divergence(
            *((with_sae, without) if objective.direction == "sae||reference" else
              (without, with_sae))
        )  # fmt: skip
        assert insertion.fvu is not None
        share = 1.0 if objective.reduction == "mean" else ids.shape[0] / ids.numel()
        return loss, {
            "tokens": ids.numel(),
            "kl_per_token": loss.detach() * share,
            "fvu": insertion.fvu,
        }

    def _with_sae(
        self, ids: Tensor, insertion: Insertion, keep: list[tuple[str, Any]] | None = None
    ) -> Tensor:
        hook = (self.point.transformer_lens, insertion)
        if self.objective.teacher == "base":
            with torch.no_grad(), self.adapters.off():
                return self._run(ids, [*(keep or []), hook])
        # A block's output is outside of what checkpointing computes again.
        if self.point.site != "resid_post":
            self.around = lambda: self.bridge.hooks(fwd_hooks=[hook])
        try:
            return self._run(ids, [*(keep or []), hook])
        finally:
            self.around = nullcontext

    def _without(self, ids: Tensor, keep: list[tuple[str, Any]] | None = None) -> Tensor:
        gradient = self.objective.reference_learns and torch.is_grad_enabled()
        base = self.objective.reference == "base"
        with (
            torch.set_grad_enabled(gradient),
            self.adapters.off() if base else nullcontext(),
        ):
            return self._run(ids, keep or [])

    def _from_shared(self, ids: Tensor, insertion: Insertion, block: int) -> tuple[Tensor, Tensor]:
        """Run one pass from the beginning and the other one from the shared block's output."""
        objective = self.objective
        at_output = self.point.site == "resid_post"
        held: list[Tensor] = []
        keep = [(BLOCK_OUTPUT.format(n=block), lambda acts, hook=None: held.append(acts))]
        # The pass that comes first decides whether the shared blocks have a gradient.
        if (objective.sae_gradient or not at_output) and not objective.reference_learns:
            with_sae = self._with_sae(ids, insertion, keep)
            with self._after(block, held[0].detach()):
                return with_sae, self._without(ids)
        without = self._without(ids, keep)
        if at_output:
            with self._after(block, insertion(held[0])):
                return self._run(ids, []), without
        with self._after(block, held[0]):
            return self._with_sae(ids, insertion), without

    def _run(self, ids: Tensor, hooks: list[tuple[str, Any]]) -> Tensor:
        """Return the head's input, or the logits where the head is not a plain one."""
        if self.head is None:
            with self.bridge.hooks(fwd_hooks=hooks):
                return self.bridge(ids, use_cache=False)
        held: list[Tensor] = []
        with self.bridge.hooks(fwd_hooks=[*hooks, (HEAD_INPUT, keep_head_input(held))]):
            self.bridge(ids, use_cache=False)
        return held[0]

    @contextmanager
    def _after(self, block: int, hidden: Tensor) -> Iterator[None]:
        """Let the blocks up to one do nothing, and this one give the residual stream `hidden`."""
        blocks = self.bridge.blocks[: block + 1]

        def nothing(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            return hidden_states

        def given(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            return hidden

        try:
            # Not by assignment, which the bridge passes on to what it wraps.
            for part in blocks:
                vars(part)["forward"] = nothing
            vars(blocks[-1])["forward"] = given
            yield
        finally:
            for part in blocks:
                vars(part).pop("forward", None)

    @torch.no_grad()
    def _blocks_give_tensors(self) -> bool:
        # Of some architectures they give tuples, and what else is in them is not known here.
        kinds: list[type] = []
        handle = self.bridge.blocks[0].register_forward_hook(
            lambda module, args, output: kinds.append(type(output))
        )
        try:
            self.bridge(torch.arange(4, device=self.bridge.cfg.device)[None], return_type=None)
        finally:
            handle.remove()
        return kinds == [Tensor]

    def _divergence(self, p: Tensor, q: Tensor) -> Float[Tensor, ""]:
        reduction = self.objective.reduction
        if self.head is None:
            return kl_divergence(p, q, reduction)
        return chunked_kl(p, q, self.head, reduction, slopes=self.slopes)
