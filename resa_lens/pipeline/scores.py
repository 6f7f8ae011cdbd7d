"""Scores of a model on questions, kept with every answer, and their paired comparison."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from resa_lens.corpora import Record
from resa_lens.errors import BadInputError, TakenError
from resa_lens.evals import run as evals_run
from resa_lens.evals.compare import check_paired, run_scores
from resa_lens.evals.engines import Generation, HFEngine, StreamingEngine
from resa_lens.evals.engines.hf import probe_threads
from resa_lens.evals.resume import AnswerLog, answer_all
from resa_lens.evals.run import Asked, EvalConfig, EvalResult, ask, score
from resa_lens.evals.tasks import EvalItem, load_tasks
from resa_lens.models import Model
from resa_lens.pipeline.context import NARROW, Context
from resa_lens.saes.checkpoint import run_lock
from resa_lens.stats import PairedComparison, compare_paired
from resa_lens.workspace import config_dict, digest, read_json, write_json

EngineName = Literal["hf", "vllm", "lighteval"]
"""`lighteval` is the hf engine inside lighteval's pipeline, judged by its metric too."""
Lora = Literal["request", "merged"]

_PROBED: dict[tuple[int, int, int], tuple[int, dict[int, float]]] = {}
"""What a probe found, by width, layers and threads: one a process, as a sweep scores many."""
WORK = ".work-"
"""Prefix of the folder beside a run's place that holds its answers until all are there."""


def check_engine(name: str) -> None:
    """Raise BadInputError where an engine does not exist or is not installed."""
    if name not in get_args(EngineName):
        raise BadInputError(f"engine {name!r} is unknown; use {', '.join(get_args(EngineName))}")
    if name != "hf" and importlib.util.find_spec(name) is None:
        raise BadInputError(
            f"engine {name} is not installed; its packages do not fit beside ours:\n"
            f"run `benchmarks/install_engine.sh {name} .venv-{name}` in a checkout and use\n"
            f".venv-{name}/bin/resa-lens, or leave out --engine"
        )


def load_eval_items(
    source: str,
    config: EvalConfig,
    *,
    question_column: str | None = None,
    answer_column: str | None = None,
) -> list[EvalItem]:
    """Return the questions of an evaluation: of every task in `source` at most `config.limit`."""
    return load_tasks(
        source,
        levels=config.levels,
        limit=config.limit,
        seed=config.question_seed,
        question_column=question_column,
        answer_column=answer_column,
    )


def note_overlap(ctx: Context, items: Sequence[EvalItem], records: Sequence[Record]) -> None:
    """Warn where questions that are scored stand in the data that a model is tuned on."""
    seen = {" ".join(record.question.split()) for record in records}
    known = sum(" ".join(item.question.split()) in seen for item in items)
    if known:
        ctx.reporter.note(
            f"warning: {known} of {len(items)} questions to score stand in the tuning data; the "
            "scores say how well they were learned: give other questions with --tasks"
        )


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
) -> tuple[Path, EvalResult]:
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

    Raises:
        BadInputError: an engine that is not installed, or what the engine or the prompts refuse.
        TakenError: another process is at this evaluation.
        RunFailedError: the engine failed; the finished answers are kept.
    """
    identity = _identity(model, items, config, source, engine, lora)
    folder = ctx.workspace.path("evals", f"{model.slug}-{digest(identity)}")
    if ctx.done(folder):
        ctx.reporter.note(f"scores of {label or model.slug}: done before, in {folder}")
        return folder, read_eval(ctx, folder)
    check_engine(engine)
    # Chosen already, by task: a limit is each task's, not theirs together.
    asked = ask(items, replace(config, limit=None, levels=None), model.tokenizer)
    work = folder.with_name(WORK + folder.name)
    with _kept_if_begun(work), run_lock(work, "answering"):
        if ctx.force:
            (work / "answers.jsonl").unlink(missing_ok=True)
        elif ctx.done(folder):  # by another process, since
            return folder, read_eval(ctx, folder)
        result = _answered(
            ctx, model, asked, config, engine, lora, label or model.slug, work, folder, identity
        )
        shutil.rmtree(work, ignore_errors=True)
    return folder, result


@contextmanager
def _kept_if_begun(work: Path) -> Iterator[None]:
    """Remove a run's folder that an error left without an answer, and the parents made for it."""
    made = [place for place in (work, *work.parents) if not place.exists()]
    try:
        yield
    except TakenError:
        raise
    except BaseException:
        file = work / "answers.jsonl"
        if not file.exists() or len(file.read_bytes().splitlines()) < 2:
            shutil.rmtree(work, ignore_errors=True)
            for place in made[1:]:
                with suppress(OSError):
                    place.rmdir()
        raise


def _identity(
    model: Model,
    items: Sequence[EvalItem],
    config: EvalConfig,
    source: str,
    engine: EngineName,
    lora: Lora,
) -> dict[str, Any]:
    """Return what names a run; options that came later are in it only where they are used."""
    values = config_dict(config)
    if not values["chat_template"]:
        del values["chat_template"]
    if values["generation"]["timeout"] is None:
        del values["generation"]["timeout"]
    identity: dict[str, Any] = {
        "eval": values,
        "source": source,
        "model": model.slug,
        "dtype": model.dtype,
        "questions": digest(
            [[i.id, i.question, i.answer, *([i.query] if i.query else [])] for i in items]
        ),
    }
    if config.chat_template:
        # A file beside the weights, which their hash does not know.
        identity["template"] = digest(getattr(model.tokenizer, "chat_template", None))
    if engine != "hf":
        identity["engine"] = engine
    if engine == "vllm" and model.peft is not None:
        identity["lora"] = lora
    return identity


def _answered(
    ctx: Context,
    model: Model,
    asked: Sequence[Asked],
    config: EvalConfig,
    engine: EngineName,
    lora: Lora,
    label: str,
    work: Path,
    folder: Path,
    identity: dict[str, Any],
) -> EvalResult:
    """Generate, grade and write the artifact."""
    log = AnswerLog(work / "answers.jsonl")
    if log.answers:
        ctx.reporter.note(f"{len(log.answers)} of {len(asked)} answers are there; going on")
    with _threads(ctx, model, engine, asked, log):
        generator = _engine(model, engine, lora)
        with (
            log,
            ctx.bar(f"scoring {label}", len(asked)) as advance,
        ):
            before = 0

            def progress(done: int, total: int) -> None:
                nonlocal before
                advance(done - before)
                before = done

            def answer(questions: Sequence[Asked]) -> list[Generation]:
                return answer_all(generator, questions, config.generation, log, progress)

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
                )
            else:
                generations = answer(asked)
        graded = score(asked, generations)
        result = replace(graded, seconds=log.seconds + graded.seconds, peer=peer)
        if result.timed_out:
            ctx.reporter.note(
                f"{result.timed_out} of {len(asked)} answers took more than "
                f"{config.generation.timeout:g} s and count as wrong"
            )
        manifest = ctx.manifest(
            "eval",
            model,
            config=identity,
            results={
                **result.to_dict(),
                "model": model.name,
                "slug": model.slug,
                "engine": engine,
                "threads_probe": log.settings["probe"],
            },
        )
        manifest.seconds = round(result.seconds, 3)
    with ctx.workspace.artifact(folder, manifest) as target:
        write_json(target / "results.json", result.to_dict())
        evals_run.write_samples(result, target / "samples.parquet")
        if engine == "lighteval":
            shutil.move(work / "lighteval", target / "lighteval")
    return result


def _engine(model: Model, engine: EngineName, lora: Lora) -> StreamingEngine:
    if engine == "vllm":
        from resa_lens.evals.engines.vllm import VLLMEngine

        return VLLMEngine(model, lora=lora)
    return HFEngine(model.model, model.tokenizer)


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
            "threads": threads,
            "probe": {str(n): round(seconds, 3) for n, seconds in probe.items()},
        }
    torch.set_num_threads(log.settings["threads"])
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_eval(ctx: Context, folder: Path) -> EvalResult:
    """Read a finished evaluation.

    Raises:
        BadInputError: there is none.
    """
    manifest = ctx.workspace.manifest(folder)
    if manifest is None or manifest.kind != "eval":
        raise BadInputError(f"{folder} is not an evaluation (evals/<run>)")
    values = read_json(folder / "results.json")
    score = {
        key: evals_run.Score(**{**s, "ci": tuple(s["ci"])}) for key, s in values["by_task"].items()
    }
    level = {
        int(key): evals_run.Score(**{**s, "ci": tuple(s["ci"])})
        for key, s in values["by_level"].items()
    }
    return EvalResult(
        accuracy=values["accuracy"],
        n=values["n"],
        ci=tuple(values["ci"]),
        by_task=score,
        by_level=level,
        samples=evals_run.read_samples(folder / "samples.parquet"),
        seconds=values["seconds"],
        tokens=values["tokens"],
        unfinished=values.get("unfinished", 0),
        timed_out=values.get("timed_out", 0),
        peer=values.get("peer"),
    )


def compare_results(base: EvalResult, tuned: EvalResult, seed: int = 0) -> PairedComparison:
    """Compare two evaluations question by question.

    Raises:
        BadInputError: they do not answer the same questions.
    """
    runs = [run_scores("base", base.samples), run_scores("tuned", tuned.samples)]
    check_paired(runs)
    return compare_paired(runs[0].means, runs[1].means, seed)
