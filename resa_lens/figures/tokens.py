"""Text as coloured tokens: how strongly a feature answers to each, and the phase it stands in.

A token is text from a model or a file: it is shown as it is, tags and markup too.  Characters that
have no picture of their own (line ends, zero-width ones, marks of direction) are named, and none
can turn the text around it.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

from resa_lens.texts.prompts import PHASES

_WARM, _COLD = "230, 120, 0", "0, 114, 178"
"""Orange and blue: on white and on black, and told apart by colour-blind readers."""
_LINES = {"prompt": "#7F7F7F", "think": "#0072B2", "answer": "#009E73"}
"""Under the tokens of each phase; the pattern differs too."""
_PATTERNS = {"prompt": "dotted", "think": "solid", "answer": "double"}
_NAMED = {"\n": "↵", "\t": "⇥", "\r": "␍"}
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories without a picture: controls, formats, what is not assigned, separators."""
COMPARED = 3000
"""Words of each of two texts that are compared."""
LONGEST = 120
"""Characters of a token that are shown: a token of thousands would take the page."""
STYLE = (
    "<style>.tokens{font-family:ui-monospace,monospace;font-size:.92rem;line-height:2;"
    "overflow-wrap:anywhere;white-space:pre-wrap}.tokens span{border-radius:3px;padding:1px 0;"
    "unicode-bidi:isolate}.tokens .peak{outline:2px solid currentColor}"
    ".tokens .mark{opacity:.6}.tokens .said{font-family:inherit;opacity:.75;font-size:.8rem}"
    ".tokens .chip{display:inline-block;line-height:1.5;padding:1px 5px;margin:2px 4px 2px 0;"
    "max-width:100%}</style>"
)


def coloured(
    tokens: Sequence[str],
    values: Sequence[float] = (),
    *,
    most: float | None = None,
    phases: Sequence[str] = (),
    peak: int | None = None,
) -> str:
    """Return tokens as HTML in which they stand as they are, whatever they hold.

    Args:
        tokens: their texts, in order.
        values: a number each, 0 or above: the strength of the colour; all 0 by default.
        most: the value of the strongest colour; the largest by default.
        phases: of each token, or none: then nothing is drawn below them.
        peak: the token that is framed.
    """
    top = most or max([0.0, *values]) or 1.0
    parts = []
    for place, (token, value) in enumerate(zip(tokens, values or [0.0] * len(tokens), strict=True)):
        style, note = "", f"{visible(token)}: {value:.3g}"
        if value > 0:
            style = f"background:{_shade(_WARM, value / top)};"
        if phases:
            style += _line(phases[place])
            note += f", {phases[place]}"
        framed = ' class="peak"' if place == peak else ""
        title = html.escape(note, quote=True)
        parts.append(f'<span{framed} title="{title}" style="{style}">{_text(token)}</span>')
    return _block("", parts)


def chips(tokens: Sequence[str], values: Sequence[float], form: str = ".2f") -> str:
    """Return tokens as HTML, each apart with its number: orange above 0, blue below.

    Args:
        tokens: their texts; spaces and line ends are marked.
        values: a number each; the farthest from 0 has the strongest colour.
        form: of the numbers, as of `format`; without it none are shown.
    """
    top = max((abs(value) for value in values), default=0.0) or 1.0
    parts = [
        f'<span class="chip" style="background:'
        f'{_shade(_WARM if value > 0 else _COLD, abs(value) / top)}">'
        f"{html.escape(visible(token), quote=True)}"
        + (f' <span class="said">{value:{form}}</span></span>' if form else "</span>")
        for token, value in zip(tokens, values, strict=True)
    ]
    return _block(" ", parts)


def legend() -> str:
    """Return what the lines under the tokens mean, as HTML."""
    return _block(" · ", [f'<span style="{_line(name)}">{name}</span>' for name in PHASES])


def differing(left: str, right: str) -> tuple[str, str]:
    """Return two texts as HTML in which the words that the other lacks are coloured.

    Of texts of more than `COMPARED` words the first ones are compared, and the rest left out.
    """
    words = [re.findall(r"\S+|\s+", text)[:COMPARED] for text in (left, right)]
    sides: tuple[list[str], list[str]] = [], []
    for step in LCSseq.opcodes(*words):
        spans = (
            words[0][step.src_start : step.src_end],
            words[1][step.dest_start : step.dest_end],
        )
        for side, part, colour in zip(sides, spans, (_COLD, _WARM), strict=True):
            style = "" if step.tag == "equal" else f"background:{_shade(colour, 0.5)}"
            side += [f'<span style="{style}">{_text(word)}</span>' for word in part]
    return _block("", sides[0]), _block("", sides[1])


def _block(between: str, parts: Sequence[str]) -> str:
    return f'{STYLE}<div class="tokens">{between.join(parts)}</div>'


def _line(phase: str) -> str:
    return f"border-bottom:3px {_PATTERNS[phase]} {_LINES[phase]}"


def visible(token: str) -> str:
    """Return a token as one line of plain text in which every character can be seen."""
    if not token:
        return "(empty)"
    more = f"[{len(token):,} characters]" if len(token) > LONGEST else ""
    return "".join("␣" if c == " " else _name(c) or c for c in token[:LONGEST]) + more


def plain(text: str) -> str:
    """Return text of a file as it can stand among our words: what cannot be seen is named.

    Spaces and line ends stay; a mark of direction would turn what follows around.
    """
    return "".join(c if c in " \n" else _name(c) or c for c in text)


def _name(character: str) -> str:
    """What stands for a character without a picture; empty for any other."""
    if character in _NAMED:
        return _NAMED[character]
    if unicodedata.category(character) in _UNSEEN or (character != " " and character.isspace()):
        return f"[U+{ord(character):04X}]"
    return ""


def _shade(colour: str, share: float) -> str:
    return f"rgba({colour},{min(1.0, 0.12 + 0.68 * share):.2f})"


def _text(token: str) -> str:
    """A token as it stands; what cannot be seen is marked, and a line's end is kept."""
    parts = []
    for c in token[:LONGEST]:
        mark = f'<span class="mark">{name}</span>' if (name := _name(c)) else ""
        parts.append(mark + (html.escape(c, quote=True) if not mark or c in "\n\t" else ""))
    if len(token) > LONGEST:
        parts.append(f'<span class="mark">[{len(token):,} characters]</span>')
    return "".join(parts)
