"""SAELens from 3 on: cfg.json and sae_weights.safetensors, architectures topk and jumprelu.

A BatchTopK SAE (Mutual Choice is another name of it) at inference is a JumpReLU with one threshold
for all latents, which is how SAELens itself saves its own; one of Feature Choice is a JumpReLU with
a threshold for each.  Both are read as BatchTopK: the file does not hold what the training was.
Options that change the function are folded into the weights where that is exact, and refused where
it is not.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import LLAMA, Hookpoint, Names
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.formats.common import (
    Options,
    Parts,
    check_width,
    hookpoint_of,
    read_config,
    read_tensors,
)

FILES = ("cfg.json", "sae_weights.safetensors")
ENCODER = {"W_enc", "b_enc", "b_dec", "threshold"}
NEUTRAL = {"normalize_activations": "none", "reshape_activations": "none"}
VERSION = "6.54.0"
"""Whose layout is written.  SAELens takes a config without it for one from before 6.0 and drops the
metadata, the hook's name with them."""


def read(folder: Path, options: Options) -> Parts:
    """Read a TopK SAE, or a JumpReLU with one threshold as BatchTopK."""
    values = read_config(folder / FILES[0])
    kind = _kind(values)
    if kind not in ("topk", "jumprelu"):
        raise BadInputError(
            f"SAE {folder} has SAELens' architecture {kind!r}; readable: topk, jumprelu"
        )
    if values.get("finetuning_scaling_factor"):
        raise BadInputError(
            f"SAE {folder} has finetuning_scaling_factor, which is not honoured here; use an SAE "
            "without it"
        )
    for name, neutral in NEUTRAL.items():
        if values.get(name, neutral) not in (neutral, None):
            raise BadInputError(
                f"SAE {folder} has {name} {values[name]!r}, which cannot be folded into its "
                f"weights; only {neutral!r} is readable"
            )
    head = _meta(values).get("hook_head_index", values.get("hook_head_index"))
    if head is not None:
        raise BadInputError(
            f"SAE {folder} has hook_head_index {head!r}: it is of one attention head; only SAEs of "
            "a whole hookpoint are readable"
        )
    d_in, d_sae = values.get("d_in"), values.get("d_sae")
    if not isinstance(d_in, int) or not isinstance(d_sae, int) or d_sae < 1:
        raise BadInputError(f"{folder / FILES[0]} needs d_in and d_sae, it has {d_in} and {d_sae}")
    check_width(folder, d_in, options.d_in)
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    if kind == "jumprelu":
        shapes["threshold"] = (d_sae,)
    rescaled = bool(values.get("rescale_acts_by_decoder_norm")) and kind == "topk"
    if rescaled:
        # The selection depends on the decoder's norms, so the encoder needs them too.
        options = options._replace(decoder=True)
    state = read_tensors(folder / FILES[1], shapes, options, encoder=ENCODER)
    tensors = {
        "encoder.weight": state["W_enc"].mT.contiguous(),
        "encoder.bias": state["b_enc"],
        "b_dec": state["b_dec"],
    }
    if "W_dec" in state:
        tensors["W_dec"] = state["W_dec"]
    if not values.get("apply_b_dec_to_input", True):
        # W x + b = W (x - b_dec) + (b + W b_dec)
        tensors["encoder.bias"] = tensors["encoder.bias"] + state["b_dec"] @ state["W_enc"]
    if rescaled:
        _fold_norms(tensors)
    k = _stated_k(values, options.k)
    if kind == "topk":
        return Parts(tensors, k)
    threshold = state["threshold"]
    if torch.equal(threshold, threshold[:1].expand_as(threshold)):
        return Parts(tensors, k, "batchtopk", float(threshold[0]))
    return Parts(tensors, k, "batchtopk", threshold)


def _kind(values: dict[str, Any]) -> Any:
    """Return the architecture: versions 3 to 5 name a TopK by its activation function."""
    kind = values.get("architecture", "standard")
    function = values.get("activation_fn_str", values.get("activation_fn"))
    return "topk" if kind == "standard" and function == "topk" else kind


def _fold_norms(tensors: dict[str, Tensor]) -> None:
    """Move the decoder's norms to the encoder: the same selection, the same reconstruction."""
    norm = tensors["W_dec"].norm(dim=1)
    tensors["encoder.weight"] = tensors["encoder.weight"] * norm[:, None]
    tensors["encoder.bias"] = tensors["encoder.bias"] * norm
    tensors["W_dec"] = tensors["W_dec"] / norm[:, None].clamp_min(torch.finfo(norm.dtype).tiny)


def _stated_k(values: dict[str, Any], given: int | None) -> Any:
    """Return the k of the config: its own, ours in the metadata, or that of SAELens' training."""
    trained = _meta(values).get("training_architecture_details")
    # Versions 3 to 5 keep it with the activation function.
    function = values.get("activation_fn_kwargs")
    parts = (values, function, _meta(values), trained)
    for part_values in (part for part in parts if isinstance(part, dict)):
        if (k := part_values.get("k")) is not None:
            # A BatchTopK is trained for a mean, which SAELens writes as 32.0.
            return int(k) if isinstance(k, float) and k.is_integer() else k
    return given


def _meta(values: dict[str, Any]) -> dict[str, Any]:
    entry = values.get("metadata")
    return entry if isinstance(entry, dict) else {}


def write(coder: SparseCoder, folder: Path, point: Hookpoint | None, names: Names = LLAMA) -> None:
    """Write a TopK coder as topk, any other as jumprelu with its thresholds."""
    if coder.W_dec is None:
        raise BadInputError("the coder was loaded without its decoder; it cannot be written")
    topk = coder.cfg.activation == "topk"
    state = coder.state_dict()
    tensors = {
        "W_enc": state["encoder.weight"].mT.contiguous(),
        "b_enc": state["encoder.bias"].contiguous(),
        "W_dec": state["W_dec"].contiguous(),
        "b_dec": state["b_dec"].contiguous(),
    }
    note: dict[str, Any] = {
        "sae_lens_version": VERSION,
        **({"k": coder.cfg.k} if getattr(coder, "states_k", True) else {}),
        "converted_by": f"resa-lens {metadata.version('resa-lens')}",
    }
    if point is not None:
        note["hook_name"] = names.saelens(point)
    values: dict[str, Any] = {
        "architecture": "topk" if topk else "jumprelu",
        "d_in": coder.d_in,
        "d_sae": coder.num_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        **NEUTRAL,
        "metadata": note,
    }
    if topk:
        values |= {"k": coder.cfg.k, "rescale_acts_by_decoder_norm": False}
    else:
        level = getattr(coder, "threshold", 0.0)
        # A number, or one a latent.
        tensors["threshold"] = torch.as_tensor(level).float().expand(coder.num_latents).contiguous()
    save_file({name: value.cpu() for name, value in tensors.items()}, folder / FILES[1])
    (folder / FILES[0]).write_text(json.dumps(values, indent=2))


def hookpoint(folder: Path, names: Names) -> Hookpoint | None:
    """Return the hookpoint of the metadata, or of the folder's name."""
    values = read_config(folder / FILES[0])
    return hookpoint_of(folder, names, _meta(values).get("hook_name"), values.get("hook_name"))
