"""Exports, in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resa_lens.exports.hub import Package
    from resa_lens.exports.neuronpedia import Exported


def exported(result: Exported) -> Iterator[str]:
    """Yield how many features were written, and where to."""
    absent = f"; {result.skipped} left out: they have no example" if result.skipped else ""
    files = f"{result.files} file{'s' if result.files != 1 else ''}"
    yield f"{result.features} features in {files}: {result.target}{absent}"


def packaged(result: Package) -> Iterator[str]:
    """Yield what is in a folder for a hub, and where it was pushed."""
    yield f"{len(result.files)} files, {result.megabytes:.1f} MB, with a card: {result.target}"
    if result.url:
        yield f"pushed to {result.url}"
