r"""One spelling for the many ways in which people and models write mathematics.

`tidy` turns unicode, spacing commands, text macros and wrappers into plain LaTeX; `mask` hides what
stands inside brackets, so that a text can be split where nothing is open.
"""

from __future__ import annotations

# ruff: noqa: RUF001 - the characters that are replaced
import re
import unicodedata

_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_SIGNS = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "﹣": "-", "×": r"\times ", "·": r"\cdot ",
    "⋅": r"\cdot ", "÷": "/", "∕": "/", "π": r"\pi ", "∞": r"\infty ", "θ": r"\theta ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∈": r"\in ",
    "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "º": r"^\circ ", "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "φ": r"\phi ",
    "…": r"\ldots ", "\u200b": "", "\ufeff": "", "“": '"', "”": '"', "’": "'", "‘": "'",
}  # fmt: skip
_SYMBOL = re.compile("|".join(map(re.escape, _SIGNS)))
_COMMANDS = (
    (re.compile(r"\\(?:left|right|[bB]ig{1,2}[lr]?)(?![A-Za-z])\s*\.?"), ""),
    (re.compile(r"\\(?:!|displaystyle|textstyle|limits|nonumber|rm|bf)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:[,;: ]|q?quad|thinspace|hspace\{[^{}]*\}|newline)(?![A-Za-z])|~"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\leq(?:slant)?(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\geq(?:slant)?(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\(?:neq|not\s*=)"), r"\\ne "),
    (re.compile(r"\\(?:l|r)brace(?![A-Za-z])"), lambda m: r"\{" if "l" in m.group() else r"\}"),
    (re.compile(r"\\[lr]vert(?![A-Za-z])"), "|"),
    (re.compile(r"\\(?:dots|cdots|dotsc)(?![A-Za-z])|\.\.\."), r"\\ldots "),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"\\(?:simeq|approxeq|thickapprox)(?![A-Za-z])"), r"\\approx"),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\*\*(?=[\d({\-a-zA-Z])(?<=[\w)}]\*\*)"), "^"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\(?:bigcup)(?![A-Za-z])"), r"\\cup"),
    (re.compile(r"\\phantom\{[^{}]*\}"), ""),
)
_LINE = "\x1e"
"""In place of two backslashes, the end of a row."""
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|tt|sf)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname\*?"
    r"|bm|boldsymbol|emph|underline|boxed|fbox)\s*\{"
)
_BRACKET = re.compile(
    r"\\begin\{[A-Za-z]+\*?\}|\\end\{[A-Za-z]+\*?\}|\\[lr](?:angle|floor|ceil)(?![A-Za-z])"
    r"|\\[A-Za-z]+|\\.|[()\[\]{}]",
    re.DOTALL,
)
_OPENING = ("(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil")
_CLOSING = (")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil")
_WRAPPERS = (
    ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("```", "```"), ("`", "`"),
    ("**", "**"), ("__", "__"), ('"', '"'), ("'", "'"), ("*", "*"), ("_", "_"),
)  # fmt: skip
_LABEL = re.compile(
    r"^(?:(?:the|my)\s+)?(?:(?:final|correct|exact)\s+)?(?:answer|ans|result)\s*(?:is\b|[:=]+)\s*",
    re.IGNORECASE,
)
_FUNCTION = re.compile(r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp)(?=\s*[({^\d])")
_WORD_SIGN = re.compile(r"(?<![\\A-Za-z])(pi|infinity|infty|inf|oo|theta)(?![A-Za-z])")


def tidy(answer: str) -> str:
    """Return an answer in plain LaTeX, without what only decorates it.

    Text macros lose their braces and keep their words, wrappers such as dollars and asterisks go,
    and so do a leading "Answer:" and a final period.
    """
    text = re.sub("[" + "".join(_RAISED) + "]+", lambda m: _script("^", m, _RAISED), answer)
    text = re.sub("[" + "".join(_LOWERED) + "]+", lambda m: _script("_", m, _LOWERED), text)
    text = re.sub(r"[¼½¾⅐-⅞]", _vulgar, text)
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}", text)
    text = unicodedata.normalize("NFKC", _SYMBOL.sub(lambda m: _SIGNS[m.group()], text))
    if r"\begin" not in text:  # a command with its backslash escaped
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    text = _plain_text(text.replace("\\\\", _LINE))
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    text = text.replace(_LINE, "\\\\")
    text = _unwrapped(" ".join(text.split()))
    text = _WORD_SIGN.sub(lambda m: "\\" + {"pi": "pi", "theta": "theta"}.get(m[1], "infty"), text)
    text = _FUNCTION.sub(r"\\\1", text)
    text = re.sub(r"\\sqrt\s*(\d+)", r"\\sqrt{\1}", text)  # nobody means the first digit alone
    for opening in (r"\sqrt(", "^("):
        text = _braced(text, opening)
    return text


def _script(sign: str, match: re.Match[str], table: dict[str, str]) -> str:
    return f"{sign}{{{''.join(table[char] for char in match.group())}}}"


def _vulgar(match: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", match.group()).partition("\u2044")
    return f" {over}/{under}"


def _plain_text(text: str) -> str:
    r"""Return the text with `\text{words}` and its like as words."""
    parts: list[str] = []
    stack: list[bool] = []
    place = 0
    for match in re.finditer(_TEXT.pattern + r"|\\[{}]|[{}]", text):
        token = match.group()
        macro = len(token) > 2
        if macro or token == "{":  # noqa: S105
            stack.append(macro)
        closes = token == "}" and bool(stack) and stack.pop()  # noqa: S105
        if macro or closes:
            parts += [text[place : match.start()], " "]
            place = match.end()
    return "".join([*parts, text[place:]])


def _unwrapped(text: str) -> str:
    before = None
    while before != text:
        before = text
        text = _LABEL.sub("", text.strip()).strip()
        text = re.sub(r"(?<![\\\s])\s*[.,;:]$|(?<=[A-Za-z]{3})!+$", "", text)
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : len(text) - len(closing)]
            if (
                len(text) > len(opening) + len(closing)
                and text.startswith(opening)
                and text.endswith(closing)
                and opening not in inner
            ):
                text = inner.strip()
        if text.startswith("{") and text.endswith("}") and "," not in text and one_group(text):
            text = text[1:-1].strip()
    return text


def one_group(text: str) -> bool:
    """Return whether the first bracket is closed by the last character, and not before."""
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += _step(match.group())
        if depth == 0:
            return match.end() == len(text)
    return False


def _step(token: str) -> int:
    """Return by how much a bracket changes the depth."""
    if token in _OPENING or token.startswith(r"\begin"):
        return 1
    return -1 if token in _CLOSING or token.startswith(r"\end{") else 0


def mask(text: str) -> str:
    """Return the text with every character inside brackets, and these, as NUL; as long as it is."""
    hidden = bytearray(len(text))
    depth, start = 0, 0
    for match in _BRACKET.finditer(text):
        step = _step(match.group())
        if step > 0 and depth == 0:
            start = match.start()
        if step < 0 and depth == 1:
            hidden[start : match.end()] = b"\1" * (match.end() - start)
        depth = max(0, depth + step)
    if depth:  # never closed
        hidden[start:] = b"\1" * (len(text) - start)
    return "".join("\0" if flag else char for flag, char in zip(hidden, text, strict=True))


def pieces(text: str, separator: re.Pattern[str]) -> list[str]:
    """Return the parts of a text between separators that stand outside all brackets."""
    parts, place = [], 0
    for match in separator.finditer(mask(text)):
        parts.append(text[place : match.start()])
        place = match.end()
    return [part.strip() for part in (*parts, text[place:])]


def _braced(text: str, opening: str) -> str:
    r"""Return the text with `\sqrt(...)` or `^(...)` in braces."""
    while (start := text.find(opening)) >= 0:
        place = start + len(opening) - 1
        closed = _closing(text, place)
        if closed is None:
            break
        text = f"{text[:place]}{{{text[place + 1 : closed]}}}{text[closed + 1 :]}"
    return text


def _closing(text: str, place: int) -> int | None:
    depth = 0
    for index in range(place, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return None


def squeezed(text: str) -> str:
    """Return mathematics without its blanks and needless braces, to compare strings by."""
    text = re.sub(r"\\(?:cdot|times)(?![A-Za-z])\s*|(?<=\S)\s*\*\s*", "*", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"([\^_])\s*\{\s*(\w)\s*\}(?!\w)", r"\1\2", text)
    # A blank that ends a command's name, or stands between digits, is meant.
    text = re.sub(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])", "\\1\0", text)
    text = re.sub(r"(?<=\d)\s+(?=\d)", "\0", text)
    return re.sub(r"\s+", "", text).replace("\0", " ").removeprefix("+")
