"""Text as coloured tokens: how strongly a feature answers to each, and the phase it stands in."""

from __future__ import annotations

import html
from collections.abc import Sequence

import streamlit as st

from resa_lens.phases import PHASES

_WARM = "230, 120, 0"
"""Orange: on white and on black, and told from grey by colour-blind readers."""
_LINES = {"prompt": "#7F7F7F", "think": "#0072B2", "answer": "#009E73"}
"""Under the tokens of each phase; the pattern differs too."""
_PATTERNS = {"prompt": "dotted", "think": "solid", "answer": "double"}
STYLE = (
    "<style>.tokens{font-family:ui-monospace,monospace;font-size:.92rem;line-height:2;"
    "overflow-wrap:anywhere;white-space:pre-wrap}.tokens span{border-radius:3px;padding:1px 0}"
    ".tokens .peak{outline:2px solid currentColor}.tokens .mark{opacity:.55}</style>"
)


def coloured(
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    most: float | None = None,
    phases: Sequence[str] = (),
    peak: int | None = None,
) -> str:
    """Return tokens as HTML in which they stand as they are, whatever they hold.

    Args:
        tokens: their texts, in order.
        values: a number each, 0 or above: the strength of the colour.
        most: the value of the strongest colour; the largest by default.
        phases: of each token, or none: then nothing is drawn below them.
        peak: the token that is framed.
    """
    top = max([most or 0.0, *([] if most else values)], default=0.0) or 1.0
    parts = []
    for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
        styles = []
        if value > 0:
            styles.append(f"background:rgba({_WARM},{min(1.0, 0.12 + 0.68 * value / top):.2f})")
        said = f"{value:.3g}"
        if phases:
            name = phases[place]
            styles.append(f"border-bottom:3px {_PATTERNS[name]} {_LINES[name]}")
            said += f", {name}"
        framed = ' class="peak"' if place == peak else ""
        parts.append(
            f'<span{framed} title="{html.escape(f"{token!r}: {said}", quote=True)}" '
            f'style="{";".join(styles)}">{_text(token)}</span>'
        )
    return f'{STYLE}<div class="tokens">{"".join(parts)}</div>'


def show(tokens: Sequence[str], values: Sequence[float], **how: object) -> None:
    """Draw coloured tokens; arguments as for `coloured`."""
    st.html(coloured(tokens, values, **how))  # type: ignore[arg-type]


def legend() -> None:
    """Say what the lines under the tokens mean."""
    parts = [
        f'<span style="border-bottom:3px {_PATTERNS[name]} {_LINES[name]}">{name}</span>'
        for name in PHASES
    ]
    st.html(f'{STYLE}<div class="tokens">{" · ".join(parts)}</div>')


def _text(token: str) -> str:
    """A token as it stands; a line's end is marked and kept."""
    shown = html.escape(token, quote=True)
    return shown.replace("\n", '<span class="mark">↵</span>\n')
