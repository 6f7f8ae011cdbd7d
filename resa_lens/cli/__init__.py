"""The command line: parse, call, print; no logic.  Heavy modules are imported inside commands."""

from __future__ import annotations

from typing import Annotated

import typer

from resa_lens import __version__
from resa_lens.cli import (
    adapters,
    audit,
    compare,
    cost,
    demo,
    doctor,
    evals,
    features,
    interventions,
    layers,
    saes,
    scores,
    stability,
    sweep,
    tuning,
    workspace,
)

app = typer.Typer(
    name="resa-lens",
    help="Find where in a language model reasoning lives, and tune through what was found.",
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


app.command("demo")(demo.demo)
app.command("recommend-layers")(layers.recommend_layers)
app.command("stability")(stability.stability)
app.command("tune")(tuning.tune)
app.command("sweep")(sweep.sweep)
app.command("train-saes")(layers.train_saes)
app.command("count-features")(layers.count_features)
app.command("activity")(features.activity)
app.command("falsify")(features.falsify)
app.command("score-features")(scores.score_features)
app.command("match-features")(scores.match_features)
app.command("ablate")(interventions.ablate)
app.command("attribute")(interventions.attribute)
app.command("fit-mixture")(layers.fit_mixture)
app.command("regret")(stability.regret)
app.command("audit")(audit.audit)
app.command("eval")(evals.evaluate)
app.command("compare")(compare.compare)
app.command("merge")(adapters.merge)
app.command("cost")(cost.cost)
app.command("convert")(saes.convert)
app.command("runs")(workspace.runs)
app.command("app")(workspace.explorer)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line."""
    app()
