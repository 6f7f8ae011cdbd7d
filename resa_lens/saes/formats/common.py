"""What every format's reader does: read a config, read tensors, refuse what does not fit."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.models.files import check_safetensors
from resa_lens.models.hookpoints import Hookpoint, Names

EXACT = (torch.float16, torch.bfloat16)
"""float32 holds all their values."""
CASTABLE = (*EXACT, torch.float64)

NO_K = (
    "does not say its k, the active latents a token it was trained for.\n"
    "Give it by: resa-lens convert SOURCE TARGET --to FORMAT --k K"
)


class Options(NamedTuple):
    """How an SAE is to be read; see `load_coder`."""

    decoder: bool = True
    allow_pickle: bool = False
    cast: bool = False
    k: int | None = None
    d_in: int | None = None
    stored: set[str] | None = None
    """Takes up the floating types that were turned into float32."""


class Parts(NamedTuple):
    """What a reader returns: tensors in sparsify's names and orientation, and the activation."""

    tensors: dict[str, Tensor]
    k: Any
    activation: str = "topk"
    threshold: float | Tensor = 0.0
    """One for all latents, or one each."""


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
            tensors = {name: stream.get_tensor(name) for name in names}
    except OSError as error:
        raise BadInputError(f"{file} cannot be read: {error}") from error
    return check_values(file.parent, tensors, wanted, options)


def unpickle(file: Path, options: Options) -> dict[str, Tensor]:
    """Read a pickle of tensors, as weights alone, where that is allowed."""
    if not options.allow_pickle:
        raise BadInputError(
            f"{file} is a pickle, which can run code when it is read; refused.\n"
            "If you trust it, it is read as weights only by: "
            "resa-lens convert SOURCE TARGET --to sparsify --allow-pickle"
        )
    try:
        contents: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:160] if str(error).strip() else "empty"
        raise BadInputError(f"{file} cannot be read as weights only: {first}") from error
    if not isinstance(contents, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in contents.items()
    ):
        raise BadInputError(f"{file} holds no state of tensors")
    return contents


def hookpoint_of(folder: Path, names: Names, *stated: Any) -> Hookpoint | None:
    """Return the hookpoint of the first name that is one: stated, the folder's, or the one above.

    Sparsify's runs of several seeds lie in layers.N.mlp/seed0, ....
    """
    for name in (*stated, folder.name, folder.absolute().parent.name):
        try:
            return names.parse(str(name))
        except BadInputError:
            continue
    return None


def stated_figures(place: Path) -> dict[str, float]:
    """Return the `fvu` and `l0` that an SAE's files state: in a configuration or an evaluation."""
    figures: dict[str, float] = {}
    for name in ("cfg.json", "config.json", "eval_results.json"):
        file = place / name
        if not file.is_file():
            continue
        config = read_config(file)
        for part in (config, config.get("metadata"), config.get("trainer")):
            for key, value in part.items() if isinstance(part, dict) else ():
                if type(value) not in (int, float):
                    continue
                if key.lower() in ("l0", "average_l0", "mean_l0"):
                    figures["l0"] = value
                elif key == "fvu":
                    figures["fvu"] = value
                elif key in ("frac_variance_explained", "explained_variance"):
                    figures["fvu"] = 1 - value
    return figures


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
    options: Options,
) -> dict[str, Tensor]:
    """Refuse other shapes, types that float32 would round (unless cast) and what is not finite."""
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
            if options.stored is not None:
                options.stored.add(kind)
            if not options.cast and value.dtype not in EXACT:
                raise BadInputError(
                    f"SAE {folder}: {name} is {kind}, float32 is needed.\n"
                    "Turn it into float32 by: resa-lens convert SOURCE TARGET --to FORMAT --cast"
                )
            value = value.float()
        if not torch.isfinite(value).all():
            raise BadInputError(f"SAE {folder}: {name} holds values that are not finite")
        checked[name] = value
    return checked
