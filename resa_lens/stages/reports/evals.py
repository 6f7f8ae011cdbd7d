"""Scores and their differences, in tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from resa_lens.figures.grids import cell, grid

if TYPE_CHECKING:
    from resa_lens.evals.compare import Comparison, Comparisons, RunSummary
    from resa_lens.evals.run import EvalResult
    from resa_lens.stages.comparison import Setting


SCORE = {"accuracy": "{accuracy:*.1f} %", "95 % interval": "{ci:*.1f} %", "n": "{n}"}
"""Columns of accuracies."""
DIFFERENCES = 10
"""Answers that two gradings judge differently which are shown."""


def _named(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"": name, **{key: getattr(score, key) for key in ("accuracy", "ci", "n")}}
            for name, score in scores.items()]  # fmt: skip


def evaluation(
    name: str, result: EvalResult, folder: str, noise: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """Yield the scores of an evaluation, whole and by level and task, and of its replicates."""
    levels = {f"level {level}": score for level, score in sorted(result.by_level.items())}
    rows = _named({"all": result, **levels, **result.by_task})
    yield grid(name, rows, {"": lambda row: row[""], **SCORE})
    if noise:
        yield (
            f"{len(noise['accuracies'])} replicates: accuracy has a standard deviation of "
            f"{100 * noise['sd']:.2f} points, {100 * noise['flips']:.1f} % of the answers change "
            "sides"
        )
    if result.peer:
        yield (
            f"{result.peer['harness']} ({result.peer['metric']}): "
            f"{100 * result.peer['accuracy']:.1f} %; judges {result.peer['differing']} answers "
            "differently"
        )
    yield from _differences(result)
    if result.unfinished:
        late = f", {result.timed_out} of them by the time-out" if result.timed_out else ""
        share = f"{100 * result.truncated_share:.1f} % of the answers"
        yield f"{result.unfinished} answers ({share}) were cut off{late}"
    if result.unanswerable:
        share = f"{100 * result.unanswerable_share:.1f} %"
        yield (
            f"{result.unanswerable} questions ({share}) do not fit the model's context and were "
            "not asked"
        )
    yield f"{result.tokens} tokens, {result.seconds:.0f} s; in {folder}"


def _differences(result: EvalResult) -> Iterator[Any]:
    """Say on which answers the two verdicts differ, and which were not compared to the end."""
    grading = result.grading
    if grading["differing"]:
        shown = grading["answers"][:DIFFERENCES]
        rest = f"; the first {len(shown)}, --json has all" if shown != grading["answers"] else ""
        title = (
            f"math-verify judges {grading['differing']} of {grading['compared']} answers otherwise"
        )
        yield grid(title + rest, shown, {
            **{name: lambda row, name=name: str(row[name])[-60:]
               for name in ("id", "gold", "answer")},
            "right by us": lambda row: "yes" if row["correct"] else "no",
            "right by math-verify": lambda row: "yes" if row["math_verify"] else "no",
        })  # fmt: skip
    elif grading["compared"]:
        yield f"math-verify judges all {grading['compared']} answers as we do"
    if grading["refused"]:
        yield (
            f"{grading['refused']} answers were not compared to the end and count as wrong; the "
            "column refused of samples.parquet says why"
        )


def _score_rows(summaries: Sequence[RunSummary], labels: Sequence[str]) -> Any:
    samples = max(summary.samples for summary in summaries)
    ks = sorted({k for summary in summaries for k in summary.pass_at})
    title = "accuracy" if samples == 1 else f"avg@{samples}"
    rows = [{"label": label, "of": run} for label, run in zip(labels, summaries, strict=True)]
    return grid("", rows, {
        "": "{label}", title: "{of.accuracy:*.1f} %", "95 %": "{of.ci:*.1f} %", "n": "{of.n}",
        "mean of tasks": "{of.macro.value:*.1f} %", "its 95 %": "{of.macro.ci:*.1f} %",
        **{f"pass@{k}": lambda row, k=k: cell("{value:*.1f} ({ci:*.1f})", row["of"].pass_at[k])
           for k in ks},
    })  # fmt: skip


def _lines(result: Comparison | Comparisons | Sequence[Setting], title: str) -> Any:
    from resa_lens.stages.comparison import lines_of, points, span

    return grid(title, lines_of(result), {
        "": "{label}", "points": lambda row: points(row.difference),
        "95 %": lambda row: span(row.ci), "p": "{p_value:.3g}", "Holm": "{holm_p:.3g}", "n": "{n}",
        "changed": "{changed}", "gained": "{gained}", "lost": "{lost}",
    })  # fmt: skip


def compared(
    result: Comparison | Comparisons, summaries: Sequence[RunSummary], flips: int
) -> Iterator[Any]:
    """Yield two runs with so many questions that changed, or several runs beside the first."""
    from resa_lens.evals.compare import Comparison

    if isinstance(result, Comparison):
        return two(result, summaries, flips)
    return many(result, summaries)


def two(result: Comparison, summaries: Sequence[RunSummary], flips: int) -> Iterator[Any]:
    """Yield two runs and their difference, with so many of the questions that changed."""
    from resa_lens.stages.comparison import answers_of, sentences

    yield f"A: {result.base}\nB: {result.other}"
    yield _score_rows(summaries, "AB")
    yield _lines(result, "B minus A")
    yield from sentences(result)
    if flips and result.flips:
        title = f"Changed questions, {min(flips, len(result.flips))} of {len(result.flips)}"
        yield grid(title, result.flips[:flips], {
            "question": "{question}", "gold": "{gold}", "A": lambda row: answers_of(row)[0],
            "B": lambda row: answers_of(row)[1], "right in A": "{before:.2g}",
            "right in B": "{after:.2g}",
        })  # fmt: skip


def many(result: Comparisons, summaries: Sequence[RunSummary]) -> Iterator[Any]:
    """Yield several runs and their differences from the first."""
    from resa_lens.stages.comparison import sentences

    yield _score_rows(summaries, [summary.name for summary in summaries])
    yield _lines(result, f"Minus {result.base.name}; intervals hold for all runs at once")
    yield from sentences(result)
    same = [run.name for run in result.runs if run.equivalence.equivalent]
    margin = f"{100 * result.runs[0].equivalence.margin:g} points"
    yield f"equally good to within {margin}, each by itself: {', '.join(same) or 'none shown'}"


def settings_of(settings: Sequence[Setting]) -> tuple[dict[str, Any], list[Any]]:
    """Return groups of runs as JSON has them, and their tables."""
    from resa_lens.stages.comparison import sentences

    values = []
    for group in settings:
        row = asdict(group)
        values.append({**row.pop("found"), **row})
    rows = _lines(settings, f"Settings minus {settings[0].base}")
    whole = values[0] if len(values) == 1 else {"groups": values}
    return dict(whole), [rows, *sentences(settings)]
