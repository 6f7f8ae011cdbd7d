"""Audit of a published table of checkpoints: groups x checkpoints x benchmarks, in percent.

The columns are first held against the numbers of questions (`granularity`), exchanged ones are put
right, and only then are groups compared: variance, best-of-n, standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from scipy import special

from resa_lens import stats
from resa_lens.errors import BadInputError
from resa_lens.layers.checkpoints import CheckpointTable, plain_name
from resa_lens.layers.granularity import (
    AMBIGUOUS,
    EXCHANGED,
    NEITHER,
    GranularityTest,
    RowVerdict,
    granularity_test,
    places,
    printed_counts,
)
from resa_lens.stats import Floats, Interval, OneWay

ALPHA, POWER, TARGET = 0.05, 0.8, 2.0
"""Of the detectable differences; the target is in points."""
AVERAGE = "average"
NOT_INDEPENDENT = (
    "checkpoints of one run are not independent: they spread less than runs would, so every p of "
    "the groups is too small"
)


@dataclass(frozen=True)
class AverageCheck:
    """The printed average against the mean of the row's benchmarks."""

    column: str | None
    checked: int
    unchecked: int
    """Rows with a missing cell or no printed average."""
    wrong: tuple[dict[str, Any], ...]
    """Rows whose average is neither that of k/n nor that of the printed cells, as printed."""


@dataclass(frozen=True)
class GroupVariance:
    """One score: variance between groups against variance between the rows of a group."""

    score: str
    rows: int
    groups: int
    mean: float | None
    sd_between: float | None
    """Of the groups' means."""
    sd_within: float | None
    """Of the rows of a group, pooled."""
    anova: OneWay | None
    permutation_p: float | None
    """The same F against scores shuffled over the groups."""
    holm_p: float | None
    """The F test's p after Holm's correction over the benchmarks; None for the average."""
    note: str
    """Why F is not defined, or empty."""


@dataclass(frozen=True)
class SelectionBias:
    """What reporting the best row of each group adds to its mean, in points of the average."""

    bias: float
    ci: Interval
    """Bootstrap over groups."""
    groups: int
    """Groups with two rows or more."""
    sizes: tuple[int, int]
    """Fewest and most rows of these groups."""
    noise: float
    """What normal noise of the pooled sd within groups alone would give."""
    noise_interval: Interval
    """The central 95 % of draws of that noise."""


@dataclass(frozen=True)
class SamplingError:
    """What the number of questions allows to see, in points, at the benchmark's mean."""

    score: str
    questions: int
    mean: float
    standard_error: float
    """Of one row, one sample a question: binomial."""
    detectable_unpaired: float
    """Smallest difference of two models found with 80 % power at alpha 0.05, two-sided."""
    detectable_paired: float | None
    """The same, question by question; None where it would exceed the discordance itself."""
    target_questions_unpaired: int
    """Questions to find a difference of `TARGET` points; for the average, of all benchmarks."""
    target_questions_paired: int | None


@dataclass(frozen=True)
class BaselineGap:
    """Mean of the table's other rows minus the baseline for one benchmark, in points."""

    score: str
    baseline: float
    as_printed: float
    corrected: float
    ci: Interval
    """Of the corrected difference, both taken as one sample a question on questions of its own."""


@dataclass(frozen=True)
class Audit:
    """All findings about one table."""

    table: CheckpointTable
    test: GranularityTest
    average: AverageCheck
    variance: tuple[GroupVariance, ...]
    """The average first, then each benchmark, exchanged columns put right."""
    bias: SelectionBias | None
    """None where no group has two complete rows."""
    errors: tuple[SamplingError, ...]
    """Each benchmark, then the unweighted average."""
    discordance: float
    baseline: tuple[BaselineGap, ...]
    withheld: int
    """Cells left out of every per-benchmark statistic: which benchmark they hold is unknown."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        table, test, whole = self.table, self.test, self.variance[0]
        names = table.benchmarks
        return {
            "source": table.source,
            "group_column": table.group_column,
            "models": len(set(table.groups)),
            "checkpoints": len(table.groups),
            "benchmarks": dict(zip(names, table.questions, strict=True)),
            "ignored_columns": list(table.ignored),
            "missing_cells": table.missing,
            "withheld_cells": self.withheld,
            "f_statistic": whole.anova and whole.anova.f_statistic,
            "p_value": whole.anova and whole.anova.p_value,
            "df_between": whole.anova and whole.anova.df_between,
            "df_within": whole.anova and whole.anova.df_within,
            "permutation_p": whole.permutation_p,
            "best_of_bias": self.bias and self.bias.bias,
            "exchanged_columns": [
                {
                    "columns": [names[i] for i in e.columns],
                    "rows": len(e.rows),
                    "of": e.of,
                    "row_names": [table.row_names[i] for i in e.rows],
                    "holds": {names[i]: names[e.reading[i]] for i in e.columns},
                    "chance": e.chance,
                    "log10_chance_all": e.log10_all,
                }
                for e in test.exchanges
            ],
            "granularity": {
                "verdicts": test.counts,
                "rows": [
                    _row_dict(table, row, verdict) for row, verdict in enumerate(test.rows)
                ],
                "power": [
                    {**asdict(p), "columns": [names[i] for i in p.columns]} for p in test.power
                ],
                "untestable": [[names[i] for i in pair] for pair in test.untestable],
            },
            "average_check": asdict(self.average),
            "variance": [asdict(v) for v in self.variance],
            "selection_bias": self.bias and asdict(self.bias),
            "sampling_errors": [asdict(e) for e in self.errors],
            "detectable": {
                "alpha": ALPHA, "power": POWER, "discordance": self.discordance,
                "target_points": TARGET,
            },
            "baseline": [asdict(b) for b in self.baseline],
        }  # fmt: skip


def _row_dict(table: CheckpointTable, row: int, verdict: RowVerdict) -> dict[str, Any]:
    names = table.benchmarks
    return {
        "row": table.row_names[row],
        "verdict": verdict.verdict,
        "misfits": [names[i] for i in verdict.misfits],
        "nearest": "" if verdict.verdict != NEITHER else describe_nearest(table, row, verdict),
    }


def describe_nearest(table: CheckpointTable, row: int, verdict: RowVerdict) -> str:
    """In words, what comes nearest to a row that fits no reading."""
    moved = [table.benchmarks[i] for i, j in enumerate(verdict.nearest) if i != j]
    parts = []
    for i in verdict.nearest_misfits:
        value, n = table.cells[row][i], table.questions[verdict.nearest[i]]
        if value is not None:
            k = min(n, max(0, round(value * n / 100)))
            parts.append(f"{table.benchmarks[i]} {value} is no k/{n} (nearest {100 * k / n:.2f})")
    reading = f"{' and '.join(moved)} exchanged" if moved else "as labelled"
    return f"{reading}, but {', '.join(parts)}"


def audit(
    table: CheckpointTable,
    *,
    discordance: float = 0.2,
    baseline: Sequence[str] = (),
    draws: int = stats.DRAWS,
    seed: int = 0,
) -> Audit:
    """Audits a table; the table itself is never changed.

    Args:
        table: from `checkpoints.read_checkpoints`.
        discordance: share of the questions on which two models differ, for paired comparisons.
        baseline: "benchmark=percent" each, or the name of one group.
        draws: of permutations, bootstraps and noise.
        seed: of the same.

    Raises:
        BadInputError: a discordance that is no share, or a baseline that the table does not know.
    """
    if not 0 < discordance <= 1:
        raise BadInputError(f"discordance {discordance}: a share of the questions, above 0 to 1")
    if draws < 20 or seed < 0:
        raise BadInputError(f"draws {draws}, seed {seed}: give 20 draws or more and a seed from 0")
    test = granularity_test(table.cells, table.questions)
    printed = np.array([[np.nan if v is None else float(v) for v in r] for r in table.cells])
    scores = corrected_scores(printed, test)
    check = check_average(table, test)
    wrong = {entry["row"] for entry in check.wrong}
    average = printed.mean(axis=1)
    for row, value in enumerate(table.averages):
        # The printed average was rounded once, a mean of printed cells six times.
        if value is not None and table.row_names[row] not in wrong and np.isfinite(average[row]):
            average[row] = float(value)
    groups = np.array(table.groups)
    whole = group_variance(AVERAGE, average, groups, draws, [seed, 0])
    parts = [
        group_variance(name, scores[:, i], groups, draws, [seed, 1, i])
        for i, name in enumerate(table.benchmarks)
    ]
    variance = (whole, *_with_holm(parts))
    bias = selection_bias(average, groups, draws, seed)
    errors = sampling_errors(table, scores, discordance)
    gaps = baseline_gaps(table, printed, scores, baseline)
    withheld = int(np.isfinite(printed).sum() - np.isfinite(scores).sum())
    return Audit(table, test, check, variance, bias, errors, discordance, gaps, withheld)


def corrected_scores(printed: Floats, test: GranularityTest) -> Floats:
    """Scores [rows, benchmarks] with exchanged cells put right; NaN where missing or unknown.

    A cell's benchmark is unknown where the row is ambiguous, or fits neither and has a misfit among
    columns that other rows show exchanged.
    """
    scores = printed.copy()
    for row, verdict in enumerate(test.rows):
        if verdict.verdict == EXCHANGED:
            scores[row, list(verdict.reading)] = printed[row]
            continue
        rivals = verdict.rivals
        if verdict.verdict == NEITHER:
            shown = [e.reading for e in test.exchanges if set(e.columns) & set(verdict.misfits)]
            rivals = (verdict.reading, *shown)
        for rival in rivals:
            read = np.empty_like(printed[row])
            read[list(rival)] = printed[row]
            scores[row, read != printed[row]] = np.nan
    return scores


def check_average(table: CheckpointTable, test: GranularityTest) -> AverageCheck:
    """Recomputes the average of every complete row, from k/n where known and from the print."""
    digits = max((places(v) for v in table.averages if v is not None), default=0)
    half = Fraction(1, 2 * 10**digits)
    per_column = [
        max((places(v) for v in column if v is not None), default=0)
        for column in zip(*table.cells, strict=True)
    ]
    wrong, checked = [], 0
    for row, (cells, value, verdict) in enumerate(
        zip(table.cells, table.averages, test.rows, strict=True)
    ):
        present = [v for v in cells if v is not None]
        if value is None or len(present) < len(cells):
            continue
        checked += 1
        mean = Fraction(sum(present)) / len(present)
        bounds = [(mean, mean)]
        if verdict.verdict not in (NEITHER, AMBIGUOUS):
            low = high = Fraction(0)
            for i, v in enumerate(present):
                n = table.questions[verdict.reading[i]]
                # As coarse as the row's own finest cell, as in the test.
                counts = printed_counts(v, n, min(per_column[i], max(map(places, present))))
                low, high = low + Fraction(100 * counts[0], n), high + Fraction(100 * counts[-1], n)
            bounds.append((low / len(present), high / len(present)))
        if not any(low - half <= Fraction(value) <= high + half for low, high in bounds):
            wrong.append(
                {"row": table.row_names[row], "printed": float(value), "mean": float(mean)}
            )
    return AverageCheck(table.average_column, checked, len(table.groups) - checked, tuple(wrong))


def group_variance(
    score: str, values: Floats, groups: np.ndarray, draws: int, seed: stats.Seed
) -> GroupVariance:
    """One-way analysis of variance of values [rows] in groups [rows]; NaN rows are left out."""
    there = np.isfinite(values)
    values, groups = values[there], groups[there]
    names = np.unique(groups)
    mean = float(values.mean()) if values.size else None
    if names.size < 2:
        note = f"F is not defined: {names.size} group(s) with a known score"
        return GroupVariance(
            score, int(values.size), int(names.size), mean, None, None, None, None, None, note
        )
    sd_means = float(np.std([values[groups == name].mean() for name in names], ddof=1))
    anova = stats.one_way(values, groups)
    note, permuted = "", None
    if anova.ms_within is None:
        note = "F is not defined: every group has one row"
    elif anova.f_statistic is None:
        note = "F is not defined: within groups the score does not vary"
    else:
        permuted = stats.one_way_permutation(values, groups, draws, seed)
    within = None if anova.ms_within is None else math.sqrt(anova.ms_within)
    return GroupVariance(
        score, int(values.size), int(names.size), mean, sd_means, within, anova, permuted, None,
        note,
    )  # fmt: skip


def _with_holm(parts: list[GroupVariance]) -> list[GroupVariance]:
    raw = {i: v.anova.p_value for i, v in enumerate(parts) if v.anova}
    raw = {i: p for i, p in raw.items() if p is not None}
    adjusted = stats.holm(list(raw.values())).tolist() if raw else []
    by_index = dict(zip(raw, adjusted, strict=True))
    return [replace(v, holm_p=by_index.get(i)) for i, v in enumerate(parts)]


def selection_bias(
    values: Floats, groups: np.ndarray, draws: int = stats.DRAWS, seed: int = 0
) -> SelectionBias | None:
    """Best-of-n of values [rows] in groups [rows] beside that of pure noise; NaN is left out."""
    there = np.isfinite(values)
    values, groups = values[there], groups[there]
    rows = [part for name in np.unique(groups) if (part := values[groups == name]).size > 1]
    if not rows:
        return None
    gains = [float(part.max() - part.mean()) for part in rows]
    sizes = [part.size for part in rows]
    squares = sum(float(((part - part.mean()) ** 2).sum()) for part in rows)
    sd = math.sqrt(squares / (sum(sizes) - len(sizes)))
    noise = sd * float(np.mean([stats.expected_maximum(size) for size in sizes]))
    null = sd * stats.best_of_noise(sizes, draws, [seed, 3])
    return SelectionBias(
        float(np.mean(gains)),
        stats.bootstrap_mean_interval(gains, draws=draws, seed=[seed, 2]),
        len(rows),
        (min(sizes), max(sizes)),
        noise,
        stats.percentile_interval(null),
    )


def sampling_errors(
    table: CheckpointTable, scores: Floats, discordance: float
) -> tuple[SamplingError, ...]:
    """Standard errors from the numbers of questions, at each benchmark's mean of scores [rows, B].

    Differences have variance 2 p (1 - p) / n unpaired and discordance / n paired.
    """
    both = _z(ALPHA) + float(special.ndtri(POWER))
    made: list[SamplingError] = []

    def add(score: str, questions: int, mean: float, variance: float, paired: float) -> None:
        # Variances are those of one row, and of a paired difference, in shares squared.
        needed = (both / (TARGET / 100)) ** 2
        detectable = both * math.sqrt(paired)
        possible = discordance >= TARGET / 100
        made.append(
            SamplingError(
                score,
                questions,
                mean,
                100 * math.sqrt(variance),
                100 * both * math.sqrt(2 * variance),
                100 * detectable if detectable <= discordance else None,
                math.ceil(needed * 2 * variance * questions),
                math.ceil(needed * paired * questions) if possible else None,
            )
        )

    variances = []
    for name, n, column in zip(table.benchmarks, table.questions, scores.T, strict=True):
        known = column[np.isfinite(column)]
        if known.size == 0:
            continue
        # At 0 and 100 % the formula gives no error at all: half a question is kept.
        share = min(max(float(known.mean()) / 100, 0.5 / n), 1 - 0.5 / n)
        variances.append(share * (1 - share) / n)
        add(name, n, float(known.mean()), variances[-1], discordance / n)
    if len(made) == len(table.benchmarks):
        width = len(made) ** 2
        paired = sum(discordance / n for n in table.questions) / width
        mean = float(np.mean([e.mean for e in made]))
        add(AVERAGE, sum(table.questions), mean, sum(variances) / width, paired)
    return tuple(made)


def baseline_gaps(
    table: CheckpointTable, printed: Floats, scores: Floats, baseline: Sequence[str]
) -> tuple[BaselineGap, ...]:
    """Distance of each benchmark's mean to a baseline, before and after the columns are put right.

    Raises:
        BadInputError: neither "benchmark=percent" items nor the name of one group.
    """
    others = np.ones(len(table.groups), dtype=bool)
    if len(baseline) == 1 and "=" not in baseline[0]:
        # A layer may be named without its second numbering.
        chosen = np.array([baseline[0] in (g, g.partition(" (0-based")[0]) for g in table.groups])
        if not chosen.any():
            raise BadInputError(
                f'--baseline "{baseline[0]}" is no {table.group_column} of {table.source}: '
                "give one of them, or NAME=PERCENT for each benchmark"
            )
        others = ~chosen
        values = {
            i: (float(np.nanmean(printed[chosen, i])), float(np.nanmean(scores[chosen, i])))
            for i in range(len(table.benchmarks))
            if np.isfinite(scores[chosen, i]).any()
        }
    else:
        values = {i: (v, v) for i, v in (_baseline_value(item, table) for item in baseline)}
    gaps = []
    for i, (shown, value) in values.items():
        if not np.isfinite(scores[others, i]).any():
            continue
        mean, n = float(np.nanmean(scores[others, i])), table.questions[i]
        half = 100 * _z(ALPHA) * math.sqrt(sum(p * (1 - p) / n for p in (value / 100, mean / 100)))
        gaps.append(
            BaselineGap(
                table.benchmarks[i],
                value,
                float(np.nanmean(printed[others, i])) - shown,
                mean - value,
                (mean - value - half, mean - value + half),
            )
        )
    return tuple(gaps)


def expected_seconds(table: CheckpointTable, draws: int) -> float:
    """Return about how many seconds an audit takes: 2.5 for 100 million shuffled cells."""
    return 2.5e-8 * len(table.groups) * len(table.benchmarks) * draws


def _z(alpha: float) -> float:
    return float(special.ndtri(1 - alpha / 2))


def _baseline_value(item: str, table: CheckpointTable) -> tuple[int, float]:
    name, _, text = item.partition("=")
    plain = [plain_name(b) for b in table.benchmarks]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if plain_name(name) not in plain or not 0 <= value <= 100:
        raise BadInputError(
            f'--baseline "{item}": give NAME=PERCENT with one of {", ".join(table.benchmarks)}'
        )
    return plain.index(plain_name(name)), value
