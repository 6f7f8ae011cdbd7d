"""Controls matched in FVU: on the sample exactly, held out nearly, repeatable, differentiable."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from resa_lens.errors import BadInputError
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.baselines import (
    Blend,
    Noise,
    Pca,
    Replacement,
    baselines,
    fvu_on,
    latents_of,
    match_fvu,
    pca,
    random_coder,
    random_weights_model,
    shuffled_coder,
    substitute,
)
from resa_lens.saes.coder import SparseCoder, encode, new_coder, reconstruct
from resa_lens.saes.train import SaeConfig, train_saes
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig, load_records

POINT = Hookpoint(6)
NAMES = ("noise", "pca", "shuffled", "random", "random_weights")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches(model: Model, tokens: int, seed: int) -> list[torch.Tensor]:
    config = CorpusConfig(seed=seed)
    return list(
        corpora.batches(model.tokenizer, load_records("tiny"), config, tokens=tokens, batch=4)
    )


def activations(model: Model, tokens: int, seed: int) -> torch.Tensor:
    stream = stream_activations(model, batches(model, tokens, seed), [POINT])
    return torch.cat([batch.acts[POINT].flatten(0, 1) for batch in stream])


def trained(model: Model, tokens: int = 8192) -> SparseCoder:
    config = SaeConfig(latents=512, k=16).for_width(model.d_model)
    return train_saes(model, [POINT.layer], batches(model, tokens, 0), [], config).coders[POINT]


@pytest.fixture(scope="module")
def coder(tiny: Model) -> SparseCoder:
    return trained(tiny)


@pytest.fixture(scope="module")
def sample(tiny: Model) -> torch.Tensor:
    return activations(tiny, 4096, 1)


@pytest.fixture(scope="module")
def controls(tiny: Model, coder: SparseCoder, sample: torch.Tensor) -> dict[str, Replacement]:
    null = trained(random_weights_model(tiny, 0), 4096)
    return baselines(coder, sample, 0, random_weights=null)


@pytest.mark.parametrize("name", NAMES)
def test_each_matches_the_fvu_on_the_sample(
    controls: dict[str, Replacement], coder: SparseCoder, sample: torch.Tensor, name: str
) -> None:
    assert tuple(controls) == NAMES
    assert fvu_on(controls[name], sample) == pytest.approx(fvu_on(coder, sample), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_each_nearly_matches_it_on_other_text(
    tiny: Model, controls: dict[str, Replacement], coder: SparseCoder, name: str
) -> None:
    """Within 15 %: 4,096 tokens of one sample against as many others."""
    other = activations(tiny, 4096, 2)
    assert fvu_on(controls[name], other) == pytest.approx(fvu_on(coder, other), rel=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_and_the_dtype_is_kept(
    controls: dict[str, Replacement], sample: torch.Tensor, name: str
) -> None:
    x = sample[:32].reshape(2, 16, -1).bfloat16().requires_grad_()
    out = controls[name](x)
    assert (out.shape, out.dtype) == (x.shape, torch.bfloat16)
    out.float().pow(2).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert (x.grad.float().norm(dim=-1) > 0).all()


def test_repeatable_by_seed(coder: SparseCoder, sample: torch.Tensor) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (baselines(coder, sample[:1024], seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, control in first.items():
        out = control(sample[:64])
        assert torch.equal(out, again[name](sample[:64]))
        assert torch.equal(out, other[name](sample[:64])) == (name == "pca")


# Noise


def test_noise_is_as_long_as_the_error_of_each_token(
    coder: SparseCoder, sample: torch.Tensor
) -> None:
    x = sample[:512]
    added = Noise(coder, 0)(x) - x
    torch.testing.assert_close(
        added.norm(dim=1), (reconstruct(coder, x) - x).norm(dim=1), rtol=1e-4, atol=1e-5
    )
    # Isotropic: no direction of its own, and none of the SAE's error.
    unit = added / added.norm(dim=1, keepdim=True)
    assert unit.mean(0).norm() < 0.1
    error = reconstruct(coder, x) - x
    assert torch.cosine_similarity(unit, error).mean().abs() < 0.03


def test_noise_goes_on_and_can_begin_anew(coder: SparseCoder, sample: torch.Tensor) -> None:
    noise, x = Noise(coder, 0), sample[:8]
    first, second = noise(x), noise(x)
    assert not torch.equal(first, second)
    noise.restart()
    assert torch.equal(noise(x), first)


def test_the_gradient_of_noise_is_the_identity(coder: SparseCoder, sample: torch.Tensor) -> None:
    x = sample[:8].clone().requires_grad_()
    Noise(coder, 0)(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


# Blends


def test_blending_scales_the_fvu_by_the_square(coder: SparseCoder, sample: torch.Tensor) -> None:
    own = fvu_on(coder, sample)
    for scale in (0.5, 2.0):
        assert fvu_on(Blend(coder, scale), sample) == pytest.approx(scale**2 * own, rel=1e-4)


def test_a_control_that_is_better_is_exaggerated_and_says_so(
    coder: SparseCoder, sample: torch.Tensor
) -> None:
    own = fvu_on(coder, sample)
    better, worse = match_fvu(coder, 2 * own, sample), match_fvu(coder, own / 2, sample)
    assert better.exaggerates
    assert better.scale == pytest.approx(2**0.5)
    assert not worse.exaggerates
    assert fvu_on(better, sample) == pytest.approx(2 * own, rel=1e-4)


def test_a_perfect_control_cannot_be_matched(sample: torch.Tensor) -> None:
    with pytest.raises(BadInputError, match=r"cannot be blended to FVU 0\.1"):
        match_fvu(lambda x: x, 0.1, sample)


# PCA


def test_pca_keeps_a_part_of_the_last_component() -> None:
    """Variances 4, 2, 1, 1: an FVU of 3/8 keeps the first and half of the second's."""
    signs = torch.tensor([[(n >> i & 1) * 2.0 - 1 for i in range(4)] for n in range(16)])
    x = signs * torch.tensor([4.0, 2.0, 1.0, 1.0]).sqrt() + 3
    made = pca(x, 3 / 8)
    assert isinstance(made, Pca)
    assert made.rank == pytest.approx(1.5)
    assert fvu_on(made, x) == pytest.approx(3 / 8)
    x_hat = made(x)
    torch.testing.assert_close(x_hat[:, 0], x[:, 0])
    torch.testing.assert_close(x_hat[:, 2:], torch.full((16, 2), 3.0))


@pytest.mark.parametrize("target", [0.0, 0.03, 0.5, 1.0, 2.5])
def test_pca_reaches_any_fvu(sample: torch.Tensor, target: float) -> None:
    assert fvu_on(pca(sample, target), sample) == pytest.approx(target, rel=1e-3, abs=1e-6)


# Dictionaries


def test_random_directions_are_tied_unit_and_of_the_same_size(coder: SparseCoder) -> None:
    made = random_coder(coder, 0)
    assert made.W_dec is not None
    assert torch.equal(made.W_dec, made.encoder.weight)
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(512))
    assert (made.d_sae, made.cfg.k) == (coder.num_latents, coder.cfg.k)
    assert torch.equal(made.b_dec, coder.b_dec)
    cosines = made.W_dec @ made.W_dec.mT - torch.eye(512)
    assert cosines.mean().abs() < 0.01


def test_a_shuffled_coder_fires_as_before_and_no_row_stays(
    coder: SparseCoder, sample: torch.Tensor
) -> None:
    made = shuffled_coder(coder, 0)
    before, after = encode(coder, sample[:64]), encode(made, sample[:64])
    assert torch.equal(before.latents, after.latents)
    assert torch.equal(before.values, after.values)
    assert coder.W_dec is not None
    assert made.W_dec is not None
    assert not (made.W_dec == coder.W_dec).all(1).any()
    # The same rows, in another order.
    assert torch.equal(made.W_dec.sum(1).sort().values, coder.W_dec.sum(1).sort().values)


def test_which_controls_have_latents(controls: dict[str, Replacement], coder: SparseCoder) -> None:
    has = {name: latents_of(control) is not None for name, control in controls.items()}
    assert has == {
        "noise": False, "pca": False, "shuffled": True, "random": True, "random_weights": True,
    }  # fmt: skip
    assert latents_of(coder) is coder


def test_an_sae_is_substituted_by_its_reconstruction(
    coder: SparseCoder, sample: torch.Tensor
) -> None:
    assert torch.equal(substitute(coder, sample[:8]), reconstruct(coder, sample[:8]))


# A model of random weights


@pytest.mark.parametrize("weights", ["initial", "matched"])
def test_a_model_of_random_weights(tiny: Model, weights: str) -> None:
    state = torch.random.get_rng_state()
    made, again = (random_weights_model(tiny, 1, weights=weights) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert made.weights_hash == again.weights_hash
    assert random_weights_model(tiny, 2, weights=weights).weights_hash != made.weights_hash
    assert made.slug != tiny.slug
    assert (made.n_layers, made.d_model, made.dtype) == (tiny.n_layers, tiny.d_model, tiny.dtype)
    name = "model.layers.3.mlp.up_proj.weight"
    drawn = dict(made.model.named_parameters())[name]
    held = {n.replace("._original_component", ""): p for n, p in tiny.model.named_parameters()}
    assert torch.corrcoef(torch.stack([drawn.flatten(), held[name].flatten()]))[0, 1].abs() < 0.05
    expected = held[name].std().item() if weights == "matched" else 0.02
    assert drawn.std().item() == pytest.approx(expected, rel=0.02)
    # It is a host like any other.
    assert activations(made, 1024, 0).shape == (1024, tiny.d_model)


def test_unknown_weights_are_refused(tiny: Model) -> None:
    with pytest.raises(BadInputError, match="initial or matched"):
        random_weights_model(tiny, 0, weights="trained")


def test_an_untrained_coder_can_be_matched_too(sample: torch.Tensor) -> None:
    """An SAE that explains less than the mean: every control follows it above 1."""
    bad = new_coder(sample.shape[1], 64, 8, seed=0).requires_grad_(False)
    bad.b_dec += 1
    wanted = fvu_on(bad, sample)
    assert wanted > 1
    for control in baselines(bad, sample, 0).values():
        assert fvu_on(control, sample) == pytest.approx(wanted, rel=1e-3)
