"""Options that commands share, and how a command runs: output, errors, exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resa_lens.errors import ResaLensError

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
        result, show = job()
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
        typer.echo(json.dumps(result, default=str))
    else:
        show()


def table(title: str, *columns: str) -> Table:
    """Return an empty table in the house's style."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        # A folded path can still be copied; a cut one cannot.
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return made


def show_all(*parts: Any) -> None:
    """Print tables and lines to stdout."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
        else:
            console.print(part)


def percent(accuracy: float, ci: tuple[float, float] | list[float], n: int) -> tuple[str, str, str]:
    """Return accuracy, interval and n as cells."""
    return f"{100 * accuracy:.1f} %", f"{100 * ci[0]:.1f} to {100 * ci[1]:.1f} %", str(n)
