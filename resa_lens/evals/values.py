r"""What an answer says: a number, a list, an interval, an equation, words, or an expression.

Only the form is read here, with no computer algebra: what stays an `Expression` is left to the
judge, and words are never taken for products of letters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from resa_lens.evals.numbers import THOUSANDS, Number, number, read_number, split_unit, unit_of
from resa_lens.evals.spelling import mask, one_group, pieces, squeezed, tidy

MAX_ITEMS = 64
"""Items of a list up to which they are read; a longer list equals only the same string."""
MAX_DEPTH = 24
"""Brackets in each other up to which an answer's form is read."""

_SEPARATOR = re.compile(r"\s*(?:[,;]|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\\\)+\s*")
_OR = re.compile(r"(?<![A-Za-z\\])or(?![A-Za-z])")
_UNION = re.compile(r"\\cup(?![A-Za-z])|(?<=[)\]}\0])\s*[uU]\s*(?=[(\[\\\0])")
_RELATION = re.compile(r"<=|>=|\\(?:le|ge|ne|approx|lt|gt)(?![A-Za-z])|[=<>]")
_IN = re.compile(r"\\in(?![A-Za-z])")
_ROWS = re.compile(r"\\begin\{([a-zA-Z]*matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}(?![A-Za-z])")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_SPELLED = {"<=": r"\le", ">=": r"\ge", r"\lt": "<", r"\gt": ">"}
_EMPTY = frozenset(("no solution", "no solutions", "empty set", "there is no solution",
                    r"\emptyset", r"\{\}", r"\{ \}"))  # fmt: skip


@dataclass(frozen=True)
class Words:
    """A name, yes or no, or any other text, word by word in small letters."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Expression:
    """Mathematics whose form is not read further."""

    latex: str
    unit: str = ""


@dataclass(frozen=True)
class Items:
    """Several values: a list, a set, a tuple, an interval, a matrix."""

    items: tuple[Value, ...]
    opening: str = ""
    """The bracket as it was written; "" of a bare list, `matrix` of a matrix's rows."""
    closing: str = ""

    @property
    def ordered(self) -> bool:
        """Whether the order of the items means something."""
        return self.opening not in ("", r"\{")


@dataclass(frozen=True)
class Union:
    """Intervals or sets that hold together."""

    parts: tuple[Value, ...]


@dataclass(frozen=True)
class Equation:
    """Sides that are equal; of a chain the first and the last."""

    left: str
    right: str
    named: bool
    """Whether the left side is only a name for the right: `x`, `f(x)`, `Area`."""
    approximate: bool = False


@dataclass(frozen=True)
class Inequality:
    """Two sides that are compared, with the smaller one on the left."""

    left: str
    right: str
    strict: bool


@dataclass(frozen=True)
class Ratio:
    """Parts with colons between them: a ratio, or a time."""

    parts: tuple[str, ...]
    unit: str = ""


Value = Number | Words | Expression | Items | Union | Equation | Inequality | Ratio


def read_value(answer: str) -> Value | None:
    """Return what an answer says, or None where it is empty."""
    text = tidy(answer)
    if not text:
        return None
    depth = 0
    for match in re.finditer(r"[({\[]|[)}\]]", text):
        depth += 1 if match.group() in "({[" else -1
        if depth > MAX_DEPTH:
            return Expression(squeezed(text))
    try:
        return _read(text)
    except RecursionError:
        return Expression(squeezed(text))


def _read(text: str) -> Value:
    text = text.strip()
    if (value := _special(text)) is not None:
        return value
    if (value := read_number(text)) is not None:
        return value
    # Inside brackets a comma always divides: `(1,200)` is a pair.
    for match in reversed(list(THOUSANDS.finditer(mask(text)))):
        text = text[: match.start()] + match.group().replace(",", "") + text[match.end() :]
    for read in (_several, _union, _related, _bracketed, _matrix, _ratio, _both_signs):
        if (value := read(text)) is not None:
            return value
    return _atom(text)


def _special(text: str) -> Value | None:
    if " ".join(text.lower().split()) in _EMPTY:
        return Items((), r"\{", r"\}")
    if squeezed(text) in (r"\mathbb{R}", r"\R", r"\Re") or text.lower() in (
        "all real numbers", "all reals", "any real number", "all real",
    ):  # fmt: skip
        return Items((Expression(r"-\infty"), Expression(r"\infty")), "(", ")")
    return None


def _several(text: str) -> Value | None:
    parts = pieces(text, _SEPARATOR)
    if len(parts) < 2 or _is_sentence(text):
        return None
    if len(parts) > MAX_ITEMS:
        return Expression(squeezed(text))
    parts = [part for part in parts if part]
    if not parts:
        return None
    items = [_read(part) for part in parts]
    first = items[0]
    # x = 2, 3 gives both to x.
    if isinstance(first, Equation) and not any(isinstance(i, Equation) for i in items[1:]):
        items = [first, *(Equation(first.left, part, first.named) for part in parts[1:])]
    items = [part for item in items for part in _flat(item)]
    if len(items) == 1:
        return items[0]
    if all(isinstance(item, Items) and _is_ray(item) for item in items):
        joined = _between(items) if "and" in text or not _OR.search(mask(text)) else None
        return joined or Union(tuple(items))
    return Items(tuple(items))


def _flat(item: Value) -> list[Value]:
    """Return the values of a bare list, such as a plus-minus makes."""
    return list(item.items) if isinstance(item, Items) and item.opening == "" else [item]


def _is_ray(item: Items) -> bool:
    ends = [i.latex for i in item.items if isinstance(i, Expression) and "\\infty" in i.latex]
    return len(ends) == 1 and len(item.items) == 2


def _between(rays: list[Value]) -> Value | None:
    """Return x > 2 and x < 5 as one interval."""
    low = [r for r in rays if isinstance(r, Items) and r.items[1] == Expression(r"\infty")]
    high = [r for r in rays if isinstance(r, Items) and r.items[0] == Expression(r"-\infty")]
    if len(rays) != 2 or len(low) != 1 or len(high) != 1:
        return None
    return Items((low[0].items[0], high[0].items[1]), low[0].opening, high[0].closing)


def _is_sentence(text: str) -> bool:
    """Return whether commas and words make a sentence and no list."""
    return len(_WORD.findall(re.sub(r"\b(?:and|or)\b", "", text))) > 8


def _union(text: str) -> Value | None:
    parts = pieces(text, _UNION)
    if len(parts) < 2 or not all(parts):
        return None
    values = [_read(part) for part in parts]
    if all(part.startswith((r"\{", "{")) for part in parts):
        # A set of one is read as what it holds.
        items = [
            item
            for value in values
            for item in (value.items if isinstance(value, Items) else (value,))
        ]
        return Items(tuple(dict.fromkeys(items)), r"\{", r"\}")
    return Union(tuple(values))


def _related(text: str) -> Value | None:
    hidden = mask(text)
    if len(matches := list(_IN.finditer(hidden))) == 1 and text[: matches[0].start()].strip():
        return _read(text[matches[0].end() :])
    signs = [_SPELLED.get(m.group(), m.group()) for m in _RELATION.finditer(hidden)]
    if not signs:
        return None
    sides = pieces(text, _RELATION)
    if not sides[-1] or not sides[0]:  # "= 5"
        return (
            _read(sides[-1] or sides[0])
            if len(sides) == 2 and signs[0] in ("=", r"\approx")
            else None
        )
    if set(signs) <= {"=", r"\approx"}:
        left, right = sides[0], sides[-1]
        if not is_name(left) and is_name(right) and len(sides) == 2:
            left, right = right, left
        return Equation(left, right, is_name(left), approximate=r"\approx" in signs)
    if set(signs) & {"=", r"\ne", r"\approx"}:
        return None
    if signs[0] in (">", r"\ge"):
        sides, signs = sides[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    if set(signs) <= {"<", r"\le"}:
        return _range(sides, signs)
    return None


def _range(sides: list[str], signs: list[str]) -> Value | None:
    """Return what a < x <= b says; x alone on one side makes an interval."""
    brackets = [sign == "<" for sign in signs]
    if len(sides) == 3 and is_name(sides[1]):
        ends = _read(sides[0]), _read(sides[2])
        return Items(ends, "(" if brackets[0] else "[", ")" if brackets[1] else "]")
    if len(sides) == 2:
        if is_name(sides[0]) and not is_name(sides[1]):
            ends = Expression(r"-\infty"), _read(sides[1])
            return Items(ends, "(", ")" if brackets[0] else "]")
        if is_name(sides[1]) and not is_name(sides[0]):
            ends = _read(sides[0]), Expression(r"\infty")
            return Items(ends, "(" if brackets[0] else "[", ")")
        return Inequality(sides[0], sides[1], brackets[0])
    return None


def is_name(text: str) -> bool:
    """Return whether a side of an equation only names the other: x, f(x), AB, total cost."""
    text = text.strip()
    if squeezed(text) in (r"\pi", "e", "i", r"\infty", r"-\infty"):
        return False
    words = re.fullmatch(r"[A-Za-z]+(?: [A-Za-z]+)*(?: \(.*\))?", text)
    simple = re.fullmatch(
        r"\|?(?:m ?)?(?:\\(?:angle|triangle|overline|vec|hat|bar|mathbf) ?\{?)?"
        r"(?:[A-Za-z]{1,3}|\\(?:alpha|beta|gamma|delta|theta|phi|lambda|mu|sigma|omega|rho|tau"
        r"|varphi|epsilon|ell|Delta|Omega|Gamma|Theta|Phi))\}?"
        r"(?:_\{?\w+\}?)?(?:'|\^\{?\\prime\}?)*(?:\([^()]*\))?\|?",
        text,
    )
    pair = re.fullmatch(r"\([A-Za-z](?:\s*,\s*[A-Za-z])+\)", text)
    return bool(words or simple or pair)


def _bracketed(text: str) -> Value | None:
    if match := re.fullmatch(r"\]([^\[\]]*)\[", text):  # ]a, b[
        text = f"({match[1]})"
    for opening, closing in (("(", ")"), ("[", "]"), (r"\{", r"\}"), (r"\langle", r"\rangle"),
                             ("(", "]"), ("[", ")"), ("{", "}")):  # fmt: skip
        if not (text.startswith(opening) and text.endswith(closing) and one_group(text)):
            continue
        inner = text[len(opening) : len(text) - len(closing)].strip()
        parts = pieces(inner, _SEPARATOR)
        kind = {r"\langle": "(", "{": r"\{"}.get(opening, opening)
        end = {r"\rangle": ")", "}": r"\}"}.get(closing, closing)
        if kind == r"\{" and (such := re.fullmatch(r".*?(?:\\mid|\||:)(.*)", inner)):
            return _read(such[1])  # a set that its elements' property names
        if len(parts) == 1:
            return _read(inner) if (kind, end) in (("(", ")"), (r"\{", r"\}")) else None
        items = [_read(part) for part in parts]
        if kind != r"\{":
            return Items(tuple(items), kind, end)
        return Items(tuple(i for item in items for i in _flat(item)), kind, end)
    return None


def _matrix(text: str) -> Value | None:
    match = _ROWS.fullmatch(text)
    if match is None or match[1] == "vmatrix":
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if row.strip()]
    cells = [Items(tuple(_read(c) for c in row.split("&")), "matrix") for row in rows]
    return Items(tuple(cells), "matrix")


def _ratio(text: str) -> Value | None:
    match = re.fullmatch(r"([^:A-Za-z]+(?::[^:A-Za-z]+)+?)\s*([ap]\.?m\.?)?", text, re.IGNORECASE)
    if match is None:
        return None
    parts = tuple(part.strip() for part in match[1].split(":"))
    if not all(parts) or any(number(part) is None for part in parts):
        return None
    return Ratio(parts, (match[2] or "").lower().replace(".", ""))


def _both_signs(text: str) -> Value | None:
    if r"\pm" not in text and r"\mp" not in text:
        return None
    variants = [
        re.sub(r"\\pm(?![A-Za-z])", sign, re.sub(r"\\mp(?![A-Za-z])", other, text))
        for sign, other in (("+", "-"), ("-", "+"))
    ]
    if "\\pm" in variants[0]:
        return None
    return Items(tuple(_read(re.sub(r"^\s*\+\s*", "", variant)) for variant in variants))


def _atom(text: str) -> Value:
    head, unit = split_unit(text, known=True)
    name = unit_of(unit) if unit and re.search(r"\d|\\[a-z]+", head) else None
    if name is None:
        head = text
    # Words with a vowel are no products of letters.
    bare = re.sub(r"\\[A-Za-z]+", " ", head)
    if any(re.search("[aeiouy]", word, re.IGNORECASE) for word in _WORD.findall(bare)):
        return Words(words_of(text))
    return Expression(squeezed(head), name or "")


def words_of(text: str) -> tuple[str, ...]:
    """Return the words and numbers of a text, in small letters and without an article."""
    bare = re.sub(r"\\[,;: ]|[{}$\\]", " ", text).lower()
    words = re.findall(r"[^\s.,;:!?\"']+(?:[.:'][^\s.,;:!?\"']+)*", bare)
    return tuple(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words)
