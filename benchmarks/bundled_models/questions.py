"""Procedurally generated arithmetic questions with verified answers and worked steps.

Seven families at four levels.  Levels 1 to 3 are trained on; level 4 (longer, larger numbers) is
out of distribution.  A question belongs to the test split by a hash of its own text, so train and
test cannot overlap whichever seeds draw them.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice

TRAIN_LEVELS = (1, 2, 3)
OUT_OF_DISTRIBUTION_LEVEL = 4
TEST_SHARE = 8
"""One question in this many belongs to the test split."""


@dataclass(frozen=True)
class Question:
    """One verified question: its text, the worked steps, the answer, its family and level."""

    question: str
    steps: str
    answer: str
    family: str
    level: int

    def to_dict(self) -> dict[str, str | int]:
        """Return the row that the data files hold."""
        return asdict(self)


Draft = tuple[str, list[str], int]
"""Question text, steps, answer."""


def _running_total(terms: list[int], signs: list[int]) -> list[str]:
    total, steps = terms[0], []
    for sign, term in zip(signs, terms[1:], strict=True):
        new = total + sign * term
        steps.append(f"{total}{'+' if sign > 0 else '-'}{term}={new}")
        total = new
    return steps


def _chain_sum(rng: random.Random, level: int) -> Draft:
    count = (3, 4, 5, 7)[level - 1]
    high = (40, 60, 90, 99)[level - 1]
    terms, signs = [rng.randint(high // 4, high)], []
    total = terms[0]
    for _ in range(count - 1):
        term = rng.randint(2, high)
        sign = 1 if term > total else rng.choice((1, -1))
        terms.append(term)
        signs.append(sign)
        total += sign * term
    text = str(terms[0]) + "".join(
        f"{'+' if s > 0 else '-'}{t}" for s, t in zip(signs, terms[1:], strict=True)
    )
    return f"What is {text}?", _running_total(terms, signs), total


def _place_values(number: int) -> list[int]:
    digits = str(number)
    return [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits) if d != "0"]


def _times_one_digit(number: int, digit: int) -> list[str]:
    """Steps of number x digit by place value: one partial product a place, then their sum."""
    parts = _place_values(number)
    steps = [f"{part}*{digit}={part * digit}" for part in parts]
    return steps + _running_total([p * digit for p in parts], [1] * (len(parts) - 1))


def _product(rng: random.Random, level: int) -> Draft:
    low_a, high_a = ((12, 49), (51, 99), (102, 499), (502, 2999))[level - 1]
    a, b = rng.randint(low_a, high_a), rng.randint(3, 9)
    return f"Multiply {a} by {b}.", _times_one_digit(a, b), a * b


def _expression(rng: random.Random, level: int) -> Draft:
    def bracket() -> tuple[str, str, int]:
        a, b = rng.randint(4, 15), rng.randint(2, 9)
        if a > b + 1 and rng.random() < 0.4:
            return f"({a}-{b})", f"{a}-{b}={a - b}", a - b
        return f"({a}+{b})", f"{a}+{b}={a + b}", a + b

    terms = (1, 1, 2, 3)[level - 1]
    text, steps, total = "", [], 0
    for index in range(terms):
        inner_text, inner_step, inner = bracket()
        factor = rng.randint(2, 9)
        value = inner * factor
        steps += [inner_step, f"{inner}*{factor}={value}"]
        if index == 0:
            text, total = f"{inner_text}*{factor}", value
            continue
        sign = "-" if value <= total and rng.random() < 0.5 else "+"
        new = total - value if sign == "-" else total + value
        steps.append(f"{total}{sign}{value}={new}")
        text, total = f"{text}{sign}{inner_text}*{factor}", new
    if level == 2:
        extra = rng.randint(5, 60)
        sign = "-" if extra <= total and rng.random() < 0.5 else "+"
        new = total - extra if sign == "-" else total + extra
        steps.append(f"{total}{sign}{extra}={new}")
        text, total = f"{text}{sign}{extra}", new
    return f"Evaluate {text}.", steps, total


def _equation(rng: random.Random, level: int) -> Draft:
    x = rng.randint(2, (12, 20, 20, 60)[level - 1])
    a, b = rng.randint(2, 9), rng.randint(2, 40)
    if level == 1:
        c = a * x + b
        steps = [f"{a}*x={c}-{b}={c - b}", f"x={c - b}/{a}={x}"]
        return f"Solve {a}*x+{b}={c} for x.", steps, x
    if level == 2:
        low = rng.randint(1, a - 1)
        c = (a - low) * x + b
        k = a - low
        steps = [f"{a}-{low}={k}", f"{k}*x={c}-{b}={c - b}", f"x={c - b}/{k}={x}"]
        return f"Solve {a}*x+{b}={low}*x+{c} for x.", steps, x
    low = rng.randint(1, a - 1)
    shift = rng.randint(2, 9 if level == 3 else 30)
    c = a * (x + shift) - low * x
    k, ab = a - low, a * shift
    steps = [
        f"{a}*{shift}={ab}",
        f"{a}-{low}={k}",
        f"{k}*x={c}-{ab}={c - ab}",
        f"x={c - ab}/{k}={x}",
    ]
    return f"Solve {a}*(x+{shift})={low}*x+{c} for x.", steps, x


def _remainder(rng: random.Random, level: int) -> Draft:
    modulus = rng.randint(3, (9, 9, 12, 19)[level - 1])
    if level == 1:
        number = rng.randint(20, 99)
        text, steps = str(number), []
    elif level == 2:
        a, b = rng.randint(11, 80), rng.randint(11, 80)
        number = a + b
        text, steps = f"{a}+{b}", [f"{a}+{b}={number}"]
    else:
        high = 12 if level == 3 else 25
        a, b, c = rng.randint(4, high), rng.randint(3, 9), rng.randint(5, 60)
        number = a * b + c
        text, steps = f"{a}*{b}+{c}", [f"{a}*{b}={a * b}", f"{a * b}+{c}={number}"]
    multiple = number // modulus
    steps += [
        f"{modulus}*{multiple}={modulus * multiple}",
        f"{number}-{modulus * multiple}={number % modulus}",
    ]
    return f"What is the remainder of {text} divided by {modulus}?", steps, number % modulus


_NAMES = ("Ana", "Ben", "Cara", "Dan", "Eva", "Finn", "Gita", "Hugo")
_THINGS = ("apples", "books", "cards", "coins", "pens", "shells", "stamps", "stones")


def _word_problem(rng: random.Random, level: int) -> Draft:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    total = rng.randint(5, (20, 40, 60, 90)[level - 1])
    text, steps = f"{name} has {total} {thing}.", []
    for _ in range((2, 3, 4, 6)[level - 1]):
        kind = rng.choice(("buys", "gives", "finds", "loses"))
        if kind == "buys":
            bags, each = rng.randint(2, 9), rng.randint(2, 9)
            steps += [
                f"{bags}*{each}={bags * each}",
                f"{total}+{bags * each}={total + bags * each}",
            ]
            text += f" {name} buys {bags} bags of {each} {thing}."
            total += bags * each
            continue
        amount = rng.randint(2, 30)
        if kind != "finds" and amount > total:
            kind = "finds"
        sign = 1 if kind == "finds" else -1
        steps.append(f"{total}{'+' if sign > 0 else '-'}{amount}={total + sign * amount}")
        total += sign * amount
        clause = f"gives away {amount}" if kind == "gives" else f"{kind} {amount}"
        text += f" {name} {clause} {thing}."
    return f"{text} How many {thing} are left?", steps, total


def _count(rng: random.Random, level: int) -> Draft:
    numbers = [rng.randint(10, 99) for _ in range((4, 6, 8, 12)[level - 1])]
    bound = rng.randint(25, 75)
    steps, found = [], 0
    for number in numbers:
        found += number > bound
        steps.append(f"{number}{'>' if number > bound else '<='}{bound} {found}")
    listed = ", ".join(map(str, numbers))
    return f"How many of {listed} are greater than {bound}?", steps, found


FAMILIES: dict[str, Callable[[random.Random, int], Draft]] = {
    "chain_sum": _chain_sum,
    "product": _product,
    "expression": _expression,
    "equation": _equation,
    "remainder": _remainder,
    "word_problem": _word_problem,
    "count": _count,
}


def split_of(question: str) -> str:
    """Return "test" or "train" from a hash of the question's text alone."""
    digest = hashlib.sha256(question.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"


def check_steps(question: Question) -> bool:
    """Recompute each step exactly; all must hold and the last value must be the answer."""
    value = Fraction(0)
    for step in question.steps.split("; "):
        if question.family == "count":
            comparison, _, shown = step.rpartition(" ")
            left, sign, right = re.split(r"(<=|>)", comparison)
            greater = int(left) > int(right)
            if greater != (sign == ">") or Fraction(shown) != value + greater:
                return False
            value += greater
            continue
        values = {_exact(side) for side in step.split("=") if "x" not in side}
        if len(values) != 1:
            return False
        value = values.pop()
    return value == Fraction(question.answer)


def _exact(expression: str) -> Fraction:
    for operator, apply in (
        ("+", Fraction.__add__),
        ("-", Fraction.__sub__),
        ("*", Fraction.__mul__),
        ("/", Fraction.__truediv__),
    ):
        left, found, right = expression.rpartition(operator)
        if found and left:
            return apply(_exact(left), _exact(right))
    return Fraction(expression)


def draw(
    seed: int,
    split: str,
    levels: tuple[int, ...] = TRAIN_LEVELS,
    families: tuple[str, ...] = tuple(FAMILIES),
) -> Iterator[Question]:
    """Yield endless questions of one split, families and levels uniformly, deterministic by seed.

    Raises:
        ValueError: the split, a level or a family does not exist.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; use 'train' or 'test'")
    if unknown := set(families) - set(FAMILIES):
        raise ValueError(f"unknown families {sorted(unknown)}; choose from {sorted(FAMILIES)}")
    if not levels or not set(levels) <= {1, 2, 3, 4}:
        raise ValueError(f"levels are {levels}; use 1 to 4")
    rng = random.Random(f"{seed}/{split}/{levels}/{families}")
    while True:
        family, level = rng.choice(families), rng.choice(levels)
        text, steps, answer = FAMILIES[family](rng, level)
        if split_of(text) == split:
            yield Question(text, "; ".join(steps), str(answer), family, level)


def draw_unique(seed: int, split: str, per_level: dict[int, int]) -> list[Question]:
    """Return distinct questions, `per_level[level]` of each level, families in equal shares.

    A family whose questions of a level run out (short products) leaves its share to the others.
    """
    chosen: list[Question] = []
    seen: set[str] = set()
    for level, count in per_level.items():
        streams = {name: draw(seed, split, (level,), (name,)) for name in FAMILIES}
        left = count
        while left:
            for name in list(streams)[:left]:
                item = _unseen(streams[name], seen)
                if item is None:
                    del streams[name]
                    continue
                seen.add(item.question)
                chosen.append(item)
                left -= 1
    random.Random(seed).shuffle(chosen)
    return chosen


def _unseen(stream: Iterator[Question], seen: set[str], tries: int = 1000) -> Question | None:
    return next((q for q in islice(stream, tries) if q.question not in seen), None)
