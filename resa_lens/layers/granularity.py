"""The granularity test: is every published percentage k/n of its benchmark's n questions?

After GRIM (Brown and Heathers 2017).  A share of n questions takes n + 1 values only, so a printed
percentage can contradict its column, and fit another one.  All arithmetic on printed numbers is in
whole numbers: half of the last digit may have been rounded up or down, and both are allowed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from itertools import combinations

AS_LABELLED, EXCHANGED, AMBIGUOUS, NEITHER = (
    "as labelled", "exchanged", "ambiguous", "fits neither",
)  # fmt: skip
MAX_DECIMALS = 6
"""A finer print is no print but a computed number: more digits would test the float's rounding."""
CHANCE = 0.05
"""An exchange is believed below it: one misprint can look like an exchange of coarse columns."""
MAX_MOVED = 6
"""Columns that a reading may permute; pairs are tried first."""

Reading = tuple[int, ...]
"""For each column, the column whose benchmark its cell is read as; (0, 1, 2, ...) as labelled."""


@dataclass(frozen=True)
class RowVerdict:
    """What the granularity test says of one row."""

    verdict: str
    """As labelled, exchanged, ambiguous or fits neither."""
    reading: Reading
    """The reading found where the row is exchanged, else the labels."""
    rivals: tuple[Reading, ...]
    """Ambiguous: the readings that fit; a lone one may be a misprint's chance."""
    misfits: tuple[int, ...]
    """Columns whose cell is no k/n under the labels."""
    nearest: Reading
    """Fits neither: the reading with the fewest cells that do not fit; else as `reading`."""
    nearest_misfits: tuple[int, ...]
    """Columns whose cell does not fit under `nearest`."""
    undecided: tuple[tuple[int, int], ...]
    """Where the labels fit: pairs that fit exchanged as well, in this row."""


@dataclass(frozen=True)
class Exchange:
    """One reading other than the labels, found in rows that fit no smaller one."""

    reading: Reading
    columns: tuple[int, ...]
    """The columns moved; a pair is exchanged, three or more are permuted."""
    rows: tuple[int, ...]
    of: int
    """Rows with all of these cells."""
    chance: float
    """Chance that one row without this exchange passes as such: of each cell the larger of the
    share of its own k/n, and the share of arbitrary numbers of this print, that would pass."""
    log10_all: float
    """log10 of a bound on that chance for so many of the rows that contradict their labels: times
    the ways to choose them and the permutations tried."""


@dataclass(frozen=True)
class Power:
    """Whether the test can tell two columns apart."""

    columns: tuple[int, int]
    first_as_second: float
    """Share of the values k/n of the first, k = 0 to n, that pass as the second's at this print."""
    second_as_first: float
    undecided: int
    """Rows that fit both as labelled and exchanged."""


@dataclass(frozen=True)
class GranularityTest:
    """Verdicts of all rows, what they have in common, and what the test could not have seen."""

    rows: tuple[RowVerdict, ...]
    exchanges: tuple[Exchange, ...]
    power: tuple[Power, ...]
    """Pairs of columns with different n."""
    untestable: tuple[tuple[int, int], ...]
    """Pairs with the same n: exchanged or not, the test cannot see it."""

    @property
    def counts(self) -> dict[str, int]:
        """Rows by verdict."""
        found = Counter(row.verdict for row in self.rows)
        return {verdict: found[verdict] for verdict in (AS_LABELLED, EXCHANGED, AMBIGUOUS, NEITHER)}


def places(value: Decimal) -> int:
    """Digits after the point of a printed number, at most `MAX_DECIMALS`."""
    exponent = value.as_tuple().exponent
    return min(MAX_DECIMALS, max(0, -exponent)) if isinstance(exponent, int) else 0


def printed_counts(value: Decimal, n: int, decimals: int) -> range:
    """The counts k whose percentage 100 k/n prints as value; a half may go up or down."""
    unit = 10**decimals
    shown = round(value * unit)
    # |100 k unit / n - shown| <= 1/2, times 2n
    first = -((n - 2 * n * shown) // (200 * unit))
    last = (2 * n * shown + n) // (200 * unit)
    return range(max(0, first), min(n, last) + 1)


def _prints(k: int, n: int, decimals: int) -> set[int]:
    """What 100 k/n can print as, in units of the last digit: two values at an exact half."""
    twice = 200 * k * 10**decimals
    return {(twice + n) // (2 * n), -((n - twice) // (2 * n))}


@cache
def chance(n: int, other: int, decimals: int) -> float:
    """Share of the percentages k/n, k = 0 to n, that print as a percentage of `other` questions."""
    unit = Decimal(1).scaleb(-decimals)
    passing = sum(
        any(printed_counts(shown * unit, other, decimals) for shown in _prints(k, n, decimals))
        for k in range(n + 1)
    )
    return passing / (n + 1)


@cache
def chance_of_print(n: int, decimals: int) -> float:
    """Share of all percentages of so many decimals that print as k/n."""
    shown = set().union(*(_prints(k, n, decimals) for k in range(n + 1)))
    return len(shown) / (100 * 10**decimals + 1)


def _moved(reading: Reading) -> tuple[int, ...]:
    return tuple(i for i, j in enumerate(reading) if i != j)


def _readings(fits: list[list[bool]], ns: Sequence[int], movable: list[int]) -> list[Reading]:
    """The smallest readings that fit: all that permute the fewest columns."""
    width = len(ns)
    required = [i for i in range(width) if not fits[i][i]]
    if not set(required) <= set(movable):
        return []

    def fill(columns: tuple[int, ...], taken: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(taken) == len(columns):
            yield taken
            return
        i = columns[len(taken)]
        for j in columns:
            # Between columns of one n nothing can be told: a move there is none.
            if j not in taken and ns[i] != ns[j] and fits[i][j]:
                yield from fill(columns, (*taken, j))

    rest = [i for i in movable if i not in required]
    for size in range(max(2, len(required)), min(len(movable), MAX_MOVED) + 1):
        found = []
        for others in combinations(rest, size - len(required)):
            columns = tuple(sorted((*required, *others)))
            for targets in fill(columns, ()):
                moves = dict(zip(columns, targets, strict=True))
                found.append(tuple(moves.get(i, i) for i in range(width)))
        if found:
            return found
    return []


def _swap(width: int, pair: tuple[int, int]) -> Reading:
    moves = {pair[0]: pair[1], pair[1]: pair[0]}
    return tuple(moves.get(i, i) for i in range(width))


def _misfits(fits: list[list[bool]], reading: Reading) -> tuple[int, ...]:
    return tuple(i for i, j in enumerate(reading) if not fits[i][j])


def granularity_test(
    cells: Sequence[Sequence[Decimal | None]], ns: Sequence[int]
) -> GranularityTest:
    """Finds, for each row, whose percentages its cells can be.

    Args:
        cells: [rows, columns] percentages as printed, with their trailing zeros; None is missing
            and is never moved.
        ns: [columns] questions of each column's benchmark.

    Returns:
        The verdicts.  A row that does not fit its labels is exchanged where exactly one smallest
        permutation fits (pairs first), and over all rows by less than `CHANCE`; else ambiguous.  A
        row that fits its labels is taken at its word, unless an exchange that other rows show fits
        it as well: then it is ambiguous.
    """
    width = len(ns)
    labels = tuple(range(width))
    columns = list(zip(*cells, strict=True))
    per_column = [
        max((places(v) for v in column if v is not None), default=0) for column in columns
    ]
    pairs = [pair for pair in combinations(range(width), 2) if ns[pair[0]] != ns[pair[1]]]
    tables, found = [], []
    for row in cells:
        # Trailing zeros get lost, and a row copied from elsewhere may be printed more coarsely.
        finest = max((places(v) for v in row if v is not None), default=0)
        fits = [
            [v is None or bool(printed_counts(v, n, min(finest, per_column[i]))) for n in ns]
            for i, v in enumerate(row)
        ]
        movable = [i for i, v in enumerate(row) if v is not None]
        tables.append((fits, movable))
        found.append([labels] if not _misfits(fits, labels) else _readings(fits, ns, movable))
    misfitting = sum(bool(_misfits(fits, labels)) for fits, _ in tables)
    single = Counter(r[0] for r in found if len(r) == 1 and r[0] != labels)
    exchanges = [
        _exchange(reading, rows, misfitting, ns, per_column)
        for reading, rows in single.most_common()
    ]
    exchanges = [e for e in exchanges if e.log10_all < math.log10(CHANCE)]
    shown = [e.reading for e in exchanges]
    verdicts = tuple(
        _verdict(fits, movable, readings, shown, pairs)
        for (fits, movable), readings in zip(tables, found, strict=True)
    )
    exchanges = [
        replace(
            e,
            rows=tuple(i for i, v in enumerate(verdicts) if v.reading == e.reading),
            of=sum(all(row[i] is not None for i in e.columns) for row in cells),
        )
        for e in exchanges
    ]
    power = [
        Power(
            (i, j),
            chance(ns[i], ns[j], per_column[i]),
            chance(ns[j], ns[i], per_column[j]),
            sum((i, j) in v.undecided for v in verdicts),
        )
        for i, j in pairs
    ]
    same = [pair for pair in combinations(range(width), 2) if ns[pair[0]] == ns[pair[1]]]
    return GranularityTest(verdicts, tuple(exchanges), tuple(power), tuple(same))


def _verdict(
    fits: list[list[bool]],
    movable: list[int],
    readings: list[Reading],
    shown: list[Reading],
    pairs: list[tuple[int, int]],
) -> RowVerdict:
    width = len(fits)
    labels = tuple(range(width))
    misfits = _misfits(fits, labels)

    def fits_moved(reading: Reading) -> bool:
        return set(_moved(reading)) <= set(movable) and not _misfits(fits, reading)

    if not misfits:
        also = tuple(r for r in shown if fits_moved(r))
        undecided = tuple(pair for pair in pairs if fits_moved(_swap(width, pair)))
        verdict, rivals = (AMBIGUOUS, (labels, *also)) if also else (AS_LABELLED, ())
        return RowVerdict(verdict, labels, rivals, (), labels, (), undecided)
    if len(readings) == 1 and readings[0] in shown:
        return RowVerdict(EXCHANGED, readings[0], (), misfits, readings[0], (), ())
    if readings:
        return RowVerdict(AMBIGUOUS, labels, tuple(readings), misfits, labels, misfits, ())
    tried = [labels, *shown, *(_swap(width, pair) for pair in pairs)]
    tried = [r for r in tried if set(_moved(r)) <= set(movable)]
    nearest = min(tried, key=lambda r: len(_misfits(fits, r)))
    return RowVerdict(NEITHER, labels, (), misfits, nearest, _misfits(fits, nearest), ())


def _exchange(
    reading: Reading, rows: int, misfitting: int, ns: Sequence[int], decimals: Sequence[int]
) -> Exchange:
    columns = _moved(reading)
    by_chance = math.prod(
        max(
            chance(ns[i], ns[reading[i]], decimals[i]), chance_of_print(ns[reading[i]], decimals[i])
        )
        for i in columns
    )
    # Of 3 to 6 columns 2, 9, 44 and 265 permutations leave none in place.
    tried = sum(a != b for a, b in combinations(ns, 2))
    tried += sum(math.comb(len(ns), m) * (2, 9, 44, 265)[m - 3] for m in range(3, len(columns) + 1))
    # A row's chance is above 0: 0 of n and n of n are percentages of every benchmark.
    whole = math.log10(tried * math.comb(misfitting, rows)) + rows * math.log10(by_chance)
    return Exchange(reading, columns, (), 0, by_chance, min(0.0, whole))
