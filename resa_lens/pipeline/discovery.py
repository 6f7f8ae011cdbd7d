"""Counts and the recommendation made of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from resa_lens.layers.selectors import SELECTORS, Effect, Recommendation, recommend
from resa_lens.layers.stability import Stability, stability
from resa_lens.models import Model
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.sae_training import saes_for
from resa_lens.pipeline.saes import SaeRun, probe_batches, sae_run, split_records
from resa_lens.prompts import SYSTEM_PROMPTS, resolve_system_prompt
from resa_lens.saes.baselines import random_coder
from resa_lens.saes.quality import loss_change
from resa_lens.saes.train import SaeConfig
from resa_lens.workspace import Manifest, config_dict, digest, read_json, write_json

RECIPES = ("robust", "paper")
SAE_SEED = "SAE seed"
Effects = Mapping[int, Effect]
MeasureEffects = Callable[[SaeRun, FeatureCounts], Effects]
"""Effects of the counted features by layer: (beyond control, its standard error, its freedom)."""


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
    with ctx.metered():
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
    quality: Callable[[], dict[int, float]] | None = None,
    causal: Effects | None = None,
) -> tuple[Path, Recommendation]:
    """Recommend layers from the counts of a rule, or read the finished recommendation.

    The quality is measured only where the recommendation is made anew.
    """
    identity: dict[str, Any] = {
        "rule": rule,
        "selector": selector,
        "recipe": recipe,
        "seed": ctx.seed,
        "counts": ctx.workspace.relative(counts_folder),
    }
    if causal is not None:
        identity["causal"] = {str(layer): effect for layer, effect in sorted(causal.items())}
    folder = ctx.workspace.path("recommendations", model.slug, f"{site}-{digest(identity)}")
    if ctx.done(folder, counts_folder):
        ctx.reporter.note(f"recommendation: done before, in {folder}")
        return folder, Recommendation.from_dict(read_json(folder / "recommendation.json"))
    with ctx.metered():
        made = recommend(
            counts.table(rule),
            n_layers=model.n_layers,
            selector=selector,
            recipe=recipe,
            seed=ctx.seed,
            quality=quality() if quality else None,
            causal=causal,
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
    causal: MeasureEffects | None = None,
) -> Discovery:
    """Recommend layers for a model; SAEs that are missing are trained.

    Args:
        ctx: the workspace and who to tell.
        model: the model.
        sae: of SAEs that are looked for or trained.
        corpus: they are trained on.
        count: prompt and options of the counting rule.
        layers: 0-based; all but the first and the last where not given.
        rule: whose counts are used.
        selector: a key of `SELECTORS`.
        recipe: of the mixture.
        saes: folder of given SAEs.
        allow_mismatch: use SAEs that do not fit, with a warning.
        anew: train SAEs even where they are found.
        causal: measures the effects by layer, for the selectors causal (which needs it) and blend.

    Raises:
        BadInputError: an unknown rule, selector or recipe, or no effects for the selector causal.
    """
    count = count or CountConfig()
    given = layers is not None
    layers = list(layers) if layers is not None else trainable_layers(model.n_layers)
    # A prompt without the tags is found before anything long begins.
    tag_prompt(model, count)
    if rule not in RULES:
        raise BadInputError(f"rule {rule!r} is unknown; use {', '.join(RULES)}")
    if selector not in SELECTORS:
        raise BadInputError(f"selector {selector!r} is unknown; use {', '.join(SELECTORS)}")
    if selector == "causal" and causal is None:
        raise BadInputError(
            "selector 'causal' needs measured effects by layer; use mixture, most-features, "
            "middle, quality or blend"
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

    def quality() -> dict[int, float]:
        held = split_records(load_records(corpus.source))[1]
        probe = probe_batches(model, held, corpus)
        changes = loss_change(model, run.coders(model, layers), probe)
        return {point.layer: change for point, change in changes.items()}

    folder, made = recommend_run(
        ctx,
        model,
        counts,
        counts_folder,
        rule=rule,
        selector=selector,
        recipe=recipe,
        site=sae.site,
        quality=quality if selector in ("quality", "blend") else None,
        causal=causal(run, counts) if causal and selector in ("causal", "blend") else None,
    )
    return Discovery(run, counts, counts_folder, made, folder)


def seed_runs(ctx: Context, model: Model, run: SaeRun, layers: Sequence[int]) -> list[SaeRun]:
    """Return the run and those of the workspace that differ from it in their seed alone."""
    if run.manifest is None or not run.trained_on(model):
        return [run]
    found = {_seed(run.manifest): run}
    for folder, manifest in ctx.workspace.find(f"saes/{model.slug}", "saes"):
        held = [q["layer"] for q in manifest.results["layers"]]
        alike = _but_seed(manifest) == _but_seed(run.manifest) and set(layers) <= set(held)
        if alike and _seed(manifest) not in found:
            points = [replace(run.points[0], layer=layer) for layer in held]
            found[_seed(manifest)] = sae_run(folder, points, manifest, fresh=False)
    return [found[seed] for seed in sorted(found)]


def _seed(manifest: Manifest) -> int:
    return manifest.config["sae"]["seed"]


def _but_seed(manifest: Manifest) -> dict[str, Any]:
    """What trained a run, but for its seed and its layers."""
    made = copy.deepcopy(manifest.config)
    made.pop("layers", None)
    for part in ("sae", "corpus"):
        made[part].pop("seed", None)
    return {**made, "site": manifest.results.get("site"), "weights": manifest.hashes.get("weights")}


def stability_run(
    ctx: Context,
    model: Model,
    *,
    sae: SaeConfig,
    corpus: CorpusConfig,
    count: CountConfig | None = None,
    layers: Sequence[int] | None = None,
    prompts: Sequence[str] = tuple(SYSTEM_PROMPTS),
    rules: Sequence[str] = tuple(RULES),
    selector: str = "mixture",
    recipe: str = "robust",
    saes: str | None = None,
    allow_mismatch: bool = False,
) -> tuple[Path, Stability]:
    """Recommend with every prompt, rule and SAE seed there is, and say how stable the answer is.

    SAEs that are missing are trained, of one seed; other seeds' are used where the workspace has
    runs that differ in nothing else.

    Args:
        ctx: the workspace and who to tell.
        model: the model.
        sae: of the SAEs.
        corpus: of the SAEs.
        count: options of the counts; each of the prompts takes the place of its prompt.
        layers: 0-based; all but the first and the last where not given.
        prompts: names, texts or @files that hold the tags.
        rules: of the counts.
        selector: mixture or most-features, which read nothing but counts.
        recipe: of the mixture.
        saes: folder of given SAEs.
        allow_mismatch: use SAEs that do not fit, with a warning.

    Returns:
        The folder and the result; a finished one is read.

    Raises:
        BadInputError: another selector, an unknown rule or recipe, a prompt without the tags.
    """
    count = count or CountConfig()
    if selector not in ("mixture", "most-features"):
        raise BadInputError(f"selector {selector!r} reads no counts; use mixture or most-features")
    if recipe not in RECIPES:
        raise BadInputError(f"recipe {recipe!r} is unknown; use {' or '.join(RECIPES)}")
    if odd := [rule for rule in rules if rule not in RULES]:
        raise BadInputError(f"rule {odd[0]!r} is unknown; use {', '.join(RULES)}")
    configs = [replace(count, prompt=prompt) for prompt in prompts]
    for config in configs:
        tag_prompt(model, config)
    given = layers is not None
    chosen = list(layers) if layers is not None else trainable_layers(model.n_layers)
    run = saes_for(
        ctx,
        model,
        chosen,
        sae,
        corpus,
        saes,
        allow_mismatch=allow_mismatch,
        only=chosen if given else None,
    )
    if saes and not given:
        chosen = [p.layer for p in run.points]
    runs = seed_runs(ctx, model, run, chosen)
    tables: dict[str, dict[int, int]] = {}
    factors: dict[str, dict[str, str]] = {}
    folders = []
    with ctx.bar("counting", len(runs) * len(configs)) as advance:
        for held in runs:
            number = str(_seed(held.manifest)) if held.manifest else "given"
            for config in configs:
                folder, counts = count_run(ctx, model, held, config, chosen)
                folders.append(folder)
                for rule in rules:
                    name = f"{SAE_SEED} {number}, prompt {config.prompt}, rule {rule}"
                    tables[name] = counts.table(rule)
                    factors[name] = {"prompt": config.prompt, "rule": rule, SAE_SEED: number}
                advance(1)
    identity = {
        "counts": [ctx.workspace.relative(folder) for folder in folders],
        "rules": list(rules),
        "selector": selector,
        "recipe": recipe,
        "seed": ctx.seed,
    }
    place = ctx.workspace.path("stability", model.slug, f"{sae.site}-{digest(identity)}")
    if ctx.done(place, *folders):
        ctx.reporter.note(f"stability: done before, in {place}")
        return place, Stability.from_dict(read_json(place / "stability.json"))
    ctx.reporter.note(f"fitting {len(tables)} tables and comparing them pair by pair")
    made = stability(
        tables,
        n_layers=model.n_layers,
        factors=factors,
        block=SAE_SEED,
        selector=selector,
        recipe=recipe,
        seed=ctx.seed,
    )
    manifest = ctx.manifest(
        "stability",
        model,
        config=identity,
        parents=identity["counts"],
        results={
            "verdict": made.verdict,
            "reason": made.reason,
            "tables": len(made.tables),
            "site": sae.site,
            "model": model.name,
            "n_layers": model.n_layers,
        },
    )
    with ctx.workspace.artifact(place, manifest) as target:
        write_json(target / "stability.json", made.to_dict())
    return place, made


def newest_recommendation(
    ctx: Context, model: Model | None, site: str | None
) -> tuple[Path, Manifest] | None:
    """Return the newest recommendation of a model (by weights) and site, either left open."""
    below = f"recommendations/{model.slug}" if model else "recommendations"
    for folder, manifest in ctx.workspace.find(below, "recommendation"):
        if site is None or manifest.results.get("site") == site:
            return folder, manifest
    return None
