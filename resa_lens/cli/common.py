"""Options that commands share, and how a command runs: output, errors, exit codes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resa_lens.errors import BadInputError, ResaLensError

if TYPE_CHECKING:
    from rich.table import Table

    from resa_lens.pipeline.context import Context

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m",
        help="tiny-reasoner, a hub id, a local folder, a .gguf file or a PEFT adapter folder.",
    ),
]  # fmt: skip
WorkspaceOption = Annotated[
    str | None,
    typer.Option(help="Folder of all results [RESA_LENS_WORKSPACE, else ./resa-workspace]."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of everything that is drawn.", min=0)]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
ThreadsOption = Annotated[
    int | None, typer.Option(help="CPU threads; one for narrow models by default.", min=1)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Make this command's result anew, even if it is done.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")]
LayersOption = Annotated[
    str | None,
    typer.Option(help='"1-26", "all", "3,5,13th" or "layers.*.mlp"; all but first and last.'),
]
SiteOption = Annotated[str, typer.Option(help="mlp_out or resid_post.")]
SaesOption = Annotated[
    str | None, typer.Option(help="Folder of SAEs in sparsify's layout (layers.N.mlp/).")
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="tiny, a .jsonl/.parquet/.csv file, still, deepscaler, open-s1, ii-thought, openr1 "
        "or a hub id.",
    ),
]
TokensOption = Annotated[
    int | None, typer.Option(help="SAE training tokens; by default set by the width.", min=1)
]
LatentsOption = Annotated[
    int | None, typer.Option(help="SAE latents; by default set by the width.", min=1)
]
TopkOption = Annotated[int, typer.Option("--k", help="Active SAE latents a token.", min=1)]
MismatchOption = Annotated[
    bool,
    typer.Option(
        "--allow-site-mismatch", help="Use an SAE that does not fit its place, with a warning."
    ),
]
BaseOption = Annotated[str | None, typer.Option(help="Base model of an adapter folder.")]

TasksOption = Annotated[
    str, typer.Option("--tasks", help="tiny (levels 1 to 3) or a .jsonl/.parquet/.csv file.")
]
NewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.", min=1)
]


def context(
    workspace: str | None, seed: int, device: str, dtype: str, force: bool, threads: int | None
) -> Context:
    """Open the workspace and say first where it is."""
    from resa_lens.pipeline.context import Context
    from resa_lens.progress import SILENT, ConsoleReporter
    from resa_lens.workspace import Workspace

    # Of the processes that torchrun starts only the first speaks.
    reporter = SILENT if _silent_rank() else ConsoleReporter()
    place = Workspace(workspace)
    place.check_writable()
    reporter.note(f"workspace: {place.root}")
    return Context(place, reporter, seed, device, dtype, force, threads)


def _silent_rank() -> bool:
    return os.environ.get("RANK", "0") != "0"


def run(job: Callable[[], tuple[dict[str, Any], Callable[[], None]]], as_json: bool) -> None:
    """Run a command's job and print its result.

    Args:
        job: returns the JSON object and a function that prints the table instead.
        as_json: print the object and nothing else to stdout.

    Exit codes: 2 bad input, 1 failed while running, 130 interrupted.
    """
    # The object alone may reach stdout: libraries' own prints go to stderr, at the descriptor.
    kept = os.dup(1) if as_json else -1
    if as_json:
        sys.stdout.flush()
        os.dup2(2, 1)
    try:
        with _noting_interrupts() as interrupted:
            try:
                result, show = job()
            except Exception as error:
                # Import code of some libraries turns an interrupt into an error of its own.
                if interrupted and not isinstance(error, ResaLensError):
                    raise KeyboardInterrupt from error
                raise
    except ResaLensError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        typer.echo("error: " + "\n".join(lines[:3]), err=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        typer.echo("interrupted; run the same command again to go on", err=True)
        raise typer.Exit(130) from error
    finally:
        if as_json:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)
    if _silent_rank():
        return
    if as_json:
        typer.echo(json.dumps(finite(result), default=str, allow_nan=False))
    else:
        show()


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Yield a list that holds the interrupts so far."""
    seen: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield seen
        return

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def levels(text: str | None) -> tuple[int, ...] | None:
    """Read the numbers of an option such as "1,2,3".

    Raises:
        BadInputError: they are none.
    """
    if not text:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise BadInputError(f'levels {text!r} are no numbers; use for example "1,2"') from error


def finite(value: Any) -> Any:
    """Return a result with None for numbers that JSON has not: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


WHOLE = (
    "layer",
    "by",
    "95 %",
    "F (df)",
    "created (UTC)",
    "minus base",
    "among all",
    "regret",
    "control",
)
"""Columns whose cells keep their line in a narrow terminal; the headers of others wrap first."""


def table(title: str, *columns: str) -> Table:
    """Return an empty table in the house's style."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        # A folded path can still be copied; a cut one cannot.
        whole = column in WHOLE
        made.add_column(
            column, justify="left" if index == 0 else "right", no_wrap=whole,
            overflow="ellipsis" if whole else "fold",
        )  # fmt: skip
    return made


def _needed(column: Any) -> int:
    """Return the width below which words of a column's cells, as numbers are, would be cut."""
    cells = [str(cell) for cell in column.cells]
    words = cells if column.no_wrap else [word for cell in cells for word in cell.split()]
    words += str(column.header).split()
    # Paths may fold.
    return min(max(map(len, words), default=0), 30)


def fitted(whole: Table, width: int) -> list[Table]:
    """Return a table in parts that fit a terminal, each with the first column."""
    first, *rest = whole.columns
    groups: list[list[Any]] = [[]]
    for column in rest:
        if groups[-1] and 4 + sum(_needed(c) + 2 for c in (first, *groups[-1], column)) > width:
            groups.append([])
        groups[-1].append(column)
    if len(groups) == 1:
        return [whole]
    parts = []
    for index, group in enumerate(groups):
        part = table("")
        part.title = whole.title if index == 0 else None
        for column in (first, *group):
            part.add_column(
                column.header, justify=column.justify, no_wrap=column.no_wrap,
                overflow=column.overflow,
            )  # fmt: skip
        for row in zip(first.cells, *(column.cells for column in group), strict=True):
            part.add_row(*row)
        parts.append(part)
    return parts


def show_all(*parts: Any) -> None:
    """Print tables and lines to stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
        elif isinstance(part, Table):
            for piece in fitted(part, console.width):
                console.print(piece)
        else:
            console.print(part)


def percent(accuracy: float, ci: tuple[float, float] | list[float], n: int) -> tuple[str, str, str]:
    """Return accuracy, interval and n as cells."""
    return f"{100 * accuracy:.1f} %", f"{100 * ci[0]:.1f} to {100 * ci[1]:.1f} %", str(n)
