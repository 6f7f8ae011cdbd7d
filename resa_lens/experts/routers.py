"""The routers of a mixture of experts: where they are, what they say and by which rule.

A router gives logits of all E experts, and for each token the k experts it uses with their weights.
Architectures put the three tensors in different orders and compute the weights by different rules,
so neither is taken from a class's name.  The tensors are told apart by type and shape; the rule is
the one that reproduces the router's own choice and weights from its own logits.  Where none does,
what needs a rule (another expert in the place of one that is off, an expert forced on) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from resa_lens.errors import BadInputError
from resa_lens.machine.limits import memory_errors
from resa_lens.models.host import Model

ROUTER_NAMES = ("gate", "router")
"""What architectures call the router, which stands beside the module `experts`."""
TOLERANCE = 1e-3
"""Largest difference of a weight, of 1, by which a rule still reproduces a router."""
PROBE_TOKENS = 64
"""Of the pass on which rules are tried."""
ONLY = "tiny-moe-reasoner is a mixture of experts"
"""What a refusal of a dense model names instead."""


class Routed(NamedTuple):
    """Places of a router's three tensors in its output."""

    logits: int
    weights: int
    experts: int


def read_output(output: Any, name: str) -> Routed:
    """Tell a router's tensors apart by type and shape.

    The integers are the experts; of the two float tensors the one as wide as they are holds the
    weights, the other one the logits of all experts.

    Args:
        output: what the router returned.
        name: of the router, for the error.

    Raises:
        BadInputError: another form, or every token uses every expert.
    """
    tensors = isinstance(output, tuple) and all(isinstance(part, Tensor) for part in output)
    parts = list(output) if tensors else []
    whole = [i for i, part in enumerate(parts) if not part.is_floating_point()]
    real = [i for i, part in enumerate(parts) if part.is_floating_point()]
    if len(whole) != 1 or len(real) != 2 or any(part.ndim != 2 for part in parts):
        raise BadInputError(f"router {name} returns a form that is not known: {_form(output)}")
    k = parts[whole[0]].shape[-1]
    wide = [i for i in real if parts[i].shape[-1] != k]
    if not wide:
        raise BadInputError(
            f"router {name}: every token uses all {k} experts (k is their number), so there is "
            "nothing to route"
        )
    if len(wide) != 1:
        raise BadInputError(f"router {name} returns a form that is not known: {_form(output)}")
    return Routed(wide[0], next(i for i in real if i != wide[0]), whole[0])


def _form(output: Any) -> str:
    parts = output if isinstance(output, tuple) else (output,)
    return ", ".join(
        f"{tuple(p.shape)} {p.dtype}" if isinstance(p, Tensor) else type(p).__name__ for p in parts
    )


@dataclass(frozen=True)
class Rule:
    """How a router chooses k experts and their weights from its logits."""

    score: str
    """"softmax" over all experts or "sigmoid" of each."""
    renormalise: bool
    """Whether the weights of the chosen are scaled to the sum of 1 before `scaling`."""
    scaling: float = 1.0
    """Factor on the weights."""
    groups: int = 1
    """Groups of experts, of which the best `groups_used` may be chosen from."""
    groups_used: int = 1
    group_score: int = 2
    """A group is as good as the sum of so many of its best experts."""

    def __str__(self) -> str:
        """Return the rule in a few words."""
        text = f"{self.score} of all experts, top k"
        if self.groups_used < self.groups:
            text += f" of the best {self.groups_used} of {self.groups} groups"
        text += ", renormalised" if self.renormalise else ", not renormalised"
        return text + (f", x {self.scaling:g}" if self.scaling != 1 else "")

    def choose(
        self,
        logits: Float[Tensor, "token expert"],
        k: int,
        bias: Float[Tensor, " expert"] | None = None,
        *,
        off: Tensor | None = None,
        on: Tensor | None = None,
    ) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
        """Return the weights and the experts that the rule gives.

        Args:
            logits: of all experts.
            k: experts a token.
            bias: is added to the scores for the choice alone.
            off: indices of experts that cannot be chosen, as if the model had none of them.
            on: indices of experts that are chosen before all others; their weight is their own.
        """
        logits = logits.float()
        if off is not None and self.score == "softmax":
            logits = logits.index_fill(-1, off, -torch.inf)
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        choice = scores if bias is None else scores + bias.float()
        if off is not None:
            choice = choice.index_fill(-1, off, -torch.inf)
        if on is not None:
            # Above every score, and finite: sums of a group stay numbers.
            choice = choice.index_fill(-1, on, 1e4)
        if self.groups_used < self.groups:
            size = choice.shape[-1] // self.groups
            best = choice.unflatten(-1, (self.groups, size)).topk(min(self.group_score, size), -1)
            kept = best.values.sum(-1).topk(self.groups_used, -1).indices
            allowed = torch.zeros_like(choice[:, : self.groups]).scatter_(1, kept, 1.0).bool()
            choice = choice.masked_fill(~allowed.repeat_interleave(size, -1), -torch.inf)
        experts = choice.topk(k, -1).indices
        weights = scores.gather(-1, experts)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        return weights * self.scaling, experts


def dense_weights(
    weights: Float[Tensor, "token k"], experts: Int[Tensor, "token k"], count: int
) -> Float[Tensor, "token expert"]:
    """Return each token's weights of all experts, 0 for those that it does not use."""
    table = torch.zeros(len(experts), count, dtype=torch.float32, device=experts.device)
    return table.scatter_(1, experts.long(), weights.float())


@dataclass(frozen=True)
class Router:
    """One layer's router, and what a pass showed of it."""

    layer: int
    """0-based."""
    name: str
    """Of the module."""
    module: nn.Module
    experts: int
    """E."""
    k: int
    """Experts a token."""
    rule: Rule | None
    """None where no known one reproduces the router."""
    error: float
    """Largest difference of a weight under the rule, or under the best of those tried."""
    shared: bool
    """Whether experts that every token uses stand beside the routed ones."""

    @property
    def bias(self) -> Tensor | None:
        """What the router adds to the scores for its choice, [expert]."""
        return getattr(source(self.module), "e_score_correction_bias", None)

    def refuse_without_rule(self, how: str) -> None:
        """Raise BadInputError where the rule is not known that a change needs."""
        if self.rule is None:
            raise BadInputError(
                f"router {self.name} ({type(source(self.module)).__name__}) follows no known rule "
                f"(nearest: {self.error:.2g} off), so {how} is not possible; use zero, zero-renorm "
                "or scale"
            )


def source(module: nn.Module) -> nn.Module:
    """Return the model's own module where a bridge's stands in its place."""
    inner = getattr(module, "original_component", None)
    return inner if isinstance(inner, nn.Module) else module


def router_modules(model: nn.Module) -> Iterator[tuple[int, str, nn.Module, bool]]:
    """Yield layer, name, module and whether there are shared experts, of every router.

    They are found by what stands beside them, a module `experts` with three-dimensional weights,
    and not by a path: a bridge puts modules of its own in between.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        if not any(p.ndim == 3 and p.is_floating_point() for p in experts.parameters()):
            continue
        place = re.search(r"\.(\d+)\.", f"{name}.")
        for part in ROUTER_NAMES:
            router = getattr(module, part, None)
            if not isinstance(router, nn.Module) or place is None or id(source(router)) in seen:
                continue
            seen.add(id(source(router)))
            shared = any(
                isinstance(getattr(module, other, None), nn.Module)
                for other in ("shared_expert", "shared_experts", "shared_mlp")
            )
            yield int(place[1]), f"{name}.{part}", router, shared


def find_rule(
    router: nn.Module, output: tuple[Tensor, ...], routed: Routed
) -> tuple[Rule | None, float]:
    """Return the rule that reproduces a router's own output, and by how much it misses.

    Args:
        router: the module, for its own factor, groups and bias.
        output: what it returned.
        routed: places of the tensors in the output.

    Returns:
        The rule, None where the best one misses a weight by more than `TOLERANCE`; and that miss.
    """
    module = source(router)
    logits, experts = output[routed.logits], output[routed.experts]
    count, k = logits.shape[-1], experts.shape[-1]
    expected = dense_weights(output[routed.weights], experts, count)
    scaling = float(getattr(module, "routed_scaling_factor", 1.0) or 1.0)
    groups = int(getattr(module, "num_group", 1) or 1)
    used = int(getattr(module, "topk_group", groups) or groups)
    bias = getattr(module, "e_score_correction_bias", None)
    nearest: tuple[float, Rule | None] = (float("inf"), None)
    forms = [(1, 1, 2)]
    if groups > 1:
        forms += [(groups, used, 1), (groups, used, 2)]
    for score, renormalise, (g, u, best) in product(("softmax", "sigmoid"), (True, False), forms):
        for factor in dict.fromkeys((scaling, 1.0)):
            rule = Rule(score, renormalise, factor, g, u, best)
            weights, chosen = rule.choose(logits, k, bias)
            difference = dense_weights(weights, chosen, count) - expected
            error = float(difference.detach().abs().max())
            if error < nearest[0]:
                nearest = error, rule
    error, rule = nearest
    return (rule if error <= TOLERANCE else None), error


@contextmanager
def recording(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, tuple[Tensor, ...]]]:
    """Keep what the routers return in the last pass, by layer.

    Args:
        modules: the routers by layer.
    """
    outputs: dict[int, tuple[Tensor, ...]] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
            outputs[layer] = output

        return hook

    handles = [module.register_forward_hook(keep(at)) for at, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def find_routers(model: Model) -> dict[int, Router]:
    """Return the routers by 0-based layer, their rules found on a pass of 64 tokens.

    Raises:
        BadInputError: a dense model, a router of an unknown form, k equal to the number of experts,
            or experts that are quantised.
        RunFailedError: memory was too little.
    """
    plain: Any = model.model
    modules = {layer: (name, module, shared) for layer, name, module, shared
               in router_modules(plain)}  # fmt: skip
    if not modules:
        packed = any(hasattr(module, "experts") for module in plain.modules())
        why = "experts whose weights are quantised or no plain tensors" if packed else "no experts"
        raise BadInputError(f"model {model.name} has {why}; {ONLY}")
    size = int(plain.config.get_text_config().vocab_size)
    ids = (torch.arange(PROBE_TOKENS, device=model.device) * 7 % size)[None]
    routing = {layer: module for layer, (_, module, _) in modules.items()}
    with (
        memory_errors("looking at the routers", "--dtype bfloat16 takes less memory."),
        recording(routing) as outputs,
    ):
        plain(input_ids=ids, use_cache=False)
    routers: dict[int, Router] = {}
    for layer, (name, module, shared) in sorted(modules.items()):
        output = outputs[layer]
        routed = read_output(output, name)
        rule, error = find_rule(module, output, routed)
        count, k = output[routed.logits].shape[-1], output[routed.experts].shape[-1]
        routers[layer] = Router(layer, name, module, count, k, rule, error, shared)
    return routers


def check_mixture(
    config: Any, name: str, experts: Mapping[int, Sequence[int]] = MappingProxyType({})
) -> None:
    """Raise BadInputError where a model's configuration speaks of no experts, or not of these.

    Nothing is loaded for it; which layers are dense only the modules say.

    Args:
        config: of transformers.
        name: of the model, for the error.
        experts: by 0-based layer, those that are to be changed.
    """
    text = config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    counts = [int(value) for part in names if (value := getattr(text, part, None))]
    if not counts:
        raise BadInputError(f"model {name} has no experts; {ONLY}")
    k = int(getattr(text, "num_experts_per_tok", 0) or 0)
    layers = int(text.num_hidden_layers)
    for layer, chosen in experts.items():
        if layer >= layers:
            raise BadInputError(
                f"expert {layer}:{chosen[0]}: layer {layer} does not exist; {name} has layers 0 to "
                f"{layers - 1}"
            )
        if wrong := [e for e in chosen if e >= max(counts)]:
            raise BadInputError(
                f"expert {layer}:{wrong[0]} does not exist; layer {layer} has experts 0 to "
                f"{max(counts) - 1}"
            )
    if k >= max(counts):
        raise BadInputError(
            f"model {name}: every token uses all {max(counts)} experts (k is their number), so "
            "there is nothing to route"
        )
