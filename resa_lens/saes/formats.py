"""SAEs on disk: sparsify's checkpoint layout, checked when read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from resa_lens.errors import BadInputError
from resa_lens.models import check_safetensors
from resa_lens.saes.coder import ACTIVATIONS, SparseCoder


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
