"""Insertion while generating: against a loop written out, the oracle, and a verdict's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.insertion_verdicts import verdicts
from resa_lens.evals.config import EvalConfig, GenerationConfig
from resa_lens.evals.insertion import MeanAblation, evaluate_inserted, insertion_verdict
from resa_lens.evals.run import EvalResult
from resa_lens.evals.tasks import EvalItem, load_tasks
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes.coder import new_coder
from resa_lens.texts.prompts import question_prompt

LAYER = 8
POINT = Hookpoint(LAYER, "mlp_out")


@pytest.fixture(scope="module")
def source() -> Model:
    return load_model("tiny-reasoner")


@pytest.fixture(scope="module")
def target() -> Model:
    """The source with noise on one MLP's last matrix."""
    model = load_model("tiny-reasoner")
    layers: Any = model.model.model.layers
    weight = layers[LAYER].mlp.down_proj.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weight += 4 * weight.std() * noise
    return model


@pytest.fixture(scope="module")
def items() -> list[EvalItem]:
    return load_tasks("tiny", limit=12)


def config(batch: int = 64) -> EvalConfig:
    return EvalConfig(generation=GenerationConfig(max_new_tokens=48, batch_size=batch))


def texts(result: EvalResult) -> list[str]:
    return [row["generation"] for row in result.samples]


def written_out(model: Model, prompt: str, change: Callable[[Tensor], Tensor], new: int) -> str:
    """Greedy text without a cache, by a forward hook on the module."""
    layers: Any = model.model.model.layers
    handle = layers[LAYER].mlp.register_forward_hook(lambda m, args, output: change(output))
    tokenizer: Any = model.tokenizer
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    first = ids.shape[1]
    try:
        for _ in range(new):
            with torch.no_grad():
                last = model.model(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, last[None, None]], dim=1)
            text = tokenizer.decode(ids[0, first:])
            if last == tokenizer.eos_token_id or "</answer>" in text:
                break
    finally:
        handle.remove()
    return tokenizer.decode(ids[0, first:])


def test_an_inserted_sae_is_the_loop_written_out(target: Model, items: list[EvalItem]) -> None:
    coder = new_coder(128, 256, 8, seed=0).requires_grad_(False)
    assert coder.W_dec is not None
    with torch.no_grad():
        coder.b_dec.copy_(torch.randn(128, generator=torch.Generator().manual_seed(2)) / 4)

    def reconstruct(x: Tensor) -> Tensor:
        pre = torch.relu((x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias)
        top = pre.topk(8, dim=-1)
        return (
            torch.zeros_like(pre).scatter(-1, top.indices, top.values) @ coder.W_dec + coder.b_dec
        )

    result = evaluate_inserted(target, items[:4], config(), POINT, coder)
    # The bridge wraps the module: a model of its own is looped over.
    plain = load_model("tiny-reasoner")
    plain.model.load_state_dict(
        {k.replace("._original_component", ""): v for k, v in target.model.state_dict().items()
         if "_original_component" in k or k in plain.model.state_dict()}, strict=False,
    )  # fmt: skip
    for row in result.samples:
        prompt = question_prompt(row["question"])
        assert row["generation"].strip() == written_out(plain, prompt, reconstruct, 48).strip()


def test_the_oracle_mends_a_target_whose_one_mlp_is_damaged(
    source: Model, target: Model, items: list[EvalItem]
) -> None:
    """All else is the same, so the answers are the source's, whichever rows leave the batch."""
    expected = texts(evaluate_inserted(source, items, config()))
    assert texts(evaluate_inserted(target, items, config(), POINT, source)) == expected
    assert texts(evaluate_inserted(target, items, config(5), POINT, source)) == expected
    assert texts(evaluate_inserted(target, items, config())) != expected


def test_the_identity_changes_no_answer(target: Model, items: list[EvalItem]) -> None:
    plain = texts(evaluate_inserted(target, items[:6], config()))
    assert texts(evaluate_inserted(target, items[:6], config(), POINT, lambda x: x)) == plain


def test_the_mean_stands_at_every_token() -> None:
    mean = torch.arange(3.0)
    assert MeanAblation(mean)(torch.zeros(2, 4, 3)).equal(mean.expand(2, 4, 3))


@pytest.mark.parametrize(
    ("ci", "one_model", "verdict"),
    [
        ((0.01, 0.2), False, "the teacher carries a gain"),
        ((0.01, 0.2), True, "the teacher carries a gain"),
        ((-0.2, -0.01), False, "costs"),
        ((-0.2, -0.01), True, "cost only"),
        ((-0.05, 0.01), False, "nothing to learn"),
        ((-0.05, 0.05), False, "undetermined"),
        ((-0.05, 0.05), True, "cost only"),
    ],
)
def test_verdicts(ci: tuple[float, float], one_model: bool, verdict: str) -> None:
    assert insertion_verdict(ci, one_model=one_model) == verdict


def test_the_verdict_seldom_sees_a_gain_that_is_not_there() -> None:
    """A seeded part of benchmarks/insertion_verdicts.py; the whole stands in docs/log.md."""
    nothing = verdicts(200, 0.15, 0.0, range(40))
    assert nothing["the teacher carries a gain"] + nothing["costs"] <= 5
    gain = verdicts(200, 0.15, 0.1, range(40))
    assert gain["the teacher carries a gain"] >= 36
    assert gain["costs"] == 0
