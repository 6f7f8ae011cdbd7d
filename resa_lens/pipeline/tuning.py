"""SAE-Tuning of a model through a recommended layer, scored before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resa_lens.evals.run import EvalResult
from resa_lens.evals.tasks import EvalItem
from resa_lens.models import Model, load_model
from resa_lens.pipeline.adapters import Adapter, TuneJob, adapter_run, elicitation_records
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.scores import compare_results, eval_run, load_eval_items, note_overlap
from resa_lens.stats import PairedComparison
from resa_lens.tuning.adapters import adapter_card, write_card


@dataclass(frozen=True)
class Tuned:
    """The adapter and the scores before and after."""

    adapter: Path
    model: Model
    layer: int | None
    site: str
    base: EvalResult
    base_folder: Path
    tuned: EvalResult
    tuned_folder: Path
    paired: PairedComparison
    losses: tuple[float, ...]
    selector: str
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that the command line promises."""

        def short(result: EvalResult) -> dict[str, Any]:
            return {"accuracy": result.accuracy, "n": result.n, "ci": list(result.ci)}

        paired = self.paired
        return {
            "adapter": str(self.adapter),
            "model": self.model.name,
            "layer": self.layer,
            "layer_1_indexed": None if self.layer is None else self.layer + 1,
            "site": self.site,
            "base": short(self.base),
            "tuned": short(self.tuned),
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
            "selector": self.selector,
            "note": self.note,
            "evals": [str(self.base_folder), str(self.tuned_folder)],
            "steps": len(self.losses),
            "loss": [self.losses[0], self.losses[-1]],
        }


def score_adapter(
    ctx: Context, job: TuneJob, adapter: Adapter, items: Sequence[EvalItem]
) -> tuple[Path, EvalResult]:
    """Score a finished adapter on the questions, or read the finished run."""
    adapted = load_model(
        str(adapter.folder), device=ctx.device, dtype=ctx.dtype, base=job.base or job.model
    )
    return eval_run(
        ctx, adapted, items, job.evaluation, source=job.eval_source, label="the tuned model"
    )


def score_base(ctx: Context, job: TuneJob, items: Sequence[EvalItem]) -> tuple[Path, EvalResult]:
    """Score the model without adapter in the same harness, or read the finished run."""
    plain = ctx.model(job.model, job.base)
    return eval_run(
        ctx, plain, items, job.evaluation, source=job.eval_source, label="the base model"
    )


def tune_run(ctx: Context, job: TuneJob) -> Tuned:
    """Tune adapters, score base and tuned on the same questions, and write the adapter's card."""
    items = load_eval_items(job.eval_source, job.evaluation)
    note_overlap(ctx, items, elicitation_records(job))
    adapter = adapter_run(ctx, job)
    base_folder, base = score_base(ctx, job, items)
    tuned_folder, tuned = score_adapter(ctx, job, adapter, items)
    made = Tuned(
        adapter=adapter.folder,
        model=adapter.target,
        layer=adapter.layer,
        site=job.objective.site,
        base=base,
        base_folder=base_folder,
        tuned=tuned,
        tuned_folder=tuned_folder,
        paired=compare_results(base, tuned, ctx.seed),
        losses=tuple(adapter.manifest.results["losses"]),
        selector=adapter.selector,
        note=adapter.note,
    )
    sae = ctx.workspace.manifest(adapter.saes) if adapter.saes else None
    card = adapter_card(
        adapter.manifest.model_dump(mode="json"),
        made.to_dict(),
        sae=sae.model_dump(mode="json") if sae else None,
    )
    write_card(adapter.folder, card)
    return made
