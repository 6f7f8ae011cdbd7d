"""The hand-made step against autograd: sparsify's own forward, and dense formulas."""

from __future__ import annotations

import pytest
import torch
from schedulefree import ScheduleFreeWrapper
from sparsify.sign_sgd import SignSGD

from resa_lens.saes.coder import Coder, new_coder
from resa_lens.saes.optim import Adam, Signum, rate_at
from resa_lens.saes.step import Loss, forward_step, gradients, total_variance

NAMES = ("W_dec", "encoder.weight", "encoder.bias", "b_dec")


def made(d_in: int = 12, latents: int = 40, k: int = 5, **options: str) -> Coder:
    coder = new_coder(d_in, latents, k, seed=1, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        coder.encoder.bias.copy_(0.1 * torch.randn(latents, generator=generator))
        coder.b_dec.copy_(0.3 * torch.randn(d_in, generator=generator))
    return coder


def rows(count: int = 30, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 0.5


def by_hand(coder: Coder, x: torch.Tensor, loss: Loss, **options: object):
    step = forward_step(coder, x, loss, **options)  # pyright: ignore[reportArgumentType]
    return step, {name: value.clone() for name, value in gradients(coder, step)}


def by_autograd(coder: Coder, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients by autograd, the decoder's without its part along the decoder."""
    coder.zero_grad()
    value.backward()
    coder.remove_gradient_parallel_to_decoder_directions()
    found = {name: coder.get_parameter(name).grad for name in NAMES}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def dense(coder: Coder, x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, reconstruction) with every latent in a dense matrix, differentiable."""
    pre = torch.relu((x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias)
    top = pre.topk(k, dim=1)
    z = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    assert coder.W_dec is not None
    return pre, z @ coder.W_dec + coder.b_dec


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs) == set(NAMES)
    for name in NAMES:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5, msg=name)


def test_loss_and_gradients_are_sparsifys() -> None:
    coder, x = made(), rows()
    step, ours = by_hand(coder, x, Loss())
    out = coder(x)
    torch.testing.assert_close(step.fvu, out.fvu)
    close(ours, by_autograd(coder, out.fvu))
    fired = torch.zeros(40, dtype=torch.bool)
    fired[out.latent_indices[out.latent_acts > 0]] = True
    assert torch.equal(step.fired, fired)


def test_multi_topk_equals_the_dense_formula() -> None:
    """With a gradient to the encoder, which sparsify 1.3.3 does not send."""
    coder, x = made(), rows()
    step, ours = by_hand(coder, x, Loss(multi_topk=True))
    variance = total_variance(x)
    one = (x - dense(coder, x, 5)[1]).pow(2).sum() / variance
    four = (x - dense(coder, x, 20)[1]).pow(2).sum() / variance
    torch.testing.assert_close(step.multi_topk, four)
    torch.testing.assert_close(step.multi_topk, coder_multi(coder, x))
    close(ours, by_autograd(coder, one + four / 8))


def coder_multi(coder: Coder, x: torch.Tensor) -> torch.Tensor:
    coder.cfg.multi_topk = True
    try:
        return coder(x).multi_topk_fvu.detach()
    finally:
        coder.cfg.multi_topk = False


@pytest.mark.parametrize("n_dead", [3, 12])
def test_auxk_equals_the_dense_formula(n_dead: int) -> None:
    """Fewer and more dead latents than d_in / 2; the encoder gets its gradient."""
    coder, x = made(), rows()
    dead = torch.zeros(40, dtype=torch.bool)
    dead[torch.randperm(40, generator=torch.Generator().manual_seed(3))[:n_dead]] = True
    step, ours = by_hand(coder, x, Loss(auxk_alpha=0.25), dead=dead)
    pre, rebuilt = dense(coder, x, 5)
    variance = total_variance(x)
    error = x - rebuilt
    k = min(6, n_dead)
    top = torch.where(dead, pre, 0).topk(k, dim=1)
    z = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    assert coder.W_dec is not None
    auxk = min(n_dead / 6, 1) * (z @ coder.W_dec - error.detach()).pow(2).sum() / variance
    torch.testing.assert_close(step.auxk, auxk.detach())
    torch.testing.assert_close(step.auxk, coder(x, dead_mask=dead).auxk_loss.detach())
    close(ours, by_autograd(coder, error.pow(2).sum() / variance + 0.25 * auxk))
    alone = by_hand(coder, x, Loss())[1]
    assert not torch.allclose(ours["encoder.weight"], alone["encoder.weight"])


def test_auxk_without_dead_latents_is_nothing() -> None:
    coder, x = made(), rows()
    none = torch.zeros(40, dtype=torch.bool)
    step, ours = by_hand(coder, x, Loss(auxk_alpha=0.25), dead=none)
    assert step.auxk == 0
    close(ours, by_hand(coder, x, Loss())[1])


def test_batchtopk_equals_the_dense_formula() -> None:
    coder, x = made(activation="batchtopk"), rows()
    step, ours = by_hand(coder, x, Loss())
    pre = torch.relu((x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias)
    top = pre.flatten().topk(5 * 30)
    z = torch.zeros(30 * 40).scatter(0, top.indices, top.values).view(30, 40)
    assert coder.W_dec is not None
    error = x - z @ coder.W_dec - coder.b_dec
    fvu = error.pow(2).sum() / total_variance(x)
    torch.testing.assert_close(step.fvu, fvu.detach())
    close(ours, by_autograd(coder, fvu))
    counts = torch.bincount(step.terms[0].active.rows, minlength=30)
    assert counts.sum() == 150
    assert counts.unique().numel() > 1


def test_rows_without_any_active_latent() -> None:
    coder, x = made(), rows()
    with torch.no_grad():
        coder.encoder.bias.fill_(-100)
    step, ours = by_hand(coder, x, Loss(multi_topk=True))
    assert not step.fired.any()
    assert ours["W_dec"].abs().sum() == 0
    assert ours["b_dec"].abs().sum() > 0


# Optimizers


def parameters() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 5, generator=generator, dtype=torch.float64),
        "vector": torch.randn(7, generator=generator, dtype=torch.float64),
    }


def steps(count: int = 25) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
            for name, value in parameters().items()
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_signum_is_schedulefrees_wrapper_over_sparsifys_sign_descent(schedule: str) -> None:
    ours, theirs = parameters(), parameters()
    inner = SignSGD(theirs.values(), lr=1e-2)
    wrapper = ScheduleFreeWrapper(inner, momentum=0.95)
    wrapper.train()
    signum = Signum(ours)
    for number, gradient in enumerate(steps()):
        rate = rate_at(number, 25, 1e-2, schedule, 5)
        signum.begin(rate)
        inner.param_groups[0]["lr"] = rate
        for name, value in gradient.items():
            signum.update(name, value.clone())
            theirs[name].grad = value.clone()
        wrapper.step()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], atol=1e-12, rtol=0)
    wrapper.eval()
    signum.finish()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-12, rtol=0)


def test_adam_is_torchs() -> None:
    ours, theirs = parameters(), parameters()
    plain = torch.optim.Adam(theirs.values(), lr=1e-2)
    adam = Adam(ours)
    for gradient in steps():
        adam.begin(1e-2)
        for name, value in gradient.items():
            adam.update(name, value.clone())
            theirs[name].grad = value.clone()
        plain.step()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", [Signum, Adam])
def test_optimizer_goes_on_from_its_state(kind: type[Signum] | type[Adam]) -> None:
    whole, begun = parameters(), parameters()
    first, second = kind(whole), kind(begun)
    for optimizer, params, part in ((first, whole, steps()), (second, begun, steps()[:10])):
        for gradient in part:
            optimizer.begin(1e-2)
            for name in params:
                optimizer.update(name, gradient[name].clone())
    again = {name: value.clone() for name, value in begun.items()}
    third = kind(again)
    for name, value in second.tensors().items():
        third.tensors()[name].copy_(value)
    third.load_scalars(second.scalars())
    for gradient in steps()[10:]:
        third.begin(1e-2)
        for name in again:
            third.update(name, gradient[name].clone())
    first.finish()
    third.finish()
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name


def test_rates() -> None:
    assert [rate_at(s, 10, 1.0, "constant", 0) for s in (0, 9)] == [1.0, 1.0]
    assert [rate_at(s, 10, 1.0, "linear", 4) for s in (0, 3, 4)] == [0.25, 1.0, 1.0]
    assert rate_at(7, 10, 1.0, "linear", 4) == pytest.approx(0.5)
    assert rate_at(7, 10, 1.0, "cosine", 4) == pytest.approx(0.5)
    assert rate_at(10, 10, 1.0, "cosine", 4) == pytest.approx(0.0)
