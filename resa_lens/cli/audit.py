"""The command audit: a published table of checkpoints, held against its numbers of questions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import JsonOption, SeedOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from resa_lens.layers.audit import Audit

SHOWN = 6  # rows named before the rest are only counted; --json names all
SLOW = 100_000_000  # shuffled cells: about 2.5 s
WEAK = 0.01  # chance from which on a pair's test is called weak


def audit(
    table: Annotated[
        Path, typer.Argument(help="A .csv, .jsonl or .parquet file, a row a checkpoint.")
    ],
    group: Annotated[
        str | None,
        typer.Option(help="Column of the groups; layer, layer_1_indexed or model by itself."),
    ] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            "--questions",
            "-n",
            metavar="NAME=N",
            help="Questions of a benchmark that is not known by name; may be repeated.",
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PERCENT",
            help="What to compare with: an option for each benchmark, or the name of one group.",
        ),
    ] = None,
    discordance: Annotated[
        float, typer.Option(help="Share of questions on which two models differ, if paired.")
    ] = 0.2,
    draws: Annotated[
        int, typer.Option(help="Draws of permutations, bootstrap and noise.", min=20)
    ] = 10_000,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Test a table of checkpoints: exchanged columns, groups against noise, best-of-n, errors.

    Example: resa-lens audit data/paper/tables36_61_layer_checkpoints.csv --group layer_1_indexed
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.layers import audit as audits
        from resa_lens.layers.checkpoints import read_checkpoints
        from resa_lens.progress import ConsoleReporter

        found = read_checkpoints(table, group=group, questions=_counts(questions or []))
        work = len(found.groups) * len(found.benchmarks) * draws
        if work > SLOW:
            ConsoleReporter().note(
                f"{draws} permutations of {len(found.groups)} rows: about {2.5 * work / SLOW:.0f} s"
            )
        made = audits.audit(
            found, discordance=discordance, baseline=baseline or [], draws=draws, seed=seed
        )
        sentences = summary(made)
        values = {**made.to_dict(), "summary": sentences}
        return values, lambda: common.show_all(*_tables(made), *sentences)

    common.run(job, as_json)


def _counts(items: Sequence[str]) -> dict[str, int]:
    from resa_lens.errors import BadInputError

    counts = {}
    for item in items:
        name, _, number = item.rpartition("=")
        if not name or not number.strip().isdecimal():
            raise BadInputError(f'--questions "{item}": give NAME=N, for example mmlu=14042')
        counts[name.strip()] = int(number)
    return counts


def _chance(log10: float) -> str:
    # Rounded up: it is a bound.
    return f"p < 10^{math.ceil(log10)}" if log10 < -3 else f"p < {max(0.001, 10**log10):.2g}"


def _text(text: str) -> Text:
    """Text from the file as text: square brackets are markup in a table."""
    from rich.text import Text

    return Text(text)


def _named(rows: Sequence[int], made: Audit) -> Text:
    names = made.table.row_names
    if len(rows) == len(names):
        return _text(f"all {len(rows)}")
    rest = len(rows) - SHOWN
    more = f"; and {rest} more" if rest > 0 else ""
    return _text("; ".join(names[i] for i in rows[:SHOWN]) + more)


def _tables(made: Audit) -> list[Any]:
    table = made.table
    title = f"{table.source}: {len(set(table.groups))} groups by {table.group_column}, "
    title += f"{len(table.groups)} rows, {table.missing} missing cells"
    parts = [_granularity_table(made, title), _variance_table(made), _error_table(made)]
    if made.baseline:
        parts.append(_baseline_table(made))
    names = table.benchmarks
    weak = [(p, p.first_as_second * p.second_as_first) for p in made.test.power]
    weak = [(p, chance) for p, chance in weak if chance > WEAK]
    if weak:
        pairs = ", ".join(
            f"{names[p.columns[0]]}/{names[p.columns[1]]} {100 * chance:.1f} %"
            for p, chance in weak
        )
        parts.append(f"weak test, a row labelled rightly passes exchanged by chance: {pairs}")
    if made.test.untestable:
        pairs = ", ".join(f"{names[i]}/{names[j]}" for i, j in made.test.untestable)
        parts.append(f"no test, as many questions: {pairs}")
    return parts


def _granularity_table(made: Audit, title: str) -> Any:
    from resa_lens.layers.audit import describe_nearest
    from resa_lens.layers.granularity import AMBIGUOUS, AS_LABELLED, NEITHER

    names, verdicts = made.table.benchmarks, made.test.rows
    rows = common.table("", "each percentage is k/n", "rows", "which")
    rows.title = _text(title)
    rows.columns[2].justify = "left"
    for exchange in made.test.exchanges:
        columns = " and ".join(names[i] for i in exchange.columns)
        rows.add_row(
            _text(f"exchanged: {columns}"), str(len(exchange.rows)), _named(exchange.rows, made)
        )
    for verdict in (AS_LABELLED, AMBIGUOUS):
        which = [i for i, v in enumerate(verdicts) if v.verdict == verdict]
        rows.add_row(verdict, str(len(which)), _named(which, made))
    which = [i for i, v in enumerate(verdicts) if v.verdict == NEITHER]
    rows.add_row(NEITHER, str(len(which)), "")
    for i in which[:SHOWN]:
        nearest = describe_nearest(made.table, i, verdicts[i])
        rows.add_row("", "", _text(f"{made.table.row_names[i]}: {nearest}"))
    if len(which) > SHOWN:
        rows.add_row("", "", f"and {len(which) - SHOWN} more")
    return rows


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _variance_table(made: Audit) -> Any:
    rows = common.table(
        "Between groups against within, exchanged columns put right", "score", "mean",
        "sd of groups", "sd within", "F (df)", "p", "permuted", "Holm", "share between", "ICC",
    )  # fmt: skip
    for v in made.variance:
        found = v.anova
        shares = found.eta_squared_ci if found else None
        rows.add_row(
            _text(v.score),
            _number(v.mean),
            _number(v.sd_between),
            _number(v.sd_within),
            "" if found is None or found.f_statistic is None else
            f"{found.f_statistic:.3f} ({found.df_between},{found.df_within})",
            _number(found and found.p_value, ".3g"),
            _number(v.permutation_p, ".3g"),
            _number(v.holm_p, ".3g"),
            "" if shares is None else f"{shares[0]:.2f}-{shares[1]:.2f}",
            _number(found and found.icc),
        )  # fmt: skip
    return rows


def _error_table(made: Audit) -> Any:
    from resa_lens.layers.audit import TARGET

    share = f"{100 * made.discordance:.0f} % differ"
    rows = common.table(
        "One sample a question: what can be told apart (points; 80 % power, alpha 0.05)", "score",
        "questions", "mean", "standard error", "two models", f"paired, {share}",
        f"questions for {TARGET:.0f} points", "paired",
    )  # fmt: skip
    for e in made.errors:
        paired = e.target_questions_paired
        rows.add_row(
            _text(e.score),
            str(e.questions),
            f"{e.mean:.2f}",
            f"{e.standard_error:.2f}",
            f"{e.detectable_unpaired:.1f}",
            "none" if e.detectable_paired is None else f"{e.detectable_paired:.1f}",
            str(e.target_questions_unpaired),
            "none" if paired is None else str(paired),
        )
    return rows


def _baseline_table(made: Audit) -> Any:
    rows = common.table(
        "Mean of the table minus the baseline, points", "score", "baseline", "as printed",
        "put right", "95 %",
    )  # fmt: skip
    for gap in made.baseline:
        rows.add_row(
            _text(gap.score),
            f"{gap.baseline:.2f}",
            f"{gap.as_printed:+.2f}",
            f"{gap.corrected:+.2f}",
            f"{gap.ci[0]:+.1f} to {gap.ci[1]:+.1f}",
        )
    return rows


def summary(made: Audit) -> list[str]:
    """The findings as plain sentences."""
    from resa_lens.layers.audit import ALPHA, AVERAGE, NOT_INDEPENDENT
    from resa_lens.layers.granularity import AMBIGUOUS, NEITHER

    table, test, check = made.table, made.test, made.average
    said = []
    for exchange in test.exchanges:
        columns = " and ".join(table.benchmarks[i] for i in exchange.columns)
        rows = len(exchange.rows)
        which = f"all {rows}" if rows == len(table.groups) else f"{rows} of {exchange.of}"
        said.append(
            f"{columns} are exchanged in {which} rows (by chance: {_chance(exchange.log10_all)}); "
            "put right here, the file is unchanged"
        )
    if not test.exchanges:
        said.append("no row shows exchanged columns")
    for verdict, meaning in (
        (AMBIGUOUS, "more than one reading fits, or a misprint would explain it"),
        (NEITHER, "a cell is no k/n under any reading"),
    ):
        if test.counts[verdict]:
            said.append(f"rows that are no clear case: {test.counts[verdict]} ({meaning})")
    if made.withheld:
        said.append(f"{made.withheld} cells of these rows are left out, their benchmark is unknown")
    if check.wrong:
        other = f" (columns left out: {', '.join(table.ignored)})" if table.ignored else ""
        said.append(
            f"{len(check.wrong)} of {check.checked} printed averages are not the mean of the "
            f"benchmarks{other}; the mean is used instead"
        )
    elif check.checked:
        said.append(f"all {check.checked} printed averages are the mean of their benchmarks")
    found = made.variance[0].anova
    if found is None or found.f_statistic is None or found.p_value is None:
        said.append(made.variance[0].note)
    else:
        more = "more than" if found.p_value < ALPHA else "no more than"
        said.append(
            f"between groups F({found.df_between},{found.df_within})={found.f_statistic:.3f}, "
            f"p={found.p_value:.3g}: the groups differ {more} the rows of a group would by chance"
        )
        said.append(NOT_INDEPENDENT)
    lower = [v.score for v in made.variance if v.holm_p is not None and v.holm_p < ALPHA]
    if lower:
        said.append(f"benchmarks where groups differ after Holm's correction: {', '.join(lower)}")
    if bias := made.bias:
        low, high = bias.sizes
        said.append(
            f"the best of {low if low == high else f'{low} to {high}'} rows lies {bias.bias:+.2f} "
            f"points above its group's mean ({bias.ci[0]:.2f} to {bias.ci[1]:.2f}, "
            f"{bias.groups} groups); noise within groups alone gives {bias.noise:+.2f}"
        )
    if made.errors and made.errors[-1].score == AVERAGE:
        last = made.errors[-1]
        said.append(
            f"one row's average has a standard error of {last.standard_error:.1f} points; two "
            f"models are told apart from {last.detectable_unpaired:.1f} points on"
            + (
                f", or {last.detectable_paired:.1f} question by question"
                if last.detectable_paired
                else ""
            )
        )
    return said
