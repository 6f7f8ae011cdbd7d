"""Tiny random mixtures of experts of nine configurations, and what is known of them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from resa_lens.experts.routers import router_modules, source
from resa_lens.models.host import Model
from resa_lens.resources import data_path

VOCABULARY, WIDTH, EXPERTS, K = 576, 32, 8, 2
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": None,
    "initializer_range": 0.2,
}  # fmt: skip
ROUTED = {"num_experts": EXPERTS, "num_experts_per_tok": K, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": K}
DEEP = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": EXPERTS, "num_experts_per_tok": K,
    "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("qwen3_moe", {**ROUTED, "head_dim": 8, "norm_topk_prob": True}),
    "qwen3-moe-plain": ("qwen3_moe", {**ROUTED, "head_dim": 8, "norm_topk_prob": False}),
    "olmoe": ("olmoe", {**LOCAL, "num_experts": EXPERTS}),
    "qwen2-moe": ("qwen2_moe", {**ROUTED, "shared_expert_intermediate_size": 16}),
    "mixtral": ("mixtral", LOCAL),
    "gpt-oss": ("gpt_oss", {**LOCAL, "head_dim": 8, "sliding_window": 16}),
    "granite-moe": ("granitemoe", LOCAL),
    "deepseek-v3": ("deepseek_v3", {**DEEP, "n_group": 1, "topk_group": 1}),
    "deepseek-v3-groups": ("deepseek_v3", {**DEEP, "n_group": 2, "topk_group": 1}),
}  # fmt: skip
RENORMALISING = ("qwen3-moe", "mixtral", "gpt-oss", "granite-moe", "deepseek-v3")
"""Where rerouting is the same as a model built without the expert."""


def host(model: Any, name: str = "tiny") -> Model:
    """Put a transformers model onto the host, with the bundled tokenizer."""
    folder = data_path("tiny-reasoner")
    model.config.architectures = [type(model).__name__]
    return Model(
        name, model.eval(), AutoTokenizer.from_pretrained(folder), Path(folder), "0" * 64, "cpu",
        "float32", "a test",
    )  # fmt: skip


@cache
def plain(name: str) -> Any:
    """Return a random model of a configuration; it is shared, so nobody may change it."""
    kind, settings = CONFIGS[name]
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**BASE, **settings}))
    for parameter in model.parameters():
        if parameter.ndim != 1:
            torch.nn.init.normal_(parameter, std=0.25)
    for _, _, router, _ in router_modules(model):
        bias = getattr(source(router), "e_score_correction_bias", None)
        if bias is not None:
            bias.copy_(torch.randn_like(bias) * 0.1)
    return model.eval()


def mixture(name: str) -> Model:
    """Return a copy of a random model on its host."""
    return host(copy.deepcopy(plain(name)), name)


def blocks(model: Any) -> dict[int, Any]:
    """Return the modules that hold router and experts, by layer."""
    return {
        layer: model.get_submodule(name.rpartition(".")[0])
        for layer, name, _, _ in router_modules(model)
    }


def without_output(model: Any, layer: int, experts: list[int]) -> Any:
    """Return a copy in which experts write nothing."""
    other = copy.deepcopy(model)
    parts = blocks(other)[layer].experts
    with torch.no_grad():
        for name, parameter in parts.named_parameters():
            if name.startswith(("down_proj", "output_linear")):
                parameter[experts] = 0
    return other


def without_experts(model: Any, layer: int, experts: list[int]) -> Any:
    """Return a copy that was built without some experts of a layer."""
    other = copy.deepcopy(model)
    block = blocks(other)[layer]
    router = next(getattr(block, n) for n in ("gate", "router") if hasattr(block, n))
    count = router.weight.shape[0]
    kept = torch.tensor([i for i in range(count) if i not in experts])
    for module in (router, block.experts):
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers()]:
            if tensor.shape[0] == count:
                smaller: Tensor = tensor.detach()[kept].clone()
                if name in module._buffers:
                    module._buffers[name] = smaller
                else:
                    setattr(module, name, torch.nn.Parameter(smaller))
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            if hasattr(module, name):
                setattr(module, name, len(kept))
    return other


IDS = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    """Return the logits of a plain transformers model."""
    return model(input_ids=ids, use_cache=False, **options).logits
