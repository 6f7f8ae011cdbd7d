"""SAE-Tuning and its scores: tune."""

from __future__ import annotations

import os
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
    weight_decay: Annotated[float, typer.Option(help="AdamW's.", min=0.0)] = 0.01,
    batch: Annotated[int, typer.Option(help="Sequences a batch.", min=1)] = 1,
    accumulation: Annotated[
        int, typer.Option(help="Batches an update, over all processes.", min=1)
    ] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Keep the adapter after every so many updates.", min=1)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Two epochs from width 1024 on, else 100.", min=1)
    ] = None,
    source_model: Annotated[
        str | None, typer.Option(help="The model whose SAE is inserted; the target by default.")
    ] = None,
    data: DataOption = "tiny",
    question_column: Annotated[
        str | None, typer.Option(help="Of the data for tuning: column of the question.")
    ] = None,
    answer_column: Annotated[
        str | None, typer.Option(help="Of the data for tuning: column of the answer.")
    ] = None,
    trigger_data: Annotated[str | None, typer.Option(help="For the SAE; else --data.")] = None,
    elicitation_data: Annotated[str | None, typer.Option(help="For tuning; else --data.")] = None,
    saes: SaesOption = None,
    control: Annotated[
        str | None,
        typer.Option(
            help="In the SAE's place, with its FVU: noise, pca, shuffled, random, random-weights; "
            "none or identity, with which nothing trains; or in place of the objective: cot-free, "
            "cot, own-samples.",
        ),
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
        from resa_lens.pipeline.adapters import TuneJob, adapter_run
        from resa_lens.pipeline.discovery import newest_recommendation
        from resa_lens.pipeline.tuning import tune_run
        from resa_lens.saes.train import SaeConfig
        from resa_lens.saes.world import ALONE, local_device
        from resa_lens.tuning.loop import TuneConfig, join_processes
        from resa_lens.tuning.objective import preset as named

        ctx = common.context(workspace, seed, local_device(device), dtype, force, threads)
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
        asked = TuneJob(
            model=name,
            layer=layer,
            source_model=source_model,
            objective=objective,
            lora=TuneConfig(
                rank,
                alpha,
                dropout,
                learning_rate,
                batch,
                seed=seed,
                accumulation=accumulation,
                gradient_checkpointing=gradient_checkpointing,
                checkpoint_every=checkpoint_every,
                weight_decay=weight_decay,
            ),
            sae=SaeConfig(objective.site, latents, k, tokens=tokens, seed=seed),
            trigger=CorpusConfig(source=trigger_data or data, seed=seed),
            elicitation=CorpusConfig(
                source=elicitation_data or data,
                question_column=question_column,
                answer_column=answer_column,
                seed=seed,
            ),
            steps=steps,
            saes=saes,
            control=control,
            base=base,
            allow_mismatch=allow_site_mismatch,
            evaluation=EvalConfig(
                limit=limit, generation=GenerationConfig(max_new_tokens=max_new_tokens)
            ),
            eval_source=tasks,
        )
        world = join_processes(ctx.device) if "RANK" in os.environ else ALONE
        if world.size > 1:
            adapter_run(ctx, asked, world=world)
            # --force again would let one process alone make anew what all have made.
            ctx.force = False
        if world.rank:
            return {}, lambda: None
        tuned = tune_run(ctx, asked)

        def show() -> None:
            where = f"objective {control}"
            if tuned.layer is not None:
                where = f"{describe_layer(tuned.layer, tuned.model.n_layers)}, {tuned.site}"
            title = f"{tuned.model.slug}, {where}, preset {preset}"
            rows = common.table(title, "", "accuracy", "95 % interval", "n")
            for row in pipeline_demo.score_rows(tuned):
                rows.add_row(*row)
            common.show_all(rows, f"adapter: {tuned.adapter}")

        return {**tuned.to_dict(), "preset": preset}, show

    common.run(job, as_json)
