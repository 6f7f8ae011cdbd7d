"""What a field of a configuration is: its meaning, its limits, and what it is to a result.

A field is declared once, with its name, type (`Literal` for choices), default, help and limits; the
command line, the Python front door, the manifest and the documents read them here.

A field is *result* unless it says otherwise: to forget a declaration makes a new identity, never a
wrong one.  *Execution* fields (memory limits, batch sizes of generation, schedulers) change no
result beyond stated noise.  *Source* fields say where data come from or which part of them is
taken; the data themselves are hashed in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from numbers import Real
from types import MappingProxyType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from resa_lens.errors import BadInputError

Role = Literal["result", "source", "execution"]
MOST = 10**12
"""No number of an option is larger unless it says so."""
LONGEST = 32_768
"""Characters of a text; the longest prompt is far shorter."""


def setting(
    default: Any = MISSING, help: str = "", *names: str, role: Role = "result", **limits: Any
) -> Any:
    """Return a dataclass field with its meaning.

    Args:
        default: its value where nothing else is said; without one it is required.
        help: what it is, as the command line says it.
        names: its options where they are not the field's name, for example "--model", "-m".
        role: see the module.
        limits: `min`, `max` and `over` (the value must be larger) of its numbers; `choices`, names
            of a registry; `check`, called with a value that a user gives, raises BadInputError;
            `layers`, of a field that names layers: such a check, called with the value alone, and
            with it and a model's number of layers before that model is loaded; `resolve`, see
            `resolved`; `later`, of a field that came after results without it: at its default it
            enters no identity.
    """
    metadata = {"role": role, "help": help, "names": names, **limits}
    return field(default=default, metadata=metadata)


def execution(default: Any = MISSING, help: str = "", *names: str, **limits: Any) -> Any:
    """Return a dataclass field that changes how a result is made, and not the result."""
    return setting(default, help, *names, role="execution", **limits)


def data_source(default: Any = MISSING, help: str = "", *names: str, **limits: Any) -> Any:
    """Return a dataclass field that names data, or a part of them; their contents are hashed."""
    return setting(default, help, *names, role="source", **limits)


def resolved(
    default: Any, resolve: Callable[[Any], Any], help: str = "", *names: str, **limits: Any
) -> Any:
    """Return a dataclass field whose meaning counts: a name or `@file` stands for a text."""
    return setting(default, help, *names, resolve=resolve, **limits)


@dataclass(frozen=True)
class Config:
    """A configuration whose values are checked against what its fields say."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            BadInputError: a value is none of the choices, or outside of its limits.
        """
        kinds = field_types(type(self))
        for item in fields(self):
            check_value(item.name, getattr(self, item.name), kinds[item.name], item.metadata)


@cache
def field_types(config: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass."""
    return get_type_hints(config)


def check_value(name: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> None:
    """Check a value of a field or an option.

    Raises:
        BadInputError: it is none of the choices, no finite number, outside of the limits, or a text
            that cannot be written down.
    """
    if isinstance(value, list | tuple):
        for item in value:
            # Of a field each value is named by itself: a control of the controls.
            check_value(name if name[:2] == "--" else name.removesuffix("s"), item, kind, limits)
    elif isinstance(value, str):
        known = choices(kind, limits)
        if is_number(kind):
            raise BadInputError(f"{name} {value!a:.60} is no number; give {range_of(limits)}")
        if known and value not in known:
            raise BadInputError(f"{name} {value!r} is unknown; use {one_of(known)}")
        if not known and (len(value) > LONGEST or "\0" in value or not _is_text(value)):
            shown = value if len(value) < 40 else f"{value[:40]}..."
            raise BadInputError(
                f"{name} {shown!a} is no text: it holds bytes that are no UTF-8, or more than "
                f"{LONGEST} characters; give another"
            )
    elif isinstance(value, Real) and not isinstance(value, bool):
        low, over, high = limits.get("min"), limits.get("over"), limits.get("max", MOST)
        if (
            not math.isfinite(value)
            or abs(value) > high
            or (low is not None and value < low)
            or (over is not None and value <= over)
        ):
            shown = value if abs(float(value)) < 10**15 else f"{float(value):g}"
            raise BadInputError(f"{name} {shown} is out of range; give {range_of(limits)}")


def is_number(kind: Any) -> bool:
    """Return whether a type takes numbers alone, and None perhaps."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return all(part in (int, float, type(None)) for part in parts)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def choices(kind: Any, limits: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
    """Return what a field of a `Literal` type, or with `choices`, may be; nothing for others."""
    if "choices" in limits:
        return tuple(limits["choices"])
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((names for part in get_args(kind) if (names := choices(part))), ())


def one_of(names: tuple[str, ...]) -> str:
    """Return names as "a or b", or "a, b, c"."""
    return (" or " if len(names) == 2 else ", ").join(names)


def range_of(limits: Mapping[str, Any]) -> str:
    """Say which numbers a field takes: "a number of 1 or more"."""
    low, over, high = limits.get("min"), limits.get("over"), limits.get("max")
    end = "" if high is None or high > 10**9 else f" to {high:,}"
    if over is not None:
        return f"above {over:,}{end and f' and at most{end[3:]}'}"
    if low is not None:
        return f"{low:,}{end or ' or more'}"
    return f"a number of at most {MOST if high is None else high:,}"


def bare(kind: Any) -> tuple[Any, bool]:
    """Return a type without None, and whether it may be None."""
    if get_origin(kind) in (Union, UnionType):
        rest = [part for part in get_args(kind) if part is not type(None)]
        return rest[0], len(rest) < len(get_args(kind))
    return kind, False


def give_one(args: Any, first: str, second: str) -> None:
    """Raise BadInputError where two options are given of which only one may be."""
    one, other = getattr(args, first), getattr(args, second)
    if one is not None and other is not None:
        raise BadInputError(f"{_label(first)} {one} and {_label(second)} {other}: give one")


def goes_with(args: Any, first: str, second: str) -> None:
    """Raise BadInputError where an option lacks the one that it goes with."""
    if getattr(args, first) is not None and getattr(args, second) is None:
        value = getattr(args, first)
        raise BadInputError(f"{_label(first)} {value} goes with {_label(second)}: give both")


def _label(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def roles(config: type | Any) -> dict[str, Role]:
    """Return the role of each field of a configuration's class."""
    return {item.name: item.metadata.get("role", "result") for item in fields(config)}


def result_fields(config: Any) -> Any:
    """Return what of a configuration enters an identity, as JSON has it.

    Raises:
        TypeError: a value that JSON does not have.
    """
    if is_dataclass(config) and not isinstance(config, type):
        made: dict[str, Any] = {}
        for item in fields(config):
            if item.metadata.get("role", "result") != "result":
                continue
            value = getattr(config, item.name)
            if item.metadata.get("later") and value == item.default:
                continue
            if resolve := item.metadata.get("resolve"):
                value = resolve(value)
            made[item.name] = result_fields(value)
        return made
    if isinstance(config, Mapping):
        return {str(key): result_fields(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [result_fields(value) for value in config]
    if config is None or isinstance(config, str | int | float | bool):
        return config
    raise TypeError(f"{type(config).__name__} has no place in an identity")


def config_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as a plain mapping for a manifest, all of its fields."""
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    if isinstance(config, Mapping):
        return dict(config)
    raise TypeError(f"{type(config).__name__} is not a configuration")
