"""Keyword arguments of the front door: the fields of the configurations, by their names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

COMMON = ("seed", "force")
"""What every method of the lab takes besides the fields of its configurations."""


def filled(call: str, options: Mapping[str, Any], *configs: Any) -> list[Any]:
    """Return the configurations with the options in the place of their fields.

    Args:
        call: the name of the method, for the error.
        options: values by field; a field that several configurations have goes to each.
        configs: the configurations with their defaults.  One that is a field of a later one takes
            its place there.

    Raises:
        TypeError: an option that is a field of none; it names the nearest field.
    """
    inner = [{f.name: type(getattr(c, f.name)) for f in fields(c)} for c in configs]
    kinds = {type(config) for config in configs}
    own = [[name for name, kind in some.items() if kind not in kinds] for some in inner]
    known = sorted({*COMMON, *(name for names in own for name in names)})
    for option in options:
        if option not in known:
            raise TypeError(unknown(call, option, known))
    complete: dict[type, Any] = {}
    for config, some, names in zip(configs, inner, own, strict=True):
        changes = {name: _plain(options[name]) for name in names if name in options}
        changes |= {name: complete[kind] for name, kind in some.items() if kind in complete}
        complete[type(config)] = replace(config, **changes)
    return list(complete.values())


def unknown(call: str, option: str, known: Sequence[str]) -> str:
    """Return the sentence that says that an option is unknown, and which one comes nearest."""
    nearest = difflib.get_close_matches(option, known, 1, 0.5)
    remedy = f"did you mean {nearest[0]!r}?" if nearest else f"use {', '.join(known)}"
    return f"{call}() has no option {option!r}; {remedy}"


def _plain(value: Any) -> Any:
    """Return a list as a tuple, which is what the fields hold."""
    return tuple(value) if isinstance(value, list) else value
