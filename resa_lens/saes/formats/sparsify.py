"""sparsify's layout: <hookpoint>/{cfg.json, sae.safetensors}; also the workspace's own.

BatchTopK, which sparsify has not, is written by `Coder.save_to_disk` into the workspace with the
key `threshold`; it is read here, and refused when sparsify's format is asked for by name.
"""

from __future__ import annotations

from pathlib import Path

from resa_lens.errors import BadInputError
from resa_lens.hookpoints import Hookpoint, parse_hookpoint
from resa_lens.saes.coder import Coder, SparseCoder
from resa_lens.saes.formats.common import Options, Parts, check_width, read_config, read_tensors

FILES = ("cfg.json", "sae.safetensors")
ENCODER = {"encoder.weight", "encoder.bias", "b_dec"}


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
    shapes = {"encoder.weight": matrix, "encoder.bias": (latents,), "W_dec": matrix}
    tensors = read_tensors(
        folder / FILES[1], {**shapes, "b_dec": (d_in,)}, options, encoder=ENCODER
    )
    activation, threshold = values.get("activation", "topk"), values.get("threshold", 0.0)
    return Parts(tensors, values.get("k", options.k), activation, threshold)


def write(coder: SparseCoder, folder: Path, point: Hookpoint | None) -> None:
    """Write a TopK coder as sparsify does."""
    if coder.cfg.activation != "topk":
        raise BadInputError(
            f"sparsify has no activation {coder.cfg.activation!r}; convert it to saelens or "
            "dictionary_learning"
        )
    Coder.save_to_disk(coder, folder)  # pyright: ignore[reportArgumentType]


def hookpoint(folder: Path) -> Hookpoint | None:
    """Return the hookpoint that is the folder's name."""
    try:
        return parse_hookpoint(folder.name)
    except BadInputError:
        return None
