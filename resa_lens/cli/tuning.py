"""Tuning through SAEs: tune, sweep."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import AtLayers, ManyMachines, Planned, Ruled, Tuning
from resa_lens.cli.options import command, options, part
from resa_lens.config import setting
from resa_lens.evals.config import EvalConfig
from resa_lens.files import check_path
from resa_lens.models.hookpoints import check_layer, check_layers, parse_layers
from resa_lens.stages.reports import tuning as reports
from resa_lens.stages.reports.plans import plan as plan_report
from resa_lens.texts.config import check_data, check_source
from resa_lens.tuning.config import Control, Objective, TuneConfig, check_controls

if TYPE_CHECKING:
    from resa_lens.stages.sweep_jobs import SweepConfig
    from resa_lens.stages.tune_job import TuneJob


@options("Tuning")
class Tune(Planned, Tuning):
    """One tuning: its objective, its schedule and its data."""

    model: str | None = setting(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, "The target; by default the newest recommendation's, else tiny-reasoner.",
        "--model", "-m", check=check_path,
    )  # fmt: skip
    layer: str = setting("auto", 'auto, "12" (0-based) or "13th" (1-based).', layers=check_layer)
    control: Control | None = setting(
        None,
        "In the SAE's place, with its FVU: noise to random-weights; none or identity, with which "
        "nothing trains; or in place of the objective: cot-free, cot, own-samples.",
    )
    objective: dict[str, Any] = part(
        Objective,
        "site teacher reference reference_gradient direction sae_gradient reduction targets "
        "schedule clip_norm",
        "Objective", given="preset",
    )  # fmt: skip
    lora: TuneConfig = part(
        TuneConfig,
        "rank alpha dropout learning_rate batch accumulation weight_decay adapter_layers "
        "gradient_checkpointing compile checkpoint_every seed",
        "Tuning",
    )
    trigger_data: str | None = setting(
        None, "Documents for the SAE alone, in place of --data.", check=check_source
    )
    elicitation_data: str | None = setting(
        None, "Documents for the tuning alone, in place of --data.", check=check_source
    )

    def job(self, model: str) -> TuneJob:
        """Return the tuning of a model; columns and rows are of the data that are tuned on."""
        base = super().job(model)
        elicitation = replace(base.elicitation, source=self.elicitation_data or self.corpus.source)
        trigger = replace(self.corpus, source=self.trigger_data or self.corpus.source)
        if trigger.source != elicitation.source:
            columns = (item.name for item in fields(trigger) if item.name.endswith("_column"))
            trigger = replace(trigger, **dict.fromkeys([*columns, "rows"]))
        own = self.pick("layer", "control")
        return replace(base, trigger=trigger, elicitation=elicitation, **own)


@command("tune")
def tune(args: Tune) -> Outcome:
    """Tune through a layer's SAE, score before and after.

    LoRA adapters are trained with the frozen SAE inserted; without --layer it is the recommended
    one.

    Example: resa-lens tune --model tiny-reasoner --layer auto
    """
    from resa_lens.saes.world import ALONE, local_device

    ctx = args.context(local_device(args.device))
    from resa_lens.stages.adapters import adapter_run, questions_of
    from resa_lens.stages.recommendation import recommended_model
    from resa_lens.stages.tuning import tune_run
    from resa_lens.tuning.loop import join_processes

    job = args.job(args.model or recommended_model(ctx, "tiny-reasoner"))
    questions_of(ctx, job)
    check_data(job.trigger, job.elicitation)
    if args.plan:
        from resa_lens.stages.plans import plan_tune

        plan = plan_tune(ctx, job)
        return plan.to_dict(), plan_report(plan)
    world = join_processes(ctx.device) if "RANK" in os.environ else ALONE
    if world.size > 1:
        adapter_run(ctx, job, world=world)
        # --force again would let one process alone make anew what all have made.
        ctx.force = False
    if world.rank:
        return {}, ()
    tuned = tune_run(ctx, job)
    return {**tuned.to_dict(), "preset": args.preset}, reports.tuned(
        tuned, args.preset, args.control
    )


@options("Sweep")
class Sweep(ManyMachines, Planned, AtLayers, Ruled, Tuning):
    """Which layers, seeds and controls are tuned."""

    seeds: int = setting(
        3, "So many seeds: adapters, dropout and order of the data.", min=1, max=10_000
    )
    controls: tuple[str, ...] | None = setting(
        None, "Names as of tune --control, by commas, or all.", check=check_controls
    )
    control_layers: str | None = setting(
        None, "Layers of the controls; by default a third and two thirds deep.", layers=check_layers
    )
    effects: bool = setting(True, "Measure causal effects, for the selectors causal and blend.")
    probes: bool = setting(
        False, "Measure weight gradients and, with --source-model, the change of "
        "activations, for the selectors gradient-probe and activation-change.",
    )  # fmt: skip
    asking: EvalConfig = part(EvalConfig, "limit levels", "Questions", limit=500)

    def config(self, n_layers: int) -> SweepConfig:
        """Return the configuration of the sweep over a model of so many layers."""
        from resa_lens.stages.sweep_jobs import SweepConfig
        from resa_lens.stages.tune_job import ALL_CONTROLS

        layers, control_layers = (
            tuple(parse_layers(text, n_layers)) if text else None
            for text in (self.layers, self.control_layers)
        )
        names: Any = self.controls or ()
        return SweepConfig(
            tune=self.job(self.model),
            layers=layers,
            controls=ALL_CONTROLS if "all" in names else tuple(dict.fromkeys(names)),
            control_layers=control_layers,
            **self.pick("seeds", "rule", "effects", "start_check", "probes"),
        )


@command("sweep")
def sweep(args: Sweep) -> Outcome:
    """Tune through every layer, with seeds and controls.

    Each is scored. Killed, the same command goes on; run by several processes, they share the jobs.
    On many machines: --join, or --ray.

    Example: resa-lens sweep --model tiny-reasoner --layers all --seeds 3 --learning-rate 1e-4
    """
    ctx = args.context()
    from resa_lens.stages.reports.jobs import share as share_report
    from resa_lens.stages.sweep import sweep_join, sweep_run
    from resa_lens.stages.sweep_jobs import jobs_of, sweep_questions

    sweep_questions(ctx, args.job(args.model))
    check_data(args.corpus)
    n_layers = ctx.unloaded(args.model, args.base).n_layers
    config = args.config(n_layers)
    if args.plan:
        from resa_lens.stages.plans import plan_sweep

        plan = plan_sweep(ctx, config)
        return plan.to_dict(), plan_report(plan)
    ctx.reporter.note(f"{len(jobs_of(config, n_layers))} tunings, each scored")
    if args.join:
        share = sweep_join(ctx, config)
        values = {"joined": share.to_dict()}
        run, lines = share.run, [share_report(share, "sweep")]
    else:
        values, lines = {}, []
        run = sweep_run(ctx, config, cluster=args.cluster())
    if run is None:
        return values, lines
    values |= {
        **run.sweep.to_dict(),
        "start": run.artifact.manifest.results.get("start"),
        "folder": str(run.artifact.path),
        "page": str(run.page),
    }
    return values, chain(lines, reports.sweep(run))
