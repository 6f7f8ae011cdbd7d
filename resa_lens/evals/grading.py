r"""Whether a generated text gives the right answer.

The answer is found (`extraction`, `letters`), read and compared exactly (`values`, `equality`);
math-verify's verdict on the same two answers stands beside, so that it can be seen where the two
differ.  Where they do, ours counts: it is the one that does not take a near miss for right.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from resa_lens.evals.equality import same_answers
from resa_lens.evals.extraction import Extraction, extract_answer, marked_answer
from resa_lens.evals.extraction import boxed as boxed
from resa_lens.evals.judge import JUDGE, UndecidedError
from resa_lens.evals.letters import extract_letter
from resa_lens.evals.spelling import squeezed, tidy

RULES = 2
"""Number of the rules of grading; raised when the same text may be judged otherwise."""
MAX_ANSWER = 10_000
"""Characters of an answer that is compared; a longer one is refused and counts as wrong."""

_INTEGER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Verdict:
    """What grading says of one text."""

    correct: bool
    answer: str | None
    """The extracted one."""
    math_verify: bool | None = None
    """Its verdict on the same answers; None for letters, and where there is no answer or it
    was refused."""
    refused: str | None = None
    """Why the answers were not compared to the end."""

    @property
    def differs(self) -> bool:
        """Whether math-verify says otherwise."""
        return self.math_verify is not None and self.math_verify != self.correct


def grade(
    text: str, gold: str, *, choice: bool = False, extraction: Extraction = "resa"
) -> Verdict:
    """Grade a generated text.

    Args:
        text: the text, with its thoughts.
        gold: the right answer: bare, in a box, or a worked solution that marks it.
        choice: whether the answer is an option's letter.
        extraction: by whose rules the answer is found.

    Raises:
        RunFailedError: the process that compares answers does not start.
    """
    if choice:
        letter = extract_letter(text, extraction)
        return Verdict(letter is not None and letter == gold_letter(gold), letter)
    answer = extract_answer(text, extraction)
    if answer is None:
        return Verdict(False, None)
    return compare_answers(answer, gold_answer(gold))


def compare_answers(answer: str, gold: str) -> Verdict:
    """Compare two answers; both are read entirely, or refused.

    Raises:
        RunFailedError: the process that compares answers does not start.
    """
    longest = max(len(answer), len(gold))
    if longest > MAX_ANSWER:
        reason = f"an answer of {longest:,} characters; at most {MAX_ANSWER:,} are compared"
        return Verdict(False, answer, refused=reason)
    first, second = squeezed(tidy(answer)), squeezed(tidy(gold))
    if not first or not second:
        return Verdict(False, answer)
    # Of equal strings and of plain integers math-verify has nothing else to say.
    if first == second:
        return Verdict(True, answer, math_verify=True)
    if _INTEGER.fullmatch(first) and _INTEGER.fullmatch(second):
        same = _plain(first) == _plain(second)
        return Verdict(same, answer, math_verify=same)
    try:
        correct = same_answers(answer, gold, JUDGE)
    except UndecidedError as error:
        return Verdict(False, answer, refused=f"the comparison {error}")
    return Verdict(correct, answer, JUDGE.verify(answer, gold))


def _plain(integer: str) -> str:
    """Return an integer's digits without leading zeros: no int(), whose length is limited."""
    digits = integer.lstrip("-").lstrip("0")
    return f"-{digits}" if integer.startswith("-") and digits else digits


def gold_answer(gold: str) -> str:
    """Return the answer that a gold cell marks, or all of it; `['70']` is 70."""
    text = gold.strip()
    if re.fullmatch(r"\[\s*(['\"]).*\1\s*\]", text, re.DOTALL):
        try:
            items = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            items = [text]
        text = ", ".join(map(str, items))
    return marked_answer(text) or text


def gold_letter(gold: str) -> str:
    """Return the letter of a gold cell: "C", "(c)" or "C." are C."""
    return extract_letter(gold) or gold.strip().upper()


def is_correct(prediction_text: str, gold: str) -> bool:
    """Compare the answer extracted from a generated text with the gold answer.

    Args:
        prediction_text: the generated text, or the bare answer.
        gold: the right answer, with or without a box.

    Raises:
        RunFailedError: the process that compares answers does not start.
    """
    return grade(prediction_text, gold).correct


def is_chosen(prediction_text: str, gold: str) -> bool:
    """Return whether a generated text chooses the option with the gold letter."""
    return grade(prediction_text, gold, choice=True).correct
