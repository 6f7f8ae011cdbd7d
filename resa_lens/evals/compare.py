"""Runs on the same questions: scores, paired differences, flips, equivalence and what was visible.

What is paired is said here; the resampling is that of `resa_lens.stats`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr

from resa_lens import stats
from resa_lens.errors import BadInputError
from resa_lens.stats import (
    DRAWS,
    Equivalence,
    Floats,
    GroupDifference,
    Interval,
    PairedComparison,
    PairedPower,
)

MARGIN = 0.02
"""Two points: runs that differ by less count as equally good."""


@dataclass(frozen=True)
class Question:
    """A question as runs are paired by it; the id alone may be a file's name and a row number."""

    id: str
    question: str
    gold: str
    task: str | None = None
    """Its task where the run has several, else its family."""
    level: int | None = None


@dataclass(frozen=True)
class RunScores:
    """One run's answers, questions in the order of their ids."""

    name: str
    questions: tuple[Question, ...]
    correct: Floats
    """[questions, samples], 1 where right."""
    answers: tuple[tuple[str | None, ...], ...]
    """The extracted answers; None where there was none."""

    @property
    def means(self) -> Floats:
        """Share of right answers of each question."""
        return self.correct.mean(axis=1)


@dataclass(frozen=True)
class Share:
    """A mean score with its interval."""

    value: float
    ci: Interval
    n: int
    """Questions; of a macro average, tasks."""


@dataclass(frozen=True)
class RunSummary:
    """One run by itself."""

    name: str
    accuracy: float
    """avg@n: the mean over questions of the mean over samples."""
    ci: Interval
    n: int
    samples: int
    """Answers a question."""
    by_task: dict[str, Share]
    by_level: dict[int, Share]
    macro: Share | None
    """Mean over tasks, each counting alike; None with fewer than two."""
    pass_at: dict[int, Share]
    """{k: unbiased pass@k}."""

    def groups(self) -> dict[str, tuple[float, Interval, int]]:
        """Return accuracy, interval and n of all questions, then of levels, then of tasks."""
        shares = {f"level {name}": share for name, share in self.by_level.items()} | self.by_task
        rest = {name: (share.value, share.ci, share.n) for name, share in shares.items()}
        return {"all": (self.accuracy, self.ci, self.n), **rest}


@dataclass(frozen=True)
class Flip:
    """A question whose score changed."""

    id: str
    question: str
    gold: str
    task: str | None
    level: int | None
    before: float
    """Share of right answers of the first run."""
    after: float
    answers_before: tuple[str | None, ...]
    answers_after: tuple[str | None, ...]


@dataclass(frozen=True)
class GroupRow:
    """The paired comparison on one task or level."""

    group: str
    paired: PairedComparison
    holm_p: float
    """Corrected over the rows of the same table."""


@dataclass(frozen=True)
class Comparison:
    """Two runs question by question: other minus base."""

    base: str
    other: str
    paired: PairedComparison
    equivalence: Equivalence
    power: PairedPower
    by_task: tuple[GroupRow, ...]
    by_level: tuple[GroupRow, ...]
    flips: tuple[Flip, ...]
    """Gained ones first; each in the order of their ids."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, the paired comparison's own at the top."""
        rest = asdict(self)
        return {"base": rest.pop("base"), "other": rest.pop("other"), **rest.pop("paired"), **rest}


@dataclass(frozen=True)
class RankedRun:
    """One of several runs against the first."""

    name: str
    paired: PairedComparison
    holm_p: float
    """Corrected over all runs."""
    simultaneous_ci: Interval
    """All runs' intervals hold together."""
    equivalence: Equivalence


@dataclass(frozen=True)
class BestOf:
    """The best of several runs, chosen on one part of the questions and scored on the other."""

    chosen: str
    """Best on the dev questions; of equals the first."""
    dev: Share
    """Its score there, which the choice flatters."""
    test: Share
    """Its score on the other questions: the one to report."""
    naive_chosen: str
    """Best on all questions at once."""
    naive: Share
    """Its score on the questions that chose it; the interval ignores the choice."""
    optimism: float
    """By how much the naive score is too high, by bootstrap: the choice is made anew on each
    resample, and what is chosen is held against its score on the whole."""
    noise: float
    """Expected maximum of the runs' noise if all were equally good: the most that choice adds."""
    runs: int


@dataclass(frozen=True)
class Comparisons:
    """Several runs against the first, and against each other."""

    base: RunSummary
    runs: tuple[RankedRun, ...]
    omnibus_p: float
    """Of no difference between any of the runs, the first too: labels shuffled inside each
    question (`stats.shuffled_within_questions`)."""
    best: BestOf
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with each paired comparison's own beside its run."""
        values = asdict(self)
        rows = [{**row.pop("paired"), **row} for row in values.pop("runs")]
        return {**values, "runs": rows}


def run_scores(name: str, rows: Sequence[Mapping[str, Any]]) -> RunScores:
    """Gather the samples of a run (rows as `evals.run.SAMPLE_SCHEMA`) by question.

    Raises:
        BadInputError: no samples, or not the same number for every question.
    """
    column = "task" if len({row.get("task") for row in rows}) > 1 else "family"
    by_question: dict[Question, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        key = Question(row["id"], row["question"], row["gold"], row[column], row["level"])
        by_question[key].append(row)
    if not by_question:
        raise BadInputError(f"run {name} holds no samples; score it again")
    order = sorted(by_question, key=lambda q: (q.id, q.question, q.gold))
    most = max(len(samples) for samples in by_question.values())
    if short := [q.id for q in order if len(by_question[q]) < most]:
        raise BadInputError(
            f"run {name} lacks samples: {len(short)} of {len(order)} questions have fewer than "
            f"{most}, question {short[0]} first; run its eval again, it goes on where it stopped"
        )
    samples = [sorted(by_question[q], key=lambda row: row["sample"]) for q in order]
    return RunScores(
        name,
        tuple(order),
        np.array([[float(row["correct"]) for row in rows] for rows in samples]),
        tuple(tuple(row["answer"] for row in rows) for rows in samples),
    )


def check_paired(runs: Sequence[RunScores]) -> None:
    """Check that all runs answer the questions of the first.

    Raises:
        BadInputError: they do not.
    """

    # A task's name or a level does not make another question of it.
    def keys(run: RunScores) -> list[tuple[str, str, str]]:
        return [(q.id, q.question, q.gold) for q in run.questions]

    first = keys(runs[0])
    for run in runs[1:]:
        if (other := keys(run)) != first:
            raise BadInputError(
                f"the runs answer different questions: {len(set(first) & set(other))} in common of "
                f"{len(first)} ({runs[0].name}) and {len(other)} ({run.name}); "
                "score both on the same questions"
            )


def _places(run: RunScores, column: str) -> dict[Any, list[int]]:
    """{task or level: places of its questions}, sorted; questions without one are left out."""
    places: dict[Any, list[int]] = defaultdict(list)
    for place, question in enumerate(run.questions):
        if (value := getattr(question, column)) is not None:
            places[value].append(place)
    return {value: places[value] for value in sorted(places)}


def _share(values: Floats, seed: int, draws: int = DRAWS) -> Share:
    ci = stats.mean_interval(values, draws=draws, seed=seed)
    return Share(float(values.mean()), ci, int(values.shape[0]))


def summarise(
    run: RunScores, ks: Sequence[int] = (), seed: int = 0, draws: int = DRAWS
) -> RunSummary:
    """Score one run: avg@n, pass@k, by task and level, each with its interval over questions.

    Raises:
        BadInputError: a k above the number of samples.
    """
    overall = _share(run.means, seed, draws)
    samples = run.correct.shape[1]
    if too_many := [k for k in ks if k > samples]:
        raise BadInputError(
            f"pass@{too_many[0]} of {samples} samples a question in {run.name}: k may be 1 to "
            f"{samples}"
        )
    right = run.correct.sum(axis=1).astype(np.int64)
    tasks = _places(run, "task")
    macro = None
    if len(tasks) > 1:
        groups = [run.means[where] for where in tasks.values()]
        macro = Share(*stats.macro_average(groups, draws=draws, seed=seed), len(tasks))
    return RunSummary(
        run.name, overall.value, overall.ci, overall.n, samples,
        {name: _share(run.means[where], seed, draws) for name, where in tasks.items()},
        {
            name: _share(run.means[where], seed, draws)
            for name, where in _places(run, "level").items()
        },
        macro,
        {k: _share(stats.pass_at_k(right, samples, k), seed, draws) for k in ks},
    )  # fmt: skip


def _by_group(
    base: RunScores, other: RunScores, column: str, seed: int, draws: int
) -> tuple[GroupRow, ...]:
    rows = {
        str(name): stats.compare_paired(base.means[where], other.means[where], seed, draws=draws)
        for name, where in _places(base, column).items()
    }
    if not rows:
        return ()
    corrected = stats.holm([paired.p_value for paired in rows.values()])
    return tuple(
        GroupRow(name, paired, float(p))
        for (name, paired), p in zip(rows.items(), corrected, strict=True)
    )


def _flips(base: RunScores, other: RunScores) -> tuple[Flip, ...]:
    before, after = base.means, other.means
    changed = np.flatnonzero(before != after)
    gained_first = sorted(changed.tolist(), key=lambda place: bool(after[place] < before[place]))
    return tuple(
        Flip(
            question.id, question.question, question.gold, question.task, question.level,
            float(before[place]), float(after[place]),
            base.answers[place], other.answers[place],
        )
        for place in gained_first
        for question in (base.questions[place],)
    )  # fmt: skip


def compare_runs(
    base: RunScores, other: RunScores, *, margin: float = MARGIN, seed: int = 0, draws: int = DRAWS
) -> Comparison:
    """Compare two runs question by question.

    Samples of a question are averaged first: questions are what is resampled, whole.

    Args:
        base: the run to compare with.
        other: a run on the same questions; the number of samples may differ.
        margin: of the equivalence test, and the difference that the power is planned for.
        seed: of every draw.
        draws: of bootstrap and permutation.

    Raises:
        BadInputError: other questions, or a margin outside (0, 1).
    """
    check_paired([base, other])
    return Comparison(
        base.name,
        other.name,
        stats.compare_paired(base.means, other.means, seed, draws=draws),
        stats.equivalence_test(base.means, other.means, margin, draws=draws, seed=seed),
        stats.paired_power(base.means, other.means, margin),
        _by_group(base, other, "task", seed, draws),
        _by_group(base, other, "level", seed, draws),
        _flips(base, other),
    )


def _family_level(differences: Floats, level: float, draws: int, seed: int) -> float:
    """Level of single intervals at which those of all runs [runs, n] hold together."""
    n = differences.shape[1]
    centred = differences - differences.mean(axis=1, keepdims=True)
    errors = centred.std(axis=1) / np.sqrt(n)
    moving = errors > 0
    if not moving.any():
        # Runs that changed nothing have no noise to draw: Bonferroni's correction.
        return 1 - (1 - level) / len(differences)
    scaled = centred[moving] / (errors[moving, None] * n)
    values, vectors = np.linalg.eigh(scaled @ scaled.T)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    critical = stats.simultaneous_quantile(
        lambda rng, count: rng.normal(size=(count, values.size)) @ root.T, level, draws, seed
    )
    together = 2 * float(ndtr(critical)) - 1
    still = int((~moving).sum())
    return together if not still else max(together, 1 - (1 - level) / len(differences))


def compare_all(
    runs: Sequence[RunScores], *, margin: float, seed: int = 0
) -> Comparison | Comparisons:
    """Compare runs with the first of them: two by `compare_runs`, more by `compare_many`.

    Raises:
        BadInputError: as `check_paired`.
    """
    check_paired(runs)
    if len(runs) == 2:
        return compare_runs(*runs, margin=margin, seed=seed)
    return compare_many(runs[0], runs[1:], margin=margin, seed=seed)


def compare_many(
    base: RunScores,
    others: Sequence[RunScores],
    *,
    margin: float = MARGIN,
    level: float = 0.95,
    seed: int = 0,
    draws: int = DRAWS,
) -> Comparisons:
    """Compare several runs with the first, corrected for their number.

    Args:
        base: the run to compare with.
        others: two or more runs on the same questions.
        margin: of the equivalence tests.
        level: of the intervals.
        seed: of every draw.
        draws: of bootstrap and permutation.

    Raises:
        BadInputError: other questions, fewer than two runs, or a margin outside (0, 1).
    """
    if len(others) < 2:
        raise BadInputError(f"{len(others)} run beside the first: give two or more")
    check_paired([base, *others])
    paired = [stats.compare_paired(base.means, r.means, seed, level, draws) for r in others]
    corrected = stats.holm([p.p_value for p in paired])
    differences = np.array([run.means - base.means for run in others])
    together = _family_level(differences, level, draws, seed)
    ranked = tuple(
        RankedRun(
            run.name,
            pair,
            float(p),
            stats.paired_interval(row, together, draws, seed)[0],
            stats.equivalence_test(base.means, run.means, margin, draws=draws, seed=seed),
        )
        for run, pair, p, row in zip(others, paired, corrected, differences, strict=True)
    )
    everyone = [base, *others]
    table = np.array([run.means for run in everyone])[:, None]
    omnibus = stats.shuffled_within_questions(table, min(draws, 2000), seed)
    return Comparisons(
        summarise(base, seed=seed), ranked, omnibus, best_of(everyone, seed=seed, draws=draws),
        len(base.questions),
    )  # fmt: skip


def on_dev(question_id: str, share: float = 0.5) -> bool:
    """Whether a question belongs to the part that chooses: a function of its id alone."""
    number = int.from_bytes(hashlib.sha256(question_id.encode()).digest()[:8], "big")
    return number < share * 2**64


def best_of(
    runs: Sequence[RunScores], *, dev_share: float = 0.5, seed: int = 0, draws: int = DRAWS
) -> BestOf:
    """Choose the best run on part of the questions and score it on the rest.

    Args:
        runs: two or more, on the same questions.
        dev_share: of the questions, chosen by a hash of their ids.
        seed: of the bootstrap.
        draws: of the bootstrap.

    Raises:
        BadInputError: one run, other questions, or no question in one of the parts.
    """
    if len(runs) < 2:
        raise BadInputError(f"{len(runs)} run: the best of one is no choice")
    check_paired(runs)
    dev = np.array([on_dev(q.id, dev_share) for q in runs[0].questions])
    if dev.all() or not dev.any():
        raise BadInputError(
            f"{dev.size} questions leave none to {'score' if dev.all() else 'choose'} the best run "
            "on; score the runs on more questions"
        )
    scores = np.array([run.means for run in runs])
    chosen = int(scores[:, dev].mean(axis=1).argmax())
    naive = int(scores.mean(axis=1).argmax())
    bias = stats.selection_bias(scores, min(draws, 2000), seed)
    return BestOf(
        runs[chosen].name, _share(scores[chosen, dev], seed), _share(scores[chosen, ~dev], seed),
        runs[naive].name, _share(scores[naive], seed), bias.optimism, bias.noise, len(runs),
    )  # fmt: skip


def compare_groups(
    a: Sequence[RunScores],
    b: Sequence[RunScores],
    *,
    margin: float = MARGIN,
    paired_seeds: bool = False,
) -> GroupDifference:
    """Compare two settings, each run with one or several seeds: b minus a.

    Args:
        a: the runs of the first setting.
        b: those of the second, on the same questions.
        margin: the difference that the questions are planned for.
        paired_seeds: run k of a and run k of b share their seed.

    Raises:
        BadInputError: a setting without runs, or other questions.
    """
    if not a or not b:
        raise BadInputError("a group holds no run; give one or more evaluations")
    check_paired([*a, *b])
    first, second = ([run.means for run in runs] for runs in (a, b))
    return stats.group_difference(first, second, target=margin, paired_seeds=paired_seeds)
