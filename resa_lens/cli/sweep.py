"""Many tunings and their scores: sweep."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import (
    BaseOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    LatentsOption,
    MismatchOption,
    ModelOption,
    NewTokensOption,
    SaesOption,
    SeedOption,
    TasksOption,
    ThreadsOption,
    TokensOption,
    TopkOption,
    WorkspaceOption,
    YesOption,
)


def sweep(
    model: ModelOption = "tiny-reasoner",
    layers: Annotated[
        str | None,
        typer.Option(help='"all", "1-26", "3,5,13th"; all but the first and the last by default.'),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Tunings of each layer: adapters, dropout, order of data.", min=1)
    ] = 3,
    controls: Annotated[
        str | None, typer.Option(help='Comma-separated names as of tune --control, or "all".')
    ] = None,
    control_layers: Annotated[
        str | None, typer.Option(help="Layers of the controls; a third and two thirds deep.")
    ] = None,
    source_model: Annotated[
        str | None, typer.Option(help="The model whose SAEs are inserted; the target by default.")
    ] = None,
    preset: Annotated[str, typer.Option(help="paper, or reference for the authors' code.")] = (
        "paper"
    ),
    site: Annotated[
        str | None, typer.Option(help="mlp_out or resid_post; by default the preset's.")
    ] = None,
    rule: Annotated[str, typer.Option(help="Counts that the selectors see: all, any, either.")] = (
        "all"
    ),
    effects: Annotated[
        bool, typer.Option(help="Measure causal effects, for the selectors causal and blend.")
    ] = True,
    rank: Annotated[int, typer.Option(help="LoRA rank.", min=1)] = 32,
    alpha: Annotated[int, typer.Option(help="LoRA alpha.", min=1)] = 128,
    dropout: Annotated[float, typer.Option(help="LoRA dropout.", min=0.0, max=0.99)] = 0.05,
    learning_rate: Annotated[float, typer.Option(help="AdamW's.", min=0.0)] = 1e-6,
    batch: Annotated[int, typer.Option(help="Sequences a step.", min=1)] = 1,
    steps: Annotated[
        int | None, typer.Option(help="Two epochs from width 1024 on, else 100.", min=1)
    ] = None,
    data: DataOption = "tiny",
    saes: SaesOption = None,
    tokens: TokensOption = None,
    latents: LatentsOption = None,
    k: TopkOption = 32,
    allow_site_mismatch: MismatchOption = False,
    base: BaseOption = None,
    tasks: TasksOption = "tiny",
    levels: Annotated[
        str | None, typer.Option(help='Levels of the questions, for example "1,2,3,4".')
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions at most.", min=1)] = None,
    max_new_tokens: NewTokensOption = 160,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tune through every layer's SAE, with several seeds and controls, and score each.

    Killed, the same command goes on; run by several processes, they share the jobs.

    Example: resa-lens sweep --model tiny-reasoner --layers all --seeds 3 --learning-rate 1e-4
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.corpora import CorpusConfig
        from resa_lens.evals.engines import GenerationConfig
        from resa_lens.evals.run import EvalConfig
        from resa_lens.hookpoints import parse_layers
        from resa_lens.pipeline.adapters import TuneJob
        from resa_lens.pipeline.controls import CONTROLS
        from resa_lens.pipeline.sweep import SweepConfig, jobs_of, sweep_run
        from resa_lens.pipeline.sweep_page import (
            PAGE,
            control_cells,
            findings,
            layer_cells,
            selector_cells,
        )
        from resa_lens.saes.train import SaeConfig
        from resa_lens.tuning.objective import preset as named
        from resa_lens.tuning.sft import KINDS
        from resa_lens.tuning.train import TuneConfig

        ctx = common.context(workspace, seed, device, dtype, force, threads)
        objective = named(preset, site=site)
        host = ctx.model(model, base)
        chosen: tuple[str, ...] = ()
        if controls:
            named_ones = dict.fromkeys(part.strip() for part in controls.split(","))
            chosen = (*CONTROLS, *KINDS) if controls == "all" else tuple(named_ones)
        config = SweepConfig(
            tune=TuneJob(
                model=model,
                source_model=source_model,
                objective=objective,
                lora=TuneConfig(rank, alpha, dropout, learning_rate, batch, seed=seed),
                sae=SaeConfig(objective.site, latents, k, tokens=tokens, seed=seed),
                trigger=CorpusConfig(source=data, seed=seed),
                elicitation=CorpusConfig(source=data, seed=seed),
                steps=steps,
                saes=saes,
                base=base,
                allow_mismatch=allow_site_mismatch,
                evaluation=EvalConfig(
                    limit=limit,
                    levels=common.levels(levels),
                    generation=GenerationConfig(max_new_tokens=max_new_tokens),
                ),
                eval_source=tasks,
            ),
            layers=tuple(parse_layers(layers, host.n_layers)) if layers else None,
            seeds=seeds,
            controls=chosen,
            control_layers=(
                tuple(parse_layers(control_layers, host.n_layers)) if control_layers else None
            ),
            rule=rule,
            effects=effects,
        )
        ctx.reporter.note(f"{len(jobs_of(config, host.n_layers))} tunings, each scored")
        folder, made = sweep_run(ctx, config)

        def show() -> None:
            parts: list[Any] = []
            named_cells = {"Layers": layer_cells(made), "Selectors": selector_cells(made)}
            if made.controls:
                named_cells["Controls"] = control_cells(made)
            for title, (header, rows) in named_cells.items():
                shown = common.table(title, *header)
                for row in rows:
                    shown.add_row(*row)
                parts.append(shown)
            common.show_all(*parts, *findings(made), f"page: {folder / PAGE}")

        return {**made.to_dict(), "folder": str(folder), "page": str(folder / PAGE)}, show

    common.run(job, as_json)
