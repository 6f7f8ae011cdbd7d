"""sparsify's layout: <hookpoint>/{cfg.json, sae.safetensors}; also the workspace's own.

BatchTopK, Mutual Choice and Feature Choice, which sparsify has not, are written by
`Coder.save_to_disk` into the workspace with the key `threshold` (Feature Choice with the tensor of
that name); they are read here, and refused when sparsify's format is asked for by name.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import LLAMA, Hookpoint, Names
from resa_lens.saes.coder import Coder, SparseCoder
from resa_lens.saes.formats.common import (
    Options,
    Parts,
    check_width,
    hookpoint_of,
    read_config,
    read_tensors,
)

FILES = ("cfg.json", "sae.safetensors")
ENCODER = {"encoder.weight", "encoder.bias", "b_dec", "threshold"}
SWITCHES = ("normalize_decoder", "multi_topk", "transcode", "skip_connection", "k", "threshold",
            "num_latents", "expansion_factor", "d_in")  # fmt: skip
"""Of training, or looked at here; another one that is on would change what the SAE computes."""
EACH = "each"
"""In place of a number in the key `threshold`: the file holds one a latent."""


def read(folder: Path, options: Options) -> Parts:
    """Read a checkpoint; num_latents 0 means expansion_factor x d_in, as sparsify has it."""
    file = folder / FILES[0]
    values = read_config(file)
    d_in = values.get("d_in")
    if not isinstance(d_in, int):
        raise BadInputError(f"{file} has no d_in; it is not a sparsify checkpoint")
    check_width(folder, d_in, options.d_in)
    if values.get("transcode") or values.get("skip_connection"):
        raise BadInputError(f"SAE {folder} is a transcoder; an autoencoder is needed")
    if other := [k for k, v in values.items() if v is True and k not in SWITCHES]:
        raise BadInputError(
            f"SAE {folder} has {other[0]} true, which is not honoured here; use an SAE without it"
        )
    latents = values.get("num_latents", 0)
    factor = values.get("expansion_factor", 32)
    if not isinstance(latents, int) or not isinstance(factor, int):
        raise BadInputError(
            f"SAE {folder}: num_latents {latents!r} and expansion_factor {factor!r} must be numbers"
        )
    latents = latents or factor * d_in
    if latents < 1:
        raise BadInputError(
            f"SAE {folder} has num_latents {values.get('num_latents', 0)} and expansion_factor "
            f"{factor}: no latents"
        )
    matrix = (latents, d_in)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": matrix, "encoder.bias": (latents,), "W_dec": matrix,
    }  # fmt: skip
    if values.get("threshold") == EACH:
        shapes["threshold"] = (latents,)
    tensors = read_tensors(
        folder / FILES[1], {**shapes, "b_dec": (d_in,)}, options, encoder=ENCODER
    )
    activation = values.get("activation", "topk")
    threshold = tensors.pop("threshold", values.get("threshold", 0.0))
    return Parts(tensors, values.get("k", options.k), activation, threshold)


def write(coder: SparseCoder, folder: Path, point: Hookpoint | None, names: Names = LLAMA) -> None:
    """Write a TopK coder as sparsify does."""
    if coder.cfg.activation != "topk":
        raise BadInputError(
            f"sparsify has no activation {coder.cfg.activation!r}; convert it to saelens"
            + (
                ""
                if isinstance(getattr(coder, "threshold", 0.0), Tensor)
                else " or dictionary_learning"
            )
        )
    Coder.save_to_disk(coder, folder)  # pyright: ignore[reportArgumentType]


def hookpoint(folder: Path, names: Names) -> Hookpoint | None:
    """Return the hookpoint that is the folder's name."""
    return hookpoint_of(folder, names)
