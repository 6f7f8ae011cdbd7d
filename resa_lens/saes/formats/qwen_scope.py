"""Qwen-Scope: one file a layer, layerN.sae.pt, of TopK SAEs on the residual stream; read only.

    z = topk(W_enc x + b_enc),  x~ = W_dec z + b_dec        W_enc [d_sae, d_in], W_dec [d_in, d_sae]

The file is a pickle.  It is read only when that is asked for, and then as weights alone.  k stands
in the repository's card and name.
"""

from __future__ import annotations

import re
from pathlib import Path

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import Hookpoint, Names
from resa_lens.saes.formats.common import (
    Options,
    Parts,
    check_names,
    check_values,
    check_width,
    unpickle,
)

NAME = re.compile(r"layer(\d+)\.sae\.pt")
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


def read(file: Path, options: Options) -> Parts:
    """Read one layer's SAE; the encoder's bias takes in what b_dec is subtracted for here."""
    stored = unpickle(file, options)
    check_names(file, set(stored), set(TENSORS))
    if stored["W_enc"].ndim != 2:
        raise BadInputError(f"SAE {file}: W_enc is {tuple(stored['W_enc'].shape)}, no matrix")
    d_sae, d_in = stored["W_enc"].shape
    check_width(file, d_in, options.d_in)
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_sae, d_in), "b_enc": (d_sae,), "W_dec": (d_in, d_sae), "b_dec": (d_in,),
    }  # fmt: skip
    checked = check_values(file, stored, shapes, options)
    tensors = {
        "encoder.weight": checked["W_enc"].contiguous(),
        # W x + b = W (x - b_dec) + (b + W b_dec)
        "encoder.bias": checked["b_enc"] + checked["W_enc"] @ checked["b_dec"],
        "b_dec": checked["b_dec"],
    }
    if options.decoder:
        tensors["W_dec"] = checked["W_dec"].mT.contiguous()
    return Parts(tensors, _stated_k(file) if options.k is None else options.k)


def _stated_k(file: Path) -> int | None:
    """Return the k of the card's table, or of the folder's name (...-L0_50)."""
    card = file.with_name("README.md")
    if card.is_file():
        row = re.search(r"Top-K\W+(\d+)", card.read_text(errors="replace"))
        if row:
            return int(row[1])
    match = re.search(r"L0_(\d+)", str(file.absolute().parent))
    return int(match[1]) if match else None


def hookpoint(file: Path, names: Names) -> Hookpoint | None:
    """Return the layer of the file's name, at the block's output."""
    match = NAME.fullmatch(file.name)
    return Hookpoint(int(match[1]), "resid_post") if match else None
