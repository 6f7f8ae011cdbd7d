"""What all pages share: problems, figures, tables with their download.

Text from files goes through `st.text`, tables and figures, which show tags and markup as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

_FIGURE = {"displaylogo": False, "responsive": True}
_ROW, _HIGHEST = 36, 430  # pixels of a row and of a whole table


def problem(text: str, command: str | None = None) -> None:
    """Say what is wrong and which command helps; the text is shown as it is."""
    with st.container(border=True):
        st.badge("this cannot be shown", icon=":material/error:", color="orange")
        st.text(text)
        if command:
            st.code(command, language="bash", wrap_lines=True)


def figure(made: go.Figure, key: str) -> None:
    """A figure in the theme's colours, light or dark."""
    st.plotly_chart(made, theme="streamlit", config=_FIGURE, key=key)


def table(rows: Sequence[Mapping[str, object]], name: str, formats: Mapping[str, str]) -> None:
    """A table and its download.

    Args:
        rows: one mapping a row, all with the same columns.
        name: of the downloaded file.
        formats: printf formats of number columns.
    """
    frame = pd.DataFrame(list(rows))
    columns = {column: st.column_config.NumberColumn(format=f) for column, f in formats.items()}
    height = min(_ROW * (len(frame) + 1) + 2, _HIGHEST)
    st.dataframe(frame, hide_index=True, column_config=columns, height=height)
    st.download_button(
        "Download as CSV",
        frame.to_csv(index=False),
        file_name=f"{name}.csv",
        mime="text/csv",
        icon=":material/download:",
        key=f"download-{name}",
    )
