"""SAEs on disk, in the layouts of three projects: read with checks, written as they write them.

| format | files | encoder | decoder |
|---|---|---|---|
| sparsify | cfg.json, sae.safetensors | encoder.weight [d_sae, d_in] | W_dec [d_sae, d_in] |
| saelens | cfg.json, sae_weights.safetensors | W_enc [d_in, d_sae] | W_dec [d_sae, d_in] |
| dictionary_learning | config.json, ae.pt | as sparsify | decoder.weight [d_in, d_sae] |

Inside, sparsify's names and orientation are used.  One module a format, behind `FORMATS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from resa_lens.errors import BadInputError
from resa_lens.hookpoints import Hookpoint, parse_hookpoint
from resa_lens.saes.coder import ACTIVATIONS, Coder, SparseCoder, assemble
from resa_lens.saes.formats import dictionary_learning, saelens, sparsify
from resa_lens.saes.formats.common import Options, Parts

__all__ = ["FORMATS", "by_hookpoint", "detect", "find_coders", "load_coder", "save_coder"]


class Format(Protocol):
    """One project's layout: a module."""

    @property
    def FILES(self) -> tuple[str, ...]:  # noqa: N802
        """Config and weights."""
        ...

    def read(self, folder: Path, options: Options) -> Parts:
        """Read a folder's tensors, in sparsify's names and orientation."""
        ...

    def write(self, coder: SparseCoder, folder: Path, point: Hookpoint | None) -> None:
        """Write a coder as the project itself writes it."""
        ...

    def hookpoint(self, folder: Path) -> Hookpoint | None:
        """Return the hookpoint that the folder names, or None."""
        ...


FORMATS: dict[str, Format] = {
    "sparsify": sparsify,
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
}


def detect(folder: Path) -> str:
    """Return the format of an SAE's folder, by its files.

    Raises:
        BadInputError: it is of none; the files looked for are named.
    """
    if not folder.is_dir():
        raise BadInputError(f"SAE {folder} is not a folder")
    for name, module in FORMATS.items():
        if all((folder / file).exists() for file in module.FILES):
            return name
    # One file of a pair names the format, and what it lacks.
    for module in FORMATS.values():
        weights = module.FILES[1]
        if (folder / weights).exists():
            raise BadInputError(f"SAE {folder} lacks {module.FILES[0]}")
    for module in FORMATS.values():
        if (folder / module.FILES[0]).exists():
            wanted = " or ".join(
                m.FILES[1] for m in FORMATS.values() if m.FILES[0] == module.FILES[0]
            )
            raise BadInputError(f"SAE {folder} lacks {wanted}")
    looked = "; ".join(f"{name}: {', '.join(m.FILES)}" for name, m in FORMATS.items())
    raise BadInputError(f"{folder} holds no SAE of a known format ({looked})")


def load_coder(
    folder: Path,
    *,
    device: str = "cpu",
    d_in: int | None = None,
    decoder: bool = True,
    allow_pickle: bool = False,
    cast: bool = False,
    k: int | None = None,
) -> Coder:
    """Load one SAE of any known format, frozen.

    Args:
        folder: of one SAE.
        device: where to put it.
        d_in: the width it must have, or None.
        decoder: False reads the encoder alone, which counting needs.
        allow_pickle: read dictionary_learning's ae.pt, as weights only.
        cast: turn weights of other floating types into float32.
        k: active latents, where the checkpoint does not say.

    Raises:
        BadInputError: missing, damaged, incomplete, with tensors that have no place, not finite,
            of another type or width, or a pickle that was not allowed.
    """
    found = FORMATS[detect(folder)].read(folder, Options(decoder, allow_pickle, cast, k, d_in))
    latents = found.tensors["encoder.weight"].shape[0]
    if not isinstance(found.activation, str) or found.activation not in ACTIVATIONS:
        raise BadInputError(
            f"SAE {folder} has activation {found.activation!r}; readable: {', '.join(ACTIVATIONS)}"
        )
    if found.k is None:
        raise BadInputError(
            f"SAE {folder} does not say its k, the active latents a token it was trained for.\n"
            "Give it by: resa-lens convert SOURCE TARGET --to FORMAT --k K"
        )
    # JSON's true is an int to Python.
    if type(found.k) is not int or not 1 <= found.k <= latents:
        raise BadInputError(f"SAE {folder} has k {found.k!r}; k must be 1 to its {latents} latents")
    if type(found.threshold) not in (int, float) or not math.isfinite(found.threshold):
        raise BadInputError(
            f"SAE {folder} has threshold {found.threshold!r}; it must be a finite number"
        )
    return assemble(
        found.tensors,
        k=found.k,
        activation=found.activation,
        threshold=float(found.threshold),
        device=device,
    )


def save_coder(coder: SparseCoder, folder: Path, form: str, point: Hookpoint | None = None) -> None:
    """Write a coder in a format.

    Raises:
        BadInputError: the format is unknown or cannot express the coder.
    """
    if form not in FORMATS:
        raise BadInputError(f"format {form!r} is unknown; use {', '.join(FORMATS)}")
    folder.mkdir(parents=True, exist_ok=True)
    FORMATS[form].write(coder, folder, point)


def find_coders(folder: Path) -> dict[Path, Hookpoint | None]:
    """Return the SAE folders at or below a folder (one level), with their hookpoints.

    One that lacks its weights is listed by its name, so that half of a download hinders nobody who
    asks for another layer; `load_coder` refuses it.

    Raises:
        BadInputError: there is none, or a link leads out of the folder.
    """
    if not folder.is_dir():
        raise BadInputError(f"SAEs {folder} not found: no such folder")
    first = [module.FILES[0] for module in FORMATS.values()]
    below = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    found: dict[Path, Hookpoint | None] = {}
    whole = False
    for place in (folder, *below):
        # A link may lead anywhere.
        if not place.resolve().is_relative_to(folder.resolve()):
            raise BadInputError(f"{place} leads out of {folder}; refused")
        if not any((place / name).exists() for name in first):
            continue
        try:
            found[place] = FORMATS[detect(place)].hookpoint(place)
            whole = True
        except BadInputError:
            found[place] = _named(place)
    if not found:
        raise BadInputError(
            f"{folder} holds no SAE (layers.N.mlp/cfg.json, sae.safetensors, or SAELens' or "
            "dictionary_learning's files)"
        )
    if not whole:
        detect(next(iter(found)))
    return found


def _named(folder: Path) -> Hookpoint | None:
    try:
        return parse_hookpoint(folder.name)
    except BadInputError:
        return None


def by_hookpoint(found: Mapping[Path, Hookpoint | None]) -> dict[Hookpoint, Path]:
    """Turn what `find_coders` returns around, without the SAEs that do not name their hookpoint.

    Raises:
        BadInputError: two SAEs are of one hookpoint (a folder of dictionary_learning's trainers).
    """
    places: dict[Hookpoint, Path] = {}
    for place, point in found.items():
        if point is None:
            continue
        if point in places:
            raise BadInputError(
                f"{places[point]} and {place.name} are both SAEs of {point.sparsify}; pass the "
                "folder of one"
            )
        places[point] = place
    return places
