"""The gradient probes against autograd, against PEFT, by a loop on plain layers, and planted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.lora_gradients import lora_gradients
from resa_lens.errors import BadInputError
from resa_lens.models.host import Model, load_model
from resa_lens.tuning.config import TuneConfig
from resa_lens.tuning.gradient_probe import gradient_probe
from resa_lens.tuning.train import add_lora

CONFIG = TuneConfig(rank=4, alpha=8, seed=3)


class Stack(nn.Module):
    """An embedding, two layers of one matrix each, and a head; no norm, no attention."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(6, 6, bias=False)})
                                     for _ in range(2)])  # fmt: skip
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer["up_proj"](x))
        return type("Output", (), {"logits": self.head(x)})


def host(module: nn.Module) -> Model:
    """A module as a model, of which the probe reads the module, device and name."""
    model: Any = object.__new__(Model)
    model.model, model.device, model.name = module, "cpu", "stack"
    return model


def batches(count: int = 3, vocabulary: int = 11) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (2, 9), generator=generator) for _ in range(count)]


def test_the_energy_is_that_of_a_loop_on_plain_layers() -> None:
    stack = Stack(0)
    measured = lora_gradients(host(stack), batches(), targets=["up_proj"], config=CONFIG)
    # The same draw of A, layer by layer in the order of the forward pass.
    generator = torch.Generator().manual_seed(3)
    A = [(2 * torch.rand((4, 6), generator=generator) - 1) / math.sqrt(6) for _ in range(2)]
    energies: list[list[float]] = []
    for ids in batches():
        inputs, outputs = [], []
        x = stack.embed(ids)
        for layer in stack.layers:
            inputs.append(x)
            outputs.append(layer["up_proj"](x))
            outputs[-1].retain_grad()
            x = x + torch.tanh(outputs[-1])
        logits = stack.head(x)[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        row = []
        for x, y, a in zip(inputs, outputs, A, strict=True):
            assert y.grad is not None
            total = torch.zeros(6, 4)
            for sequence in range(2):
                for position in range(9):
                    total += torch.outer(y.grad[sequence, position], a @ x[sequence, position])
            row.append(
                (2.0 * total).detach().pow(2).sum().item() / 24
            )  # scale 8 / 4, 6 x 4 parameters
        energies.append(row)
    table = torch.tensor(energies, dtype=torch.double)
    for layer in (0, 1):
        mean, error = measured[layer]
        assert mean == pytest.approx(float(table[:, layer].mean()), rel=1e-4)
        assert error == pytest.approx(float(table[:, layer].std() / math.sqrt(3)), rel=1e-4)


def test_the_energy_is_that_of_pefts_own_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("tiny-reasoner")
    ids = batches(2, model.model.config.vocab_size)
    plain = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    peft = add_lora(plain, ["down_proj", "q_proj"], CONFIG)
    peft.eval()
    As = {name: weight for name, weight in peft.named_parameters() if "lora_A" in name}
    order = [f"{block}.{module}" for block in range(12)
             for module in ("self_attn.q_proj", "mlp.down_proj")]  # fmt: skip
    drawn = iter([next(w for n, w in As.items() if f".layers.{key}." in n) for key in order])

    def rand(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        A = next(drawn).detach()
        assert A.shape == shape
        return (A * math.sqrt(shape[1]) + 1) / 2

    monkeypatch.setattr(torch, "rand", rand)
    measured = lora_gradients(model, ids, targets=["down_proj", "q_proj"], config=CONFIG)
    monkeypatch.undo()
    expected: dict[int, float] = {}
    for batch in ids:
        peft.zero_grad()
        logits = peft(batch).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        for block in range(12):
            grads = [weight.grad for name, weight in peft.named_parameters()
                     if "lora_B" in name and f".layers.{block}." in name]  # fmt: skip
            assert len(grads) == 2
            energy = sum(float(g.pow(2).sum()) for g in grads) / sum(g.numel() for g in grads)
            expected[block] = expected.get(block, 0.0) + energy / 2
    means = {layer: mean for layer, (mean, _) in measured.items()}
    assert means == pytest.approx(expected, rel=1e-3)


def test_nothing_about_the_model_changes_and_a_booted_bridge_is_read_alike() -> None:
    model = load_model("tiny-reasoner")
    ids = batches(2, model.model.config.vocab_size)
    before = {name: weight.clone() for name, weight in model.model.named_parameters()}
    wanted = {name: weight.requires_grad for name, weight in model.model.named_parameters()}
    first = lora_gradients(model, ids), gradient_probe(model, ids)
    for name, weight in model.model.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.requires_grad == wanted[name]
        assert weight.grad is None
    assert not any(module._forward_hooks for module in model.model.modules())
    _ = model.bridge
    for plain, booted in zip(first, (lora_gradients(model, ids), gradient_probe(model, ids)),
                             strict=True):  # fmt: skip
        assert list(plain) == list(booted) == list(range(12))
        for layer, pair in plain.items():
            assert booted[layer] == pytest.approx(pair, rel=1e-3)


def test_a_layer_that_alone_moves_the_loss_has_all_the_energy() -> None:
    stack = Stack(1)
    with torch.no_grad():
        # Only layer 0 reaches the logits' difference: layer 1 is saturated everywhere.
        stack.layers[1]["up_proj"].weight.mul_(1e4)
    measured = lora_gradients(host(stack), batches(), targets=["up_proj"], config=CONFIG)
    assert measured[1][0] < 1e-9 < 1e-6 < measured[0][0]


def test_weight_norms_are_autograds() -> None:
    stack = Stack(2)
    measured = gradient_probe(host(stack), batches())
    for layer in (0, 1):
        norms = []
        for ids in batches():
            stack.zero_grad()
            logits = stack(ids).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            norms.append(float(stack.layers[layer]["up_proj"].weight.grad.norm()))
        assert measured[layer][0] == pytest.approx(sum(norms) / 3, rel=1e-4)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="1 batch of gradients"):
        gradient_probe(host(Stack(0)), batches(1))
    with pytest.raises(BadInputError, match="1 batch of gradients"):
        lora_gradients(host(Stack(0)), batches(1), targets=["up_proj"])
    with pytest.raises(BadInputError, match="no module named 'magic'"):
        lora_gradients(host(Stack(0)), batches(), targets=["magic"])

    class Around(Stack):
        """A forward pass that multiplies by the weight itself."""

        def forward(self, ids: Tensor) -> Any:
            x = self.embed(ids)
            for layer in self.layers:
                x = x + x @ layer["up_proj"].weight.T
            return type("Output", (), {"logits": self.head(x)})

    with pytest.raises(BadInputError, match=r"goes around layers\.0\.up_proj"):
        lora_gradients(host(Around(0)), batches(), targets=["up_proj"])
