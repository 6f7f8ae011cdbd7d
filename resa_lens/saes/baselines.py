"""Controls that stand where an SAE stands, matched in FVU to it (spec section 7).

A random dictionary disturbs a model more than a trained SAE does, so any difference between the two
may be one of size.  Each control here leaves the same fraction of variance unexplained as the given
SAE, on a sample of its activations; what differs is what the error consists of:

- `noise`: isotropic, each token's error as long as the SAE's own;
- `pca`: the smallest principal components, one of them in part;
- `shuffled`: the SAE's own encoder, each latent with another latent's decoder row;
- `random`: random directions, encoder and decoder tied;
- `random_weights`: an SAE trained on the same architecture with random weights, if one is given.

The last three are blended to the FVU: x~ = x + a (inner(x) - x) has a^2 times the FVU of `inner`.
With a < 1 a part of x goes around the dictionary: matched to an FVU of 0.01, a is about 0.1, and
what is tested is an error of that dictionary's kind, not the dictionary alone.  a > 1 exaggerates
the error of a control that is better than the SAE (`Blend.exaggerates`).  On text unlike the sample
an SAE's FVU rises more than a blend's; only `noise` follows it token by token.
"""

from __future__ import annotations

import hashlib
import math
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from resa_lens.errors import BadInputError
from resa_lens.machine.determinism import cumulative_sum
from resa_lens.models.bridge import plain_name
from resa_lens.models.host import Model
from resa_lens.saes.coder import Coder, SparseCoder, new_coder, reconstruct

CHUNK = 1024
"""Rows that go through a control at once while it is matched."""
WEIGHTS = ("initial", "matched")


@runtime_checkable
class Replacement(Protocol):
    """What replaces activations: the same shape and dtype, differentiable in x."""

    def __call__(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_in"]:
        """Return what stands in place of x."""
        ...


def substitute(
    inner: SparseCoder | Replacement, x: Float[Tensor, "*shape d_in"]
) -> Float[Tensor, "*shape d_in"]:
    """Return what an SAE or a control puts in place of x; gradients flow to x unless disabled."""
    # An SAE is a module too; called, it gives sparsify's tuple.
    if isinstance(inner, SparseCoder):
        return reconstruct(inner, x)
    return inner(x)


def latents_of(inner: SparseCoder | Replacement) -> SparseCoder | None:
    """Return the coder whose latents can be counted, or None for a control that has none."""
    if isinstance(inner, SparseCoder):
        return inner
    return latents_of(inner.inner) if isinstance(inner, Blend) else None


class Blend(nn.Module):
    """x~ = x + a (inner(x) - x): the error of `inner`, a times as long."""

    def __init__(self, inner: SparseCoder | Replacement, scale: float) -> None:
        super().__init__()
        self.inner = inner
        self.scale = scale

    @property
    def exaggerates(self) -> bool:
        """Whether the error had to be lengthened: `inner` is better than what it is matched to."""
        return self.scale > 1

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_in"]:
        """Return the blend, in the dtype of x."""
        full = x.float()
        return (full + self.scale * (substitute(self.inner, full) - full)).to(x.dtype)


class Noise(nn.Module):
    """x~ = x + n, n isotropic and as long as the SAE's error on the same token.

    The gradient in x is the identity: neither the direction nor the length of n is differentiated.
    The draws follow the seed and the number of calls; `restart` begins anew.
    """

    def __init__(self, coder: SparseCoder, seed: int) -> None:
        super().__init__()
        self.coder = coder
        self.seed = seed
        self.generator = torch.Generator()
        self.restart()

    def restart(self) -> None:
        """Go back to the first draw."""
        self.generator.manual_seed(self.seed)

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_in"]:
        """Return x with noise, in the dtype of x."""
        full = x.detach().float()
        with torch.no_grad():
            length = (reconstruct(self.coder, full) - full).norm(dim=-1, keepdim=True)
            # Drawn on the CPU, so that every device gets the same.
            drawn = torch.randn(full.shape, generator=self.generator).to(x.device)
            noise = drawn * (length / drawn.norm(dim=-1, keepdim=True))
        return (x.float() + noise).to(x.dtype)


class Pca(nn.Module):
    """x~ = mean + sum over components of weight (x - mean, v) v; the last one kept in part."""

    mean: Tensor
    components: Tensor
    weights: Tensor

    def __init__(
        self,
        mean: Float[Tensor, " d_in"],
        components: Float[Tensor, "component d_in"],
        weights: Float[Tensor, " component"],
    ) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("components", components), ("weights", weights)):
            self.register_buffer(name, value)

    @property
    def rank(self) -> float:
        """Number of components, the last one as the share of its variance that is kept."""
        count = self.weights.numel()
        return count - (1 - self.weights[-1].item()) ** 2 if count else 0.0

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_in"]:
        """Return the projection, in the dtype of x."""
        along = (x.float() - self.mean) @ self.components.mT * self.weights
        return (along @ self.components + self.mean).to(x.dtype)


@torch.no_grad()
def fvu_on(inner: SparseCoder | Replacement, x: Float[Tensor, "row d_in"]) -> float:
    """Return sum |x - x~|^2 / sum |x - mean(x)|^2 over the rows."""
    mean = x.double().mean(0)
    error = variance = 0.0
    for part in x.split(CHUNK):
        full = part.float()
        error += (substitute(inner, full).double() - full.double()).pow(2).sum().item()
        variance += (full.double() - mean).pow(2).sum().item()
    return error / max(variance, 1e-12)


def match_fvu(
    inner: SparseCoder | Replacement,
    target: SparseCoder | Replacement | float,
    x: Float[Tensor, "row d_in"],
) -> Blend:
    """Blend a control with x so that it leaves as much variance as the target does on the rows.

    Args:
        inner: the control.
        target: what it is matched to, or an FVU.
        x: a sample of activations.

    Raises:
        BadInputError: the control is perfect or not finite here, so no blend reaches the target.
    """
    fvu = target if isinstance(target, int | float) else fvu_on(target, x)
    own = fvu_on(inner, x)
    if not (math.isfinite(own) and own > 0 and math.isfinite(fvu)):
        raise BadInputError(
            f"a control with FVU {own:.3g} cannot be blended to FVU {fvu:.3g}; "
            "use another sample of activations"
        )
    return Blend(inner, math.sqrt(fvu / own))


def random_coder(coder: SparseCoder, seed: int) -> Coder:
    """Return a coder of the same size, k and b_dec with random unit directions, tied, top-k.

    Its FVU is its own, usually above 1: the projections on many directions overlap.
    """
    assert coder.num_latents is not None
    random = new_coder(coder.d_in, coder.num_latents, coder.cfg.k, seed=seed)
    drawn = torch.randn(coder.num_latents, coder.d_in, generator=_generator(seed))
    drawn /= drawn.norm(dim=1, keepdim=True)
    assert random.W_dec is not None
    with torch.no_grad():
        random.W_dec.copy_(drawn)
        random.encoder.weight.copy_(drawn)
        random.encoder.bias.zero_()
        random.b_dec.copy_(coder.b_dec)
    return random.to(coder.device).requires_grad_(False)


def shuffled_coder(coder: SparseCoder, seed: int) -> SparseCoder:
    """Return the coder with every decoder row at another latent; its latents fire as before."""
    assert coder.W_dec is not None
    count = coder.W_dec.shape[0]
    # Along one random cycle no row keeps its place.
    cycle = torch.randperm(count, generator=_generator(seed))
    place = torch.empty_like(cycle)
    place[cycle] = cycle.roll(1)
    shuffled = deepcopy(coder).requires_grad_(False)
    assert shuffled.W_dec is not None
    shuffled.W_dec.copy_(coder.W_dec[place.to(coder.W_dec.device)])
    return shuffled


@torch.no_grad()
def pca(x: Float[Tensor, "row d_in"], target: SparseCoder | Replacement | float) -> Pca | Blend:
    """Return the principal components of the rows that leave as much variance as the target.

    The rank is the whole number of components and a part of the next: the error is then exactly the
    target's on the rows.  On other rows it is larger the fewer rows there were for each dimension.
    A target that explains less than the mean is reached by lengthening the error of rank 0.
    """
    fvu = target if isinstance(target, int | float) else fvu_on(target, x)
    mean = x.double().mean(0)
    centred = x.double() - mean
    values, vectors = torch.linalg.eigh(centred.mT @ centred)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    left = values.sum() - torch.cat([values.new_zeros(1), cumulative_sum(values, 0)])
    allowed = fvu * values.sum()
    # The last whole component is the one after which more is left than allowed.
    whole = int((left > allowed).sum())
    if whole == 0 and fvu > 1:
        nothing = Pca(mean.float(), x.new_zeros(0, x.shape[1]).float(), x.new_zeros(0).float())
        return match_fvu(nothing, fvu, x)
    rank = min(whole, values.numel())
    weights = torch.ones(rank, dtype=torch.double, device=x.device)
    if rank:
        part = (allowed - left[rank]).clamp_min(0) / values[rank - 1].clamp_min(1e-300)
        weights[-1] = 1 - part.clamp_max(1).sqrt()
    return Pca(mean.float(), vectors[:, :rank].mT.float().contiguous(), weights.float())


def baselines(
    coder: SparseCoder,
    sample: Float[Tensor, "row d_in"],
    seed: int,
    *,
    random_weights: SparseCoder | None = None,
) -> dict[str, Replacement]:
    """Return every control, matched in FVU to an SAE on a sample of activations at its place.

    Args:
        coder: the SAE.
        sample: activations, several times as many rows as dimensions (PCA is fitted on them).
        seed: of the random directions, the permutation and the noise.
        random_weights: an SAE of the same size, trained on `random_weights_model`.

    Returns:
        By name: noise, pca, shuffled, random, and random_weights if it is given.
    """
    fvu = fvu_on(coder, sample)
    replacements: dict[str, Replacement] = {
        "noise": Noise(coder, seed),
        "pca": pca(sample, fvu),
        "shuffled": match_fvu(shuffled_coder(coder, seed), fvu, sample),
        "random": match_fvu(random_coder(coder, seed), fvu, sample),
    }
    if random_weights is not None:
        replacements["random_weights"] = match_fvu(random_weights, fvu, sample)
    return replacements


def random_model_name(model: Model, seed: int, weights: str) -> str:
    """Return the name of `random_weights_model`'s model, which need not be made for it."""
    return f"{model.name.rstrip('/').split('/')[-1]}-random-{weights}-{seed}"


def random_weights_model(model: Model, seed: int, *, weights: str = "initial") -> Model:
    """Return the same architecture with random weights, to train an SAE on.

    Args:
        model: its configuration, tokenizer, device and dtype are taken; it stays as it is.
        seed: of the weights.
        weights: "initial", drawn as before a training, or "matched": every matrix drawn from a
            Gaussian with the mean and standard deviation of the trained one and the vectors kept,
            so that activations have a trained model's scale.  (SAEs find "interpretable" latents
            in random transformers too: arXiv 2501.17727.)

    Raises:
        BadInputError: `weights` is unknown.
    """
    if weights not in WEIGHTS:
        raise BadInputError(f"weights {weights!r} are unknown; use {' or '.join(WEIGHTS)}")
    source: Any = model.model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network: Any = AutoModelForCausalLM.from_config(deepcopy(source.config), dtype=source.dtype)
    if weights == "matched":
        _match_moments(network, source, seed)
    network = network.to(model.device).eval()
    return Model(
        name=random_model_name(model, seed, weights),
        model=network,
        tokenizer=model.tokenizer,
        folder=model.folder,
        weights_hash=_hash_state(network),
        device=model.device,
        dtype=model.dtype,
        reason=model.reason,
        parts=dict(model.parts),
    )


@torch.no_grad()
def _match_moments(made: Any, source: Any, seed: int) -> None:
    originals = {plain_name(n): p for n, p in source.named_parameters()}
    generator = _generator(seed)
    for name, parameter in made.named_parameters():
        trained = originals[name].float()
        if trained.ndim < 2:
            parameter.copy_(trained)
            continue
        drawn = torch.randn(trained.shape, generator=generator)
        parameter.copy_(drawn * trained.std().cpu() + trained.mean().cpu())


def _hash_state(made: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(made.state_dict().items()):
        digest.update(name.encode())
        digest.update(memoryview(value.detach().cpu().float().contiguous().numpy()).cast("B"))
    return digest.hexdigest()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
