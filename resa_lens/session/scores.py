"""Scores, tuned adapters and comparisons as results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from resa_lens.models.hookpoints import describe_layer
from resa_lens.session.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from torch import Tensor

    from resa_lens.artifacts.artifact import Artifact
    from resa_lens.evals.compare import Comparison as Pair
    from resa_lens.evals.compare import Comparisons
    from resa_lens.stages.scores import EvalRun
    from resa_lens.stages.tuning import Tuned as TunedRun


@dataclass(frozen=True, repr=False)
class Scores(Result):
    """Scores of a model on questions, with every answer."""

    run: EvalRun
    name: str

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0 to 1."""
        return self.run.result.accuracy

    @property
    def ci(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy, over questions."""
        return self.run.result.ci

    @property
    def n(self) -> int:
        """The number of questions."""
        return self.run.result.n

    def groups(self) -> dict[str, tuple[float, tuple[float, float], int]]:
        """Return accuracy, interval and n of all questions, of each level and of each task."""
        return self.run.result.groups()

    def table(self) -> pd.DataFrame:
        """Return accuracy, 95 % interval (shares, 0 to 1) and n by group of questions."""
        rows = {
            name: {"accuracy": value, "ci_low": ci[0], "ci_high": ci[1], "n": n}
            for name, (value, ci, n) in self.groups().items()
        }
        return pd.DataFrame(rows.values(), index=pd.Index(rows, name="questions"))

    def answers(self) -> pd.DataFrame:
        """Return a row for each answer: question, gold answer, text, extracted answer, correct."""
        return pd.DataFrame(self.run.result.samples)

    def _sentences(self) -> list[str]:
        low, high = self.ci
        return [
            f"{self.name}: {100 * self.accuracy:.1f} % right ({100 * low:.1f} to "
            f"{100 * high:.1f} %, 95 %), n = {self.n}."
        ]

    def plot(self) -> go.Figure:
        """Draw the accuracy of each group with its 95 % interval."""
        from resa_lens.figures.plots import scores_figure

        return scores_figure({self.name: self.groups()})


@dataclass(frozen=True, repr=False)
class Tuned(Result):
    """A tuned adapter, scored before and after on the same questions."""

    run: TunedRun
    control: str | None
    """What stood in the SAE's place, or was done in place of SAE-Tuning; None for the SAE."""

    @property
    def artifact(self) -> Artifact:
        """The adapter's artifact; its folder is a plain PEFT adapter."""
        return self.run.adapter.artifact

    @property
    def layer(self) -> int | None:
        """The layer that was tuned through, 0-based; None where no SAE was used."""
        return self.run.layer

    @property
    def base(self) -> Scores:
        """The scores of the model without the adapter."""
        return Scores(self.run.base, "base")

    @property
    def scores(self) -> Scores:
        """The scores of the model with the adapter."""
        return Scores(self.run.tuned, self.name)

    @property
    def difference(self) -> float:
        """Accuracy with the adapter less that without it, a share from -1 to 1."""
        return self.run.paired.difference

    @property
    def ci(self) -> tuple[float, float]:
        """The 95 % interval of the paired difference."""
        return self.run.paired.ci

    @property
    def p_value(self) -> float:
        """The p-value of the paired difference."""
        return self.run.paired.p_value

    @property
    def losses(self) -> tuple[float, ...]:
        """The loss of each update, in nats a token."""
        return self.run.losses

    def weights(self) -> dict[str, Tensor]:
        """Load the adapter's tensors: lora_A.weight [rank, d_in], lora_B.weight [d_out, rank]."""
        from safetensors.torch import load_file

        return load_file(self.artifact.path / "adapter_model.safetensors")

    @property
    def name(self) -> str:
        """The control's name, or "SAE", and the layer (0-based)."""
        what = self.control or "SAE"
        return what if self.layer is None else f"{what}, layer {self.layer}"

    def table(self) -> pd.DataFrame:
        """Return accuracy, 95 % interval (shares) and n of base and tuned, and the difference."""
        rows = {
            name: {"accuracy": r.accuracy, "ci_low": r.ci[0], "ci_high": r.ci[1], "n": r.n}
            for name, r in (("base", self.base), ("tuned", self.scores))
        }
        values = (self.difference, *self.ci, self.run.paired.n)
        rows["difference"] = dict(zip(rows["base"], values, strict=True))
        return pd.DataFrame(rows.values(), index=list(rows))

    def _sentences(self) -> list[str]:
        paired = self.run.paired
        low, high = (100 * bound for bound in paired.ci)
        what = "the SAE" if self.control is None else self.control
        if self.layer is not None:
            what += f" at {describe_layer(self.layer, self.run.model.n_layers)}"
        return [
            f"{self.run.model.name} tuned with {what}, {len(self.losses)} updates.",
            f"{100 * paired.difference:+.1f} points ({low:+.1f} to {high:+.1f}, 95 %), "
            f"p = {paired.p_value:.3g}; {paired.changed} of {paired.n} answers changed.",
        ]

    def plot(self) -> go.Figure:
        """Draw the accuracy before and after with 95 % intervals."""
        from resa_lens.figures.plots import scores_figure

        return scores_figure({"base": self.base.groups(), self.name: self.scores.groups()})


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Runs compared question by question; it is computed, and not stored."""

    run: Pair | Comparisons
    margin: float
    """Differences within it, a share, count as equally good."""

    def table(self) -> pd.DataFrame:
        """Return each difference (shares) with its interval, p-values and the answers changed."""
        from resa_lens.stages.comparison import lines_of

        rows = [
            {
                "difference": line.difference, "ci_low": line.ci[0], "ci_high": line.ci[1],
                "p_value": line.p_value, "holm_p": line.holm_p, "n": line.n,
                "changed": line.changed,
            }
            for line in lines_of(self.run)
        ]  # fmt: skip
        return pd.DataFrame(rows, index=pd.Index([r.label for r in lines_of(self.run)]))

    def _overview(self) -> pd.DataFrame:
        from resa_lens.evals.compare import Comparisons

        # Of two runs tasks and levels are a matter of `table()`.
        return self.table() if isinstance(self.run, Comparisons) else self.table().head(1)

    def _sentences(self) -> list[str]:
        from resa_lens.evals.compare import Comparison as Pair
        from resa_lens.stages.comparison import sentences

        if isinstance(self.run, Pair):
            head = f"{self.run.other} minus {self.run.base}."
        else:
            head = f"Each run minus {self.run.base.name}."
        return [head, *sentences(self.run)]

    def save(self, path: str | Path) -> Path:
        """Write the comparison as a page (.html) or a table (.csv).

        Raises:
            BadInputError: another ending, or no permission.
        """
        from resa_lens.stages.comparison import save

        save(Path(path), self.run, self.margin)
        return Path(path)

    def plot(self) -> go.Figure:
        """Draw the differences with their intervals, and the margin as a band."""
        from resa_lens.figures.scores import forest_figure
        from resa_lens.stages.comparison import lines_of

        rows = [(line.label, line.difference, line.ci) for line in lines_of(self.run)]
        return forest_figure(rows, self.margin, "Differences", "95 % intervals")
