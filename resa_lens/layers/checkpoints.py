"""A published table of checkpoints: scores in percent as they were printed, from a file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import ordinal
from resa_lens.texts.tables import read_rows

QUESTIONS = {
    "aime24": 30, "aime2024": 30, "aime25": 30, "aime2025": 30, "amc23": 40, "amc2023": 40,
    "math500": 500, "gpqa": 198, "gpqadiamond": 198, "minerva": 272, "minervamath": 272,
    "gsm8k": 1319, "humaneval": 164,
}  # fmt: skip
"""Questions of the benchmarks known by name, lower case and without punctuation."""
AVERAGES = ("average", "avg", "mean")
GROUPS = ("layer", "layer_1_indexed", "model")
MAX_QUESTIONS = 100_000
_MISSING = {"", "-", "\N{EN DASH}", "\N{EM DASH}", "na", "n/a", "nan", "none", "null"}


@dataclass(frozen=True)
class CheckpointTable:
    """Scores in percent, a row a checkpoint, as printed."""

    source: str
    group_column: str
    groups: tuple[str, ...]
    """Of each row; a layer shows both numberings."""
    row_names: tuple[str, ...]
    """The group and what tells its rows apart, such as the step."""
    benchmarks: tuple[str, ...]
    """Columns, as the file calls them."""
    questions: tuple[int, ...]
    cells: tuple[tuple[Decimal | None, ...], ...]
    """[rows, benchmarks]; None is missing."""
    average_column: str | None
    averages: tuple[Decimal | None, ...]
    ignored: tuple[str, ...]
    """Columns that are neither."""

    @property
    def missing(self) -> int:
        """Cells without a number."""
        return sum(value is None for row in self.cells for value in row)


def plain_name(name: str) -> str:
    """A column's name in lower case, letters and digits only."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_checkpoints(
    path: str | Path, *, group: str | None = None, questions: Mapping[str, int] | None = None
) -> CheckpointTable:
    """Reads a table of checkpoints from a .csv, .jsonl or .parquet file.

    Args:
        path: a row a checkpoint, scores in percent.
        group: column of the groups; layer, layer_1_indexed or model where not given.
        questions: {column: number of its questions}, for benchmarks not in `QUESTIONS` (other
            columns are ignored) or of another size.

    Raises:
        BadInputError: a missing or unreadable file; no group or benchmark column; two columns of
            one benchmark; a score that is no percentage; fewer than two groups; a row twice.
    """
    source = Path(path)
    return checkpoint_table(read_rows(source), source, group=group, questions=questions)


def checkpoint_table(
    records: Sequence[Mapping[Any, Any]],
    source: Path,
    *,
    group: str | None = None,
    questions: Mapping[str, int] | None = None,
) -> CheckpointTable:
    """Reads a table of checkpoints from its rows; `source` is what errors call it.

    Other arguments and errors: as `read_checkpoints`.
    """
    rows = [{str(name).strip(): cell for name, cell in row.items()} for row in records]
    if not rows:
        raise BadInputError(f"{source} has no rows: give a header and one row per checkpoint")
    header = list(dict.fromkeys(name for row in rows for name in row))
    column = group or next((name for name in GROUPS if name in header), None)
    if column is None or column not in header:
        raise BadInputError(
            f'{source} has no column "{column or " or ".join(GROUPS)}" to group by: '
            f"give --group-column one of {', '.join(header)}"
        )
    known = _questions([name for name in header if name != column], questions or {}, source)
    averages = [name for name in header if plain_name(name) in AVERAGES and name not in known]
    _check_repeats(rows, source)
    groups = [_group(row.get(column), column, source, i) for i, row in enumerate(rows, start=1)]
    if len(set(groups)) < 2:
        raise BadInputError(
            f"{source}: every row has {column} {groups[0]}: an audit compares two groups or more"
        )

    def numbers(name: str) -> list[Decimal | None]:
        return [_percentage(row.get(name), name, source, i) for i, row in enumerate(rows, start=1)]

    cells = tuple(zip(*(numbers(name) for name in known), strict=True))
    largest = max((v for row in cells for v in row if v is not None), default=None)
    if largest is None or 0 < largest <= 1:
        raise BadInputError(
            f"{source}: the largest score is {largest or 'none'}: scores are in percent, 0 to 100"
        )
    rest = tuple(name for name in header if name not in (column, *known, *averages))
    return CheckpointTable(
        str(source),
        column,
        tuple(groups),
        _row_names(groups, {name: [row.get(name) for row in rows] for name in rest}),
        tuple(known),
        tuple(known.values()),
        cells,
        averages[0] if averages else None,
        tuple(numbers(averages[0])) if averages else (None,) * len(rows),
        rest,
    )


def _questions(header: list[str], asked: Mapping[str, int], source: Path) -> dict[str, int]:
    """{column: n} of the benchmarks in the file's order."""
    own = {}
    for name, n in asked.items():
        match = [column for column in header if name in (column, plain_name(column))]
        match = match or [column for column in header if plain_name(column) == plain_name(name)]
        if not match:
            raise BadInputError(f'{source} has no column "{name}": it has {", ".join(header)}')
        if not 1 <= n <= MAX_QUESTIONS:
            raise BadInputError(f"{name}={n}: give 1 to {MAX_QUESTIONS} questions")
        own[match[0]] = n
    known = {name: QUESTIONS.get(plain_name(name)) for name in header} | own
    found = {name: n for name, n in known.items() if n is not None}
    if not found:
        raise BadInputError(
            f"{source} has no column of a known benchmark ({', '.join(QUESTIONS)}): it has "
            f"{', '.join(header)}; give --questions NAME=N for each benchmark"
        )
    repeated = [name for name, times in Counter(map(plain_name, found)).items() if times > 1]
    if repeated:
        twice = [name for name in found if plain_name(name) == repeated[0]]
        raise BadInputError(f"{source}: columns {' and '.join(twice)} are one benchmark: keep one")
    return found


def _check_repeats(rows: list[dict[str, Any]], source: Path) -> None:
    seen: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(rows, start=1):
        first = seen.setdefault(tuple(map(str, row.values())), number)
        if first != number:
            raise BadInputError(
                f"{source}: row {number} repeats row {first}: each checkpoint may stand once"
            )


def _is_missing(value: Any) -> bool:
    return value is None or str(value).strip().lower() in _MISSING


def _group(value: Any, column: str, source: Path, number: int) -> str:
    where = f'{source}, row {number}: {column} "{"" if value is None else value}"'
    if _is_missing(value):
        raise BadInputError(f"{where} is empty: every row needs its group")
    text = str(value).strip()
    if column not in GROUPS[:2]:
        return text
    try:
        layer = Decimal(text) - (column == "layer_1_indexed")
    except InvalidOperation:
        layer = Decimal(-1)
    if not layer.is_finite() or layer < 0 or layer != int(layer):
        first = 1 if column == "layer_1_indexed" else 0
        raise BadInputError(f"{where} is no layer: give a whole number from {first}")
    return f"layer {int(layer)} (0-based; {ordinal(int(layer) + 1)})"


def _percentage(value: Any, column: str, source: Path, number: int) -> Decimal | None:
    if _is_missing(value):
        return None
    # A stored float has no print: six digits are what it can be trusted for.
    text = f"{value:.6g}" if isinstance(value, float) else str(value).strip().removesuffix("%")
    try:
        percentage = Decimal(text.strip())
    except InvalidOperation:
        percentage = Decimal("nan")
    if not percentage.is_finite() or not 0 <= percentage <= 100:
        raise BadInputError(
            f'{source}, row {number}: {column} "{value}" is no percentage from 0 to 100'
        )
    return percentage


def _row_names(groups: list[str], others: Mapping[str, list[Any]]) -> tuple[str, ...]:
    """Groups with the fewest columns that tell their rows apart, in the file's order."""
    names = list(groups)
    while len(set(names)) < len(names):
        longer = [
            [f"{row}, {name} {value}" for row, value in zip(names, values, strict=True)]
            for name, values in others.items()
        ]
        best = max(longer, key=lambda tried: len(set(tried)), default=names)
        if len(set(best)) == len(set(names)):
            return tuple(f"{row}, row {i}" for i, row in enumerate(names, start=1))
        names = best
    return tuple(names)


def question_counts(items: Sequence[str]) -> dict[str, int]:
    """Return the questions of benchmarks from NAME=N.

    Raises:
        BadInputError: one is of another form.
    """
    counts = {}
    for item in items:
        name, _, number = item.rpartition("=")
        if not name or not number.strip().isdecimal():
            raise BadInputError(f'--questions "{item}": give NAME=N, for example mmlu=14042')
        counts[name.strip()] = int(number)
    return counts
