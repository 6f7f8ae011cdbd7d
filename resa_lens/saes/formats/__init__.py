"""SAEs on disk, in the layouts of three projects: read with checks, written as they write them.

| format | files | encoder | decoder |
|---|---|---|---|
| sparsify | cfg.json, sae.safetensors | encoder.weight [d_sae, d_in] | W_dec [d_sae, d_in] |
| saelens | cfg.json, sae_weights.safetensors | W_enc [d_in, d_sae] | W_dec [d_sae, d_in] |
| dictionary_learning | config.json, ae.pt | as sparsify | decoder.weight [d_in, d_sae] |
| qwen_scope | layerN.sae.pt | W_enc [d_sae, d_in] | W_dec [d_in, d_sae] |

Inside, sparsify's names and orientation are used.  One module a format, behind `FORMATS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.hashes import file_hash
from resa_lens.models.files import hash_config
from resa_lens.models.hookpoints import LLAMA, Hookpoint, Names
from resa_lens.saes.coder import ACTIVATIONS, Coder, SparseCoder, assemble
from resa_lens.saes.formats import dictionary_learning, qwen_scope, saelens, sparsify
from resa_lens.saes.formats.common import NO_K, Options, Parts, hookpoint_of

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

    def write(
        self, coder: SparseCoder, folder: Path, point: Hookpoint | None, names: Names
    ) -> None:
        """Write a coder as the project itself writes it."""
        ...

    def hookpoint(self, folder: Path, names: Names) -> Hookpoint | None:
        """Return the hookpoint that the folder names in an architecture, or None."""
        ...


FORMATS: dict[str, Format] = {
    "sparsify": sparsify,
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
}
"""Those that are written, too; Qwen-Scope's files are read alone."""
ANY_K = 32
"""Of a JumpReLU that does not say how many latents are active."""
DEEPEST = 3
"""Folders below the one that is named in which SAEs are looked for: RUN/layers.N.mlp/seed0."""


def detect(folder: Path) -> str:
    """Return the format of an SAE's folder, by its files.

    Raises:
        BadInputError: it is of none; the files looked for are named.
    """
    if folder.is_file() and qwen_scope.NAME.fullmatch(folder.name):
        return "qwen_scope"
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
            formats = " or ".join(
                m.FILES[1] for m in FORMATS.values() if m.FILES[0] == module.FILES[0]
            )
            raise BadInputError(f"SAE {folder} lacks {formats}")
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
        cast: turn weights into float32 also where that rounds them; from bfloat16 and float16 it
            is exact, and always done (`Coder.stored` says so).
        k: active latents, where the checkpoint does not say.

    Raises:
        BadInputError: missing, damaged, incomplete, with tensors that have no place, not finite,
            of another type or width, or a pickle that was not allowed.
    """
    stored: set[str] = set()
    options = Options(decoder, allow_pickle, cast, k, d_in, stored)
    form = detect(folder)
    read = qwen_scope.read if form == "qwen_scope" else FORMATS[form].read
    parts = read(folder, options)
    latents = parts.tensors["encoder.weight"].shape[0]
    if not isinstance(parts.activation, str) or parts.activation not in ACTIVATIONS:
        raise BadInputError(
            f"SAE {folder} has activation {parts.activation!r}; readable: {', '.join(ACTIVATIONS)}"
        )
    if parts.k is None and parts.activation == "topk":
        raise BadInputError(f"SAE {folder} {NO_K}")
    # Where a threshold decides, it counts for controls of the SAE's size alone.
    k = min(ANY_K, latents) if parts.k is None else parts.k
    # JSON's true is an int to Python.
    if type(k) is not int or not 1 <= k <= latents:
        raise BadInputError(f"SAE {folder} has k {k!r}; k must be 1 to its {latents} latents")
    threshold = parts.threshold
    if isinstance(threshold, Tensor):
        threshold = threshold.to(device)
    elif type(threshold) not in (int, float) or not math.isfinite(threshold):
        raise BadInputError(f"SAE {folder} has threshold {threshold!r}; it must be a finite number")
    coder = assemble(
        parts.tensors,
        k=k,
        activation=parts.activation,
        threshold=threshold if isinstance(threshold, Tensor) else float(threshold),
        device=device,
    )
    coder.stored = ", ".join(sorted(stored)) or "float32"
    coder.states_k = parts.k is not None
    return coder


def coder_contents(folder: Path) -> dict[str, str]:
    """Return the hashes of one SAE's files by their names: what the SAE is.

    Raises:
        BadInputError: the folder holds no SAE of a known format.
        DamagedError: a file is no regular file, or its configuration is no JSON.
    """
    form = detect(folder)
    files = [folder / n for n in FORMATS[form].FILES] if form in FORMATS else [folder]
    return {
        file.name: hash_config(file) if file.suffix == ".json" else file_hash(file)
        for file in files
    }


def save_coder(
    coder: SparseCoder,
    folder: Path,
    form: str,
    point: Hookpoint | None = None,
    names: Names = LLAMA,
) -> None:
    """Write a coder in a format, its hookpoint by the names of an architecture.

    Raises:
        BadInputError: the format is unknown or cannot express the coder.
    """
    if form not in FORMATS:
        raise BadInputError(f"format {form!r} is unknown; use {', '.join(FORMATS)}")
    folder.mkdir(parents=True, exist_ok=True)
    FORMATS[form].write(coder, folder, point, names)


def find_coders(folder: Path, names: Names = LLAMA) -> dict[Path, Hookpoint | None]:
    """Return the SAEs at or below a folder, each by its folder or file, with their hookpoints.

    One that lacks its weights is listed by its name, so that half of a download hinders nobody who
    asks for another layer; `load_coder` refuses it.

    Args:
        folder: an SAE's, or one that holds such, or runs (sparsify's RUN/layers.N.mlp/seed0).
        names: what names mean in the model's architecture.

    Raises:
        BadInputError: there is none, a link leads out of the folder, or the SAEs are of several
            runs.
    """
    if not folder.is_dir():
        raise BadInputError(f"SAEs {folder} not found: no such folder")
    coders: dict[Path, Hookpoint | None] = {}
    whole = False
    for place in _places(folder, folder, DEEPEST):
        if place.is_file():
            coders[place], whole = qwen_scope.hookpoint(place, names), True
            continue
        try:
            coders[place] = FORMATS[detect(place)].hookpoint(place, names)
            whole = True
        except BadInputError:
            coders[place] = hookpoint_of(place, names)
    if not coders:
        raise BadInputError(
            f"{folder} holds no SAE (layers.N.mlp/cfg.json, sae.safetensors, or SAELens', "
            "dictionary_learning's or Qwen-Scope's files)"
        )
    if not whole:
        detect(next(iter(coders)))
    # A run is what lies directly below; its SAEs are deeper.
    runs = {parts[0] for place in coders if len(parts := place.relative_to(folder).parts) > 1
            and hookpoint_of(folder / parts[0], names) is None}  # fmt: skip
    if len(runs) > 1:
        raise BadInputError(
            f"{folder} holds SAEs of {len(runs)} runs: {', '.join(sorted(runs)[:6])}; pass the "
            f"folder of one, for example {folder / min(runs)}"
        )
    return coders


def _places(place: Path, root: Path, depth: int) -> Iterator[Path]:
    """Yield the SAEs in a folder: itself, files of Qwen-Scope, or what lies deeper."""
    # A link may lead anywhere.
    if not place.resolve().is_relative_to(root.resolve()):
        raise BadInputError(f"{place} leads out of {root}; refused")
    named = any((place / module.FILES[0]).exists() for module in FORMATS.values())
    if named and any((place / module.FILES[1]).exists() for module in FORMATS.values()):
        yield place
        return
    inside = sorted(p for p in place.iterdir() if not p.name.startswith("."))
    files = {int(match[1]): p for p in inside if (match := qwen_scope.NAME.fullmatch(p.name))}
    deeper = [files[layer] for layer in sorted(files)]
    for below in inside:
        if depth and below.is_dir():
            deeper += _places(below, root, depth - 1)
    # Half of an SAE; of a run, the folder above the SAEs may have a configuration, too.
    yield from deeper or ([place] if named else [])


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
