"""Scores of models and their differences: eval, compare."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import (
    AdapterBase,
    Adapters,
    OnModel,
    Output,
    Place,
    Planned,
    Questions,
    Seeded,
)
from resa_lens.cli.options import argument, command, options, part
from resa_lens.config import setting as option
from resa_lens.errors import BadInputError
from resa_lens.evals.config import EngineName, EvalConfig, GenerationConfig, preset
from resa_lens.files import check_path, named_path
from resa_lens.stages.reports import evals as reports
from resa_lens.stages.reports.plans import plan as plan_report


@options("Questions")
class Eval(Planned, Adapters, AdapterBase, Questions, OnModel):
    """What is asked of which model, and how its answers are drawn."""

    asking: EvalConfig = part(
        EvalConfig, "limit levels system_prompt extraction", "Questions", limit=500
    )
    question_column: str | None = option(None, "Column of the question in a file of --tasks.")
    answer_column: str | None = option(None, "Column of the answer in a file of --tasks.")
    direct: bool = option(False, "Make it answer at once, with empty think tags.")
    setting: Literal["greedy", "paper"] = option(
        "greedy",
        "Preset of the options below: greedy (temperature 0, 160 new tokens) or paper (temperature "
        "0.6, top-p 0.95, 32768 new tokens, chat template).",
    )
    sampling: dict[str, Any] = part(
        GenerationConfig, "temperature top_p max_new_tokens", "Answers", given="preset"
    )
    drawing: dict[str, Any] = part(EvalConfig, "samples chat_template", "Answers", given="preset")
    answers: dict[str, Any] = part(
        GenerationConfig, "timeout batch_size seed", "Answers", given="values"
    )
    engine: EngineName = option(
        "hf", "hf, vllm, or lighteval: hf inside lighteval, with its metric as well as ours."
    )
    merge: bool = option(False, "Engine vllm: merge adapters into the weights.")
    replicates: int = option(
        1, "Answer all so often with the same seeds, to see the engine's own noise.", min=1, max=100
    )

    def __post_init__(self) -> None:
        """Raise BadInputError where options would do nothing, or no answers can be drawn."""
        super().__post_init__()
        if self.merge and self.engine != "vllm":
            raise BadInputError(f"--merge is for engine vllm, this is {self.engine}: leave it out")
        self.config()

    def config(self) -> EvalConfig:
        """Return the configuration of the evaluation, with the setting's values as defaults."""
        from resa_lens.texts.prompts import resolve_system_prompt

        chosen, prompt = preset(self.setting), self.asking.system_prompt
        own = {"samples": chosen.samples, "chat_template": chosen.chat_template, **self.drawing}
        return replace(
            self.asking, generation=replace(chosen.generation, **self.sampling, **self.answers),
            prompt_style="direct" if self.direct else "reason",
            system_prompt=resolve_system_prompt(prompt) if prompt else None, **own,
        )  # fmt: skip


@command("eval")
def evaluate(args: Eval) -> Outcome:
    """Score a model, or a model with adapters.

    Questions are verified. Answers are kept as they come: a killed run goes on with the questions
    that are left.

    Example: resa-lens eval --model tiny-reasoner --limit 500
    """
    ctx = args.context()
    from resa_lens.evals.engines.choice import check_engine
    from resa_lens.stages.scores import eval_run, questions_for

    check_engine(args.engine)
    config = args.config()
    # The base of --adapter is the model; only a model that is an adapter has one of its own.
    stacked = (named_path(args.model, "model") / "adapter_config.json").exists()
    below = args.adapter and not stacked
    name, base = (args.base or args.model, None) if below else (args.model, args.base)
    columns = args.pick("question_column", "answer_column")
    items = questions_for(ctx.unloaded(name, base), args.tasks, config, **columns)
    model = ctx.model(name, base, adapters=args.adapter or (), scale=args.scale or 1.0)
    for note in model.notes:
        ctx.reporter.note(f"note: {note}")
    if args.plan:
        from resa_lens.stages.plans import plan_eval

        plan = plan_eval(ctx, model, items, config, args.engine, args.replicates)
        return plan.to_dict(), plan_report(plan)
    run = eval_run(
        ctx, model, items, config, source=args.tasks, engine=args.engine,
        lora="merged" if args.merge else "request", replicates=args.replicates,
    )  # fmt: skip
    folder, noise = str(run.artifact.path), run.artifact.manifest.results.get("replicates")
    values = {**run.result.to_dict(), "folder": folder, "model": model.name}
    if noise:
        values["replicates"] = noise
    return values, reports.evaluation(model.slug, run.result, folder, noise)


@options("Comparison")
class Compare(Seeded, Place, Output):
    """What is compared, and what is shown of it."""

    runs: list[str] | None = argument(
        "Evaluations by their id, folder or its name; the first is the base.",
        default=None, metavar="RUN_A RUN_B [RUN_C ...]", check=check_path,
    )  # fmt: skip
    group: list[str] | None = option(
        None, "Instead of runs: the runs of one setting over seeds; repeat, the base first.",
        metavar="NAME=RUN,RUN,...",
    )  # fmt: skip
    paired_seeds: bool = option(False, "Groups: the k-th runs share their seed.")
    margin: float = option(
        2.0, "Points within which two runs count as equally good.", over=0, max=99.999
    )
    flips: int = option(0, "List so many questions that changed; --json has all.", min=0)
    pass_at: tuple[int, ...] | None = option(
        None, 'Also pass@k, for example "1,4".', min=1, max=10**6
    )
    save: Path | None = option(None, "Keep it as a page (.html) or a table (.csv).")

    def __post_init__(self) -> None:
        """Raise BadInputError where too little is named, or too much."""
        if self.group and (self.runs or self.pass_at or self.flips):
            raise BadInputError("--group takes no other runs, --pass-at or --flips: leave them out")
        if not self.group and len(self.runs or ()) < 2:
            n = len(self.runs or ())
            raise BadInputError(f"{n} run given: name two evaluations or more, or use --group")
        if self.flips and len(self.runs or ()) > 2:
            raise BadInputError("--flips lists the questions of two runs: name only two")


@command("compare")
def compare(args: Compare) -> Outcome:
    """Compare evaluations question by question.

    Two runs, several with the first, or groups of seeds.

    Example: resa-lens compare resa-workspace/evals/A resa-workspace/evals/B --flips 10
    """
    from resa_lens.evals.compare import compare_all, summarise
    from resa_lens.stages import comparison

    margin, ks = args.margin / 100, sorted(set(args.pass_at or ()))
    if args.save:
        comparison.check_target(args.save)
    workspace, reporter = args.open()
    if args.group:
        groups = comparison.parse_groups(args.group)
        result = comparison.compare_settings(workspace, groups, margin, args.paired_seeds, reporter)
        values, parts = reports.settings_of(result)
    else:
        runs = comparison.open_runs(workspace, args.runs or [], reporter)
        summaries = [summarise(run, ks, args.seed) for run in runs]
        result = compare_all(runs, margin=margin, seed=args.seed)
        values = {**result.to_dict(), "scores": [asdict(item) for item in summaries]}
        parts = list(reports.compared(result, summaries, args.flips))
    if args.save:
        comparison.save(args.save, result, margin)
        values["saved"] = str(args.save)
        parts.append(f"kept in {args.save}")
    return values, parts
