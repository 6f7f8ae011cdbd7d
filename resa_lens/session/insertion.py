"""The insertion test as a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from resa_lens.models.hookpoints import describe_layer
from resa_lens.session.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from resa_lens.artifacts.artifact import Artifact
    from resa_lens.models.host import Model
    from resa_lens.stages.insertion import InsertionRun


@dataclass(frozen=True, repr=False)
class Insertion(Result):
    """What SAEs do to the answers when they are inserted and nothing is tuned."""

    run: InsertionRun
    model: Model

    @property
    def artifact(self) -> Artifact:
        """The test's artifact."""
        return self.run.artifact

    @property
    def verdicts(self) -> dict[int, str]:
        """The verdict by layer, 0-based."""
        return {int(row["layer"]): str(row["verdict"]) for row in self.run.layers}

    def table(self) -> pd.DataFrame:
        """Return accuracy and its paired change (shares) by layer and by what was inserted."""
        rows, index = [], []
        for layer in self.run.layers:
            costs = {
                f"{name} ablation": cost["accuracy"] for name, cost in layer["ablation"].items()
            }
            for arm, figures in {**layer["inserted"], **costs}.items():
                if figures is None:
                    continue
                index.append((layer["layer"], arm))
                low, high = figures["difference_ci"]
                rows.append({
                    "accuracy": figures["accuracy"], "difference": figures["difference"],
                    "ci_low": low, "ci_high": high, "p_value": figures["p_value"],
                    "n": figures["n"],
                })  # fmt: skip
        return pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(index, names=["layer", "arm"]))

    def _sentences(self) -> list[str]:
        return [
            f"{describe_layer(row['layer'], self.model.n_layers)}: {row['verdict']}; "
            f"{row['reason']}."
            for row in self.run.layers
        ]

    def plot(self) -> go.Figure:
        """Draw the change of accuracy by each thing that was inserted, with 95 % intervals."""
        from resa_lens.figures.scores import forest_figure

        rows = [
            (f"layer {layer}, {arm}", difference, (low, high))
            for (layer, arm), difference, low, high in self.table()[
                ["difference", "ci_low", "ci_high"]
            ].itertuples(name=None)
        ]
        return forest_figure(rows, 0.0, "Inserted, nothing tuned", "95 % intervals")
