"""The sparse coder: sparsify's `SparseCoder` and checkpoint layout, checked when loaded.

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
from safetensors import safe_open
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.models import check_safetensors, quiet

if not torch.cuda.is_available():
    # With Triton installed, sparsify's decoder would crash on CPU tensors; read at import.
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
with quiet():
    from sparsify import SparseCoder, SparseCoderConfig

__all__ = ["SparseActs", "SparseCoder", "encode", "load_coder", "new_coder", "reconstruct"]


class SparseActs(NamedTuple):
    """Active latents of a batch, row by row."""

    rows: Int[Tensor, " active"]
    latents: Int[Tensor, " active"]
    values: Float[Tensor, " active"]
    n_rows: int
    d_sae: int


def _topk(coder: SparseCoder, x: Float[Tensor, "row d_in"]) -> SparseActs:
    """Z = TopK(ReLU(W_enc (x - b_dec) + b_enc)) (paper eq. 3, with sparsify's ReLU)."""
    found = coder.encode(x)
    active = found.top_acts > 0
    rows = active.nonzero()[:, 0]
    return SparseActs(
        rows, found.top_indices[active], found.top_acts[active], x.shape[0], coder.num_latents
    )


ACTIVATIONS: dict[str, Callable[[SparseCoder, Tensor], SparseActs]] = {"topk": _topk}
"""Activation functions by the name in cfg.json; BatchTopK and others register here."""


@torch.no_grad()
def encode(coder: SparseCoder, x: Float[Tensor, "row d_in"]) -> SparseActs:
    """Return the active latents of each row, without gradients."""
    return ACTIVATIONS[coder.cfg.activation](coder, x.to(coder.dtype))


def reconstruct(
    coder: SparseCoder, x: Float[Tensor, "*shape d_in"]
) -> Float[Tensor, "*shape d_in"]:
    """Return x~ = W_dec z + b_dec in the dtype of x; gradients flow to x unless disabled."""
    flat = x.reshape(-1, x.shape[-1]).to(coder.dtype)
    found = coder.encode(flat)
    return coder.decode(found.top_acts, found.top_indices).reshape(x.shape).to(x.dtype)


def new_coder(d_in: int, latents: int, k: int, *, seed: int, device: str = "cpu") -> SparseCoder:
    """Return an untrained coder, its decoder of unit norm, deterministic by seed.

    Raises:
        BadInputError: the sizes make no sense.
    """
    if latents < 1 or not 1 <= k <= latents:
        raise BadInputError(f"k {k} with {latents} latents: k must be 1 to the number of latents")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        coder = SparseCoder(d_in, SparseCoderConfig(num_latents=latents, k=k))
    return coder.to(device)


def load_coder(
    folder: Path, *, device: str = "cpu", d_in: int | None = None, decoder: bool = True
) -> SparseCoder:
    """Load one sparsify checkpoint, frozen.

    Args:
        folder: holds cfg.json and sae.safetensors.
        device: where to put it.
        d_in: the width it must have, or None.
        decoder: False loads the encoder alone, which counting needs.

    Raises:
        BadInputError: missing, damaged, incomplete, not finite, or of another width.
    """
    config, weights = folder / "cfg.json", folder / "sae.safetensors"
    for file in (config, weights):
        if not file.exists():
            raise BadInputError(f"SAE {folder} lacks {file.name}")
    try:
        values: dict[str, Any] = json.loads(config.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"{config} is damaged: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("d_in"), int):
        raise BadInputError(f"{config} has no d_in; it is not a sparsify checkpoint")
    if d_in is not None and values["d_in"] != d_in:
        raise BadInputError(
            f"SAE {folder} has width {values['d_in']}, the model's is {d_in}; "
            "use an SAE that was trained on this model"
        )
    activation = values.get("activation", "topk")
    if activation not in ACTIVATIONS:
        raise BadInputError(
            f"SAE {folder} has activation {activation!r}; readable: {', '.join(ACTIVATIONS)}"
        )
    if values.get("transcode") or values.get("skip_connection"):
        raise BadInputError(f"SAE {folder} is a transcoder; an autoencoder is needed")
    check_safetensors(weights)
    with safe_open(weights, framework="pt") as stream:
        present = set(stream.keys())
    if missing := {"encoder.weight", "encoder.bias", "W_dec", "b_dec"} - present:
        raise BadInputError(f"SAE {folder} lacks the tensor {sorted(missing)[0]}")
    try:
        coder = SparseCoder.load_from_disk(folder, device=device, decoder=decoder)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        # torch's first line is only a heading; the last one names the tensor and the sizes.
        detail = str(error).strip().splitlines()[-1].strip()[:200]
        raise BadInputError(f"SAE {folder}: {detail}") from error
    if not isinstance(coder.cfg.k, int) or not 1 <= coder.cfg.k <= coder.num_latents:
        raise BadInputError(
            f"SAE {folder} has k {coder.cfg.k!r}; k must be 1 to its {coder.num_latents} latents"
        )
    for name, value in coder.named_parameters():
        if not torch.isfinite(value).all():
            raise BadInputError(f"SAE {folder}: {name} holds values that are not finite")
    return coder.requires_grad_(False)
