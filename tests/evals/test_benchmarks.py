from __future__ import annotations

import csv
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resa_lens.errors import BadInputError
from resa_lens.evals.benchmarks import (
    BENCHMARKS,
    benchmark_rows,
    gold_answer,
    option_order,
    question_of,
)
from resa_lens.evals.tasks import load_questions

MATH = [
    {
        "problem": f"What is {i}/2?", "solution": f"It is $\\boxed{{\\frac{{{i}}}{{2}}}}$.",
        "answer": f"\\frac{{{i}}}{{2}}", "subject": "Algebra", "level": 1 + i % 5,
    }
    for i in range(4)
]  # fmt: skip
GPQA = [
    {
        "Question": f"Which of four is right in case {i}?", "Correct Answer": "right",
        "Incorrect Answer 1": "one", "Incorrect Answer 2": "two", "Incorrect Answer 3": "three",
        "High-level domain": "Physics",
    }
    for i in range(40)
]  # fmt: skip


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_paper_has_six_with_their_sizes():
    sizes = {name: b.questions for name, b in BENCHMARKS.items()}
    # spec section 5: the granularity of a pass@1.
    assert sizes == {
        "aime24": 30, "aime25": 30, "math500": 500, "gpqa-diamond": 198, "amc23": 40,
        "minerva": 272,
    }  # fmt: skip
    assert [b.kind for b in BENCHMARKS.values()].count("choice") == 1
    assert all("{question}" in b.prompt for b in BENCHMARKS.values())


def test_math_rows_from_a_file(tmp_path):
    items = load_questions("math500", place=str(jsonl(tmp_path / "any.jsonl", MATH)))
    assert [item.id for item in items] == [f"math500-{i}" for i in range(4)]
    assert items[3].answer == "\\frac{3}{2}"
    assert (items[3].family, items[3].level, items[3].choice) == ("Algebra", 4, False)
    assert items[3].question == "What is 3/2?"
    assert items[3].query.endswith("Think step by step before answering.\n\nWhat is 3/2?")
    assert "$\\boxed{ANSWER}$" in items[3].query


def test_a_solution_alone_gives_its_last_box(tmp_path):
    rows = [{"problem": "q", "solution": "First \\boxed{1}, no: \\boxed{\\text{m}^{2}}."}]
    (item,) = load_questions("minerva", place=str(jsonl(tmp_path / "m.jsonl", rows)))
    assert item.answer == "\\text{m}^{2}"
    assert gold_answer("so 3+4=7\n#### 7") == "7"
    assert gold_answer(" 1/2 ") == "1/2"


def test_gpqa_is_asked_with_options_and_graded_by_letter(tmp_path):
    items = load_questions("gpqa-diamond", place=str(table(tmp_path / "g.csv", GPQA)))
    for item in items:
        (line,) = [row for row in item.question.splitlines() if row.endswith(" right")]
        assert line == f"{item.answer}) right"
        assert item.choice
        assert sorted(item.question.splitlines()[-4:])[0].startswith("A) ")
    # 40 fair draws of 4: each letter at least once but with p = 4e-5.
    assert set(Counter(item.answer for item in items)) == set("ABCD")


def test_the_option_order_is_a_function_of_the_row_and_the_seed(tmp_path):
    benchmark = BENCHMARKS["gpqa-diamond"]
    alone = [question_of(benchmark, row) for row in GPQA]
    assert [question_of(benchmark, row) for row in GPQA[::-1]] == alone[::-1]
    assert [question_of(benchmark, row, seed=1) for row in GPQA] != alone
    orders = Counter(tuple(option_order(f"q{i}", 4)) for i in range(2400))
    assert len(orders) == 24
    assert max(abs(n - 100) for n in orders.values()) < 50  # five standard deviations
    assert option_order("q ", 4) == option_order("q", 4)


def test_a_folder_in_the_hubs_layout(tmp_path):
    for i, rows in enumerate((MATH[:2], MATH[2:])):
        path = tmp_path / "data" / f"test-0000{i}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    jsonl(tmp_path / "data" / "train.jsonl", MATH[:1])
    assert benchmark_rows(BENCHMARKS["math500"], str(tmp_path)) == MATH
    gpqa = tmp_path / "gpqa"
    table(gpqa / "gpqa_main.csv", GPQA[:3])
    table(gpqa / "gpqa_diamond.csv", GPQA)
    assert len(benchmark_rows(BENCHMARKS["gpqa-diamond"], str(gpqa))) == 40


def hub_cache(monkeypatch, folder, repo, commit="0" * 40):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    place = folder / f"datasets--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    return place / "snapshots" / commit


def test_rows_from_the_hubs_cache_offline(tmp_path, monkeypatch):
    snapshot = hub_cache(monkeypatch, tmp_path, "HuggingFaceH4/MATH-500")
    jsonl(snapshot / "test.jsonl", MATH)
    assert len(load_questions("math500")) == 4


def test_not_in_the_cache_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInputError, match="amc23: the data set knoveleng/AMC-23") as error:
        load_questions("amc23")
    assert "--tasks amc23=FOLDER" in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no .jsonl"),
        ({"a.jsonl": MATH, "b.jsonl": MATH}, r"several files \(a.jsonl, b.jsonl\)"),
        ({"a.jsonl": []}, "holds no rows"),
        (
            {"a.jsonl": [{"problem": "q", "solution": None, "answer": ""}]},
            r"row 1 \(line 1\), column .*: empty",
        ),
        ({"a.jsonl": [{"problem": "q", "answer": "\\boxed{}"}]}, "box of the answer .* is empty"),
        ({"a.jsonl": [{"text": "q", "answer": "1"}]}, "no column 'question' or 'problem'"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    for name, rows in files.items():
        jsonl(tmp_path / name, rows)
    with pytest.raises(BadInputError, match=message):
        load_questions("math500", place=str(tmp_path))
    with pytest.raises(BadInputError, match="no such file or folder"):
        load_questions("math500", place=str(tmp_path / "none"))
