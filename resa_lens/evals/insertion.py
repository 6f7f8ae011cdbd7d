"""The insertion test: a model answers while something stands in place of its activations.

What an SAE's reconstruction does to accuracy before any tuning is what preset distil hands on, and
what the others begin with.  Beside the SAE stand controls of the same size (saes/baselines.py) and
the oracle: the source's own activations, which the source computes in lockstep on the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from resa_lens.evals.config import EvalConfig
from resa_lens.evals.engines.hf import HFEngine
from resa_lens.evals.run import EvalResult, evaluate
from resa_lens.evals.tasks import EvalItem
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.baselines import Replacement, substitute
from resa_lens.saes.coder import SparseCoder
from resa_lens.stats import Interval

Verdict = Literal[
    "the teacher carries a gain", "costs", "nothing to learn", "cost only", "undetermined"
]
GAIN: Verdict = "the teacher carries a gain"
NOTHING = 0.02
"""A gain that is surely below two points is nothing to learn (spec, section 7)."""


def insertion_verdict(ci: Interval, *, one_model: bool) -> Verdict:
    """Return what an inserted SAE could teach, by the interval of its change of accuracy.

    Args:
        ci: 95 % interval of accuracy with the SAE inserted less without, shares.
        one_model: whether the SAE's source is the target itself; an SAE can then only lose what
            its model knows, and controls of the source say nothing.
    """
    low, high = ci
    if low > 0:
        return GAIN
    if one_model:
        return "cost only"
    if high < 0:
        return "costs"
    return "nothing to learn" if high < NOTHING else "undetermined"


class MeanAblation(nn.Module):
    """x~ = the mean activation at every token: the site carries nothing any more."""

    mean: Tensor

    def __init__(self, mean: Float[Tensor, " d_in"]) -> None:
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_in"]:
        """Return the mean in place of every row, in the dtype of x."""
        return self.mean.to(x.dtype).expand_as(x)


class Lockstep(nn.Module):
    """A target that reads with its source beside it and takes the source's activations.

    Args:
        target: the model that answers.
        source: of the same architecture and vocabulary; it keeps a cache of its own.
        point: the place whose activations are exchanged.
    """

    def __init__(self, target: Model, source: Model, point: Hookpoint) -> None:
        super().__init__()
        self.target, self.source = target.model, source.model
        self.hook_name = point.transformer_lens
        self.bridges = [target.bridge, source.bridge]  # in a list: no second name of the weights
        self.caches: tuple[Any, Any] = (None, None)

    @property
    def config(self) -> Any:
        """The target's, by which an engine finds its context and its end tokens."""
        return self.target.config

    @property
    def generation_config(self) -> Any:
        """The target's."""
        return self.target.generation_config

    @torch.no_grad()
    def forward(self, *, past_key_values: Any, **inputs: Any) -> Any:
        """Return the target's output with the source's activations in place of its own."""
        if past_key_values is not self.caches[0]:
            self.caches = past_key_values, self._twin(past_key_values)
        acts: list[Tensor] = []
        target, source = self.bridges

        def keep(tensor: Tensor, hook: object = None) -> None:
            acts.append(tensor)

        with source.hooks(fwd_hooks=[(self.hook_name, keep)]):
            self.source(past_key_values=self.caches[1], **inputs)

        def put(tensor: Tensor, hook: object = None) -> Tensor:
            return acts[0].to(tensor.dtype)

        with target.hooks(fwd_hooks=[(self.hook_name, put)]):
            return self.target(past_key_values=past_key_values, **inputs)

    def _twin(self, cache: Any) -> DynamicCache:
        """Return an empty cache that loses a row whenever the given one does."""
        twin = DynamicCache(config=self.source.config)
        select = cache.batch_select_indices

        def select_both(index: Tensor) -> None:
            select(index)
            twin.batch_select_indices(index)

        cache.batch_select_indices = select_both
        return twin


def evaluate_inserted(
    model: Model,
    items: Sequence[EvalItem],
    config: EvalConfig,
    point: Hookpoint | None = None,
    inserted: SparseCoder | Replacement | Model | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Score a model with something in place of its activations at every token it reads.

    Args:
        model: the target; nothing about it changes.
        items: the questions.
        config: what is asked and how.
        point: the place.
        inserted: an SAE or a control (`baselines`), the source model (the oracle), or None for the
            model as it is.
        progress: called with (finished, all) answers.
    """
    if inserted is None or point is None:
        return evaluate(HFEngine(model.model, model.tokenizer), items, config, progress)
    if isinstance(inserted, Model):
        oracle = Lockstep(model, inserted, point)
        return evaluate(HFEngine(oracle, model.tokenizer), items, config, progress)

    def put(acts: Tensor, hook: object = None) -> Tensor:
        return substitute(inserted, acts)

    with model.bridge.hooks(fwd_hooks=[(point.transformer_lens, put)]):
        return evaluate(HFEngine(model.model, model.tokenizer), items, config, progress)
