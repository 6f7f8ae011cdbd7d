"""What every format's reader does: read a config, read tensors, refuse what does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.model_files import check_safetensors

CASTABLE = (torch.float16, torch.bfloat16, torch.float64)


class Options(NamedTuple):
    """How an SAE is to be read; see `load_coder`."""

    decoder: bool = True
    allow_pickle: bool = False
    cast: bool = False
    k: int | None = None
    d_in: int | None = None


class Parts(NamedTuple):
    """What a reader returns: tensors in sparsify's names and orientation, and the activation."""

    tensors: dict[str, Tensor]
    k: Any
    activation: str = "topk"
    threshold: float = 0.0


def read_config(file: Path) -> dict[str, Any]:
    """Read a config that must be a JSON object."""
    try:
        values = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"{file} is damaged: {error}") from error
    except OSError as error:
        raise BadInputError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(values, dict):
        raise BadInputError(f"{file} is damaged: it holds no JSON object")
    return values


def check_width(folder: Path, width: Any, wanted: int | None) -> None:
    """Refuse an SAE of another width than the model's."""
    if wanted is not None and width != wanted:
        raise BadInputError(
            f"SAE {folder} has width {width}, the model's is {wanted}; "
            "use an SAE that was trained on this model"
        )


def read_tensors(
    file: Path, wanted: Mapping[str, tuple[int, ...]], options: Options, *, encoder: set[str]
) -> dict[str, Tensor]:
    """Read exactly the wanted tensors of a safetensors file; of an encoder, only its own.

    Args:
        file: the weights.
        wanted: the shape that each tensor must have.
        options: how to read.
        encoder: the names that the encoder alone needs.
    """
    check_safetensors(file)
    try:
        with safe_open(file, framework="pt") as stream:
            check_names(file.parent, set(stream.keys()), set(wanted))
            names = [n for n in wanted if options.decoder or n in encoder]
            held = {name: stream.get_tensor(name) for name in names}
    except OSError as error:
        raise BadInputError(f"{file} cannot be read: {error}") from error
    return check_values(file.parent, held, wanted, cast=options.cast)


def check_names(folder: Path, present: set[str], wanted: set[str]) -> None:
    """Refuse missing tensors and tensors without a place."""
    if missing := sorted(wanted - present):
        raise BadInputError(f"SAE {folder} lacks the tensor {missing[0]}")
    if extra := sorted(present - wanted):
        raise BadInputError(
            f"SAE {folder} has a tensor without a place: {extra[0]}; expected {', '.join(wanted)}"
        )


def check_values(
    folder: Path,
    held: dict[str, Tensor],
    wanted: Mapping[str, tuple[int, ...]],
    *,
    cast: bool,
) -> dict[str, Tensor]:
    """Refuse other shapes, other types (unless cast) and values that are not finite."""
    checked = {}
    for name, value in held.items():
        # A pickle may hold tensors that are sparse, or have no storage at all.
        if value.layout is not torch.strided or value.is_meta:
            raise BadInputError(f"SAE {folder}: {name} is no dense tensor; save it as one")
        if tuple(value.shape) != tuple(wanted[name]):
            raise BadInputError(
                f"SAE {folder}: {name} is {tuple(value.shape)}, its config needs {wanted[name]}"
            )
        if value.dtype is not torch.float32:
            kind = str(value.dtype).removeprefix("torch.")
            if value.dtype not in CASTABLE:
                raise BadInputError(f"SAE {folder}: {name} is {kind}; float32 is needed")
            if not cast:
                raise BadInputError(
                    f"SAE {folder}: {name} is {kind}, float32 is needed.\n"
                    "Turn it into float32 by: resa-lens convert SOURCE TARGET --to FORMAT --cast"
                )
            value = value.float()
        if not torch.isfinite(value).all():
            raise BadInputError(f"SAE {folder}: {name} holds values that are not finite")
        checked[name] = value
    return checked
