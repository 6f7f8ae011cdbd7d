"""SAE-Tuning of a model through a recommended layer, scored before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.stage import Context
from resa_lens.evals.run import EvalResult
from resa_lens.evals.tasks import EvalItem
from resa_lens.models.host import Model, load_model
from resa_lens.stages.adapters import Adapter, adapter_run, elicitation_records, questions_of
from resa_lens.stages.card import adapter_card, write_card
from resa_lens.stages.saes import SaeRun
from resa_lens.stages.scores import (
    EvalRun,
    compare_results,
    eval_run,
    note_overlap,
)
from resa_lens.stages.tune_job import TuneJob, with_sequence
from resa_lens.stats import PairedComparison


@dataclass(frozen=True)
class Tuned:
    """The adapter and the scores before and after."""

    adapter: Adapter
    site: str
    base: EvalRun
    tuned: EvalRun
    paired: PairedComparison

    @property
    def model(self) -> Model:
        """The target."""
        return self.adapter.target

    @property
    def layer(self) -> int | None:
        """0-based; None where no SAE was used."""
        return self.adapter.layer

    @property
    def losses(self) -> tuple[float, ...]:
        """Of each update."""
        return tuple(self.adapter.artifact.manifest.results["losses"])

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that the command line promises."""

        def short(result: EvalResult) -> dict[str, Any]:
            return {"accuracy": result.accuracy, "n": result.n, "ci": list(result.ci)}

        paired = self.paired
        recommendation, saes = self.adapter.recommendation, self.adapter.saes
        return {
            "adapter": str(self.adapter.folder),
            "model": self.model.name,
            "layer": self.layer,
            "layer_1_indexed": None if self.layer is None else self.layer + 1,
            "site": self.site,
            "base": short(self.base.result),
            "tuned": short(self.tuned.result),
            "paired": {
                "difference": paired.difference,
                "ci": list(paired.ci),
                "p_value": paired.p_value,
                "changed": paired.changed,
                "gained": paired.gained,
                "lost": paired.lost,
                "n": paired.n,
                "note": paired.note,
            },
            "selector": self.adapter.selector,
            "note": self.adapter.note,
            "recommendation": recommendation and str(recommendation.path),
            "start": self.adapter.start and self.adapter.start.start(),
            "saes": saes and str(saes.folder),
            "evals": [str(self.base.artifact.path), str(self.tuned.artifact.path)],
            "steps": len(self.losses),
            "loss": [self.losses[0], self.losses[-1]],
        }


def score_adapter(
    ctx: Context, job: TuneJob, adapter: Adapter, items: Sequence[EvalItem]
) -> EvalRun:
    """Score a finished adapter on the questions, or read the finished run."""
    adapted = load_model(
        str(adapter.folder), device=ctx.device, dtype=ctx.dtype, base=job.base or job.model,
        weights_of=adapter.target,
    )  # fmt: skip
    return eval_run(
        ctx, adapted, items, job.evaluation, source=job.eval_source, label="the tuned model",
        engine=job.engine,
    )  # fmt: skip


def score_base(ctx: Context, job: TuneJob, items: Sequence[EvalItem]) -> EvalRun:
    """Score the model without adapter in the same harness, or read the finished run."""
    plain = ctx.model(job.model, job.base)
    return eval_run(
        ctx, plain, items, job.evaluation, source=job.eval_source, label="the base model",
        engine=job.engine,
    )  # fmt: skip


def tune_run(
    ctx: Context,
    job: TuneJob,
    saes: SaeRun | None = None,
    recommendation: Artifact | None = None,
) -> Tuned:
    """Tune adapters, score base and tuned on the same questions, and write the adapter's card.

    Args:
        ctx: the workspace and who to tell.
        job: what to tune and to ask.
        saes: the SAEs to use where they are at hand; else as `adapter_run`.
        recommendation: of a job whose layer is "auto", where it is at hand.

    Raises:
        BadInputError: as `adapter_run` and `eval_run`.
        RunFailedError: a loss that is not finite, or a full disk.
    """
    job = with_sequence(job)
    items = questions_of(ctx, job)
    note_overlap(ctx, items, elicitation_records(job))
    adapter = adapter_run(ctx, job, saes, recommendation)
    base = score_base(ctx, job, items)
    tuned = score_adapter(ctx, job, adapter, items)
    paired = compare_results(base.result, tuned.result, ctx.seed)
    outcome = Tuned(adapter, job.objective.site, base, tuned, paired)
    sae = adapter.saes.artifact if adapter.saes else None
    card = adapter_card(
        adapter.artifact.manifest.model_dump(mode="json"),
        outcome.to_dict(),
        sae=sae.manifest.model_dump(mode="json") if sae else None,
    )
    write_card(adapter.folder, card)
    return outcome
