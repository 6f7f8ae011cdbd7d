"""The page "Scores": runs side by side, their paired difference, and the answers themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from resa_lens import plots, prompts
from resa_lens.app import empty, links, scores_data
from resa_lens.app.data import Listing
from resa_lens.app.scores_data import Answers, Run, Wanted
from resa_lens.app.widgets import figure, problem, problems, table
from resa_lens.errors import BadInputError
from resa_lens.evals.compare import GroupRow, RunSummary
from resa_lens.pipeline.comparison import sentences
from resa_lens.score_plots import forest_figure

LETTERS = "ABCDEFG"
"""What the chosen runs are called in figures and tables; as many as `plots` has colours for."""
MARGIN = 2.0
"""Points: runs that differ by less count as equally good."""
PER_PAGE = 10
LONGEST_LINK = 4000
_PERCENT, _P = "%.1f", "%.3g"


def show(listing: Listing) -> None:
    """Draw the page."""
    runs, damaged = scores_data.runs_of(listing)
    problems([*listing.problems, *damaged])
    if not runs:
        empty.lacking(listing, "No scores", "eval", "--model", "tiny-reasoner")
        return
    chosen = _readable(_choose(runs))
    if not chosen:
        return
    for letter, run in chosen.items():
        st.text(f"{letter}: {run.what}")
    with st.container():
        summaries = _scores(chosen)
    with st.container():
        paired = _difference(chosen, summaries)
    with st.container():
        _many(chosen)
    with st.container():
        if paired:
            _samples(chosen)


def _choose(runs: Sequence[Run]) -> dict[str, Run]:
    """The chosen runs by letter, all on the same questions."""
    by_name = {run.name: run for run in runs}
    first, second = scores_data.defaults(runs)
    wished = st.query_params.get("right")
    columns = st.columns(2)
    name = columns[0].selectbox(
        "A, to compare with",
        list(by_name),
        index=list(by_name).index(first.name),
        key="left",
        **links.BOUND,
    )
    left = by_name[str(name)]
    held = scores_data.partners(runs, left)
    others = {run.name: run for run in held}
    chosen = [left]
    if held:
        default = list(others).index(second.name) if second and second.name in others else 0
        right = columns[1].selectbox("B", list(others), index=default, key="right", **links.BOUND)
        chosen.append(others.pop(str(right)))
    if others:
        more = st.multiselect(
            "More runs on the same questions",
            list(others),
            key="also",
            max_selections=len(LETTERS) - 2,
            **links.BOUND,
        )
        chosen += [others[name] for name in more]
    elsewhere = len(runs) - 1 - len(held)
    if wished in by_name and wished != left.name and by_name[wished] not in held:
        problem(f"{wished} answered other questions than {left.name}: they cannot be paired.")
    st.caption(
        f"Only runs on the same questions can be paired, question by question: {len(held)} beside "
        f"A; {elsewhere} answered other questions."
    )
    return dict(zip(LETTERS, chosen, strict=False))


def _readable(chosen: Mapping[str, Run]) -> dict[str, Run]:
    """Leave out what cannot be read, with its problem; letters stay."""
    kept = {}
    for letter, run in chosen.items():
        try:
            scores_data.answers(run.key)
        except BadInputError as error:
            problem(f"{letter}: {error}")
        else:
            kept[letter] = run
    return kept


def _scores(chosen: Mapping[str, Run]) -> dict[str, RunSummary]:
    st.subheader("Accuracy", anchor=False)
    summaries = {letter: scores_data.summary(run.key, letter) for letter, run in chosen.items()}
    rows = []
    for letter, run in chosen.items():
        made, held = summaries[letter], scores_data.answers(run.key)
        rows.append(
            {
                "": letter,
                "accuracy, %": 100 * made.accuracy,
                "low, %": 100 * made.ci[0],
                "high, %": 100 * made.ci[1],
                "questions": made.n,
                "answers each": made.samples,
                "tokens an answer": held.tokens,
                "cut off": held.unfinished,
                "run": run.name,
            }
        )
    numbers = ["accuracy, %", "low, %", "high, %", "tokens an answer"]
    table(rows, "runs", dict.fromkeys(numbers, _PERCENT))
    st.caption(
        "low and high: 95 % interval over questions (Wilson's where each is right or wrong, else a "
        "bootstrap). Of several answers to a question the mean counts."
    )
    groups = {letter: _groups(made) for letter, made in summaries.items()}
    if any(len(found) > 1 for found in groups.values()):
        figure(plots.scores_figure(groups), "figure-runs")
    return summaries


def _groups(made: RunSummary) -> dict[str, tuple[float, tuple[float, float], int]]:
    """All questions, then levels, then families, as `plots.scores_figure` takes them."""
    found = {"all": (made.accuracy, made.ci, made.n)}
    found |= {f"level {name}": (s.value, s.ci, s.n) for name, s in made.by_level.items()}
    return found | {name: (s.value, s.ci, s.n) for name, s in made.by_task.items()}


def _difference(chosen: Mapping[str, Run], summaries: Mapping[str, RunSummary]) -> bool:
    """The second run minus the first; returns whether their questions are the same."""
    pair = list(chosen)[:2]
    if len(pair) < 2:
        return True
    first, second = pair
    st.subheader(f"{second} minus {first}", anchor=False)
    margin = st.number_input(
        "Margin, points",
        min_value=0.1,
        max_value=50.0,
        value=MARGIN,
        step=0.5,
        key="margin",
        help="Runs that differ by less count as equally good",
        width=180,
        **links.BOUND,
    )
    share = float(margin) / 100
    try:
        with st.spinner("Comparing question by question"):
            made = scores_data.compared(
                chosen[first].key, chosen[second].key, (first, second), share
            )
    except BadInputError as error:
        problem(str(error))
        return False
    paired = made.paired
    low, high = paired.ci
    st.text(
        f"{second} minus {first}: {100 * paired.difference:+.1f} points (95 % {100 * low:+.1f} to "
        f"{100 * high:+.1f}); {paired.gained} gained, {paired.lost} lost; n = {paired.n}"
    )
    st.text("\n".join(sentences(made)))
    by_level = [(f"level {row.group}", row) for row in made.by_level]
    by_task = [(row.group, row) for row in made.by_task]
    lines = [(label, row.paired.difference, row.paired.ci) for label, row in (*by_level, *by_task)]
    made_figure = forest_figure(
        [("all", paired.difference, paired.ci), *lines],
        share,
        f"{second} minus {first}, by group",
        "95 % intervals, each by itself; diamond: 0 is outside",
    )
    figure(made_figure, "figure-difference")
    if not lines:
        st.caption("A sweep keeps neither families nor levels: only all questions can be compared.")
        return True
    st.caption(
        f"Grey: the margin. {len(by_level)} levels and {len(by_task)} families are as many tests: "
        "of true equals, one in twenty intervals misses 0. p after Holm is corrected for the rows "
        "of its kind."
    )
    with st.expander("Table of groups"):
        rows = [
            _row(label, row, first, second, summaries, "by_level", int(row.group))
            for label, row in by_level
        ] + [_row(label, row, first, second, summaries, "by_task", label) for label, row in by_task]
        formats = {key: _PERCENT for key in rows[0] if "%" in key or "points" in key}
        table(rows, "differences", formats | dict.fromkeys(("p", "p, Holm"), _P))
    return True


def _row(
    label: str,
    row: GroupRow,
    first: str,
    second: str,
    summaries: Mapping[str, RunSummary],
    field: str,
    group: str | int,
) -> dict[str, object]:
    cells: dict[str, object] = {"group": label, "n": row.paired.n}
    for letter in (first, second):
        share = getattr(summaries[letter], field).get(group)
        cells[f"{letter}, %"] = 100 * share.value if share else None
        cells[f"{letter} low, %"] = 100 * share.ci[0] if share else None
        cells[f"{letter} high, %"] = 100 * share.ci[1] if share else None
    return cells | {
        "difference, points": 100 * row.paired.difference,
        "low, points": 100 * row.paired.ci[0],
        "high, points": 100 * row.paired.ci[1],
        "p": row.paired.p_value,
        "p, Holm": row.holm_p,
        "gained": row.paired.gained,
        "lost": row.paired.lost,
    }


def _many(chosen: Mapping[str, Run]) -> None:
    if len(chosen) < 3:
        return
    first = next(iter(chosen))
    st.subheader(f"All minus {first}", anchor=False)
    share = float(st.session_state.get("margin", MARGIN)) / 100
    try:
        with st.spinner("Comparing all runs"):
            made = scores_data.ranked(
                tuple(run.key for run in chosen.values()), tuple(chosen), share
            )
    except BadInputError as error:
        problem(str(error))
        return
    lines = [(run.name, run.paired.difference, run.simultaneous_ci) for run in made.runs]
    subtitle = "95 % intervals that hold for all runs at once"
    figure(forest_figure(lines, share, f"Difference to {first}", subtitle), "figure-all")
    st.text("\n".join(sentences(made)))
    rows = [
        {
            "": run.name,
            "difference, points": 100 * run.paired.difference,
            "low, points": 100 * run.simultaneous_ci[0],
            "high, points": 100 * run.simultaneous_ci[1],
            "p": run.paired.p_value,
            "p, Holm": run.holm_p,
            "p, equally good": run.equivalence.p_equivalent,
            "gained": run.paired.gained,
            "lost": run.paired.lost,
            "n": run.paired.n,
        }
        for run in made.runs
    ]
    points = {key: "%.2f" for key in rows[0] if "points" in key}
    table(rows, "all_differences", points | dict.fromkeys(("p", "p, Holm", "p, equally good"), _P))


# The answers themselves ------------------------------------------------------------------------


def _samples(chosen: Mapping[str, Run]) -> None:
    st.subheader("Answers", anchor=False)
    letters = list(chosen)[:2]
    left, right = chosen[letters[0]], chosen[letters[1]] if len(letters) > 1 else None
    held = [scores_data.answers(chosen[letter].key) for letter in letters]
    second = held[1] if right else None
    kinds = scores_data.kinds_of(held[0], second)
    tally = {kind: int((kinds == kind).sum()) for kind in scores_data.KINDS}
    offered = [kind for kind in scores_data.KINDS if tally[kind] or kind != scores_data.PART]
    named = {kind: kind if right else kind.removeprefix("both ") for kind in offered}
    if right is None:
        offered = [kind for kind in offered if kind not in (scores_data.GAINED, scores_data.LOST)]
    st.text(", ".join(f"{tally[kind]} {named[kind]}" for kind in offered) + f"; n = {len(kinds)}")
    wanted = _wanted(offered, named, held[0], second)
    try:
        with st.spinner("Searching"):
            places = scores_data.matching(left, right, wanted)
    except BadInputError as error:
        problem(str(error))
        return
    if not places.size:
        st.text("No question fits these filters.")
        return
    if all(each.rows is None for each in held):
        _without_texts(letters, held, places.tolist(), kinds)
        return
    pages = math.ceil(places.size / PER_PAGE)
    # A filter may leave fewer pages than the one that is open.
    if int(st.session_state.get("sample_page", 1)) > pages:
        st.session_state["sample_page"] = pages
    page = int(st.pagination(pages, max_visible_pages=5, key="sample_page", **links.BOUND))
    shown = places[(page - 1) * PER_PAGE : page * PER_PAGE].tolist()
    st.text(f"{places.size} of {len(kinds)} questions; {PER_PAGE} a page")
    try:
        read = [
            _texts(chosen[letter], each, shown) for letter, each in zip(letters, held, strict=True)
        ]
    except BadInputError as error:
        problem(str(error))
        return
    for number, place in enumerate(shown):
        _question(letters, held, [texts[number] for texts in read], place)


def _wanted(
    offered: Sequence[str], named: Mapping[str, str], left: Answers, right: Answers | None
) -> Wanted:
    filtered = {**links.BOUND, "on_change": _first_page}
    kind = st.segmented_control(
        "Show", offered, format_func=lambda kind: named[kind], key="flips", **filtered
    )
    families, levels = scores_data.groups_of(left, right)
    columns = st.columns(3)
    groups, held, text = [], [], ""
    if families:
        groups = columns[0].multiselect("Family", families, key="family", **filtered)
    if levels:
        held = columns[1].multiselect("Level", levels, key="level", **filtered)
    if left.rows is not None or (right and right.rows is not None):
        typed = columns[2].text_input(
            "Text",
            key="search",
            help="In the question, the expected answer, or what a model wrote; capitals or not",
            **filtered,
        )
        text = str(typed or "").strip()
    return Wanted(kind, tuple(groups), tuple(held), text)


def _first_page() -> None:
    if st.session_state.get("sample_page", 1) != 1:
        st.session_state["sample_page"] = 1


def _without_texts(
    letters: Sequence[str], held: Sequence[Answers], places: Sequence[int], kinds: Any
) -> None:
    st.caption("These runs keep right or wrong of each question, without texts.")
    rows = [
        {
            "question": held[0].scores.questions[place].id,
            **{
                letter: float(each.scores.means[place])
                for letter, each in zip(letters, held, strict=True)
            },
            "kind": kinds[place],
        }
        for place in places
    ]
    table(rows, "questions", {})


def _texts(run: Run, held: Answers, places: Sequence[int]) -> list[list[dict[str, Any]]]:
    """The texts of each question's answers; none of a run that keeps no texts."""
    if held.rows is None:
        return [[] for _ in places]
    rows = held.rows[places]
    found = scores_data.texts(run.key, tuple(rows.ravel().tolist()))
    return [[found[int(row)] for row in of_question] for of_question in rows]


def _question(
    letters: Sequence[str],
    held: Sequence[Answers],
    texts: Sequence[Sequence[Mapping[str, Any]]],
    place: int,
) -> None:
    told = next(rows[0] for rows in texts if rows)
    known = next(each for each, rows in zip(held, texts, strict=True) if rows)
    question = known.scores.questions[place]
    with st.container(border=True):
        parts = [
            question.id,
            question.task,
            None if question.level is None else f"level {question.level}",
        ]
        st.text(" · ".join(part for part in parts if part))
        st.code(str(told["question"]), language=None, wrap_lines=True)
        st.text(f"expected: {told['gold']}")
        columns = st.columns(len(letters))
        for column, letter, each, rows in zip(columns, letters, held, texts, strict=True):
            with column:
                _answers(letter, each, rows, place)
        _to_the_lab(str(told["question"]), str(told["prompt"]))


def _to_the_lab(question: str, prompt: str) -> None:
    """Link to the same prompt there: by the question where the lab makes the prompt of it."""
    asked = {"prompt": question}
    if prompt != prompts.question_prompt(question):
        asked = {"prompt": prompt, "raw": "true"}
    if len(asked["prompt"]) <= LONGEST_LINK:
        links.to(links.LAB, "Try it in the prompt lab", icon=":material/science:", **asked)


def _answers(letter: str, held: Answers, rows: Sequence[Mapping[str, Any]], place: int) -> None:
    correct = held.scores.correct[place]
    right = int(correct.sum()) if held.rows is not None else float(correct.mean())
    if correct.size == 1 and right in (0, 1):
        said = f"{letter}: {'right' if right else 'wrong'}"
    else:
        said = f"{letter}: {right:g} of {correct.size} right"
    colour, icon = (
        ("green", ":material/check:") if correct.all()
        else ("orange", ":material/close:") if not correct.any()
        else ("gray", ":material/contrast:")
    )  # fmt: skip
    st.badge(said, icon=icon, color=colour)
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
    """One answer: what was understood of it, the thought, and the rest; all of it as text."""
    answer = row["answer"]
    read = "no answer could be read" if answer is None else f"answer: {answer}"
    st.text(f"{read}{'' if row['finished'] else '; cut off'}")
    thought, rest = scores_data.thought_and_answer(str(row["prompt"]), str(row["generation"]))
    for name, text in (("thought", thought), ("after the thought", rest)):
        if text is None:
            continue
        st.caption(name)
        st.code(text.strip("\n ") or "(empty)", language=None, wrap_lines=True)
