"""The objective: golden divergences, the presets as published, and where gradients flow."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseCoder, new_coder
from resa_lens.tuning.config import ATTENTION
from resa_lens.tuning.objective import (
    PRESETS,
    Insertion,
    Objective,
    kl_divergence,
    preset,
    tuning_loss,
)
from resa_lens.tuning.train import TuneConfig, add_adapters, modules_in

ALL_SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

# Divergence


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_two_classes_have_the_analytic_divergence() -> None:
    p, q = logits(0.8, 0.2)[None, None], logits(0.5, 0.5)[None, None]
    forward = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert kl_divergence(p, q).item() == pytest.approx(forward, abs=1e-6)
    assert kl_divergence(q, p).item() == pytest.approx(backward, abs=1e-6)
    assert forward != pytest.approx(backward, abs=1e-3)


def test_equal_distributions_have_none_whatever_the_offset() -> None:
    p = torch.randn(2, 3, 5)
    assert kl_divergence(p, p + 7).item() == pytest.approx(0.0, abs=1e-6)


def test_mean_is_over_tokens_and_sum_over_sequences() -> None:
    p = logits(0.8, 0.2).expand(2, 3, 2)
    q = logits(0.5, 0.5).expand(2, 3, 2)
    one = kl_divergence(p[:1, :1], q[:1, :1]).item()
    assert kl_divergence(p, q, "mean").item() == pytest.approx(one, abs=1e-6)
    assert kl_divergence(p, q, "sum").item() == pytest.approx(3 * one, abs=1e-6)


def test_half_precision_logits_are_compared_in_single() -> None:
    p, q = torch.randn(1, 4, 50), torch.randn(1, 4, 50)
    half = kl_divergence(p.bfloat16(), q.bfloat16())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(kl_divergence(p, q).item(), rel=0.05)


# Presets: the table of spec section 7


def test_paper_preset() -> None:
    paper = preset("paper")
    assert paper.site == "mlp_out"
    assert (paper.reference, paper.reference_gradient) == ("adapted", True)
    assert paper.direction == "sae||reference"
    assert paper.sae_gradient is True
    assert set(paper.targets) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert paper.schedule == "cosine"
    assert paper.clip_norm is None


def test_reference_preset() -> None:
    code = preset("reference")
    assert code.site == "resid_post"
    assert (code.reference, code.reference_gradient) == ("base", False)
    assert (code.direction, code.reduction) == ("reference||sae", "sum")
    assert code.sae_gradient is False
    assert set(code.targets) == ALL_SEVEN
    assert code.schedule == "constant"
    assert code.clip_norm == 1.0


def test_table_7_defaults() -> None:
    config = TuneConfig()
    assert (config.rank, config.alpha, config.dropout) == (32, 128, 0.05)
    assert (config.learning_rate, config.batch) == (1e-6, 1)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_single_options_override_a_preset(name: str) -> None:
    made = preset(
        name, site="resid_post", teacher="adapted", reference="base", reference_gradient=False,
        direction="reference||sae", sae_gradient=False, reduction="sum",
        targets=("q_proj",), schedule="constant", clip_norm=2.5,
    )  # fmt: skip
    assert made == Objective(
        name, "resid_post", "base", False, "reference||sae", False, "sum", ("q_proj",),
        "constant", 2.5,
    )  # fmt: skip
    assert preset(name, site=None, clip_norm=None) == PRESETS[name]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"reference": "tuned"}, "tuned"),
        ({"direction": "forward"}, "forward"),
        ({"reduction": "max"}, "max"),
        ({"schedule": "linear"}, "linear"),
        ({"site": "attn"}, "attn"),
        ({"clip_norm": -1.0}, "-1.0"),
        ({"clip_norm": 0.0}, "0.0"),
        ({"clip_norm": math.nan}, "nan"),
    ],
)
def test_unknown_values_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInputError, match=re.escape(named)):
        preset("paper", **changes)


def test_unknown_preset_is_named() -> None:
    with pytest.raises(BadInputError, match=r"'best'.*paper, reference, distil"):
        preset("best")


# Gradients


def prepared(model: Model, objective: Objective, layers: str = "all") -> tuple[Any, Any]:
    """Adapters in training, without dropout, their B matrices no longer zero."""
    config = TuneConfig(rank=4, alpha=8, dropout=0.0, adapter_layers=layers)
    peft, bridge = add_adapters(model, objective, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return peft.train(), bridge


def gradients(peft: Any) -> dict[tuple[int, str], float]:
    """{(layer, module): norm of A's and B's gradients}; without any, 0."""
    sizes: dict[tuple[int, str], float] = {}
    for name, weight in peft.named_parameters():
        if "lora_" not in name:
            assert weight.grad is None, name
            continue
        found = re.search(r"layers\.(\d+)\..*?(\w+_proj)", name)
        assert found, name
        key = int(found[1]), found[2]
        sizes[key] = sizes.get(key, 0.0) + (0.0 if weight.grad is None else weight.grad.norm())
    return {key: float(value) for key, value in sizes.items()}


def sae() -> SparseCoder:
    return new_coder(32, 64, 4, seed=0).requires_grad_(False)


def run(model: Model, objective: Objective, layer: int, ids: torch.Tensor) -> tuple[float, Any]:
    peft, bridge = prepared(model, objective)
    point = Hookpoint(layer, objective.site)
    loss = tuning_loss(bridge, peft, ids, point, sae(), objective)
    loss.backward()
    return loss.item(), peft


def test_paper_adapters_below_the_hook_learn(small: Callable[[], Model], ids: torch.Tensor) -> None:
    loss, peft = run(small(), preset("paper"), 2, ids)
    sizes = gradients(peft)
    assert loss > 0
    assert {layer for layer, _ in sizes} == {0, 1, 2, 3}
    assert all(size > 1e-6 for size in sizes.values()), sizes


def test_reference_adapters_at_and_below_the_hook_get_exactly_none(
    small: Callable[[], Model], ids: torch.Tensor
) -> None:
    loss, peft = run(small(), preset("reference"), 1, ids)
    sizes = gradients(peft)
    assert loss > 0
    assert len(sizes) == 4 * 7
    for (layer, name), size in sizes.items():
        assert (size == 0.0) if layer <= 1 else (size > 1e-6), (layer, name, size)


def test_blocked_gradient_still_passes_beside_the_mlp(
    small: Callable[[], Model], ids: torch.Tensor
) -> None:
    """At the MLP's output the residual path carries gradient past the SAE (spec section 7)."""
    _, peft = run(small(), preset("reference", site="mlp_out"), 1, ids)
    sizes = gradients(peft)
    assert all(sizes[layer, "q_proj"] > 1e-6 for layer in range(4))
    assert sizes[1, "down_proj"] == 0.0


@pytest.mark.parametrize(
    ("targets", "layers", "refused"),
    [
        # At a block's output with nothing behind it and nothing beside it.
        (ATTENTION, "all", 3),
        (ATTENTION, "0-1", 6),
        # Inside of a block besides, where all adapters are in the part that the SAE replaces.
        (("q_proj",), "1", 9),
        (("gate_proj", "up_proj"), "1", 9),
        (("down_proj",), "3", 6),
        (("q_proj", "down_proj"), "1", 6),
    ],
)
def test_what_is_refused_is_what_no_gradient_reaches(
    small: Callable[[], Model],
    ids: torch.Tensor,
    targets: tuple[str, ...],
    layers: str,
    refused: int,
) -> None:
    model = small()
    adapted = modules_in(model.model, targets, layers)
    peft, bridge = prepared(model, Objective(targets=targets), layers)
    outcomes = []
    for site, layer, reference, teacher, *flags in itertools.product(
        ("resid_post", "mlp_out", "attn_out"), (0, 1, 3), ("adapted", "base"), ("adapted", "base"),
        (True, False), (True, False),
    ):  # fmt: skip
        try:
            objective = Objective(
                site=site, reference=reference, teacher=teacher,  # pyright: ignore[reportArgumentType]
                sae_gradient=flags[0], reference_gradient=flags[1],
            )  # fmt: skip
        except BadInputError:
            continue  # a frozen teacher and a frozen reference
        peft.zero_grad()
        loss = tuning_loss(bridge, peft, ids, Hookpoint(layer, site), sae(), objective)
        if loss.requires_grad:
            loss.backward()
        learns = any(gradients(peft).values())
        refusal = pytest.raises(BadInputError, match=rf"layer {layer} \(0-based\)")
        with nullcontext() if learns else refusal:
            objective.check_reach(layer, adapted)
        outcomes.append(learns)
    assert len(outcomes) == 90
    assert outcomes.count(False) == refused


def test_detaching_the_reference_changes_the_gradient_and_not_the_loss(
    small: Callable[[], Model], ids: torch.Tensor
) -> None:
    with_it, first = run(small(), preset("paper"), 1, ids)
    without, second = run(small(), preset("paper", reference_gradient=False), 1, ids)
    assert with_it == pytest.approx(without, rel=1e-6)
    a, b = gradients(first), gradients(second)
    assert any(abs(a[key] - b[key]) > 1e-3 * a[key] for key in a)


def test_loss_equals_the_divergence_computed_by_hand(
    small: Callable[[], Model], ids: torch.Tensor
) -> None:
    for objective in (preset("paper"), preset("reference")):
        peft, bridge = prepared(small(), objective)
        point, coder = Hookpoint(1, objective.site), sae()
        with torch.no_grad():
            loss = tuning_loss(bridge, peft, ids, point, coder, objective)
            hook = Insertion(coder, gradient=False)
            with bridge.hooks(fwd_hooks=[(point.transformer_lens, hook)]):
                inserted = bridge(ids).log_softmax(-1)
            if objective.preset == "paper":
                reference = bridge(ids).log_softmax(-1)
                by_hand = (inserted.exp() * (inserted - reference)).sum() / ids.numel()
            else:
                with peft.disable_adapter():
                    reference = bridge(ids).log_softmax(-1)
                by_hand = (reference.exp() * (reference - inserted)).sum() / ids.shape[0]
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_identity_gives_no_loss_and_no_gradient(
    small: Callable[[], Model], ids: torch.Tensor, name: str
) -> None:
    """With latents +x and -x every activation is reconstructed: nothing trains."""
    objective = preset(name)
    identity = new_coder(32, 64, 64, seed=0)
    both = torch.cat([torch.eye(32), -torch.eye(32)])
    with torch.no_grad():
        identity.encoder.weight.copy_(both)
        assert identity.W_dec is not None
        identity.W_dec.copy_(both)
    peft, bridge = add_adapters(small(), objective, TuneConfig(rank=4, alpha=8))
    peft.train()
    loss = tuning_loss(
        bridge, peft, ids, Hookpoint(1, objective.site), identity.requires_grad_(False), objective
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert all(size < 1e-4 for size in gradients(peft).values())
