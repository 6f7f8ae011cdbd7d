"""One self-contained HTML page: figures and tables of a run, readable without a network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go

from resa_lens.figures.tokens import chips, coloured
from resa_lens.publishing import filled

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1f24; background: #fff; margin: 0; }
main { max-width: 980px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.7rem; margin: 0 0 4px; } h2 { font-size: 1.2rem; margin: 36px 0 8px; }
table { border-collapse: collapse; margin: 10px 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid #d7dce1; }
td, th { white-space: nowrap; vertical-align: top; }
td.long { white-space: normal; min-width: 17em; }
.wide { overflow-x: auto; } .small { color: #57606a; font-size: .9rem; }
.verdict { border-left: 4px solid #d55e00; padding: 8px 14px; background: #f6f8fa; }
.verdict.supported { border-color: #009e73; }
code { background: #f6f8fa; padding: 1px 5px; overflow-wrap: anywhere; }
"""
LONG_CELL = 36  # characters: a layer's name in both numberings stays on its line


@dataclass(frozen=True)
class Table:
    """A table of plain text cells."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Verdict:
    """A verdict with its reason; one that is not supported looks different."""

    text: str
    reason: str
    supported: bool


@dataclass(frozen=True)
class Passage:
    """Tokens of a text, coloured by how strongly a feature answers to each."""

    tokens: Sequence[str]
    values: Sequence[float]
    peak: int
    """The token that is framed."""
    most: float
    """The value of the strongest colour."""
    note: str = ""
    """Said before it."""


@dataclass(frozen=True)
class Chips:
    """Tokens with a number each."""

    tokens: Sequence[str]
    values: Sequence[float]


Block = str | go.Figure | Table | Verdict | Passage | Chips
Section = tuple[str, Sequence[Block]]


def _cell(text: str) -> str:
    """A cell; long text wraps, everything else keeps its line, and the table scrolls."""
    kind = " class='long'" if len(text) > LONG_CELL else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _block(block: Block, first_figure: bool) -> str:
    if isinstance(block, go.Figure):
        return block.to_html(
            full_html=False,
            include_plotlyjs="inline" if first_figure else False,
            config={"displaylogo": False, "responsive": True},
        )
    if isinstance(block, Table):
        head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in block.header)
        body = "".join(
            "<tr>" + "".join(_cell(str(cell)) for cell in row) + "</tr>" for row in block.rows
        )
        return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"
    if isinstance(block, Passage):
        text = coloured(block.tokens, block.values, most=block.most, peak=block.peak)
        return f"<div class='small'>{html.escape(block.note)}</div>{text}"
    if isinstance(block, Chips):
        return chips(block.tokens, block.values, ".3g")
    if isinstance(block, Verdict):
        kind = "verdict supported" if block.supported else "verdict"
        return (
            f"<p class='{kind}'><b>{html.escape(block.text)}</b><br>{html.escape(block.reason)}</p>"
        )
    return f"<p>{html.escape(block)}</p>"


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all; all text is escaped."""
    parts = [f"<h1>{html.escape(title)}</h1><p class='small'>{html.escape(lead)}</p>"]
    first = True
    for heading, blocks in sections:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for block in blocks:
            parts.append(_block(block, first))
            first = first and not isinstance(block, go.Figure)
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )
    with filled(path) as temporary:
        temporary.write_text(page)
