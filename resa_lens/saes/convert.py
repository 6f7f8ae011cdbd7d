"""SAEs from one project's layout into another's, checked by what they compute."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.files import named_path
from resa_lens.machine.hardware import MB
from resa_lens.machine.limits import check_disk
from resa_lens.models.hookpoints import LLAMA, Hookpoint, Names
from resa_lens.progress import SILENT, Reporter
from resa_lens.publishing import filled, put_back
from resa_lens.saes.coder import SparseCoder, reconstruct
from resa_lens.saes.formats import (
    FORMATS,
    by_hookpoint,
    detect,
    find_coders,
    load_coder,
    save_coder,
)

ROWS = 256
LIMIT = 1e-5
"""Largest difference of a reconstruction, relative to the largest value where that is above 1."""
LARGE_BYTES = 200 * 2**20
BYTES_A_SECOND = 100e6
MEMORY_FACTOR = 4
"""Measured with SAEs of 806 MB on two cores: read, written, read again and compared."""


@dataclass(frozen=True)
class Converted:
    """What was written and how far it is from its source."""

    target: Path
    sources: tuple[str, ...]
    hookpoints: tuple[str | None, ...]
    rows: int
    max_difference: float
    """Of reconstructions of `rows` random activations of each SAE."""

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that the command line promises."""
        return {
            "target": str(self.target), "max_difference": self.max_difference, "rows": self.rows,
            "from": list(self.sources), "hookpoints": list(self.hookpoints),
        }  # fmt: skip


def convert(
    source: Path,
    target: Path,
    form: str,
    *,
    layers: Sequence[int] | None = None,
    allow_pickle: bool = False,
    cast: bool = False,
    k: int | None = None,
    force: bool = False,
    names: Names = LLAMA,
    reporter: Reporter = SILENT,
) -> Converted:
    """Read the SAEs of a folder and write them in another format, whole or not at all.

    Args:
        source: one SAE's folder, or a folder of such.
        target: is made; one SAE lies in it directly, several in a folder each.
        form: a name in `FORMATS`.
        layers: only these, 0-based.
        allow_pickle: see `load_coder`, as `cast` and `k`.
        cast: see `load_coder`.
        k: see `load_coder`.
        force: replace the target, if it holds SAEs and nothing else.
        names: of the model's architecture, whose MLP may have two places.
        reporter: is told of the size and of each SAE.

    Raises:
        BadInputError: the source cannot be read, the format cannot express it, the target exists.
        RunFailedError: what was written does not compute the same.
    """
    if form not in FORMATS:
        raise BadInputError(f"format {form!r} is unknown; use {', '.join(FORMATS)}")
    _check_target(source, target, force)
    coders = find_coders(source, names)
    if layers is not None:
        coders = {f: p for f, p in coders.items() if p is not None and p.layer in layers}
        if missing := sorted(set(layers) - {p.layer for p in coders.values() if p}):
            raise BadInputError(f"{source} has no SAE at layer {missing[0]} (0-based)")
    by_hookpoint(coders)
    check_disk(target.absolute().parent, _announce(coders, reporter) / MB, "converting")
    single = len(coders) == 1 and source in coders
    largest = 0.0
    with filled(target) as temporary, reporter.bar(f"converting to {form}", len(coders)) as advance:
        for folder, point in coders.items():
            coder = load_coder(folder, allow_pickle=allow_pickle, cast=cast, k=k)
            if coder.stored != "float32":
                reporter.note(f"{folder}: {coder.stored} turned into float32")
            name = names.sparsify(point) if point else folder.name
            place = temporary if single else temporary / name
            save_coder(coder, place, form, point, names)
            apart = difference(coder, load_coder(place, allow_pickle=True))
            # Not a number must not pass, as it would through max().
            if not apart <= LIMIT:
                raise RunFailedError(
                    f"{target} would differ from {folder} by {apart:.3g} (limit "
                    f"{LIMIT:g}); nothing was written"
                )
            largest = max(largest, apart)
            advance(1)
    return Converted(
        target,
        tuple(sorted({detect(folder) for folder in coders})),
        tuple(names.sparsify(point) if point else None for point in coders.values()),
        ROWS,
        largest,
    )


def _check_target(source: Path, target: Path, force: bool) -> None:
    named_path(target, "target")
    put_back(target)
    if target.resolve() == source.resolve() or source.resolve().is_relative_to(target.resolve()):
        raise BadInputError(f"target {target} holds the source {source}; choose another")
    if target.exists() or target.is_symlink():
        if not force or not target.is_dir() or target.is_symlink():
            raise BadInputError(
                f"target {target} exists; choose another, or replace a folder with --force"
            )
        ours = {name for module in FORMATS.values() for name in module.FILES}
        files = (p for p in sorted(target.rglob("*")) if p.is_symlink() or not p.is_dir())
        if (other := next((p for p in files if p.name not in ours), None)) is not None:
            raise BadInputError(
                f"target {target} holds {other.relative_to(target)}, which is no SAE's file; "
                "--force replaces SAEs alone; choose another target"
            )
    above = next(p for p in target.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise BadInputError(f"target {target}: {above} is no folder that can be written to")


def _announce(found: Mapping[Path, Hookpoint | None], reporter: Reporter) -> int:
    """Say the size of a large job; return its bytes."""
    inside = [p for place in found for p in (place.iterdir() if place.is_dir() else [place])]
    files = [p for p in inside if p.suffix in (".safetensors", ".pt")]
    sizes = [p.stat().st_size for p in files] or [0]
    if sum(sizes) > LARGE_BYTES:
        reporter.note(
            f"{len(found)} SAE{'s' if len(found) > 1 else ''}: about "
            f"{max(1, round(sum(sizes) / BYTES_A_SECOND))} s, {sum(sizes) / 1e9:.1f} GB of disk, "
            f"{MEMORY_FACTOR * max(sizes) / 1e9:.1f} GB of memory"
        )
    return sum(sizes)


@torch.no_grad()
def difference(a: SparseCoder, b: SparseCoder) -> float:
    """Return the largest difference of two coders' reconstructions of random activations.

    The activations spread around b_dec as far as the decoder reaches, so that latents fire.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(ROWS, a.d_in, generator=generator)
    # Sums of a few decoder rows, so that thresholds are passed.
    assert a.W_dec is not None
    rows = torch.randint(a.num_latents, (ROWS, 4), generator=generator)
    level = max(1.0, 2 * float(torch.as_tensor(getattr(a, "threshold", 0.0)).max()))
    x = a.b_dec + noise + level * a.W_dec[rows].sum(1)
    ours, theirs = reconstruct(a, x), reconstruct(b, x)
    scale = max(1.0, ours.abs().max().item())
    return (ours - theirs).abs().max().item() / scale
