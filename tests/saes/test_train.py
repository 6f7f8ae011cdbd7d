"""SAE training: figures with known answers, planted structure, repeatability, failures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import resa_lens.saes.train as module
from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.models.activations import ActivationBatch
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes import quality
from resa_lens.saes.coder import SparseCoder, new_coder
from resa_lens.saes.quality import measure_fvu
from resa_lens.saes.train import SaeConfig, train_saes

SMALL = SaeConfig(latents=64, k=8, tokens=1024, batch=2)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def token_batches(count: int, seed: int = 0, length: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 500, (2, length), generator=generator) for _ in range(count)]


def stub(monkeypatch: pytest.MonkeyPatch, acts: dict[int, list[torch.Tensor]]) -> Any:
    """Feed given activations in place of a model's: {layer: [batch of rows, ...]}."""

    def stream(model: object, batches: Any, points: list[Hookpoint]) -> Iterator[ActivationBatch]:
        for index, ids in enumerate(batches):
            yield ActivationBatch(ids, {p: acts[p.layer][index][None] for p in points})

    monkeypatch.setattr(module, "stream_activations", stream)
    monkeypatch.setattr(quality, "stream_activations", stream)
    width = next(iter(acts.values()))[0].shape[1]
    plain = SimpleNamespace(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return SimpleNamespace(d_model=width, device="cpu", tokenizer=plain)


# Figures with known answers


def signs_coder(width: int) -> SparseCoder:
    """x = relu(x) - relu(-x): reconstructs everything exactly."""
    made = new_coder(width, 2 * width, 2 * width, seed=0)
    eye = torch.cat([torch.eye(width), -torch.eye(width)])
    with torch.no_grad():
        made.encoder.weight.copy_(eye)
        assert made.W_dec is not None
        made.W_dec.copy_(eye)
    return made.requires_grad_(False)


def test_fvu_of_a_perfect_reconstruction_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    model, point = stub(monkeypatch, {0: [x[:20], x[20:]]}), Hookpoint(0)
    fvu, l0 = measure_fvu(model, {point: signs_coder(6)}, [torch.zeros(1, 20)] * 2)[point]
    assert fvu == pytest.approx(0.0, abs=1e-10)
    assert l0 == 6.0


def test_fvu_of_predicting_the_mean_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean is that of all tokens, over the batches, also far from the origin."""
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)) + 50
    x[20:] += 3
    made = new_coder(6, 12, 2, seed=0)
    with torch.no_grad():
        made.encoder.weight.zero_()
        made.b_dec.copy_(x.mean(0))
    model, point = stub(monkeypatch, {0: [x[:20], x[20:]]}), Hookpoint(0)
    fvu, l0 = measure_fvu(model, {point: made}, [torch.zeros(1, 20)] * 2)[point]
    assert fvu == pytest.approx(1.0, abs=1e-4)
    assert l0 == 0.0


def test_fvu_of_half_the_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two equal directions is reconstructed: one half remains."""
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    made = signs_coder(2)
    with torch.no_grad():
        assert made.W_dec is not None
        made.W_dec[:, 1] = 0
    model, point = stub(monkeypatch, {0: [x]}), Hookpoint(0)
    assert measure_fvu(model, {point: made}, [torch.zeros(1, 4)])[point][0] == pytest.approx(0.5)


def test_fvu_without_sequences_is_nan(tiny: Model) -> None:
    point = Hookpoint(1)
    found = measure_fvu(tiny, {point: new_coder(tiny.d_model, 16, 2, seed=0)}, [])
    assert all(math.isnan(value) for value in found[point])


# Training


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_fvu_falls(tiny: Model, optimizer: str) -> None:
    config = SaeConfig(latents=256, k=16, optimizer=optimizer).for_width(tiny.d_model)
    held = token_batches(2, seed=9)
    short = train_saes(tiny, [3], token_batches(2), held, config).quality[0].fvu
    long = train_saes(tiny, [3], token_batches(30), held, config).quality[0].fvu
    assert long < 0.8 * short
    assert long < 0.9


def test_one_pass_equals_each_layer_alone(tiny: Model) -> None:
    config, held = SMALL.for_width(tiny.d_model), token_batches(1, seed=9)
    together = train_saes(tiny, [2, 5], token_batches(4), held, config)
    assert [q.layer for q in together.quality] == [2, 5]
    for layer in (2, 5):
        alone = train_saes(tiny, [layer], token_batches(4), held, config)
        point = Hookpoint(layer)
        for name, value in alone.coders[point].named_parameters():
            torch.testing.assert_close(value, together.coders[point].get_parameter(name))


def test_a_batch_goes_through_the_model_once_and_stops_early(tiny: Model) -> None:
    calls: list[int] = []
    blocks = tiny.bridge.blocks
    handles = [
        blocks[i].register_forward_pre_hook(lambda *_, i=i: calls.append(i)) for i in (0, 3, 5)
    ]
    advanced: list[int] = []
    train_saes(
        tiny, [1, 2, 3], token_batches(3), token_batches(1), SMALL.for_width(tiny.d_model),
        advance=advanced.append,
    )  # fmt: skip
    for handle in handles:
        handle.remove()
    assert sum(advanced) == 3
    # Three training batches and one held out, which is read again only where it has special tokens;
    # the pass ends on entering block 4.
    assert [calls.count(i) for i in (0, 3, 5)] == [4, 4, 0]


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_bit_identical_by_seed(tiny: Model, optimizer: str) -> None:
    config = SaeConfig(latents=64, k=8, optimizer=optimizer, seed=4).for_width(tiny.d_model)
    runs = [train_saes(tiny, [3], token_batches(4), [], config) for _ in range(2)]
    torch.manual_seed(123)
    weights = [dict(run.coders[Hookpoint(3)].named_parameters()) for run in runs]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    other = SaeConfig(latents=64, k=8, optimizer=optimizer, seed=5).for_width(tiny.d_model)
    changed = train_saes(tiny, [3], token_batches(4), [], other).coders[Hookpoint(3)]
    assert not torch.equal(changed.encoder.weight, weights[0]["encoder.weight"])


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_decoder_has_unit_norm_and_the_averaged_weights_still_fit(
    monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    data = [planted(256, seed=s)[0] for s in range(60)]
    model = stub(monkeypatch, {0: data})
    config = SaeConfig(latents=64, k=3, optimizer=optimizer).for_width(32)
    made = train_saes(model, [0], [torch.zeros(1, 256)] * 60, [torch.zeros(1, 256)] * 4, config)
    coder, quality = made.coders[Hookpoint(0)], made.quality[0]
    assert coder.W_dec is not None
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(64), atol=1e-4, rtol=0)
    assert not any(p.requires_grad for p in coder.parameters())
    # Held-out batches are drawn from the same stub: averaging may not spoil what was trained.
    assert quality.fvu < 1.5 * quality.fvu_train
    assert made.tokens == 60 * 256


def planted(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse sums of 3 of 40 known unit directions in 32 dimensions; returns (x, directions)."""
    atoms = torch.randn(40, 32, generator=torch.Generator().manual_seed(7))
    atoms /= atoms.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, 40, generator=generator).topk(3).indices
    sizes = 0.5 + torch.rand(rows, 3, generator=generator)
    return torch.zeros(rows, 40).scatter_(1, chosen, sizes) @ atoms, atoms


def test_planted_dictionary_is_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 900
    data = [planted(256, seed)[0] for seed in range(steps)]
    model = stub(monkeypatch, {0: data})
    config = SaeConfig(latents=96, k=3, optimizer="adam", learning_rate=3e-3).for_width(32)
    ids = [torch.zeros(1, 256)]
    made = train_saes(model, [0], ids * steps, ids * 4, config)
    decoder = made.coders[Hookpoint(0)].W_dec
    assert decoder is not None
    best = (planted(1, 0)[1] @ decoder.T).max(dim=1).values
    assert made.quality[0].fvu < 0.1
    assert (best > 0.9).float().mean() > 0.9
    # A dictionary that was not trained does not come near.
    fresh = new_coder(32, 96, 3, seed=0).W_dec
    assert fresh is not None
    assert ((planted(1, 0)[1] @ fresh.T).max(dim=1).values > 0.9).float().mean() < 0.05


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_steps_are_sparsifys(monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    """The same weights, step by step, as by sparsify's own parts: b_dec's start included."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify.sign_sgd import SignSGD

    config = SaeConfig(latents=64, k=8, optimizer=optimizer, learning_rate=1e-3).for_width(32)
    ours = next(iter(module.new_trainers([Hookpoint(0)], 32, config, 10).values()))
    theirs = new_coder(32, 64, 8, seed=0)
    if optimizer == "signum":
        inner = ScheduleFreeWrapper(SignSGD(theirs.parameters(), lr=1e-3), momentum=0.95)
        inner.train()
    else:
        inner = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    for number in range(8):
        x = planted(256, number)[0] + 0.7
        ours.step(x)
        if not number:
            theirs.b_dec.data = x.mean(0)
        theirs.set_decoder_norm_to_unit_norm()
        theirs(x).fvu.backward()
        theirs.remove_gradient_parallel_to_decoder_directions()
        inner.step()
        inner.zero_grad()
        for name, value in theirs.named_parameters():
            # An update is 1e-3; a gradient near zero may take another sign, rarely.
            off = (ours.params[name] - value).abs() > 1e-5
            assert off.float().mean() < 0.002, (number, name)


def test_dead_share_counts_latents_that_never_fire(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [planted(64, s)[0] for s in range(4)]
    model = stub(monkeypatch, {0: data})

    def with_dead(*args: Any, **options: Any) -> SparseCoder:
        made = new_coder(*args, **options)
        with torch.no_grad():
            made.encoder.weight[:8] = 0
            made.encoder.bias[:8] = -10
        return made

    monkeypatch.setattr(module, "new_coder", with_dead)
    config = SaeConfig(latents=16, k=8, learning_rate=1e-6).for_width(32)
    made = train_saes(model, [0], [torch.zeros(1, 64)] * 4, [], config)
    assert made.quality[0].dead_share == pytest.approx(0.5)
    assert made.dead_window == 128


# Failures


def test_loss_that_is_not_finite_names_layer_and_rate(tiny: Model) -> None:
    config = SaeConfig(latents=64, k=8, learning_rate=1e30).for_width(tiny.d_model)
    with pytest.raises(RunFailedError, match=r"layer 3.*step \d+.*1e\+30"):
        train_saes(tiny, [3], token_batches(6), token_batches(1), config)


def test_update_of_the_last_step_is_checked_too(tiny: Model) -> None:
    config = SaeConfig(latents=64, k=8, learning_rate=1e30).for_width(tiny.d_model)
    with pytest.raises(RunFailedError, match=r"1e\+30"):
        train_saes(tiny, [3], token_batches(1), token_batches(1), config)


def test_no_batch_is_bad_input(tiny: Model) -> None:
    with pytest.raises(BadInputError, match="no batch"):
        train_saes(tiny, [3], [], [], SMALL.for_width(tiny.d_model))


# Defaults


def test_papers_sizes_from_its_width_on() -> None:
    full = SaeConfig().for_width(1536)
    assert (full.latents, full.k, full.learning_rate, full.batch) == (65_536, 32, 2.5e-4, 16)
    assert (full.tokens, full.optimizer) == (5_900_000, "signum")


def test_narrow_defaults_follow_sparsifys_automatic_rate() -> None:
    full = SaeConfig().for_width(128)
    assert (full.latents, full.tokens, full.batch) == (2048, 200_000, 4)
    assert full.learning_rate == pytest.approx(5e-3 / math.sqrt(2048 / 2**14))
    adam = SaeConfig(optimizer="adam").for_width(128)
    assert adam.learning_rate == pytest.approx(2e-4 / math.sqrt(2048 / 2**14))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"optimizer": "muon"}, "muon"),
        ({"site": "attn"}, "attn"),
        ({"k": 0}, "k"),
        ({"tokens": -5}, "tokens"),
        ({"k": 4096}, "k 4096 with 2048 latents"),
    ],
)
def test_impossible_configuration(config: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInputError, match=named):
        SaeConfig(**config).for_width(128)
