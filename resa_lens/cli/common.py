"""How a command runs: output, errors, exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import typer

from resa_lens.errors import ResaLensError
from resa_lens.figures.terminal import show_all
from resa_lens.files import finite
from resa_lens.processes import is_silent_rank, noting_interrupts
from resa_lens.progress import local

Outcome = tuple[dict[str, Any], Iterable[Any]] | tuple[dict[str, Any], Iterable[Any], int]
"""A command's JSON object, the tables and lines printed in its stead, and an exit code but 0."""


def run(job: Callable[[], Outcome], as_json: bool) -> None:
    """Run a command's job and print its outcome; with `as_json` nothing but the object to stdout.

    Exit codes: 2 bad input, 1 failed while running, 130 interrupted.
    """
    # The object alone may reach stdout: libraries' own prints go to stderr, at the descriptor.
    stdout = os.dup(1) if as_json else -1
    if as_json:
        sys.stdout.flush()
        os.dup2(2, 1)
    try:
        with noting_interrupts() as interrupted:
            try:
                values, parts, *code = job()
            except Exception as error:
                # Import code of some libraries turns an interrupt into an error of its own.
                if interrupted and not isinstance(error, ResaLensError):
                    raise KeyboardInterrupt from error
                raise
    except ResaLensError as error:
        refuse(error)
    except KeyboardInterrupt as error:
        typer.echo("interrupted; run the same command again to go on", err=True)
        raise typer.Exit(130) from error
    finally:
        if as_json:
            sys.stdout.flush()
            os.dup2(stdout, 1)
            os.close(stdout)
    if as_json and not is_silent_rank():
        typer.echo(json.dumps(finite(values), default=str, allow_nan=False))
    elif not is_silent_rank():
        show_all(*parts)
    if any(code):
        raise typer.Exit(code[0])


def refuse(error: ResaLensError) -> NoReturn:
    """Print an error in at most three lines, and exit with its code."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    typer.echo(local("error: " + "\n".join(lines[:3])), err=True)
    raise typer.Exit(error.exit_code) from error
