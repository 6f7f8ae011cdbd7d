"""The reference, made from the code: pages of the site that lie nowhere in git.

    mkdocs serve                            shows the site (this file is one of its hooks)
    python docs/make_reference.py FOLDER    writes the pages as Markdown

The commands come from the Typer app.  Of the library the pages hold mkdocstrings' directives, which
read the source text: nothing is run, and no path, address or terminal width gets in.
"""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "resa_lens"
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Documents beside docs/ that are pages of the site too."""

SHARED = ("workspace", "seed", "device", "dtype", "threads", "deterministic", "force", "as_json")
"""Options that mean the same everywhere: told once, then only named."""

ROOMS = {
    "Ground floor": (
        "errors", "config", "processes", "claims", "files", "hashes", "progress", "resources",
        "jobs",
    ),
    "Statistics": ("stats",),
    "Texts": ("texts",),
    "Models": ("models",),
    "Machine": ("machine",),
    "SAEs": ("saes",),
    "Features": ("features",),
    "Layers": ("layers",),
    "Tuning": ("tuning",),
    "Evaluations": ("evals",),
    "Experts": ("experts",),
    "Figures": ("figures",),
    "Artifacts": ("artifacts",),
    "Stages": ("stages",),
    "Others": ("*",),
}  # fmt: skip
"""Modules and packages in the order in which data flows; a room imports from those above it.  What
stands in no room comes last: a module is never left out."""
NOT_LISTED = ("cli", "app", "session", "corpora", "__main__")
"""Commands and front door have pages of their own; the app's pages are no library."""


# Commands


def commands() -> str:
    """Return the page of all commands and options."""
    from resa_lens.cli import GROUPS

    lines = [
        "# Commands", "",
        "Every command: `--help`, and `--config FILE` for YAML of its options by their names; exit "
        "code 0 on success, 2 for bad input, 1 for a failure while running, 130 when interrupted. "
        "The same command again finds what it made and says so; a killed one goes on. `resa-lens "
        "runs ARTIFACT --command` prints the command that makes an artifact again.", "",
        "| command | what it does |", "|---|---|",
    ]  # fmt: skip
    for names in GROUPS.values():
        for name in names:
            lines.append(f"| [`resa-lens {name}`](#resa-lens-{name}) | {_cell(_help(name)[0])} |")
    shared = {key: row for name in ("train-saes",) for key, row in _rows(name).items()
              if key in SHARED}  # fmt: skip
    lines += ["", "## Options of many commands", "", *_table(shared), ""]
    for title, names in GROUPS.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += _command(name, shared)
    return "\n".join([*lines, "## Options by command", "", *_by_command()]).rstrip() + "\n"


Row = tuple[str, str, str]
"""Names, default, meaning."""


def _rows(name: str) -> dict[str, Row]:
    """Return the options of a command."""
    from resa_lens.cli.options import CLASSES, options_of

    return {key: _row(option) for key, option in options_of(CLASSES[name]).items()}


def _row(option: Any) -> Row:
    from dataclasses import MISSING

    from resa_lens.config import choices

    known = choices(option.kind, option.about)
    names = ", ".join(option.names) if not option.about.get("argument") else option.key.upper()
    default = option.default
    if default is MISSING:
        shown = "required"
    elif option.preset:
        shown = "of the preset"
    elif isinstance(default, tuple):
        shown = ",".join(map(str, default))
    else:
        shown = "" if default is None or default is False else str(default)
    help = option.about["help"]
    return names, shown, f"{help} One of {', '.join(known)}." if known else help


def _by_command() -> list[str]:
    """Return the table of options by command: an option means the same wherever it stands."""
    from resa_lens.cli.options import CLASSES, options_of

    rows: dict[str, dict[str, list[str]]] = {}
    for name, group in CLASSES.items():
        for option in options_of(group).values():
            if not option.about.get("argument"):
                rows.setdefault(option.label, {}).setdefault(_row(option)[1], []).append(name)
    lines = ["| option | default | commands |", "|---|---|---|"]
    for label, defaults in sorted(rows.items()):
        for default, names in defaults.items():
            shown = f"`{_cell(default)}`" if default else ""
            lines.append(f"| `{label}` | {shown} | {', '.join(sorted(names))} |")
    return lines


def _command(name: str, shared: dict[str, Row]) -> list[str]:
    summary, rest, example = _help(name)
    lines = [f"### resa-lens {name}", "", summary, ""]
    if rest:
        lines += [rest, ""]
    lines += ["```bash", example, "```", ""]
    rows = _rows(name)
    if own := {key: row for key, row in rows.items() if shared.get(key) != row}:
        lines += [*_table(own), ""]
    if same := [row[0] for key, row in rows.items() if shared.get(key) == row]:
        listed = ", ".join(f"`{option}`" for option in same)
        lines += [f"Also [as everywhere](#options-of-many-commands): {listed}.", ""]
    return lines


def _help(name: str) -> tuple[str, str, str]:
    from resa_lens.cli.options import COMMANDS

    return _help_parts(COMMANDS[name].__doc__ or "")


def _help_parts(text: str) -> tuple[str, str, str]:
    """Return a command's first sentence, what else it says, and its example."""
    text = "\n".join(line.strip() for line in text.strip().splitlines())
    told, _, example = text.partition("Example: ")
    summary, _, rest = told.strip().partition("\n\n")
    return " ".join(summary.split()), " ".join(rest.split()), " ".join(example.split())


def _table(options: dict[str, Row]) -> list[str]:
    rows = ["| option | default | |", "|---|---|---|"]
    for names, default, meaning in options.values():
        shown = f"`{_cell(default)}`" if default else ""
        rows.append(f"| `{_cell(names)}` | {shown} | {_cell(meaning)} |")
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# Library


FRONT = (
    "lab", "scoring", "probing", "workbench", "plain", "results", "discovery", "features",
    "interventions", "insertion", "experts", "scores", "sweeps", "options",
)  # fmt: skip
"""Modules of the front door, in the order in which a reader needs them."""
ELSEWHERE = (
    "evals.grading.is_correct", "evals.grading.is_chosen", "evals.tasks.load_questions",
    "texts.corpora.load_records", "texts.corpora.documents",
)  # fmt: skip
"""Public names of the front door that stand in the pages of their rooms."""


def api() -> str:
    """Return the page of the front door, in full."""
    lines = [
        "# The library", "",
        "`import resa_lens as rl` is the front door: `rl.open` gives a lab, whose methods take and "
        "return objects, and some functions need no workspace. Options of a method are the fields "
        "of the configurations that it names. What a user can cause is a `BadInputError`, a "
        "failure while running a `RunFailedError`.", "",
        "Also at the front door: " + ", ".join(
            f"[`rl.{name.rpartition('.')[2]}`][resa_lens.{name}]" for name in ELSEWHERE
        ) + ". The rest of the library stands in the pages of its rooms; a room imports only from "
        "those before it.", "",
    ]  # fmt: skip
    for module in FRONT:
        lines += _directive(f"session.{module}")
    return "\n".join(lines)


def _directive(name: str, level: int = 2) -> list[str]:
    """Return mkdocstrings' lines for a name of the package."""
    return [f"::: resa_lens.{name}", "    options:", f"      heading_level: {level}", ""]


def room_pages() -> dict[str, str]:
    """Return a page for each room, by its file's name: all of its modules in full."""
    pages = {}
    for room, modules in rooms_of(all_modules()).items():
        lines = [f"# {room}", ""]
        for module in modules:
            lines += _directive(module)
        pages[f"library/{room.lower().replace(' ', '-')}.md"] = "\n".join(lines)
    return pages


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


# The site


def pages() -> dict[str, str]:
    """Return every page that is made from the code, by its file's name."""
    return {"commands.md": commands(), "api.md": api(), **room_pages()}


def on_config(config: Any) -> Any:
    """Put the pages of the rooms into the navigation (a hook of mkdocs)."""
    for entry in config.nav:
        if isinstance(entry, dict) and "Reference" in entry:
            entry["Reference"].append({"Rooms": list(room_pages())})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages made from the code, and the documents beside docs/ (a hook of mkdocs)."""
    generated = import_module("mkdocs.structure.files").File.generated
    outside = {name.lower(): (ROOT / name).read_text(encoding="utf-8") for name in OUTSIDE}
    for name, text in {**pages(), **outside}.items():
        files.append(generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between docs/ and the files beside it into links of the site (a hook of mkdocs).

    What is no page, such as a notebook or the licence, is shown as text: the site has no copy.
    """
    here = page.file.src_uri

    def link(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        place, hash_, anchor = target.partition("#")
        if here.upper() in OUTSIDE or here in (name.lower() for name in OUTSIDE):
            place = place.removeprefix("docs/")
        place = place.removeprefix("../")
        if place in OUTSIDE:
            place = place.lower()
        known = files.get_file_from_path(place) is not None
        return f"{mark}[{text}]({place}{hash_}{anchor})" if known or not place else text

    return re.sub(r"(!?)\[((?:[^\[\]]|\n)+)\]\(([^)\s]+)\)", link, markdown)


def main(arguments: list[str]) -> int:
    """Write the pages into a folder."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("give the folder to write the pages into", file=sys.stderr)
        return 2
    for name, text in pages().items():
        file = Path(arguments[0], name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
