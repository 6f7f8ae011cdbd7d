"""What all pages share: problems, figures that can be saved, tables with their download.

Text from files goes through `st.text`, tables, figures and `tokens`, which show tags and markup as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

_ROW, _HIGHEST = 36, 430  # pixels of a row and of a whole table
_SHOWN = 3
"""Problems that stand in full on a page."""


def problem(text: str, command: str | None = None) -> None:
    """Say what is wrong and which command helps; the text is shown as it is."""
    with st.container(border=True):
        st.badge("this cannot be shown", icon=":material/error:", color="orange")
        st.text(text)
        if command:
            st.code(command, language="bash", wrap_lines=True)


def problems(texts: Sequence[str]) -> None:
    """Several problems: a few in full, the rest folded, so that the page stays in sight."""
    for text in texts[:_SHOWN]:
        problem(text)
    if rest := texts[_SHOWN:]:
        with st.expander(f"{len(rest)} more that cannot be read"):
            st.text("\n".join(rest))


def figure(
    made: go.Figure,
    key: str,
    *,
    select: bool | Callable[[], None] = False,
    alt: str | None = None,
) -> Any:
    """A figure in the theme's colours, light or dark, that can be saved.

    PNG or SVG by the camera above the figure, as chosen in the side bar; HTML by a button below.

    Args:
        made: the figure.
        key: of the widget, and the name of the files.
        select: whether a click on a point runs the page again, or what it calls before that; the
            selection comes back.
        alt: what a screen reader says; the figure's title by default.
    """
    title = getattr(made.layout.title, "text", None)
    config = {
        "displaylogo": False,
        "responsive": True,
        "toImageButtonOptions": {
            "format": str(st.session_state.get("image", "PNG")).lower(),
            "filename": key,
            "scale": 2,
        },
    }
    drawn = st.plotly_chart(
        made,
        theme="streamlit",
        config=config,
        key=key,
        on_select=select if callable(select) else "rerun" if select else "ignore",
        selection_mode="points",
        alt=alt or title,
    )
    st.download_button(
        "HTML",
        # Made when it is asked for: a page of its own carries the whole library.
        lambda: made.to_html(include_plotlyjs=True),
        file_name=f"{key}.html",
        mime="text/html",
        icon=":material/download:",
        type="tertiary",
        on_click="ignore",
        key=f"html-{key}",
        help="The figure as a page that needs nothing else",
    )
    return drawn


def frame(held: pd.DataFrame, name: str, formats: Mapping[str, str], **how: Any) -> Any:
    """A table and its download as CSV; a selection comes back where one is asked for.

    Args:
        held: the rows.
        name: of the downloaded file.
        formats: printf formats of number columns.
        how: further arguments of `st.dataframe`.
    """
    columns = {column: st.column_config.NumberColumn(format=f) for column, f in formats.items()}
    columns |= how.pop("column_config", {})
    how.setdefault("height", min(_ROW * (len(held) + 1) + 2, _HIGHEST))
    drawn = st.dataframe(held, hide_index=True, column_config=columns, **how)
    st.download_button(
        "Download as CSV",
        lambda: held.to_csv(index=False),
        file_name=f"{name}.csv",
        mime="text/csv",
        icon=":material/download:",
        type="tertiary",
        on_click="ignore",
        key=f"download-{name}",
    )
    return drawn


def table(rows: Sequence[Mapping[str, object]], name: str, formats: Mapping[str, str]) -> None:
    """A small table, one mapping a row, all with the same columns; see `frame`."""
    frame(pd.DataFrame(list(rows)), name, formats)
