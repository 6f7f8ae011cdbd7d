"""What controls take besides their updates and scores: own answers, a random model's SAEs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from resa_lens.artifacts.stage import Context
from resa_lens.evals.config import EvalConfig
from resa_lens.evals.run import Asked
from resa_lens.evals.tasks import EvalItem
from resa_lens.machine.hardware import MB
from resa_lens.machine.plans import Part, part_of
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.config import SaeConfig
from resa_lens.stages.controls import OWN_QUESTIONS, own_generation
from resa_lens.stages.further_plans import Trainings, known_random_model, plan_each
from resa_lens.stages.saes import SaeRun, find_saes
from resa_lens.stages.trials import try_answers
from resa_lens.texts import prompts
from resa_lens.texts.corpora import CorpusConfig, Record
from resa_lens.tuning.sft import OwnConfig


def own_answers_part(model: Model, records: Sequence[Record], times: int = 1) -> Part:
    """Return the part of drawing the model's own answers, from a batch of them.

    Args:
        model: the model that answers.
        records: the elicitation data.
        times: seeds, each of which draws its own.
    """
    own = OwnConfig()
    config = EvalConfig(generation=own_generation(own))
    questions = [
        Asked(EvalItem(str(number), record.question, record.answer), sample,
              prompts.question_prompt(record.question), "")
        for number, record in enumerate(records[:OWN_QUESTIONS])
        for sample in range(own.samples)
    ]  # fmt: skip
    trial = try_answers(model, questions, config)
    return part_of(
        "own answers", times * len(questions), "answers", trial.time * times,
        trial.peak_memory_mb, at_most=trial.at_most,
    )  # fmt: skip


def random_weights_trainings(
    ctx: Context,
    model: Model,
    layers: Sequence[int],
    seeds: Sequence[int],
    run: SaeRun | None,
    coder: SparseCoder,
    training: tuple[SaeConfig, CorpusConfig],
) -> Trainings:
    """Return what training SAEs of models with random weights takes, of those that are missing.

    Args:
        ctx: the workspace, in which nothing is made.
        model: the target, beside which the random model stands.
        layers: 0-based; each is trained by itself.
        seeds: of the random weights.
        run: the SAEs in whose place they will stand, where they are there.
        coder: one of these.
        training: how they would be trained; of those that are there it is known.
    """
    config, corpus = (run.training() or (SaeConfig(), CorpusConfig())) if run else training
    config = replace(config, site=training[0].site, latents=coder.num_latents, k=coder.cfg.k)
    missing: list[int] = []
    for seed in seeds:
        host = known_random_model(ctx, model, seed)
        missing += [
            layer
            for layer in layers
            if host is None or find_saes(ctx, host, config, corpus, [layer]) is None
        ]
    extra_mb = sum(weight.nbytes for weight in model.model.parameters()) / MB
    return plan_each(ctx, model, missing, (config, corpus), ", random weights'", extra_mb=extra_mb)
