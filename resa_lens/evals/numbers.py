r"""Numbers as people write them, read exactly.

Thousands separators, fractions, mixed numbers, powers of ten, percent, currency, units, bases,
periods and number words; no number ever becomes a float.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 4_000
"""Digits, or decimal exponent, up to which fractions are computed; a longer decimal number is
compared by its digits."""

Exact = Fraction | tuple[str, str, int]
"""A value: as a fraction, or as sign, digits without zeros at the ends and decimal exponent."""

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"([+-]?)\s*({_DECIMAL})(?:[eE]\s*([+-]?\d+))?")
_POWER = re.compile(
    rf"([+-]?)\s*(?:({_DECIMAL})\s*(?:\\times|\\cdot|\*|x|X)\s*)?10\s*\^\s*"
    r"(?:\{\s*([+-]?\d+)\s*\}|([+-]?\d+))"
)
_OVER = re.compile(
    r"\\frac\s*(?:\{\s*([+-]?[\d.,\s]+)\s*\}|(\d))\s*(?:\{\s*([+-]?[\d.,\s]+)\s*\}|(\d))"
    rf"|\(?([+-]?{_DECIMAL})\)?\s*/\s*\(?([+-]?{_DECIMAL})\)?"
)
_MIXED = re.compile(r"(\d+)(?:\s*(\\frac.*)|\s+(\d+\s*/\s*\d+))")
_PERIOD = re.compile(
    r"([+-]?)\s*(\d*)\.(\d*?)(?:\\(?:overline|bar|dot)\s*\{?(\d+)\}?|(\d+?)\5{2,}\s*\\ldots)"
)
_BASED = re.compile(
    r"([+-]?)\s*([0-9A-Za-z]+)(?:_\s*\{?\s*|\s+(?:in\s+)?base[- ])(\d+|[a-z]+)\s*\}?", re.IGNORECASE
)
_PREFIXED = re.compile(r"0([xob])([0-9A-Fa-f]+)", re.IGNORECASE)
THOUSANDS = re.compile(r"(?<![\d.,\w])\d{1,3}(?:,\d{3})+(?!,?\d)")
_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:[ _]\d{3})+(?![ _]?\d)")

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: value for value, word in enumerate(_ONES.split())} | {
    word: 10 * value for value, word in enumerate(_TENS.split(), 2)
}
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""Powers of ten."""
_SCALED = re.compile(rf"(.*\d)\s*({'|'.join(SCALES)})s?\b(.*)", re.IGNORECASE)

_UNITS = {
    "length": "mm millimeter millimetre=1/1000 cm centimeter centimetre=1/100 m meter metre=1 "
    "km kilometer kilometre=1000 in inch inche=127/5000 ft foot feet=381/1250 "
    "yd yard=1143/1250 mi mile=201168/125",
    "mass": "mg milligram=1/1000 g gram gm=1 kg kilogram=1000",
    "weight": "oz ounce=1 lb pound=16",
    "time": "ms millisecond=1/1000 s sec second=1 min minute=60 h hr hour=3600 day=86400 "
    "week=604800",
    "months": "month=1 yr year=12",
    "volume": "ml milliliter millilitre=1/1000 l liter litre=1",
    "gallons": "pint=1 quart=2 gallon gal=8",
    "money": "cent penny pennie=1/100 $ dollar usd buck=1",
    "angle": "° degree deg=1",
    "euro": "€ euro eur=1",
    "sterling": "£ gbp=1",
}
"""By dimension: synonyms, then what one of them is in the first unit that has 1."""


def _table() -> dict[str, tuple[str, Fraction]]:
    table = {}
    for dimension, text in _UNITS.items():
        names: list[str] = []
        for word in text.split():
            name, _, factor = word.partition("=")
            names.append(name)
            if factor:
                table |= dict.fromkeys(names, (dimension, Fraction(factor)))
                names = []
    return table


UNITS = _table()
_WORD = r"\\?[A-Za-z$€£°]+(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
_UNIT_TEXT = re.compile(rf"{_WORD}(?:[\s/.*-]+{_WORD})*")
_UNIT_LENGTH = 60
"""Characters at the end of an answer in which a unit is looked for."""
_LETTERS = frozenset("LJNWVAKCFT")
"""Units of one letter that the table has not."""
_PLAIN_UNITS = ("square", "sq", "cubic", "cu", "unit", "units")
_NO_UNIT_WORDS = (
    "and or not no but than to if when until at most least more less about around approximately "
    "is are was of from by plus minus times either between only pi sqrt sin cos tan log ln exp "
    "frac infty each maybe"
)
_NO_UNITS = frozenset(_NO_UNIT_WORDS.split())
"""Words that make a tail more than a unit."""


@dataclass(frozen=True)
class Number:
    """A number with what was written behind it."""

    value: Exact
    text: str
    """Its digits as they were written, without unit."""
    unit: str = ""
    """In one spelling; `%` for percent; empty where there is none."""
    base: int | None = None
    """Where it was named."""


def exact(sign: str, decimal: str, exponent: int = 0) -> Exact:
    """Return a decimal number times a power of ten."""
    whole, _, part = decimal.partition(".")
    digits, exponent = (whole + part).lstrip("0"), exponent - len(part)
    kept = digits.rstrip("0")
    exponent += len(digits) - len(kept)
    if not kept:
        return Fraction(0)
    sign = "-" if sign == "-" else ""
    if len(kept) > MAX_DIGITS or abs(exponent) > MAX_DIGITS:
        return sign, kept, exponent
    return int(sign + kept) * Fraction(10) ** exponent


def number(text: str) -> Exact | None:
    """Return the value of a number without unit, or None where the text is none."""
    text = _GROUPS.sub(lambda m: re.sub("[ _]", "", m.group()), text.strip())
    text = THOUSANDS.sub(lambda m: m.group().replace(",", ""), text)
    if match := _PLAIN.fullmatch(text):
        sign, decimal, exponent = match.groups()
        return exact(sign, decimal, int(exponent or "0")) if _is_short(exponent) else None
    if match := _POWER.fullmatch(text):
        sign, decimal, braced, bare = match.groups()
        exponent = braced or bare
        return exact(sign, decimal or "1", int(exponent)) if _is_short(exponent) else None
    if match := _PERIOD.fullmatch(text):
        return _periodic(*match.groups())
    if (words := _worded(text)) is not None:
        return words
    sign = -1 if text.startswith("-") else 1
    bare = text[1:].strip() if text[:1] in ("-", "+") else text
    if (value := _fraction(bare)) is not None:
        return sign * value
    if match := _MIXED.fullmatch(bare):
        part = _fraction(match[2] or match[3])
        if part is not None and 0 < part < 1 and len(match[1]) <= MAX_DIGITS:
            return sign * (int(match[1]) + part)
    return None


def _is_short(exponent: str | None) -> bool:
    # int() refuses thousands of digits; so long an exponent equals only the same string.
    return len(exponent or "") < 20


def _fraction(text: str) -> Fraction | None:
    match = _OVER.fullmatch(text)
    if match is None:
        return None
    over, under = (number(part) for part in match.groups() if part is not None)
    if isinstance(over, Fraction) and isinstance(under, Fraction) and under:
        return over / under
    return None


def _periodic(sign: str, whole: str, part: str, period: str | None, dotted: str) -> Exact | None:
    period = period or dotted
    if len(whole) + len(part) + len(period) > MAX_DIGITS:
        return None
    scale = 10 ** len(part)
    value = Fraction(int(whole + part or "0"), scale)
    value += Fraction(int(period), scale * (10 ** len(period) - 1))
    return -value if sign == "-" else value


def _worded(text: str) -> Fraction | None:
    """Return what number words up to 999 say."""
    words = text.lower().replace("-", " ").split()
    if not words or len(words) > 6 or not set(words) <= {*WORDS, "hundred", "and", "negative"}:
        return None
    sign = -1 if words[0] == "negative" else 1
    words = [word for word in words if word not in ("and", "negative")]
    total = 0
    if "hundred" in words:
        at = words.index("hundred")
        if at != 1 or not 0 < WORDS.get(words[0], 0) < 10:
            return None
        total, words = 100 * WORDS[words[0]], words[2:]
    values = [WORDS.get(word, -1) for word in words]
    tens = len(values) == 2 and values[0] >= 20 and 0 < values[1] < 10
    if not values and "hundred" not in text.lower():
        return None
    if -1 in values or len(values) > 2 or (len(values) == 2 and not tens):
        return None
    return Fraction(sign * (total + sum(values)))


def read_number(text: str) -> Number | None:
    """Return the number, with its unit, that the whole of a tidy text is, or None."""
    text = text.strip()
    for read in (_based, _with_scale, _with_unit, _compound):
        if (found := read(text)) is not None:
            return found
    return None


def _based(text: str) -> Number | None:
    if match := _PREFIXED.fullmatch(text):
        base = {"x": 16, "o": 8, "b": 2}[match[1].lower()]
        return _in_base("", match[2], base)
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    name = match[3].lower()
    base = int(name[:3]) if name.isdecimal() else WORDS.get(name, 0)
    return _in_base(match[1], match[2], base) if 2 <= base <= 36 else None


def _in_base(sign: str, digits: str, base: int) -> Number | None:
    if len(digits) > MAX_DIGITS or not any(char.isdecimal() for char in digits):
        return None  # `a_{12}` is a variable
    try:
        value = int(sign + digits, base)
    except ValueError:  # a digit that the base has not
        return None
    return Number(Fraction(value), sign + digits.upper().lstrip("0"), base=base)


def _with_scale(text: str) -> Number | None:
    match = _SCALED.fullmatch(text)
    if match is None:
        return None
    found = read_number(match[1] + match[3])
    if found is None or not isinstance(found.value, Fraction):
        return None
    return Number(found.value * 10 ** SCALES[match[2].lower()], found.text, found.unit)


def _with_unit(text: str) -> Number | None:
    front = ""
    if match := re.match(r"([+-]?)\s*\\?([$€£])\s*(?=[\d.+-])", text):
        text, front = match[1] + text[match.end() :], match[2]
    if (value := number(text)) is not None:
        return Number(value, text, unit_of(front) or "")
    head, tail = split_unit(text)
    if not tail or (value := number(head)) is None:
        return None
    unit = unit_of(tail)
    # "$5 million" has its sign before, "5 dollars" behind.
    return None if unit is None else Number(value, head, unit_of(front) or unit)


def split_unit(text: str, *, known: bool = False) -> tuple[str, str]:
    """Return an expression, and the unit, percent or degrees that stand behind it or "".

    A letter, or a word that is no unit of the table, is one only where a blank divides it from the
    number: `5 m`, not `5m`.

    Args:
        text: a tidy answer.
        known: whether only units of the table count.
    """
    if match := re.search(r"\s*(?:\\?%|\bper\s?cent(?:age)?\b|\bpct\b)$", text, re.IGNORECASE):
        return text[: match.start()], "%"
    if match := re.search(r"\s*\^\\circ\s*([CF]?)$", text):
        return text[: match.start()], f"°{match[1]}"
    start = max(0, len(text) - _UNIT_LENGTH)
    for match in re.finditer(r"\s+|(?<=[\d)}\]])(?=[A-Za-z$€£°\\])", text[start:]):
        head, tail = text[: start + match.start()], text[start + match.end() :]
        if not head or not _UNIT_TEXT.fullmatch(tail) or "\\" in tail.replace("\\$", ""):
            continue
        first = re.match(r"\\?([A-Za-z]+|.)", tail)
        assert first is not None  # the pattern begins so
        listed = _name(first[1]) in UNITS or first[1].lower() in _PLAIN_UNITS
        attached = not match.group()
        if attached and re.fullmatch(r"st|nd|rd|th", tail):
            return head, ""
        alone = len(first[1]) == 1 and first[1].isalpha()
        if (attached and (alone or not listed)) or (known and not listed):
            continue
        if not alone or listed or tail in _LETTERS:
            return head, tail
    return text, ""


def unit_of(text: str) -> str | None:
    """Return one spelling for a unit's: "cm^2", "m/s", "apple"; None where it is no unit."""
    text = text.strip()
    if text in ("%", ""):
        return text
    text = re.sub(r"\bper\b", "/", text.replace("·", " "), flags=re.IGNORECASE)
    parts = []
    for part in text.split("/"):
        power = "1"
        words = []
        for word in re.findall(r"[A-Za-z$€£°]+|\^\s*\{?\s*-?\d", part):
            lower = word.lower()
            if word.startswith("^"):
                power = word.strip("^{ ")
            elif lower in ("square", "squared", "sq"):
                power = "2"
            elif lower in ("cubic", "cubed", "cu"):
                power = "3"
            elif lower in _NO_UNITS:
                return None
            elif lower in ("unit", "units"):
                continue
            else:
                words.append(_name(word))
        parts.append(" ".join(words) + (f"^{power}" if words and power != "1" else ""))
    return "/".join(parts)


def _name(word: str) -> str:
    if word in UNITS:
        return _first_of(word)
    lower = word.lower()
    for name in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if name in UNITS and (len(name) > 1 or name == lower):
            return _first_of(name)
    return lower if len(lower) < 4 or lower.endswith("ss") else lower.removesuffix("s")


def _first_of(name: str) -> str:
    return next(other for other, entry in UNITS.items() if entry == UNITS[name])


def _compound(text: str) -> Number | None:
    """Read "5 feet 6 inches", in the dimension's first unit."""
    if len(text) > _UNIT_LENGTH:
        return None
    parts = re.findall(r"([\d.,/ ]+?)\s*([A-Za-z]+)\.?(?:\s*,|\s+and\b)?(?:\s+|$)", text)
    if len(parts) < 2 or re.sub(r"[\s,.]|\band\b", "", text) != re.sub(
        r"[\s,.]", "", "".join(a + b for a, b in parts)
    ):
        return None
    total, dimensions = Fraction(0), set()
    for digits, name in parts:
        value, unit = number(digits), UNITS.get(_name(name))
        if not isinstance(value, Fraction) or unit is None:
            return None
        dimensions.add(unit[0])
        total += value * unit[1]
    if len(dimensions) != 1:
        return None
    (dimension,) = dimensions
    base = next(name for name, entry in UNITS.items() if entry == (dimension, 1))
    return Number(total, text, base)


def equal_numbers(a: Number, b: Number) -> bool:
    """Return whether two numbers are equal, with units where both have them.

    A percentage equals its number and its hundredth, since a question may name the percent sign
    itself; digits equal themselves where only one of the two names their base.
    """
    if a.base != b.base:
        if a.base and b.base:
            return a.value == b.value
        based, bare = (a, b) if a.base else (b, a)
        same_digits = bare.text.upper().lstrip("0") == based.text and not bare.unit
        return same_digits or (based is a and a.value == b.value)
    if a.unit == b.unit or not (a.unit and b.unit):
        if a.value == b.value:
            return True
        if a.unit == b.unit or "%" not in (a.unit, b.unit):
            return False
        share, other = (a, b) if a.unit == "%" else (b, a)
        return isinstance(share.value, Fraction) and share.value / 100 == other.value
    first, second = UNITS.get(a.unit), UNITS.get(b.unit)
    if first is None or second is None or first[0] != second[0]:
        return False
    if not isinstance(a.value, Fraction) or not isinstance(b.value, Fraction):
        return False
    return a.value * first[1] == b.value * second[1]
