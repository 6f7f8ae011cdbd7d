r"""Questions with verified answers, out of a table's rows: the one reader for all stages.

Data sets keep the same three things in many forms: a worked solution whose result stands behind
"####" or in the last `\boxed{}`, message lists, and the nested columns of reinforcement-learning
data (verl's and DAPO's `reward_model.ground_truth`).  All of them become a `Record`; what is none
of them is refused by row, line and column.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from typing import Any

from resa_lens.errors import BadInputError
from resa_lens.texts.prompts import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN
from resa_lens.texts.tables import Row, header

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
QUESTION_COLUMNS = ("question", "problem", "prompt", "query")
ANSWER_COLUMNS = (
    "answer", "final_answer", "expected_answer", "ground_truth", "reward_model", "solution",
    "response", "completion",
)  # fmt: skip
STEPS_COLUMNS = (
    "steps", "solution", "rationale", "reasoning", "explanation", "extra_info.answer",
    "extra_info.solution",
)  # fmt: skip
TEXT_COLUMNS = ("text",)
_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant",
}  # fmt: skip
"""What message lists call the three who speak."""


@dataclass(frozen=True)
class Record:
    """A question with its verified answer, and the worked steps where the source has them."""

    question: str
    answer: str
    """The result alone."""
    steps: str = ""
    family: str = ""
    level: int = 0
    text: str = field(default="", repr=False)
    """Of a corpus of plain text: the document; question and answer are empty then."""


@dataclass(frozen=True)
class Columns:
    """Columns by what they hold; None is the first of the known names that a table has.

    A dot leads into an object: "reward_model.ground_truth".
    """

    question: str | None = None
    answer: str | None = None
    steps: str | None = None
    text: str | None = None
    """Of documents that are read as they are, where only text is needed."""

    def known_to(self, rows: Sequence[Mapping[str, Any]]) -> Columns:
        """Return the columns that a table has, for a second table beside the one they are of."""
        known = header(rows)
        names = {item.name: getattr(self, item.name) for item in fields(self)}
        return Columns(**{k: v for k, v in names.items() if v and _present(known, v)})


class _OddCellError(ValueError):
    """What is wrong with a cell."""


def records_of(
    rows: Sequence[Row], where: str, columns: Columns | None = None, *, plain: bool = True
) -> list[Record]:
    """Return the record of each row; arguments and errors are those of `reader_of`."""
    read = reader_of(header(rows), where, columns, plain=plain)
    return [read(row) for row in rows]


def reader_of(
    names: Sequence[str], where: str, columns: Columns | None = None, *, plain: bool = True
) -> RecordReader:
    """Return what makes records of a table's rows.

    Args:
        names: the columns that any of its rows has.
        where: the table's name, for messages.
        columns: where they have other names than the known ones.
        plain: whether a table of documents, with a column `text` in place of questions and
            answers, will do.

    Raises:
        BadInputError: no row, or a column that is missing; and from the reader, a cell that is
            empty or no text.
    """
    if not names:
        raise BadInputError(f"{where} is empty: it holds no question")
    columns = columns or Columns()
    has = f"it has {', '.join(names)[:200]}"
    for name in (columns.question, columns.answer, columns.steps, columns.text):
        if name and not _present(names, name):
            raise BadInputError(f"{where} has no column {name!r}; {has}")

    def first(name: str | None, known: Iterable[str]) -> str | None:
        return name or next((other for other in known if _present(names, other)), None)

    question = first(columns.question, (*QUESTION_COLUMNS, *MESSAGE_COLUMNS))
    in_messages = (question,) if question in MESSAGE_COLUMNS else ()
    answer = first(columns.answer, (*ANSWER_COLUMNS, *in_messages))
    text = first(columns.text, TEXT_COLUMNS)
    named = columns.question or columns.answer
    if plain and text and (columns.text or not (named or (question and answer))):
        return RecordReader(where, text=text)
    if not question or not answer:
        missing = ANSWER_COLUMNS if question else QUESTION_COLUMNS
        raise BadInputError(
            f"{where} has no column {' or '.join(map(repr, missing))}; {has}.\n"
            "Name the right ones by --question-column and --answer-column"
        )
    steps = (columns.steps,) if columns.steps else tuple(
        name for name in STEPS_COLUMNS if name != answer and _present(names, name)
    )  # fmt: skip
    return RecordReader(where, question, answer, steps, bool(columns.steps))


@dataclass(frozen=True)
class RecordReader:
    """The columns of one table, and how a row of it becomes a record."""

    where: str
    question: str = ""
    answer: str = ""
    steps: Sequence[str] = ()
    named: bool = False
    """Whether the column of steps is what the user named."""
    text: str = ""
    """Of a table of documents; the others are empty then."""

    def __call__(self, row: Row) -> Record:
        """Return a row's record.

        Raises:
            BadInputError: a cell that is empty or no text.
        """
        where, answer = self.where, self.answer
        if self.text:
            return Record("", "", text=_read(row, self.text, where, _text_of))
        problem = _read(row, self.question, where, _question_of)
        result, worked = split_worked(_read(row, answer, where, _answer_of))
        if not result:
            raise _refusal(row, answer, where, "the result is empty; remove the row or fill it")
        for name in self.steps:
            try:
                thought = _steps_of(cell(row, name))
            except _OddCellError as error:
                if self.named:
                    raise _refusal(row, name, where, str(error)) from error
                continue  # a foreign column of that name must not stop a run
            # Of a solution beside its answer the result is not a step.
            own = thought if name == "steps" else split_worked(thought)[1] or thought
            if own and own != result:
                worked = own
                break
        level = level_of(cell(row, "level")) or 0
        return Record(problem, result, worked, word_of(cell(row, "family")), level)


def _present(names: Sequence[str], name: str) -> bool:
    return name in names or _key(names, name.partition(".")[0]) is not None


def _key(names: Iterable[str], name: str) -> str | None:
    """Return a column's name as a table spells it: "Question" will do for "question"."""
    if name in names:
        return name
    return next((key for key in names if key.lower() == name), None)


def cell(row: Mapping[str, Any], name: str) -> Any:
    """Return what a row holds in a column, None where it has none; a dot leads into an object."""
    if (key := _key(row, name)) is not None:
        return row[key]
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _read(row: Row, name: str, where: str, convert: Any) -> str:
    try:
        text = convert(cell(row, name))
    except _OddCellError as error:
        raise _refusal(row, name, where, str(error)) from error
    if not text:
        raise _refusal(row, name, where, "empty; remove the row or fill it")
    return text


def _refusal(row: Row, name: str, where: str, reason: str) -> BadInputError:
    return BadInputError(f"{where}, {row.place}, column {name}: {reason}")


# Cells


def text_of(value: Any, *, number: bool = True) -> str:
    """Return a cell's text, "" where it is missing (null, NaN).

    Args:
        value: as JSON, parquet or CSV give it.
        number: whether a number will do.

    Raises:
        ValueError: of another type, or with half of a character; the message says which.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _OddCellError("a text with half of a character (a lone surrogate)") from error
        return value.strip()
    if number and (isinstance(value, int | Decimal) or _finite(value)):
        return str(value)
    kind = type(value).__name__
    if isinstance(value, list | Mapping):
        kind = "list" if isinstance(value, list) else "dict"
    raise _OddCellError(f"{str(value)[:60]} is of type {kind}, not a text; choose other columns")


def _finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _text_of(value: Any) -> str:
    return text_of(value, number=False)


def word_of(value: Any) -> str:
    """Return a cell's text, "" of what is none: a group's name must not stop a run."""
    try:
        return text_of(value)
    except _OddCellError:
        return ""


def _question_of(value: Any) -> str:
    messages = _messages(value)
    if messages is None:
        return _text_of(_only(value))
    users = [content for role, content, _ in messages if role == "user"]
    if len(users) != 1:
        raise _OddCellError(f"{len(users)} messages of the user; a record has one question")
    return users[0]


def _answer_of(value: Any) -> str:
    messages = _messages(value)
    if messages is not None:
        answers = [message for message in messages if message[0] == "assistant"]
        if len(answers) != 1:
            raise _OddCellError(f"{len(answers)} messages of the assistant; there is one answer")
        _, content, thought = answers[0]
        return f"{THINK_OPEN}{thought}{THINK_CLOSE}{content}" if thought else content
    value = _only(value)
    if isinstance(value, Mapping):
        if "ground_truth" not in value:
            keys = ", ".join(map(str, value))
            raise _OddCellError(f"an object with {keys}; name the one that counts, with a dot")
        return _answer_of(value["ground_truth"])
    text = text_of(value)
    if text.startswith('["'):  # a list that was written as JSON into a text
        with contextlib.suppress(ValueError):
            (alone,) = json.loads(text)
            return str(alone).strip()
    return text


def _steps_of(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(step, str) for step in value):
        return "\n".join(step.strip() for step in value if step.strip())
    return _text_of(value)


def _only(value: Any) -> Any:
    """Return what a list of one item holds, and anything else as it is."""
    if not isinstance(value, list):
        return value
    if len(value) > 1:
        raise _OddCellError(f"a list of {len(value)} items; a record has one")
    return _only(value[0]) if value else None


def _messages(value: Any) -> list[tuple[str, str, str]] | None:
    """Return (who, what, thoughts apart) of each message; None of what is no list of messages."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) for m in value):
        return None
    messages = []
    for message in value:
        role = next((message[key] for key in ("role", "from", "speaker") if key in message), None)
        content = next((message[key] for key in ("content", "value") if key in message), None)
        if role is None:
            return None
        if (who := _ROLES.get(str(role).strip().lower())) is None:
            raise _OddCellError(f"a message of {role!r}; messages are the user's or assistant's")
        if isinstance(content, list):  # of parts
            content = "".join(str(part.get("text") or "") if isinstance(part, Mapping) else
                              _text_of(part) for part in content)  # fmt: skip
        apart = next((message[key] for key in ("reasoning_content", "reasoning", "thinking")
                      if message.get(key)), None)  # fmt: skip
        messages.append((who, _text_of(content), _text_of(apart)))
    return messages


def level_of(value: Any) -> int | None:
    """Return the number in 3, "3", 3.0 or "Level 3"; None where a level is a word, or missing."""
    match = re.fullmatch(r"\D*(\d+)(\.0)?", word_of(value))
    return int(match[1]) if match else None


# Worked solutions

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{$.,;]+)")
_LABEL = re.compile(r"^\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]\s*", re.IGNORECASE)
_CONCLUSION = re.compile(
    r"(.*[.!]\s+)?(?:so,?\s+|thus,?\s+|therefore,?\s+|hence,?\s+)?(?:the\s+)?(?:final\s+)?answer"
    r"(?:\s+is\s*:?|\s*[:=])\s*(.+?)\.?",
    re.IGNORECASE,
)
_THOUGHTS = (
    (THINK_OPEN, THINK_CLOSE),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)


def split_worked(text: str) -> tuple[str, str]:
    r"""Return the result of a worked solution and its steps; a bare result has none.

    What follows closed thoughts is the solution and they are the steps.  In the solution the
    result is what the last `<answer>` holds, the last `\boxed{}`, what follows "####", or what
    "the answer is" says in the last line; else it is all of it.
    """
    for opening, closing in _THOUGHTS:
        before, closed, after = text.rpartition(closing)
        if closed:
            result, steps = split_worked(after)
            return result, before.rpartition(opening)[2].strip() or steps
    start = text.rfind(ANSWER_OPEN)
    if start >= 0:
        inside = text[start + len(ANSWER_OPEN) :].partition(ANSWER_CLOSE)[0]
        return split_worked(_LABEL.sub("", inside, count=1).strip())[0], text[:start].strip()
    if (boxed := last_box(text)) is not None:
        around = text.replace(boxed, "", 1) if boxed else text
        bare = re.sub(r"\\(?:boxed|fbox)|[\s{}$.]|\\[()\[\]]", "", around) == ""
        return boxed.strip(), "" if bare else text.strip()
    before, mark, after = text.rpartition("####")
    lines = [line.strip() for line in after.splitlines() if line.strip()]
    # Of a heading of that rank more follows than the sentence that says the result again.
    if mark and lines and all(_CONCLUSION.fullmatch(line) for line in lines[1:]):
        return _LABEL.sub("", lines[0], count=1), before.rstrip("#").strip()
    last = text.strip().rpartition("\n")[2].replace("**", "").strip()
    if match := _CONCLUSION.fullmatch(last):
        alone = "\n" not in text.strip() and not match[1]
        return match[2].strip(), "" if alone else text.strip()
    return text.strip(), ""


def last_box(text: str) -> str | None:
    r"""Return what the last brace-matched `\boxed{}` holds, or a bare `\boxed 5`; None if none."""
    boxes: list[tuple[int, str]] = [(m.start(), m[1]) for m in _BARE_BOX.finditer(text)]
    opened: list[tuple[int, int] | None] = []
    for match in _BRACE.finditer(text):
        token = match.group()
        if token.endswith("{") and len(token) > 2:
            opened.append((match.start(), match.end()))
        elif token == "{":  # noqa: S105
            opened.append(None)
        elif token == "}" and opened and (box := opened.pop()):  # noqa: S105
            boxes.append((box[0], text[box[1] : match.start()]))
    return max(boxes)[1] if boxes else None


_HEDGE = re.compile(
    r"\bequivalent\b|\bsuch as\b|\be\.g\.|\bfor example\b|\bor (?:any|similar)\b|\bvar(?:y|ies)\b"
    r"|\bsee (?:the |above|below|solution|figure)",
    re.IGNORECASE,
)
_NO_RESULT = {"n/a", "nan", "null", "proof", "?", "-", "unknown", "todo", "tbd"}
_WORDS, _LONG = 5, 300


def unmatchable(answer: str) -> bool:
    """Return whether a gold answer is no result that any grader could meet.

    It is prose of more than a few words, a hint that other forms are right too, or
    a sign that there is none.
    """
    # Words of a formula's text count, its commands do not.
    bare = re.sub(r"\\[A-Za-z]+", " ", answer)
    words = sum(max(1, len(word) // 8) for word in re.findall(r"[^\W\d_]{2,}", bare))
    return (
        answer.strip().lower() in _NO_RESULT
        or _HEDGE.search(answer) is not None
        or words > _WORDS
        or len(answer) > _LONG
    )


@dataclass
class Doubts:
    """Gold answers that no matcher can meet, counted as they are read."""

    answers: int = 0
    odd: int = 0
    row: int = 0
    """Of the first odd one, among the answers, 1-based; 0 where there is none."""
    text: str = ""

    def add(self, answer: str) -> None:
        """Look at one more answer."""
        self.answers += 1
        if unmatchable(answer):
            self.odd += 1
            if not self.row:
                self.row, self.text = self.answers, " ".join(answer.split())[:60]

    def warnings(self, where: str) -> list[str]:
        """Return a warning, or nothing where there is no doubt."""
        if not self.odd:
            return []
        return [
            f"warning: {self.odd} of {self.answers} answers of {where} are no result that a "
            f"matcher can meet, first of row {self.row}: {self.text!r}; give their results, or "
            "drop the rows"
        ]


def doubts(answers: Iterable[str], where: str) -> list[str]:
    """Return warnings of gold answers that no matcher can meet, with their number."""
    doubt = Doubts()
    for answer in answers:
        doubt.add(answer)
    return doubt.warnings(where)
