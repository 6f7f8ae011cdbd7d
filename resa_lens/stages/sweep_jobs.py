"""Which tunings a sweep is made of."""

from __future__ import annotations

from dataclasses import dataclass

from resa_lens.artifacts.stage import Context
from resa_lens.config import Config, setting
from resa_lens.errors import BadInputError
from resa_lens.evals.tasks import EvalItem
from resa_lens.features.config import Rule
from resa_lens.models.hookpoints import trainable_layers
from resa_lens.stages.adapters import questions_of
from resa_lens.stages.tune_job import TuneJob
from resa_lens.tuning.config import Control
from resa_lens.tuning.sft import KINDS


@dataclass(frozen=True)
class SweepConfig(Config):
    """Which tunings: layers x seeds, and controls at some layers x seeds."""

    tune: TuneJob
    """What every job shares; layer, seed and control are the job's own."""
    layers: tuple[int, ...] | None = None
    """0-based; all but the first and the last where not given."""
    seeds: int = setting(3, "So many seeds: adapters, dropout and order of the data.", min=1)
    """Of adapters, dropout and the order of the data: `tune.lora.seed` and those after it."""
    controls: tuple[Control, ...] = ()
    control_layers: tuple[int, ...] | None = None
    """Where controls stand in an SAE's place; a third and two thirds of the layers by default."""
    rule: Rule = "all"
    """Whose counts the selectors see."""
    effects: bool = True
    """Measure causal effects by layer, for the selectors causal and blend."""
    start_check: bool = setting(
        False,
        "First insert each SAE and tune nothing; the selector insertion reads it.",
        later=True,
    )
    probes: bool = setting(
        False, "Measure what gradient-probe and, with another source, activation-change read.",
        later=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One tuning of a sweep."""

    name: str
    layer: int | None
    """0-based; None where no SAE is used."""
    seed: int
    control: str | None = None


def sweep_questions(ctx: Context, job: TuneJob) -> list[EvalItem]:
    """Return the questions that every job of a sweep is scored on.

    Raises:
        BadInputError: as `questions_of`, or a single question.
    """
    items = questions_of(ctx, job)
    if len(items) < 2:
        raise BadInputError(
            f"{len(items)} question to score: intervals over questions need two or more"
        )
    return items


def jobs_of(config: SweepConfig, n_layers: int) -> list[Job]:
    """Return the jobs, seed by seed, so that a part of a sweep is a smaller sweep.

    Raises:
        BadInputError: a layer that the model does not have, or whose SAE no gradient passes.
    """
    layers = config.layers if config.layers is not None else tuple(trainable_layers(n_layers))
    at = config.control_layers
    if at is None:
        at = tuple(dict.fromkeys(layers[len(layers) * i // 3] for i in (1, 2)))
    first = config.tune.lora.seed
    jobs = []
    for seed in range(first, first + config.seeds):
        jobs += [Job(f"L{layer:02d}-s{seed}", layer, seed) for layer in layers]
        for name in config.controls:
            if name in KINDS:
                jobs.append(Job(f"{name}-s{seed}", None, seed, name))
            else:
                jobs += [Job(f"L{x:02d}-{name}-s{seed}", x, seed, name) for x in at]
    # Only where something is tuned: fine-tuned controls leave their layers unused.
    for layer in dict.fromkeys(job.layer for job in jobs if job.layer is not None):
        if not 0 <= layer < n_layers:
            raise BadInputError(f"layer {layer}: the model has 0 to {n_layers - 1} (0-based)")
        config.tune.check_reach(layer, n_layers)
    return jobs
