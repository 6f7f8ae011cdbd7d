"""The trainer: plain PEFT comes out, the base stays, schedules as stated, failures named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.models import bridge as bridge_module
from resa_lens.models.hookpoints import Hookpoint, module_layer
from resa_lens.models.host import Model
from resa_lens.saes.coder import new_coder
from resa_lens.tuning.objective import Objective, preset
from resa_lens.tuning.passes import Passes
from resa_lens.tuning.train import TuneConfig, lora_targets, save_adapter, tune

FAST = TuneConfig(rank=4, alpha=8, learning_rate=1e-2)


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 500, (1, 24), generator=generator) for _ in range(count)]


def tuned(
    model: Model, objective: Objective | None = None, config: TuneConfig = FAST, steps: int = 3
) -> tuple[Any, Any]:
    objective = objective or preset("paper")
    coder = new_coder(32, 64, 4, seed=0).requires_grad_(False)
    return tune(
        model, coder, Hookpoint(1, objective.site), batches(steps), steps, objective, config
    )


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["paper", "reference"])
def test_the_saved_adapter_is_plain_peft(
    small: Callable[[], Model], small_folder: Path, ids: torch.Tensor, tmp_path: Path, name: str
) -> None:
    peft, course = tuned(small(), preset(name))
    save_adapter(peft, tmp_path / "adapter", small_folder)
    keys = list(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert keys
    assert not any("_original_component" in key for key in keys)
    untouched = plain(small_folder)
    with torch.no_grad():
        before = untouched(ids).logits
        ours = peft(ids).logits
        reloaded = PeftModel.from_pretrained(untouched, tmp_path / "adapter").eval()
        after = reloaded(ids).logits
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, ours, atol=1e-5, rtol=0)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert course.trainable == sum(value.numel() for value in saved.values())


@pytest.mark.parametrize(
    ("layers", "chosen"), [("middle", {1, 2}), ("0,3", {0, 3}), ("2-3", {2, 3})]
)
def test_adapters_of_some_layers_are_there_and_nowhere_else(
    small: Callable[[], Model], small_folder: Path, ids: torch.Tensor, tmp_path: Path,
    layers: str, chosen: set[int],
) -> None:  # fmt: skip
    peft, course = tuned(small(), config=replace(FAST, adapter_layers=layers))
    save_adapter(peft, tmp_path / "adapter", small_folder)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {module_layer(name.removeprefix("base_model.model.")) for name in saved} == chosen
    # Four modules a layer, two matrices each.
    assert len(saved) == 8 * len(chosen)
    assert course.trainable == sum(value.numel() for value in saved.values())
    untouched = plain(small_folder)
    with torch.no_grad():
        before = untouched(ids).logits
        after = PeftModel.from_pretrained(untouched, tmp_path / "adapter").eval()(ids).logits
        assert (after - before).abs().max() > 1e-2
        torch.testing.assert_close(after, peft(ids).logits, atol=1e-5, rtol=0)


def test_layers_that_get_no_adapters(small: Callable[[], Model]) -> None:
    with pytest.raises(BadInputError, match="out of range: the model has 4 layers"):
        tuned(small(), config=replace(FAST, adapter_layers="4"))


def test_adapters_that_the_loss_does_not_depend_on(small: Callable[[], Model]) -> None:
    """In front of an attention's output that passes no gradient, and nowhere else."""
    objective = preset("reference", site="attn_out", targets=("q_proj",))
    with pytest.raises(BadInputError, match=r"no gradient reaches an adapter.*--targets"):
        tuned(small(), objective, replace(FAST, adapter_layers="1"))


def test_adapters_off_is_the_base_exactly(
    small: Callable[[], Model], small_folder: Path, ids: torch.Tensor
) -> None:
    peft, _ = tuned(small())
    with torch.no_grad(), peft.disable_adapter():
        off = peft(ids).logits
    with torch.no_grad():
        assert torch.equal(off, plain(small_folder)(ids).logits)
        assert not torch.equal(off, peft(ids).logits)


def test_only_adapters_change(small: Callable[[], Model], small_folder: Path) -> None:
    peft, _ = tuned(small())
    base = plain(small_folder).state_dict()
    held = {
        name.replace("base_model.model.", "").replace("._original_component", "")
        .replace(".base_layer", ""): value
        for name, value in peft.state_dict().items() if "lora_" not in name
    }  # fmt: skip
    shared = set(base) & set(held)
    assert len(shared) >= 4 * 9
    assert all(torch.equal(base[name], held[name]) for name in shared)


def test_the_course_is_repeatable_and_leaves_the_generator_alone(
    small: Callable[[], Model],
) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    _, first = tuned(small())
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    _, second = tuned(small())
    _, other = tuned(small(), config=replace(FAST, seed=1))
    assert first.losses == second.losses
    assert first.grad_norms == second.grad_norms
    assert first.losses != other.losses
    assert (first.steps, first.tokens) == (3, 72)


def test_the_loss_falls(small: Callable[[], Model]) -> None:
    same = batches(1) * 25
    coder = new_coder(32, 64, 4, seed=0).requires_grad_(False)
    _, course = tune(
        small(), coder, Hookpoint(1), same, 25, preset("paper"), replace(FAST, dropout=0.0)
    )
    assert course.losses[-1] < 0.5 * course.losses[0]


def test_without_a_perturbation_nothing_trains(
    small: Callable[[], Model], small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No SAE: the same distribution on both sides; the sanity check of spec section 7."""
    monkeypatch.setattr("resa_lens.tuning.objective.substitute", lambda coder, acts: acts)
    for objective in (preset("paper"), preset("reference")):
        _, course = tuned(small(), objective)
        assert course.losses[0] == pytest.approx(0.0, abs=1e-6)
        assert course.grad_norms[0] < 1e-4


def rates(monkeypatch: pytest.MonkeyPatch, model: Model, **changes: Any) -> list[float]:
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    tuned(model, preset("paper", **changes), replace(FAST, learning_rate=1e-4), steps=4)
    return seen


def test_cosine_runs_from_the_rate_towards_a_tenth(
    small: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = rates(monkeypatch, small())
    expected = [1e-4 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * s / 4))) for s in range(4)]
    assert seen == pytest.approx(expected)
    assert seen[0] == pytest.approx(1e-4)
    assert seen[2] == pytest.approx(0.55e-4)


def test_constant_stays(small: Callable[[], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    assert rates(monkeypatch, small(), schedule="constant") == [1e-4] * 4


def test_clipping_bounds_what_the_optimizer_sees(
    small: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
        grads = [
            p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None
        ]
        seen.append(float(torch.stack(grads).norm()))
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    _, course = tuned(small(), preset("reference", clip_norm=1e-3))
    assert all(norm > 1e-3 for norm in course.grad_norms)
    assert seen == pytest.approx([1e-3] * 3, rel=1e-2)


# Failures


def test_loss_that_is_not_finite(small: Callable[[], Model]) -> None:
    with pytest.raises(RunFailedError, match=r"layer 1.*(nan|inf).*1e\+30") as caught:
        tuned(small(), config=replace(FAST, learning_rate=1e30), steps=4)
    assert len(str(caught.value).splitlines()) <= 3


def test_gradient_norm_that_is_not_finite(
    small: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Passes.__call__

    def explode(self: Passes, ids: torch.Tensor) -> Any:
        loss, metrics = real(self, ids)
        # The value stays, its derivative is infinite.
        return loss + (loss - loss.detach()).abs().sqrt(), metrics

    monkeypatch.setattr(Passes, "__call__", explode)
    with pytest.raises(RunFailedError, match=r"gradient norm is (nan|inf) at step 0"):
        tuned(small())


def test_update_of_the_last_step_is_checked_too(small: Callable[[], Model]) -> None:
    config = replace(FAST)
    # No configuration takes it: what is tested is the loop's own check.
    object.__setattr__(config, "learning_rate", math.inf)
    with pytest.raises(RunFailedError, match="last step"):
        tuned(small(), config=config, steps=1)


def test_sae_of_another_width(small: Callable[[], Model]) -> None:
    narrow = new_coder(16, 32, 2, seed=0)
    with pytest.raises(BadInputError, match=r"width 16.*32"):
        tune(small(), narrow, Hookpoint(1), batches(1), 1, preset("paper"), FAST)


def test_sae_of_another_site(small: Callable[[], Model]) -> None:
    point = Hookpoint(1, "resid_post")
    coder = new_coder(32, 64, 4, seed=0)
    with pytest.raises(BadInputError, match=r"resid_post.*mlp_out"):
        tune(small(), coder, point, batches(1), 1, preset("paper"), FAST)


def test_no_batch(small: Callable[[], Model]) -> None:
    coder = new_coder(32, 64, 4, seed=0).requires_grad_(False)
    with pytest.raises(BadInputError, match="no batch"):
        tune(small(), coder, Hookpoint(1), [], 1, preset("paper"), FAST)


def test_modules_that_the_model_lacks(small: Callable[[], Model]) -> None:
    model = small().model
    assert lora_targets(model, ("q_proj", "up_proj")) == ["q_proj", "up_proj"]
    with pytest.raises(BadInputError, match="'w_proj'"):
        lora_targets(model, ("q_proj", "w_proj"))


@pytest.mark.parametrize("absent", ["gate_proj", "query_key_value", "o_proj", "norm"])
def test_a_target_that_only_other_models_have_is_refused_by_name(absent: str) -> None:
    config = PhiConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=32)  # fmt: skip
    model = PhiForCausalLM(config)
    with pytest.raises(BadInputError, match=rf"'{absent}' to adapt; choose .*dense, fc1, fc2, k_"):
        lora_targets(model, ("q_proj", absent))
    assert lora_targets(model, ("q_proj", "dense")) == ["q_proj", "dense"]
    # A preset's are meant by what they do.
    assert lora_targets(model, preset("reference").targets) == [
        "q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2",
    ]  # fmt: skip


def test_a_neox_model_gets_its_own_modules() -> None:
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    assert lora_targets(model, preset("paper").targets) == ["query_key_value", "dense"]
    assert set(lora_targets(model, preset("reference").targets)) == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    }  # fmt: skip


def test_adapters_that_the_hooks_would_go_around_are_refused(
    small: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    coder = new_coder(16, 32, 4, seed=0).requires_grad_(False)

    def neox() -> Model:
        return replace(small(), model=GPTNeoXForCausalLM(config), name="neox")  # pyright: ignore

    data = [ids % 64 for ids in batches(2)]
    # A fused matrix is adapted where the model's own attention is called.
    peft, _ = tune(neox(), coder, Hookpoint(1), data, 2, preset("paper"), FAST)
    moved = [n for n, p in peft.named_parameters() if "lora_B" in n and bool(p.any())]
    assert sum("query_key_value" in name for name in moved) == 2

    build = bridge_module._build

    def stock_only(*args: Any, native: bool) -> Any:
        if native:
            raise AttributeError("no such part")
        return build(*args, native=False)

    monkeypatch.setattr(bridge_module, "_build", stock_only)
    with pytest.raises(BadInputError, match=r"own attention.*no such part.*query_key_value"):
        tune(neox(), coder, Hookpoint(1), data, 2, preset("paper"), FAST)
    # Its other modules are tuned, and nothing else is: the bridge's copies of weights are not.
    objective = preset("paper", targets=("dense", "dense_4h_to_h"))
    peft, course = tune(neox(), coder, Hookpoint(1), data, 2, objective, FAST)
    assert course.losses[0] > 0
    assert all("lora_" in n for n, p in peft.named_parameters() if p.requires_grad)
    moved = [n for n, p in peft.named_parameters() if "lora_B" in n and bool(p.any())]
    assert len(moved) == 4
