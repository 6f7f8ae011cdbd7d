"""Loss curves of whole tunings against a loop written out from the paper and the spec's table.

The loop here shares nothing with the trainer but the SAE's tensors and the adapters' first values:
plain transformers with plain PEFT, torch's own hooks, the KL by its formula, AdamW by its formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.coder import new_coder
from resa_lens.tuning.objective import Objective, preset
from resa_lens.tuning.train import TuneConfig, add_adapters, tune

STEPS, LAYER, RATE = 4, 1, 1e-2


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 500, (2, 16), generator=generator) for _ in range(STEPS)]


def reconstruction(coder: Any, x: torch.Tensor) -> torch.Tensor:
    """x~ = W_dec topk(relu(W_enc (x - b_dec) + b_enc)) + b_dec."""
    z = torch.relu((x - coder.b_dec) @ coder.encoder.weight.mT + coder.encoder.bias)
    kept = z.topk(coder.cfg.k, dim=-1)
    return torch.zeros_like(z).scatter(-1, kept.indices, kept.values) @ coder.W_dec + coder.b_dec


def written_out(folder: Path, start: dict[str, torch.Tensor], o: Objective) -> list[list[float]]:
    """Return loss and gradient norm of each step."""
    coder: Any = new_coder(32, 64, 4, seed=0).requires_grad_(False)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft = get_peft_model(
        plain,
        LoraConfig(r=4, lora_alpha=8, target_modules=list(o.targets), task_type="CAUSAL_LM"),
    )
    weights = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(start[name])
    block = plain.model.layers[LAYER]
    place = block.mlp if o.site == "mlp_out" else block

    def insert(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        made = reconstruction(coder, out)
        return made if o.sae_gradient else made.detach()

    m = {n: torch.zeros_like(p) for n, p in weights.items()}
    v = {n: torch.zeros_like(p) for n, p in weights.items()}
    counts = dict.fromkeys(weights, 0)
    curve = []
    for step, ids in enumerate(data()):
        handle = place.register_forward_hook(insert)
        inserted = plain(ids).logits.log_softmax(-1)
        handle.remove()
        if o.reference == "base":
            with peft.disable_adapter():
                reference = plain(ids).logits.log_softmax(-1).detach()
        else:
            reference = plain(ids).logits.log_softmax(-1)
            reference = reference if o.reference_gradient else reference.detach()
        p, q = (inserted, reference) if o.direction == "sae||reference" else (reference, inserted)
        loss = (p.exp() * (p - q)).sum() / (ids.numel() if o.reduction == "mean" else len(ids))
        for weight in weights.values():
            weight.grad = None
        loss.backward()
        grads = {n: w.grad for n, w in weights.items() if w.grad is not None}
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        curve.append([loss.item(), norm])
        if o.clip_norm is not None and norm > o.clip_norm:
            grads = {n: g * (o.clip_norm / norm) for n, g in grads.items()}
        rate = RATE
        if o.schedule == "cosine":
            rate *= 0.1 + 0.9 * (1 + math.cos(math.pi * step / STEPS)) / 2
        with torch.no_grad():
            for n, g in grads.items():
                counts[n] += 1
                m[n] = 0.9 * m[n] + 0.1 * g
                v[n] = 0.999 * v[n] + 0.001 * g**2
                weights[n] -= rate * 0.01 * weights[n]
                first = m[n] / (1 - 0.9 ** counts[n])
                second = v[n] / (1 - 0.999 ** counts[n])
                weights[n] -= rate * first / (second.sqrt() + 1e-8)
    return curve


OPTIONS: dict[str, dict[str, Any]] = {
    "as named": {},
    "site": {"site": ("mlp_out", "resid_post")},
    "reference": {"reference": ("adapted", "base")},
    "reference gradient": {"reference_gradient": (True, False)},
    "direction": {"direction": ("sae||reference", "reference||sae")},
    "sae gradient": {"sae_gradient": (True, False)},
    "reduction": {"reduction": ("mean", "sum")},
    "targets": {"targets": (("q_proj", "down_proj"), ("v_proj", "up_proj"))},
    "schedule": {"schedule": ("cosine", "constant")},
    "clip norm": {"clip_norm": (0.05, 0.1)},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["paper", "reference"])
def test_the_curve_is_that_of_the_loop_written_out(
    small: Callable[[], Model], small_folder: Path, name: str, option: str
) -> None:
    """Each preset, and each with one option of the table turned to what the other preset has."""
    named = preset(name)
    changes = {
        key: next(value for value in values if value != getattr(named, key))
        for key, values in OPTIONS[option].items()
    }
    objective = preset(name, **changes)
    config = TuneConfig(rank=4, alpha=8, dropout=0.0, learning_rate=RATE, batch=2)
    fresh, _ = add_adapters(small(), objective, config)
    start = {
        n.replace("._original_component", ""): p.detach().clone()
        for n, p in fresh.named_parameters()
        if p.requires_grad
    }
    expected = written_out(small_folder, start, objective)
    coder = new_coder(32, 64, 4, seed=0).requires_grad_(False)
    point = Hookpoint(LAYER, objective.site)
    _, course = tune(small(), coder, point, data(), STEPS, objective, config)
    ours = torch.tensor([course.losses, course.grad_norms]).mT
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=2e-3, atol=1e-6)
    # The first one carries no history: to rounding.
    assert course.losses[0] == pytest.approx(expected[0][0], rel=1e-5)
    assert course.grad_norms[0] == pytest.approx(expected[0][1], rel=1e-4)
    assert len(set(course.losses)) == STEPS
