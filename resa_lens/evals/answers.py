"""The stored answers of a run: right and wrong by column, and the texts of chosen rows alone.

So a run of 100,000 answers opens as one of a hundred.  Nothing here loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resa_lens.errors import BadInputError
from resa_lens.evals.compare import Question, RunScores
from resa_lens.texts import prompts

GAINED, LOST, RIGHT, WRONG, PART = "gained", "lost", "both right", "both wrong", "both in part"
KINDS = (GAINED, LOST, RIGHT, WRONG, PART)
"""Questions by what the second run made of them; the last only where runs have several answers."""
TEXTS = ("question", "gold", "prompt", "generation", "answer", "correct", "tokens", "finished")
SEARCHED = ("question", "gold", "generation", "answer")
_BATCH = 4096

Booleans = NDArray[np.bool_]
Places = NDArray[np.int64]


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


@dataclass(frozen=True)
class Filter:
    """Which questions are shown."""

    kind: str | None = None
    """One of `KINDS`; None for all."""
    groups: tuple[str, ...] = ()
    """Families or tasks; none for all."""
    levels: tuple[int, ...] = ()
    text: str = ""
    """That the question, its answer or what a model wrote contains, in either case."""


def read_answers(file: Path, column: str | None = None) -> Answers:
    """Read right and wrong of a run.

    Args:
        file: of an evaluation's answers, or of a sweep's.
        column: of a sweep's file; None for an evaluation.

    Raises:
        BadInputError: damaged, of another version, or not the same number of answers everywhere.
    """
    try:
        return _samples(file) if column is None else _column(file, column)
    except BadInputError:
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise _damaged(f"column {column} of {file}" if column else file) from error


def _damaged(file: Path | str) -> BadInputError:
    return BadInputError(
        f"{file} is damaged or of another version; score again, for example with: resa-lens demo"
    )


def _column(file: Path, column: str) -> Answers:
    table = pq.read_table(file, columns=["id", column]).to_pandas().sort_values("id")
    questions = tuple(Question(str(i), "", "") for i in table["id"])
    return Answers(_scores(questions, table[column], 1, file), None, None, None)


def _samples(file: Path) -> Answers:
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
        _scores(questions, table["correct"], most, file),
        table.index.to_numpy(dtype=np.int64).reshape(-1, most),
        float(table["tokens"].mean()) if table["tokens"].notna().any() else None,
        int((~table["finished"].fillna(True).astype(bool)).sum()),
    )


def _scores(
    questions: tuple[Question, ...], column: pd.Series, samples: int, file: Path
) -> RunScores:
    values = column.to_numpy(dtype=np.float64)
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise BadInputError(f"{file} holds a score outside 0 to 1; score again")
    correct = values.reshape(-1, samples)
    correct.setflags(write=False)
    # The texts of the answers are read where they are shown.
    return RunScores("", questions, correct, ((),) * len(questions))


def kinds_of(left: Answers, right: Answers | None) -> NDArray[np.object_]:
    """Return the kind of each question, one of `KINDS`; of one run alone, compared with itself."""
    before = left.scores.means
    after = before if right is None else right.scores.means
    whole = (before == after) & ((before == 0) | (before == 1))
    kinds = np.full(before.shape, PART, dtype=object)
    kinds[after > before], kinds[after < before] = GAINED, LOST
    kinds[whole & (before == 1)], kinds[whole & (before == 0)] = RIGHT, WRONG
    return kinds


def matching(
    pair: Sequence[Answers], query: Filter, search: Callable[[int, str], Booleans]
) -> Places:
    """Return the places of the questions that pass a filter, in the order of their ids.

    Args:
        pair: of one run or two.
        query: the filter.
        search: `holding` of the file of the run with this number.
    """
    kept = np.ones(len(pair[0].scores.questions), dtype=bool)
    if query.kind:
        kept &= kinds_of(pair[0], pair[1] if len(pair) > 1 else None) == query.kind
    questions = known(*pair).scores.questions
    if query.groups:
        kept &= np.array([question.task in query.groups for question in questions])
    if query.levels:
        kept &= np.array([question.level in query.levels for question in questions])
    if query.text:
        hit = np.zeros_like(kept)
        for number, one in enumerate(pair):
            if one.rows is not None:
                hit |= search(number, query.text)[one.rows].any(axis=1)
        kept &= hit
    return np.flatnonzero(kept)


def known(*pair: Answers) -> Answers:
    """Return the run that knows the families and levels: a sweep's does not."""
    return next((one for one in pair if one.rows is not None), pair[0])


def groups_of(pair: Sequence[Answers]) -> tuple[list[str], list[int]]:
    """Return families or tasks, and levels, of the questions."""
    questions = known(*pair).scores.questions
    return (
        sorted({question.task for question in questions if question.task is not None}),
        sorted({question.level for question in questions if question.level is not None}),
    )


def holding(file: Path, text: str) -> Booleans:
    """Return for each row of a file of answers whether one of its texts contains the text.

    Raises:
        BadInputError: damaged.
    """
    options, parts = pc.MatchSubstringOptions(text, ignore_case=True), []
    for _, table in _batches(file, SEARCHED):
        hit = np.zeros(table.num_rows, dtype=bool)
        for name in SEARCHED:
            mask: Any = pc.call_function("match_substring", [table[name]], options)
            hit |= mask.fill_null(False).to_numpy(zero_copy_only=False)
        parts.append(hit)
    return np.concatenate(parts)


def read_texts(file: Path, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Return the texts of some rows of a file of answers.

    Raises:
        BadInputError: damaged.
    """
    places, by_row = np.array(sorted(rows), dtype=np.int64), {}
    for start, table in _batches(file, TEXTS, places):
        here = places[(places >= start) & (places < start + table.num_rows)]
        by_row |= dict(zip(here.tolist(), table.take(here - start).to_pylist(), strict=True))
    return by_row


def _batches(
    file: Path, columns: Sequence[str], places: Places | None = None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield an evaluation's rows part by part, each with the place of its first row.

    A run's texts may be larger than the memory.  Of row groups without one of the places nothing
    is read.
    """
    start = 0
    try:
        with pq.ParquetFile(file) as stream:
            if lacking := sorted(set(columns) - set(stream.schema_arrow.names)):
                raise BadInputError(
                    f"{file} has no column {lacking[0]}; it is of another version or program: "
                    "score again"
                )
            for group in range(stream.num_row_groups):
                end = start + stream.metadata.row_group(group).num_rows
                if places is None or ((places >= start) & (places < end)).any():
                    for batch in stream.iter_batches(_BATCH, [group], list(columns)):
                        yield start, batch
                        start += batch.num_rows
                start = end
    except (OSError, pa.ArrowException, KeyError) as error:
        raise _damaged(file) from error


def thought_and_answer(prompt: str, generation: str) -> tuple[str | None, str | None]:
    """Split what a model wrote by its think tags; None for a part that it did not come to.

    The thought begins where the prompt leaves off with its tag, or after the tag that the model
    wrote itself; without any tag all is answer.
    """
    rest = generation
    if not prompt.rstrip().endswith(prompts.THINK_OPEN):
        before, opened, rest = generation.partition(prompts.THINK_OPEN)
        if not opened:
            return None, generation
        if before.strip():
            rest = before + rest
    thought, closed, answer = rest.partition(prompts.THINK_CLOSE)
    return thought, answer if closed else None
