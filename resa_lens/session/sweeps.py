"""A finished sweep as a result."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from resa_lens.artifacts.kinds.sweep import ANSWERS, SWEEP, SweepTables
from resa_lens.session.results import Result

if TYPE_CHECKING:
    import numpy as np
    import plotly.graph_objects as go

    from resa_lens.artifacts.artifact import Artifact


@dataclass(frozen=True, repr=False)
class Sweep(Result):
    """Tunings at every layer, with several seeds and controls, each scored."""

    run: Artifact

    @property
    def artifact(self) -> Artifact:
        """The sweep's artifact."""
        return self.run

    @cached_property
    def tables(self) -> SweepTables:
        """Every figure of the sweep: layers, controls, selectors, power."""
        return self.run.read(SWEEP, SweepTables)

    def table(self) -> pd.DataFrame:
        """Return accuracy (a share), difference to the base model and its tests, by layer."""
        rows = []
        for row in self.tables.layers:
            names = ("layer", "accuracy", "difference", "p_value", "adjusted_p", "seeds")
            low, high = row["simultaneous_ci"]
            rows.append({**{name: row[name] for name in names}, "ci_low": low, "ci_high": high})
        return pd.DataFrame(rows).set_index("layer")

    def controls(self) -> pd.DataFrame:
        """Return what each control scores, and the SAE's difference to it, as text."""
        from resa_lens.stages.sweep_page import control_cells

        header, rows = control_cells(self.tables)
        return pd.DataFrame(rows, columns=list(header)).set_index("control")

    def selectors(self) -> pd.DataFrame:
        """Return the layer that each selector chooses, with its regret in points, as text."""
        from resa_lens.stages.sweep_page import selector_cells

        header, rows = selector_cells(self.tables)
        return pd.DataFrame(rows, columns=list(header)).set_index("selector")

    def answers(self) -> pd.DataFrame:
        """Return which questions the base model and each tuning answered right, by job's name."""
        return pd.read_parquet(self.run.file(ANSWERS))

    def correct(self) -> np.ndarray:
        """Return the answers by layer, seed and question: [layers, seeds, questions] of bool."""
        import numpy as np

        answers, names = self.answers(), {}
        for job in self.tables.jobs:
            names.setdefault(job["layer"], []).append(job["name"])
        layers = [row["layer"] for row in self.tables.layers]
        return np.stack([answers[names[layer]].to_numpy().T for layer in layers])

    def _sentences(self) -> list[str]:
        from resa_lens.stages.sweep_page import findings

        return findings(self.tables)

    def plot(self, **options: Any) -> go.Figure:
        """Draw each layer's scores over seeds against the base model's, with intervals."""
        from resa_lens.figures.scores import sweep_figure

        tables = self.tables
        return sweep_figure(tables.layers, tables.jobs, tables.controls, tables.base, **options)
