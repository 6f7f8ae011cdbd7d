"""dictionary_learning: config.json and ae.pt, classes AutoEncoderTopK and BatchTopKSAE.

ae.pt is a pickle.  It is read only when that is asked for, and then as weights alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import LLAMA, Hookpoint, Names
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.formats.common import (
    NO_K,
    Options,
    Parts,
    check_names,
    check_values,
    check_width,
    hookpoint_of,
    read_config,
    unpickle,
)

FILES = ("config.json", "ae.pt")
CLASSES = {"AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk"}
TRAINERS = {"topk": "TopKTrainer", "batchtopk": "BatchTopKTrainer"}
SITES = {"mlp_out": "mlp_out", "resid_post": "resid_post", "mlp": "mlp_out", "resid": "resid_post"}
"""What may stand before `_layer_N` in submodule_name, which its users choose; the first two are
written."""


def read(folder: Path, options: Options) -> Parts:
    """Read an AutoEncoderTopK or a BatchTopKSAE."""
    values = read_config(folder / FILES[0]).get("trainer")
    kind = values.get("dict_class") if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(kind, str) or kind not in CLASSES:
        raise BadInputError(
            f"SAE {folder} has dictionary_learning's class {kind!r}; readable: {', '.join(CLASSES)}"
        )
    file = folder / FILES[1]
    state = unpickle(file, options)
    keys = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"}
    # Checkpoints from before the threshold lack it.
    optional = {"threshold"} if CLASSES[kind] == "topk" else set()
    check_names(folder, set(state), keys - (optional - set(state)))
    matrix = state["encoder.weight"]
    if matrix.ndim != 2:
        raise BadInputError(f"SAE {folder}: encoder.weight is {tuple(matrix.shape)}, no matrix")
    d_sae, d_in = matrix.shape
    check_width(folder, d_in, options.d_in)
    for name, size in (("activation_dim", d_in), ("dict_size", d_sae)):
        if values.get(name, size) != size:
            raise BadInputError(
                f"SAE {folder}: {FILES[0]} says {name} {values[name]!r}, encoder.weight is "
                f"{tuple(matrix.shape)}"
            )
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "decoder.weight": (d_in, d_sae),
        "b_dec": (d_in,),
        "threshold": (),
    }
    named = {name: state[name] for name in shapes if name in state}
    checked = check_values(folder, named, shapes, options)
    tensors = {name: checked[name] for name in ("encoder.weight", "encoder.bias", "b_dec")}
    if options.decoder:
        tensors["W_dec"] = checked["decoder.weight"].mT.contiguous()
    stated, stored = values.get("k"), _count(folder, state["k"])
    if stated is not None and stated != stored:
        raise BadInputError(f"SAE {folder}: {FILES[0]} says k {stated}, {FILES[1]} says k {stored}")
    if CLASSES[kind] == "topk":
        return Parts(tensors, stored)
    # Below zero it is not set yet; the ReLU then leaves what is above zero.
    return Parts(tensors, stored, "batchtopk", float(checked["threshold"]))


def _count(folder: Path, k: Tensor) -> int:
    whole = not (k.is_floating_point() or k.is_complex() or k.dtype is torch.bool)
    if k.shape != () or not whole or k.is_meta:
        kind = str(k.dtype).removeprefix("torch.")
        raise BadInputError(f"SAE {folder}: k is {kind} {tuple(k.shape)}; one integer is needed")
    return int(k)


def write(coder: SparseCoder, folder: Path, point: Hookpoint | None, names: Names = LLAMA) -> None:
    """Write the class that fits the activation."""
    if coder.W_dec is None:
        raise BadInputError("the coder was loaded without its decoder; it cannot be written")
    # With one threshold the others are one function; Mutual Choice and BatchTopK always were.
    activation = "topk" if coder.cfg.activation == "topk" else "batchtopk"
    if not getattr(coder, "states_k", True):
        raise BadInputError(f"the SAE {NO_K}")
    if isinstance(getattr(coder, "threshold", 0.0), Tensor):
        raise BadInputError(
            "dictionary_learning has one threshold for all latents, the SAE one each; convert it "
            "to saelens"
        )
    state = {name: value.cpu() for name, value in coder.state_dict().items()}
    level = -1.0 if activation == "topk" else float(getattr(coder, "threshold", 0.0))
    torch.save(
        {
            "k": torch.tensor(coder.cfg.k, dtype=torch.int),
            "threshold": torch.tensor(level, dtype=torch.float32),
            "decoder.weight": state["W_dec"].mT.contiguous(),
            "encoder.weight": state["encoder.weight"].contiguous(),
            "encoder.bias": state["encoder.bias"].contiguous(),
            "b_dec": state["b_dec"].contiguous(),
        },
        folder / FILES[1],
    )
    trainer: dict[str, Any] = {
        "trainer_class": TRAINERS[activation],
        "dict_class": next(name for name, kind in CLASSES.items() if kind == activation),
        "activation_dim": coder.d_in,
        "dict_size": coder.num_latents,
        "k": coder.cfg.k,
    }
    if point is not None:
        trainer["layer"] = point.layer
        trainer["submodule_name"] = f"{point.site}_layer_{point.layer}"
    (folder / FILES[0]).write_text(json.dumps({"trainer": trainer, "buffer": {}}, indent=2))


def hookpoint(folder: Path, names: Names) -> Hookpoint | None:
    """Return the hookpoint of the config's submodule_name, or of the folder's name."""
    values = read_config(folder / FILES[0]).get("trainer")
    name = values.get("submodule_name") if isinstance(values, dict) else None
    if isinstance(name, str):
        site, _, layer = name.partition("_layer_")
        if layer.isdecimal() and site in SITES:
            return Hookpoint(int(layer), SITES[site])
    return hookpoint_of(folder, names)
