from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resa_lens.errors import BadInputError
from resa_lens.evals import tasks
from resa_lens.evals.tasks import EvalItem, load_questions
from resa_lens.tiny.questions import draw_unique

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
        ("a.jsonl", "", "holds no rows"),
        ("a.csv", "question,answer\n", "holds no rows"),
        ("a.jsonl", '{"question": "q", "solution": "1"}\n', "no column answer.*question, solution"),
        ("a.csv", "problem,answer\nq,1\n", "no column question.*problem, answer"),
        ("a.jsonl", '{"question": "q", "answer": ""}\n', "empty answer in row 0"),
        ("a.jsonl", '{"question": "q", "answer": null}\n', "empty answer in row 0"),
        ("a.csv", "question,answer\nq,1\nr,\n", "empty answer in row 1"),
        ("a.jsonl", '{"question": "q", "answer": "1"}\n{"quest', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("a.csv", "question,answer,level\nq,1,hard\n", "level 'hard' in row 0"),
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
    with pytest.raises(BadInputError, match=r"no-such-set is no file.*'tiny'"):
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
