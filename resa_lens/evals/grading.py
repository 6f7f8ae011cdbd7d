r"""Find the answer in a generated text and compare it with the gold answer.

Strings decide first and math-verify only what they leave open, because it costs milliseconds, needs
the main thread, and spends seconds on hostile input such as `9^{9^9}`.
"""

from __future__ import annotations

import re
import threading

from resa_lens.prompts import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

MAX_TEXT = 20_000
"""Characters of a text, counted from its end, in which the answer is looked for."""
MAX_ANSWER = 1_000
"""Characters of an answer, counted from its end, that are compared."""
TIMEOUT_S = 3
"""Seconds for each of math-verify's three steps: it gives up and the answer counts as wrong."""

_ANSWER = re.compile(
    f"{re.escape(ANSWER_OPEN)}((?:(?!{re.escape(ANSWER_OPEN)}).)*?)(?:{re.escape(ANSWER_CLOSE)}|$)",
    re.DOTALL,
)
_BRACE = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_LABEL = re.compile(r"^\s*(?:final\s+)?answer\s*[:=]\s*", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<![\d.,])[+-]?\d{1,3}(?:,\d{3})+(?![\d,])")
_INTEGER = re.compile(r"-?\d+")


def extract_answer(text: str) -> str | None:
    r"""Return the answer of a generated text, or None where it holds none.

    Only what follows the last `</think>` counts; a text whose `<think>` is never closed counts
    as a whole, but then only a marked answer is taken.  The last marked answer wins: a
    brace-matched `\boxed{...}`, or `<answer>...</answer>`, also one left open at the end.  Without
    a mark the last line that is not empty is the answer.  A leading "Answer:" is dropped.
    """
    closed = text.rfind(THINK_CLOSE)
    unfinished = closed < 0 and THINK_OPEN in text
    tail = text[closed + len(THINK_CLOSE) :] if closed >= 0 else text
    tail = tail[-MAX_TEXT:]
    marked = _boxed(tail) + [(m.start(), m.group(1)) for m in _ANSWER.finditer(tail)]
    if marked:
        return _clean(max(marked)[1])
    lines = [] if unfinished else [line for line in tail.splitlines() if line.strip()]
    return _clean(lines[-1]) if lines else None


def _boxed(text: str) -> list[tuple[int, str]]:
    r"""Return (start, content) of every brace-matched `\boxed{}`, in one pass over the text."""
    found: list[tuple[int, str]] = []
    opened: list[tuple[int, int] | None] = []
    for match in _BRACE.finditer(text):
        token = match.group()
        if token.startswith(r"\boxed"):
            opened.append((match.start(), match.end()))
        elif token == "{":  # noqa: S105
            opened.append(None)
        elif token == "}" and opened:  # noqa: S105
            box = opened.pop()
            if box is not None:
                found.append((box[0], text[box[1] : match.start()]))
    return found


def _clean(answer: str) -> str | None:
    return _LABEL.sub("", answer.strip()).strip() or None


def normalise(answer: str) -> str:
    """Return an answer without dollars, thousands commas, leading plus, final period and spaces.

    A space between two digits stays: "3 1/2" is not "31/2".
    """
    bare = _THOUSANDS.sub(lambda m: m.group().replace(",", ""), answer.strip())
    bare = re.sub(r"\\?\$", "", bare).strip()
    bare = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", bare)
    return bare.removeprefix("+").removesuffix(".")


def is_correct(prediction_text: str, gold: str) -> bool:
    """Compare the answer extracted from a generated text with the gold answer.

    Equal strings after `normalise` are equal answers, different plain integers are not, and the
    rest is math-verify's: gold first, boxed, and with time-outs that count as wrong.

    Args:
        prediction_text: the generated text, or the bare answer.
        gold: the right answer, with or without a box.

    Raises:
        RuntimeError: math-verify is needed outside the main thread, where its time-outs cannot
            work and version 0.5.2 silently calls every answer wrong.
    """
    found = extract_answer(prediction_text)
    if found is None:
        return False
    wanted = extract_answer(gold) or gold
    prediction, target = normalise(found), normalise(wanted)
    if prediction == target:
        return bool(target)
    if not prediction or not target:
        return False
    if _INTEGER.fullmatch(prediction) and _INTEGER.fullmatch(target):
        return _plain(prediction) == _plain(target)
    return _equal_as_mathematics(found[-MAX_ANSWER:], wanted[-MAX_ANSWER:])


def _plain(integer: str) -> str:
    """Return an integer's digits without leading zeros: no int(), whose length is limited."""
    digits = integer.lstrip("-").lstrip("0")
    return f"-{digits}" if integer.startswith("-") and digits else digits


def _equal_as_mathematics(prediction: str, gold: str) -> bool:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            f"grading {prediction[:40]!r} needs math-verify, which works in the main thread only; "
            "grade there or in a subprocess"
        )
    # Imported here: it loads sympy, and most answers never need it.
    from math_verify import parse, verify

    target = parse(f"\\boxed{{{gold}}}", parsing_timeout=TIMEOUT_S)
    found = parse(f"\\boxed{{{prediction}}}", parsing_timeout=TIMEOUT_S)
    return bool(verify(target, found, timeout_seconds=TIMEOUT_S))
