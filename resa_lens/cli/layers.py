"""The way to a layer: train-saes, count-features, recommend-layers, stability."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import (
    COUNTING,
    DATA,
    AtLayers,
    Counting,
    MemoryLimit,
    Planned,
    Recommending,
    Ruled,
    SaeFit,
    WithSaesAt,
)
from resa_lens.cli.options import command, options, part
from resa_lens.config import setting
from resa_lens.errors import BadInputError
from resa_lens.features.config import RULES, CountConfig, check_prompt, check_rule
from resa_lens.files import check_path
from resa_lens.saes.config import SaeConfig
from resa_lens.stages.reports import layers as reports
from resa_lens.stages.reports.plans import plan as plan_report
from resa_lens.texts.config import CorpusConfig
from resa_lens.texts.prompts import SYSTEM_PROMPTS


@options("Training")
class TrainSaes(Planned, MemoryLimit, AtLayers, SaeFit):
    """How the SAEs are trained."""

    sae: SaeConfig = part(
        SaeConfig,
        "site latents k tokens mode activation optimizer learning_rate schedule warmup auxk_alpha "
        "multi_topk dead_threshold batch include_special seed allocation aux",
        "Training",
    )
    corpus: CorpusConfig = part(
        CorpusConfig,
        f"{DATA} sequence packing thought_share own_thoughts",
        "Data",
        thought_share=None,
    )
    expansion: int | None = setting(
        None, "Latents as a multiple of the width, in place of --latents.", min=1, max=2**14
    )
    seeds: int = setting(
        1, "So many seeds, from --seed on; their features are compared.", min=1, max=10_000
    )
    report: bool = setting(True, "Measure their quality by phase.")
    spread_layers: bool = setting(False, "Under torchrun: divide layers, not rows.")

    def __post_init__(self) -> None:
        """Raise BadInputError where two options contradict each other."""
        if self.sae.latents is not None and self.expansion is not None:
            raise BadInputError(
                f"--latents {self.sae.latents} and --expansion {self.expansion}: give one"
            )
        if self.sae.mode != "scratch" and self.saes is None:
            raise BadInputError(f"--mode {self.sae.mode} takes given SAEs: name them with --saes")
        if self.sae.mode == "scratch":
            self.sae.check_pairs()


@command("train-saes")
def train_saes(args: TrainSaes) -> Outcome:
    """Train an SAE at every layer in one pass over the data.

    Killed, the same command goes on where it was.

    Example: resa-lens train-saes --model tiny-reasoner --layers 1-10 --tokens 200000
    """
    from resa_lens.saes.world import join_world, local_device

    ctx, model = args.load(local_device(args.device))
    from resa_lens.stages.sae_plan import plan_run
    from resa_lens.stages.sae_quality import quality_run, training_values
    from resa_lens.stages.sae_training import train_run

    world = join_world(model.device)
    config, layers, corpus = args.sae, args.indices(model), args.corpus
    if args.expansion is not None:
        config = replace(config, latents=args.expansion * model.d_model)
    shared: Any = {
        "source": args.saes, "world": world, **args.pick("memory_limit_mb", "report"),
    }  # fmt: skip
    if args.plan:
        plan = plan_run(ctx, model, layers, config, corpus, **shared, seeds=args.seeds)
        return {**plan.to_dict(), "site": config.site}, plan_report(plan)
    runs = [
        train_run(
            ctx, model, layers, replace(config, seed=seed), replace(corpus, seed=seed), **shared,
            spread_layers=args.spread_layers,
        )
        for seed in range(args.seed, args.seed + args.seeds)
    ]  # fmt: skip
    run = runs[0]
    if world.rank:
        return {}, ()
    report = quality_run(ctx, model, run, corpus) if args.report else None
    values = training_values(model, runs, report)
    return values, reports.training(
        f"SAEs of {model.slug}, site {config.site}", model.n_layers, values
    )


@options("Counting")
class CountFeatures(Ruled, Counting, WithSaesAt):
    """What is counted."""

    control: Literal["random"] | None = setting(
        None, "Count on random directions in the SAEs' place."
    )


@command("count-features")
def count_features(args: CountFeatures) -> Outcome:
    """Count features that fire at the think tags alone.

    Every rule is counted; --rule says which one the result names.

    Example: resa-lens count-features --model tiny-reasoner --rule all
    """
    from resa_lens.stages.counts import count_run

    ctx, model = args.load()
    saes = args.find(ctx, model)
    run = count_run(ctx, model, saes, args.count, args.scope(model), control=args.control)
    counts, folder = run.counts, str(run.artifact.path)
    values = {
        "rule": args.rule, "layers": [c.to_dict() for c in counts.layers], "model": model.name,
        "site": args.sae.site, "folder": folder, "shared_tokens": list(counts.prompt.shared),
    }  # fmt: skip
    return values, reports.counts(model.slug, model.n_layers, counts, folder)


@options("Counting")
class RecommendLayers(Recommending, Ruled, Counting, WithSaesAt):
    """How a layer is recommended."""

    target_model: str | None = setting(
        None, "The model that would be tuned: activation-change needs it; insertion inserts into "
        "it and gradient-probe measures on it, by default --model itself.",
        check=check_path,
    )  # fmt: skip
    second_model, one_shape = "target_model", True

    def __post_init__(self) -> None:
        """Raise BadInputError where a selector compares two models and one is missing."""
        if self.selector == "activation-change" and self.target_model is None:
            raise BadInputError(
                "--selector activation-change compares the activations of --model with another "
                "model's: name it with --target-model"
            )


@command("recommend-layers")
def recommend_layers(args: RecommendLayers) -> Outcome:
    """Recommend layers to tune, with an honest verdict.

    SAEs that are missing are trained.

    Example: resa-lens recommend-layers --model tiny-reasoner --json
    """
    from resa_lens.stages.attribution import measure_effects
    from resa_lens.stages.falsification import survivors_of
    from resa_lens.stages.insertion import measure_gains
    from resa_lens.stages.layer_probes import measure_change, measure_gradient, worked
    from resa_lens.stages.recommendation import discover

    ctx, model = args.load()
    target = ctx.model(args.target_model) if args.target_model else model
    discovery = discover(
        ctx, model, layers=args.explicit(model), allow_mismatch=args.allow_site_mismatch,
        causal=measure_effects(ctx, model, args.rule, args.corpus),
        insertion=measure_gains(ctx, target, model, args.corpus),
        gradient=measure_gradient(target, worked(args.corpus)),
        change=measure_change(model, target, worked(args.corpus), args.sae.site),
        **args.pick("sae", "corpus", "count", "rule", "selector", "recipe", "saes"),
    )  # fmt: skip
    recommendation = discovery.recommendation.recommendation
    falsified = survivors_of(ctx, discovery.counts, args.rule)
    values = {
        "model": model.name, "site": args.sae.site, "rule": args.rule, **recommendation.to_dict(),
        "folder": str(discovery.recommendation.artifact.path),
        "saes": str(discovery.saes.folder), "falsified": falsified,
    }  # fmt: skip
    return values, reports.recommendation(
        f"{model.slug}, site {args.sae.site}", recommendation, falsified
    )


@options("Counting")
class Stability(Recommending, WithSaesAt):
    """The recommendations that are compared."""

    count: CountConfig = part(CountConfig, COUNTING.removeprefix("prompt "), "Counting")
    prompt: list[str] | None = setting(
        None, "Prompt with the think tags, as elsewhere; may be repeated; by default all three.",
        check=check_prompt,
    )  # fmt: skip
    rule: list[str] | None = setting(
        None, "Counting rule; may be repeated; by default all three.",
        check=check_rule, metavar=f"[{'|'.join(RULES)}]",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Raise BadInputError where a selector does not read counts."""
        if self.selector not in ("mixture", "most-features"):
            raise BadInputError(
                f"--selector {self.selector} does not read counts: nothing would differ between "
                "prompts and rules; use mixture or most-features"
            )


@command("stability")
def stability(args: Stability) -> Outcome:
    """Ask whether a recommendation returns.

    Layers are recommended with every prompt, counting rule and SAE seed. Seeds are those of
    `train-saes --seeds N`; with one there is nothing independent to compare.

    Example: resa-lens stability --model tiny-reasoner --json
    """
    from resa_lens.stages.stability import stability_run

    ctx, model = args.load()
    run = stability_run(
        ctx, model, layers=args.explicit(model), prompts=args.prompt or tuple(SYSTEM_PROMPTS),
        rules=args.rule or tuple(RULES), allow_mismatch=args.allow_site_mismatch,
        **args.pick("sae", "corpus", "count", "selector", "recipe", "saes"),
    )  # fmt: skip
    values = {
        "model": model.name, "site": args.sae.site, "selector": args.selector,
        "folder": str(run.artifact.path), **run.stability.to_dict(),
    }  # fmt: skip
    title = f"{model.slug}, site {args.sae.site}, selector {args.selector}"
    return values, reports.stability(title, run.stability)
