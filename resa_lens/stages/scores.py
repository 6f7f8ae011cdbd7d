"""Scores of a model on questions, kept with every answer, and their paired comparison."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.eval import Eval
from resa_lens.artifacts.placement import NARROW
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.artifacts.workspace import Workspace
from resa_lens.config import config_dict
from resa_lens.errors import BadInputError, DamagedError
from resa_lens.evals import run as evals_run
from resa_lens.evals.compare import check_paired, run_scores
from resa_lens.evals.config import SETTINGS, EngineName
from resa_lens.evals.engines import Generation, HFEngine
from resa_lens.evals.engines.choice import check_engine, engine_part, generated_by, open_engine
from resa_lens.evals.engines.hf import probe_threads
from resa_lens.evals.engines.vllm import Lora
from resa_lens.evals.resume import AnswerLog, Named, answer_all
from resa_lens.evals.run import (
    Asked,
    EvalConfig,
    EvalResult,
    Score,
    answerable,
    ask,
    score,
)  # fmt: skip
from resa_lens.evals.tasks import EvalItem, load_tasks, select
from resa_lens.hashes import digest
from resa_lens.machine.hardware import MB
from resa_lens.machine.needs import generation_mb
from resa_lens.machine.plans import HOUR, duration
from resa_lens.models.host import Model
from resa_lens.models.unloaded import UnloadedModel
from resa_lens.saes.checkpoint import machine
from resa_lens.stages.replicates import replicate_noise
from resa_lens.stats import PairedComparison, compare_paired
from resa_lens.texts.records import Record, doubts

_PROBED: dict[tuple[int, int, int], tuple[int, dict[int, float]]] = {}
"""What a probe found, by width, layers and threads: one a process, as a sweep scores many."""


def load_eval_items(
    source: str,
    config: EvalConfig,
    *,
    question_column: str | None = None,
    answer_column: str | None = None,
    required: bool = True,
) -> list[EvalItem]:
    """Return the questions of an evaluation: of every task in `source` at most `config.limit`.

    Where not `required`, a file without the named columns is read by the known ones.
    """
    return load_tasks(
        source,
        levels=config.levels,
        limit=config.limit,
        seed=config.question_seed,
        question_column=question_column,
        answer_column=answer_column,
        required=required,
    )


def unanswerable_text(left_out: int, questions: int, model: Model) -> str:
    """Return the warning of questions that do not fit."""
    return (
        f"warning: {left_out} of {questions} questions do not fit the context of {model.context} "
        "tokens and are not asked; the score is of the others"
    )


def chosen_questions(
    ctx: Context, model: Model, items: Sequence[EvalItem], config: EvalConfig
) -> tuple[list[EvalItem], list[Asked], EvalConfig]:
    """Return the questions that several arms answer alike, and say which do not fit the context.

    Args:
        ctx: who to tell.
        model: the model that answers.
        items: all questions.
        config: chooses among them.

    Returns:
        The questions that are asked, their prompts, and the configuration that asks them all.
    """
    chosen = select(
        list(items), levels=config.levels, limit=config.limit, seed=config.question_seed
    )
    every = replace(config, limit=None, levels=None)
    prompts, left_out = answerable(
        ask(chosen, every, model.tokenizer), model.tokenizer, model.context
    )
    if left_out:
        ctx.note_once([unanswerable_text(left_out, len(chosen), model)])
        fitting = {one.item.id for one in prompts}
        chosen = [item for item in chosen if item.id in fitting]
    return chosen, prompts, every


def check_new_tokens(model: Model | UnloadedModel, tokens: int) -> None:
    """Raise BadInputError where the longest answer would fill all that a model reads."""
    if model.context is not None and tokens >= model.context:
        preset = " of --setting paper" if tokens == SETTINGS["paper"].max_new_tokens else ""
        raise BadInputError(
            f"--max-new-tokens {tokens}{preset}: {model.name} reads {model.context} tokens in all, "
            f"the question included; use fewer, for example --max-new-tokens {model.context // 2}"
        )


def questions_for(
    model: Model | UnloadedModel, source: str, config: EvalConfig, **columns: Any
) -> list[EvalItem]:
    """Return the questions of an evaluation of a model, which need not be loaded yet.

    Args:
        model: the model that will answer.
        source: the tasks.
        config: how they are asked.
        columns: as of `load_eval_items`.

    Raises:
        BadInputError: as `load_eval_items`, the longest answer fills the model's context, or no
            question fits it.
    """
    check_new_tokens(model, config.generation.max_new_tokens)
    items = load_eval_items(source, config, **columns)
    prompts = ask(items, replace(config, limit=None, levels=None), model.tokenizer)
    answerable(prompts, model.tokenizer, model.context)
    return items


def note_overlap(ctx: Context, items: Sequence[EvalItem], records: Sequence[Record]) -> None:
    """Warn where questions that are scored stand in the data that a model is tuned on."""
    # The questions that are scored are few; the records may be more than memory holds.
    scored = Counter(" ".join(item.question.split()) for item in items)
    common = {text for r in records if (text := " ".join(r.question.split())) in scored}
    known = sum(scored[text] for text in common)
    if known:
        ctx.reporter.note(
            f"warning: {known} of {len(items)} questions to score stand in the tuning data; the "
            "scores say how well they were learned: give other questions with --tasks"
        )


@dataclass(frozen=True)
class EvalRun:
    """Scores with every answer, and the artifact that holds them."""

    artifact: Artifact
    result: EvalResult


def eval_run(
    ctx: Context,
    model: Model,
    items: Sequence[EvalItem],
    config: EvalConfig,
    *,
    source: str = "tiny",
    label: str = "",
    engine: EngineName = "hf",
    lora: Lora = "request",
    replicates: int = 1,
) -> EvalRun:
    """Score a model on the questions, go on with a killed run, or read the finished one.

    Args:
        ctx: workspace, reporter, threads.
        model: the model, with its adapters.
        items: all that is asked; `config.limit` and `config.levels` have chosen them.
        config: how it is asked.
        source: what the questions are called in the manifest.
        label: what the model is called in messages.
        engine: what generates.
        lora: of engine vllm, how an adapter gets into it.
        replicates: how often all is answered; the others than the first show the noise alone.

    Raises:
        BadInputError: an engine that is not installed, or what the engine or the prompts refuse.
        TakenError: another process is at this evaluation.
        RunFailedError: the engine failed; the finished answers are kept.
    """
    ctx.note_once(doubts([item.answer for item in items if not item.choice], source))
    stage = ctx.stage(
        Eval,
        model,
        name="",
        config={
            "eval": config,
            **engine_part(engine),
            **({"lora": lora} if engine == "vllm" and model.peft is not None else {}),
            # They stand in the results; without them an evaluation is what it always was.
            **({"replicates": replicates} if replicates > 1 else {}),
        },
        data={"questions": questions_hash(items, sampled=config.generation.temperature > 0)},
        settings=_settings(model, items, config, source, engine, lora),
        noun=f"scores of {label or model.slug}",
    )

    def work(draft: Draft) -> None:
        check_engine(engine)
        # Chosen already, by task: a limit is each task's, not theirs together.
        plain = replace(config, limit=None, levels=None)
        asked = ask(items, plain, model.tokenizer, note=lambda text: ctx.note_once([text]))
        fitting, left_out = answerable(asked, model.tokenizer, model.context)
        if left_out:
            ctx.note_once([unanswerable_text(left_out, len(items), model)])
        _answered(
            ctx, model, fitting, left_out, config, engine, lora, label or model.slug, draft,
            replicates,
        )  # fmt: skip

    artifact = stage.obtain(work, doing="answering")
    return EvalRun(artifact, read_result(artifact))


def questions_hash(items: Sequence[EvalItem], *, sampled: bool = False) -> str:
    """Return the SHA-256 of questions: what is asked, how it is graded, and in which groups.

    Their ids hold the names of files; they count only where answers are sampled, for a question's
    random stream is named by its id.
    """
    return digest(
        [
            [i.question, i.answer, i.query, i.choice, i.family, i.level, i.id if sampled else None]
            for i in items
        ]
    )


def _settings(
    model: Model,
    items: Sequence[EvalItem],
    config: EvalConfig,
    source: str,
    engine: EngineName,
    lora: Lora,
) -> dict[str, Any]:
    """Return how a run asked, for people and for runs beside it."""
    return {
        "eval": config_dict(config),
        "source": source,
        "model": model.slug,
        "dtype": model.dtype,
        "questions": questions_hash(items)[:8],
        **engine_part(engine),
        **({"lora": lora} if engine == "vllm" and model.peft is not None else {}),
    }


def _answered(
    ctx: Context,
    model: Model,
    asked: Sequence[Asked],
    left_out: int,
    config: EvalConfig,
    engine: EngineName,
    lora: Lora,
    label: str,
    draft: Draft,
    replicates: int,
) -> None:
    """Generate and grade, and fill the draft."""
    work = draft.work
    expect_answers(draft, model, asked, config, replicates)
    log = AnswerLog(work / "answers.jsonl")
    if log.answers:
        ctx.reporter.note(f"{len(log.answers)} of {len(asked)} answers are there; going on")
    elif engine != "vllm" and config.generation.max_new_tokens >= LONG_ANSWERS:
        _warn_of_hours(ctx, model, asked, config, engine, replicates)
    with (
        _threads(ctx, model, engine, asked, log),
        open_engine(model, engine, lora=lora) as generator,
    ):
        with (
            log,
            ctx.bar(f"scoring {label}", len(asked)) as advance,
        ):

            def answer(questions: Sequence[Asked]) -> list[Generation]:
                return answer_all(generator, questions, config.generation, log, advance)

            peer = None
            if engine == "lighteval":
                from resa_lens.evals.lighteval import run_lighteval

                shutil.rmtree(work / "lighteval", ignore_errors=True)
                generations, peer = run_lighteval(
                    answer,
                    asked,
                    config.generation,
                    work / "lighteval",
                    name=model.slug,
                    tokenizer=model.tokenizer,
                    extraction=config.extraction,
                )
            else:
                generations = answer(asked)
        graded = score(asked, generations, extraction=config.extraction)
        noise, again = {}, 0.0
        if replicates > 1:
            noise["replicates"], again = replicate_noise(
                ctx, generator, asked, config, graded, replicates, work=work, settings=log.settings
            )
    result = replace(graded, seconds=log.seconds + graded.seconds, peer=peer, unanswerable=left_out)
    if result.timed_out:
        ctx.reporter.note(
            f"{result.timed_out} of {len(asked)} answers took more than "
            f"{config.generation.timeout:g} s and count as wrong"
        )
    draft.results = {
        **result.to_dict(),
        "model": model.name,
        "slug": model.slug,
        "engine": engine,
        "generated_by": generated_by(model, config.generation, engine),
        "threads_probe": log.settings["probe"],
        **noise,
    }
    draft.seconds = result.seconds + again
    draft.threads = log.settings["threads"]
    draft.json("results.json", result.to_dict())
    draft.write(lambda target: evals_run.write_samples(result, target / "samples.parquet"))
    if engine == "lighteval":
        draft.write(lambda target: shutil.move(work / "lighteval", target / "lighteval"))


LONG_ANSWERS = 8192
"""New tokens from which on it is worth a batch's trial to say how long the answers will take."""


def _warn_of_hours(
    ctx: Context,
    model: Model,
    questions: Sequence[Asked],
    config: EvalConfig,
    engine: EngineName,
    times: int,
) -> None:
    """Say what long answers will take with an engine that was not made for them."""
    from resa_lens.stages.trials import try_answers

    trial = try_answers(model, questions, config)
    seconds = times * trial.time.seconds
    if seconds >= HOUR:
        ctx.reporter.note(
            f"warning: {'at most' if trial.at_most else 'about'} {duration(seconds)} "
            f"with engine {engine}, by one batch of answers; --engine vllm is made for long ones"
        )


FEWER_ANSWERS = "A smaller --limit or --max-new-tokens takes less."


def expect_answers(
    draft: Draft,
    model: Model,
    asked: Sequence[Named],
    config: EvalConfig,
    times: int = 1,
    fewer: str = FEWER_ANSWERS,
) -> None:
    """Compare what answering will take with what is free (`Stage.expect`).

    Args:
        draft: of what the answers are for.
        model: the model that answers.
        asked: the prompts.
        config: how they are asked.
        times: so often are they answered.
        fewer: which options take less disk.
    """
    prompts = [len(one.prompt) for one in asked]
    longest, new = max(prompts, default=0) // 3, config.generation.max_new_tokens
    rows = min(len(asked), config.generation.batch_size)
    memory = generation_mb(model.model.config, rows, longest + new, model.model.dtype.itemsize)
    draft.expect(memory, times * answers_mb(asked, config), fewer)


def answers_mb(asked: Sequence[Named], config: EvalConfig) -> float:
    """Return the MB that answers take at most: as lines while they come, and as a table."""
    # Texts, and ids of about 7 characters a token.
    letters = 2 * sum(len(one.prompt) for one in asked)
    return (letters + 12 * len(asked) * config.generation.max_new_tokens) / MB


@contextmanager
def _threads(
    ctx: Context, model: Model, engine: EngineName, asked: Sequence[Asked], log: AnswerLog
) -> Iterator[None]:
    """Set the threads to generate with: as asked, as begun, one for a narrow model, or by a probe.

    They and the probe's seconds are in the log's settings.
    """
    before = torch.get_num_threads()
    if not log.settings:
        threads, probe = before, {}
        if engine != "vllm" and ctx.threads is None and model.device == "cpu" and before > 1:
            if model.d_model <= NARROW:
                threads = 1
            else:
                shape = (model.d_model, model.n_layers, before)
                if shape not in _PROBED:
                    tried = HFEngine(model.model, model.tokenizer)
                    prompts = [one.prompt for one in asked]
                    _PROBED[shape] = probe_threads(tried, prompts, before)
                threads, probe = _PROBED[shape]
                ctx.reporter.note(
                    f"{threads} thread{'s' if threads > 1 else ''}: "
                    + ", ".join(f"{s:.1f} s with {n}" for n, s in probe.items())
                )
        log.settings = {
            **machine(model.device),
            "threads": threads,
            "probe": {str(n): round(seconds, 3) for n, seconds in probe.items()},
        }
    torch.set_num_threads(log.settings["threads"])
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_eval(workspace: Workspace, folder: Path) -> EvalRun:
    """Read a finished evaluation.

    Raises:
        BadInputError: there is none, or it is damaged.
    """
    artifact = workspace.read(folder)
    if artifact is None or artifact.manifest.kind != Eval.name:
        raise BadInputError(f"{folder} is not an evaluation (evals/<run>)")
    return EvalRun(artifact, read_result(artifact))


def read_result(artifact: Artifact) -> EvalResult:
    """Return an evaluation's scores with every answer.

    Raises:
        DamagedError: a file is missing, was changed, or is not as its schema says.
    """
    values = artifact.value("results.json")
    samples = artifact.file("samples.parquet")
    try:
        rows = evals_run.read_samples(samples)
    except (pa.ArrowException, OSError, TypeError) as error:
        raise DamagedError(f"{samples} is damaged or of another version; score again") from error

    def scores(stored: dict[str, Any]) -> dict[str, Score]:
        return {name: Score(**{**one, "ci": tuple(one["ci"])}) for name, one in stored.items()}

    return EvalResult(
        accuracy=values["accuracy"],
        n=values["n"],
        ci=tuple(values["ci"]),
        by_task=scores(values["by_task"]),
        by_level={int(level): one for level, one in scores(values["by_level"]).items()},
        samples=rows,
        seconds=values["seconds"],
        tokens=values["tokens"],
        unfinished=values.get("unfinished", 0),
        timed_out=values.get("timed_out", 0),
        peer=values.get("peer"),
        unanswerable=values.get("unanswerable", 0),
    )


def compare_results(base: EvalResult, tuned: EvalResult, seed: int = 0) -> PairedComparison:
    """Compare two evaluations question by question.

    Raises:
        BadInputError: they do not answer the same questions.
    """
    runs = [run_scores("base", base.samples), run_scores("tuned", tuned.samples)]
    check_paired(runs)
    return compare_paired(runs[0].means, runs[1].means, seed)
