"""Tables, whoever measured them: fit-mixture, regret, audit."""

from __future__ import annotations

from pathlib import Path

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import Output, Seeded
from resa_lens.cli.options import argument, command, options
from resa_lens.config import give_one, goes_with, setting
from resa_lens.files import check_file
from resa_lens.models.hookpoints import check_layer
from resa_lens.progress import ConsoleReporter
from resa_lens.stages.config import Recipe
from resa_lens.stages.reports import tables as reports


@options("Table")
class LayerTable(Seeded, Output):
    """A table with a row for each layer, and how a mixture is fitted to one of its columns."""

    table: Path = argument(
        "CSV with a column layer or layer_1_indexed.", metavar="TABLE.csv", check=check_file
    )
    column: str = setting(help="The column of counts or scores.")
    noise: float | None = setting(None, "Standard deviation of one layer's score.", min=0)
    recipe: Recipe = setting("robust", "Of the mixture: robust, or paper for the published one.")
    draws: int = setting(1000, "Draws of each null.", min=20, max=10**7)


@options("Table")
class FitMixture(LayerTable):
    """What is fitted, and against which nulls."""

    baseline: float | None = setting(None, "The untuned model's score; makes the values scores.")
    components: int = setting(3, "Gaussians of recipe paper.", min=1, max=100)
    restarts: int = setting(
        200, "Seeds that recipe paper tries besides its own; 0 is none.", min=0, max=10**5
    )
    against: str | None = setting(None, "A second column, to compare its components with.")
    against_baseline: float | None = setting(None, "The untuned model's score in that column.")

    def __post_init__(self) -> None:
        """Raise BadInputError where an option lacks the one that it goes with."""
        goes_with(self, "against_baseline", "against")


@command("fit-mixture")
def fit_mixture(args: FitMixture) -> Outcome:
    """Fit Gaussians over layers, with nulls and a verdict.

    Recipe paper says too what speaks against it: its convergence, other seeds, the uniform.

    Example: resa-lens fit-mixture data/paper/table6_hookpoints.csv --column feature_count
    """
    from resa_lens.layers import mixture
    from resa_lens.layers.tables import mixtures_of_table

    fit, alignment = mixtures_of_table(
        args.table, args.column, **args.pick("recipe", "components", "seed", "draws", "baseline"),
        **args.pick("noise", "restarts", "against", "against_baseline"),
    )  # fmt: skip
    objections = mixture.objections(fit)
    values = {**fit.to_dict(), "objections": list(objections)}
    if alignment:
        values["against"] = {"column": args.against, **alignment.to_dict()}
    return values, reports.mixture(args, fit, objections, alignment)


@options("Table")
class Regret(LayerTable):
    """The scores of a sweep, and what the selectors see."""

    counts_column: str | None = setting(None, "Features: for mixture, most-features and blend.")
    quality_column: str | None = setting(
        None, "Change of the loss with the SAE inserted: for quality."
    )
    effect_column: str | None = setting(None, "Causal effect beyond its control: for causal.")
    effect_se_column: str | None = setting(None, "Standard error of the effect.")
    checkpoints: Path | None = setting(
        None, "CSV with several rows a layer: their means are the scores instead.",
        check=check_file,
    )  # fmt: skip
    layer: list[str] | None = setting(
        None, "A layer to compare with the selectors'; may be repeated.", check=check_layer
    )
    n_layers: int | None = setting(
        None, "Layers of the model; the last in the table + 2.", min=1, max=10_000
    )

    def __post_init__(self) -> None:
        """Raise BadInputError where two options contradict each other, or one lacks another."""
        give_one(self, "noise", "checkpoints")
        goes_with(self, "effect_se_column", "effect_column")


@command("regret")
def regret(args: Regret) -> Outcome:
    """Say what each selector's layer cost in a sweep.

    A layer that is chosen at random is what they are compared with.

    Example: resa-lens regret data/paper/table6_hookpoints.csv --column average
    --counts-column feature_count --checkpoints data/paper/tables36_61_layer_checkpoints.csv
    """
    from resa_lens.layers.tables import regrets_of_table

    names = ("counts_column", "quality_column", "effect_column", "effect_se_column")
    regrets, answers, size = regrets_of_table(
        args.table, args.column, layers=args.layer or [], **args.pick(*names),
        **args.pick("checkpoints", "n_layers", "noise", "recipe", "seed", "draws"),
    )  # fmt: skip
    reasons = {name: answer.reason for name, answer in answers.items()}
    values = {**regrets.to_dict(), "column": args.column, "reasons": reasons}
    title = f"{(args.checkpoints or args.table).name}, {args.column}: regret of each selector"
    return values, reports.regrets_of(title, regrets, size, reasons, bool(args.checkpoints))


@options("Table")
class Audit(Seeded, Output):
    """What the table is, and what it is compared with."""

    table: Path = argument("A .csv, .jsonl or .parquet file, a row a checkpoint.", check=check_file)
    group_column: str | None = setting(
        None, "Column of the groups; layer, layer_1_indexed or model by itself."
    )
    questions: list[str] | None = setting(
        None, "Questions of a benchmark that is not known by name; may be repeated.",
        "--questions", "-n", metavar="NAME=N",
    )  # fmt: skip
    baseline: list[str] | None = setting(
        None, "What to compare with: an option for each benchmark, or the name of one group.",
        metavar="NAME=PERCENT",
    )  # fmt: skip
    discordance: float = setting(
        0.2, "Share of questions on which two models differ, if paired.", over=0, max=1
    )
    draws: int = setting(10_000, "Draws of each null.", min=20, max=10**7)


@command("audit")
def audit(args: Audit) -> Outcome:
    """Test a published table of checkpoints.

    Exchanged columns, groups against noise, best-of-n, standard errors.

    Example: resa-lens audit data/paper/tables36_61_layer_checkpoints.csv --group-column
    layer_1_indexed
    """
    from resa_lens.layers import audit as audits
    from resa_lens.layers.checkpoints import question_counts, read_checkpoints
    from resa_lens.layers.findings import summary

    checkpoints = read_checkpoints(
        args.table, group=args.group_column, questions=question_counts(args.questions or [])
    )
    rows, seconds = len(checkpoints.groups), audits.expected_seconds(checkpoints, args.draws)
    if seconds > 2:
        ConsoleReporter().note(f"{args.draws} permutations of {rows} rows: about {seconds:.0f} s")
    result = audits.audit(
        checkpoints, baseline=args.baseline or [], **args.pick("discordance", "draws", "seed")
    )
    sentences = list(summary(result))
    return {**result.to_dict(), "summary": sentences}, [*reports.audit(result), *sentences]
