"""Commands made of configurations: a field's name, type, default and help are its option.

    @options("Counting")
    class CountFeatures(WithSaesAt):
        count: CountConfig = part(CountConfig, "prompt threshold", "Counting")

    @command("count-features")
    def count_features(args: CountFeatures) -> Outcome: ...

A command is a function of one class of options.  Its own fields are options, and so are the fields
of the configurations that are parts of it.  Every value is checked against what its field says, and
every part is made, before the function is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, dataclass_transform, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from resa_lens.cli.common import Outcome, refuse, run
from resa_lens.config import MOST, bare, check_value, choices, field_types, range_of, setting
from resa_lens.errors import BadInputError

COMMANDS: dict[str, Callable[..., None]] = {}
"""Each command's function for Typer, by the command's name."""
CLASSES: dict[str, type] = {}
"""Each command's class of options."""
NOT_RECORDED = ("as_json", "force", "config", "join", "ray", "gpus_per_job")
"""Options that say nothing of what a command makes."""


Given = Literal["values", "preset"] | None


class Part(NamedTuple):
    """The fields of a configuration that are options of a command."""

    config: type
    names: tuple[str, ...]
    panel: str
    given: Given
    defaults: dict[str, Any]


def part(config: type, names: str, panel: str, *, given: Given = None, **defaults: Any) -> Any:
    """Return a field that holds a configuration, made of options.

    Args:
        config: its class.
        names: its fields that are options, with spaces between; the rest keep their defaults.
        panel: where they stand in the help.
        given: hold a dictionary, of all "values", or of those that change a "preset".
        defaults: of this command, where they are not the configuration's.
    """
    source = Part(config, tuple(names.split()), panel, given, defaults)
    return field(metadata={"part": source}, default=None)


def argument(help: str, *, default: Any = MISSING, **limits: Any) -> Any:
    """Return a field that is a positional argument, required if it has no default."""
    return setting(default, help, argument=True, **limits)


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(setting, part, argument)
)
def options(panel: str) -> Callable[[type], type]:
    """Make a class whose fields are options a frozen dataclass; the panel is theirs in the help."""

    def make(group: type) -> type:
        type.__setattr__(group, "panel", panel)
        # Comparison and repr are left out: they would cost every command 20 ms at its start.
        return dataclass(frozen=True, kw_only=True, eq=False, repr=False)(group)

    return make


@dataclass
class Option:
    """An option of a command, and the fields that it fills."""

    key: str
    kind: Any
    default: Any
    about: Mapping[str, Any]
    panel: str
    targets: list[tuple[str | None, str]]
    """(field of the class that holds a part, or None; field)."""
    preset: bool = False
    """Whether None stands for a value of a preset."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its names; of a flag, with the name that switches it off."""
        if names := self.about.get("names"):
            return names
        name = f"--{self.key.replace('_', '-')}"
        both = bare(self.kind)[0] is bool and (self.preset or self.default is not False)
        return (f"{name}/--no-{name[2:]}" if both else name,)

    @property
    def label(self) -> str:
        """What messages and configuration files call it, with its dashes."""
        return self.key if self.about.get("argument") else self.names[0].partition("/")[0]

    def parse(self, value: Any) -> Any:
        """Return a value as its field has it, checked.

        Raises:
            BadInputError: it is not what the field takes.
        """
        kind, _ = bare(self.kind)
        if isinstance(value, list):
            (item, *_) = get_args(kind)
            several = get_origin(kind) is tuple
            words = [w.strip() for v in value for w in (v.split(",") if several else [v])]
            value = get_origin(kind)(self._item(item, word) for word in words if word) or None
            if value is None and words:
                raise BadInputError(f"{self.label} {words[0]!r} names nothing; give one or more")
        check_value(self.label, value, kind, self.about)
        check = self.about.get("check") or self.about.get("layers")
        if check and value is not None and value != self.default:
            for item in value if isinstance(value, list | tuple) else [value]:
                check(item)
        return kind(value) if isinstance(value, str) and _is_path(kind) else value

    def _item(self, kind: Any, word: str) -> Any:
        if kind not in (int, float):
            return word
        try:
            return kind(word)
        except ValueError as error:
            raise BadInputError(
                f"{self.label} {word!r} is no number; give numbers, for example 1,2"
            ) from error

    def parameter(self) -> inspect.Parameter:
        """Return the parameter that Typer reads."""
        kind, _ = bare(self.kind)
        known, required = choices(self.kind, self.about), self.default is MISSING
        listed = get_origin(kind) in (list, tuple)
        text, shape = _help(self.about, kind), f"[{'|'.join(known)}]"
        if known and len(shape) > 40:
            text, shape = f"{text} One of {', '.join(known)}.", "NAME"
        metavar = self.about.get("metavar") or (shape if known else None)
        settings: dict[str, Any] = {
            "help": text, "rich_help_panel": self.panel, "metavar": metavar,
            "show_default": "the preset's" if self.preset else ",".join(map(str, self.default))
            if isinstance(self.default, tuple) else self.default is not False,
        }  # fmt: skip
        plain = list[str] if listed else kind if kind in (int, float, bool) else str
        default = inspect.Parameter.empty if required else None if listed else self.default
        info = (
            typer.Argument(**settings)
            if self.about.get("argument")
            else typer.Option(*self.names, **settings)
        )
        annotation = Annotated[plain if required or default is not None else plain | None, info]
        form = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.key, form, default=default, annotation=annotation)


def _is_path(kind: Any) -> bool:
    return isinstance(kind, type) and kind is not str


def _help(about: Mapping[str, Any], kind: Any) -> str:
    # That a number is positive and no absurd one goes without saying.
    telling = "over" in about or about.get("min", 1) > 1 or about.get("max", MOST) <= 100
    limited = kind in (int, float) and telling
    return f"{about['help']} ({range_of(about)})" if limited else about["help"]


@cache
def options_of(group: type) -> dict[str, Option]:
    """Return the options of a class: its own fields before those of its bases."""
    known = {item.name: item for item in fields(group)}
    options: dict[str, Option] = {}
    for base in group.__mro__:
        kinds = inspect.get_annotations(base, eval_str=True)
        for name in kinds:
            if (item := known.pop(name, None)) is None:
                continue
            if source := item.metadata.get("part"):
                members = {f.name: f for f in fields(source.config)}
                types = field_types(source.config)
                for member in source.names:
                    _add(options, members[member], types[member], source, name)
            elif "help" in item.metadata:
                own = Part(group, (), vars(base)["panel"], None, {})
                _add(options, item, kinds[name], own, None)
    return options


def _add(
    options: dict[str, Option], item: Field[Any], kind: Any, source: Part, owner: str | None
) -> None:
    names = item.metadata["names"]
    # Several fields may have one option: every seed is --seed.
    key = names[0].partition("/")[0][2:].replace("-", "_") if names and owner else item.name
    if key in options:
        options[key].targets.append((owner, item.name))
        return
    preset = source.given == "preset"
    default = None if preset or (item.default is MISSING and owner) else item.default
    options[key] = Option(
        key, kind, source.defaults.get(item.name, default), item.metadata, source.panel,
        [(owner, item.name)], preset,
    )  # fmt: skip


def build(group: type, values: Mapping[str, Any]) -> Any:
    """Return a command's options, parts made and every value checked.

    Raises:
        BadInputError: a value is not what its field takes.
    """
    own: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for key, option in options_of(group).items():
        value = option.parse(values.get(key))
        for owner, name in option.targets:
            if owner is None:
                own[name] = value
            # A field that is left out keeps its default, which may be a tuple.
            elif value is not None:
                parts.setdefault(owner, {})[name] = value
    for item in fields(group):
        if source := item.metadata.get("part"):
            changes = parts.get(item.name, {})
            own[item.name] = (
                changes if source.given else source.config(**{**source.defaults, **changes})
            )
    return group(**{name: value for name, value in own.items() if value is not None})


def check_layer_options(args: Any, n_layers: int) -> None:
    """Raise BadInputError where an option names a layer that a model has not, before it is loaded.

    Args:
        args: the command's options.
        n_layers: of the model.
    """
    for option in options_of(type(args)).values():
        value = getattr(args, option.key, None)
        if value is not None and (check := option.about.get("layers")):
            check(value, n_layers)


class Running(NamedTuple):
    """The command that this process runs."""

    words: list[str]
    """As a shell takes them."""
    options: dict[str, Any]
    """What was given and is no default, as `--config` takes it."""


_RUNNING: list[Running] = []


def running() -> Running:
    """Return the command that this process runs, for the manifests of what it makes."""
    return _RUNNING[-1] if _RUNNING else Running([], {})


def _recorded(name: str, values: Mapping[str, Any]) -> Running:
    words, arguments, changes = ["resa-lens", name], [], {}
    for key, option in options_of(CLASSES[name]).items():
        value = values.get(key)
        if key in NOT_RECORDED or value is None or value == option.default:
            continue
        changes[option.label.lstrip("-")] = value
        if option.about.get("argument"):
            arguments += value if isinstance(value, list) else [value]
        elif isinstance(value, bool):
            words.append(option.names[0].split("/")[0 if value else -1])
        else:
            for item in value if isinstance(value, list) else [value]:
                # A value that begins with a dash would be taken for an option.
                text = str(item)
                words += [f"{option.label}={text}"] if text[:1] == "-" else [option.label, text]
    if any(str(word).startswith("-") for word in arguments):
        arguments.insert(0, "--")
    return Running([*words, *map(str, arguments)], changes)


def command(name: str) -> Callable[[Callable[[Any], Outcome]], Callable[[Any], Outcome]]:
    """Make a command of a function of one class of options.

    The function's docstring is the help, and what it returns is printed by `run`.
    """

    def register(function: Callable[[Any], Outcome]) -> Callable[[Any], Outcome]:
        (parameter,) = inspect.signature(function, eval_str=True).parameters.values()
        group = CLASSES[name] = parameter.annotation

        def callback(**values: Any) -> None:
            def job() -> Outcome:
                _RUNNING.append(_recorded(name, values))
                try:
                    return function(build(group, values))
                finally:
                    _RUNNING.pop()

            run(job, values.get("as_json", False))

        callback.__doc__ = function.__doc__
        COMMANDS[name] = callback
        return function

    return register


def _read_config(ctx: typer.Context, file: str | None) -> None:
    """Take a file's values for those options that the command line does not give."""
    if file is None:
        return
    from resa_lens.cli.settings import read_settings

    try:
        known = options_of(CLASSES[str(ctx.command.name)])
        ctx.default_map = {**(ctx.default_map or {}), **read_settings(file, known)}
    except BadInputError as error:
        refuse(error)


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Option(
            callback=_read_config, is_eager=True, metavar="FILE", rich_help_panel="Output",
            help="YAML of these options by their names; what stands on the command line counts.",
        ),
    ],
)  # fmt: skip


class PanelledCommand(TyperCommand):
    """A command whose help shows its options in panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, panel by panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            is_argument = parameter.param_type_name == "argument"
            panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None)
            if record := parameter.get_help_record(ctx):
                panels.setdefault(panel or "Output", []).append(record)
        for panel in sorted(panels, key=lambda name: (name != "Arguments", name == "Output")):
            with formatter.section(panel):
                formatter.write_dl(panels[panel], col_max=28)


@cache
def typer_command(name: str) -> Any:
    """Return a command as Typer makes it."""
    callback = COMMANDS[name]
    parameters = [option.parameter() for option in options_of(CLASSES[name]).values()]
    vars(callback)["__signature__"] = inspect.Signature([*parameters, _CONFIG])
    callback.__annotations__ = {p.name: p.annotation for p in (*parameters, _CONFIG)}
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    names = {"help_option_names": ["-h", "--help"]}
    alone.command(name, cls=PanelledCommand, context_settings=names)(callback)
    return get_command(alone)


class Commands(Mapping[str, Any]):
    """The commands by name, each made when it is used: to make all takes longer than the help."""

    def __getitem__(self, name: str) -> Any:
        return typer_command(name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class PanelledGroup(TyperGroup):
    """Commands that stand in groups, each with its whole summary."""

    groups: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = Commands()

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of the help."""
        return [name for names in self.groups.values() for name in names]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, group by group."""
        width = max(map(len, COMMANDS))
        for title, names in self.groups.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), summary(name)) for name in names])


def summary(name: str) -> str:
    """Return the first sentence of a command's help."""
    return " ".join((COMMANDS[name].__doc__ or "").strip().partition("\n\n")[0].split())
