"""The paper's six benchmarks: one table for our own tasks and for lighteval's.

Repositories, subsets and splits are those of the authors' evaluation; the prompts follow
lighteval's tasks of these names, which follow simple-evals.  Rows come from the hub's cache, the
hub, a local file or a local folder.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from resa_lens.errors import BadInputError
from resa_lens.files import named_path
from resa_lens.texts.records import ANSWER_COLUMNS, QUESTION_COLUMNS, split_worked, text_of
from resa_lens.texts.tables import READERS, Row, read_rows

MATH_PROMPT = (
    "Solve the following math problem efficiently and clearly. The last line of your response "
    "should be of the following format: 'Therefore, the final answer is: $\\boxed{{ANSWER}}$. I "
    "hope it is correct' (without quotes) where ANSWER is just the final number or expression that "
    "solves the problem. Think step by step before answering.\n\n{question}"
)
CHOICE_PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of "
    "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think "
    "step by step before answering.\n\n{question}"
)
LETTERS = "ABCD"
_PATTERNS = [f"*{suffix}" for suffix in READERS if suffix != ".json"]
"""Of the hub's layout, in which a .json file describes the data and holds none."""


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies and what its rows mean."""

    name: str
    repo: str
    """On the hub."""
    split: str
    questions: int
    """In the whole benchmark."""
    subset: str = "default"
    kind: Literal["math", "choice"] = "math"
    """`math` is graded as an expression, `choice` by the letter of the option."""
    question: tuple[str, ...] = QUESTION_COLUMNS
    """The first of these columns that is there holds the question."""
    answer: tuple[str, ...] = ANSWER_COLUMNS
    """Likewise; of a worked solution the last box is the answer."""
    wrong: tuple[str, ...] = ()
    """Of `choice`: the columns with the wrong options."""
    family: str | None = None
    """Column to group by."""
    level: str | None = None
    prompt: str = MATH_PROMPT


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", "HuggingFaceH4/aime_2024", "train", 30),
        Benchmark("aime25", "yentinglin/aime_2025", "train", 30),
        Benchmark(
            "math500", "HuggingFaceH4/MATH-500", "test", 500, family="subject", level="level"
        ),
        Benchmark(
            "gpqa-diamond",
            "Idavidrein/gpqa",
            "train",
            198,
            subset="gpqa_diamond",
            kind="choice",
            question=("Question",),
            answer=("Correct Answer",),
            wrong=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
            family="High-level domain",
            prompt=CHOICE_PROMPT,
        ),
        Benchmark("amc23", "knoveleng/AMC-23", "train", 40),
        Benchmark("minerva", "knoveleng/Minerva-Math", "train", 272),
    )
}
"""By the name that `--tasks` takes."""


@dataclass(frozen=True)
class Question:
    """One row as it is asked."""

    text: str
    """With its options, where it has some."""
    query: str
    """The text in the benchmark's prompt."""
    gold: str
    """An expression or a letter."""


def question_of(benchmark: Benchmark, row: Mapping[str, Any], seed: int = 0) -> Question:
    """Return what a row asks and its right answer.

    Raises:
        BadInputError: a column is missing or empty.
    """
    text = _cell(benchmark, row, benchmark.question)
    answer = _cell(benchmark, row, benchmark.answer)
    if benchmark.kind == "math":
        gold = gold_answer(answer)
        if not gold:
            raise BadInputError(f"{benchmark.name}: the box of the answer {answer[:60]!r} is empty")
    else:
        options = [answer, *(_cell(benchmark, row, (column,)) for column in benchmark.wrong)]
        order = option_order(text, len(options), seed)
        lines = [f"{LETTERS[i]}) {options[k]}" for i, k in enumerate(order)]
        text = "\n".join([text, "", *lines])
        gold = LETTERS[order.index(0)]
    return Question(text, benchmark.prompt.format(question=text), gold)


def option_order(question: str, options: int, seed: int = 0) -> list[int]:
    """Return the order in which a question's options are shown: a function of question and seed.

    Neither the row's place nor what was drawn before matters, so two harnesses and a resumed run
    ask the same.
    """
    key = hashlib.sha256(f"{seed}/{question.strip()}".encode()).digest()
    order = list(range(options))
    random.Random(key).shuffle(order)
    return order


def gold_answer(text: str) -> str:
    r"""Return the answer in a gold cell: its last `\boxed{}`, what follows "####", or all of it."""
    return split_worked(text)[0]


def _cell(benchmark: Benchmark, row: Mapping[str, Any], columns: Sequence[str]) -> str:
    present = [column for column in columns if column in row]
    if not present:
        raise BadInputError(
            f"{benchmark.name}: no column {' or '.join(map(repr, columns))} among {', '.join(row)}"
        )
    place = f"{benchmark.name}, {row.place}" if isinstance(row, Row) else benchmark.name
    # Some rows keep the bare answer in one column and leave the other empty.
    for column in present:
        try:
            if text := text_of(row[column]):
                return text
        except ValueError as error:
            raise BadInputError(f"{place}, column {column}: {error}") from error
    raise BadInputError(f"{place}, column {present[0]}: empty; fill it or drop the row")


def benchmark_rows(benchmark: Benchmark, place: str | None = None) -> list[Row]:
    """Return a benchmark's rows from a local file or folder, or from the hub or its cache.

    Raises:
        BadInputError: nothing there, or several files that could be meant.
    """
    if place is None:
        folder = _hub_folder(benchmark)
    else:
        folder = named_path(place, benchmark.name)
        if not folder.exists():
            raise BadInputError(f"{benchmark.name}={place}: no such file or folder")
    files = [folder] if folder.is_file() else data_files(folder, benchmark)
    rows = [row for file in files for row in read_rows(file)]
    if not rows:
        raise BadInputError(f"{benchmark.name}: {folder} holds no rows")
    return rows


def data_files(folder: Path, benchmark: Benchmark) -> list[Path]:
    """Return the files of a benchmark's subset and split in a folder of the hub's layout.

    Raises:
        BadInputError: none, or several that are no parts of one table.
    """
    files = sorted(file for pattern in _PATTERNS for file in folder.rglob(pattern))
    files = files or sorted(folder.rglob("*.json"))
    for part in (benchmark.subset, benchmark.split):
        named = [f for f in files if part in str(f.relative_to(folder))]
        files = named or files
    if not files:
        raise BadInputError(
            f"{benchmark.name}: {folder} holds no {', '.join(READERS)} file; "
            "copy the data set's files there"
        )
    # data/train-00000-of-00002.parquet and its like are one table.
    if len({file.name.split("-00")[0] for file in files}) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:4])
        raise BadInputError(
            f"{benchmark.name}: {folder} holds several files ({names}); "
            f"pass one, for example {benchmark.name}={files[0]}"
        )
    return files


def _hub_folder(benchmark: Benchmark) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    for cached in (True, False):
        try:
            folder = Path(
                snapshot_download(
                    benchmark.repo,
                    repo_type="dataset",
                    allow_patterns=_PATTERNS,
                    local_files_only=cached,
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            if cached:
                continue
            raise BadInputError(
                f"{benchmark.name}: the data set {benchmark.repo} is not in the hub's cache and "
                f"could not be fetched ({type(error).__name__}).\nWhere there is a network run "
                f"`hf download {benchmark.repo} --repo-type dataset --local-dir FOLDER`, copy it "
                f"here\nand pass --tasks {benchmark.name}=FOLDER"
            ) from error
        # A cache may hold a part of the repository only.
        if not cached or any(file for p in _PATTERNS for file in folder.rglob(p)):
            return folder
    raise AssertionError("the second pass returns or raises")
