from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.bundled_models.questions import draw_unique
from resa_lens.errors import BadInputError
from resa_lens.evals import tasks
from resa_lens.evals.tasks import EvalItem, TaskSpec, load_questions, load_tasks, parse_tasks

ROWS = [
    {"question": f"{i}+1?", "steps": "", "answer": str(i + 1), "family": "sum", "level": i % 3 + 1}
    for i in range(30)
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_bundled_name_is_resolved_by_split(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    drawn = [q.to_dict() for q in draw_unique(0, "test", {1: 7})]
    jsonl(tmp_path / "tiny" / "test.jsonl", drawn)
    monkeypatch.setattr(tasks, "data_path", lambda relative: tmp_path / relative)
    items = load_questions("tiny")
    assert [(i.question, i.answer, i.family, i.level) for i in items] == [
        (d["question"], d["answer"], d["family"], d["level"]) for d in drawn
    ]
    assert [i.id for i in items] == [f"test-{n}" for n in range(7)]


def test_formats_agree(tmp_path):
    rows = [
        {"id": "a", "question": "1+1?", "answer": "2"},
        {"id": "b", "question": "x, y", "answer": "007"},
    ]
    jsonl(tmp_path / "q.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    (tmp_path / "q.csv").write_text('id,question,answer\na,1+1?,2\nb,"x, y",007\n')
    expected = [EvalItem("a", "1+1?", "2"), EvalItem("b", "x, y", "007")]
    for name in ("q.jsonl", "q.parquet", "q.csv"):
        assert load_questions(tmp_path / name) == expected


def test_csv_level_and_numeric_answers(tmp_path):
    (tmp_path / "q.csv").write_text("question,answer,family,level\na,1.0,f,2\nb,3,,\n")
    assert load_questions(str(tmp_path / "q.csv")) == [
        EvalItem("q-0", "a", "1.0", "f", 2),
        EvalItem("q-1", "b", "3", None, None),
    ]
    assert (
        load_questions(jsonl(tmp_path / "n.jsonl", [{"question": "q", "answer": 5}]))[0].answer
        == "5"
    )


def test_limit_and_levels(tmp_path):
    path = jsonl(tmp_path / "q.jsonl", ROWS)
    ten, again = load_questions(path, limit=10), load_questions(path, limit=10)
    assert ten == again
    assert len({i.id for i in ten}) == 10
    assert ten != load_questions(path)[:10]
    assert load_questions(path, limit=20)[:10] == ten
    assert load_questions(path, limit=10, seed=1) != ten
    assert len(load_questions(path, limit=99)) == 30
    assert {i.level for i in load_questions(path, levels=(1, 3))} == {1, 3}
    # The id names the row, whatever is chosen.
    assert all(int(i.id.split("-")[1]) + 1 == int(i.answer) for i in ten)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.csv", "question,answer\n", "is empty"),
        ("a.jsonl", '{"question": "q", "result": "1"}\n', "no column 'answer'.*question, result"),
        ("a.csv", "task,answer\nq,1\n", "no column 'question'.*task, answer"),
        (
            "a.jsonl",
            '{"question": "q", "solution": "\\\\boxed{}"}\n',
            r"row 1 \(line 1\), column solution: the result is empty",
        ),
        (
            "a.jsonl",
            '{"question": "q", "answer": "1"}\n{"answer": "2"}\n',
            r"row 2 \(line 2\), column question: empty",
        ),
        ("a.jsonl", '{"question": "q", "answer": ""}\n', "row 1 .*column answer: empty"),
        ("a.jsonl", '{"question": "q", "answer": null}\n', "row 1 .*column answer: empty"),
        ("a.csv", "question,answer\nq,1\nr,\n", r"row 2 \(line 3\), column answer: empty"),
        ("a.jsonl", '{"question": "q", "answer": "1"}\n{"quest', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", r"row 1 \(line 1\) is not a JSON object"),
        ("a.csv", "id,question,answer\nx,q,1\nx,r,2\n", "id 'x' stands twice"),
        ("a.txt", "q", "no known format"),
        ("a.parquet", "PAR1 is not enough", "not readable as .parquet"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(BadInputError, match=message) as error:
        load_questions(path)
    assert len(str(error.value).splitlines()) <= 3


def test_bad_arguments(tmp_path):
    path = jsonl(tmp_path / "q.jsonl", ROWS)
    with pytest.raises(BadInputError, match=r"no-such-set is no file.*'tiny', aime24"):
        load_questions("no-such-set")
    with pytest.raises(BadInputError, match="split is 'dev'"):
        load_questions("tiny", split="dev")
    with pytest.raises(BadInputError, match=r"level 4; the questions have levels \[1, 2, 3\]"):
        load_questions(path, levels=(4,))
    with pytest.raises(BadInputError, match="limit is 0"):
        load_questions(path, limit=0)
    binary = tmp_path / "b.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInputError, match="not readable as"):
        load_questions(binary)


def test_columns_of_other_names(tmp_path):
    rows = [{"problem": "1+1?", "solution": "One and one: $\\boxed{2}$.", "level": "Level 3"}]
    (item,) = load_questions(jsonl(tmp_path / "m.jsonl", rows))
    assert (item.question, item.answer, item.level) == ("1+1?", "2", 3)
    rows = [{"q": "1+1?", "answer": "no", "gold": "so 1+1=2\n#### 2"}]
    path = jsonl(tmp_path / "g.jsonl", rows)
    (item,) = load_questions(path, question_column="q", answer_column="gold")
    assert (item.question, item.answer) == ("1+1?", "2")
    with pytest.raises(BadInputError, match=r"no column 'x'.*q, answer, gold"):
        load_questions(path, question_column="x")


def test_task_lists():
    assert parse_tasks("tiny:families=chain_sum+count:levels=1+4, amc23,math500=a/b.jsonl") == [
        TaskSpec("tiny", None, ("chain_sum", "count"), (1, 4)),
        TaskSpec("amc23"),
        TaskSpec("math500", "a/b.jsonl"),
    ]
    assert parse_tasks("x/my.set.csv")[0].label == "my.set"
    for text, message in (
        ("tiny,tiny:levels=1", "'tiny' stands twice"),
        ("tiny,,amc23", "has no name"),
        ("tiny:levels=one", "'one' of task 'tiny' are no numbers"),
    ):
        with pytest.raises(BadInputError, match=message):
            parse_tasks(text)


def test_several_tasks(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", ROWS)
    b = jsonl(tmp_path / "b.jsonl", ROWS[:3])
    items = load_tasks(f"{a},{b},tiny:families=count", limit=4)
    assert [item.task for item in items] == ["a"] * 4 + ["b"] * 3 + ["tiny"] * 4
    assert {item.family for item in items[-4:]} == {"count"}
    # One id names one question, whatever is asked beside it.
    assert {i.id for i in items[4:7]} == {i.id for i in load_questions(b)}
    assert {i.level for i in load_tasks("tiny")} == {1, 2, 3}
    assert {i.level for i in load_tasks("tiny:levels=4")} == {4}
    with pytest.raises(BadInputError, match=r"family 'sums'; use chain_sum, count"):
        load_tasks("tiny:families=sums")
    (tmp_path / "c").mkdir()
    other = jsonl(tmp_path / "c" / "x.jsonl", [{"id": "a-0", "question": "q", "answer": "1"}])
    with pytest.raises(BadInputError, match="'a-0' stands in the tasks a and x"):
        load_tasks(f"{a},{other}")
