"""What a result is: one screen of text, a table, a path and a manifest."""

from __future__ import annotations

import html
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from resa_lens.artifacts.artifact import Artifact
    from resa_lens.artifacts.manifest import Manifest

ROWS = 14
"""Rows of a table on the one screen of a result; `table()` has all of them."""


class Result(ABC):
    """A result: printed it is one screen, in a notebook a table; `table()` has all of it."""

    run: Any
    """What the stage, or the computation, returned."""

    @property
    def artifact(self) -> Artifact | None:
        """The artifact of the workspace; None for what was computed and not stored."""
        return getattr(self.run, "artifact", None)

    @property
    def path(self) -> Path | None:
        """The folder that holds the result; None for what was computed and not stored."""
        return self.artifact.path if self.artifact else None

    @property
    def manifest(self) -> Manifest | None:
        """What the result was made from; None for what was computed and not stored."""
        return self.artifact.manifest if self.artifact else None

    @abstractmethod
    def table(self) -> pd.DataFrame:
        """Return the result as a table, with full precision."""

    @abstractmethod
    def _sentences(self) -> list[str]:
        """Return what the result says, in plain sentences."""

    def _overview(self) -> pd.DataFrame:
        """Return the table that the one screen shows."""
        return self.table()

    def __repr__(self) -> str:
        """Return one screen of text."""
        grid = self._overview()
        text = grid.to_string(max_rows=ROWS, float_format="{:.4g}".format, line_width=100)
        return "\n".join([*self._sentences(), *([text] if len(grid) else []), *self._place()])

    def _repr_html_(self) -> str:
        grid = self._overview()
        text = "<br>".join(html.escape(sentence) for sentence in self._sentences())
        rows = grid.to_html(max_rows=ROWS, float_format="{:.4g}".format, border=0)
        place = "".join(f"<p><code>{html.escape(line)}</code></p>" for line in self._place())
        return f"<div><p>{text}</p>{rows if len(grid) else ''}{place}</div>"

    def _place(self) -> list[str]:
        if self.path is None:
            return []
        near = os.path.relpath(self.path)
        return [str(self.path) if near.startswith("..") else near]
