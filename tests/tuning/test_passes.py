"""The trainer's way against the definition: loss and gradients, for every option."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes.baselines import Noise
from resa_lens.saes.coder import SparseCoder, new_coder
from resa_lens.tuning import passes as module
from resa_lens.tuning.objective import Objective, preset, tuning_loss
from resa_lens.tuning.passes import Passes
from resa_lens.tuning.train import TuneConfig, add_adapters

OPTIONS = {
    "site": ("mlp_out", "resid_post"),
    "reference": ("adapted", "base"),
    "reference_gradient": (True, False),
    "sae_gradient": (True, False),
}
GRID = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]


def sae() -> SparseCoder:
    return new_coder(32, 64, 4, seed=0).requires_grad_(False)


def prepared(
    model: Model, objective: Objective, *, fresh: bool, dropout: float = 0.0
) -> tuple[Any, Any]:
    peft, bridge = add_adapters(model, objective, TuneConfig(rank=4, alpha=8, dropout=dropout))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            above = any(f"layers.{n}." in name for n in (2, 3))
            if "lora_B" in name and (above or not fresh):
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return peft.train(), bridge


def gradients(peft: Any) -> dict[str, torch.Tensor | None]:
    return {n: p.grad for n, p in peft.named_parameters() if p.requires_grad}


def assert_same(loss: Any, peft: Any, plain_loss: Any, plain: Any) -> None:
    assert loss.item() == pytest.approx(plain_loss.item(), rel=2e-5)
    ours, theirs = gradients(peft), gradients(plain)
    total = sum(g.norm() ** 2 for g in theirs.values() if g is not None) ** 0.5
    assert total > 1e-4
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        mine = ours[name]
        assert (mine is None) == (gradient is None), name
        if mine is not None and gradient is not None:
            assert (mine - gradient).norm() < 1e-5 * total, name


CASES = [
    # The rest of the grid says the same again: in the slow tier.
    pytest.param(options, name, fresh, marks=() if number % 5 == 0 else pytest.mark.slow)
    for number, (fresh, name, options) in enumerate(
        itertools.product((True, False), ("paper", "reference"), GRID)
    )
]


@pytest.mark.parametrize(("options", "name", "fresh"), CASES)
def test_loss_and_gradients_are_the_definition_s(
    small: Callable[[], Model], ids: torch.Tensor, name: str, options: dict[str, Any], fresh: bool
) -> None:
    """Both directions and reductions come with the presets; the hook is at the second layer."""
    objective = preset(name, **options)
    point = Hookpoint(1, objective.site)
    peft, bridge = prepared(small(), objective, fresh=fresh)
    passes = Passes(bridge, peft, point, sae(), objective)
    loss, metrics = passes(ids)
    loss.backward()
    plain, its_bridge = prepared(small(), objective, fresh=fresh)
    expected = tuning_loss(its_bridge, plain, ids, point, sae(), objective)
    expected.backward()
    assert_same(loss, peft, expected, plain)
    per_token = loss.item() if objective.reduction == "mean" else loss.item() / 24
    assert float(metrics["kl_per_token"]) == pytest.approx(per_token)
    assert metrics["tokens"] == 48
    # What may be shared, written out again.
    blocked = objective.site == "resid_post" and not objective.sae_gradient
    silent = objective.reference == "base" or not objective.reference_gradient
    shares = (blocked and silent and fresh) or objective.reference == "adapted"
    assert passes.shared == ((1 if objective.site == "resid_post" else 0) if shares else None)


@pytest.mark.parametrize("name", ["paper", "reference"])
@pytest.mark.parametrize("site", ["mlp_out", "resid_post"])
@pytest.mark.parametrize("layer", [0, 3], ids=["first", "last"])
def test_the_first_and_the_last_layer(
    small: Callable[[], Model], ids: torch.Tensor, name: str, site: str, layer: int
) -> None:
    objective = preset(name, site=site)
    point = Hookpoint(layer, site)
    peft, bridge = prepared(small(), objective, fresh=False)
    loss, _ = Passes(bridge, peft, point, sae(), objective)(ids)
    plain, its_bridge = prepared(small(), objective, fresh=False)
    expected = tuning_loss(its_bridge, plain, ids, point, sae(), objective)
    if name == "reference" and site == "resid_post" and layer == 3:
        # Nothing above the last block is adapted.
        assert not loss.requires_grad
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        return
    loss.backward()
    expected.backward()
    assert_same(loss, peft, expected, plain)


def test_shared_blocks_are_exact_with_dropout_above_the_hook(
    small: Callable[[], Model], ids: torch.Tensor
) -> None:
    """Below, zero adapters drop nothing that counts; above, the masks are made the same."""
    objective = preset("reference")
    made = []
    for way in ("shared", "plain"):
        peft, bridge = prepared(small(), objective, fresh=True, dropout=0.3)
        handle = bridge.blocks[2].register_forward_pre_hook(
            lambda *_: torch.manual_seed(5) and None
        )
        point = Hookpoint(1, "resid_post")
        if way == "shared":
            passes = Passes(bridge, peft, point, sae(), objective)
            assert passes.shared == 1
            loss = passes(ids)[0]
        else:
            loss = tuning_loss(bridge, peft, ids, point, sae(), objective)
        loss.backward()
        handle.remove()
        made += [loss, peft]
    assert_same(*made)


def test_dropout_that_differs_between_the_passes_is_not_shared(
    small: Callable[[], Model],
) -> None:
    for options in ({}, {"sae_gradient": False}, {"reference_gradient": False}):
        objective = preset("paper", **options)
        peft, bridge = prepared(small(), objective, fresh=True, dropout=0.05)
        assert Passes(bridge, peft, Hookpoint(2), sae(), objective).shared is None


def test_a_model_with_dropout_of_its_own_shares_nothing(small: Callable[[], Model]) -> None:
    model = small()
    model.model.config.attention_dropout = 0.1
    objective = preset("reference")
    peft, bridge = prepared(model, objective, fresh=True)
    assert Passes(bridge, peft, Hookpoint(1, "resid_post"), sae(), objective).shared is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("paper", {}),
        ("paper", {"sae_gradient": False}),
        ("reference", {}),
        ("reference", {"site": "mlp_out"}),
        ("paper", {"site": "resid_post", "reference_gradient": False}),
    ],
)
@pytest.mark.parametrize(("dropout", "control"), [(0.0, False), (0.2, True)], ids=["sae", "noise"])
def test_gradient_checkpointing_changes_nothing(
    small: Callable[[], Model],
    ids: torch.Tensor,
    name: str,
    options: dict[str, Any],
    dropout: float,
    control: bool,
) -> None:
    """Blocks computed again see the same dropout, the same SAE or none, and the same noise."""
    objective = preset(name, **options)
    made = []
    for checkpointing in (True, False):
        peft, bridge = prepared(small(), objective, fresh=False, dropout=dropout)
        coder = Noise(sae(), 3) if control else sae()
        passes = Passes(
            bridge, peft, Hookpoint(1, objective.site), coder, objective,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        torch.manual_seed(0)
        loss = passes(ids)[0]
        loss.backward()
        made += [loss, peft]
    assert_same(*made)


def test_checkpointing_computes_blocks_again(small: Callable[[], Model], ids: torch.Tensor) -> None:
    objective = preset("paper")
    counts = []
    for checkpointing in (False, True):
        peft, bridge = prepared(small(), objective, fresh=False, dropout=0.1)
        passes = Passes(
            bridge, peft, Hookpoint(1), sae(), objective, gradient_checkpointing=checkpointing
        )
        seen: list[int] = []
        # On the way in: a block is computed again only as far as it is needed.
        bridge.blocks[2].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        passes(ids)[0].backward()
        counts.append(len(seen))
    assert counts == [2, 4]


def test_fvu_is_that_of_the_hook_and_costs_no_pass_of_the_sae(
    small: Callable[[], Model], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = preset("reference")
    peft, bridge = prepared(small(), objective, fresh=True)
    point, coder = Hookpoint(1, "resid_post"), sae()
    held: list[torch.Tensor] = []
    with (
        torch.no_grad(),
        bridge.hooks(fwd_hooks=[(point.transformer_lens, lambda acts, hook: held.append(acts))]),
    ):
        bridge(ids)
    from resa_lens.saes.baselines import fvu_on
    from resa_lens.tuning import objective as objectives

    calls: list[int] = []
    real = objectives.substitute
    monkeypatch.setattr(objectives, "substitute", lambda *args: (calls.append(1), real(*args))[1])
    _, metrics = Passes(bridge, peft, point, coder, objective)(ids)
    assert calls == [1]
    assert float(metrics["fvu"]) == pytest.approx(fvu_on(coder, held[0].flatten(0, 1)), rel=1e-4)


def test_an_adapter_on_the_head_goes_the_plain_way_and_says_so(
    small: Callable[[], Model], ids: torch.Tensor
) -> None:
    objective = preset("paper", targets=("q_proj", "lm_head"))
    notes: list[str] = []
    peft, bridge = prepared(small(), objective, fresh=False)
    loss, _ = Passes(bridge, peft, Hookpoint(1), sae(), objective, note=notes.append)(ids)
    loss.backward()
    assert len(notes) == 1
    assert "more memory" in notes[0]
    plain, its_bridge = prepared(small(), objective, fresh=False)
    expected = tuning_loss(its_bridge, plain, ids, Hookpoint(1), sae(), objective)
    expected.backward()
    assert_same(loss, peft, expected, plain)


def test_a_bfloat16_model_has_adapters_in_single(small_folder: Any, ids: torch.Tensor) -> None:
    objective = preset("paper")
    losses = []
    for dtype in ("bfloat16", "float32"):
        model = load_model(str(small_folder), dtype=dtype)
        peft, bridge = prepared(model, objective, fresh=False)
        loss, _ = Passes(bridge, peft, Hookpoint(1), sae(), objective)(ids)
        loss.backward()
        losses.append(loss.item())
        kinds = {p.dtype for p in peft.parameters() if p.requires_grad}
        assert kinds == {torch.float32}
        assert all(g is not None and g.dtype == torch.float32 for g in gradients(peft).values())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_blocks_that_give_tuples_share_nothing(
    small: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Passes, "_blocks_give_tensors", lambda self: False)
    objective = preset("reference")
    peft, bridge = prepared(small(), objective, fresh=True)
    assert Passes(bridge, peft, Hookpoint(1, "resid_post"), sae(), objective).shared is None
