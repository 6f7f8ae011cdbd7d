"""What it takes to train SAEs beside a command's own: of other seeds and of other models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.stage import Context
from resa_lens.machine.plans import Part, Plan
from resa_lens.models.host import Model
from resa_lens.saes.baselines import random_model_name, random_weights_model
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.further_saes import MATCHED
from resa_lens.stages.sae_plan import plan_run
from resa_lens.texts.corpora import CorpusConfig


@dataclass(frozen=True)
class Trainings:
    """Trainings within another command, one after the other."""

    parts: tuple[Part, ...] = ()
    work_disk_mb: float = 0.0
    """That one of them keeps while it runs."""


def known_random_model(ctx: Context, model: Model, seed: int) -> Model | None:
    """Return the model with random weights, where the workspace has SAEs of one of its name.

    Otherwise it need not be made: none of its SAEs are there.
    """
    name = random_model_name(model, seed, MATCHED)
    if any(a.manifest.results.get("model") == name for a in ctx.workspace.artifacts(Saes)):
        return random_weights_model(model, seed, weights=MATCHED)
    return None


def plan_each(
    ctx: Context,
    model: Model,
    layers: Sequence[int],
    training: tuple[SaeConfig, CorpusConfig],
    what: str,
    *,
    extra_mb: float = 0.0,
) -> Trainings:
    """Return what training SAEs takes that are trained one by one.

    A pass goes up to the SAE's layer, so its time rises with the layer: the lowest and the highest
    are tried, and those between are reckoned by them.

    Args:
        ctx: the workspace, in which nothing is made.
        model: whose SAEs they are, or one of its architecture.
        layers: 0-based, as often as an SAE is trained there.
        training: how.
        what: put behind the parts' names.
        extra_mb: that the process has beside.
    """
    if not layers:
        return Trainings()
    low, high = min(layers), max(layers)
    last = sum((layer - low) / (high - low) for layer in layers) if high > low else 0.0
    shares = {low: len(layers) - last, **({high: last} if high > low else {})}
    plans = {layer: plan_run(ctx, model, [layer], *training) for layer in shares}
    return weighted(plans, shares, what, extra_mb=extra_mb)


def weighted(
    plans: Mapping[int, Plan], shares: Mapping[int, float], what: str, *, extra_mb: float = 0.0
) -> Trainings:
    """Return plans of alike trainings together, each so many times.

    Args:
        plans: by any key; their parts have the same names.
        shares: how often each is done.
        what: put behind the parts' names.
        extra_mb: that the process has beside.
    """
    parts = []
    for same in zip(*(plans[key].parts for key in shares), strict=True):
        total = dict.fromkeys(("amount", "seconds", "cpu_seconds", "disk_mb"), 0.0)
        for part, share in zip(same, shares.values(), strict=True):
            for name in total:
                total[name] += share * getattr(part, name)
        peak = max(part.peak_memory_mb for part in same) + extra_mb
        parts.append(
            replace(
                same[0], name=f"{same[0].name}{what}", peak_memory_mb=round(peak, 1),
                amount=round(total.pop("amount")),
                **{name: round(value, 2) for name, value in total.items()},
            )
        )  # fmt: skip
    return Trainings(tuple(parts), max(plan.work_disk_mb for plan in plans.values()))
