"""Question sets: the bundled one, the paper's benchmarks, or any local table of questions."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from resa_lens.errors import BadInputError
from resa_lens.evals.benchmarks import BENCHMARKS, benchmark_rows, question_of
from resa_lens.files import named_path
from resa_lens.resources import data_path
from resa_lens.texts.records import Columns, Record, cell, level_of, records_of, word_of
from resa_lens.texts.tables import READERS, Row, iterate_rows

BUNDLED = "tiny"
BUNDLED_LEVELS = (1, 2, 3)
"""Of the bundled set what is asked unless levels are given: the model never saw level 4."""
SPLITS = ("test", "train")
_OPTIONS = re.compile(r"(.*?)((?::(?:families|levels)=[^:]*)*)", re.DOTALL)


@dataclass(frozen=True)
class EvalItem:
    """One question with its gold answer."""

    id: str
    """Unique in its set; runs are paired by it."""
    question: str
    answer: str
    family: str | None = None
    level: int | None = None
    task: str | None = None
    """The set it comes from."""
    query: str | None = None
    """What is asked instead of the bare question: the question in a benchmark's prompt."""
    choice: bool = False
    """Whether the answer is the letter of an option."""


@dataclass(frozen=True)
class TaskSpec:
    """One task as `--tasks` names it: NAME, NAME=PLACE or PATH, with :families= and :levels=."""

    name: str
    """`tiny`, a benchmark, or a file's path."""
    place: str | None = None
    """Of a benchmark: the local file or folder to read instead of the hub's."""
    families: tuple[str, ...] | None = None
    levels: tuple[int, ...] | None = None

    @property
    def label(self) -> str:
        """The name that scores are listed under."""
        return self.name if self.name in (BUNDLED, *BENCHMARKS) else Path(self.name).stem


def parse_tasks(text: str) -> list[TaskSpec]:
    """Return the tasks of a list "tiny:families=sum+gcd,math500=FOLDER,questions.jsonl".

    Raises:
        BadInputError: an empty name, a level that is no number, or two tasks of one name.
    """
    # False, too, of a list that is longer than a name may be.
    parts = [text] if os.path.isfile(text) else text.split(",")  # noqa: PTH113
    specs = [_parse_task(part.strip()) for part in parts]
    labels = [spec.label for spec in specs]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise BadInputError(f"task {twice[0]!r} stands twice in {text!r}; name each once")
    return specs


def _parse_task(text: str) -> TaskSpec:
    match = _OPTIONS.fullmatch(text)
    assert match is not None  # it matches every text
    name, options = match[1], dict(o.split("=", 1) for o in match[2].split(":") if o)
    if not name:
        raise BadInputError(f"task {text!r} has no name; use {_choices()}")
    place = None
    if "=" in name and name.split("=", 1)[0] in BENCHMARKS:
        name, place = name.split("=", 1)
    levels = options.get("levels")
    if levels is not None and not all(part.isdecimal() for part in levels.split("+")):
        raise BadInputError(f'levels {levels!r} of task {name!r} are no numbers; use "1+2"')
    families = options.get("families")
    return TaskSpec(
        name,
        place,
        None if families is None else tuple(families.split("+")),
        None if levels is None else tuple(map(int, levels.split("+"))),
    )


def load_tasks(
    text: str,
    *,
    levels: Collection[int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    question_column: str | None = None,
    answer_column: str | None = None,
    required: bool = True,
) -> list[EvalItem]:
    """Return the questions of one or several tasks, in the order they are named.

    Args:
        text: the tasks as in `parse_tasks`.
        levels: only questions of these levels; by default all, of the bundled set 1 to 3.
        limit: of each task at most so many, drawn as in `load_questions`.
        seed: of that draw, and of the order of a choice's options.
        question_column: of files, the column of the question.
        answer_column: of files, the column of the answer.
        required: whether a file must have these columns; else one without them has the known ones.

    Raises:
        BadInputError: as `parse_tasks` and `load_questions`, or one id in two tasks.
    """
    items: list[EvalItem] = []
    owner: dict[str, str] = {}
    for spec in parse_tasks(text):
        chosen = spec.levels or levels
        if spec.name == BUNDLED and chosen is None:
            chosen = BUNDLED_LEVELS
        loaded = load_questions(
            spec.name,
            place=spec.place,
            levels=chosen,
            families=spec.families,
            limit=limit,
            seed=seed,
            question_column=question_column,
            answer_column=answer_column,
            required=required,
        )
        for item in loaded:
            if item.id in owner:
                raise BadInputError(
                    f"id {item.id!r} stands in the tasks {owner[item.id]} and {spec.label}; "
                    "rename one file, or give its rows an id column"
                )
            owner[item.id] = spec.label
            items.append(replace(item, task=spec.label))
    return items


def load_questions(
    name_or_path: str | Path,
    *,
    split: str = "test",
    place: str | None = None,
    levels: Collection[int] | None = None,
    families: Collection[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    question_column: str | None = None,
    answer_column: str | None = None,
    first: int | None = None,
    required: bool = True,
) -> list[EvalItem]:
    """Return the questions of the bundled set, a benchmark or a local table.

    Args:
        name_or_path: "tiny", a name in `benchmarks.BENCHMARKS`, or a .jsonl, .json, .csv, .tsv or
            .parquet file, read as training reads it (`records.records_of`).  Optional are id,
            family and level; a level that is a word ("hard") is the family where there is none.
        split: of the bundled set; a file has no splits.
        place: of a benchmark, the local file or folder to read instead of the hub's.
        levels: only questions of these levels.
        families: only questions of these families.
        limit: at most so many, drawn without order by `seed`: a smaller limit draws a part of
            what a larger one does.
        seed: of that draw, and of the order of a choice's options.
        question_column: of a file, the column of the question.
        answer_column: of a file, the column of the answer.
        first: of a file, its first rows alone.
        required: as in `load_tasks`.

    Raises:
        BadInputError: no such file, a format, column, value, family or level that does not exist,
            an id twice, or no question left.
    """
    if name_or_path in BENCHMARKS:
        items = _benchmark_items(str(name_or_path), place, seed)
    else:
        path = _resolve(name_or_path, split)
        rows = list(islice(iterate_rows(path), first))
        columns = Columns(question_column, answer_column)
        if name_or_path == BUNDLED:
            columns = None
        elif not required:
            columns = columns.known_to(rows)
        records = records_of(rows, str(path), columns, plain=False)
        pairs = zip(records, rows, strict=True)
        items = [_item(record, row, index, path) for index, (record, row) in enumerate(pairs)]
        seen: set[str] = set()
        for item in items:
            if item.id in seen:
                raise BadInputError(f"id {item.id!r} stands twice in {path}; ids must be unique")
            seen.add(item.id)
    if families is not None:
        items = _of_families(items, families)
    return select(items, levels=levels, limit=limit, seed=seed)


def select(
    items: list[EvalItem],
    *,
    levels: Collection[int] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[EvalItem]:
    """Return the items of the levels, at most `limit` of them, as `load_questions` describes it.

    Raises:
        BadInputError: the limit is below 1, or no item has one of the levels.
    """
    if limit is not None and limit < 1:
        raise BadInputError(f"limit is {limit}; use at least 1 question")
    chosen = [item for item in items if levels is None or item.level in levels]
    if not chosen:
        known = sorted({item.level for item in items if item.level is not None})
        there = f"the questions have levels {known}" if known else "the questions have no levels"
        raise BadInputError(f"no question has level {_listed(levels or ())}; {there}")
    if limit is not None:
        random.Random(seed).shuffle(chosen)
    return chosen[:limit]


def _of_families(items: list[EvalItem], families: Collection[str]) -> list[EvalItem]:
    known = {item.family for item in items if item.family is not None}
    if unknown := [family for family in families if family not in known]:
        there = f"use {_listed(sorted(known))}" if known else "the questions have no families"
        raise BadInputError(f"no question has family {unknown[0]!r}; {there}")
    return [item for item in items if item.family in families]


def _benchmark_items(name: str, place: str | None, seed: int) -> list[EvalItem]:
    benchmark = BENCHMARKS[name]
    items = []
    for index, row in enumerate(benchmark_rows(benchmark, place)):
        question = question_of(benchmark, row, seed)
        items.append(
            EvalItem(
                id=f"{name}-{index}",
                question=question.text,
                answer=question.gold,
                family=word_of(row.get(benchmark.family)) or None if benchmark.family else None,
                level=level_of(row.get(benchmark.level)) if benchmark.level else None,
                query=question.query,
                choice=benchmark.kind == "choice",
            )
        )
    return items


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _choices() -> str:
    return f"{BUNDLED!r}, {_listed(BENCHMARKS)} or the path of a {_listed(READERS)} file"


def _resolve(name_or_path: str | Path, split: str) -> Path:
    if split not in SPLITS:
        raise BadInputError(f"split is {split!r}; use one of {_listed(SPLITS)}")
    if name_or_path == BUNDLED:
        return data_path(f"{BUNDLED}/{split}.jsonl")
    path = named_path(name_or_path, "task")
    if not path.is_file():
        raise BadInputError(f"{name_or_path} is no file and no known set; use {_choices()}")
    return path


def _item(record: Record, row: Row, index: int, path: Path) -> EvalItem:
    stated = cell(row, "level")
    level, word = level_of(stated), word_of(stated)
    return EvalItem(
        id=word_of(cell(row, "id")) or f"{path.stem}-{index}",
        question=record.question,
        answer=record.answer,
        family=record.family or (word if level is None else "") or None,
        level=level,
    )
