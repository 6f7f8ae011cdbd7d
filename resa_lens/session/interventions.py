"""Features changed, weighed and put to trials, as results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from resa_lens.session.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from resa_lens.features.dependences import Share
    from resa_lens.stages.ablation import AblationRun
    from resa_lens.stages.attribution import AttributionRun


@dataclass(frozen=True, repr=False)
class Ablation(Result):
    """Answers with features changed, beside random features of about the same activation mass."""

    run: AblationRun

    @property
    def results(self) -> dict[str, Any]:
        """Effect, control and p-value at the main strength (shares), and a row a strength."""
        return self.run.results

    def table(self) -> pd.DataFrame:
        """Return accuracy (a share) and change of each strength, with the random features'."""
        return pd.DataFrame(self.results["doses"]).set_index("strength")

    def _overview(self) -> pd.DataFrame:
        return self.table().select_dtypes("number")

    def _sentences(self) -> list[str]:
        low, high = (100 * bound for bound in self.results["effect_ci"])
        return [
            f"{self.results['where']}: {100 * self.results['effect']:+.1f} points ({low:+.1f} to "
            f"{high:+.1f}, n = {self.results['n']}); random features "
            f"{100 * self.results['control']:+.1f}, p = {self.results['p_value']:.2g}.",
            self.results["note"],
        ]

    def plot(self) -> go.Figure:
        """Draw the accuracy by strength, the random features beside it."""
        from resa_lens.figures.plots import dose_response_figure

        return dose_response_figure(self.results["doses"], "Dose and response")


@dataclass(frozen=True, repr=False)
class Attribution(Result):
    """What features do to the loss, by gradient and by taking them out."""

    run: AttributionRun

    @property
    def results(self) -> dict[str, Any]:
        """The loss, the effects and how far the two measures agree."""
        return self.run.results

    def table(self) -> pd.DataFrame:
        """Return `patching` and `gradient`, in nats a token, with interval and p, by feature."""
        return pd.DataFrame(self.results["effects"]).set_index("feature")

    def _sentences(self) -> list[str]:
        return [
            f"Loss {self.results['loss']:.4f} nats a token over {self.results['documents']} "
            "documents; without a feature it changes by `patching`."
        ]


@dataclass(frozen=True, repr=False)
class Trials(Result):
    """How often one feature fires at the tags, or in their places, of texts that are changed."""

    run: dict[str, Share]
    texts: dict[str, str]
    """An example of each kind."""
    threshold: float
    """Share of trials from which on a feature counts as firing."""

    def table(self) -> pd.DataFrame:
        """Return trials in which it fired, of how many, and the share with its 95 % interval."""
        rows = {
            kind: {"fired": s.fired, "n": s.n, "share": s.share, "ci_low": s.ci[0],
                   "ci_high": s.ci[1]}
            for kind, s in self.run.items()
        }  # fmt: skip
        return pd.DataFrame.from_dict(rows, orient="index")

    def _sentences(self) -> list[str]:
        return ["Trials in which the feature fires, by kind of text."]

    def plot(self) -> go.Figure:
        """Draw the shares with their intervals."""
        from resa_lens.figures.features import trials_figure

        shares = {kind: (share.fired, share.n, share.ci) for kind, share in self.run.items()}
        return trials_figure(shares, self.threshold)
