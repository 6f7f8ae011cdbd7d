"""Attribution: exact where the model is linear, true where it is not, and effects by layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from resa_lens.errors import BadInputError
from resa_lens.features.attribution import (
    Edit,
    Forward,
    attribute,
    mean_loss,
    model_forward,
)
from resa_lens.features.effects import causal_effects
from resa_lens.features.interventions import Intervention, Tracker, intervening
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseCoder, new_coder
from resa_lens.texts.phases import PhasedBatch, phased_batches

POINT = Hookpoint(5)
TEXTS = (
    "Problem: What is 12+30? <think> 12+30=42 </think> <answer> Answer: 42 </answer>",
    "Problem: Evaluate (8+2)*8. <think> 8+2=10; 10*8=80 </think> <answer> Answer: 80 </answer>",
    "Problem: Multiply 29 by 4. <think> 20*4=80; 9*4=36 </think> <answer> Answer: 116 </answer>",
    "Problem: What is 5+6? <think> 5+6=11 </think> <answer> Answer: 11 </answer>",
    "Problem: What is 7+6-3? <think> 7+6=13; 13-3=10 </think> <answer> Answer: 10 </answer>",
)


def coder_of(width: int, latents: int = 24, k: int = 6, seed: int = 0) -> SparseCoder:
    coder = new_coder(width, latents, k, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        coder.W_dec.mul_(1 + torch.rand(latents, 1, generator=generator))
        coder.b_dec.normal_(0, 0.1, generator=generator)
    return coder.requires_grad_(False)


@pytest.fixture(scope="module")
def batches(tiny: Model) -> list[PhasedBatch]:
    return phased_batches(tiny.tokenizer, TEXTS)


# A linear model


def linear(vectors: torch.Tensor, readout: torch.Tensor) -> Forward:
    """Activations are looked up, logits are linear in what stands in their place."""

    def forward(ids: torch.Tensor, edit: Edit) -> torch.Tensor:
        return edit(vectors[ids]) @ readout

    return forward


def first_logits(logits: torch.Tensor, ids: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """A metric linear in the logits: that of token 0, at every second position."""
    return logits[:, ::2, 0].sum(1)


def toy() -> tuple[torch.Tensor, torch.Tensor, SparseCoder, list[PhasedBatch]]:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(40, 8, generator=generator)
    readout = torch.randn(8, 5, generator=generator)
    ids = torch.randint(0, 40, (6, 7), generator=generator)
    phases = torch.tensor([[0, 0, 1, 1, 1, 2, 2]]).expand(6, 7)
    made = [
        PhasedBatch(ids[:4], phases[:4], torch.arange(4)[:, None].expand(4, 7)),
        PhasedBatch(ids[4:], phases[4:], torch.arange(4, 6)[:, None].expand(2, 7)),
    ]
    return vectors, readout, coder_of(8), made


def test_on_a_linear_model_both_are_the_analytic_answer() -> None:
    vectors, readout, coder, made = toy()
    found = attribute(linear(vectors, readout), coder, made, first_logits, top=100)
    x = vectors[torch.cat([b.ids for b in made])]
    before = ((x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias).relu()
    kth = before.sort(dim=-1, descending=True).values[..., 5:6]
    z = torch.where(before >= kth, before, 0.0)
    # Without feature i the metric falls by z_i times what its direction writes to logit 0.
    known = -(z[:, ::2].sum(1) * (coder.W_dec @ readout[:, 0])).mean(0)
    assert len(found.effects) == int((z.sum((0, 1)) > 0).sum())
    for effect in found.effects:
        assert effect.gradient == pytest.approx(float(known[effect.feature]), abs=1e-5)
        assert effect.patching == pytest.approx(float(known[effect.feature]), abs=1e-5)
        assert effect.active == int((z[..., effect.feature] > 0).sum())
        assert effect.documents == int((z[..., effect.feature] > 0).any(1).sum())
    masses = [effect.mass for effect in found.effects]
    assert masses == sorted(masses, reverse=True)
    lengths = z.sum((0, 1)) * coder.W_dec.norm(dim=1)
    assert masses[0] == pytest.approx(float(lengths.max()), rel=1e-5)
    assert found.agreement.spearman == pytest.approx(1.0, abs=1e-3)
    assert found.agreement.p_value is not None
    assert found.agreement.p_value < 0.01
    assert found.agreement.signs == 1.0
    assert (found.documents, found.tokens) == (6, 42)
    # Six documents allow no p below 2^-5: of so many features none stands out.
    p_values = np.array([(effect.p_value, effect.p_corrected) for effect in found.effects])
    assert p_values[:, 0].min() < 0.05
    assert p_values[:, 1].min() == pytest.approx(min(1.0, len(p_values) * p_values[:, 0].min()))
    assert p_values[:, 1].min() > 0.05
    for feature in (-1, 24):
        with pytest.raises(BadInputError, match=f"feature {feature} is out of range.* 0 to 23"):
            attribute(linear(vectors, readout), coder, made, first_logits, features=(feature,))


def test_where_the_model_bends_they_part_and_patching_is_right() -> None:
    """L = sum of squares: the gradient misses (z d)^2, which patching has."""
    vectors, _, coder, made = toy()
    wide = linear(vectors, torch.eye(8))
    found = attribute(
        wide, coder, made, lambda logits, ids, phases: logits.pow(2).sum((1, 2)), features=[2, 7]
    )
    x = vectors[torch.cat([b.ids for b in made])].flatten(0, 1)
    before = ((x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias).relu()
    kth = before.sort(dim=-1, descending=True).values[..., 5:6]
    z = torch.where(before >= kth, before, 0.0)
    for effect in found.effects:
        row = coder.W_dec[effect.feature]
        gone = z[:, effect.feature, None] * row
        linear_part = -2 * (gone * x).sum() / 6
        assert effect.gradient == pytest.approx(float(linear_part), rel=1e-4)
        assert effect.patching == pytest.approx(
            float(linear_part + gone.pow(2).sum() / 6), rel=1e-4
        )
    assert found.agreement.spearman is None  # two features rank nothing
    assert found.agreement.n == 2


# The real model


def losses(model: Model, batches: list[PhasedBatch], phases: tuple[int, ...]) -> np.ndarray:
    """Mean loss a document, token by token."""
    made = []
    for batch in batches:
        with torch.no_grad():
            log_p = F.log_softmax(model.bridge(batch.ids), dim=-1)
        for row, ids, where in zip(log_p, batch.ids, batch.phases, strict=True):
            own = [
                -float(row[i - 1, ids[i]]) for i in range(1, len(ids)) if int(where[i]) in phases
            ]
            made.append(sum(own) / len(own))
    return np.array(made)


def test_patching_is_ablation_of_one_feature_alone(tiny: Model, batches: list[PhasedBatch]) -> None:
    coder = coder_of(128)
    found = attribute(
        model_forward(tiny, POINT), coder, batches, mean_loss(("think", "answer")), top=4
    )
    clean = losses(tiny, batches, (1, 2))
    assert found.loss == pytest.approx(clean.mean(), rel=1e-4)
    for effect in found.effects:
        parts = []
        for batch in batches:
            wanted = Intervention(POINT, (effect.feature,))
            with intervening(tiny, [wanted], {POINT: coder}, Tracker(batch.phases)):
                parts.append(losses(tiny, [batch], (1, 2)))
        change = (np.concatenate(parts) - clean).mean()
        assert effect.patching == pytest.approx(change, abs=2e-6)
        assert abs(change) > 1e-5  # or the equality says nothing
        assert effect.ci[0] <= effect.patching <= effect.ci[1]


def test_the_gradient_is_the_slope_of_a_small_dose(tiny: Model, batches: list[PhasedBatch]) -> None:
    coder, dose = coder_of(128), 0.02
    found = attribute(model_forward(tiny, POINT), coder, batches, mean_loss(("answer",)), top=3)

    def at(feature: int, strength: float) -> float:
        parts = []
        for batch in batches:
            wanted = Intervention(POINT, (feature,), "ablate", strength)
            with intervening(tiny, [wanted], {POINT: coder}, Tracker(batch.phases)):
                parts.append(losses(tiny, [batch], (2,)))
        return float(np.concatenate(parts).mean())

    for effect in found.effects:
        slope = (at(effect.feature, dose) - at(effect.feature, -dose)) / (2 * dose)
        assert effect.gradient == pytest.approx(slope, rel=0.05, abs=1e-6)


# Effects by layer


def planted(tiny: Model, batches: list[PhasedBatch]) -> SparseCoder:
    """Every feature is 1 at every token, so all masses are equal; only directions differ.

    Feature 0 stands against the loss's mean gradient: without it the loss must rise.  The others
    are random directions of the same length, which have next to no part of that gradient.
    """
    slope = torch.zeros(128)
    for batch in batches:
        held: list[torch.Tensor] = []

        def leaf(x: torch.Tensor, held: list[torch.Tensor] = held) -> torch.Tensor:
            held.append(x.detach().requires_grad_(True))
            return held[-1]

        logits = model_forward(tiny, POINT)(batch.ids, leaf)
        metric = mean_loss(("think", "answer"))(logits, batch.ids, batch.phases)
        slope += torch.autograd.grad(metric.sum(), held)[0].sum((0, 1))
    coder = new_coder(128, 40, 40, seed=0)
    with torch.no_grad():
        coder.encoder.weight.zero_()
        coder.encoder.bias.fill_(1.0)
        coder.W_dec[0] = -slope
        coder.W_dec.mul_(3 / coder.W_dec.norm(dim=1, keepdim=True))
    return coder.requires_grad_(False)


def test_a_planted_feature_costs_more_than_random_ones(
    tiny: Model, batches: list[PhasedBatch]
) -> None:
    other = Hookpoint(7)
    found = causal_effects(
        tiny,
        {POINT: planted(tiny, batches), other: coder_of(128, 60)},
        {5: (0,)},
        batches,
        controls=8,
    )
    effect = found[5]
    assert effect.value == pytest.approx(effect.target - effect.control, abs=1e-9)
    assert effect.value > effect.se > 0
    assert effect.target > 10 * abs(effect.control)
    assert effect.rank_p == pytest.approx(1 / 9)
    assert 0 < effect.p_value < 1
    assert effect.freedom > 1
    assert (effect.n, effect.features, effect.controls) == (5, 1, 8)
    # Nothing was counted at layer 7.
    assert (found[7].value, found[7].se, found[7].p_value, found[7].n) == (0.0, 0.0, 1.0, 5)


def test_effects_are_those_of_interventions(tiny: Model, batches: list[PhasedBatch]) -> None:
    coder, features = coder_of(128), (1, 4, 9)
    found = causal_effects(tiny, {POINT: coder}, {5: features}, batches, controls=2)[5]
    clean, after = [], []
    for batch in batches:
        clean.append(losses(tiny, [batch], (1, 2)))
        wanted = Intervention(POINT, features)
        with intervening(tiny, [wanted], {POINT: coder}, Tracker(batch.phases)):
            after.append(losses(tiny, [batch], (1, 2)))
    change = np.concatenate(after) - np.concatenate(clean)
    assert found.target == pytest.approx(change.mean(), abs=2e-6)
    again = causal_effects(tiny, {POINT: coder}, {5: features}, batches, controls=2)[5]
    assert again == found


# Bad input


def test_text_without_thoughts_is_refused(tiny: Model) -> None:
    plain = phased_batches(tiny.tokenizer, ["What is 3+4? It is 7."])
    with pytest.raises(BadInputError, match="no document has a token of the measured phases"):
        attribute(model_forward(tiny, POINT), coder_of(128), plain, mean_loss(("think",)))
    with pytest.raises(BadInputError, match="no document has a token of the measured phases"):
        causal_effects(tiny, {POINT: coder_of(128)}, {5: (1,)}, plain)


def test_documents_without_the_phase_are_left_out(tiny: Model) -> None:
    mixed = phased_batches(tiny.tokenizer, [*TEXTS[:2], "What is 3+4? It is 7."])
    found = attribute(model_forward(tiny, POINT), coder_of(128), mixed, mean_loss(("think",)))
    assert found.documents == 2
    assert math.isfinite(found.loss)


def test_a_batch_without_the_phase_moves_nothing(tiny: Model) -> None:
    """Its documents have no gradient; the others keep theirs."""
    mixed = phased_batches(tiny.tokenizer, [*TEXTS[:2], "What is 3+4? It is 7."])
    alone = phased_batches(tiny.tokenizer, TEXTS[:2])
    coder, forward = coder_of(128), model_forward(tiny, POINT)
    a, b = (
        attribute(forward, coder, some, mean_loss(("think",)), features=(1, 4, 9))
        for some in (mixed, alone)
    )
    assert [e.gradient for e in a.effects] == pytest.approx([e.gradient for e in b.effects])
    assert any(e.gradient for e in a.effects)


def test_bad_input(tiny: Model, batches: list[PhasedBatch]) -> None:
    coder = coder_of(128)
    with pytest.raises(BadInputError, match="phase 'thought' is unknown"):
        mean_loss(("thought",))
    with pytest.raises(BadInputError, match="phase '' is unknown"):
        mean_loss(())
    with pytest.raises(BadInputError, match=r"feature 24 is out of range.* 0 to 23"):
        causal_effects(tiny, {POINT: coder}, {5: (24,)}, batches)
    with pytest.raises(BadInputError, match=r"no SAE at layer 6"):
        causal_effects(tiny, {POINT: coder}, {6: (1,)}, batches)
    with pytest.raises(BadInputError, match="width 64, the model's is 128"):
        causal_effects(tiny, {POINT: coder_of(64)}, {5: (1,)}, batches)
    one = phased_batches(tiny.tokenizer, TEXTS[:1])
    with pytest.raises(BadInputError, match="one document gives no standard error"):
        causal_effects(tiny, {POINT: coder}, {5: (1,)}, one)
    with pytest.raises(BadInputError, match="controls is 1"):
        causal_effects(tiny, {POINT: coder}, {5: (1,)}, batches, controls=1)
    silent: Any = coder_of(128)
    with torch.no_grad():
        silent.encoder.bias.fill_(-1e6)
    with pytest.raises(BadInputError, match="no feature is active"):
        attribute(model_forward(tiny, POINT), silent, batches, mean_loss(("think",)))
