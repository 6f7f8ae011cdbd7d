"""Question sets: the bundled one by name, or any local table with questions and answers."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resa_lens.errors import BadInputError
from resa_lens.resources import data_path
from resa_lens.tables import READERS, read_rows

BUNDLED = "tiny"
SPLITS = ("test", "train")
REQUIRED = ("question", "answer")


@dataclass(frozen=True)
class EvalItem:
    """One question with its gold answer."""

    id: str
    """Unique in its set; runs are paired by it."""
    question: str
    answer: str
    family: str | None = None
    level: int | None = None


def load_questions(
    name_or_path: str | Path,
    *,
    split: str = "test",
    levels: Collection[int] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[EvalItem]:
    """Return the questions of the bundled set "tiny" or of a local .jsonl, .parquet or .csv file.

    Args:
        name_or_path: the set's name or the file; columns question and answer, optional are id,
            family and level.
        split: of the bundled set; a file has no splits.
        levels: only questions of these levels.
        limit: at most so many, drawn without order by `seed`: a smaller limit draws a part of
            what a larger one does.
        seed: of that draw.

    Raises:
        BadInputError: no such file, a format, column, value or level that does not exist, an id
            twice, or no question left.
    """
    path = _resolve(name_or_path, split)
    rows = read_rows(path)
    if not rows:
        raise BadInputError(f"{path} holds no rows; give at least one question with its answer")
    items = [_item(row, f"{path.stem}-{index}", index, path) for index, row in enumerate(rows)]
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise BadInputError(f"id {item.id!r} stands twice in {path}; ids must be unique")
        seen.add(item.id)
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


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _resolve(name_or_path: str | Path, split: str) -> Path:
    if split not in SPLITS:
        raise BadInputError(f"split is {split!r}; use one of {_listed(SPLITS)}")
    if name_or_path == BUNDLED:
        return data_path(f"{BUNDLED}/{split}.jsonl")
    path = Path(name_or_path)
    if not path.is_file():
        raise BadInputError(
            f"{name_or_path} is no file and no bundled set; "
            f"use {BUNDLED!r} or the path of a {_listed(READERS)} file"
        )
    return path


def _item(row: dict[str, Any], default_id: str, index: int, path: Path) -> EvalItem:
    if missing := [name for name in REQUIRED if name not in row]:
        raise BadInputError(
            f"{path} has no column {_listed(missing)} in row {index}; "
            f"it has {_listed(row)}, and question and answer are needed"
        )
    texts = {name: "" if row[name] is None else str(row[name]).strip() for name in REQUIRED}
    if empty := [name for name in REQUIRED if not texts[name]]:
        raise BadInputError(f"{path} has an empty {empty[0]} in row {index}; fill it or drop it")
    family, level, name = row.get("family"), row.get("level"), row.get("id")
    return EvalItem(
        id=default_id if name in (None, "") else str(name),
        question=texts["question"],
        answer=texts["answer"],
        family=None if family in (None, "") else str(family),
        level=None if level in (None, "") else _level(level, index, path),
    )


def _level(value: Any, index: int, path: Path) -> int:
    try:
        return int(value)
    except (ValueError, TypeError) as error:
        raise BadInputError(
            f"{path} has level {value!r} in row {index}; a level is a whole number"
        ) from error
