"""Shorter LoRA layers, norms and rotations against PEFT's, transformers' and the bridge's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import model_grid
from resa_lens.models.bridge import boot
from resa_lens.models.host import Model, load_model
from resa_lens.tuning.loop import TuneConfig, fit
from resa_lens.tuning.lora import AdapterSwitch, LoraProduct, restore_lora, shorten_lora
from resa_lens.tuning.norms import RmsNorm, shorten_norms
from resa_lens.tuning.objective import preset
from resa_lens.tuning.rotary import shorten_rotary
from resa_lens.tuning.train import add_adapters, add_lora

PARTIAL = {
    "nemotron": model_grid.GROUPED,
    "glm4_moe": {**model_grid.HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2,
                 "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1},
}  # fmt: skip
"""Architectures whose positions turn half of each head, in a function called as Llama's is."""
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "tuning_operations.py"


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("tuning_operations", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spread(peft: nn.Module) -> None:
    """Give the adapters' second matrices values: fresh ones are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))


def outcome(peft: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits and the gradients of a sum of theirs, with the same draws each time."""
    peft.zero_grad()
    torch.manual_seed(7)
    logits = peft(input_ids=ids, use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in peft.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["single", "half"]
)
def test_lora_is_peft_s(
    small: Callable[[], Model], ids: torch.Tensor, dropout: float, dtype: torch.dtype, near: float
) -> None:
    """Output and gradients, with the same masks of dropout."""
    plain: Any = small().model
    model = plain.to(dtype)
    peft = add_lora(model, ["q_proj", "o_proj", "up_proj"], TuneConfig(rank=4, dropout=dropout))
    spread(peft)
    peft.train()
    logits, gradients = outcome(peft, ids)
    restore_lora(peft)
    their_logits, theirs = outcome(peft, ids)
    assert shorten_lora(peft) == 4 * 3
    assert (logits - their_logits).norm() <= near * their_logits.norm()
    assert gradients.keys() == theirs.keys()
    assert len(theirs) == 4 * 3 * 2
    for name, gradient in theirs.items():
        assert (gradients[name] - gradient).norm() <= near * gradient.norm(), name


def test_lora_gives_the_gradient_to_its_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.double, requires_grad=True)
    weight, bias = torch.randn(4, 6).double(), torch.randn(4).double()
    a, b = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((3, 6), (4, 3)))

    def product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, dropout: float) -> Any:
        torch.manual_seed(5)
        return LoraProduct.apply(x, weight, bias, a, b, 0.7, dropout)

    for dropout in (0.0, 0.4):
        assert torch.autograd.gradcheck(partial(product, dropout=dropout), (x, a, b))


def test_a_lora_layer_that_is_not_plain_stays_as_it_is(small: Callable[[], Model]) -> None:
    peft = add_lora(small().model, ["q_proj", "k_proj"], TuneConfig(rank=4))
    restore_lora(peft)
    first = peft.base_model.model.model.layers[0].self_attn.q_proj
    first.lora_A["default"].register_forward_hook(lambda *_: None)
    assert shorten_lora(peft) == 2 * 4 - 1
    assert "forward" not in vars(first)


@pytest.mark.parametrize("short", [True, False])
def test_the_switch_is_peft_s(
    small: Callable[[], Model], ids: torch.Tensor, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = small().model
    expected = plain(input_ids=ids).logits
    peft = add_lora(plain, ["q_proj", "v_proj"], TuneConfig(rank=4, dropout=0.0))
    spread(peft)
    if not short:
        restore_lora(peft)
    trained = [p for p in peft.parameters() if p.requires_grad]
    adapted = peft(input_ids=ids).logits
    switch = AdapterSwitch(peft)
    monkeypatch.setattr(type(peft), "modules", lambda self: pytest.fail("the tree is walked"))
    with switch.off():
        assert torch.equal(peft(input_ids=ids).logits, expected)
        with switch.off():
            pass
        assert torch.equal(peft(input_ids=ids).logits, expected)
        assert all(p.requires_grad for p in trained)
    assert torch.equal(peft(input_ids=ids).logits, adapted)
    assert not torch.equal(adapted, expected)
    monkeypatch.undo()
    with peft.disable_adapter():
        assert torch.equal(peft(input_ids=ids).logits, expected)


def test_norms_and_rotations_give_the_model_s_logits_to_the_bit(
    small: Callable[[], Model], ids: torch.Tensor
) -> None:
    model = small()
    expected = model.bridge(ids, use_cache=False)
    model.model.requires_grad_(False)
    assert shorten_norms(model.bridge) == 2 * 4 + 1
    assert shorten_rotary(model.bridge) == 4
    assert torch.equal(model.bridge(ids, use_cache=False), expected)
    seen: list[torch.Tensor] = []
    hook = ("blocks.1.ln2.hook_scale", lambda scale, hook: seen.append(scale))
    with model.bridge.hooks(fwd_hooks=[hook]):
        assert torch.allclose(model.bridge(ids, use_cache=False), expected, atol=1e-5)
    assert seen[0].shape == (2, 24, 1)


@pytest.mark.parametrize("name", ["nemotron", "glm4_moe"])
def test_a_part_of_each_head_is_turned_by_the_model_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(model_grid.VARIANTS, name, PARTIAL[name])
    model_grid.save_variant(name, tmp_path / name)
    model = load_model(str(tmp_path / name))
    ids = torch.arange(8, 40)[None]
    expected = model.bridge(ids, use_cache=False)
    assert shorten_rotary(model.bridge) == 0
    assert torch.equal(model.bridge(ids, use_cache=False), expected)


def test_gradients_through_norms_and_rotations_are_autograd_s(ids: torch.Tensor) -> None:
    """Of the embeddings, below all of them; with grouped heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=600, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    embedding: Any = model.get_input_embeddings().weight.requires_grad_()
    bridge = boot(model, None, "small").bridge
    gradients = []
    for short in (False, True):
        if short:
            assert (shorten_norms(bridge), shorten_rotary(bridge)) == (5, 2)
        embedding.grad = None
        bridge(ids, use_cache=False).square().mean().backward()
        assert embedding.grad is not None
        gradients.append(embedding.grad)
    difference = (gradients[0] - gradients[1]).norm()
    assert 0 < gradients[0].norm() < 1e6
    assert difference <= 1e-5 * gradients[0].norm()


def test_a_norm_of_another_form_stays_as_it_is(small: Callable[[], Model]) -> None:
    class Offset(nn.Module):
        """Gemma's: w is an offset from one."""

        def __init__(self, like: Any) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = like.weight, like.variance_epsilon

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return RmsNorm.apply(x, 1 + self.weight, self.variance_epsilon)  # pyright: ignore

    model = small()
    model.model.requires_grad_(False)
    norm: Any = model.bridge.blocks[0].ln1
    norm.set_original_component(Offset(norm.original_component))
    assert shorten_norms(model.bridge) == 2 * 4
    assert "forward" not in vars(norm)


def test_one_optimizer_call_is_the_plain_loop_s() -> None:
    """Fused AdamW against the loop over the weights: a step of the float apart after 50 updates."""
    torch.manual_seed(0)
    start = [torch.randn(s) for s in ((32, 24), (8, 4), (64, 32), (7, 3))]
    ends = []
    for fused in (False, True):
        weights = [nn.Parameter(w.clone()) for w in start]
        optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01, fused=fused)
        generator = torch.Generator().manual_seed(2)
        for _ in range(50):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
        ends.append(torch.cat([w.detach().flatten() for w in weights]))
    assert (ends[0] != ends[1]).float().mean() < 0.02
    assert (ends[0] - ends[1]).abs().max() <= 5e-7


def test_an_update_looks_at_the_device_once(
    small: Callable[[], Model], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft, bridge = add_adapters(small(), preset("paper"), TuneConfig(rank=4))
    looks: list[str] = []
    for name in ("item", "tolist", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *args, real=real, name=name: (looks.append(name), real(self, *args))[1],
        )

    def loss_of(batch: torch.Tensor) -> Any:
        return bridge(batch, use_cache=False).square().mean(), {"tokens": batch.numel()}

    found = []

    def batches() -> Any:
        for _ in range(4):
            found.append(len(looks))
            yield ids

    fit(peft, batches(), 4, loss_of, TuneConfig(rank=4), clip_norm=1.0)
    assert {after - before for before, after in pairwise(found)} == {1}


@pytest.mark.parametrize(
    "name", ["paper", *(pytest.param(n, marks=pytest.mark.slow) for n in ("reference", "distil"))]
)
def test_an_update_takes_at_most_three_fifths_of_the_operations(name: str) -> None:
    """At the depth of DeepSeek-R1-Distill-Qwen-1.5B; the whole table is in docs/log.md."""
    made = benchmark()
    counts, every, _ = made.measure(name, repeats=1)
    assert 1000 < counts.total() <= made.SHARE * made.BEFORE[name][0]
    assert every < made.BEFORE[name][1]
