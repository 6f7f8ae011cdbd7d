"""Places where a feature fires; a click on a token opens its document and what else fires there."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import streamlit as st

from resa_lens.app import links
from resa_lens.app.features import document
from resa_lens.app.features.data import Activity, Source, phases_of
from resa_lens.app.features.data import examples as kept
from resa_lens.app.features.document import Go
from resa_lens.app.tokens import clickable
from resa_lens.app.widgets import readable, table
from resa_lens.artifacts.feature_tables import INTERVALS, STRONGEST
from resa_lens.artifacts.listing import Listing
from resa_lens.errors import BadInputError
from resa_lens.figures import tokens
from resa_lens.texts.prompts import PHASES

_RANDOM, _EVERY = "at random", "every phase"
_STYLE = (
    "<style>.phase{font-size:.85rem;font-weight:600;margin:.3rem 0}"
    ".example{display:flex;gap:.8rem;margin:0 0 .4rem}"
    ".example .head{font-size:.85rem;opacity:.75;min-width:2.5rem;text-align:right}</style>"
)
PHASE_NAMES = {"prompt": "the prompt", "think": "thoughts", "answer": "the answer"}


def show(
    listing: Listing, source: Source, layer: int, feature: int, figures: Activity, go: Go
) -> None:
    """Draw the examples that were kept, and the document of a token that was clicked."""
    rows = kept(source, layer, feature)
    if not rows:
        st.text("The activity run kept no example of it.")
        return
    # In the order of the firings: the phase where most of them are comes first.
    fired = {phase: figures.row[f"tokens_fired_{phase}"] for phase in PHASES}
    order = sorted((phase for phase in PHASES if fired[phase]), key=lambda phase: -fired[phase])
    with st.container(horizontal=True, vertical_alignment="bottom"):
        drawn = [row for row in rows if row["interval"] != STRONGEST]
        intervals = (*INTERVALS, _RANDOM) if drawn else (STRONGEST,)
        interval = _choice("Examples", intervals, "examples")
        phase = _choice("Of", (_EVERY, *PHASES), "of", format_func=lambda p: PHASE_NAMES.get(p, p))
        st.html(tokens.legend())
    rows = drawn if interval == _RANDOM else [row for row in rows if row["interval"] == interval]
    # Without phases the examples stand all the same.
    phases = readable(phases_of, source, [row["document"] for row in rows]) or {}
    parts, listed, places = [], [], []
    for name in order if phase == _EVERY else [phase]:
        here = [row for row in rows if row["phase"] == name]
        head = f"{fired[name]:,} of {sum(fired.values()):,} firings are in {PHASE_NAMES[name]}"
        parts.append(f'<div class="phase">{head}{"" if here else "; no example was kept"}</div>')
        for row in here:
            block, example = _example(row, phases, figures.row["max"])
            parts.append(block)
            listed.append(example)
            places += [(row["document"], row["start"] + at) for at in range(len(row["tokens"]))]
    with st.container():
        clickable(
            _STYLE + "".join(parts),
            "examples-text",
            lambda number: document.choose(source, *places[number]),
            "Examples",
        )
    document.show(listing, source, layer, feature, go)
    st.caption(
        "The deeper the orange, the stronger; one scale for all. The peak is framed, ↵ is a line's "
        "end; a token's value stands where the pointer rests, and a click on it shows the whole "
        "document and what else fires there. Thirds are by activation, of places "
        "drawn from all at which it fires in a phase; no two stand after the same text."
    )
    if listed:
        table(listed, "examples", "Table of examples")


def _choice(label: str, options: Sequence[str], key: str, **how: Any) -> str:
    """A choice whose value stands in the address."""
    return str(st.selectbox(label, options, width=180, **how, **links.bound(key)))


def _example(
    row: dict[str, Any], phases: dict[int, list[str]], most: float
) -> tuple[str, dict[str, Any]]:
    """Return an example as HTML, and as a row of the table.

    Raises:
        BadInputError: it has another number of activations than of tokens.
    """
    words = [token or "" for token in row["tokens"] or []]
    acts = [value or 0.0 for value in row["acts"] or []]
    if len(words) != len(acts):
        raise BadInputError(
            f"example {row['rank']} has {len(words)} tokens and {len(acts)} activations; "
            "--force of resa-lens activity makes the tables anew"
        )
    peak = row["position"] - row["start"]
    around = phases.get(row["document"], [])[row["start"] : row["start"] + len(words)]
    if len(around) != len(words):
        around = []
    note = f"document {row['document']}, token {row['position']}, {row['interval']}"
    block = (
        f'<div class="example"><div class="head" title="{html.escape(note, quote=True)}">'
        f"{row['value']:.3g}</div>"
        + tokens.coloured(words, acts, most=most, phases=around, peak=peak)
        + "</div>"
    )
    return block, {
        "document": row["document"],
        "token": row["position"],
        "phase": row["phase"],
        "interval": row["interval"],
        "activation": row["value"],
        "peak": tokens.visible(words[peak]) if 0 <= peak < len(words) else "",
        "text": tokens.plain("".join(words)),
    }
