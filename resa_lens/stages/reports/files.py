"""Converted SAEs and merged models, in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resa_lens.saes.convert import Converted
    from resa_lens.stages.merge import Merged


def converted(result: Converted, form: str) -> Iterator[str]:
    """Yield what was converted into which format, and how far it is from its source."""
    count = len(result.hookpoints)
    yield (
        f"{count} SAE{'s' if count > 1 else ''} from {', '.join(result.sources)} to {form}, in "
        f"{result.target}; reconstructions of {result.rows} random activations differ by at most "
        f"{result.max_difference:.1e}"
    )


def merged(result: Merged) -> Iterator[str]:
    """Yield what a model was merged from, what rounding lost, and where it lies."""
    config, rounding = result.manifest.config, result.rounding
    parts = [
        f"{a['scale']:g} x {Path(a['folder']).name} ({a['weights_hash'][:8]})"
        for a in config["adapters"]
    ]
    yield (
        f"{config['base']} ({config['base_hash'][:8]}) + {' + '.join(parts)}, stored as "
        f"{result.dtype}; rounding errs by {100 * rounding.lost:.2g} % of the change "
        f"(n = {rounding.weights} weights)"
    )
    yield f"model: {result.folder}"
