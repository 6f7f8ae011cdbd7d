"""Counts and the recommendation made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resa_lens.corpora import CorpusConfig, load_records
from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import (
    RULES,
    CountConfig,
    FeatureCounts,
    LayerCount,
    TaggedPrompt,
    count_features,
    tag_prompt,
)
from resa_lens.hookpoints import trainable_layers
from resa_lens.layers.selectors import SELECTORS, Recommendation, recommend
from resa_lens.models import Model
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.sae_training import saes_for
from resa_lens.pipeline.saes import SaeRun, probe_batches, split_records
from resa_lens.prompts import resolve_system_prompt
from resa_lens.saes.baselines import random_coder
from resa_lens.saes.quality import loss_change
from resa_lens.saes.train import SaeConfig
from resa_lens.workspace import Manifest, config_dict, digest, read_json, write_json

RECIPES = ("robust", "paper")


def count_run(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    config: CountConfig,
    layers: Sequence[int] | None,
    *,
    control: str | None = None,
) -> tuple[Path, FeatureCounts]:
    """Count the exclusive features at the layers, or read the finished counts.

    With control "random" every SAE gives way to random directions of its size and k: the count that
    chance and the tokens' geometry alone would give.
    """
    if control not in (None, "random"):
        raise BadInputError(
            f"control {control!r} is unknown; use random (shuffled decoders count the same, noise "
            "and PCA have no latents)"
        )
    prompt = tag_prompt(model, config)
    identity = {
        # The text itself: a file named by @path may change.
        "count": {**config_dict(config), "prompt": resolve_system_prompt(config.prompt)},
        "saes": ctx.workspace.relative(saes.folder),
        "layers": sorted(p.layer for p in saes.points if layers is None or p.layer in layers),
        **({"control": control} if control else {}),
    }
    site = saes.points[0].site
    folder = ctx.workspace.path("counts", model.slug, f"{site}-{digest(identity)}")
    if saes.manifest and not saes.warnings and ctx.done(folder, saes.folder):
        ctx.reporter.note(f"counts: done before, in {folder}")
        return folder, _read_counts(folder, prompt, config)
    coders = saes.coders(model, layers, decoder=False)
    if control:
        coders = {p: random_coder(coder, ctx.seed) for p, coder in coders.items()}
    counts = count_features(model, coders, config)
    manifest = ctx.manifest(
        "counts",
        model,
        config=identity,
        parents=[ctx.workspace.relative(saes.folder)],
        results={
            "layers": [c.to_dict() for c in counts.layers],
            "site": site,
            "model": model.name,
            "n_layers": model.n_layers,
            "warnings": list(saes.warnings),
            "control": control,
        },
    )
    with ctx.workspace.artifact(folder, manifest) as target:
        write_json(
            target / "features.json",
            {
                "rules": RULES,
                "prompt": counts.prompt.text,
                "tokens": counts.prompt.tokens,
                "open_spans": counts.prompt.open_spans,
                "close_spans": counts.prompt.close_spans,
                "layers": [
                    {"layer": c.layer, "active": c.active, "features": c.features}
                    for c in counts.layers
                ],
            },
        )
    return folder, counts


def _read_counts(folder: Path, prompt: TaggedPrompt, config: CountConfig) -> FeatureCounts:
    held = read_json(folder / "features.json")["layers"]
    layers = tuple(
        LayerCount(
            item["layer"],
            {rule: tuple(found) for rule, found in item["features"].items()},
            item["active"],
        )
        for item in held
    )
    return FeatureCounts(prompt, layers, config)


def recommend_run(
    ctx: Context,
    model: Model,
    counts: FeatureCounts,
    counts_folder: Path,
    *,
    rule: str,
    selector: str,
    recipe: str,
    site: str,
    quality: dict[int, float] | None = None,
) -> tuple[Path, Recommendation]:
    """Recommend layers from the counts of a rule, or read the finished recommendation."""
    identity = {
        "rule": rule,
        "selector": selector,
        "recipe": recipe,
        "seed": ctx.seed,
        "counts": ctx.workspace.relative(counts_folder),
    }
    folder = ctx.workspace.path("recommendations", model.slug, f"{site}-{digest(identity)}")
    if ctx.done(folder, counts_folder):
        ctx.reporter.note(f"recommendation: done before, in {folder}")
        return folder, Recommendation.from_dict(read_json(folder / "recommendation.json"))
    made = recommend(
        counts.table(rule),
        n_layers=model.n_layers,
        selector=selector,
        recipe=recipe,
        seed=ctx.seed,
        quality=quality,
    )
    manifest = ctx.manifest(
        "recommendation",
        model,
        config=identity,
        parents=[ctx.workspace.relative(counts_folder)],
        results={
            "recommended": list(made.recommended),
            "selector": made.selector,
            "verdict": made.verdict,
            "reason": made.reason,
            "site": site,
            "model": model.name,
            "n_layers": model.n_layers,
        },
    )
    with ctx.workspace.artifact(folder, manifest) as target:
        write_json(target / "recommendation.json", made.to_dict())
    return folder, made


@dataclass(frozen=True)
class Discovery:
    """SAEs, counts and the recommendation made of them."""

    saes: SaeRun
    counts: FeatureCounts
    counts_folder: Path
    recommendation: Recommendation
    folder: Path


def discover(
    ctx: Context,
    model: Model,
    *,
    sae: SaeConfig,
    corpus: CorpusConfig,
    count: CountConfig | None = None,
    layers: Sequence[int] | None = None,
    rule: str = "all",
    selector: str = "mixture",
    recipe: str = "robust",
    saes: str | None = None,
    allow_mismatch: bool = False,
    anew: bool = False,
) -> Discovery:
    """Recommend layers for a model; SAEs that are missing are trained."""
    count = count or CountConfig()
    given = layers is not None
    layers = list(layers) if layers is not None else trainable_layers(model.n_layers)
    # A prompt without the tags is found before anything long begins.
    tag_prompt(model, count)
    if rule not in RULES:
        raise BadInputError(f"rule {rule!r} is unknown; use {', '.join(RULES)}")
    if selector not in SELECTORS:
        raise BadInputError(f"selector {selector!r} is unknown; use {', '.join(SELECTORS)}")
    if selector == "causal":
        raise BadInputError(
            "selector 'causal' needs measured effects, which no command makes yet; use mixture, "
            "most-features, middle or quality"
        )
    if recipe not in RECIPES:
        raise BadInputError(f"recipe {recipe!r} is unknown; use {' or '.join(RECIPES)}")
    run = saes_for(
        ctx,
        model,
        layers,
        sae,
        corpus,
        saes,
        allow_mismatch=allow_mismatch,
        only=layers if given else None,
        anew=anew,
    )
    if saes and not given:
        layers = [p.layer for p in run.points]
    if poor := [str(k) for k, q in sorted(run.quality.items()) if k in layers and q["fvu"] > 1]:
        ctx.reporter.note(
            f"warning: the SAEs at layers {', '.join(poor)} explain less than the mean (FVU above "
            "1); counts on them say little: train on more (--tokens)"
        )
    counts_folder, counts = count_run(ctx, model, run, count, layers)
    quality = None
    if selector == "quality":
        held = split_records(load_records(corpus.source))[1]
        probe = probe_batches(model, held, corpus)
        changes = loss_change(model, run.coders(model, layers), probe)
        quality = {point.layer: change for point, change in changes.items()}
    folder, made = recommend_run(
        ctx,
        model,
        counts,
        counts_folder,
        rule=rule,
        selector=selector,
        recipe=recipe,
        site=sae.site,
        quality=quality,
    )
    return Discovery(run, counts, counts_folder, made, folder)


def newest_recommendation(
    ctx: Context, model: Model | None, site: str | None
) -> tuple[Path, Manifest] | None:
    """Return the newest recommendation of a model (by weights) and site, either left open."""
    below = f"recommendations/{model.slug}" if model else "recommendations"
    for folder, manifest in ctx.workspace.find(below, "recommendation"):
        if site is None or manifest.results.get("site") == site:
            return folder, manifest
    return None
