"""Verdicts on features and their activity as results."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from resa_lens.features.battery import in_words
from resa_lens.features.words import NEEDS
from resa_lens.session.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from resa_lens.session.discovery import Counts, SAEs
    from resa_lens.stages.activity import ActivityRun
    from resa_lens.stages.falsification import FalsificationRun


@dataclass(frozen=True, repr=False)
class Falsification(Result):
    """The verdict on every counted feature, and what each depends on."""

    run: FalsificationRun
    counts: Counts

    def table(self) -> pd.DataFrame:
        """Return a row for each counted feature: rule, verdict, sentence and reason.

        A column for each dependence says whether the feature needs it: yes, no or undetermined.
        """
        columns = ["layer", "feature", "rule", "verdict", "sentence", "reason"]
        rows = pd.DataFrame(self.run.features, columns=columns)
        for name in NEEDS:
            rows[f"needs {name}"] = [
                feature["depends_on"].get(name, {}).get("needs") for feature in self.run.features
            ]
        return rows.set_index(["layer", "feature"])

    def _overview(self) -> pd.DataFrame:
        rows = [
            {"rule": tally["rule"], "counted": tally["counted"], **tally["verdicts"]}
            for tally in self.run.summary["rules"]
        ]
        return pd.DataFrame(rows).set_index("rule")

    def _sentences(self) -> list[str]:
        return [f"{self.run.summary['reason']}.", f"Of verdicts: {in_words()}.", *self.run.skipped]

    def plot(self) -> go.Figure:
        """Draw the counted features of each layer by their verdict."""
        from resa_lens.figures.plots import verdict_figure

        by_layer = {layer: {} for layer in self.counts.table().index}
        for item in self.run.features:
            tally = by_layer[item["layer"]]
            tally[item["verdict"]] = tally.get(item["verdict"], 0) + 1
        return verdict_figure(by_layer)


@dataclass(frozen=True)
class Examples:
    """Excerpts of documents with a feature's activation at each token, the strongest first."""

    excerpts: list[dict[str, Any]]
    """Each with `tokens`, `acts`, `value` at its peak, `position`, `start` and `phase`."""

    def __repr__(self) -> str:
        """Return a line for each excerpt, its peak in brackets."""
        lines = []
        for excerpt in self.excerpts:
            tokens = list(excerpt["tokens"])
            peak = excerpt["position"] - excerpt["start"]
            tokens[peak] = f"[{tokens[peak]}]"
            lines.append(f"{excerpt['value']:.2f}, {excerpt['phase']}: {''.join(tokens)!r}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the excerpts with the activation as colour and a frame around the peak."""
        rows = []
        for excerpt in self.excerpts:
            top, parts = max(excerpt["acts"]), []
            pairs = zip(excerpt["tokens"], excerpt["acts"], strict=True)
            for place, (token, value) in enumerate(pairs):
                style = f"background:rgba(230,120,0,{0.8 * value / top:.2f})"
                if place == excerpt["position"] - excerpt["start"]:
                    style += ";outline:2px solid"
                parts.append(f'<span style="{style}">{html.escape(token)}</span>')
            note = f"{excerpt['value']:.2f}, {html.escape(excerpt['phase'])}"
            text = f"<code>{''.join(parts)}</code>"
            rows.append(f"<tr><td>{note}</td><td style='text-align:left'>{text}</td></tr>")
        return f"<table>{''.join(rows)}</table>"


@dataclass(frozen=True, repr=False)
class Activity(Result):
    """How often, how strongly and where every feature fires over documents."""

    run: ActivityRun
    saes: SAEs

    def table(self) -> pd.DataFrame:
        """Return a row for each layer: features that fire, latents, active latents a token."""
        return pd.DataFrame(self.run.layers).set_index("layer")

    def _overview(self) -> pd.DataFrame:
        return self.table().filter(["alive", "latents", "l0", "dense", "thinking", "prompt_only"])

    def features(self, layer: int) -> pd.DataFrame:
        """Return a row for each feature that fired at a layer (0-based), by its number."""
        from resa_lens.artifacts.feature_tables import FEATURES

        file = self.run.artifact.file(FEATURES)
        return pd.read_parquet(file, filters=[("layer", "==", layer)]).set_index("feature")

    def feature(self, layer: int, feature: int) -> dict[str, Any]:
        """Return everything known of one feature: densities, examples, logit lens, neighbours.

        Raises:
            BadInputError: no SAE at the layer (0-based), or a feature that never fired.
        """
        from resa_lens.stages.activity import feature_page

        return feature_page(self.saes.model, self.saes.run, self.run, layer, feature)

    def examples(self, layer: int, feature: int) -> Examples:
        """Return the places where a feature is strongest in each phase, for a notebook in colour.

        Raises:
            BadInputError: as `feature`.
        """
        from resa_lens.artifacts.feature_tables import STRONGEST

        examples = self.feature(layer, feature)["examples"]
        return Examples([row for row in examples if row["interval"] == STRONGEST])

    def _sentences(self) -> list[str]:
        tokens = ", ".join(f"{count} {phase}" for phase, count in self.run.tokens.items())
        return [f"Features of {self.saes.model.name} over {self.run.documents} documents "
                f"({tokens} tokens)."]  # fmt: skip

    def plot(self, layer: int, feature: int) -> go.Figure:
        """Draw the density of one feature in prompts, thoughts and answers."""
        from resa_lens.figures.features import phases_figure
        from resa_lens.texts.prompts import PHASES

        page = self.feature(layer, feature)
        densities = {phase: page[f"density_{phase}"] for phase in PHASES}
        return phases_figure(densities, page["density"], page["density_ci"], self.run.documents)
