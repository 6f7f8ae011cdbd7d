"""The process that compares answers as mathematics: JSON lines in, JSON lines out.

Run as a script by `judge`, never imported by it: sympy, and whatever a hostile answer makes it
allocate, stay in here.  Imports nothing of resa-lens, so that no path has to be set up, and any
Python with math-verify can run it.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

POINTS = (
    (3, 5, 7, 11, 13, 17),
    (29, 2, 19, 31, 5, 23),
    (-3, 7, -2, 5, -11, 13),
    (-7, -5, -13, -2, -3, -17),
)
"""Numerators of the values that variables get; over 4, so that nothing is special about them."""
DIGITS = 400
"""Significant digits to which numbers that are no fractions are told apart."""


LARGEST = 1_000_000
"""Bits of a number up to which powers and factorials are computed."""


class Unreadable(Exception):  # noqa: N818 - it is the answer that is not readable
    """An answer is no single expression."""


class TooLarge(Exception):  # noqa: N818
    """A number in an answer is too large to be computed."""


class Expired(BaseException):
    """The time is over; no `except Exception` of a library may swallow it."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise Expired in the block when the seconds are over."""

    def expire(*_: object) -> None:
        raise Expired

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Comparer:
    """The operations, with sympy loaded."""

    def __init__(self, timeout: int) -> None:
        from latex2sympy2_extended.latex2sympy2 import (
            NormalizationConfig,
            latex2sympy,
            normalize_latex,
        )

        self._config = NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none",
            equations=False,
        )  # fmt: skip
        self._latex2sympy, self._normalise = latex2sympy, normalize_latex
        self.timeout = timeout

    def verify(self, prediction: str, gold: str) -> bool:
        """Return math-verify's verdict."""
        from math_verify import parse, verify

        target = parse(f"\\boxed{{{gold}}}", parsing_timeout=self.timeout)
        parsed = parse(f"\\boxed{{{prediction}}}", parsing_timeout=self.timeout)
        return bool(verify(target, parsed, timeout_seconds=self.timeout))

    def verify_text(self, text: str, gold: str) -> bool:
        """Return math-verify's verdict on a whole text, with its own extraction."""
        from math_verify import parse, verify

        target = parse(f"\\boxed{{{gold}}}", parsing_timeout=self.timeout)
        return bool(verify(target, parse(text, parsing_timeout=self.timeout)))

    def extract(self, text: str, letters: str) -> str | None:
        """Return what lighteval's patterns, kept in math-verify, find in a text.

        Args:
            text: a text without its thoughts.
            letters: the options, or "" where the answer is an expression.
        """
        from math_verify import (
            ExprExtractionConfig,
            LatexExtractionConfig,
            StringExtractionConfig,
            parse,
        )

        configs: list[Any] = (
            [StringExtractionConfig(strings=tuple(letters), lowercase=False)]
            if letters
            else [ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)]
        )
        parsed = parse(text, configs, parsing_timeout=self.timeout)
        return str(parsed[-1]) if parsed else None

    def equal(self, prediction: str, gold: str) -> bool:
        """Return whether two expressions are equal for all values of their variables."""
        with limited(self.timeout):
            return self._equal(prediction, gold)

    def proportional(self, prediction: list[str], gold: list[str]) -> int:
        """Return the sign of the constant by which left minus right differ, 0 for none."""
        with limited(self.timeout):
            return self._proportional(prediction, gold)

    def _read(self, latex: str) -> Any:
        import sympy

        text = self._normalise(latex, config=self._config)
        try:
            # Real, as math-verify takes it; degrees stay what they are.
            value = self._latex2sympy(
                text, is_real=True, convert_degrees=False, normalization_config=None
            )
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # whatever the grammar's parser meets
            raise Unreadable(latex) from error
        if not isinstance(value, sympy.Expr):
            raise Unreadable(latex)
        self._check_size(value)
        value = value.doit()
        # A decimal is exactly what is written.
        value = value.replace(lambda part: part.is_Float, lambda part: sympy.Rational(str(part)))
        if "\\sum" not in latex and "\\prod" not in latex:
            value = value.subs({s: sympy.I for s in value.free_symbols if s.name == "i"})
        return value

    def _check_size(self, value: Any) -> None:
        import sympy

        for part in sympy.preorder_traversal(value):
            bits = 0.0
            if isinstance(part, sympy.Pow) and not part.free_symbols:
                base, exponent = (abs(sympy.N(arg, 5)) for arg in part.args)
                bits = exponent * sympy.log(2 + base, 2)
            elif isinstance(part, sympy.factorial) and not part.free_symbols:
                argument = abs(sympy.N(part.args[0], 5))
                bits = argument * sympy.log(2 + argument, 2)
            elif isinstance(part, sympy.Pow) and part.args[1].is_number:
                bits = 100 * abs(sympy.N(part.args[1], 5))
            if not bits < LARGEST:
                raise TooLarge

    def _equal(self, prediction: str, gold: str) -> bool:
        a, b = self._read(prediction), self._read(gold)
        if a == b:
            return True
        return all(self._zero(*pair) for pair in self._at_points(a, b))

    def _at_points(self, a: Any, b: Any) -> list[tuple[Any, Any]]:
        """Return both at every point where they are defined and, if either can be, real."""
        import sympy

        symbols = sorted(a.free_symbols | b.free_symbols, key=str)
        if not symbols:
            return [(a, b)]
        if len(symbols) > len(POINTS[0]):
            raise Unreadable("too many variables")
        pairs = []
        for number, point in enumerate(POINTS):
            values = {s: sympy.Rational(p, 4) for s, p in zip(symbols, point, strict=False)}
            pair = a.subs(values), b.subs(values)
            bad = any(p.has(sympy.nan, sympy.zoo, sympy.oo) or p.free_symbols for p in pair)
            # Roots and logarithms of negative numbers depend on a branch that nobody means.
            if number > 1 and (bad or any(p.is_real is False for p in pair)):
                continue
            if bad:
                raise Unreadable("not defined")
            pairs.append(pair)
        return pairs

    def _zero(self, a: Any, b: Any) -> bool:
        """Return whether two numbers are equal: fractions exactly, others to `DIGITS`."""
        import sympy

        if a == b:
            return True
        if a.is_Rational and b.is_Rational:
            return False
        if any(n.has(sympy.oo, sympy.nan, sympy.zoo) for n in (a, b)):
            return False
        value = (a - b).evalf(20, maxn=DIGITS * 4)
        size = max(abs(a.evalf(20)), abs(b.evalf(20)), sympy.Integer(1))
        return bool(abs(value) < size * sympy.Float(10) ** (-DIGITS // 2))

    def _proportional(self, prediction: list[str], gold: list[str]) -> int:
        import sympy

        sides = [[self._read(side) for side in pair] for pair in (prediction, gold)]
        a, b = (left - right for left, right in sides)
        if not a.free_symbols or a.free_symbols != b.free_symbols:
            return 0
        quotients = []
        for first, second in self._at_points(a, b):
            if second == 0 or first == 0:
                if first != second:
                    return 0
                continue
            quotients.append(first / second)
        if len(quotients) < 2 or not all(self._zero(q, quotients[0]) for q in quotients[1:]):
            return 0
        return int(sympy.sign(quotients[0].evalf(20)))


def serve(memory: int, timeout: int) -> None:
    """Answer requests until stdin ends: a value, or why there is none."""
    with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    comparer = Comparer(timeout)

    # Other prints must not be taken for an answer.
    replies, sys.stdout = sys.stdout, sys.stderr
    _reply(replies, {"value": f"math-verify {version('math-verify')}"})
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            reply = {"value": getattr(comparer, name)(*arguments)}
        except Unreadable:
            reply = {"value": 0 if name == "proportional" else False}
        except Expired:
            reply = {"failed": f"took more than {timeout} s"}
        except (MemoryError, RecursionError, TooLarge):
            reply = {"failed": f"would take more than {memory >> 20} MB"}
        except (ArithmeticError, TypeError, ValueError, AttributeError, NotImplementedError):
            # sympy, on what is no number: not equal.
            reply = {"value": 0 if name == "proportional" else False}
        _reply(replies, reply)


def _reply(replies: Any, value: dict[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
