"""Stored answers read by column; how the page of scores reads them stands in its own tests."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resa_lens.errors import BadInputError
from resa_lens.evals.answers import groups_of, kinds_of, read_answers, thought_and_answer


@pytest.mark.parametrize(
    ("prompt", "generation", "expected"),
    [
        ("Q <think>", " a </think> <answer> b </answer>", (" a ", " <answer> b </answer>")),
        ("Q <think>", " it never ends", (" it never ends", None)),
        ("Q", "<think> a </think> b", (" a ", " b")),
        ("Q", "just b", (None, "just b")),
        ("Q", "Well, <think> a </think> b", ("Well,  a ", " b")),
        ("tags <think> </think> are named; Q <think>\n", "a</think>b", ("a", "b")),
        ("Q <think>", "", ("", None)),
        ("Q <think>", "a </think> b </think> c", ("a ", " b </think> c")),
    ],
)
def test_thoughts_end_at_their_tag(prompt, generation, expected):
    assert thought_and_answer(prompt, generation) == expected


def test_a_column_of_a_sweep_is_a_run_without_texts(tmp_path):
    file = tmp_path / "answers.parquet"
    pq.write_table(pa.table({"id": ["b", "a"], "base": [1.0, 0.0], "odd": [0.5, 7.0]}), file)
    run = read_answers(file, "base")
    assert [question.id for question in run.scores.questions] == ["a", "b"]
    assert run.scores.correct.tolist() == [[0.0], [1.0]]
    assert (run.rows, run.tokens, run.unfinished) == (None, None, None)
    assert kinds_of(run, None).tolist() == ["both wrong", "both right"]
    assert groups_of([run, run]) == ([], [])
    for column, said in (("odd", "holds a score outside 0 to 1"), ("none", "column none of")):
        with pytest.raises(BadInputError, match=said):
            read_answers(file, column)
