"""What all pages share: problems, figures that can be saved, tables with their download.

Text from files goes through `st.text`, tables, figures and `tokens`, which show tags and markup as
they are.
"""

from __future__ import annotations

import math
import mimetypes
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from resa_lens.app import links
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.listing import name_of
from resa_lens.errors import BadInputError

Given = ParamSpec("Given")
Value = TypeVar("Value")
_ROW, _HIGHEST = 36, 430  # pixels of a row and of a whole table
_SHOWN = 3
"""Problems that stand in full on a page."""
_FORMATS = {r"density": "%.4g", r"%|points|MB": "%.2f", r"seconds": "%.1f", r"": "%.4g"}
"""Of columns with fractions, by what their names hold: the first that fits."""


def problem(text: str, command: str | None = None) -> None:
    """Say what is wrong and which command helps; the text is shown as it is."""
    with st.container(border=True):
        st.badge("this cannot be shown", icon=":material/error:", color="orange")
        st.text(text)
        if command:
            shell(command)


def plain(text: str) -> str:
    """Return text from a file for a label, read as Markdown: every mark stands as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~:$&])", r"\\\1", text)


def shell(*commands: str) -> None:
    """Show commands to be copied to a shell, each in a box of its own."""
    for command in commands:
        st.code(command, language="bash", wrap_lines=True)


def missing(text: str, command: str) -> None:
    """Say that something was not measured, and by which command it is."""
    st.text(text)
    shell(command)


def verbatim(text: str) -> None:
    """Show a text that can be copied, as it is."""
    st.code(text, language=None, wrap_lines=True)


def problems(texts: Sequence[str]) -> None:
    """Show several problems: a few in full, the rest folded, so that the page stays in sight."""
    for text in texts[:_SHOWN]:
        problem(text)
    if rest := texts[_SHOWN:]:
        with st.expander(f"{len(rest)} more that cannot be read"):
            st.text("\n".join(rest))


@contextmanager
def part(title: str = "") -> Iterator[None]:
    """Draw a part of a page: what cannot be read is said in its place, and the others stand."""
    if title:
        st.subheader(title, anchor=False)
    try:
        yield
    except BadInputError as error:
        problem(str(error))


def readable(read: Callable[Given, Value], *args: Given.args, **how: Given.kwargs) -> Value | None:
    """Return what a function reads; what cannot be read is said in its place, and None."""
    with part():
        return read(*args, **how)
    return None


def figure(
    drawing: go.Figure,
    key: str,
    *,
    select: Callable[[], None] | None = None,
    alt: str | None = None,
) -> None:
    """Draw a figure in the theme's colours, light or dark, that can be saved.

    PNG or SVG by the camera above the figure, as chosen in the side bar; HTML by a button below.

    Args:
        drawing: the figure.
        key: of the widget; the files' names say what is shown, too.
        select: called when a point is clicked, before the page runs again.
        alt: what a screen reader says; the figure's title by default.
    """
    layout: Any = drawing.layout
    name = links.file_name(key.removeprefix("figure-"))
    config = {
        "displaylogo": False,
        "responsive": True,
        "toImageButtonOptions": {
            "format": str(st.session_state.get("image", "PNG")).lower(),
            "filename": name,
            "scale": 2,
        },
    }
    st.plotly_chart(
        drawing,
        theme="streamlit",
        config=config,
        key=key,
        on_select=select or "ignore",
        selection_mode="points",
        alt=alt or layout.title.text,
    )
    # Made when it is asked for: a page of its own carries the whole library.
    download(
        "HTML",
        lambda: drawing.to_html(include_plotlyjs=True),
        f"{name}.html",
        key=f"html-{key}",
        help="The figure as a page that needs nothing else",
    )


def download(label: str, make: Callable[[], str | bytes], name: str, **how: Any) -> None:
    """Draw a button that downloads a file, made when it is asked for.

    Args:
        label: of the button.
        make: returns what the file holds.
        name: of the file.
        how: the key, and further arguments of `st.download_button`.
    """
    st.download_button(
        label,
        make,
        file_name=name,
        mime=mimetypes.guess_type(name)[0],
        icon=":material/download:",
        type="tertiary",
        on_click="ignore",
        **how,
    )


def table(
    rows: pd.DataFrame | Sequence[Mapping[str, object]],
    name: str,
    folded: str | None = None,
    *,
    picked: Callable[[int], None] | None = None,
    **how: Any,
) -> None:
    """Draw a table and its download as CSV.

    Args:
        rows: of the table; numbers are shown in the format of their column's name.
        name: of the downloaded file.
        folded: title of the fold that it stands in; in sight by default.
        picked: called with the place of a row that is chosen, before the page runs again.
        how: further arguments of `st.dataframe`: the key, where rows can be chosen.
    """
    frame, columns = pd.DataFrame(rows), {}
    for column, values in frame.select_dtypes("floating").items():
        if (values.dropna() % 1 != 0).any():
            form = next(f for part, f in _FORMATS.items() if re.search(part, str(column)))
            columns[str(column)] = st.column_config.NumberColumn(format=form)
    columns |= how.pop("column_config", {})
    how.setdefault("height", min(_ROW * (len(frame) + 1) + 2, _HIGHEST))

    def take() -> None:
        state: Any = st.session_state.get(how["key"])
        selection = state["selection"] if state else {}
        rows = [*selection.get("rows", ()), *(row for row, _ in selection.get("cells", ()))]
        if picked and rows and rows[0] < len(frame):
            picked(rows[0])

    if picked:
        how = {"on_select": take, "selection_mode": ["single-row", "single-cell"], **how}
    with st.expander(folded) if folded else nullcontext():
        st.dataframe(frame, hide_index=True, column_config=columns, **how)
        download(
            "Download as CSV",
            lambda: frame.to_csv(index=False),
            f"{name}.csv",
            key=f"download-{name}",
        )


def paged(total: int, size: int, key: str) -> slice:
    """Draw the pages of a long table where there are several, and return the rows in sight.

    The page's number stands in the address; one that is none is said, and the first page shown.

    Args:
        total: rows of the table.
        size: rows of a page.
        key: of the widget and in the address.
    """
    pages, text = max(1, math.ceil(total / size)), st.query_params.get(key, "1")
    try:  # as streamlit reads it, who also takes spaces and digits of other scripts
        number = int(st.session_state.get(key, text[:20]))
    except ValueError:
        number = 0
    # What is left of the rows may have fewer pages than the one that was open.
    if key in st.session_state and number > pages:
        st.session_state[key] = 1
    elif not 1 <= number <= pages:
        problem(f"The address names page {text!r:.40}; there is 1 to {pages:,}.")
    if pages == 1 and key not in st.query_params:
        return slice(0, total)
    page = int(st.pagination(pages, max_visible_pages=5, **links.bound(key)))
    rows = slice((page - 1) * size, min(page * size, total))
    st.text(f"rows {rows.start + 1:,} to {rows.stop:,} of {total:,}")
    return rows


def share_columns(
    name: str,
    unit: str,
    value: float | None,
    ci: tuple[float | None, float | None] | None,
    *,
    ends: str = "",
    scale: float = 100,
) -> dict[str, float | None]:
    """Return a value and its interval as three columns of a table.

    Args:
        name: of the value's column.
        unit: behind each column's name.
        value: a share, to be shown in percent or points; None where it is unknown.
        ci: its interval, None where it is unknown.
        ends: before "low" and "high" in the names of the interval's columns.
        scale: of the unit; 1 where the value stands in it already.
    """
    names = (f"{name}, {unit}", f"{ends}low, {unit}", f"{ends}high, {unit}")
    parts = zip(names, (value, *(ci or (None, None))), strict=True)
    return {column: None if part is None else scale * part for column, part in parts}


def layer_columns(layer: int | None) -> dict[str, int | None]:
    """Return a layer as columns of a table, in either numbering."""
    return {"layer": layer, "layer_1_indexed": None if layer is None else layer + 1}


def choose(place: Any, label: str, key: str, artifacts: Sequence[Artifact], **how: Any) -> Artifact:
    """Draw a choice among artifacts; it is the first where the address names none of them.

    Args:
        place: the container, or streamlit itself.
        label: of the choice.
        key: of the widget and in the address, which holds the artifact's path.
        artifacts: the newest first.
        how: further arguments of `links.choice`.
    """
    by_path = {artifact.relative: artifact for artifact in artifacts}
    names = {path: name_of(a, one_based=links.one_based()) for path, a in by_path.items()}
    return by_path[str(links.choice(place, label, key, names, **how))]


def views(sections: Mapping[str, Sequence[Callable[[], object]]], key: str) -> None:
    """Draw a choice of views, and the one that is chosen; the first without a choice.

    Args:
        sections: by the names of their views; one of all of them, for printing and searching, is
            added.
        key: of the widget and in the address.
    """
    named = {name: list(draw) for name, draw in sections.items()}
    named["Everything"] = [draw for several in named.values() for draw in several]
    # Not tabs: these draw everything, and only what is looked at is to be drawn.
    view = st.segmented_control(
        "View", list(named), default=next(iter(named)), required=True,
        label_visibility="collapsed", **links.bound(key),
    )  # fmt: skip
    apart(*named[str(view)])


def apart(*sections: Callable[[], object]) -> None:
    """Draw sections, each in a place of its own: what a click adds to one moves no other."""
    for section in sections:
        with st.container():
            section()
