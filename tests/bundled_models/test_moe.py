"""The recipe of the bundled mixture, and the model that it left."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from benchmarks.bundled_models import moe
from benchmarks.bundled_models.moe import (
    MoEConfig,
    StackedMuon,
    balancing_loss,
    build_moe,
    moe_optimizers,
    orthogonalise,
    shares,
)
from resa_lens.experts.routers import find_routers
from resa_lens.models.host import load_model
from resa_lens.resources import data_path
from resa_lens.texts import prompts

FOLDER = data_path("tiny-moe-reasoner")
MICRO = MoEConfig(
    tokens=768, layers=2, width=32, heads=2, kv_heads=1, mlp_width=48, experts=4, expert_width=16,
    sequence=32, batch=4, stop_at=None, checkpoint_tokens=256,
)  # fmt: skip


def test_each_layer_is_balanced_by_itself() -> None:
    """Layers that each use one expert, every one another, look even to a loss that pools them."""
    experts, k, tokens = 4, 1, 50
    layers = [torch.full((tokens, experts), -20.0).index_fill(1, torch.tensor([e]), 20.0)
              for e in range(experts)]  # fmt: skip
    assert float(load_balancing_loss_func(tuple(layers), experts, k)) == pytest.approx(1.0)  # type: ignore[arg-type]
    for logits in layers:
        assert float(balancing_loss(logits, k)) == pytest.approx(experts / k)
    even = torch.eye(experts).repeat(tokens, 1) * 1e-3
    assert float(balancing_loss(even, k)) == pytest.approx(1.0, abs=1e-3)


def test_the_stacked_optimizer_is_muon_matrix_by_matrix() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(3, 8, 16), torch.randn(3, 8, 16)
    stacked = torch.nn.Parameter(start.clone())
    single = [torch.nn.Parameter(start[i].clone()) for i in range(3)]
    ours = StackedMuon([{"params": [stacked]}], lr=0.1, momentum=0.95, weight_decay=0.05)
    theirs = torch.optim.Muon(single, lr=0.1, momentum=0.95, weight_decay=0.05,
                              adjust_lr_fn="original")  # fmt: skip
    for _ in range(2):
        stacked.grad = gradient.clone()
        for i, one in enumerate(single):
            one.grad = gradient[i].clone()
        ours.step()
        theirs.step()
    assert torch.allclose(stacked, torch.stack(list(single)), atol=5e-3)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(5, 24, 8)))
    assert 0.55 < float(values.min()) < float(values.max()) < 1.35
    fused = torch.nn.Parameter(torch.zeros(2, 8, 16))
    apart = StackedMuon([{"params": [fused], "parts": 2}], lr=1.0, momentum=0.0, weight_decay=0.0)
    fused.grad = torch.cat([torch.randn(2, 4, 16), 1000 * torch.randn(2, 4, 16)], dim=1)
    apart.step()
    norms = fused.detach().unflatten(1, (2, 4)).flatten(-2).norm(dim=-1)
    assert norms.min() > 0.5 * norms.max(), "gate and up share one scale"


def test_experts_are_muons_and_routers_are_not() -> None:
    model = build_moe(MICRO, 576, 0, 1)
    adamw, muon = moe_optimizers(model, MICRO)
    inside = {id(p) for group in muon.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        matrix = "layers." in name and parameter.ndim > 1
        assert (id(parameter) in inside) == (matrix and not name.endswith("gate.weight")), name
    assert sum(len(group["params"]) for group in adamw.param_groups) + len(inside) == len(
        list(model.parameters())
    )


def test_a_micro_run_leaves_a_mixture_that_loads(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "LEAST_SHARE", 0.0)
        folder = moe.train(MICRO, tmp_path / "run")
        kept = (tmp_path / "run" / "state.pt").stat().st_mtime_ns
        moe.train(MICRO, tmp_path / "run")
    assert (tmp_path / "run" / "state.pt").stat().st_mtime_ns == kept
    model = load_model(str(folder))
    assert [r.experts for r in find_routers(model).values()] == [4, 4]
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "Qwen3MoeForCausalLM"
    ]
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in names
    assert not any("lm_head" in name for name in names)


def test_an_expert_that_nobody_uses_stops_the_build(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "LEAST_SHARE", 2.0)
        with pytest.raises(RuntimeError, match=r"expert \d+ of layer \d+ has .* of its even share"):
            moe.train(MICRO, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


# The bundled model


def test_it_has_the_shape_and_the_tokenizer_it_says() -> None:
    model = load_model("tiny-moe-reasoner")
    routers = find_routers(model)
    assert {(r.experts, r.k) for r in routers.values()} == {(16, 2)}
    assert len(routers) == model.n_layers == 8
    assert (FOLDER / "model.safetensors").stat().st_size < 11 * 10**6
    same = data_path("tiny-reasoner/tokenizer.json").read_bytes()
    assert (FOLDER / "tokenizer.json").read_bytes() == same
    for tag in prompts.TAGS:
        assert len(model.tokenizer(tag)["input_ids"]) == 1
    count = sum(p.numel() for p in model.model.parameters())
    assert count == 5_204_608 or 5.1e6 < count < 5.3e6


def test_every_expert_has_its_share_and_the_card_has_the_table() -> None:
    card = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
    assert [int(layer) for layer, _, _ in rows] == list(range(8))
    model = load_model("tiny-moe-reasoner")
    batches = [torch.tensor([model.tokenizer(text)["input_ids"][:40]]) for text in _texts()]
    use = shares(model.model, batches, 2)  # type: ignore[arg-type]
    assert float(use.min()) > 0.1
    assert all(float(least) >= 0.1 for _, least, _ in rows)


def _texts() -> list[str]:
    lines = data_path("tiny/test.jsonl").read_text().splitlines()[:80]
    records = [json.loads(line) for line in lines]
    return [prompts.document(r["question"], r["steps"], r["answer"]) for r in records]
