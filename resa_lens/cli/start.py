"""The start: demo, doctor, runs, app."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from resa_lens.artifacts import places
from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import COLUMNS, AdapterBase, Generating, OnModel, Output, Place
from resa_lens.cli.options import argument, command, options, part
from resa_lens.config import goes_with, setting
from resa_lens.errors import BadInputError
from resa_lens.files import check_path, check_workspace
from resa_lens.machine import ports
from resa_lens.progress import Unforecast
from resa_lens.saes.config import SaeConfig
from resa_lens.stages.reports import start as reports
from resa_lens.texts.config import CorpusConfig, check_source
from resa_lens.tuning.config import TuneConfig

if TYPE_CHECKING:
    from resa_lens.texts.preview import DataPreview


@options("Tuning")
class Demo(Generating, OnModel):
    """How long the demo takes."""

    budget: Literal["full", "test"] = setting("full", "How much is done; test is a quick pass.")
    lora: TuneConfig = part(TuneConfig, "learning_rate", "Tuning", learning_rate=1e-4)


@command("demo")
def demo(args: Demo) -> Outcome:
    """Run the whole idea on the bundled model, in minutes.

    SAEs, counts, mixture, recommendation, tuning, scores and one page.

    Example: resa-lens demo
    """
    ctx = args.context()
    from resa_lens.stages import demo as stage

    ctx.reporter.note(stage.BUDGETS[args.budget].expectation)
    ctx.reporter = Unforecast(ctx.reporter)
    result = stage.demo(ctx, args.model, args.budget, args.lora.learning_rate, args.engine)
    return result.to_dict(), reports.demo_of(result)


@options("Model")
class Doctor(AdapterBase, Place, Output):
    """The model whose needs are said, and the data that it would read."""

    model: str | None = setting(
        None, "Say what this model will need; only its headers are read.", "--model", "-m",
        check=check_path,
    )  # fmt: skip
    data: str | None = setting(
        None, "Print three documents of these data as --model would read them.",
        check=check_source,
    )  # fmt: skip
    corpus: CorpusConfig = part(CorpusConfig, COLUMNS, "Data")
    sae: SaeConfig = part(SaeConfig, "latents", "SAEs")

    def __post_init__(self) -> None:
        """Raise BadInputError where data are named, and no model that would read them."""
        goes_with(self, "data", "model")

    def preview(self) -> DataPreview | None:
        """Read the data, and mark documents by the model's tokenizer."""
        if self.data is None or self.model is None:
            return None
        from resa_lens.models.unloaded import read_unloaded
        from resa_lens.texts.preview import preview

        tokenizer = read_unloaded(self.model, self.base).tokenizer
        return preview(tokenizer, replace(self.corpus, source=self.data))


@command("doctor")
def doctor(args: Doctor) -> Outcome:
    """Say what is installed and usable here, what a model needs.

    With --model it says too what that model will need: memory of each stage and disk; with --data
    how it would read these data. Exit code 1 where something that the main job needs is broken,
    with its remedy.

    Example: resa-lens doctor --model tiny-reasoner
    """
    from resa_lens.machine.doctor import diagnose, needs_here
    from resa_lens.machine.needs import read_shape

    # First: a model that is not at hand needs no look at the machine.
    shape = read_shape(args.model, args.base) if args.model else None
    read = args.preview()
    diagnosis = diagnose(args.workspace)
    values, needs = diagnosis.to_dict(), None
    if shape:
        needs = needs_here(diagnosis, shape, args.sae.latents)
        values["model"] = needs.to_dict()
    parts = [*reports.diagnosis_of(diagnosis, needs)]
    if read:
        values["data"] = read.to_dict()
        parts += read.lines()
    return values, parts, int(bool(diagnosis.problems))


@options("Output")
class Runs(Place, Output):
    """How closely the workspace is looked at."""

    artifact: str | None = argument(
        "One artifact: its id, path or folder name.", default=None, metavar="[ARTIFACT]"
    )
    command: bool = setting(False, "Print the command that makes the artifact again.")
    verify: bool = setting(False, "Read every byte, and say what is damaged, missing or foreign.")


@command("runs")
def runs(args: Runs) -> Outcome:
    """List what the workspace holds, the newest first.

    With an artifact it says what that is, and with --command how to make it again. With --verify
    every file is compared with its hash, and exit code 1 says that one differs.

    Example: resa-lens runs
    """
    from resa_lens.artifacts import commands
    from resa_lens.artifacts import listing as listings

    if args.command and args.artifact is None:
        raise BadInputError("--command prints one artifact's command: name it, for example by id")
    workspace, reporter = args.open()
    listing = listings.scan(str(workspace.root))
    for text in listing.problems:
        reporter.note(f"left out: {text}")
    chosen = listing.artifacts
    if args.artifact is not None:
        chosen = (listings.named(listing, args.artifact),)
    note = reporter.note if args.verify else None
    rows = [listings.row(listing, artifact, verifying=note) for artifact in chosen]
    if args.artifact is not None:
        again = commands.made_by(chosen[0], args.workspace)
        if args.command and again is None:
            raise BadInputError(f"{chosen[0].relative}: {reports.UNMADE}")
        about = reports.artifact(listing.root, chosen[0], again)
        damaged = int(bool(rows[0].get("damaged")))
        return {**rows[0], "command": again}, [again] if args.command else about, damaged
    rows += [listings.unfinished_row(listing, work) for work in listing.under_way]
    values = {"runs": rows, "problems": list(listing.problems)}
    damaged = args.verify and (listing.problems or any(row.get("damaged") for row in rows))
    return values, reports.runs(rows, args.verify), int(bool(damaged))


@options("Output")
class App(Place):
    """Where the app is served."""

    port: int | None = setting(
        None,
        f"On localhost; {ports.PORT} by default, or the next one that is free.",
        min=1,
        max=65535,
    )
    no_browser: bool = setting(False, "Only serve; open the address yourself.")
    notes: Path | None = setting(
        None, "CSV file of your labels, notes and tags of features [RESA_LENS_NOTES]."
    )


@command("app")
def explorer(args: App) -> Outcome:
    """Open the feature explorer in a browser.

    Without --workspace and without ./resa-workspace it shows the example that ships.

    Example: resa-lens app --workspace resa-workspace
    """
    if importlib.util.find_spec("streamlit") is None:
        raise BadInputError("streamlit is not installed; run: pip install 'resa-lens[app]'")
    place = next(iter(places.candidates(args.workspace).values()))
    check_workspace(str(place.root))
    from resa_lens.artifacts import notes

    if args.notes:
        os.environ[notes.VARIABLE] = str(args.notes)
    if file := notes.notes_file():
        notes.read_notes(file)
    port, note = ports.free_port(args.port)
    typer.echo(f"workspace: {place.root} ({place.why})", err=True)
    if note:
        typer.echo(note, err=True)
    typer.echo(f"feature explorer: http://localhost:{port} (Ctrl+C ends it)", err=True)
    ports.serve(port, args.workspace, browser=not args.no_browser)
