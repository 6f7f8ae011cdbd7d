"""The kinds of artifacts, one module each: a new kind is a new module here."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

_ORDER = (
    "saes", "quality", "counts", "stability", "recommendation", "activity", "scores",
    "falsification", "effects", "attribution", "ablation", "matches", "insertion", "routing",
    "ranking", "steering",
    "adapter", "eval", "sweep", "model",
)  # fmt: skip
"""Of the work, in tables; a kind that is not named here stands behind these."""
_NAMES = [module.name for module in iter_modules(__path__)]
for _name in sorted(_NAMES, key=[*_ORDER, *_NAMES].index):
    import_module(f"{__name__}.{_name}")
