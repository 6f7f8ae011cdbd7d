"""Scores of a model on questions: eval."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    ModelOption,
    NewTokensOption,
    SeedOption,
    TasksOption,
    ThreadsOption,
    WorkspaceOption,
    YesOption,
)


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
