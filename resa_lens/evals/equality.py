r"""Whether two answers say the same, exactly; what is unsure is not the same.

Forms are compared here and numbers exactly; only single expressions, and the sides of equations,
go to the judge, so that a wrong order, bound, sign or unit cannot pass as algebra.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

from resa_lens.evals.numbers import Number, equal_numbers
from resa_lens.evals.spelling import squeezed, tidy
from resa_lens.evals.values import (
    Equation,
    Expression,
    Inequality,
    Items,
    Ratio,
    Union,
    Value,
    Words,
    read_value,
)


class Algebra(Protocol):
    """What decides on expressions."""

    def equal(self, prediction: str, gold: str) -> bool:
        """Return whether two expressions are equal for all values of their variables."""
        ...

    def proportional(self, prediction: tuple[str, str], gold: tuple[str, str]) -> int:
        """Return the sign of the constant by which left minus right differ, 0 for none."""
        ...


def same_answers(prediction: str, gold: str, algebra: Algebra) -> bool:
    """Return whether two answers say the same.

    Args:
        prediction: an extracted answer.
        gold: the right one.
        algebra: decides on expressions.
    """
    answer, target = read_value(prediction), read_value(gold)
    if answer is None or target is None:
        return False
    if squeezed(tidy(prediction)) == squeezed(tidy(gold)):
        return True
    return _same(answer, target, algebra)


def _same(a: Value, b: Value, algebra: Algebra) -> bool:
    if isinstance(a, Equation) or isinstance(b, Equation):
        return _same_equations(a, b, algebra)
    if isinstance(a, Items) or isinstance(b, Items):
        return _same_items(a, b, algebra)
    if isinstance(a, Number) and isinstance(b, Number):
        return equal_numbers(a, b)
    if isinstance(a, Words) or isinstance(b, Words):
        return a == b
    if isinstance(a, Union) and isinstance(b, Union):
        return _matched(a.parts, b.parts, algebra)
    if isinstance(a, Inequality) and isinstance(b, Inequality):
        return a.strict == b.strict and (
            algebra.proportional((a.left, a.right), (b.left, b.right)) > 0
        )
    if isinstance(a, Ratio) or isinstance(b, Ratio):
        return _same_ratios(a, b)
    return _same_expressions(a, b, algebra)


def _same_expressions(a: Value, b: Value, algebra: Algebra) -> bool:
    if not isinstance(a, Number | Expression) or not isinstance(b, Number | Expression):
        return False
    if a.unit and b.unit and a.unit != b.unit:
        return False
    if "%" in (a.unit, b.unit):
        return False
    first, second = (v.latex if isinstance(v, Expression) else _latex(v) for v in (a, b))
    if first == second:
        return True
    # x and X are two variables, and computer algebra takes them for one.
    letters, others = _letters(first), _letters(second)
    if letters != others and {x.lower() for x in letters} == {x.lower() for x in others}:
        return False
    return algebra.equal(first, second)


def _latex(number: Number) -> str:
    value = number.value
    if isinstance(value, Fraction):
        text = str(value.numerator)
        return text if value.denominator == 1 else rf"\frac{{{text}}}{{{value.denominator}}}"
    sign, digits, exponent = value
    return rf"{sign}{digits} \cdot 10^{{{exponent}}}"


def _letters(latex: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", latex)))


def _side(text: str) -> Value:
    return read_value(text) or Expression("")


def _same_equations(a: Value, b: Value, algebra: Algebra) -> bool:
    if isinstance(a, Equation) and isinstance(b, Equation):
        if squeezed(a.left) == squeezed(b.left) and (
            _same(_side(a.right), _side(b.right), algebra)
        ):
            return True
        # x = 5 is not y = 5, but x = 5 - y is y = 5 - x.
        if a.named and b.named and not _letters(a.right + b.right):
            return False
        return algebra.proportional((a.left, a.right), (b.left, b.right)) != 0
    equation, value = (a, b) if isinstance(a, Equation) else (b, a)
    assert isinstance(equation, Equation)
    if isinstance(value, Equation | Inequality | Union | Words) and not equation.named:
        return False
    sides = [equation.right] if _is_quantity(equation) else []
    if equation.approximate and not equation.named:
        sides.append(equation.left)
    return any(
        _same(side, value, algebra) if equation is a else _same(value, side, algebra)
        for side in map(_side, sides)
        if not isinstance(side, Equation)
    )


def _is_quantity(equation: Equation) -> bool:
    """Return whether the right side is the answer: of `x = 5` and `2 + 3 = 5`, not of `2x = 10`.

    A left side that is neither a name nor free of variables is an equation to be solved, but for
    one without numbers, as `a + b = 7`.
    """
    if equation.named:
        return True
    letters, digits = _letters(equation.left), re.search(r"\d", equation.left)
    return not letters or (not digits and squeezed(equation.right) != "0")


def _same_items(a: Value, b: Value, algebra: Algebra) -> bool:
    if not isinstance(a, Items) or not isinstance(b, Items):
        single, other = (a, b) if isinstance(a, Items) else (b, a)
        assert isinstance(single, Items)
        alone = len(single.items) == 1 and not single.ordered
        return alone and _same(single.items[0], other, algebra)
    if len(a.items) != len(b.items):
        return False
    if a.ordered and b.ordered:
        return (a.opening, a.closing) == (b.opening, b.closing) and _in_order(a, b, algebra)
    names = [{i.left for i in v.items if isinstance(i, Equation)} for v in (a, b)]
    if sorted(map(len, names))[0] == 0 and max(map(len, names)) > 1:
        return _in_order(a, b, algebra)  # x = 2, y = 3 against 2, 3
    if not a.ordered and not b.ordered:
        return _matched(a.items, b.items, algebra)
    bracketed = a if a.ordered else b
    bare = b if a.ordered else a
    if bare.opening or "matrix" in bracketed.opening:
        return False
    # (2, 3) without its brackets; [2, 3] may be an interval, a longer list in brackets is none.
    pair = bracketed.opening == "(" and bracketed.closing == ")"
    longer = bracketed.opening == "[" and bracketed.closing == "]" and len(bracketed.items) > 2
    return (pair or longer) and _in_order(a, b, algebra)


def _in_order(a: Items, b: Items, algebra: Algebra) -> bool:
    return all(_same(x, y, algebra) for x, y in zip(a.items, b.items, strict=True))


def _matched(a: Sequence[Value], b: Sequence[Value], algebra: Algebra) -> bool:
    """Return whether every item has a partner of its own."""
    if len(a) != len(b):
        return False
    left = list(b)
    for item in a:
        partner = next((i for i, other in enumerate(left) if _same(item, other, algebra)), None)
        if partner is None:
            return False
        del left[partner]
    return True


def _same_ratios(a: Value, b: Value) -> bool:
    if isinstance(a, Ratio) and isinstance(b, Ratio):
        if a.unit and b.unit and a.unit != b.unit:
            return False
        if a.parts == b.parts:
            return True
    values = [_quotient(v) for v in (a, b)]
    return None not in values and values[0] == values[1]


def _quotient(value: Value) -> Fraction | None:
    """Return a ratio of two as a fraction; a time such as 12:30 is none."""
    if isinstance(value, Number) and isinstance(value.value, Fraction) and not value.unit:
        return value.value
    if not isinstance(value, Ratio) or len(value.parts) != 2 or value.unit:
        return None
    if re.fullmatch(r"\d{2}", value.parts[1]):
        return None
    over, under = (read_value(part) for part in value.parts)
    if not isinstance(over, Number) or not isinstance(under, Number):
        return None
    if not isinstance(over.value, Fraction) or not isinstance(under.value, Fraction):
        return None
    return over.value / under.value if under.value else None
