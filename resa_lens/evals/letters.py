r"""Find the option that a generated text chooses."""

from __future__ import annotations

import re

from resa_lens.evals.extraction import (
    NEGATION,
    Extraction,
    final_part,
    last_box,
    marked_answer,
    plain,
)

_HARNESS_OPTION = r"(?:\(([A-D])\)|([A-D]))"
_HARNESS_ALONE = rf"(?:^| )(?:\*\*)?{_HARNESS_OPTION}(?:\*\*)?(?:[.,:\uff1a]|\s:| |$)"
_HARNESS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?i:final answer is):?\s*{_HARNESS_OPTION}\.?\s?I hope",
        rf"(?i:final answer.{{0,100}}?)\s+is:?\s*{_HARNESS_OPTION}",
        rf"(?i:answer)\s?:.{{0,50}}?{_HARNESS_ALONE}",
        rf"(?i:answer).{{0,50}}?{_HARNESS_ALONE}",
        rf"^(?:\*\*)?{_HARNESS_OPTION}(?:\*\*)?(?:[.,:]| |$)",
        rf"\n(?:\*\*)?{_HARNESS_OPTION}(?:\*\*)?(?:[.,:]| |$)",
        _HARNESS_ALONE,
        _HARNESS_OPTION,
    )
)
"""Where lighteval 0.13 looks for one of four letters, the surest place first."""

_OPENING = r"[\s($\[{\"'*`\\]{0,6}"
_MACRO = r"(?:\\?(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|boxed|rm|bf)\s*\{\s*){0,3}"
_OPTION = (
    rf"(?:{_OPENING}{_MACRO}{_OPENING}(?:(?:the\s+)?(?:option|choice|letter|answer)\b\s*[:#]?\s*)?"
    rf"{_OPENING}{_MACRO}{_OPENING})(?<![A-Za-z])([A-Ja-j])(?![A-Za-z0-9])(?!')"
)
_FIRST = re.compile(_OPTION, re.IGNORECASE)
_CUE = re.compile(
    r"\b(?:answer|option|choice|letter|ans|solution)s?\b([^\n.:=\uff1a?]{0,80}?)"
    r"(?:[ \t]*[:=\uff1a\u2192]\s*|[ \t]+[-\u2013\u2014][ \t]+|\s+(?:is|be|was)\b[:\uff1a]?\s*)"
    r"(?:(?:therefore|thus|then|clearly|simply|indeed|definitely|most likely|likely|hence|given by"
    r"|the)\b[:,]?\s*)*",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"\b(?:i(?:'d| would| will|'ll)?\s+)?(?:choose|chose|pick|select|go(?:ing)? with|opt for"
    r"|settle on)\s+(?=[(\"'*`]?(?:option|choice|answer|[A-J]\b|[(\"'*`][A-J]\b))",
    re.IGNORECASE,
)
_CORRECT = re.compile(
    r"(?:\b(?:option|choice|answer)\s+)?[(\"'*]{0,3}\b([A-J])\b[)\"'*.:]{0,3}\s+(?:is|must be"
    r"|would be|seems|appears)\s+(?:(?:the|clearly|thus|therefore|definitely|indeed|most|best|only"
    r"|single|to be)\s+){0,4}(?:correct|right|best|true|answer|appropriate|accurate|valid|choice)\b"
)
_HEAD = re.compile(r"^[\s(\[*]{0,4}([A-J])(?:[).:\]*]{1,4}(?=\s|$)|\s*$|\s+[-=\u2013\u2014]\s)")
_LEAD = re.compile(
    r"^[\s(*]*(?:(?:therefore|thus|so|hence|then|option|choice|letter|it is|it's)\b[,:]?\s*)+",
    re.IGNORECASE,
)
_AFTER_A = re.compile(r"\s+(?!(?:because|since|as|is|for|and|or|but|which|by|with|\(|-)\b)[a-z]")
_MORE = re.compile(
    r"[)\]}.*\"'$]{0,4}\s*(?:,|/|&|and|or|,\s*and|,\s*or)\s*[(\[*]{0,3}(?:option\s+)?[A-J]"
    r"(?![A-Za-z0-9])"
)


def extract_letter(text: str, extraction: Extraction = "resa") -> str | None:
    r"""Return the option that a generated text chooses, as a capital letter, or None.

    A marked answer counts where it begins with a letter that stands alone ("C", "(c)", `\text{C}`,
    "C) the mass"), else the last "the answer is C" or "Answer: C", else "option C is correct" or a
    line that is an option.  A text that names several at once, or says which it is not, chooses
    none.

    Args:
        text: a generated text.
        extraction: by whose rules.
    """
    tail, complete = final_part(text)
    if extraction == "boxed":
        return _first(last_box(tail) or "")
    if extraction == "lighteval":
        return _harness_letter(tail) if complete else None
    marked = marked_answer(tail)
    if marked and (letter := _first(marked) or _spoken(marked)):
        return letter
    return _spoken(tail) if complete else None


def _first(answer: str) -> str | None:
    """Return the letter that an answer begins with, where it is an option and the only one."""
    match = _FIRST.match(answer)
    if match is None:
        return None
    letter, rest = match[1], answer[match.end() :]
    if _MORE.match(rest):
        return None
    ends = re.match(
        r"\s{0,9}(?:$|[).:,;}\]$*<\n`\"'\\=(]|[-\u2013\u2014]\s|because|since|as\b|is\b)", rest
    )
    if letter.islower() and not re.match(r"\s{0,9}(?:$|[).:;}\]$*<\n`\"'\\])", rest):
        return None  # an article, or a variable
    if letter in "AI" and not ends and (_AFTER_A.match(rest) or letter == "I"):
        return None  # an article, a pronoun
    return letter.upper()


def _spoken(text: str) -> str | None:
    text = plain(text)
    matches = [
        letter
        for cue in (_CUE, _CHOSEN)
        for match in cue.finditer(text)
        if not NEGATION.search(match.group()) and not _refused(text, match.start())
        and (letter := _first(text[match.end() : match.end() + 400].lstrip()))
    ]  # fmt: skip
    if matches:
        return matches[-1]
    correct = [
        match[1]
        for match in _CORRECT.finditer(text)
        if not NEGATION.search(match.group()) and not _refused(text, match.start())
    ]
    if correct:
        return correct[-1] if len(set(correct)) == 1 else None
    lines = [_LEAD.sub("", line) for line in text.splitlines() if line.strip()]
    bare = [line for line in lines if re.fullmatch(r"[\s($\[*]*([A-Ja-j])[\s)$\]*.:!]*", line)]
    if bare:
        return _first(bare[-1].strip())
    heads = [match[1] for line in lines if (match := _HEAD.match(line))]
    return heads[0] if heads and len(set(heads)) == 1 else None


def _refused(text: str, place: int) -> bool:
    """Return whether the words right before a place deny what follows."""
    before = re.split(r"[.\n,;]", text[max(0, place - 40) : place])[-1]
    return bool(NEGATION.search(before))


def _harness_letter(text: str) -> str | None:
    """Return the letter that lighteval 0.13 takes: the last in the surest place that has any."""
    for pattern in _HARNESS:
        if matches := list(pattern.finditer(text)):
            last = max(matches, key=lambda match: match.end())
            return last[1] or last[2]
    return None
