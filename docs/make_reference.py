"""Write the reference documents from the code: docs/commands.md and docs/api.md.

    python docs/make_reference.py           writes both
    python docs/make_reference.py --check   exits 1 where one is stale

The commands come from the Typer app, the API from the source text itself, so that the documents are
the same on every machine: nothing is run, no path, address or terminal width gets in.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "resa_lens"
MADE_BY = "<!-- Made by `python docs/make_reference.py`; change the code, not this file. -->"

COMMAND_GROUPS = {
    "The main job": ("demo", "recommend-layers", "tune", "eval", "compare"),
    "Stage by stage": ("train-saes", "convert", "count-features", "falsify", "stability"),
    "Features": ("activity", "score-features", "match-features", "ablate", "attribute"),
    "Many runs": ("sweep", "regret", "merge", "cost"),
    "Tables of others": ("fit-mixture", "audit"),
    "Around it": ("runs", "app", "doctor"),
}
SHARED = ("workspace", "seed", "device", "dtype", "threads", "force", "yes", "as_json")
"""Options that mean the same everywhere: told once, then only named."""

ROOMS = {
    "Ground floor": (
        "errors", "resources", "machine", "tables", "progress", "workspace", "hookpoints",
        "prompts", "phases", "corpora", "model_files", "models", "activations", "cost", "energy",
    ),
    "Statistics": ("stats",),
    "SAEs": ("saes",),
    "Features": ("features",),
    "Layers": ("layers",),
    "Tuning": ("tuning",),
    "Evaluations": ("evals",),
    "Pipeline": ("pipeline",),
    "Figures": ("report", "plots", "*_plots"),
    "The bundled model": ("tiny",),
    "Others": ("*",),
}  # fmt: skip
"""Modules and packages in the order in which data flows; a room imports from those above it.  What
stands in no room comes last: a module is never left out."""
NOT_LISTED = ("cli", "app", "__main__")
"""The command line has its own reference; the pages are no library."""
IN_FULL = frozenset(
    (
        "models.load_model", "models.Model", "hookpoints.Hookpoint", "hookpoints.describe_layer",
        "corpora.CorpusConfig", "corpora.load_records", "activations.stream_activations",
        "workspace.Workspace", "workspace.Manifest", "stats.paired.compare_paired",
        "saes.train.SaeConfig", "saes.train.train_saes", "saes.coder.encode",
        "saes.convert.convert", "features.exclusive.CountConfig",
        "features.exclusive.count_features", "layers.mixture.fit_mixture",
        "layers.selectors.recommend", "tuning.objective.Objective", "tuning.objective.preset",
        "tuning.loop.TuneConfig", "tuning.train.tune", "evals.run.EvalConfig",
        "evals.tasks.load_tasks", "evals.compare.compare_runs", "pipeline.context.Context",
        "pipeline.sae_training.train_run", "pipeline.discovery.discover",
        "pipeline.tuning.tune_run", "pipeline.scores.eval_run", "pipeline.sweep.sweep_run",
    )
)  # fmt: skip
"""Where a reader begins: their docstrings, arguments, errors and fields stand whole."""


# Commands


def commands() -> str:
    """Return docs/commands.md."""
    from typer.main import get_command

    from resa_lens.cli import app

    root: Any = get_command(app)
    grouped = {name for names in COMMAND_GROUPS.values() for name in names}
    groups = {
        title: [name for name in names if name in root.commands]
        for title, names in COMMAND_GROUPS.items()
    }
    if others := [name for name in root.commands if name not in grouped]:
        groups["Others"] = others
    lines = [
        MADE_BY, "", "# Commands", "",
        "Every command: `--help`; exit code 0 on success, 2 for bad input, 1 for a failure while "
        "running, 130 when interrupted. The same command again finds what it made and says so; a "
        "killed one goes on.", "",
        "| command | what it does |", "|---|---|",
    ]  # fmt: skip
    for names in groups.values():
        for name in names:
            summary = _cell(_help_parts(root.commands[name])[0])
            lines.append(f"| [`resa-lens {name}`](#resa-lens-{name}) | {summary} |")
    lines += ["", "## Options of many commands", "", *_table(_shared_options(root)), ""]
    for title, names in groups.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += _command(name, root.commands[name], _shared_options(root))
    return "\n".join(lines).rstrip() + "\n"


Option = tuple[str, str, str]
"""Names, default, meaning."""


def _shared_options(root: Any) -> dict[str, Option]:
    found: dict[str, Option] = {}
    for command in root.commands.values():
        for parameter in command.params:
            if parameter.name in SHARED:
                found.setdefault(parameter.name, _option(command, parameter))
    return {name: found[name] for name in SHARED if name in found}


def _option(command: Any, parameter: Any) -> Option:
    import typer

    names, told = parameter.get_help_record(typer.Context(command))
    meaning, _, extra = told.partition("  [default: ")
    default, _, bounds = extra.rstrip("]").partition("; ")
    if not extra and (found := re.search(r"  \[([^\]]*[<>=][^\]]*)\]$", meaning)):
        meaning, bounds = meaning[: found.start()], found[1]
    if meaning.endswith("[required]"):
        meaning, default = meaning.removesuffix("[required]").rstrip(), "required"
    if bounds:
        meaning = f"{meaning} ({bounds})"
    # Which kind of number it is, its bounds and its default say.
    names = re.sub(r" <(int range|float range|str|path|int|float)>$", "", names)
    return names, default, meaning


def _command(name: str, command: Any, shared: dict[str, Option]) -> list[str]:
    summary, rest, example = _help_parts(command)
    lines = [f"### resa-lens {name}", "", summary, ""]
    if rest:
        lines += [rest, ""]
    lines += ["```bash", example, "```", ""]
    own: dict[str, Option] = {}
    same: list[str] = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        option = _option(command, parameter)
        if shared.get(parameter.name) == option:
            same.append(max(parameter.opts, key=len))
        else:
            own[parameter.name] = option
    if own:
        lines += [*_table(own), ""]
    if same:
        listed = ", ".join(f"`{option}`" for option in same)
        lines += [f"Also [as everywhere](#options-of-many-commands): {listed}.", ""]
    return lines


def _help_parts(command: Any) -> tuple[str, str, str]:
    """Return a command's first sentence, what else it says, and its example."""
    text = "\n".join(line.strip() for line in (command.help or "").strip().splitlines())
    told, _, example = text.partition("Example: ")
    summary, _, rest = told.strip().partition("\n\n")
    return " ".join(summary.split()), " ".join(rest.split()), " ".join(example.split())


def _table(options: dict[str, Option]) -> list[str]:
    rows = ["| option | default | |", "|---|---|---|"]
    for names, default, meaning in options.values():
        shown = f"`{_cell(default)}`" if default else ""
        rows.append(f"| `{_cell(names)}` | {shown} | {_cell(meaning)} |")
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# API


@dataclass(frozen=True)
class Entry:
    """A public function or class of a module."""

    name: str
    """With its module and class, without the package's name."""
    signature: str
    doc: str
    fields: tuple[tuple[str, str], ...] = ()
    """Of a dataclass: the field as it is written, and the line under it."""
    methods: tuple[Entry, ...] = field(default=())


def api() -> str:
    """Return docs/api.md."""
    lines = [
        MADE_BY, "", "# The library", "",
        "Public functions and classes, in the order in which data flows: a room imports only from "
        "those above it. A line each; where a reader begins, the whole docstring. Errors that a "
        "user can cause are `BadInputError`, failures while running `RunFailedError`. What a "
        "command does, `resa_lens.pipeline` does from Python.", "",
        "```python",
        "from resa_lens.models import load_model",
        "from resa_lens.prompts import trigger_document",
        "",
        'model = load_model("tiny-reasoner")',
        'print(model.n_layers, model.d_model, trigger_document("What is 3+4?", "7"))',
        "```", "",
    ]  # fmt: skip
    rooms = rooms_of(all_modules())
    lines += ["| room | modules |", "|---|---|"]
    for room, modules in rooms.items():
        linked = ", ".join(f"[{m}](#resa_lens{m.replace('.', '')})" for m in modules)
        lines.append(f"| {room} | {linked} |")
    lines.append("")
    listed: set[str] = set()
    for room, modules in rooms.items():
        lines += [f"## {room}", ""]
        for module in modules:
            lines += _module(module, listed)
    if unknown := IN_FULL - listed:
        raise ValueError(f"IN_FULL names {sorted(unknown)}, which the code has not")
    return "\n".join(lines).rstrip() + "\n"


def all_modules() -> list[str]:
    """Return every module that has to be listed, without the package's name."""
    names = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if "__init__" in parts:
            parts = parts[:-1]
        if parts and parts[0] not in (*NOT_LISTED, "_data"):
            names.append(".".join(parts))
    return names


def rooms_of(modules: list[str]) -> dict[str, list[str]]:
    """Return the modules of each room, in their order."""
    left = list(modules)
    rooms: dict[str, list[str]] = {}
    for room, names in ROOMS.items():
        for name in names:
            found = [module for module in left if fnmatch(module.split(".")[0], name)]
            if found:
                rooms.setdefault(room, []).extend(found)
            left = [module for module in left if module not in found]
    return rooms


def _source(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _module(module: str, listed: set[str]) -> list[str]:
    tree = _source(module)
    lines = [f"### resa_lens.{module}", "", _summary(ast.get_docstring(tree) or ""), ""]
    for entry in _entries(module, tree):
        listed |= {entry.name, *(method.name for method in entry.methods)}
        lines += _entry(entry)
    return [*lines, ""] if lines[-1] else lines


def _entries(module: str, tree: ast.Module) -> Iterator[Entry]:
    """Yield the public functions and classes of a module in their order."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield _describe(f"{module}.{node.name}", node)


def _describe(name: str, node: ast.FunctionDef | ast.ClassDef) -> Entry:
    doc = ast.get_docstring(node) or ""
    if isinstance(node, ast.FunctionDef):
        return Entry(name, _signature(node), doc)
    methods = tuple(
        _describe(f"{name}.{item.name}", item)
        for item in node.body
        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")
    )
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    return Entry(name, f"({bases})" if bases else "", doc, tuple(_fields(node)), methods)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(item, ast.AnnAssign) or ast.unparse(item.target).startswith("_"):
            continue
        told = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            told = " ".join(str(after.value.value).split())
        yield ast.unparse(item), told


def _signature(node: ast.FunctionDef) -> str:
    kinds = {ast.unparse(decorator) for decorator in node.decorator_list}
    if kinds & {"property", "cached_property", "functools.cached_property"}:
        return f": {ast.unparse(node.returns)}" if node.returns else ""
    arguments = node.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args = arguments.args[1:]
    returned = ast.unparse(node.returns) if node.returns else "None"
    returns = "" if returned == "None" else f" -> {returned}"
    return f"({ast.unparse(arguments)}){returns}"


def _entry(entry: Entry) -> list[str]:
    short = entry.name.rpartition(".")[2]
    lines = [f"- `{short}{entry.signature}`: {_summary(entry.doc)}"]
    if entry.name in IN_FULL:
        rest = entry.doc.partition("\n\n")[2]
        if rest:
            lines += ["", "  ```text", *(f"  {row}".rstrip() for row in rest.splitlines()), "  ```"]
        for written, told in entry.fields:
            lines.append(f"  - `{written}`" + (f": {told}" if told else ""))
        lines += [
            f"  - `.{method.name.rpartition('.')[2]}{method.signature}`: {_summary(method.doc)}"
            for method in entry.methods
        ]
    return lines


def _summary(doc: str) -> str:
    return " ".join(doc.strip().partition("\n\n")[0].split())


DOCUMENTS = {"commands.md": commands, "api.md": api}


def stale() -> list[str]:
    """Return the documents that are not what the code makes."""
    here = ROOT / "docs"
    return [
        name
        for name, make in DOCUMENTS.items()
        if not (here / name).exists() or (here / name).read_text(encoding="utf-8") != make()
    ]


def main(arguments: list[str]) -> int:
    """Write the documents, or with --check say which are stale."""
    if arguments not in ([], ["--check"]):
        print(f"unknown arguments {arguments}; use --check or none", file=sys.stderr)
        return 2
    if arguments:
        for name in (old := stale()):
            print(f"docs/{name} is stale: run python docs/make_reference.py", file=sys.stderr)
        return 1 if old else 0
    for name, make in DOCUMENTS.items():
        (ROOT / "docs" / name).write_text(make(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
