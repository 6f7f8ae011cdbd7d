r"""Find the answer in a generated text and compare it with the gold answer.

Strings decide first and math-verify only what they leave open, because it costs milliseconds, and
seconds on hostile input such as `9^{9^9}`; it runs in a process of its own (see `judge`).
"""

from __future__ import annotations

import re

from resa_lens.evals.judge import JUDGE
from resa_lens.prompts import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

MAX_TEXT = 20_000
"""Characters of a text, counted from its end, in which the answer is looked for."""
MAX_ANSWER = 1_000
"""Characters of an answer, counted from its end, that are compared."""

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
    marked = boxed(tail) + [(m.start(), m.group(1)) for m in _ANSWER.finditer(tail)]
    if marked:
        return _clean(max(marked)[1])
    lines = [] if unfinished else [line for line in tail.splitlines() if line.strip()]
    return _clean(lines[-1]) if lines else None


def boxed(text: str) -> list[tuple[int, str]]:
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
        RunFailedError: the process that compares answers does not start.
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
    return JUDGE.equal(found[-MAX_ANSWER:], wanted[-MAX_ANSWER:])


def _plain(integer: str) -> str:
    """Return an integer's digits without leading zeros: no int(), whose length is limited."""
    digits = integer.lstrip("-").lstrip("0")
    return f"-{digits}" if integer.startswith("-") and digits else digits


_OPTION = r"([A-Z])(?=\s{0,9}(?:$|[).:,;}\]$*<\n]))"
"""A letter that stands alone: not the article of "A mass of 5"."""
_LETTER = re.compile(
    r"^[\s($*{\[]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?(?:option\s+|choice\s+)?\(?"
    + _OPTION,
    re.IGNORECASE,
)
_SAID = re.compile(r"answer\s{0,9}(?:is|:)\s{0,9}[($*{]{0,9}" + _OPTION, re.IGNORECASE)


def extract_letter(text: str) -> str | None:
    r"""Return the option that a generated text chooses, as a capital letter, or None.

    The extracted answer counts where it begins with a letter that stands alone ("C", "(c)",
    `\text{C}`, "C) the mass"), else the last "answer is C" or "Answer: C" in it.
    """
    answer = extract_answer(text)
    if answer is None:
        return None
    found = _LETTER.match(answer)
    if found is None:
        said = list(_SAID.finditer(answer[-MAX_ANSWER:]))
        found = said[-1] if said else None
    return found.group(1).upper() if found else None


def is_chosen(prediction_text: str, gold: str) -> bool:
    """Return whether a generated text chooses the option with the gold letter."""
    return extract_letter(prediction_text) == gold.strip().upper()
