"""A transformers model wrapped by TransformerBridge, and how its architecture names its places.

The stock adapters re-implement attention with scores of T x T; where it works the model's own
kernel is called instead, so that logits stay equal and long sequences stay cheap.  Whether it works
is tried: the bridge must give the plain model's logits, and a change at each hook must reach them.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import SITES, Names

PROBE_TOKENS = 8
"""Of the pass that both attentions are tried with."""
LOGIT_LIMIT = 1e-4
"""Largest difference of the logits in float32, relative to the largest one; in narrower types eight
of their steps."""
NATIVE, STOCK = "native", "stock"


class Bridged(NamedTuple):
    """A bridge over a model."""

    bridge: Any
    attention: str
    """"native" (the model's own kernels) or "stock" (TransformerLens')."""
    reason: str = ""
    """Why the model's own attention cannot be used."""


def plain_name(name: str) -> str:
    """Return the name that a weight has without a bridge, which puts one of its own in between."""
    return name.replace("._original_component", "")


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's own modules by the names that they have without a bridge.

    What a bridge wraps stands in its wrapper's place, and the wrapper's other parts are left out:
    they are the bridge's, such as the halves into which it cuts a fused projection.
    """
    modules: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            while (inner := child._modules.get("_original_component")) is not None:
                child = inner
            if id(child) not in seen:
                seen.add(id(child))
                modules[prefix + name] = child
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return modules


@contextmanager
def quiet() -> Iterator[None]:
    """Keep other projects' import messages and bars off the terminal; errors still come."""
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        yield


def boot(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str) -> Bridged:
    """Wrap a transformers model by TransformerBridge, with the model's own attention if it can be.

    Raises:
        BadInputError: TransformerLens cannot host the model, or gives other logits than it.
    """
    ids = torch.arange(min(PROBE_TOKENS, int(model.config.get_text_config().vocab_size)))[None]
    ids = ids.to(next(model.parameters()).device)
    reason = ""
    # Resumed runs count on the generators being as they were.
    with torch.random.fork_rng(), torch.no_grad():
        with _evaluating(model):
            expected = model(ids, use_cache=False).logits
        state = _State(model)
        for attention in (NATIVE, STOCK):
            try:
                bridge = _build(model, tokenizer, name, native=attention == NATIVE)
                with _evaluating(model):
                    _check(bridge, ids, expected)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            # What an adapter of TransformerLens may raise is open; it is said below.
            except Exception as error:  # noqa: BLE001
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                state.restore()
            else:
                return Bridged(bridge, attention, reason)
    raise BadInputError(f"{name} cannot be put onto TransformerLens: {reason}")


def _build(model: Any, tokenizer: Any, name: str, *, native: bool) -> Any:
    """Build the bridge, with the model's own attention or with TransformerLens'."""
    with quiet():
        from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
        from transformer_lens.model_bridge.generalized_components.joint_gate_up_mlp import (
            JointGateUpMLPBridge,
        )
        from transformer_lens.model_bridge.generalized_components.mlp import MLPBridge
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
        from transformer_lens.model_bridge.sources._hf_format import (
            determine_architecture_from_hf_config,
        )

    class Native(AttentionBridge):
        """The model's own attention, which gets its rotary embedding from the model."""

        def set_rotary_emb(self, rotary_emb: Any) -> None:
            """Take what adapters hand to attention that they compute themselves."""

    def keep_aliases(component: Any) -> None:
        """Drop the aliases of parts that are not there."""
        for aliases in ("hook_aliases", "property_aliases"):
            named, parts = getattr(component, aliases).items(), component.submodules
            setattr(component, aliases, {a: t for a, t in named if t.split(".")[0] in parts})

    kept, replaced = model.config._attn_implementation, [False]

    def use_native(adapter: Any) -> None:
        blocks = adapter.component_mapping.get("blocks")
        stock = getattr(blocks, "submodules", {}).get("attn")
        if not isinstance(stock, AttentionBridge):
            return
        # A fused projection stays whole: the parts that the adapter cuts it into are no modules.
        module = model.get_submodule(f"{blocks.name}.0.{stock.name}")
        own = {name for name, _ in module.named_modules()}
        parts = {p: m for p, m in stock.submodules.items() if m.optional or m.name in own}
        blocks.submodules["attn"] = attention = Native(
            name=stock.name,
            config=adapter.cfg,
            submodules=parts,
            maintain_native_attention=True,
            requires_position_embeddings=stock.requires_position_embeddings,
            requires_attention_mask=stock.requires_attention_mask,
        )
        keep_aliases(attention)
        replaced[0] = True
        mlp = blocks.submodules.get("mlp")
        if isinstance(mlp, JointGateUpMLPBridge):
            # It computes with copies of the fused projection's halves, around an adapter on it.
            whole = {part: m for part, m in mlp.submodules.items() if part not in ("gate", "in")}
            blocks.submodules["mlp"] = MLPBridge(mlp.name, adapter.cfg, whole)
            keep_aliases(blocks.submodules["mlp"])

    with quiet():
        bridge = build_bridge_from_module(
            model,
            determine_architecture_from_hf_config(model.config),
            hf_config=model.config,
            tokenizer=tokenizer,
            model_name=name,
            post_adapter_hook=use_native if native else None,
        )
    if native and not replaced[0]:
        raise ValueError("its attention is no part of its own")
    if native:
        model.set_attn_implementation(kept or "sdpa")
    return bridge


def _check(bridge: Any, ids: Tensor, expected: Float[Tensor, "batch position vocab"]) -> None:
    """Raise ValueError where the logits are not the model's, or a hook of a layer does nothing."""
    logits = bridge(ids)
    limit = max(LOGIT_LIMIT, 8 * torch.finfo(expected.dtype).eps)
    # A damaged model may give what is no number; that is found where it matters.
    finite = expected.isfinite()
    largest = expected[finite].abs().max() if finite.any() else torch.ones(())
    difference = (
        ((logits - expected).abs() / largest.clamp_min(1e-12)).masked_fill(~finite, 0).max()
    )
    if not difference <= limit:
        raise ValueError(f"its logits differ by {difference:.2g} of the largest")
    # Past the last block there is no block to stop at.
    stop = {"stop_at_layer": 1} if bridge.cfg.n_layers > 1 else {}
    plain = bridge(ids, **stop)
    for site in sites(bridge):
        hook = SITES[site].transformer_lens.format(n=0)
        with bridge.hooks(fwd_hooks=[(hook, lambda acts, hook: acts + acts.abs().max() + 1)]):
            if torch.equal(bridge(ids, **stop), plain):
                raise ValueError(f"a change at {hook} does not reach the next layer")


def sites(bridge: Any) -> tuple[str, ...]:
    """Return the sites that a layer has, each place once: by the first name in `SITES`."""
    hooks, places = bridge.hook_dict, {}
    for site in SITES.values():
        hook = hooks.get(site.transformer_lens.format(n=0))
        if hook is not None:
            places.setdefault(id(hook), site.name)
    return tuple(places.values())


def names(model: PreTrainedModel, bridge: Any) -> Names:
    """Return how a model's architecture names its places."""
    blocks = bridge.adapter.component_mapping["blocks"]
    known = sites(bridge)
    modules = {"resid_post": ""}
    for part, site in (("mlp", "mlp_out"), ("attn", "attn_out"), ("ln2_post", "mlp_post"),
                       ("ln1_post", "attn_post")):  # fmt: skip
        module = blocks.submodules.get(part)
        if module is not None and module.name and site in known:
            modules[site] = str(module.name)
    return Names(str(blocks.name), model.base_model_prefix, known, modules)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _State:
    """What booting changes of a model: its modules' attributes and configurations, no weights."""

    def __init__(self, model: nn.Module) -> None:
        parts: dict[int, Any] = {}
        for module in model.modules():
            parts[id(module)] = module
            if (config := getattr(module, "config", None)) is not None:
                parts[id(config)] = config
        self.attributes = [(part, _shallow(vars(part))) for part in parts.values()]

    def restore(self) -> None:
        """Put everything back as it was."""
        for part, attributes in self.attributes:
            vars(part).clear()
            vars(part).update(_shallow(attributes))


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copy attributes, and the containers among them."""
    return {
        key: copy.copy(value) if isinstance(value, dict | list | set) else value
        for key, value in attributes.items()
    }
