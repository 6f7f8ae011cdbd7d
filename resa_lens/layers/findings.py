"""The findings of an audit as plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from resa_lens.layers.audit import ALPHA, AVERAGE, NOT_INDEPENDENT, Audit
from resa_lens.layers.granularity import AMBIGUOUS, NEITHER


def summary(result: Audit) -> Iterator[str]:
    """Yield the findings as plain sentences."""
    table, test, check = result.table, result.test, result.average
    for exchange in test.exchanges:
        columns = " and ".join(table.benchmarks[i] for i in exchange.columns)
        rows = len(exchange.rows)
        which = f"all {rows}" if rows == len(table.groups) else f"{rows} of {exchange.of}"
        yield (
            f"{columns} are exchanged in {which} rows (by chance: {_chance(exchange.log10_all)}); "
            "put right here, the file is unchanged"
        )
    if not test.exchanges:
        yield "no row shows exchanged columns"
    for verdict, meaning in (
        (AMBIGUOUS, "more than one reading fits, or a misprint would explain it"),
        (NEITHER, "a cell is no k/n under any reading"),
    ):
        if test.counts[verdict]:
            yield f"rows that are no clear case: {test.counts[verdict]} ({meaning})"
    if result.withheld:
        yield f"{result.withheld} cells of these rows are left out, their benchmark is unknown"
    if check.wrong:
        ignored = ", ".join(table.ignored)
        other = f" (columns left out: {ignored})" if ignored else ""
        yield (
            f"{len(check.wrong)} of {check.checked} printed averages are not the mean of the "
            f"benchmarks{other}; the mean is used instead"
        )
    elif check.checked:
        yield f"all {check.checked} printed averages are the mean of their benchmarks"
    anova = result.variance[0].anova
    if anova is None or anova.f_statistic is None or anova.p_value is None:
        yield result.variance[0].note
    else:
        more = "more than" if anova.p_value < ALPHA else "no more than"
        yield (
            f"between groups F({anova.df_between},{anova.df_within})={anova.f_statistic:.3f}, "
            f"p={anova.p_value:.3g}: the groups differ {more} the rows of a group would by chance"
        )
        yield NOT_INDEPENDENT
    lower = [v.score for v in result.variance if v.holm_p is not None and v.holm_p < ALPHA]
    if lower:
        yield f"benchmarks where groups differ after Holm's correction: {', '.join(lower)}"
    if bias := result.bias:
        low, high = bias.sizes
        yield (
            f"the best of {low if low == high else f'{low} to {high}'} rows lies {bias.bias:+.2f} "
            f"points above its group's mean ({bias.ci[0]:.2f} to {bias.ci[1]:.2f}, {bias.groups} "
            f"groups); noise within groups alone gives {bias.noise:+.2f}"
        )
    if result.errors and (last := result.errors[-1]).score == AVERAGE:
        paired = last.detectable_paired
        yield (
            f"one row's average has a standard error of {last.standard_error:.1f} points; two "
            f"models are told apart from {last.detectable_unpaired:.1f} points on"
            + (f", or {paired:.1f} question by question" if paired else "")
        )


def _chance(log10: float) -> str:
    # Rounded up: it is a bound.
    return f"p < 10^{math.ceil(log10)}" if log10 < -3 else f"p < {max(0.001, 10**log10):.2g}"
