r"""Find the answer in a generated text, wherever it says it plainly.

Three ways by name: `resa` takes the last marked answer (a box, answer tags, "####"), else what the
text says to be its answer, else its last line; `boxed` takes the last box and nothing else;
`lighteval` takes what lighteval's patterns find.
"""

from __future__ import annotations

import re

from resa_lens.evals.config import Extraction as Extraction
from resa_lens.evals.judge import JUDGE
from resa_lens.evals.numbers import Number
from resa_lens.evals.values import Ratio, read_value
from resa_lens.texts.prompts import ANSWER_CLOSE, ANSWER_OPEN, THINK_OPEN

MAX_TEXT = 100_000
"""Characters of a text, counted from its end, in which the answer is looked for."""

_ANSWER = re.compile(
    f"{re.escape(ANSWER_OPEN)}((?:(?!{re.escape(ANSWER_OPEN)}).)*?)(?:{re.escape(ANSWER_CLOSE)}|$)",
    re.DOTALL,
)
_BRACE = re.compile(r"\\f?box(?:ed)?\s*\{|\\[{}]|[{}]")
_BARE_BOX = re.compile(r"\\f?boxed\s*(-?[\w.,/]+|\$[^$\n]+\$)")
_OPEN_BOX = re.compile(r"\\f?boxed\s*\{")
_HASHES = re.compile(
    r"^[ \t]*####[ \t]*((?:[-+$\\(\[]|\d(?!\d?\.[ \t]+[A-Za-z])|\.\d)[^\n]*)$", re.MULTILINE
)
_EMPTY_MARK = re.compile(r"\\f?boxed\s*\{\s*\}?|</?answer>")
_THOUGHT = re.compile(r"</(?:think(?:ing)?|thought|reasoning)>|\[/THINK\]|\u25c1/think\u25b7")
_CHANNEL, _FINAL = "<|channel|>", "<|channel|>final<|message|>"
_END_OF_TEXT = re.compile(
    r"(?<=\S)\s*(?:<[|\uff5c](?:endoftext|im_end|eot_id|end_of_text|end\u2581of\u2581sentence|eom_id"
    r"|return)[|\uff5c]>|</s>|<end_of_turn>|<eos>)"
)
_SPECIAL = re.compile(
    r"<[|\uff5c][^<>\n]{1,40}[|\uff5c]>|</?s>|<(?:end_of_turn|start_of_turn|eos|pad|bos)>"
)
_BETWEEN = re.compile(
    r"(?=.*(?:,|;|and|or))(?:[\s$.,;*]|and|or|\\text\{\s*(?:and|or)\s*\}|\\q?quad|\\[()\[\]]"
    r"|[A-Za-z](?:_\d)?\s*=)*",
    re.DOTALL,
)
_BETWEEN_LENGTH = 40
_LINE_LENGTH = 400
_CUES = 64
"""Places that say "the answer is" which are looked at, counted from the end."""

_FENCE = re.compile(r"^[ \t]*```[\w-]*[ \t]*$|```", re.MULTILINE)
_DISPLAY = re.compile(
    r"\\\[(.{0,2000}?)\\\]|\$\$(.{0,2000}?)\$\$|\\\(([^\n]{0,2000}?)\\\)", re.DOTALL
)
_EMPHASIS = re.compile(r"(?<![\w*\\)])\*(?=[^\s*])([^*\n]{1,200}?)(?<=\S)\*(?![\w*(])")
_CONCLUSION = re.compile(r"\W*(?:so|therefore|thus|hence|finally|in total)\b", re.IGNORECASE)
_CLOSING = re.compile(
    r"\b(?:hopes?|helps?|let me know|feel free|questions?|thanks?|thank you|good luck|confident"
    r"|clear|clarif\w+|done|anything else|further|welcome|glad|happy|enjoy|check(?:ed)?|verif\w+"
    r"|correct|explanation|cheers)\b|!$",
    re.IGNORECASE,
)
_STRONG = re.compile(r"\*\*([^*\n]{1,200})\*\*|`([^`\n]{1,200})`")
_HEADING = re.compile(r"^[ \t]*(?:#{1,6}|>)[ \t]+", re.MULTILINE)
_CUE = re.compile(
    r"\b(?:answers?|ans|solutions?|result)\b([^\n.:=\uff1a?]{0,80}?)"
    r"(?:[ \t]*[:=\uff1a][ \t]*|[ \t]+(?:is|are|equals?|was|be|becomes)\b[:\uff1a]?[ \t]*)",
    re.IGNORECASE,
)
NEGATION = re.compile(
    r"\b(?:not|cannot|never|neither|nor|wrong|incorrect|false|isn't|aren't|can't|wasn't|doesn't"
    r"|don't|won't|rather than|instead of|unlikely|rule[sd]? out|eliminate[sd]?|exclude[sd]?)\b",
    re.IGNORECASE,
)
_END = re.compile(
    r"[.!?](?=[\s\"')\]]|$)|;(?=\s)|\n|\s(?:because|since|where|when|which|so|given|assuming|after"
    r"|who|if|obtained|meaning|as)\b|,\s*(?:because|since|as|where|which|so|but|not|given|that"
    r"|the|meaning|giving|with|i\.e|obtained|rounded)\b|\s(?:\u2014|\u2013|--)\s|\s\((?=[a-z]{3})"
    r"|\s-\s(?=[a-z]{3})"
)
_FILLER = re.compile(
    r"^(?:[\s:]|(?:therefore|thus|then|simply|just|exactly|equal to|given by|indeed|now|clearly"
    r"|hence|also|actually|approximately|about|around|roughly|found to be|as follows|to be"
    r"|the (?:number|value|integer|expression|fraction|result))\b)+[,:]?\s*",
    re.IGNORECASE,
)
_NO_VALUE_WORDS = (
    "correct right verified consistent confirmed reasonable clear unique valid unclear unknown "
    "wrong obvious this that it below above here follows required needed complete found"
)
_NO_VALUES = frozenset(_NO_VALUE_WORDS.split())
_CLOSED = re.compile(
    r"\b(?:no (?:real )?solutions?|none|undefined|does not exist|infinite(?:ly many)?|impossible"
    r"|empty set)\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:[$\u20ac\u00a3]\s?)?\d[\d,]*(?:\.\d+)?(?:\s?/\s?\d+)?(?:\s?%)?(?![\w])"
)
_DOUBT = re.compile(
    r"\b(?:at least|at most|more than|less than|maybe|could|might|may|perhaps|if|between|either"
    r"|guess|try|let|suppose|assume)\b|\?",
    re.IGNORECASE,
)
_ASIDE = re.compile(
    r"\b(?:steps?|questions?|problems?|options?|examples?|equations?|methods?|cases?|determine"
    r"|given)\b",
    re.IGNORECASE,
)


def final_part(text: str) -> tuple[str, bool]:
    """Return what a text says after its thoughts, and whether it came to say something.

    Special tokens are gone, and so is what stands behind the end of the text.  A text whose
    thoughts do not end, or that ends with them, is returned whole: only marked answers count in it.
    """
    if end := _END_OF_TEXT.search(text):
        text = text[: end.start()]
    if (place := text.rfind(_FINAL)) >= 0:
        return _SPECIAL.sub("", text[place + len(_FINAL) :])[-MAX_TEXT:], True
    ends = [match.end() for match in _THOUGHT.finditer(text)]
    opened = THINK_OPEN in text or _CHANNEL in text
    tail = _SPECIAL.sub("", text[ends[-1] :] if ends else text)
    complete = bool(tail.strip()) and (bool(ends) or not opened)
    return (tail if complete else _SPECIAL.sub("", text))[-MAX_TEXT:], complete


def boxed(text: str) -> list[tuple[int, str]]:
    r"""Return (start, content) of every brace-matched `\boxed{}`, in one pass over the text."""
    return [(start, content) for start, _, content in _boxes(text)]


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Return (start, end, content) of every box, in the order in which they end."""
    boxes: list[tuple[int, int, str]] = []
    opened: list[tuple[int, int] | None] = []
    for match in _BRACE.finditer(text):
        token = match.group()
        if token.startswith(("\\b", "\\f")):
            opened.append((match.start(), match.end()))
        elif token == "{":  # noqa: S105
            opened.append(None)
        elif token == "}" and opened:  # noqa: S105
            box = opened.pop()
            if box is not None:
                boxes.append((box[0], match.end(), text[box[1] : match.start()]))
    return boxes


def last_box(text: str) -> str | None:
    r"""Return the content of the last box that holds something, with those it is joined to.

    `\boxed{2} and \boxed{3}` is one answer, "2, 3".  A box without braces, or one that the end of
    the text left open, counts where there is no other.
    """
    closed = _boxes(text)
    boxes = [box for box in closed if box[2].strip()]
    if not boxes:
        if bare := list(_BARE_BOX.finditer(text)):
            return bare[-1][1]
        starts = {start for start, _, _ in closed}
        opened = [match for match in _OPEN_BOX.finditer(text) if match.start() not in starts]
        return text[opened[-1].end() :].strip() or None if opened else None
    boxes.sort()
    start, _, content = boxes.pop()
    contents = [content.strip()]
    while boxes and boxes[-1][1] <= start <= boxes[-1][1] + _BETWEEN_LENGTH:
        if not _BETWEEN.fullmatch(text[boxes[-1][1] : start]):
            break
        start, _, content = boxes.pop()
        contents.insert(0, content.strip())
    return ", ".join(dict.fromkeys(contents))


def marked_answer(text: str) -> str | None:
    """Return the last answer that a box, answer tags or "####" mark and that is not empty."""
    places = [(m.start(), m.group(1)) for m in _ANSWER.finditer(text) if m.group(1).strip()]
    places += [(m.start(), m.group(1)) for m in _HASHES.finditer(text)]
    starts = [start for start, _, content in _boxes(text) if content.strip()]
    starts += [match.start() for match in _BARE_BOX.finditer(text)]
    last = max(places, default=None)
    if starts and (last is None or max(starts) > last[0]):
        return last_box(text)
    if last is None:
        return last_box(text)
    inner = last_box(last[1])
    return inner or (spoken_answer(last[1]) if len(last[1].split()) > 1 else last[1].strip())


def extract_answer(text: str, extraction: Extraction = "resa") -> str | None:
    """Return the answer of a generated text, or None where it holds none.

    Only what follows the thoughts counts; a text whose thoughts never end counts as a whole, but
    then only a marked answer is taken.

    Args:
        text: a generated text.
        extraction: by whose rules.

    Raises:
        RunFailedError: the process that reads for `lighteval` does not start.
    """
    tail, complete = final_part(text)
    if extraction == "boxed":
        return last_box(tail)
    if extraction == "lighteval":
        return JUDGE.extract(tail) if complete else None
    if marked := marked_answer(tail):
        return marked
    return spoken_answer(_EMPTY_MARK.sub("", tail)) if complete else None


def plain(text: str) -> str:
    """Return a text without its markdown, with display math on lines of their own."""
    text = _FENCE.sub("\n", re.sub(r"\\text(?:bf|it)?\{([^{}\n]*)\}", r"\1", text))
    text = _DISPLAY.sub(_inline, text)
    text = _HEADING.sub("", re.sub(r"\*\*|(?<![A-Za-z0-9])__|__(?![A-Za-z0-9])|`", "", text))
    return _EMPHASIS.sub(r"\1", text)


def _inline(match: re.Match[str]) -> str:
    content = " ".join((match[1] or match[2] or match[3] or "").split())
    return f"${content}$" if content else ""


def spoken_answer(text: str) -> str | None:
    """Return what an unmarked text says to be its answer, else what its last line says."""
    written, text = text, plain(text)
    values = [
        value for match in list(_CUE.finditer(text))[-_CUES:] if (value := _said(text, match))
    ]
    telling = [value for value in values if re.search(r"\d|\\|\$", value) or _is_short(value)]
    if telling or values:
        return (telling or values)[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    for line in reversed(lines[-6:]):
        if len(line) > _LINE_LENGTH:
            break
        if _is_value(line):
            return line
        if value := _only_value(line):
            # What is in bold outweighs a later remark, not a later conclusion.
            return value if _CONCLUSION.match(line) else _emphasised(written) or value
        if re.search(r"\d|\$", line) or not _CLOSING.search(line):
            break
    return _emphasised(written) or lines[-1]


def _emphasised(text: str) -> str | None:
    """Return the value in bold or as code of the last line that has just one such."""
    for line in reversed([line for line in text.splitlines() if line.strip()][-6:]):
        spans = [bold or code for bold, code in _STRONG.findall(line)]
        values = [span for span in spans if _is_value(span)]
        if len(values) == 1 and not NEGATION.search(line) and not _DOUBT.search(line):
            return values[0]
    return None


def _is_short(value: str) -> bool:
    return len(value.strip("(). ")) == 1 or bool(_CLOSED.search(value))


def _said(text: str, cue: re.Match[str]) -> str | None:
    """Return what stands behind "the answer is", or None where that is no value."""
    if NEGATION.search(cue[1]):
        return None
    rest = text[cue.end() : cue.end() + 2_000]
    if rest[: rest.find("\n") if "\n" in rest else None].strip() in ("", "$"):
        rest = rest.lstrip()
    value = clause(_FILLER.sub("", rest, count=1))
    words = value.lower().split()
    if not words or NEGATION.match(value) or rest[len(value) :][:1] == "?":
        return None
    if (parts := re.split(r"\s(?:is|are|equals)\s", value))[1:]:
        value = parts[-1].strip()
    if len(words) == 1 and words[0] in _NO_VALUES:
        return None
    return value if re.search(r"\d|\\|\$", value) or len(words) <= 6 else None


def clause(text: str) -> str:
    """Return the beginning of a text up to where its clause ends; math is not cut."""
    math = r"\$[^$\n]*\$|(?<!\s)\([^()\n]*\)|\((?![a-z]{3})[^()\n]*\)"
    hidden = re.sub(math, lambda m: "\1" * len(m.group()), text)
    end = _END.search(hidden, 1 if hidden[:1] in ".-" else 0)
    return text[: end.start() if end else None].strip()


def _is_value(line: str) -> bool:
    """Return whether a line is an answer and nothing else."""
    if not re.search(r"\d|\\|\$|^\W*[A-Za-z]\W*$", line):
        return False
    value = read_value(line)
    return isinstance(value, Number | Ratio) or (
        value is not None and not re.search(r"(?<!\\)\b(?!and\b|or\b)[A-Za-z]{2,}", line)
    )


def _only_value(line: str) -> str | None:
    """Return the one formula or number of a concluding sentence, such as "She has 5 left."."""
    if any(pattern.search(line) for pattern in (NEGATION, _DOUBT, _ASIDE)):
        return None
    formulas = re.findall(r"\$[^$\n]+\$", line)
    rest = re.sub(r"\$[^$\n]+\$", " ", line)
    numbers = _NUMBER.findall(rest)
    if len(formulas) == 1 and not numbers:
        return formulas[0].strip("$")
    if formulas:
        return None
    if "=" in rest:
        return _equation(rest)
    return numbers[0] if len(numbers) == 1 else None


def _equation(sentence: str) -> str:
    """Return the equation with which a sentence ends: of "so we get 3 + 4 = 7." that from 3 on."""
    words = sentence.split()
    start = next(i for i, word in enumerate(words) if "=" in word)
    while start and re.fullmatch(r"[-+*/^=]|.?|[^A-Za-z]*\d[^A-Za-z]*", words[start - 1]):
        start -= 1
    if words[start] == "=" and start:
        start -= 1
    return " ".join(words[start:]).rstrip(".!")
