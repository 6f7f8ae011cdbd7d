"""Preset distil against a loop of plain torch; what presets hand on of a planted effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes import checkpoint
from resa_lens.saes.coder import SparseCoder, new_coder
from resa_lens.tuning.objective import Objective, preset
from resa_lens.tuning.train import TuneConfig, tune

LAYER, STEPS = 2, 6
POINT = Hookpoint(LAYER, "mlp_out")
CONFIG = TuneConfig(rank=4, alpha=8, dropout=0.0, learning_rate=1e-2, min_rate_share=0.1)


def batches(count: int, rows: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 500, (rows, 24), generator=generator) for _ in range(count)]


def sae() -> SparseCoder:
    return new_coder(32, 64, 4, seed=0).requires_grad_(False)


def reconstructed(coder: SparseCoder, x: Tensor) -> Tensor:
    """TopK(ReLU(W_enc (x - b_dec) + b_enc)) decoded, written out."""
    assert coder.W_dec is not None
    pre = torch.relu((x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias)
    top = pre.topk(coder.cfg.k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values) @ coder.W_dec + coder.b_dec


def written_out(folder: Path, coder: SparseCoder, steps: int) -> list[float]:
    """The losses of the same tuning by plain transformers, PEFT and AdamW, with a forward hook."""
    from transformers import AutoModelForCausalLM

    def plain() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    teacher, student = plain(), plain()
    teacher.model.layers[LAYER].mlp.register_forward_hook(
        lambda module, args, output: reconstructed(coder, output)
    )
    torch.manual_seed(CONFIG.seed)
    lora = LoraConfig(r=CONFIG.rank, lora_alpha=CONFIG.alpha, lora_dropout=0.0,
                      target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
                      task_type="CAUSAL_LM")  # fmt: skip
    student = get_peft_model(student, lora)
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=CONFIG.learning_rate, weight_decay=0.01)
    losses = []
    for step, ids in enumerate(batches(steps)):
        share = 0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
        optimizer.param_groups[0]["lr"] = CONFIG.learning_rate * share
        with torch.no_grad():
            target = F.log_softmax(teacher(ids).logits, -1)
        own = F.log_softmax(student(ids).logits, -1)
        loss = F.kl_div(own, target, log_target=True, reduction="sum") / ids.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_distil_is_the_loop_written_out(small: Callable[[], Model], small_folder: Path) -> None:
    _, course = tune(small(), sae(), POINT, batches(STEPS), STEPS, preset("distil"), CONFIG)
    expected = written_out(small_folder, sae(), STEPS)
    assert list(course.losses) == pytest.approx(expected, rel=2e-4)
    assert min(expected) > 0.01


def test_accumulated_batches_are_one_larger_batch(small: Callable[[], Model]) -> None:
    whole = batches(STEPS, rows=2)
    halves = [row[None] for batch in whole for row in batch]
    halved = TuneConfig(**{**vars(CONFIG), "accumulation": 2})
    _, one = tune(small(), sae(), POINT, whole, STEPS, preset("distil"), CONFIG)
    _, two = tune(small(), sae(), POINT, halves, STEPS, preset("distil"), halved)
    assert list(two.losses) == pytest.approx(list(one.losses), rel=1e-4)


def test_a_killed_distillation_goes_on_to_the_same_bits(
    small: Callable[[], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A state is kept after each update, however long a busy disk takes.
    monkeypatch.setattr(checkpoint, "UNNOTICED_S", 10**9)

    def run(folder: Path | None, advance: Callable[[int], None] = lambda done: None) -> Any:
        return tune(
            small(), sae(), POINT, batches(STEPS), STEPS, preset("distil"), CONFIG,
            folder=folder, advance=advance,
        )  # fmt: skip

    class KilledError(Exception):
        pass

    finished = 0

    def kill(count: int) -> None:
        nonlocal finished
        finished += count
        if finished == 3:
            raise KilledError

    (tmp_path / "work").mkdir()
    with pytest.raises(KilledError):
        run(tmp_path / "work", kill)
    peft, course = run(tmp_path / "work")
    assert course.resumed_at == 3
    straight, _ = run(None)
    for (name, ours), (_, theirs) in zip(
        peft.named_parameters(), straight.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_frozen_teacher_and_a_frozen_reference_are_refused() -> None:
    with pytest.raises(BadInputError, match="nothing trains"):
        preset("distil", reference="base")
    with pytest.raises(BadInputError, match="nothing trains"):
        preset("distil", reference_gradient=False)


class Shift:
    """In place of an SAE: activations moved along one direction, so that the effect is known."""

    def __init__(self, direction: Tensor) -> None:
        self.direction = direction

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.direction


@pytest.fixture
def planted(small: Callable[[], Model]) -> tuple[Tensor, Callable[[Any], float]]:
    """A direction at the last block that raises one token's logit, and that token's mean logit."""
    model = small()
    weights: Any = model.model.lm_head.weight
    token = 77
    direction = 3 * F.normalize(weights[token].detach(), dim=0)
    (ids,) = batches(1, rows=4)

    @torch.no_grad()
    def logit(model: Any) -> float:
        logits = model(ids).logits
        return float(F.log_softmax(logits, -1)[..., token].mean())

    return direction, logit


@pytest.mark.parametrize(("name", "sign"), [("distil", 1), ("reference", -1)])
def test_what_a_preset_hands_on_of_an_effect_that_helps(
    small: Callable[[], Model], planted: Any, name: str, sign: int
) -> None:
    """Distil takes the effect over, reference its inverse; paper has no anchor."""
    direction, logit = planted
    changes = {"preset": name, "site": "mlp_out", "reduction": "mean", "clip_norm": None}
    objective = Objective(**{**vars(preset(name)), **changes})
    point = Hookpoint(3, "mlp_out")
    plain = small()
    before = logit(plain.model)
    hook = plain.model.model.layers[3].mlp.register_forward_hook(
        lambda module, args, output: output + direction
    )
    inserted = logit(plain.model) - before
    hook.remove()
    assert inserted > 0.2
    config = TuneConfig(**{**vars(CONFIG), "learning_rate": 1e-3})
    peft, course = tune(small(), Shift(direction), point, batches(40), 40, objective, config)
    change = logit(peft) - before
    assert sign * change > 0.1 * inserted
    assert course.losses[-1] < course.losses[0]
