"""SAEs from one project's layout into another's, checked by what they compute."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.hookpoints import Hookpoint
from resa_lens.progress import SILENT, Reporter
from resa_lens.saes.coder import SparseCoder, reconstruct
from resa_lens.saes.formats import (
    FORMATS,
    by_hookpoint,
    detect,
    find_coders,
    load_coder,
    save_coder,
)
from resa_lens.workspace import write_errors

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
        reporter: is told of the size and of each SAE.

    Raises:
        BadInputError: the source cannot be read, the format cannot express it, the target exists.
        RunFailedError: what was written does not compute the same.
    """
    if form not in FORMATS:
        raise BadInputError(f"format {form!r} is unknown; use {', '.join(FORMATS)}")
    _check_target(source, target, force)
    found = find_coders(source)
    if layers is not None:
        found = {f: p for f, p in found.items() if p is not None and p.layer in layers}
        if missing := sorted(set(layers) - {p.layer for p in found.values() if p}):
            raise BadInputError(f"{source} has no SAE at layer {missing[0]} (0-based)")
    by_hookpoint(found)
    _announce(found, reporter)
    single = len(found) == 1 and source in found
    temporary = target.parent / f".tmp-{os.getpid()}-{target.name}"
    largest = 0.0
    try:
        with write_errors(target), reporter.bar(f"converting to {form}", len(found)) as advance:
            target.parent.mkdir(parents=True, exist_ok=True)
            for folder, point in found.items():
                coder = load_coder(folder, allow_pickle=allow_pickle, cast=cast, k=k)
                name = point.sparsify if point else folder.name
                place = temporary if single else temporary / name
                save_coder(coder, place, form, point)
                found_difference = difference(coder, load_coder(place, allow_pickle=True))
                # Not a number must not pass, as it would through max().
                if not found_difference <= LIMIT:
                    raise RunFailedError(
                        f"{target} would differ from {folder} by {found_difference:.3g} (limit "
                        f"{LIMIT:g}); nothing was written"
                    )
                largest = max(largest, found_difference)
                advance(1)
            _put(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Converted(
        target,
        tuple(sorted({detect(folder) for folder in found})),
        tuple(_name(point) for point in found.values()),
        ROWS,
        largest,
    )


def _check_target(source: Path, target: Path, force: bool) -> None:
    if target.resolve() == source.resolve() or source.resolve().is_relative_to(target.resolve()):
        raise BadInputError(f"target {target} holds the source {source}; choose another")
    if target.exists() or target.is_symlink():
        if not force or not target.is_dir() or target.is_symlink():
            raise BadInputError(
                f"target {target} exists; choose another, or replace a folder with --force"
            )
        ours = {name for module in FORMATS.values() for name in module.FILES}
        held = (p for p in sorted(target.rglob("*")) if p.is_symlink() or not p.is_dir())
        if (other := next((p for p in held if p.name not in ours), None)) is not None:
            raise BadInputError(
                f"target {target} holds {other.relative_to(target)}, which is no SAE's file; "
                "--force replaces SAEs alone; choose another target"
            )
    above = next(p for p in target.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise BadInputError(f"target {target}: {above} is no folder that can be written to")


def _announce(found: Mapping[Path, Hookpoint | None], reporter: Reporter) -> None:
    files = [p for folder in found for p in folder.iterdir() if p.suffix in (".safetensors", ".pt")]
    sizes = [p.stat().st_size for p in files] or [0]
    if sum(sizes) > LARGE_BYTES:
        reporter.note(
            f"{len(found)} SAE{'s' if len(found) > 1 else ''}: about "
            f"{max(1, round(sum(sizes) / BYTES_A_SECOND))} s, {sum(sizes) / 1e9:.1f} GB of disk, "
            f"{MEMORY_FACTOR * max(sizes) / 1e9:.1f} GB of memory"
        )


def _put(made: Path, target: Path) -> None:
    """Rename a folder to its place; what lay there goes only once the new one is in it."""
    if not target.exists():
        made.rename(target)
        return
    old = made.with_name(f"{made.name}-old")
    target.rename(old)
    try:
        made.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _name(point: Hookpoint | None) -> str | None:
    return None if point is None else point.sparsify


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
    level = max(1.0, 2 * float(getattr(a, "threshold", 0.0)))
    x = a.b_dec + noise + level * a.W_dec[rows].sum(1)
    ours, theirs = reconstruct(a, x), reconstruct(b, x)
    scale = max(1.0, ours.abs().max().item())
    return (ours - theirs).abs().max().item() / scale
