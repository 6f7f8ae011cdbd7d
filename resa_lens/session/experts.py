"""Experts of a mixture measured, ranked and changed, as results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from resa_lens.session.options import filled
from resa_lens.session.results import Result
from resa_lens.session.workbench import Workbench

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from resa_lens.models.host import Model
    from resa_lens.stages.ranking import RankingRun
    from resa_lens.stages.routing import RoutingRun
    from resa_lens.stages.steering import SteeringRun


@dataclass(frozen=True, repr=False)
class Routing(Result):
    """How much every expert is used, by phase and at the tags."""

    run: RoutingRun

    def table(self) -> pd.DataFrame:
        """Return use (a share of tokens), its standard error and weight mass by layer, expert."""
        rows = {
            (row["layer"], row["expert"]): {
                f"{name} {place}": value
                for name, places in row["scores"].items()
                for place, value in places.items()
            }
            for row in self.run.results["experts"]
        }
        frame = pd.DataFrame.from_dict(rows, orient="index")
        frame.index = pd.MultiIndex.from_tuples(list(rows), names=["layer", "expert"])
        return frame

    def _overview(self) -> pd.DataFrame:
        return self.table().filter(["use prompt", "use think", "use answer"])

    def _sentences(self) -> list[str]:
        results = self.run.results
        shares = [row["predicted_by_token"] for row in results["routers"]]
        return [
            f"{len(shares)} layers with {results['routers'][0]['experts']} experts, "
            f"{results['routers'][0]['k']} a token; {results['documents']['all']} documents. The "
            f"token alone predicts {100 * min(shares):.0f} to {100 * max(shares):.0f} % of the "
            "slots."
        ]

    def plot(self, place: str = "think") -> go.Figure:
        """Draw the use at the tokens of a phase or tag, layers by experts."""
        from resa_lens.figures.experts import experts_figure

        return experts_figure(self.run.results["experts"], f"scores.use.{place}", f"Use, {place}")


@dataclass(frozen=True, repr=False)
class Ranking(Result):
    """Experts ranked for a target, the strongest first, beside the nulls."""

    run: RankingRun

    @property
    def null(self) -> dict[str, Any]:
        """Exchanged labels, split halves, token types and token-matched contrasts."""
        return self.run.results["null"]

    def table(self) -> pd.DataFrame:
        """Return the scores by layer and expert, with p-values, the strongest first."""
        rows = {
            (row["layer"], row["expert"]): {
                **row["scores"], "p_value": row["p_value"], "p_holm": row["p_holm"],
                "type_p": row["type_p"],
            }
            for row in self.run.results["experts"]
        }  # fmt: skip
        frame = pd.DataFrame.from_dict(rows, orient="index")
        frame.index = pd.MultiIndex.from_tuples(list(rows), names=["layer", "expert"])
        return frame

    def _sentences(self) -> list[str]:
        results, types = self.run.results, self.null["token_types"]
        text = f"Experts for {results['target']}, by {results['by']}."
        if types:
            text += (
                f" {types['reached_by']} of {len(types['types'])} ordinary token types have an "
                f"expert as specific (p = {types['p_value']:.2g})."
            )
        return [text, *results["notes"]]

    def plot(self, measure: str | None = None) -> go.Figure:
        """Draw a score, layers by experts; "rd-matched" is of equal tokens alone."""
        from resa_lens.figures.experts import experts_figure

        name = measure or self.run.results["by"]
        title = f"{name} for {self.run.results['target']}"
        return experts_figure(self.run.results["experts"], f"scores.{name}", title)


@dataclass(frozen=True, repr=False)
class Steering(Result):
    """Thoughts and answers with experts changed, beside random experts of the same use."""

    run: SteeringRun

    @property
    def results(self) -> dict[str, Any]:
        """Effect, control and p-value of the loss of thoughts (nats a token), and the doses."""
        return self.run.results

    def table(self) -> pd.DataFrame:
        """Return by number of experts the changes of loss, accuracy (a share) and length."""
        rows = {
            dose["experts"]: {
                **{f"loss, {phase}": row["change"] for phase, row in dose["loss"].items()},
                "accuracy": dose["accuracy"], "change": dose["effect"]["difference"],
                "tokens": dose["tokens"]["mean"], "finished": dose["finished"]["share"],
            }
            for dose in self.results["doses"]
        }  # fmt: skip
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("experts")

    def _sentences(self) -> list[str]:
        results = self.results
        return [
            f"Loss of thoughts {results['effect']:+.4f} nats a token; random experts of the same "
            f"use {results['control']:+.4f} on average, rank p = {results['p_value']:.2g} "
            f"({len(results['null']['random'])} sets).",
            *results["notes"],
        ]

    def plot(self) -> go.Figure:
        """Draw dose and response with the band of the random sets."""
        from resa_lens.figures.experts import steering_figure

        return steering_figure(self.results)


class Experts:
    """The lab's methods on experts: `lab.experts.rank(model)`."""

    def __init__(self, lab: Workbench) -> None:
        """Work in a lab's workspace."""
        self.lab = lab

    def measure(self, model: Model, **options: Any) -> Routing:
        """Count the use of every expert over documents, or over the model's own answers.

        Args:
            model: a mixture of experts.
            options: fields of `UseConfig` (tokens, unit, generations) and `CorpusConfig`.
        """
        from resa_lens.experts.config import UseConfig
        from resa_lens.stages.routing import routing_run
        from resa_lens.texts.corpora import CorpusConfig

        ctx = self.lab._context(options)
        use, corpus = filled("experts.measure", options, UseConfig(), CorpusConfig(seed=ctx.seed))
        return Routing(routing_run(ctx, model, corpus, use))

    def rank(self, model: Model, target: str | None = None, **options: Any) -> Ranking:
        """Rank experts for a tag, a phase or a class of documents, beside nulls.

        Args:
            model: a mixture of experts.
            target: a tag or token, "prompt", "think", "answer", or a class of `classes`.
            options: fields of `RankConfig` (by, classes, types, draws), `UseConfig` and
                `CorpusConfig`.
        """
        from resa_lens.experts.config import RankConfig, UseConfig
        from resa_lens.stages.ranking import ranking_run
        from resa_lens.texts.corpora import CorpusConfig

        ctx = self.lab._context(options)
        _, rank, corpus = filled(
            "experts.rank", options, UseConfig(), RankConfig(seed=ctx.seed, target=target),
            CorpusConfig(seed=ctx.seed),
        )  # fmt: skip
        return Ranking(ranking_run(ctx, model, corpus, rank))

    def steer(
        self,
        model: Model,
        experts: str | None = None,
        *,
        target: str | None = None,
        top: int = 4,
        tasks: str = "tiny",
        limit: int | None = 500,
        **options: Any,
    ) -> Steering:
        """Change experts and measure thoughts and answers, beside random experts.

        Args:
            model: a mixture of experts.
            experts: "5:9,2:3" (0-based layer:expert); the best of the ranking by default.
            target: of the ranking.
            top: experts that are changed, where none are named.
            tasks: the questions, as of `eval`.
            limit: questions at most; None for all.
            options: fields of `SteerConfig` (how, beta, where, sizes, random), `RankConfig`,
                `UseConfig` and `CorpusConfig`.
        """
        from resa_lens.evals.run import EvalConfig
        from resa_lens.experts.config import RankConfig, SteerConfig, UseConfig
        from resa_lens.stages.scores import questions_for
        from resa_lens.stages.steering import steering_run
        from resa_lens.texts.corpora import CorpusConfig

        ctx, evaluation = self.lab._context(options), EvalConfig(limit=limit)
        _, rank, config, corpus = filled(
            "experts.steer", options, UseConfig(),
            RankConfig(seed=ctx.seed, target=target, top=top),
            SteerConfig(seed=ctx.seed, experts=experts), CorpusConfig(seed=ctx.seed),
        )  # fmt: skip
        config = replace(config, rank=rank, eval=evaluation)
        items = questions_for(model, tasks, evaluation)
        return Steering(steering_run(ctx, model, items, corpus, config, source=tasks))
