"""The command line: parse, call, print; no logic.  Heavy modules are imported inside commands."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from resa_lens import __version__
from resa_lens.cli.options import PanelledGroup
from resa_lens.machine.exits import limits

GROUPS = {
    "Start": ("demo", "doctor", "app", "runs"),
    "Main path": (
        "train-saes", "count-features", "recommend-layers", "falsify", "insert", "tune", "eval",
        "compare",
    ),
    "Look closer": (
        "activity", "score-features", "match-features", "ablate", "attribute", "experts",
        "stability", "sweep",
    ),
    "Tables": ("fit-mixture", "regret", "audit"),
    "Files": ("convert", "merge", "export", "cost"),
}  # fmt: skip
"""The commands in the order of the help."""


# Each adds its commands.
for _module in (
    "start", "layers", "features", "interventions", "experts", "tuning", "evals", "tables", "files",
):  # fmt: skip
    import_module(f"resa_lens.cli.{_module}")


class _Commands(PanelledGroup):
    groups = GROUPS


app = typer.Typer(
    name="resa-lens",
    cls=_Commands,
    help="Find where in a language model reasoning lives, and tune it there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"resa-lens {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    with limits():
        app()
