"""Right and wrong of runs, question by question, read by column: the texts stay in the file.

So a run of 100,000 answers opens as one of a hundred.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import streamlit as st
from numpy.typing import NDArray

from resa_lens.app.data import HASHES, Tuning, version
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.eval import SAMPLES
from resa_lens.artifacts.kinds.sweep import ANSWERS
from resa_lens.errors import BadInputError
from resa_lens.evals.compare import Question, RunScores, check_paired
from resa_lens.stats import PairedComparison, compare_paired

Key = tuple[Artifact, str | None]
"""An evaluation, or a sweep and the column of its table of answers."""


@dataclass(frozen=True)
class Answers:
    """Right and wrong of one run, without texts."""

    scores: RunScores
    rows: NDArray[np.int64] | None
    """[questions, samples]: each answer's row in the file; None where no text is kept."""
    tokens: float | None
    """Mean length of an answer."""
    unfinished: int | None
    """Answers that the longest length or the time-out ended."""


@st.cache_resource(show_spinner=False, max_entries=30, hash_funcs=HASHES)
def answers(key: Key) -> Answers:
    """Read right and wrong of a run, once for each state of its file.

    Raises:
        BadInputError: damaged, of another version, or not the same number of answers everywhere.
    """
    run, column = key
    file = run.file(SAMPLES if column is None else ANSWERS)
    try:
        return _samples(file) if column is None else _column(file, column)
    except BadInputError:
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise damaged(f"column {column} of {file}" if column else file) from error


def damaged(file: Path | str) -> BadInputError:
    """Say that a file of answers cannot be read, and what makes another one."""
    return BadInputError(
        f"{file} is damaged or of another version; score again, for example with: resa-lens demo"
    )


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


def _column(file: Path, column: str) -> Answers:
    """Read one run of a sweep."""
    table = pq.read_table(file, columns=["id", column]).to_pandas().sort_values("id")
    questions = tuple(Question(str(i), "", "") for i in table["id"])
    return Answers(_scores(questions, _shares(table[column], file)[:, None]), None, None, None)


def _samples(file: Path) -> Answers:
    """Read an evaluation."""
    names = ["id", "sample", "correct", "family", "level", "tokens", "finished"]
    later = [name for name in ("task",) if name in pq.read_schema(file).names]
    table = pq.read_table(file, columns=[*names, *later]).to_pandas()
    if table.empty:
        raise BadInputError(f"{file} holds no answers; score again")
    group = "task" if "task" in table and table["task"].nunique() > 1 else "family"
    # The id alone may be a task's name and a row number.
    by = ["id", *later, "sample"]
    table = table.sort_values(by, kind="stable")
    counts = table.groupby(by[:-1], sort=False, dropna=False)["sample"].size().to_numpy()
    most = int(counts.max())
    if short := int((counts < most).sum()):
        raise BadInputError(
            f"{file}: {short} of {len(counts)} questions have fewer than {most} answers; run its "
            "eval again, it goes on where it stopped"
        )
    first = table.iloc[::most]
    questions = tuple(
        Question(
            str(row_id), "", "",
            None if pd.isna(task) else str(task), None if pd.isna(level) else int(level),
        )
        for row_id, task, level in zip(first["id"], first[group], first["level"], strict=True)
    )  # fmt: skip
    return Answers(
        _scores(questions, _shares(table["correct"], file).reshape(-1, most)),
        table.index.to_numpy(dtype=np.int64).reshape(-1, most),
        float(table["tokens"].mean()) if table["tokens"].notna().any() else None,
        int((~table["finished"].fillna(True).astype(bool)).sum()),
    )


def _shares(column: pd.Series, file: Path) -> NDArray[np.float64]:
    values = column.to_numpy(dtype=np.float64)
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise BadInputError(f"{file} holds a score outside 0 to 1; score again")
    return values


def _scores(questions: tuple[Question, ...], correct: NDArray[np.float64]) -> RunScores:
    correct.setflags(write=False)
    # The texts of the answers are read where they are shown.
    return RunScores("", questions, correct, ((),) * len(questions))
