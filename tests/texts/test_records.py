"""The forms that data sets have, and what is refused with its row, line and column."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resa_lens.errors import BadInputError
from resa_lens.evals.tasks import load_questions
from resa_lens.texts.corpora import CorpusConfig, Record, documents, hash_records, load_records
from resa_lens.texts.phases import phased_texts
from resa_lens.texts.records import doubts, split_worked, unmatchable

PLAIN = CorpusConfig(system_share=0.0)


def write(path: Path, content: Any, encoding: str = "utf-8") -> str:
    """Write text as it is, a list as a line of JSON a row."""
    if not isinstance(content, str):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_bytes(content.encode(encoding))
    return str(path)


def one(path: str) -> Record:
    """Return the only record, which scoring must read alike."""
    (record,) = load_records(path)
    (item,) = load_questions(path)
    assert (item.question, item.answer) == (record.question, record.answer)
    return record


def refusal(path: str) -> str:
    """Return why training refuses a file, which scoring must do in the same words."""
    said = []
    for read in (load_records, load_questions):
        with pytest.raises(BadInputError) as caught:
            read(path)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert said[0].count("\n") < 3
    assert path in said[0]
    return said[0]


# Worked solutions


@pytest.mark.parametrize(
    ("worked", "result", "steps"),
    [
        ("She sold 24.\n48+24=72.\n#### 72", "72", "She sold 24.\n48+24=72."),
        ("a\n####72", "72", "a"),
        ("a\r\n#### 1,200\r\n", "1,200", "a"),
        ("a #### -3/4", "-3/4", "a"),
        ("a\n#### 5\nThe answer is: 5", "5", "a"),
        ("a\n#### Answer: 5", "5", "a"),
        ("So $x=\\boxed{5}$.", "5", "So $x=\\boxed{5}$."),
        ("\\boxed{1}, no: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", None),
        ("so $\\boxed {x^{2}}$", "x^{2}", None),
        ("so \\fbox{7}", "7", None),
        ("so $\\boxed 5$", "5", None),
        ("set \\boxed{\\{1, 2\\}}", "\\{1, 2\\}", None),
        ("#### Step 1\nwe add\n#### Step 2\nso \\boxed{9}", "9", None),
        ("$\\boxed{5}$", "5", ""),
        ("\\[\\boxed{5}\\]", "5", ""),
        ("It is 3 and 4.\nThe answer is: 7", "7", None),
        ("We add. So the final answer is 7.", "7", None),
        ("We add.\nAnswer: 7", "7", None),
        ("We add.\n\n**Final Answer:** $7$.", "$7$", None),
        ("<think>I add.</think> It is \\boxed{7}.", "7", "I add."),
        ("I add.</think>\n7", "7", "I add."),
        ("<think> I add. </think> <answer> Answer: 7 </answer>", "7", "I add."),
        ("<|begin_of_thought|>add<|end_of_thought|> \\boxed{7}", "7", "add"),
        ("We add. <answer>7</answer>", "7", "We add."),
        ("72", "72", ""),
        ("Final answer: 72", "72", ""),
        ("The answer is 72.", "72", ""),
        ("1 #2", "1 #2", ""),
        ("x = 3", "x = 3", ""),
    ],
)
def test_the_result_of_a_worked_solution(tmp_path, worked, result, steps):
    whole = worked.strip() if steps is None else steps
    assert split_worked(worked) == (result, whole)
    record = one(write(tmp_path / "w.jsonl", [{"problem": "q", "solution": worked}]))
    assert (record.answer, record.steps) == (result, whole)
    cot_free = next(documents([record], PLAIN))
    assert cot_free == f"Problem: q <think> {result} </think> <answer> Answer: {result} </answer>"
    (full,) = phased_texts([record], PLAIN)
    assert full == cot_free.replace(f"<think> {result}", f"<think> {whole or result}", 1)


@pytest.mark.parametrize(
    ("row", "steps"),
    [
        ({"answer": "7", "solution": "3+4 is \\boxed{7}"}, "3+4 is \\boxed{7}"),
        ({"answer": "7", "solution": "3+4\n#### 7"}, "3+4"),
        ({"answer": "7", "steps": ["3+4", " is 7 "]}, "3+4\nis 7"),
        ({"answer": "3+4\n#### 7", "steps": "own"}, "own"),
        ({"answer": "7", "solution": "7"}, ""),
        ({"answer": "7", "solution": None}, ""),
        ({"answer": "7", "solution": {"a": 1}}, ""),
        ({"answer": "7", "rationale": "sum"}, "sum"),
    ],
)
def test_the_steps_beside_an_answer(tmp_path, row, steps):
    record = one(write(tmp_path / "s.jsonl", [{"question": "q", **row}]))
    assert (record.answer, record.steps) == ("7", steps)


# Structures


USER = {"role": "user", "content": "3+4?"}
STRUCTURES: dict[str, tuple[dict[str, Any], str]] = {
    "verl": (
        {"data_source": "x", "prompt": [USER], "ability": "math",
         "reward_model": {"style": "rule", "ground_truth": "7"},
         "extra_info": {"index": 0, "answer": "3+4=7\n#### 7"}},
        "3+4=7",
    ),
    "dapo": (
        {"prompt": [{"role": "system", "content": "Think."}, USER],
         "reward_model": {"ground_truth": ["7"]}, "extra_info": {"index": "a-1"}},
        "",
    ),
    "json in a text": ({"prompt": [USER], "reward_model": {"ground_truth": '["7"]'}}, ""),
    "ground_truth": ({"prompt": "3+4?", "ground_truth": 7}, ""),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "3+4?"},
                           {"from": "gpt", "value": "<think>add</think>\\boxed{7}"}]},
        "add",
    ),
    "messages": (
        {"messages": [{"role": "System", "content": "s"}, {"role": "USER", "content": "3+4?"},
                      {"role": "assistant", "content": "add\n#### 7"}]},
        "add",
    ),
    "thoughts apart": (
        {"messages": [USER, {"role": "assistant", "content": "7", "reasoning_content": "add"}]},
        "add",
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "3+4?"}]},
                      {"role": "model", "content": "7"}]},
        "",
    ),
    "completion": (
        {"prompt": [USER], "completion": [{"role": "assistant", "content": "\\boxed{7}"}]}, ""
    ),
    "messages and answer": ({"messages": [USER], "answer": "7"}, ""),
    "list of one": ({"question": ["3+4?"], "answer": [["7"]]}, ""),
    "dict": ({"question": "3+4?", "answer": {"ground_truth": "7", "style": "rule"}}, ""),
    "capitals": ({"Question": "3+4?", "Answer": "7"}, ""),
    "expected": ({"problem": "3+4?", "expected_answer": "7", "response": "so 8"}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_structures_of_other_libraries(tmp_path, name, suffix):
    row, steps = STRUCTURES[name]
    if (name, suffix) == ("parts", "parquet"):
        pytest.skip("a column of parquet has values of one type")
    path = tmp_path / f"s.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        write(path, json.dumps([row]) if suffix == "json" else [row])
    record = one(str(path))
    assert (record.question, record.answer, record.steps) == ("3+4?", "7", steps)


def test_columns_inside_an_object_can_be_named(tmp_path):
    row = {"prompt": "ask", "extra_info": {"question": "bare", "gold": {"value": 3}}, "answer": "2"}
    path = write(tmp_path / "d.jsonl", [row])
    columns: dict[str, Any] = {
        "question_column": "extra_info.question",
        "answer_column": "extra_info.gold.value",
    }
    assert load_records(path, **columns) == [Record("bare", "3")]
    (item,) = load_questions(path, **columns)
    assert (item.question, item.answer) == ("bare", "3")
    with pytest.raises(BadInputError, match=r"no column 'other\.gold'"):
        load_records(path, answer_column="other.gold")
    # Beside a data file whose columns are named, a file of questions may have the known ones.
    other = write(tmp_path / "o.jsonl", [{"question": "q", "answer": "1"}])
    assert load_questions(other, question_column="extra_info.question", required=False)
    with pytest.raises(BadInputError, match="no column"):
        load_questions(other, question_column="extra_info.question")


@pytest.mark.parametrize(
    ("row", "column", "said"),
    [
        ({"question": "q", "answer": ["3", "5"]}, "answer", "list of 2 items"),
        ({"question": "q", "answer": []}, "answer", "empty"),
        ({"question": "q", "answer": {"a": "7"}}, "answer", "an object with a"),
        ({"question": "q", "answer": float("nan")}, "answer", "empty"),
        ({"question": "q", "answer": float("inf")}, "answer", "type float"),
        ({"question": "q", "answer": None}, "answer", "empty"),
        ({"question": "q", "answer": "\ud800"}, "answer", "surrogate"),
        ({"question": {"a": 1}, "answer": "7"}, "question", "type dict"),
        ({"question": 5, "answer": "7"}, "question", "type int"),
        ({"question": True, "answer": "7"}, "question", "type bool"),
        ({"question": ["a", "b"], "answer": "7"}, "question", "list of 2 items"),
        ({"prompt": [USER, USER], "answer": "7"}, "prompt", "2 messages of the user"),
        ({"prompt": [{"role": "tool", "content": "x"}], "answer": "7"}, "prompt", "'tool'"),
        ({"messages": [USER]}, "messages", "0 messages of the assistant"),
        ({"conversations": [{"from": "human", "value": 3}]}, "conversations", "type int"),
        ({"prompt": "q", "reward_model": {"style": "rule"}}, "reward_model", "an object with"),
    ],
)
def test_a_cell_of_a_wrong_kind_is_refused_with_its_place(tmp_path, row, column, said):
    good = {"question": "1+1?", "prompt": "1+1?", "answer": "2", "reward_model": None}
    first = {name: good[name] for name in row if name in good}
    if column in ("messages", "conversations"):
        first = {column: [USER, {"role": "assistant", "content": "7"}]}
    if column == "reward_model":
        first = {"prompt": "1+1?", "reward_model": {"ground_truth": "2"}}
    text = json.dumps(first) + "\n\n" + json.dumps(row) + "\n"
    message = refusal(write(tmp_path / "bad.jsonl", text))
    assert f"row 2 (line 3), column {column}: " in message
    assert said in message


@pytest.mark.parametrize(
    "values",
    [pa.array([b"2", b"2"]), pa.array([datetime.date(2020, 1, 2)] * 2),
     pa.array([[1.0, 2.0]] * 2), pa.array([float("nan"), 1.0])],
)  # fmt: skip
def test_parquet_cells_that_are_no_text_are_refused(tmp_path, values):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"question": ["a", "b"], "answer": values}), path)
    assert "row 1, column answer: " in refusal(str(path))


def test_numbers_are_answers_as_they_stand(tmp_path):
    table = pa.table({"question": ["a"] * 4, "answer": pa.array([1, 20, 3, 4], pa.int64())})
    pq.write_table(table, tmp_path / "n.parquet")
    assert [r.answer for r in load_records(str(tmp_path / "n.parquet"))] == ["1", "20", "3", "4"]
    path = write(tmp_path / "n.json", '[{"question": "a", "answer": 1.50}]')
    assert load_records(path)[0].answer == "1.5"


# Files


ROWS = [{"question": "x=½?", "answer": "007"}, {"question": 'a, "b"\u2028c', "answer": "1.0"}]
RECORDS = [Record("x=½?", "007"), Record('a, "b"\u2028c', "1.0")]
CSV = 'question{0}answer\nx=½?{0}007\n"a, ""b""\u2028c"{0}1.0\n'


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_encodings_that_say_their_name(tmp_path, kind, encoding):
    content = {
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS),
        "json": json.dumps(ROWS, ensure_ascii=False, indent=1),
        "csv": CSV.format(","),
        "tsv": CSV.format("\t"),
    }[kind]
    if encoding in ("utf-16-le", "utf-16-be"):
        content = "\ufeff" + content
    path = write(tmp_path / f"e.{kind}", content, encoding)
    assert load_records(path) == RECORDS
    assert [(i.question, i.answer) for i in load_questions(path)] == [
        (r.question, r.answer) for r in RECORDS
    ]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_cells_divided_by_what_the_header_shows(tmp_path, mark):
    assert load_records(write(tmp_path / "d.csv", CSV.format(mark))) == RECORDS
    marked = f"sep={mark}\r\n" + CSV.format(mark).replace("\n", "\r\n")
    assert load_records(write(tmp_path / "s.csv", marked)) == RECORDS


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps({"data": ROWS}),
        json.dumps({"train": ROWS}, indent=2),
        "\n".join(json.dumps(row) for row in ROWS),
        "\n\n " + json.dumps(ROWS, indent=4) + "\n",
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_as_a_list_or_a_line_a_row(tmp_path, content, suffix):
    if suffix == "jsonl" and content.startswith("{") and '": [' in content:
        return  # a line of such a file is a row
    assert load_records(write(tmp_path / f"a.{suffix}", content)) == RECORDS


def test_one_json_object_is_one_record(tmp_path):
    assert load_records(write(tmp_path / "o.json", json.dumps(ROWS[0], indent=1))) == RECORDS[:1]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_long_cells(tmp_path, kind):
    long = "x" * 300_000
    content = {
        "csv": f"question,answer\n{long},1\n",
        "jsonl": [{"question": long, "answer": "1"}],
        "json": json.dumps([{"question": long, "answer": "1"}]),
    }[kind]
    assert one(write(tmp_path / f"l.{kind}", content)).question == long


def test_an_index_column_and_missing_cells_of_no_importance(tmp_path):
    path = write(tmp_path / "i.csv", ",question, answer ,level\n0,q,7,hard\n1,r,8\n")
    assert load_records(path) == [Record("q", "7"), Record("r", "8")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "question,answer\na,1\nWhat is 1,000 + 1?,1001\n", "row 2 (line 3) has 3 cells"),
        ("a.csv", 'question,answer\n"a\nb",1\nx,y,z\n', "row 2 (line 4) has 3 cells"),
        ("a.tsv", "question\tanswer\na\tb\tc\n", "row 1 (line 2) has 3 cells"),
        ("a.csv", "question;answer\na;b;c\n", "row 1 (line 2) has 3 cells"),
        ("a.csv", "question,answer,answer\na,1,2\n", "column 'answer' twice"),
        ("a.csv", "question, answer,answer \na,1,2\n", "column 'answer' twice"),
        ("a.csv", 'question,answer\n"a,1\nb,2\n', "not readable as CSV: line"),
        ("a.csv", 'question,answer\n"a" b,1\n', "not readable as CSV: line 2"),
        ("a.jsonl", '{"question": "q", "answer": "1"}\n{"question": "q", "answer": "1", '
         '"answer": "2"}\n', "line 2: key 'answer' stands twice"),
        ("a.jsonl", '{"question": "q", "answer": {"ground_truth": "1", "ground_truth": "2"}}\n',
         "line 1: key 'ground_truth' stands twice"),
        ("a.json", '[{"question": "q", "answer": "1"},\n{"question": "q", "question": "r"}]',
         "line 2: key 'question' stands twice"),
        ("a.json", '[{"question": "q", "answer": "1"}\n{"question": "r"}]', "line 2 is not JSON"),
        ("a.json", '[{"question": "q", "answer": "1"},', "line 1 is not JSON"),
        ("a.json", '[{"question": "q", "answer": "1"}', "list is not closed"),
        ("a.json", '[{"question": "q", "answer": "1"}] x', "follows the end of its list"),
        ("a.json", '[{"question": "q", "answer": "1"},\n 7]', "row 2 (line 2) is not a JSON obj"),
        ("a.json", '{"question": ["q"], "answer": ["1"]}', "object of columns"),
        ("a.json", '"question"', "is one JSON str"),
        ("a.json", "[" * 100_000, "not readable as .json"),
        ("a.jsonl", b'{"question": "q", "answer": "1"}\n{"question": "caf\xe9"}\n',
         "line 2 holds byte 0xe9"),
        ("a.csv", b"question,answer\ncaf\xe9,1\n", "line 2 holds byte 0xe9"),
        ("a.jsonl", b"\xff\xfe\x00", "not readable as utf-16"),
    ],
)  # fmt: skip
def test_damaged_and_ambiguous_files_are_refused(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refusal(str(path))


def test_a_parquet_column_twice_is_refused(tmp_path):
    table = pa.table([["q"], ["1"], ["2"]], names=["question", "answer", "answer"])
    pq.write_table(table, tmp_path / "t.parquet")
    assert "'answer' twice" in refusal(str(tmp_path / "t.parquet"))


# Levels and plain text


@pytest.mark.parametrize(
    ("level", "number", "family"),
    [("Level 5", 5, None), ("hard", None, "hard"), (3.0, 3, None), ("Level ?", None, "Level ?"),
     (float("nan"), None, None), (None, None, None), ({"a": 1}, None, None)],
)  # fmt: skip
def test_levels_that_are_words(tmp_path, level, number, family):
    path = write(tmp_path / "l.jsonl", [{"question": "q", "answer": "1", "level": level}])
    (item,) = load_questions(path)
    assert (item.level, item.family) == (number, family)
    assert load_records(path)[0].level == (number or 0)


def test_plain_text_where_only_text_is_needed(tmp_path):
    rows = [{"text": "Once upon a time."}, {"text": "The end."}]
    path = write(tmp_path / "t.jsonl", rows)
    records = load_records(path)
    assert [record.text for record in records] == ["Once upon a time.", "The end."]
    drawn = itertools.islice(documents(records, PLAIN), 2)
    assert sorted(drawn) == sorted(phased_texts(records, CorpusConfig())) == [
        "Once upon a time.", "The end.",
    ]  # fmt: skip
    assert hash_records(records) != hash_records(records[::-1])
    with pytest.raises(BadInputError, match="no column 'question'"):
        load_questions(path)
    both = write(tmp_path / "b.jsonl", [{"question": "q", "answer": "1", "text": "t", "doc": "d"}])
    assert load_records(both) == [Record("q", "1")]
    assert load_records(both, text_column="doc") == [Record("", "", text="d")]
    with pytest.raises(BadInputError, match=r"row 1 \(line 1\), column text: empty"):
        load_records(write(tmp_path / "e.jsonl", [{"text": " "}]))


def test_records_of_questions_hash_as_before_there_were_texts():
    before = "Record(question='q', answer='a', steps='s', family='f', level=2)"
    record = Record("q", "a", "s", "f", 2)
    assert hash_records([record]) == hashlib.sha256(before.encode()).hexdigest()


# Golds that no matcher can meet


GOLDS = {
    "C(n, 4), or an equivalent form such as n(n-1)(n-2)(n-3)/24": True,
    "any equivalent expression": True,
    "See solution": True,
    "proof": True,
    "N/A": True,
    "Let us first note that the sum of all the terms is bounded": True,
    "e.g. 3": True,
    "7": False,
    "\\frac{1}{2}": False,
    "C": False,
    "6:00 PM": False,
    "ten thousand and one": False,
    "x \\in (-\\infty, 3] \\cup [5, \\infty)": False,
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}": False,
    "\\text{ellipse}": False,
    "None": False,
}


def test_golds_that_no_matcher_can_meet_are_counted():
    assert {gold: unmatchable(gold) for gold in GOLDS} == GOLDS
    (warning,) = doubts(list(GOLDS), "set.jsonl")
    assert f"{sum(GOLDS.values())} of {len(GOLDS)} answers of set.jsonl" in warning
    assert "first of row 1: 'C(n, 4)" in warning
    assert doubts(["7"], "set.jsonl") == []
