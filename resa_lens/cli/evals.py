"""Scores of a model on questions: eval."""

from __future__ import annotations

from pathlib import Path
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
    SeedOption,
    ThreadsOption,
    WorkspaceOption,
    YesOption,
)

TasksOption = Annotated[
    str,
    typer.Option(
        "--tasks",
        help="Comma-separated: tiny (levels 1 to 3), aime24, aime25, math500, gpqa-diamond, amc23, "
        "minerva (from the hub or its cache), math500=FILE_OR_FOLDER, a .jsonl/.parquet/.csv "
        'file; with ":families=a+b" and ":levels=1+2".',
    ),
]


def evaluate(
    model: ModelOption = "tiny-reasoner",
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="A PEFT adapter folder to put onto the model; again for a sum."),
    ] = None,
    scale: Annotated[
        list[float] | None, typer.Option(help="Factor on the adapters: one, or one each.")
    ] = None,
    tasks: TasksOption = "tiny",
    limit: Annotated[int | None, typer.Option(help="Questions at most, of each task.", min=1)] = (
        None
    ),
    levels: Annotated[str | None, typer.Option(help='Levels, for example "1,2,3" or "4".')] = None,
    question_column: Annotated[
        str | None, typer.Option(help="Of a file: column of the question.")
    ] = None,
    answer_column: Annotated[str | None, typer.Option(help="Of a file: column of the answer.")] = (
        None
    ),
    engine: Annotated[
        str,
        typer.Option(
            help="hf, vllm, or lighteval: hf inside lighteval, with its metric beside ours."
        ),
    ] = "hf",
    merge: Annotated[
        bool, typer.Option("--merge", help="Engine vllm: merge adapters into the weights.")
    ] = False,
    setting: Annotated[
        str,
        typer.Option(
            help="What the options below default to: greedy, or paper (temperature 0.6, top-p "
            "0.95, 32,768 new tokens, one sample, chat template)."
        ),
    ] = "greedy",
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy.", min=0.0, show_default="0")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus.", min=0.0, max=1.0, show_default="1")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Answers a question.", min=1, show_default="1")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens.", min=1, show_default="160")
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template", help="Ask through the model's chat template."
        ),
    ] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="Make it answer at once, with empty think tags.")
    ] = False,
    system_prompt: Annotated[
        str | None, typer.Option(help="r1, steps, short, a text or @file.")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that an answer may take; a longer one counts as wrong."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Answers at a time; vllm has its own way.", min=1)
    ] = 64,
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
    """Score a model, or a model with adapters, on verified questions.

    Answers are kept as they come: a killed run goes on with the questions that are left.

    Example: resa-lens eval --model tiny-reasoner --limit 500
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.errors import BadInputError
        from resa_lens.evals.engines import GenerationConfig
        from resa_lens.evals.run import SETTINGS, EvalConfig
        from resa_lens.pipeline.scores import check_engine, eval_run, load_eval_items
        from resa_lens.prompts import resolve_system_prompt

        if setting not in SETTINGS:
            raise BadInputError(f"setting {setting!r} is unknown; use {' or '.join(SETTINGS)}")
        check_engine(engine)
        if scale and not adapter:
            raise BadInputError(f"--scale {scale[0]:g} without an adapter: give --adapter FOLDER")
        if merge and engine != "vllm":
            raise BadInputError(f"--merge is for engine vllm, this is {engine}: leave it out")
        defaults = SETTINGS[setting]

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        config = EvalConfig(
            limit=limit,
            levels=common.levels(levels),
            generation=GenerationConfig(
                given(max_new_tokens, defaults.max_new_tokens),
                given(temperature, defaults.temperature),
                given(top_p, defaults.top_p),
                batch_size=batch_size,
                seed=seed,
                timeout=timeout,
            ),
            prompt_style="direct" if direct else "reason",
            system_prompt=resolve_system_prompt(system_prompt) if system_prompt else None,
            samples=given(samples, defaults.samples),
            chat_template=given(chat_template, defaults.chat_template),
        )
        ctx = common.context(workspace, seed, device, dtype, force, threads)
        items = load_eval_items(
            tasks, config, question_column=question_column, answer_column=answer_column
        )
        # The base of --adapter is the model; only a model that is an adapter has one of its own.
        stacked = (Path(model).expanduser() / "adapter_config.json").exists()
        name, under = (base or model, None) if adapter and not stacked else (model, base)
        host = ctx.model(name, under, adapters=adapter or (), scale=scale or 1.0)
        for note in host.notes:
            ctx.reporter.note(f"note: {note}")
        folder, result = eval_run(
            ctx, host, items, config, source=tasks, engine=engine,  # pyright: ignore[reportArgumentType]
            lora="merged" if merge else "request",
        )  # fmt: skip

        def show() -> None:
            rows = common.table(f"{host.slug}", "", "accuracy", "95 % interval", "n")
            rows.add_row("all", *common.percent(result.accuracy, result.ci, result.n))
            for level, score in sorted(result.by_level.items()):
                rows.add_row(f"level {level}", *common.percent(score.accuracy, score.ci, score.n))
            for family, score in result.by_task.items():
                rows.add_row(family, *common.percent(score.accuracy, score.ci, score.n))
            lines = [f"{result.tokens} tokens, {result.seconds:.0f} s; in {folder}"]
            if result.unfinished:
                late = f", {result.timed_out} of them by the time-out" if result.timed_out else ""
                lines.insert(0, f"{result.unfinished} answers were cut off{late}")
            if result.peer:
                lines.insert(
                    0,
                    f"{result.peer['harness']} ({result.peer['metric']}): "
                    f"{100 * result.peer['accuracy']:.1f} %; judges "
                    f"{result.peer['differing']} answers differently",
                )
            common.show_all(rows, *lines)

        return {**result.to_dict(), "folder": str(folder), "model": host.name}, show

    common.run(job, as_json)
