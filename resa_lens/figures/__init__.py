"""Figures of Plotly, and the self-contained page that holds them.

Every figure and colour is here by its name, whichever module has it: `figures.counts_figure`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Return a figure or a colour; the modules are imported at the first use."""
    if name.endswith("_figure") or name.isupper():
        for module in ("plots", "scores", "features", "layers", "lineage", "experts"):
            value = getattr(import_module(f"resa_lens.figures.{module}"), name, None)
            if value is not None:
                return value
    raise AttributeError(f"module 'resa_lens.figures' has no attribute {name!r}")
