"""Answers of runs and what is computed of them, once for each state of their files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import streamlit as st

from resa_lens.app.data import HASHES, version
from resa_lens.artifacts.kinds.eval import SAMPLES
from resa_lens.artifacts.kinds.sweep import ANSWERS
from resa_lens.artifacts.listing import Tuning
from resa_lens.evals import answers as stored
from resa_lens.evals.answers import Answers, Booleans, Filter, Places
from resa_lens.evals.compare import (
    Comparison,
    Comparisons,
    RunScores,
    RunSummary,
    check_paired,
    compare_many,
    compare_runs,
    summarise,
)
from resa_lens.stages.scored_runs import Key, Run
from resa_lens.stats import DRAWS, PairedComparison, compare_paired

BUDGET, LEAST = 25_000_000, 1000
"""Answers that are drawn in all for one interval, and the fewest draws."""


@st.cache_resource(show_spinner=False, max_entries=30, hash_funcs=HASHES)
def answers(key: Key) -> Answers:
    """Read right and wrong of a run.

    Raises:
        BadInputError: as of `evals.answers.read_answers`.
    """
    run, column = key
    return stored.read_answers(run.file(SAMPLES if column is None else ANSWERS), column)


@st.cache_data(
    show_spinner=False,
    max_entries=100,
    hash_funcs={Tuning: lambda tuning: (version(tuning.base), version(tuning.tuned))},
)
def comparison(tuning: Tuning) -> PairedComparison:
    """Compare the answers after tuning with those before, question by question.

    Raises:
        BadInputError: they cannot be read or paired.
    """
    base, other = (answers((run, None)).scores for run in (tuning.base, tuning.tuned))
    check_paired([base, other])
    return compare_paired(base.means, other.means)


def _named(key: Key, name: str) -> RunScores:
    return replace(answers(key).scores, name=name)


def draws_for(n: int) -> int:
    """Draws of a bootstrap over so many questions: fewer where each costs more and says more."""
    return min(DRAWS, max(LEAST, BUDGET // max(1, n)))


@st.cache_resource(show_spinner=False, max_entries=60, hash_funcs=HASHES)
def summary(key: Key, name: str) -> RunSummary:
    """One run by itself; see `answers`."""
    scores = _named(key, name)
    return summarise(scores, draws=draws_for(len(scores.questions)))


@st.cache_resource(show_spinner=False, max_entries=60, hash_funcs=HASHES)
def compared(left: Key, right: Key, names: tuple[str, str], margin: float) -> Comparison:
    """Compare two runs.

    Args:
        left: the run to compare with.
        right: the other one.
        names: what they are called.
        margin: of the equivalence test, a share.

    Raises:
        BadInputError: they cannot be read or paired.
    """
    base, other = (_named(key, name) for key, name in zip((left, right), names, strict=True))
    return compare_runs(base, other, margin=margin, draws=draws_for(len(base.questions)))


@st.cache_resource(show_spinner=False, max_entries=20, hash_funcs=HASHES)
def ranked(keys: tuple[Key, ...], names: tuple[str, ...], margin: float) -> Comparisons:
    """Compare several runs with the first; see `compared`."""
    base, *others = (_named(key, name) for key, name in zip(keys, names, strict=True))
    return compare_many(base, others, margin=margin, draws=draws_for(len(base.questions)))


def matching(left: Run, right: Run | None, query: Filter) -> Places:
    """Return the places of the questions that pass a filter, in the order of their ids.

    Raises:
        BadInputError: a run cannot be read.
    """
    keys = [run.key for run in (left, right) if run is not None]
    return stored.matching(
        [answers(key) for key in keys], query, lambda number, text: holding(keys[number], text)
    )


@st.cache_resource(show_spinner=False, max_entries=20, hash_funcs=HASHES)
def holding(key: Key, text: str) -> Booleans:
    """Return for each row of an evaluation whether one of its texts contains the text."""
    return stored.holding(key[0].file(SAMPLES), text)


@st.cache_data(show_spinner=False, max_entries=200, hash_funcs=HASHES)
def texts(key: Key, rows: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    """Return the texts of some rows of an evaluation; see `evals.answers.read_texts`."""
    return stored.read_texts(key[0].file(SAMPLES), rows)
