"""The way to a layer as results: SAEs, counts, mixture, recommendation, audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from resa_lens.layers import MixtureFit
from resa_lens.models.hookpoints import describe_layer
from resa_lens.session.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from resa_lens.features.exclusive import TaggedPrompt
    from resa_lens.layers.alignment import Alignment
    from resa_lens.layers.audit import Audit as AuditFindings
    from resa_lens.models.host import Model
    from resa_lens.saes.coder import SparseCoder
    from resa_lens.stages.counts import CountRun
    from resa_lens.stages.recommendation import RecommendationRun
    from resa_lens.stages.saes import SaeRun


def _layer_index(layers: Sequence[int]) -> pd.Index:
    return pd.Index(layers, name="layer")


@dataclass(frozen=True, repr=False)
class SAEs(Result):
    """Sparse autoencoders of a model, one a layer."""

    run: SaeRun
    model: Model

    @property
    def path(self) -> Path:
        """The folder that holds a folder for each hook point."""
        return self.run.folder

    @property
    def layers(self) -> list[int]:
        """The layers that have an SAE, 0-based."""
        return self.run.layers

    @property
    def site(self) -> str:
        """The site of the hook points: "mlp_out" or "resid_post"."""
        return self.run.site

    def sae(self, layer: int) -> SparseCoder:
        """Load the SAE of a layer: `W_dec` is [d_sae, d_in], `encoder.weight` [d_sae, d_in].

        Raises:
            BadInputError: the layer (0-based) has no SAE, or its files were changed.
        """
        (coder,) = self.run.coders(self.model, [layer]).values()
        return coder

    def activations(self, layer: int, ids: Sequence[int]) -> pd.DataFrame:
        """Return the active latents of a layer's SAE (0-based) along one text.

        Args:
            layer: the layer.
            ids: the text's token ids, for example `counts.prompt.ids`.

        Returns:
            A row for each active latent of each token: `position`, `feature`, `activation`.
        """
        import torch

        from resa_lens.models.activations import stream_activations
        from resa_lens.models.hookpoints import Hookpoint
        from resa_lens.saes.coder import encode

        point = Hookpoint(layer, self.site)
        (batch,) = stream_activations(self.model, [torch.tensor([list(ids)])], [point])
        acts = encode(self.sae(layer), batch.acts[point][0].float())
        columns = {"position": acts.rows, "feature": acts.latents, "activation": acts.values}
        return pd.DataFrame({name: column.tolist() for name, column in columns.items()})

    def table(self) -> pd.DataFrame:
        """Return the quality of each layer's SAE on held-out text.

        `fvu` is the fraction of variance unexplained (0 is perfect, 1 no better than the mean),
        `l0` the active latents a token, `dead_share` the share of latents that never fired.
        """
        rows = [
            {k: v for k, v in self.run.quality.get(layer, {}).items() if k != "layer"}
            for layer in self.layers
        ]
        return pd.DataFrame(rows, index=_layer_index(self.layers))

    def _overview(self) -> pd.DataFrame:
        return self.table().filter(["fvu", "l0", "dead_share"])

    def _sentences(self) -> list[str]:
        trained = f", trained on {self.run.tokens:,} tokens" if self.run.tokens else ""
        size = ""
        if training := self.run.training():
            size = f" with {training[0].latents} latents, {training[0].k} of them active a token"
        return [
            f"{len(self.layers)} SAEs of {self.model.name} at site {self.site}{size}{trained}.",
            *self.run.warnings,
        ]

    def plot(self) -> go.Figure:
        """Draw the fraction of variance unexplained by layer."""
        from resa_lens.figures.plots import quality_figure

        return quality_figure({k: row["fvu"] for k, row in self.run.quality.items()})


@dataclass(frozen=True, repr=False)
class Counts(Result):
    """Exclusive features: active at the think tags of the prompt and at no other token."""

    run: CountRun
    model: Model
    saes: SAEs

    def table(self) -> pd.DataFrame:
        """Return the features that each rule counts, and those active at all, by layer."""
        items = self.run.counts.layers
        rows = [{**item.to_dict(), "active": item.active} for item in items]
        return pd.DataFrame(rows).set_index("layer")

    @property
    def prompt(self) -> TaggedPrompt:
        """The prompt's tokens, and which of them belong to the tags."""
        return self.run.counts.prompt

    @property
    def tag_positions(self) -> list[int]:
        """The positions of the prompt's tokens that belong to the tags."""
        spans = (*self.prompt.open_spans, *self.prompt.close_spans)
        return sorted(place for span in spans for place in span)

    def features(self, layer: int, rule: str = "all") -> tuple[int, ...]:
        """Return the latents that a rule counts at a layer (0-based)."""
        self.run.counts.table(rule)  # refuses an unknown rule
        by_layer = {item.layer: item.features for item in self.run.counts.layers}
        return tuple(by_layer[layer][rule]) if layer in by_layer else ()

    def mixture(self, rule: str = "all", **options: Any) -> Mixture:
        """Fit Gaussians over the layers to a rule's counts; options as of `fit_mixture`."""
        from resa_lens.session.plain import fit_mixture

        return fit_mixture(self.run.counts.table(rule), **options)

    def _sentences(self) -> list[str]:
        counts = self.run.counts
        totals = self.table().sum()
        sums = ", ".join(f"{totals[rule]} by rule {rule}" for rule in ("all", "any", "either"))
        return [
            f"Exclusive features of {self.model.name}, site {self.saes.site}: {sums}; "
            f"{totals['active']} latents are active on the prompt of {len(counts.prompt.ids)} "
            "tokens."
        ]

    def plot(self) -> go.Figure:
        """Draw the counts of the three rules by layer."""
        from resa_lens.figures.plots import counts_figure

        return counts_figure({r: self.run.counts.table(r) for r in ("all", "any", "either")})


@dataclass(frozen=True, repr=False)
class Mixture(Result):
    """Gaussians over the layers, with the nulls that they were compared with and a verdict."""

    run: MixtureFit

    @property
    def fit(self) -> MixtureFit:
        """Every figure of the fit: components, nulls, information criterion, entropy."""
        return self.run

    @property
    def verdict(self) -> str:
        """Whether the profile has lumps: "supported", "trend", "weak", or that it is flat."""
        return self.run.verdict

    @property
    def reason(self) -> str:
        """Why the verdict is what it is, with statistics and p-values."""
        return self.run.reason

    def table(self) -> pd.DataFrame:
        """Return mean, weight and standard deviation of each component, in layers (0-based)."""
        columns = ["mean", "weight", "std"]
        return pd.DataFrame([vars(part) for part in self.run.components], columns=columns)

    def align(self, other: Mixture, **options: Any) -> Alignment:
        """Ask whether this mixture's means lie closer to another's than chance puts them.

        Args:
            other: its means stay, while this profile is shuffled and fitted again.
            options: draws and seed of `resa_lens.layers.alignment.align`.
        """
        from resa_lens.layers.alignment import align

        return align(self.run, other.run, **options)

    def _sentences(self) -> list[str]:
        fit = self.run
        head = f"{fit.k} components over {len(fit.layers)} layers, recipe {fit.recipe}"
        return [f"{head}: {fit.verdict}.", fit.reason, fit.next_step]

    def plot(self) -> go.Figure:
        """Draw the profile, the fitted density, and the band that chance gives."""
        from resa_lens.figures.plots import mixture_figure

        return mixture_figure(self.run)


@dataclass(frozen=True, repr=False)
class Recommendation(Result):
    """Layers to tune, best first, with the verdict on what they rest on."""

    run: RecommendationRun
    counts: Counts

    @property
    def layer(self) -> int:
        """The first recommended layer, 0-based."""
        return self.run.recommendation.recommended[0]

    @property
    def layers(self) -> tuple[int, ...]:
        """All recommended layers, 0-based, best first."""
        return self.run.recommendation.recommended

    @property
    def selector(self) -> str:
        """The selector that decided: "middle" where the one asked for had no support."""
        return self.run.recommendation.selector

    @property
    def verdict(self) -> str:
        """Whether counts support the layer: "supported", "trend", "weak", or that they do not."""
        return self.run.recommendation.verdict

    @property
    def reason(self) -> str:
        """Why this layer."""
        return self.run.recommendation.reason

    @property
    def next_step(self) -> str:
        """What to do next."""
        return self.run.recommendation.next_step

    def table(self) -> pd.DataFrame:
        """Return the counted features of each layer, and the rank of those recommended."""
        ranks = {layer: rank for rank, layer in enumerate(self.layers, 1)}
        features = self.run.recommendation.layers
        ranked = pd.array([ranks.get(layer) for layer in features], dtype="Int64")
        rows = {"features": list(features.values()), "rank": ranked}
        return pd.DataFrame(rows, index=_layer_index(list(features)))

    def _overview(self) -> pd.DataFrame:
        return self.table().dropna(subset=["rank"]).sort_values(by="rank")

    def _sentences(self) -> list[str]:
        place = describe_layer(self.layer, self.run.recommendation.n_layers)
        return [
            f"Tune {place}. Selector: {self.selector}. Verdict: {self.verdict}.",
            self.reason,
            self.next_step,
        ]

    def plot(self) -> go.Figure:
        """Draw the counts with the recommended layers: solid where supported, else dotted."""
        from resa_lens.figures.plots import counts_figure

        rule = str(self.run.artifact.settings.rule)
        table = {layer: int(value) for layer, value in self.run.recommendation.layers.items()}
        return counts_figure(
            {rule: table}, recommended=self.layers, verdict=self.verdict,
            title=f"Counts of rule {rule}, and the layer",
        )  # fmt: skip


@dataclass(frozen=True, repr=False)
class Audit(Result):
    """A published table of checkpoints, questioned; it is computed, and not stored."""

    run: AuditFindings

    def table(self) -> pd.DataFrame:
        """Return the variance between and within groups of each score, with its F test."""
        rows = [
            {
                "score": part.score, "sd_between": part.sd_between, "sd_within": part.sd_within,
                "f_statistic": part.anova and part.anova.f_statistic,
                "p_value": part.anova and part.anova.p_value, "holm_p": part.holm_p,
            }
            for part in self.run.variance
        ]  # fmt: skip
        return pd.DataFrame(rows).set_index("score")

    def misfits(self) -> list[str]:
        """Return a sentence for each row that fits neither reading: what comes nearest to it."""
        from resa_lens.layers.audit import describe_nearest
        from resa_lens.layers.granularity import NEITHER

        table = self.run.table
        return [
            f"{table.row_names[row]}: {describe_nearest(table, row, verdict)}"
            for row, verdict in enumerate(self.run.test.rows)
            if verdict.verdict == NEITHER
        ]

    def _sentences(self) -> list[str]:
        from resa_lens.layers.findings import summary

        return [f"- {sentence}" for sentence in summary(self.run)]
