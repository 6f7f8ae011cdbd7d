"""The page "Scores": runs side by side, their paired difference, and the answers themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import streamlit as st

from resa_lens.app import answers as run_answers
from resa_lens.app import empty, links
from resa_lens.app.answers import answers
from resa_lens.app.scores import reading
from resa_lens.app.widgets import (
    figure,
    paged,
    part,
    problem,
    problems,
    readable,
    share_columns,
    table,
    verbatim,
    views,
)
from resa_lens.artifacts.kinds.eval import Point
from resa_lens.artifacts.listing import Listing
from resa_lens.errors import BadInputError
from resa_lens.evals import answers as stored
from resa_lens.evals.answers import Answers, Filter
from resa_lens.evals.compare import Comparison
from resa_lens.figures import plots, tokens
from resa_lens.figures.scores import forest_figure
from resa_lens.stages import scored_runs
from resa_lens.stages.comparison import points, sentences, span
from resa_lens.stages.scored_runs import Run
from resa_lens.stats import Interval, PairedComparison

LETTERS = "ABCDEFG"
"""What the chosen runs are called in figures and tables; as many as `plots` has colours for."""
MARGIN = 2.0
"""Points: runs that differ by less count as equally good."""
PER_PAGE, PAGES = 10, "sample_page"
ANSWERS, SCORES, DIFFERENCE, ALL = "Answers", "Accuracy", "Difference by group", "All runs"
"""Views of the page."""


def show(listing: Listing) -> None:
    """Draw the page."""
    runs, damaged = scored_runs.runs_of(listing)
    problems([*listing.problems, *damaged])
    if not runs:
        empty.lacking(listing, "No scores", "eval", "--model", "tiny-reasoner")
        return
    compared = _readable(_choose(runs))
    if not compared:
        return
    for letter, run in compared.items():
        st.text(f"{letter}: {run.what}")
    alone = len(compared) < 2
    comparison = None if alone else _compared(compared)
    sections = {
        ANSWERS: [partial(_samples, listing, compared)] if alone or comparison else [],
        SCORES: [partial(_scores, compared)],
        DIFFERENCE: [partial(_difference, compared, comparison)] if comparison else [],
        ALL: [partial(_many, compared)] if len(compared) > 2 else [],
    }
    views({name: draw for name, draw in sections.items() if draw}, "scores_view")


def _choose(runs: Sequence[Run]) -> dict[str, Run]:
    """Choose runs, all on the same questions, and return them by letter."""
    by_name = {run.name: run for run in runs}
    first, second = scored_runs.defaults(runs)
    address = st.query_params.get("right")
    columns = st.columns(2)
    names = _names(runs, first)
    left = by_name[str(links.choice(columns[0], "A, to compare with", "left", names))]
    partners = {run.name: run for run in scored_runs.partners(runs, left)}
    rest = dict(partners)
    selection = [left]
    if rest:
        names = _names(list(rest.values()), second)
        selection.append(rest.pop(str(links.choice(columns[1], "B", "right", names))))
    if rest:
        more = st.multiselect(
            "More runs on the same questions",
            list(rest),
            max_selections=len(LETTERS) - 2,
            **links.bound("also"),
        )
        selection += [rest[name] for name in more]
    if address in by_name and address not in (left.name, *partners):
        problem(f"{address} answered other questions than {left.name}: they cannot be paired.")
    st.caption(
        f"Only runs on the same questions can be paired, question by question: {len(partners)} "
        f"beside A; {len(runs) - 1 - len(partners)} answered other questions."
    )
    return dict(zip(LETTERS, selection, strict=False))


def _names(runs: Sequence[Run], default: Run | None) -> dict[str, str]:
    """Return what a person tells runs by, the default first."""
    ordered = sorted(runs, key=lambda run: default is None or run.name != default.name)
    return {run.name: run.label for run in ordered}


def _readable(runs: Mapping[str, Run]) -> dict[str, Run]:
    """Leave out what cannot be read, with its problem; letters stay."""
    kept = {}
    for letter, run in runs.items():
        try:
            answers(run.key)
        except BadInputError as error:
            problem(f"{letter}: {error}")
        else:
            kept[letter] = run
    return kept


def _scores(runs: Mapping[str, Run]) -> None:
    """Draw each run by itself."""
    st.subheader("Accuracy", anchor=False)
    summaries = {letter: run_answers.summary(run.key, letter) for letter, run in runs.items()}
    rows = []
    for letter, run in runs.items():
        summary, own = summaries[letter], answers(run.key)
        rows.append(
            {
                "": letter,
                **share_columns("accuracy", "%", summary.accuracy, summary.ci),
                "questions": summary.n,
                "answers each": summary.samples,
                "tokens an answer": own.tokens,
                "cut off": own.unfinished,
                "run": run.name,
            }
        )
    table(rows, "runs")
    st.caption(
        "low and high: 95 % interval over questions (Wilson's where each is right or wrong, else a "
        "bootstrap). Of several answers to a question the mean counts."
    )
    groups = _by_group(runs)
    if any(len(rows) > 1 for rows in groups.values()):
        named = {_legend(letter, runs[letter]): rows for letter, rows in groups.items()}
        figure(plots.scores_figure(named), "figure-runs")


def _legend(letter: str, run: Run) -> str:
    """What stands for a run in a figure: it may be saved, and looked at without this page."""
    return f"{letter}: {run.short}"


def _by_group(runs: Mapping[str, Run]) -> dict[str, dict[str, Point]]:
    return {letter: run_answers.summary(run.key, letter).groups() for letter, run in runs.items()}


def _compared(runs: Mapping[str, Run]) -> Comparison | None:
    """Say how the second run differs from the first; None where that cannot be said."""
    first, second = list(runs)[:2]
    st.subheader(f"{second} minus {first}", anchor=False)
    margin = st.number_input(
        "Margin, points",
        min_value=0.1,
        max_value=50.0,
        value=MARGIN,
        step=0.5,
        help="Runs that differ by less count as equally good",
        width=180,
        **links.bound("margin"),
    )
    keys = runs[first].key, runs[second].key
    with st.spinner("Comparing question by question"):
        comparison = readable(run_answers.compared, *keys, (first, second), float(margin) / 100)
    if comparison is not None:
        paired = comparison.paired
        st.text(
            f"{second} minus {first}: {points(paired.difference)} points (95 % {span(paired.ci)}); "
            f"{paired.gained} gained, {paired.lost} lost; n = {paired.n}"
        )
        st.text("\n".join(sentences(comparison)))
    return comparison


def _difference(runs: Mapping[str, Run], comparison: Comparison) -> None:
    """Draw the second run minus the first by group."""
    first, second = pair = list(runs)[:2]
    share = float(st.session_state.get("margin", MARGIN)) / 100
    paired, groups = comparison.paired, _by_group(runs)
    by_group = {f"level {row.group}": row for row in comparison.by_level}
    by_group |= {row.group: row for row in comparison.by_task}
    lines = [(label, row.paired.difference, row.paired.ci) for label, row in by_group.items()]
    drawing = forest_figure(
        [("all", paired.difference, paired.ci), *lines],
        share,
        f"{runs[second].short} minus {runs[first].short}, by group",
        "95 % intervals, each by itself; diamond: 0 is outside",
    )
    figure(drawing, "figure-difference")
    if not lines:
        st.caption("A sweep keeps neither families nor levels: only all questions can be compared.")
        return
    st.caption(
        f"Grey: the margin. {len(comparison.by_level)} levels and {len(comparison.by_task)} "
        "families are as many tests: of true equals, one in twenty intervals misses 0. p after "
        "Holm is corrected for the rows of its kind."
    )
    rows = []
    for label, row in by_group.items():
        cells: dict[str, object] = {"group": label, "n": row.paired.n}
        for letter in pair:
            accuracy, ci, _ = groups[letter].get(label, (None, None, 0))
            cells |= share_columns(letter, "%", accuracy, ci, ends=f"{letter} ")
        flips = {"gained": row.paired.gained, "lost": row.paired.lost}
        rows.append({**cells, **_tested(row.paired, row.paired.ci, row.holm_p), **flips})
    table(rows, "differences", "Table of groups")


def _tested(paired: PairedComparison, ci: Interval, holm: float) -> dict[str, float | None]:
    """A difference, an interval and its p-values as columns."""
    columns = share_columns("difference", "points", paired.difference, ci)
    return {**columns, "p": paired.p_value, "p, Holm": holm}


def _many(runs: Mapping[str, Run]) -> None:
    first = next(iter(runs))
    share = float(st.session_state.get("margin", MARGIN)) / 100
    with part(f"All minus {first}"):
        with st.spinner("Comparing all runs"):
            comparisons = run_answers.ranked(
                tuple(run.key for run in runs.values()), tuple(runs), share
            )
        ranks = comparisons.runs
        lines = [
            (_legend(run.name, runs[run.name]), run.paired.difference, run.simultaneous_ci)
            for run in ranks
        ]
        subtitle = "95 % intervals that hold for all runs at once"
        figure(forest_figure(lines, share, f"Difference to {first}", subtitle), "figure-all")
        st.text("\n".join(sentences(comparisons)))
        rows = [
            {
                "": run.name,
                **_tested(run.paired, run.simultaneous_ci, run.holm_p),
                "p, equally good": run.equivalence.p_equivalent,
                "gained": run.paired.gained,
                "lost": run.paired.lost,
                "n": run.paired.n,
            }
            for run in ranks
        ]
        table(rows, "all_differences")


# The answers themselves ------------------------------------------------------------------------


def _samples(listing: Listing, runs: Mapping[str, Run]) -> None:
    pair = dict(list(runs.items())[:2])
    left, *rest = pair.values()
    right = rest[0] if rest else None
    with part("Answers"):
        own = {letter: answers(run.key) for letter, run in pair.items()}
        both = list(own.values())
        kinds = stored.kinds_of(both[0], both[1] if right else None)
        tally = {kind: int((kinds == kind).sum()) for kind in stored.KINDS}
        kept = [kind for kind in stored.KINDS if tally[kind] or kind != stored.PART]
        if right is None:
            kept = [k for k in kept if k not in (stored.GAINED, stored.LOST)]
        labels = {kind: kind if right else kind.removeprefix("both ") for kind in kept}
        totals = ", ".join(f"{tally[kind]} {label}" for kind, label in labels.items())
        st.text(f"{totals}; n = {len(kinds)}")
        query = _filter(labels, both)
        with st.spinner("Searching"):
            places = run_answers.matching(left, right, query)
        if not places.size:
            st.text("No question fits these filters.")
            return
        if all(one.rows is None for one in both):
            _without_texts(own, places.tolist(), kinds)
            return
        # What flipped is what a reader came for.
        flipped = np.isin(kinds[places], (stored.GAINED, stored.LOST))
        places = places[np.argsort(~flipped, kind="stable")]
        page_places = places[paged(places.size, PER_PAGE, PAGES)].tolist()
        st.text(f"{places.size} of {len(kinds)} questions; {PER_PAGE} a page")
        texts = [_texts(run, own[letter], page_places) for letter, run in pair.items()]
        for number, place in enumerate(page_places):
            _question(listing, pair, own, [rows[number] for rows in texts], place)


def _filter(labels: Mapping[str, str], pair: Sequence[Answers]) -> Filter:
    widget = partial(links.bound, pages=PAGES)
    kind = st.segmented_control(
        "Show", list(labels), format_func=labels.__getitem__, **widget("flips")
    )
    families, known_levels = stored.groups_of(pair)
    columns = st.columns(3)
    groups, levels, text = [], [], ""
    if families:
        groups = columns[0].multiselect("Family", families, **widget("family"))
    if known_levels:
        levels = columns[1].multiselect("Level", known_levels, **widget("level"))
    if any(one.rows is not None for one in pair):
        text = columns[2].text_input(
            "Text",
            help="In the question, the expected answer, or what a model wrote; capitals or not",
            **widget("search"),
        )
    return Filter(kind, tuple(groups), tuple(levels), str(text or "").strip())


def _without_texts(own: Mapping[str, Answers], places: Sequence[int], kinds: Any) -> None:
    st.caption("These runs keep right or wrong of each question, without texts.")
    first = next(iter(own.values()))
    rows = [
        {
            "question": first.scores.questions[place].id,
            **{letter: float(one.scores.means[place]) for letter, one in own.items()},
            "kind": kinds[place],
        }
        for place in places
    ]
    table(rows, "questions")


def _texts(run: Run, own: Answers, places: Sequence[int]) -> list[list[dict[str, Any]]]:
    """Return the texts of each question's answers; none of a run that keeps no texts."""
    if own.rows is None:
        return [[] for _ in places]
    rows = own.rows[places]
    texts = run_answers.texts(run.key, tuple(rows.ravel().tolist()))
    return [[texts[int(row)] for row in of_question] for of_question in rows]


def _question(
    listing: Listing,
    runs: Mapping[str, Run],
    own: Mapping[str, Answers],
    texts: Sequence[Sequence[Mapping[str, Any]]],
    place: int,
) -> None:
    first = next(rows[0] for rows in texts if rows)
    question = stored.known(*own.values()).scores.questions[place]
    level = None if question.level is None else f"level {question.level}"
    with st.container(border=True):
        st.text(" · ".join(text for text in (question.id, question.task, level) if text))
        verbatim(str(first["question"]))
        st.text(f"expected: {first['gold']}")
        columns = st.columns(len(own))
        for column, (letter, one), rows in zip(columns, own.items(), texts, strict=True):
            with column:
                _answers(letter, one, rows, place)
        if all(texts) and len(texts) > 1:
            _differing(*(rows[0] for rows in texts))
        reading.show(listing, runs, [rows[0] if rows else None for rows in texts], question.id)


def _differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Draw the two thoughts with the words in which they differ."""
    thoughts = [
        (stored.thought_and_answer(str(row["prompt"]), str(row["generation"]))[0] or "").strip()
        for row in (left, right)
    ]
    if thoughts[0] == thoughts[1] or not all(thoughts):
        return
    with st.expander("Where the thoughts differ"):
        for column, text in zip(st.columns(2), tokens.differing(*thoughts), strict=True):
            column.html(text)


def _answers(letter: str, own: Answers, rows: Sequence[Mapping[str, Any]], place: int) -> None:
    correct = own.scores.correct[place]
    right = int(correct.sum()) if own.rows is not None else float(correct.mean())
    if correct.size == 1 and right in (0, 1):
        label = f"{letter}: {'right' if right else 'wrong'}"
    else:
        label = f"{letter}: {right:g} of {correct.size} right"
    colour, icon = (
        ("green", ":material/check:") if correct.all()
        else ("orange", ":material/close:") if not correct.any()
        else ("gray", ":material/contrast:")
    )  # fmt: skip
    st.badge(label, icon=icon, color=colour)
    if not rows:
        st.text("no text is kept")
        return
    _answer(rows[0])
    if len(rows) > 1:
        with st.expander(f"The other {len(rows) - 1}"):
            for row in rows[1:]:
                st.badge("right" if row["correct"] else "wrong")
                _answer(row)


def _answer(row: Mapping[str, Any]) -> None:
    """Draw one answer: what was understood of it, the thought, and the rest; all of it as text."""
    answer = row["answer"]
    read = "no answer could be read" if answer is None else f"answer: {answer}"
    st.text(f"{read}{'' if row['finished'] else '; cut off'}")
    thought, rest = stored.thought_and_answer(str(row["prompt"]), str(row["generation"]))
    for name, text in (("thought", thought), ("after the thought", rest)):
        if text is not None:
            st.caption(name)
            verbatim(text.strip("\n ") or "(empty)")
