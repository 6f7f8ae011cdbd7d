"""Evaluations question by question: compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import (
    JsonOption,
    SeedOption,
    WorkspaceOption,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resa_lens.evals.compare import Comparison, Comparisons, RunSummary
    from resa_lens.pipeline.comparison import Setting


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN_A RUN_B [RUN_C ...]",
            help="Evaluation folders, or their names in evals/; the first is the base.",
        ),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=RUN,RUN,...",
            help="Instead of runs: the runs of one setting over seeds; repeat, the base first.",
        ),
    ] = None,
    paired_seeds: Annotated[
        bool, typer.Option("--paired-seeds", help="Groups: the k-th runs share their seed.")
    ] = False,
    margin: Annotated[
        float, typer.Option(help="Points within which two runs count as equally good.")
    ] = 2.0,
    flips: Annotated[
        int, typer.Option(help="List so many questions that changed; --json has all.", min=0)
    ] = 0,
    pass_at: Annotated[
        str | None, typer.Option("--pass-at", help='Also pass@k, for example "1,4".')
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Keep it as a page (.html) or a table (.csv).")
    ] = None,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare evaluations question by question: two runs, several with the first, or groups.

    Example: resa-lens compare resa-workspace/evals/A resa-workspace/evals/B --flips 10
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.errors import BadInputError
        from resa_lens.pipeline import comparison

        share, ks = margin / 100, _numbers(pass_at)
        if not 0 < share < 1:
            raise BadInputError(f"--margin {margin:g}: give points above 0 and below 100")
        if save:
            comparison.check_target(save)
        if group and (runs or ks or flips):
            raise BadInputError("--group takes no other runs, --pass-at or --flips: leave them out")
        ctx = common.context(workspace, seed, "cpu", "auto", False, None)
        if group:
            groups = comparison.parse_groups(group)
            made = comparison.compare_settings(ctx, groups, share, paired_seeds)
            values, tables = _settings(made)
        else:
            made, values, tables = _runs(ctx, runs or [], share, ks, flips, seed)
        if save:
            comparison.save(save, made, share)
            values["saved"] = str(save)
            tables.append(f"kept in {save}")
        return values, lambda: common.show_all(*tables)

    common.run(job, as_json)


def _numbers(text: str | None) -> list[int]:
    from resa_lens.errors import BadInputError

    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if bad := [part for part in parts if not part.isdecimal() or int(part) < 1]:
        raise BadInputError(f'--pass-at {bad[0]!r} is no number of samples; use for example "1,4"')
    return sorted({int(part) for part in parts})


def _runs(
    ctx: Any, names: Sequence[str], margin: float, ks: Sequence[int], flips: int, seed: int
) -> tuple[Comparison | Comparisons, dict[str, Any], list[Any]]:
    """Compare two runs, or several with the first: result, JSON and tables."""
    from dataclasses import asdict

    from resa_lens.errors import BadInputError
    from resa_lens.evals.compare import check_paired, compare_many, compare_runs, summarise
    from resa_lens.pipeline.comparison import open_runs

    if len(names) < 2:
        raise BadInputError(f"{len(names)} run given: name two evaluations or more, or use --group")
    opened = open_runs(ctx, names)
    check_paired(opened)
    summaries = [summarise(run, ks, seed) for run in opened]
    kept = {"scores": [asdict(summary) for summary in summaries]}
    if len(opened) == 2:
        made = compare_runs(*opened, margin=margin, seed=seed)
        return made, {**made.to_dict(), **kept}, _two_tables(made, summaries, flips)
    if flips:
        raise BadInputError("--flips lists the questions of two runs: name only two")
    if len(opened) * opened[0].means.size > 20_000:
        ctx.reporter.note(f"comparing {len(opened)} runs on {opened[0].means.size} questions")
    several = compare_many(opened[0], opened[1:], margin=margin, seed=seed)
    return several, {**several.to_dict(), **kept}, _many_tables(several, summaries)


def _score_rows(summaries: Sequence[RunSummary], labels: Sequence[str]) -> Any:
    samples = max(summary.samples for summary in summaries)
    ks = sorted({k for summary in summaries for k in summary.pass_at})
    title = "accuracy" if samples == 1 else f"avg@{samples}"
    rows = common.table(
        "", "", title, "95 %", "n", "mean of tasks", "its 95 %", *(f"pass@{k}" for k in ks)
    )
    for label, summary in zip(labels, summaries, strict=True):
        macro = summary.macro
        rows.add_row(
            label,
            *common.percent(summary.accuracy, summary.ci, summary.n),
            *(("", "") if macro is None else common.percent(macro.value, macro.ci, macro.n)[:2]),
            *(
                f"{100 * s.value:.1f} ({100 * s.ci[0]:.1f} to {100 * s.ci[1]:.1f})"
                for s in summary.pass_at.values()
            ),
        )
    return rows


def _lines(made: Any, title: str) -> Any:
    from rich.text import Text

    from resa_lens.pipeline.comparison import lines_of, points, span

    rows = common.table(
        title, "", "points", "95 %", "p", "Holm", "n", "changed", "gained", "lost"
    )  # fmt: skip
    for line in lines_of(made):
        rows.add_row(
            Text(line.label),
            points(line.difference),
            span(line.ci),
            f"{line.p_value:.3g}",
            "" if line.holm_p is None else f"{line.holm_p:.3g}",
            str(line.n),
            str(line.changed),
            *("" if count is None else str(count) for count in (line.gained, line.lost)),
        )
    return rows


def _two_tables(made: Comparison, summaries: Sequence[RunSummary], flips: int) -> list[Any]:
    from rich.text import Text

    from resa_lens.pipeline.comparison import answers_of, sentences

    names = f"A: {made.base}\nB: {made.other}"
    parts = [names, _score_rows(summaries, "AB"), _lines(made, "B minus A"), *sentences(made)]
    if flips and made.flips:
        rows = common.table(
            f"Changed questions, {min(flips, len(made.flips))} of {len(made.flips)}",
            "question", "gold", "A", "B", "right in A", "right in B",
        )  # fmt: skip
        for flip in made.flips[:flips]:
            texts = (flip.question, flip.gold, *answers_of(flip))
            rows.add_row(*map(Text, texts), f"{flip.before:.2g}", f"{flip.after:.2g}")
        parts.append(rows)
    return parts


def _many_tables(made: Comparisons, summaries: Sequence[RunSummary]) -> list[Any]:
    from resa_lens.pipeline.comparison import sentences

    scores = _score_rows(summaries, [summary.name for summary in summaries])
    rows = _lines(made, f"Minus {made.base.name}; intervals hold for all runs at once")
    same = [run.name for run in made.runs if run.equivalence.equivalent]
    margin = f"{100 * made.runs[0].equivalence.margin:g} points"
    return [
        scores,
        rows,
        *sentences(made),
        f"equally good to within {margin}, each by itself: {', '.join(same) or 'none shown'}",
    ]


def _settings(made: Sequence[Setting]) -> tuple[dict[str, Any], list[Any]]:
    from dataclasses import asdict

    from resa_lens.pipeline.comparison import sentences

    values = []
    for setting in made:
        row = asdict(setting)
        values.append({**row.pop("found"), **row})
    rows = _lines(made, f"Settings minus {made[0].base}")
    whole = values[0] if len(values) == 1 else {"groups": values}
    return dict(whole), [rows, *sentences(made)]
