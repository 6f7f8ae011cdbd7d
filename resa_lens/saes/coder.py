"""The sparse coder: sparsify's `SparseCoder` and checkpoint layout, on this project's kernels.

What it gives for a batch of activations is ragged: a list of (row, latent, value), because not
every activation function has the same number of active latents in each row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from resa_lens.errors import BadInputError
from resa_lens.models.bridge import quiet
from resa_lens.saes.allocation import feature_choice
from resa_lens.saes.kernels import pair_dots, row_starts, weighted_rows
from resa_lens.saes.select import Active, Encoder, above, batch_topk, half_precision, topk

if not torch.cuda.is_available():
    # With Triton installed, sparsify's decoder would crash on CPU tensors; read at import.
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
with quiet():
    from sparsify import SparseCoder, SparseCoderConfig

__all__ = [
    "ACTIVATIONS",
    "Coder",
    "SparseActs",
    "SparseCoder",
    "decode",
    "encode",
    "encoder_of",
    "new_coder",
    "reconstruct",
]


class SparseActs(NamedTuple):
    """Active latents of a batch, row by row."""

    rows: Int[Tensor, " active"]
    latents: Int[Tensor, " active"]
    values: Float[Tensor, " active"]
    n_rows: int
    d_sae: int

    @property
    def starts(self) -> Int[Tensor, " n_rows+1"]:
        """Where each row begins, and the end."""
        return row_starts(self.rows, self.n_rows)


class Coder(SparseCoder):
    """sparsify's coder with the activations of `ACTIVATIONS`; the same parameters and files.

    sparsify reads its checkpoints where the activation is "topk"; the others, which sparsify has
    not, add the key `threshold` to cfg.json, and feature-choice the tensor of that name.
    """

    def __init__(
        self,
        d_in: int,
        cfg: SparseCoderConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        decoder: bool = True,
        threshold: float | Tensor = 0.0,
    ) -> None:
        super().__init__(d_in, cfg, device, dtype, decoder=decoder)
        self.threshold = threshold
        """Of BatchTopK: a latent is active above it, once training is over; of JumpReLU and Feature
        Choice one a latent."""
        self.stored = "float32"
        """The floating type of its file."""
        self.states_k = True
        """Whether k is the file's, and no placeholder of a JumpReLU."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(self.num_latents)

    def config(self) -> dict[str, Any]:
        """Return what cfg.json holds."""
        values = {**self.cfg.to_dict(), "d_in": self.d_in}
        each = isinstance(self.threshold, Tensor)
        threshold = "each" if each else self.threshold
        return {**values, "threshold": threshold} if self.cfg.activation != "topk" else values

    def save_to_disk(self, path: Path | str) -> None:
        """Write cfg.json and sae.safetensors (encoder.weight, encoder.bias, W_dec, b_dec)."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        if isinstance(self.threshold, Tensor):
            state["threshold"] = self.threshold.cpu()
        save_file(state, folder / "sae.safetensors")
        (folder / "cfg.json").write_text(json.dumps(self.config()))


def assemble(
    tensors: dict[str, Tensor],
    *,
    k: int,
    activation: str = "topk",
    threshold: float | Tensor = 0.0,
    device: str = "cpu",
) -> Coder:
    """Make a frozen coder of its tensors, in sparsify's names and orientation.

    Args:
        tensors: encoder.weight [d_sae, d_in], encoder.bias [d_sae], b_dec [d_in], and W_dec
            [d_sae, d_in] unless only the encoder is wanted.
        k: active latents a row.
        activation: a name in `ACTIVATIONS`.
        threshold: of BatchTopK; of JumpReLU and Feature Choice [d_sae].
        device: where it is put.
    """
    latents, d_in = tensors["encoder.weight"].shape
    cfg = SparseCoderConfig(
        activation=activation,  # pyright: ignore[reportArgumentType]
        num_latents=latents,
        k=k,
    )
    # On the meta device nothing is allocated or drawn: the tensors are put in as they are.
    coder = Coder(d_in, cfg, "meta", decoder="W_dec" in tensors, threshold=threshold)
    parameters = {name: nn.Parameter(value.to(device), False) for name, value in tensors.items()}
    coder.load_state_dict(parameters, assign=True)
    return coder.requires_grad_(False)


def new_coder(
    d_in: int, latents: int, k: int, *, seed: int, device: str = "cpu", activation: str = "topk"
) -> Coder:
    """Return an untrained coder, its decoder of unit norm, deterministic by seed.

    Raises:
        BadInputError: the sizes make no sense, or the activation is unknown.
    """
    if latents < 1 or not 1 <= k <= latents:
        raise BadInputError(f"k {k} with {latents} latents: k must be 1 to the number of latents")
    if activation not in ACTIVATIONS:
        raise BadInputError(f"activation {activation!r} is unknown; use {', '.join(ACTIVATIONS)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cfg = SparseCoderConfig(
            activation=activation,  # pyright: ignore[reportArgumentType]
            num_latents=latents,
            k=k,
        )
        coder = Coder(d_in, cfg)
    return coder.to(device)


class Activation(NamedTuple):
    """An activation function: how it selects while training, and afterwards."""

    train: Callable[[Encoder, Tensor, int], Active]
    infer: Callable[[Encoder, Tensor, SparseCoder], Active]


def _infer_topk(encoder: Encoder, x: Tensor, coder: SparseCoder) -> Active:
    return topk(encoder, x, coder.cfg.k)


def _infer_threshold(encoder: Encoder, x: Tensor, coder: SparseCoder) -> Active:
    return above(encoder, x, getattr(coder, "threshold", 0.0))


def _train_feature_choice(encoder: Encoder, x: Tensor, k: int) -> Active:
    return feature_choice(encoder, x, k).active


BATCH_TOPK = Activation(batch_topk, _infer_threshold)
ACTIVATIONS: dict[str, Activation] = {
    "topk": Activation(topk, _infer_topk),
    "batchtopk": BATCH_TOPK,
    "mutual-choice": BATCH_TOPK,
    "feature-choice": Activation(_train_feature_choice, _infer_threshold),
}
"""Activation functions by the name in cfg.json.  Mutual Choice (arXiv 2411.02124) and BatchTopK
(arXiv 2412.06410) are two names of one computation: the k x N largest of a batch of N tokens, and
one threshold afterwards.  After training both of them and Feature Choice are functions of a token
alone."""


def encoder_of(coder: SparseCoder, *, exact: bool = False) -> Encoder:
    """Return the encoder as the selection needs it, to encode many batches with one coder.

    Args:
        coder: the SAE.
        exact: as in `encode`.
    """
    weight, bias = coder.encoder.weight, coder.encoder.bias
    return Encoder(weight, bias, None if exact else half_precision(weight, bias))


@torch.no_grad()
def encode(
    coder: SparseCoder,
    x: Float[Tensor, "row d_in"],
    *,
    exact: bool = True,
    prepared: Encoder | None = None,
) -> SparseActs:
    """Return the active latents of each row, without gradients.

    Args:
        coder: the SAE.
        x: activations.
        exact: take the product in the weights' precision.  Without it candidates are found in
            bfloat16 where that is faster, and their values computed exactly (see select.py).
        prepared: the coder's `encoder_of`, in place of `exact`.
    """
    encoder = prepared or encoder_of(coder, exact=exact)
    centred = x.to(encoder.weight.dtype) - coder.b_dec
    acts = ACTIVATIONS[coder.cfg.activation].infer(encoder, centred, coder)
    return SparseActs(*acts, x.shape[0], coder.num_latents)


@torch.no_grad()
def decode(coder: SparseCoder, acts: SparseActs) -> Float[Tensor, "row d_in"]:
    """Return x~ = W_dec z + b_dec, without gradients."""
    assert coder.W_dec is not None, "the coder was loaded without its decoder"
    return weighted_rows(coder.W_dec, acts.starts, acts.latents, acts.values) + coder.b_dec


class _Reconstruct(torch.autograd.Function):
    """A frozen SAE as a function of x; the gradient goes through the active latents only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coder: SparseCoder) -> Tensor:
        acts = encode(coder, x)
        ctx.coder, ctx.acts = coder, acts
        return decode(coder, acts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        coder, acts = ctx.coder, ctx.acts
        starts = acts.starts
        slope = pair_dots(grads[0].contiguous(), coder.W_dec, starts, acts.latents)
        return weighted_rows(coder.encoder.weight, starts, acts.latents, slope), None


def reconstruct(
    coder: SparseCoder, x: Float[Tensor, "*shape d_in"]
) -> Float[Tensor, "*shape d_in"]:
    """Return x~ = W_dec z + b_dec in the dtype of x; gradients flow to x unless disabled."""
    flat = x.reshape(-1, x.shape[-1]).to(coder.dtype)
    output: Any = _Reconstruct.apply(flat, coder)
    return output.reshape(x.shape).to(x.dtype)
