"""Mixtures, regrets and audits of tables, in tables and sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from resa_lens.figures.grids import cell, grid, table
from resa_lens.models.hookpoints import describe_layer

if TYPE_CHECKING:
    from resa_lens.layers.alignment import Alignment
    from resa_lens.layers.audit import Audit as Result
    from resa_lens.layers.mixture import MixtureFit
    from resa_lens.layers.regret import Regrets


WEAK = 0.01  # chance from which on a pair's test is called weak


def mixture(
    args: Any, fit: MixtureFit, objections: Sequence[str], alignment: Alignment | None
) -> Iterator[Any]:
    """Yield a mixture, its nulls and what speaks against it."""
    title = f"{args.table.name}, {args.column}: recipe {args.recipe}, n = {fit.n}"
    parts = [
        {"n": n + 1, "of": part, "ci": fit.intervals[n] if n < len(fit.intervals) else None}
        for n, part in enumerate(fit.components)
    ]
    rows = grid(title, parts, {
        "component": "{n}", "mean (0-based)": "{of.mean:.2f}", "95 %": "{ci.mean:.1f}",
        "weight": "{of.weight:.3f}", "95 % of it": "{ci.weight:.2f}", "sd": "{of.std:.2f}",
    })  # fmt: skip
    yield rows if fit.components else f"{title}: no component (flat)"
    if nulls := [{"name": name, **null} for name, null in fit.nulls.items() if "p" in null]:
        yield grid("Nulls", nulls, {
            "null": "{name}: {statistic}", "value": "{value:.4g}", "p": "{p:.3g}",
            "draws": "{draws}",
        })  # fmt: skip
    level = fit.log_likelihood
    facts = [f"entropy {fit.entropy:.4f}"] if fit.entropy is not None else []
    facts += [f"log-likelihood {level:.4f} a sample"] if level is not None else []
    yield ", ".join(facts)
    yield f"recommended (0-based): {', '.join(map(str, fit.recommended)) or 'none'}"
    yield f"verdict: {fit.verdict}"
    yield fit.reason
    yield fit.next_step
    if objections:
        yield "What speaks against this recipe:"
        yield from (f"- {line}" for line in objections)
    if alignment:
        yield f"{args.column} against {args.against}: {alignment.reason}"


def regrets_of(
    title: str, regrets: Regrets, n_layers: int, reasons: dict[str, str], replicates: bool
) -> Iterator[Any]:
    """Yield what each selector's layer cost."""

    def with_interval(form: str, ci: str) -> Callable[[Any], str]:
        return lambda row: cell(form, row) + (f" ({text})" if (text := cell(ci, row)) else "")

    title += f" ({100 * regrets.level:.0f} % intervals)" if regrets.random_ci else ""
    rows = [{**asdict(row), "where": describe_layer(row.layer, n_layers)}
            for row in regrets.selectors]  # fmt: skip
    chance = {"selector": "(random)", "where": "any", "score": None, "gain": None, "gain_ci": None,
              "regret": regrets.random, "ci": regrets.random_ci, "as_good": None}  # fmt: skip
    yield grid(title, [*rows, chance], {
        "selector": "{selector}", "layer": "{where}", "score": "{score:.2f}",
        "regret": with_interval("{regret:.2f}", "{ci:.2f}"),
        "above random": with_interval("{gain:+.2f}", "{gain_ci:.2f}"),
        "as good": "{as_good:*.0f} %",
    })  # fmt: skip
    yield f"best of {regrets.layers} layers: {describe_layer(regrets.best, n_layers)}"
    yield from (f"{name}: {reason}" for name, reason in reasons.items())
    if regrets.noise is None:
        yield "one score a layer: no interval; give --checkpoints or --noise"
    else:
        freedom = regrets.freedom
        known = "as given" if freedom is None else f"{freedom} degrees of freedom"
        yield f"noise of one score: sd {regrets.noise:.2f}, {known}"
    if replicates:
        yield (
            "rows of a layer are taken as independent; checkpoints of one run are not, and make "
            "the intervals too narrow"
        )


SHOWN = 6  # rows named before the rest are only counted; --json names all


def _named(rows: Sequence[int], result: Result) -> str:
    names = result.table.row_names
    if len(rows) == len(names):
        return f"all {len(rows)}"
    rest = len(rows) - SHOWN
    more = f"; and {rest} more" if rest > 0 else ""
    return "; ".join(names[i] for i in rows[:SHOWN]) + more


def audit(result: Result) -> Iterator[Any]:
    """Yield the tests of a table of checkpoints."""
    from resa_lens.layers.audit import TARGET

    yield _granularity(result)
    yield grid("Between groups against within, exchanged columns put right", result.variance, {
        "score": "{score}", "mean": "{mean:.2f}", "sd of groups": "{sd_between:.2f}",
        "sd within": "{sd_within:.2f}",
        "F (df)": lambda row: cell("{anova.f_statistic:.3f} ", row)
        and cell("{anova.f_statistic:.3f} ({anova.df_between},{anova.df_within})", row),
        "p": "{anova.p_value:.3g}", "permuted": "{permutation_p:.3g}", "Holm": "{holm_p:.3g}",
        "share between": "{anova.eta_squared_ci:.2f}", "ICC": "{anova.icc:.2f}",
    })  # fmt: skip
    yield grid(
        "One sample a question: the differences that can be seen (points; 80 % power, alpha 0.05)",
        result.errors, {
            "score": "{score}", "questions": "{questions}", "mean": "{mean:.2f}",
            "standard error": "{standard_error:.2f}", "two models": "{detectable_unpaired:.1f}",
            f"paired, {100 * result.discordance:.0f} % differ": lambda row: "none"
            if row.detectable_paired is None else f"{row.detectable_paired:.1f}",
            f"questions for {TARGET:.0f} points": "{target_questions_unpaired}",
            "questions, paired": lambda row: "none"
            if row.target_questions_paired is None else row.target_questions_paired,
        },
    )  # fmt: skip
    if result.baseline:
        yield grid("Mean of the table minus the baseline, points", result.baseline, {
            "score": "{score}", "baseline": "{baseline:.2f}", "as printed": "{as_printed:+.2f}",
            "put right": "{corrected:+.2f}", "95 %": "{ci:+.1f}",
        })  # fmt: skip
    names = result.table.benchmarks
    chances = [(p.columns, p.first_as_second * p.second_as_first) for p in result.test.power]
    weak = [f"{names[i]}/{names[j]} {100 * p:.1f} %" for (i, j), p in chances if p > WEAK]
    if weak:
        pairs = ", ".join(weak)
        yield f"weak test, a row labelled rightly passes exchanged by chance: {pairs}"
    if result.test.untestable:
        pairs = ", ".join(f"{names[i]}/{names[j]}" for i, j in result.test.untestable)
        yield f"no test, as many questions: {pairs}"


def _granularity(result: Result) -> Any:
    from resa_lens.layers.audit import describe_nearest
    from resa_lens.layers.granularity import AMBIGUOUS, AS_LABELLED, NEITHER

    checkpoints, verdicts = result.table, result.test.rows
    rows: list[tuple[Any, ...]] = []
    for exchange in result.test.exchanges:
        columns = " and ".join(checkpoints.benchmarks[i] for i in exchange.columns)
        which = exchange.rows
        rows.append((f"exchanged: {columns}", len(which), _named(which, result)))
    for verdict in (AS_LABELLED, AMBIGUOUS, NEITHER):
        which = [i for i, row in enumerate(verdicts) if row.verdict == verdict]
        rows.append((verdict, len(which), "" if verdict == NEITHER else _named(which, result)))
    for i in which[:SHOWN]:
        nearest = describe_nearest(checkpoints, i, verdicts[i])
        rows.append(("", "", f"{checkpoints.row_names[i]}: {nearest}"))
    if len(which) > SHOWN:
        rows.append(("", "", f"and {len(which) - SHOWN} more"))
    title = (
        f"{checkpoints.source}: {len(set(checkpoints.groups))} groups by "
        f"{checkpoints.group_column}, {len(verdicts)} rows, {checkpoints.missing} missing cells"
    )
    return table(title, "each percentage is k/n", "rows", "<which", rows=rows)
