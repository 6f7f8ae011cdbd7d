"""Commands that end in a model's scores: demo, tune, eval, compare."""

from __future__ import annotations

from pathlib import Path
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
    SaesOption,
    SeedOption,
    ThreadsOption,
    TokensOption,
    TopkOption,
    WorkspaceOption,
    YesOption,
)

TasksOption = Annotated[
    str, typer.Option("--tasks", help="tiny (levels 1 to 3) or a .jsonl/.parquet/.csv file.")
]
NewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.", min=1)
]


def demo(
    model: ModelOption = "tiny-reasoner",
    budget: Annotated[str, typer.Option(help="full, or test for a quick pass.")] = "full",
    learning_rate: Annotated[
        float, typer.Option(help="Of the tuning; the paper's is 1e-6, for a larger model.", min=0.0)
    ] = 1e-4,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the main job end to end: SAEs, counts, mixture, recommendation, tuning, scores, page.

    Example: resa-lens demo
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.features.exclusive import RULES
        from resa_lens.hookpoints import describe_layer
        from resa_lens.pipeline import demo as pipeline

        ctx = common.context(workspace, seed, device, dtype, force, threads)
        ctx.reporter.note(
            "expected: about 3 minutes on two cores, 1 GB of memory, 60 MB on disk"
            if budget == "full"
            else "expected: about half a minute, 1 GB of memory, 15 MB on disk"
        )
        result = pipeline.demo(ctx, model, budget, learning_rate)
        found, tuned = result.discovery, result.tuned
        made = found.recommendation

        def show() -> None:
            layers = common.table("Layers", "layer", *RULES, "SAE FVU", "")
            for item in found.counts.layers:
                layers.add_row(
                    describe_layer(item.layer, made.n_layers),
                    *[str(len(item.features[rule])) for rule in RULES],
                    f"{found.saes.quality[item.layer]['fvu']:.4f}",
                    "tuned" if item.layer == tuned.layer else "",
                )
            scores = common.table("Scores", "", "accuracy", "95 % interval", "n")
            for row in pipeline.score_rows(tuned):
                scores.add_row(*row)
            common.show_all(
                layers,
                f"verdict: {result.fits['all'].verdict}",
                made.reason,
                scores,
                f"everything lies in {ctx.workspace.root}:",
                f"  SAEs            {found.saes.folder}",
                f"  counts          {found.counts_folder}",
                f"  recommendation  {found.folder}",
                f"  adapter         {tuned.adapter}",
                f"  scores          {tuned.base_folder}\n                  {tuned.tuned_folder}",
                f"  page            {result.page}",
                "next: resa-lens app",
            )

        return result.to_dict(), show

    common.run(job, as_json)


def tune(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The target; the newest recommendation's by default."),
    ] = None,
    layer: Annotated[str, typer.Option(help="auto, 12 (0-based) or 13th (1-based).")] = "auto",
    preset: Annotated[str, typer.Option(help="paper, or reference for the authors' code.")] = (
        "paper"
    ),
    site: Annotated[
        str | None, typer.Option(help="mlp_out or resid_post; by default the preset's.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="adapted or base: the distribution without the SAE.")
    ] = None,
    detach_reference: Annotated[
        bool | None,
        typer.Option("--detach-reference/--reference-gradient", help="Gradient of the reference."),
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help='"sae||reference" or "reference||sae".')
    ] = None,
    sae_gradient: Annotated[
        bool | None, typer.Option("--sae-gradient/--no-sae-gradient", help="Through the SAE.")
    ] = None,
    reduction: Annotated[str | None, typer.Option(help="mean or sum over tokens.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine or constant.")] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Clip the gradient norm.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="Modules with LoRA, comma-separated (q_proj,k_proj,...).")
    ] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank.", min=1)] = 32,
    alpha: Annotated[int, typer.Option(help="LoRA alpha.", min=1)] = 128,
    dropout: Annotated[float, typer.Option(help="LoRA dropout.", min=0.0, max=0.99)] = 0.05,
    learning_rate: Annotated[float, typer.Option(help="AdamW's.", min=0.0)] = 1e-6,
    batch: Annotated[int, typer.Option(help="Sequences a step.", min=1)] = 1,
    steps: Annotated[
        int | None, typer.Option(help="Two epochs from width 1024 on, else 100.", min=1)
    ] = None,
    source_model: Annotated[
        str | None, typer.Option(help="The model whose SAE is inserted; the target by default.")
    ] = None,
    data: DataOption = "tiny",
    trigger_data: Annotated[str | None, typer.Option(help="For the SAE; else --data.")] = None,
    elicitation_data: Annotated[str | None, typer.Option(help="For tuning; else --data.")] = None,
    saes: SaesOption = None,
    control: Annotated[
        str | None,
        typer.Option(help="In the SAE's place, with its FVU: noise, pca, shuffled or random."),
    ] = None,
    tokens: TokensOption = None,
    latents: LatentsOption = None,
    k: TopkOption = 32,
    base: BaseOption = None,
    allow_site_mismatch: MismatchOption = False,
    tasks: TasksOption = "tiny",
    limit: Annotated[int, typer.Option(help="Questions to score before and after.", min=1)] = 500,
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
    """Tune LoRA adapters through a layer's frozen SAE, and score before and after.

    Example: resa-lens tune --model tiny-reasoner --layer auto
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.corpora import CorpusConfig
        from resa_lens.errors import BadInputError
        from resa_lens.evals.engines import GenerationConfig
        from resa_lens.evals.run import EvalConfig
        from resa_lens.hookpoints import describe_layer
        from resa_lens.pipeline import demo as pipeline_demo
        from resa_lens.pipeline.discovery import newest_recommendation
        from resa_lens.pipeline.tuning import TuneJob, tune_run
        from resa_lens.saes.train import SaeConfig
        from resa_lens.tuning.objective import preset as named
        from resa_lens.tuning.train import TuneConfig

        ctx = common.context(workspace, seed, device, dtype, force, threads)
        objective = named(
            preset,
            site=site,
            reference=reference,
            reference_gradient=None if detach_reference is None else not detach_reference,
            direction=direction,
            sae_gradient=sae_gradient,
            reduction=reduction,
            schedule=schedule,
            clip_norm=clip_norm,
            targets=tuple(targets.split(",")) if targets else None,
        )
        name = model
        if name is None:
            newest = newest_recommendation(ctx, None, None)
            if newest is None:
                raise BadInputError(
                    f"--model is missing and {ctx.workspace.root} holds no recommendation; "
                    "name a model, for example --model tiny-reasoner"
                )
            name = str(newest[1].results["model"])
            ctx.reporter.note(f"model: {name}, of the newest recommendation")
        tuned = tune_run(
            ctx,
            TuneJob(
                model=name,
                layer=layer,
                source_model=source_model,
                objective=objective,
                lora=TuneConfig(rank, alpha, dropout, learning_rate, batch, seed=seed),
                sae=SaeConfig(objective.site, latents, k, tokens=tokens, seed=seed),
                trigger=CorpusConfig(source=trigger_data or data, seed=seed),
                elicitation=CorpusConfig(source=elicitation_data or data, seed=seed),
                steps=steps,
                saes=saes,
                control=control,
                base=base,
                allow_mismatch=allow_site_mismatch,
                evaluation=EvalConfig(
                    limit=limit, generation=GenerationConfig(max_new_tokens=max_new_tokens)
                ),
                eval_source=tasks,
            ),
        )

        def show() -> None:
            where = describe_layer(tuned.layer, tuned.model.n_layers)
            title = f"{tuned.model.slug}, {where}, {tuned.site}, preset {preset}"
            rows = common.table(title, "", "accuracy", "95 % interval", "n")
            for row in pipeline_demo.score_rows(tuned):
                rows.add_row(*row)
            common.show_all(rows, f"adapter: {tuned.adapter}")

        return {**tuned.to_dict(), "preset": preset}, show

    common.run(job, as_json)


def evaluate(
    model: ModelOption = "tiny-reasoner",
    adapter: Annotated[
        str | None, typer.Option(help="A PEFT adapter folder to put onto the model.")
    ] = None,
    tasks: TasksOption = "tiny",
    limit: Annotated[int | None, typer.Option(help="Questions at most.", min=1)] = None,
    levels: Annotated[str | None, typer.Option(help='Levels, for example "1,2,3" or "4".')] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus.", min=0.0, max=1.0)] = 1.0,
    samples: Annotated[int, typer.Option(help="Answers a question.", min=1)] = 1,
    direct: Annotated[
        bool, typer.Option("--direct", help="Make it answer at once, with empty think tags.")
    ] = False,
    system_prompt: Annotated[
        str | None, typer.Option(help="r1, steps, short, a text or @file.")
    ] = None,
    max_new_tokens: NewTokensOption = 160,
    base: BaseOption = None,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score a model, or a model with an adapter, on verified questions.

    Example: resa-lens eval --model tiny-reasoner --limit 500
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.errors import BadInputError
        from resa_lens.evals.engines import GenerationConfig
        from resa_lens.evals.run import EvalConfig
        from resa_lens.pipeline.scores import eval_run, load_eval_items
        from resa_lens.prompts import resolve_system_prompt

        try:
            chosen = tuple(int(part) for part in levels.split(",")) if levels else None
        except ValueError as error:
            raise BadInputError(
                f'levels {levels!r} are no numbers; use for example "1,2"'
            ) from error
        config = EvalConfig(
            limit=limit,
            levels=chosen,
            generation=GenerationConfig(max_new_tokens, temperature, top_p, seed=seed),
            prompt_style="direct" if direct else "reason",
            system_prompt=resolve_system_prompt(system_prompt) if system_prompt else None,
            samples=samples,
        )
        ctx = common.context(workspace, seed, device, dtype, force, threads)
        items = load_eval_items(tasks, config)
        host = ctx.model(adapter, base or model) if adapter else ctx.model(model, base)
        folder, result = eval_run(ctx, host, items, config, source=tasks)

        def show() -> None:
            rows = common.table(f"{host.slug}", "", "accuracy", "95 % interval", "n")
            rows.add_row("all", *common.percent(result.accuracy, result.ci, result.n))
            for level, score in sorted(result.by_level.items()):
                rows.add_row(f"level {level}", *common.percent(score.accuracy, score.ci, score.n))
            for family, score in sorted(result.by_task.items()):
                rows.add_row(family, *common.percent(score.accuracy, score.ci, score.n))
            common.show_all(rows, f"{result.tokens} tokens, {result.seconds:.0f} s; in {folder}")

        return {**result.to_dict(), "folder": str(folder), "model": host.name}, show

    common.run(job, as_json)


def compare(
    run_a: Annotated[Path, typer.Argument(help="An evaluation folder (evals/<run>): the base.")],
    run_b: Annotated[Path, typer.Argument(help="Another on the same questions.")],
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare two evaluations question by question.

    Example: resa-lens compare resa-workspace/evals/A resa-workspace/evals/B
    """

    def job() -> tuple[dict[str, Any], Any]:
        from dataclasses import asdict

        from resa_lens.pipeline.scores import compare_results, read_eval

        ctx = common.context(workspace, seed, "cpu", "auto", False, None)
        folders = [p if p.exists() else ctx.workspace.path("evals", str(p)) for p in (run_a, run_b)]
        first, second = (read_eval(ctx, folder) for folder in folders)
        paired = compare_results(first, second, seed)

        def show() -> None:
            rows = common.table("B minus A", "", "accuracy", "95 % interval", "n")
            rows.add_row("A", *common.percent(first.accuracy, first.ci, first.n))
            rows.add_row("B", *common.percent(second.accuracy, second.ci, second.n))
            rows.add_row(
                "difference",
                f"{100 * paired.difference:+.1f} points",
                f"{100 * paired.ci[0]:+.1f} to {100 * paired.ci[1]:+.1f}",
                f"{paired.changed} changed",
            )
            common.show_all(rows, f"p = {paired.p_value:.3g} ({paired.note})")

        return asdict(paired), show

    common.run(job, as_json)
