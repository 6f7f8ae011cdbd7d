"""Commands that judge a choice of layers: stability, regret."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import (
    DataOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    LatentsOption,
    LayersOption,
    MismatchOption,
    ModelOption,
    SaesOption,
    SeedOption,
    SiteOption,
    ThreadsOption,
    TokensOption,
    TopkOption,
    WorkspaceOption,
    YesOption,
)
from resa_lens.cli.layers import ChatOption, FirstOption, ThresholdOption

if TYPE_CHECKING:
    from resa_lens.layers.regret import Regrets
    from resa_lens.layers.stability import Stability


def _figure(value: float | None, shape: str = ".3g") -> str:
    return "" if value is None else format(value, shape)


def _show_stability(name: str, made: Stability) -> None:
    rows = common.table(name, "table", "features", "verdict", "recommended (0-based)")
    for row in made.tables:
        layers = ", ".join(map(str, row.recommended)) if row.answered else "none: the middle"
        rows.add_row(row.name, f"{row.n:g}", row.verdict, layers)
    pairs = common.table(
        "Pairs of tables that differ in", "", "pairs", "mean Spearman", "p", "same first layer",
        "by chance",
    )  # fmt: skip
    for item in [*made.factors, *([made.between] if made.between else [])]:
        pairs.add_row(
            item.factor if item is made.between else f"{item.factor} alone",
            str(item.pairs),
            _figure(item.spearman, "+.2f"),
            _figure(item.spearman_p),
            f"{item.same_first} of {item.answered}",
            f"{100 * item.chance:.0f} %",
        )
    shared = "tables of one SAE share its features: only those of several seeds are independent"
    aligned = [pair for pair in made.pairs if pair.alignment_p is not None]
    close = sum((pair.alignment_p or 1.0) <= 0.05 for pair in aligned)
    common.show_all(
        rows,
        pairs,
        shared,
        f"alignment: {len(aligned)} of {len(made.pairs)} pairs have as many components each; in "
        f"{close} their means lie closer than in 95 % of shuffles",
        f"verdict: {made.verdict}",
        made.reason,
        made.next_step,
    )


def stability(
    model: ModelOption = "tiny-reasoner",
    selector: Annotated[str, typer.Option(help="mixture or most-features.")] = "mixture",
    recipe: Annotated[str, typer.Option(help="Of the mixture: robust or paper.")] = "robust",
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="r1, steps, short, a text or @file; repeat it; all three."),
    ] = None,
    rules: Annotated[
        list[str] | None, typer.Option("--rule", help="all, any or either; repeat it; all three.")
    ] = None,
    chat_template: ChatOption = False,
    threshold: ThresholdOption = 0.0,
    ignore_first: FirstOption = False,
    layers: LayersOption = None,
    site: SiteOption = "mlp_out",
    saes: SaesOption = None,
    tokens: TokensOption = None,
    latents: LatentsOption = None,
    k: TopkOption = 32,
    data: DataOption = "tiny",
    allow_site_mismatch: MismatchOption = False,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Recommend layers with every prompt, counting rule and SAE seed: does the answer return?

    Seeds are those of `train-saes --seeds N`; with one there is nothing independent to compare.

    Example: resa-lens stability --model tiny-reasoner --json
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.corpora import CorpusConfig
        from resa_lens.features.exclusive import RULES, CountConfig
        from resa_lens.hookpoints import parse_layers
        from resa_lens.pipeline.discovery import stability_run
        from resa_lens.prompts import SYSTEM_PROMPTS
        from resa_lens.saes.train import SaeConfig

        ctx = common.context(workspace, seed, device, dtype, force, threads)
        host = ctx.model(model)
        folder, made = stability_run(
            ctx,
            host,
            sae=SaeConfig(site, latents, k, tokens=tokens, seed=seed),
            corpus=CorpusConfig(source=data, seed=seed),
            count=CountConfig(
                chat_template=chat_template, threshold=threshold, ignore_first=ignore_first
            ),
            layers=parse_layers(layers, host.n_layers) if layers else None,
            prompts=prompts or tuple(SYSTEM_PROMPTS),
            rules=rules or tuple(RULES),
            selector=selector,
            recipe=recipe,
            saes=saes,
            allow_mismatch=allow_site_mismatch,
        )
        values = {"model": host.name, "site": site, "selector": selector, "folder": str(folder)}
        title = f"{host.slug}, site {site}, selector {selector}"
        return {**values, **made.to_dict()}, lambda: _show_stability(title, made)

    common.run(job, as_json)


def _show_regrets(title: str, made: Regrets, n_layers: int, notes: list[str]) -> None:
    from resa_lens.hookpoints import describe_layer

    def with_interval(value: str, ci: tuple[float, float] | None) -> str:
        return f"{value} ({ci[0]:.2f} to {ci[1]:.2f})" if ci else value

    title += f" ({100 * made.level:.0f} % intervals)" if made.random_ci else ""
    rows = common.table(title, "selector", "layer", "score", "regret", "above random", "as good")
    for row in made.selectors:
        rows.add_row(
            row.selector,
            describe_layer(row.layer, n_layers),
            f"{row.score:.2f}",
            with_interval(f"{row.regret:.2f}", row.ci),
            with_interval(f"{row.gain:+.2f}", row.gain_ci),
            f"{100 * row.as_good:.0f} %",
        )
    chance = with_interval(f"{made.random:.2f}", made.random_ci)
    rows.add_row("(random)", "any", "", chance, "", "")
    best = describe_layer(made.best, n_layers)
    common.show_all(rows, f"best of {made.layers} layers: {best}", *notes)


def regret(
    table: Annotated[
        Path,
        typer.Argument(help="CSV with a column layer or layer_1_indexed.", metavar="TABLE.csv"),
    ],
    column: Annotated[str, typer.Option(help="The column of a sweep's scores.")],
    counts_column: Annotated[
        str | None, typer.Option(help="Features: for mixture, most-features and blend.")
    ] = None,
    quality_column: Annotated[
        str | None, typer.Option(help="Change of the loss with the SAE inserted: for quality.")
    ] = None,
    effect_column: Annotated[
        str | None, typer.Option(help="Causal effect beyond its control: for causal.")
    ] = None,
    effect_se_column: Annotated[
        str | None, typer.Option(help="Standard error of the effect.")
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="CSV with several rows a layer: their means are the scores instead."),
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Standard deviation of one score of the table.", min=0.0)
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option("--layer", help="A layer to set beside; may be repeated.")
    ] = None,
    n_layers: Annotated[
        int | None, typer.Option(help="Layers of the model; the last in the table + 2.", min=1)
    ] = None,
    recipe: Annotated[str, typer.Option(help="Of the mixture: robust or paper.")] = "robust",
    draws: Annotated[int, typer.Option(help="Draws of the mixture's nulls.", min=20)] = 1000,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Say what each selector's layer cost in a sweep, beside a layer chosen at random.

    Example: resa-lens regret data/paper/table6_hookpoints.csv --column average
    --counts-column feature_count --checkpoints data/paper/tables36_61_layer_checkpoints.csv
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.errors import BadInputError
        from resa_lens.hookpoints import parse_layer
        from resa_lens.layers import read_replicates, read_table
        from resa_lens.layers.selectors import Effect, Scores, regrets_of_selectors

        if checkpoints is not None and noise is not None:
            raise BadInputError(f"--noise {noise:g} and --checkpoints {checkpoints}: give one")
        if effect_se_column is not None and effect_column is None:
            raise BadInputError(
                f"--effect-se-column {effect_se_column} goes with --effect-column COLUMN"
            )
        scores: Scores = (
            read_replicates(checkpoints, column) if checkpoints else read_table(table, column)
        )
        size = n_layers or max(scores) + 2
        if max(scores) >= size:
            raise BadInputError(
                f"--n-layers {size}: the table has layer {max(scores)} (0-based); give at least "
                f"{max(scores) + 1}"
            )
        effects: dict[int, Effect] | None = None
        if effect_column:
            effects = dict(read_table(table, effect_column))
        if effect_column and effect_se_column:
            errors = read_table(table, effect_se_column)
            effects = {x: (v, errors[x]) for x, v in read_table(table, effect_column).items()}
        made, answers = regrets_of_selectors(
            scores,
            n_layers=size,
            counts=read_table(table, counts_column) if counts_column else None,
            quality=read_table(table, quality_column) if quality_column else None,
            causal=effects,
            chosen={f"layer {text}": parse_layer(text, size) for text in layer or []},
            se=None if noise is None else dict.fromkeys(scores, noise),
            recipe=recipe,
            seed=seed,
            draws=draws,
        )
        notes = [f"{name}: {answer.reason}" for name, answer in answers.items()]
        if made.noise is None:
            notes.append("one score a layer: no interval; give --checkpoints or --noise")
        else:
            known = "as given" if made.freedom is None else f"{made.freedom} degrees of freedom"
            notes.append(f"noise of one score: sd {made.noise:.2f}, {known}")
        if checkpoints:
            notes.append(
                "rows of a layer are taken as independent; checkpoints of one run are not, and "
                "make the intervals too narrow"
            )
        values = {
            **made.to_dict(),
            "column": column,
            "reasons": {name: answer.reason for name, answer in answers.items()},
        }
        title = f"{(checkpoints or table).name}, {column}: regret of each selector"
        return values, lambda: _show_regrets(title, made, size, notes)

    common.run(job, as_json)
