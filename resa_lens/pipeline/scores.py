"""Scores of a model on questions, kept with every answer, and their paired comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resa_lens.errors import BadInputError
from resa_lens.evals import run as evals_run
from resa_lens.evals.engines import HFEngine
from resa_lens.evals.run import EvalConfig, EvalResult
from resa_lens.evals.tasks import EvalItem, load_questions
from resa_lens.models import Model
from resa_lens.pipeline.context import Context
from resa_lens.stats import PairedComparison, compare_paired
from resa_lens.workspace import config_dict, digest, read_json, write_json


def load_eval_items(source: str, config: EvalConfig) -> list[EvalItem]:
    """Return the questions of an evaluation."""
    levels = config.levels
    if source == "tiny" and levels is None:
        levels = (1, 2, 3)
    return load_questions(source, levels=levels, limit=config.limit, seed=config.question_seed)


def eval_run(
    ctx: Context,
    model: Model,
    items: Sequence[EvalItem],
    config: EvalConfig,
    *,
    source: str = "tiny",
    label: str = "",
) -> tuple[Path, EvalResult]:
    """Score a model on the questions, or read the finished run of the same configuration."""
    identity = {
        "eval": config_dict(config),
        "source": source,
        "model": model.slug,
        "dtype": model.dtype,
        "questions": digest([[i.id, i.question, i.answer] for i in items]),
    }
    folder = ctx.workspace.path("evals", f"{model.slug}-{digest(identity)}")
    if ctx.done(folder):
        ctx.reporter.note(f"scores of {label or model.slug}: done before, in {folder}")
        return folder, read_eval(ctx, folder)
    engine = HFEngine(model.model, model.tokenizer)
    with ctx.reporter.bar(f"scoring {label or model.slug}", len(items) * config.samples) as advance:
        before = [0]

        def progress(done: int, total: int) -> None:
            advance(done - before[0])
            before[0] = done

        result = evals_run.evaluate(engine, list(items), config, progress)
    manifest = ctx.manifest(
        "eval",
        model,
        config=identity,
        results={**result.to_dict(), "model": model.name, "slug": model.slug},
    )
    manifest.seconds = round(result.seconds, 3)
    with ctx.workspace.artifact(folder, manifest) as target:
        write_json(target / "results.json", result.to_dict())
        evals_run.write_samples(result, target / "samples.parquet")
    return folder, result


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
    )


def compare_results(base: EvalResult, tuned: EvalResult, seed: int = 0) -> PairedComparison:
    """Compare two evaluations question by question.

    Raises:
        BadInputError: they share no question, or not all of them.
    """

    def by_question(result: EvalResult) -> dict[tuple[str, str, str], float]:
        # The id alone may be a file's name and a row number.
        grouped: dict[tuple[str, str, str], list[float]] = {}
        for row in result.samples:
            key = (row["id"], row["question"], row["gold"])
            grouped.setdefault(key, []).append(float(row["correct"]))
        return {key: sum(values) / len(values) for key, values in grouped.items()}

    a, b = by_question(base), by_question(tuned)
    if set(a) != set(b):
        raise BadInputError(
            f"the runs answer different questions: {len(set(a) & set(b))} in common of {len(a)} "
            f"and {len(b)}; score both on the same questions"
        )
    ids = sorted(a)
    return compare_paired([a[i] for i in ids], [b[i] for i in ids], seed)
