"""Feature Choice, Mutual Choice and the auxiliary loss after Zipf's law, against dense formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resa_lens.errors import BadInputError
from resa_lens.machine import determinism
from resa_lens.saes import select, train
from resa_lens.saes.allocation import (
    check_places,
    even_places,
    feature_choice,
    last_values,
    under_used,
    zipf_places,
)
from resa_lens.saes.coder import ACTIVATIONS, Coder, encode, new_coder
from resa_lens.saes.config import SaeConfig
from resa_lens.saes.convert import difference
from resa_lens.saes.formats import load_coder, save_coder
from resa_lens.saes.select import Encoder
from resa_lens.saes.step import Loss, _choose, forward_step, gradients, total_variance
from resa_lens.saes.train import LayerTrainer
from resa_lens.saes.world import World

LATENTS, WIDTH, ROWS, K = 48, 16, 40, 6


def encoder(half: bool = False) -> Encoder:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(LATENTS, WIDTH, generator=generator) / WIDTH**0.5
    bias = 0.1 * torch.randn(LATENTS, generator=generator)
    return Encoder(weight, bias, (weight.bfloat16(), bias.bfloat16()) if half else None)


def rows(count: int = ROWS, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) + 0.2


def dense(pre: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Each column's largest, one column after the other."""
    kept = torch.zeros_like(pre)
    for latent, count in enumerate(places.tolist()):
        top = pre[:, latent].topk(count)
        kept[top.indices, latent] = top.values
    return kept


# Who gets how much


def test_even_places_differ_by_one() -> None:
    places = even_places(48, 250)
    assert (int(places.sum()), set(places.tolist())) == (250, {5, 6})
    assert even_places(4, 2).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(("latents", "n_rows", "k"), [(48, 40, 6), (2048, 1024, 32), (9, 5, 9)])
def test_places_by_zipf(latents: int, n_rows: int, k: int) -> None:
    places = zipf_places(latents, n_rows, k * n_rows).numpy()
    assert places.sum() == k * n_rows
    assert (places.min() >= 1, places.max() <= n_rows) == (True, True)
    # Beyond those that have the whole batch, the places but one are as 1 / rank.
    free = np.flatnonzero(places < n_rows)
    if free.size:
        spare = (places[free] - 1).sum()
        law = spare / (free + 1.0) / (1 / (free + 1.0)).sum()
        # Marks of the running sum are rounded.
        assert np.abs(places[free] - 1 - law).max() <= 1


def test_too_few_places_are_spread() -> None:
    assert torch.equal(zipf_places(48, 2, 12), even_places(48, 12))


@pytest.fixture(params=["numpy", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's partition, and the form that other devices take, run here on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(determinism, "on_cpu", lambda tensor: False)
    return request.param


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("zipf", [False, True])
def test_feature_choice_is_the_dense_one(
    path: str, half: bool, pieces: bool, zipf: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        monkeypatch.setattr(select, "PRODUCT_BYTES", 7 * ROWS * 4)
    held, x = encoder(half), rows()
    # A token far longer than the others: its rounding errors are as large as their activations.
    x[5] *= 300
    places = zipf_places(LATENTS, ROWS, K * ROWS) if zipf else even_places(LATENTS, K * ROWS)
    chosen = feature_choice(held, x, places, bar=0.5)
    pre = torch.relu(x @ held.weight.T + held.bias)
    expected = dense(pre, places)
    found = torch.zeros(ROWS, LATENTS)
    found[chosen.active.rows, chosen.active.latents] = chosen.active.values
    scale = torch.ones(ROWS, 1)
    scale[5] = 300
    torch.testing.assert_close(found / scale, expected / scale)
    order = chosen.active.rows * LATENTS + chosen.active.latents
    assert torch.equal(order, order.sort().values)
    lowest = pre.sort(0, descending=True).values.gather(0, places[None] - 1)[0]
    torch.testing.assert_close(chosen.lowest, lowest)
    assert chosen.demand is not None
    if not half:
        assert torch.equal(chosen.demand, (pre > 0.5).sum(0).float())


def test_ties_come_along_and_zero_never() -> None:
    held, x = encoder(), rows(4).repeat(10, 1)
    chosen = feature_choice(held, x, even_places(LATENTS, LATENTS))
    counts = torch.bincount(chosen.active.latents, minlength=LATENTS)
    assert set(counts.tolist()) <= {0, 10}
    assert (chosen.active.values > 0).all()
    none = feature_choice(Encoder(held.weight, held.bias - 1e3), x, K)
    assert none.active.values.numel() == 0
    assert (none.lowest == 0).all()
    nobody = feature_choice(held, x, torch.zeros(LATENTS, dtype=torch.long))
    assert nobody.active.values.numel() == 0
    assert nobody.lowest.isinf().all()


# A step


def made(activation: str = "feature-choice", k: int = 5) -> Coder:
    coder = new_coder(WIDTH, LATENTS, k, seed=1, activation=activation)
    with torch.no_grad():
        coder.encoder.bias.copy_(0.1 * torch.randn(LATENTS, generator=torch.manual_seed(2)))
        coder.b_dec.fill_(0.1)
    return coder


def test_a_step_equals_the_dense_formula() -> None:
    coder, x = made(), rows()
    step = forward_step(coder, x, Loss())
    ours = {name: value.clone() for name, value in gradients(coder, step)}
    pre = torch.relu((x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias)
    z = pre * (dense(pre.detach(), even_places(LATENTS, 5 * ROWS)) > 0)
    assert coder.W_dec is not None
    fvu = (x - z @ coder.W_dec - coder.b_dec).pow(2).sum() / total_variance(x)
    torch.testing.assert_close(step.fvu, fvu.detach())
    fvu.backward()
    coder.remove_gradient_parallel_to_decoder_directions()
    for name, value in ours.items():
        torch.testing.assert_close(value, coder.get_parameter(name).grad, atol=1e-6, rtol=1e-5)
    assert torch.bincount(step.terms[0].active.rows, minlength=ROWS).unique().numel() > 1


def test_the_largest_of_two_ranks_are_those_of_one() -> None:
    coder, x = made(), rows()
    held = Encoder(coder.encoder.weight, coder.encoder.bias)
    whole = forward_step(coder, x, Loss()).chosen
    assert whole is not None
    parts = x.split(25)
    sent: list[Any] = []

    class Two(World):
        def rows(self, value: torch.Tensor) -> int:
            return ROWS

        def gather(self, value: Any) -> list[Any]:
            sent.append(value)
            return sent[:2]

    @torch.no_grad()
    def both() -> list[Any]:
        return [_choose(coder, held, x - coder.b_dec, Two(0, 2), None) for x in parts]

    both()
    ours = both()
    torch.testing.assert_close(ours[0].lowest, whole.lowest)
    together = torch.cat([ours[0].active.values, ours[1].active.values])
    torch.testing.assert_close(together, whole.active.values)
    assert torch.equal(torch.cat([ours[0].active.rows, ours[1].active.rows + 25]),
                       whole.active.rows)  # fmt: skip


def test_last_values_by_hand() -> None:
    latents = torch.tensor([0, 2, 0, 2, 0])
    values = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0])
    found = last_values(latents, values, torch.tensor([2, 1, 3, 0]))
    assert found.tolist() == [2.0, 0.0, 0.0, float("inf")]


# A training


def trainer(steps: int = 12, **options: Any) -> LayerTrainer:
    torch.manual_seed(0)
    config = SaeConfig(latents=LATENTS, k=K, learning_rate=1e-3, dead_threshold=ROWS * 3, **options)
    coder = new_coder(WIDTH, LATENTS, K, seed=3, activation=config.activation)
    made = LayerTrainer(coder, config, steps)
    for number in range(steps):
        made.step(rows(seed=number))
    return made


def test_mutual_choice_is_batchtopk_to_the_bit() -> None:
    assert ACTIVATIONS["mutual-choice"] is ACTIVATIONS["batchtopk"]
    options = {"auxk_alpha": 0.1, "multi_topk": True}
    ours, theirs = trainer(activation="mutual-choice", **options), trainer(
        activation="batchtopk", **options
    )  # fmt: skip
    a, b = ours.finish(), theirs.finish()
    assert ours.fvus == theirs.fvus
    assert a.threshold == b.threshold
    assert (a.cfg.activation, b.cfg.activation) == ("mutual-choice", "batchtopk")
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name])


@pytest.mark.parametrize("options", [
    {"activation": "mutual-choice"},
    {"activation": "feature-choice"},
    {"activation": "feature-choice", "allocation": "zipf", "optimizer": "adam"},
    {"activation": "feature-choice", "allocation": "zipf", "aux": "zipf", "auxk_alpha": 0.1},
])  # fmt: skip
def test_a_code_does_not_depend_on_its_batch(options: dict[str, Any], tmp_path: Path) -> None:
    made = trainer(**options)
    coder = made.finish()
    x = rows(64, seed=77)
    together = encode(coder, x)
    for row in range(64):
        alone = encode(coder, x[row : row + 1])
        mine = together.rows == row
        assert torch.equal(alone.latents, together.latents[mine])
        torch.testing.assert_close(alone.values, together.values[mine])
    # Of the last batch k latents a token are active; the one at the threshold is not above it.
    assert made.last is not None
    assert encode(coder, made.last).latents.numel() == pytest.approx(K * ROWS, abs=1)
    coder.save_to_disk(tmp_path)
    again = load_coder(tmp_path)
    assert again.cfg.activation == options["activation"]
    assert torch.equal(encode(again, x).values, together.values)


def test_by_zipf_the_wanted_get_more() -> None:
    made = trainer(activation="feature-choice", allocation="zipf", optimizer="adam")
    places = made.usage.places(ROWS)
    assert places is not None
    assert made.usage.demand is not None
    order = made.usage.demand.argsort(descending=True, stable=True)
    assert torch.equal(places.counts[order], zipf_places(LATENTS, ROWS, K * ROWS))
    assert places.bar == pytest.approx(float(made.usage.bar))  # pyright: ignore
    even = trainer(activation="feature-choice").usage
    assert set(even.tensors()) == {"usage.lowest"}
    assert not trainer().usage.tensors()


# The auxiliary loss


def test_under_used_are_those_below_zipfs_law() -> None:
    density = 0.3 / torch.arange(1, 101).float() ** 0.8
    assert not under_used(density).any()
    less = [60, 77, 99]
    density[less] *= torch.tensor([0.2, 0.0, 0.3])
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(4))
    found = under_used(density[shuffled])
    assert sorted(shuffled[found].tolist()) == less
    assert not under_used(torch.full((64,), 0.1)).any()
    assert under_used(torch.zeros(8)).all()


def test_the_auxiliary_loss_revives_the_under_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """AuxK names what did not fire for a window, `zipf` what fires too rarely with it."""
    masks: dict[str, list[Any]] = {"auxk": [], "zipf": []}
    real = train.forward_step
    for aux, seen in masks.items():

        def watched(*args: Any, seen: list[Any] = seen, **more: Any) -> Any:
            seen.append(more["dead"])
            return real(*args, **more)

        monkeypatch.setattr(train, "forward_step", watched)
        made = trainer(steps=12, aux=aux, auxk_alpha=0.1)
        assert (made.usage.density is None) == (aux == "auxk")
    known = [mask for mask in masks["zipf"] if mask is not None]
    # Three batches are the window.
    assert len(known) == 9
    assert masks["auxk"][0] is None
    # The first step's loss knows no latent; the same weights so far.
    assert not (masks["auxk"][3] & ~known[0]).any()
    assert known[-1].dtype == torch.bool


def test_the_density_is_a_mean_over_the_window() -> None:
    made = trainer(steps=3, aux="zipf", auxk_alpha=0.1)
    assert made.usage.density is not None
    # Before the window is full every step counts alike.
    assert float(made.usage.density.sum()) == pytest.approx(K, rel=1e-5)


# What is refused, and what the formats hold


def test_what_does_nothing_is_refused() -> None:
    with pytest.raises(BadInputError, match="is of feature-choice, not of topk") as caught:
        SaeConfig(allocation="zipf").check_pairs()
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInputError, match="aux 'zipf' has the weight 0"):
        SaeConfig(aux="zipf").check_pairs()
    SaeConfig(
        aux="zipf", auxk_alpha=0.1, activation="feature-choice", allocation="zipf"
    ).check_pairs()
    with pytest.raises(BadInputError, match="activation 'features' is unknown; use topk"):
        SaeConfig(activation="features")  # pyright: ignore[reportArgumentType]


def test_a_latent_needs_a_place() -> None:
    config = SaeConfig(latents=512, k=4, activation="feature-choice")
    check_places(config, 128)
    with pytest.raises(BadInputError, match="4 x 127 a batch, among 512 latents") as caught:
        check_places(config, 127)
    assert "\n" not in str(caught.value)
    check_places(replace(config, activation="mutual-choice"), 1)
    with pytest.raises(BadInputError, match="among 48 latents"):
        LayerTrainer(made(k=1), SaeConfig(k=1, activation="feature-choice"), 2).step(rows())


@pytest.mark.parametrize("form", ["saelens", "dictionary_learning", "sparsify"])
def test_formats_hold_what_they_can(tmp_path: Path, form: str) -> None:
    mutual = trainer(activation="mutual-choice").finish()
    each = trainer(activation="feature-choice").finish()
    held = {"saelens": (mutual, each), "dictionary_learning": (mutual,), "sparsify": ()}[form]
    for coder in (mutual, each):
        folder = tmp_path / coder.cfg.activation
        if coder in held:
            save_coder(coder, folder, form)
            again = load_coder(folder, allow_pickle=True)
            assert difference(coder, again) < 1e-6
            assert again.cfg.activation == "batchtopk"
            continue
        with pytest.raises(BadInputError, match="convert it to saelens") as caught:
            save_coder(coder, folder, form)
        assert "\n" not in str(caught.value)
