"""Layers recommended from counts, and the SAEs whose counts they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.counts import Counts
from resa_lens.artifacts.kinds.recommendation import Recommendation as RecommendationKind
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.config import result_fields
from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import RULES, CountConfig, tag_prompt
from resa_lens.hashes import digest
from resa_lens.layers.selectors import SELECTORS, Effect, Recommendation, recommend
from resa_lens.models.hookpoints import trainable_layers
from resa_lens.models.host import Model
from resa_lens.saes.quality import loss_change
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.counts import CountRun, count_run
from resa_lens.stages.sae_training import saes_for
from resa_lens.stages.saes import (
    SaeRun,
    as_trained,
    fit_corpus,
    open_saes,
    packed,
    probe_batches,
    sae_run,
    split_records,
)  # fmt: skip
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig

RECIPES = ("robust", "paper")
Effects = Mapping[int, Effect]
MeasureEffects = Callable[[SaeRun, CountRun], Effects]
"""Effects of the counted features by layer: (beyond control, its standard error, its freedom)."""
MeasureGains = Callable[[SaeRun, Sequence[int]], Effects]
"""Changes of accuracy with each layer's SAE inserted: (change, its standard error)."""
MeasureLayers = Callable[[Sequence[int]], Effects]
"""Values by layer that need no SAE: (value, its standard error)."""


@dataclass(frozen=True)
class RecommendationRun:
    """A recommendation, and the artifact that holds it."""

    artifact: Artifact
    recommendation: Recommendation


def recommend_run(
    ctx: Context,
    model: Model,
    counts: CountRun,
    *,
    rule: str,
    selector: str,
    recipe: str,
    site: str,
    quality: Quality | None = None,
    causal: Effects | None = None,
    insertion: Effects | None = None,
    gradient: Effects | None = None,
    change: Effects | None = None,
) -> RecommendationRun:
    """Recommend layers from the counts of a rule, or read the finished recommendation.

    Args:
        ctx: the workspace and who to tell.
        model: the model that was counted in.
        counts: the counted features.
        rule: whose counts are used.
        selector: a key of `SELECTORS`.
        recipe: of the mixture.
        site: of the SAEs.
        quality: of the SAEs, for the selectors quality and blend; measured only where the
            recommendation is made anew.
        causal: effects by layer, for the selectors causal and blend.
        insertion: changes of accuracy by layer, for the selector insertion.
        gradient: norms of weight gradients by layer, for the selector gradient-probe.
        change: changes of activations by layer, for the selector activation-change.
    """
    measured = {"causal": causal, "insertion": insertion, "gradient": gradient, "change": change}
    config: dict[str, Any] = {
        "rule": rule,
        "selector": selector,
        "recipe": recipe,
        "seed": ctx.seed,
        **{
            name: {str(layer): table[layer] for layer in sorted(table)}
            for name, table in measured.items()
            if table is not None
        },
    }
    stage = ctx.stage(
        RecommendationKind,
        model,
        name=site,
        config=config,
        data={"quality": quality.data} if quality else {},
        parents={"counts": counts.artifact.parent},
        settings={**config, "counts": counts.artifact.relative},
    )

    def work(draft: Draft) -> None:
        answer = recommend(
            counts.counts.table(rule),
            n_layers=model.n_layers,
            selector=selector,
            recipe=recipe,
            seed=ctx.seed,
            quality=quality.measure() if quality else None,
            causal=causal,
            insertion=insertion,
            gradient=gradient,
            change=change,
        )
        draft.results = {
            "recommended": list(answer.recommended),
            "selector": answer.selector,
            "verdict": answer.verdict,
            "reason": answer.reason,
            "site": site,
            "model": model.name,
            "n_layers": model.n_layers,
        }
        draft.json("recommendation.json", answer.to_dict())

    artifact = stage.obtain(work)
    stored = artifact.value("recommendation.json")
    return RecommendationRun(artifact, Recommendation.from_dict(stored))


@dataclass(frozen=True)
class Quality:
    """Changes of the loss with each SAE inserted, measured when they are needed."""

    data: str
    """Hash of the documents that they are measured on."""
    measure: Callable[[], dict[int, float]]
    """Returns {0-based layer: change}."""


def sae_quality(model: Model, saes: SaeRun, corpus: CorpusConfig, layers: Sequence[int]) -> Quality:
    """Return what the selectors quality and blend ask for, on held-out records of a corpus."""
    records = corpora.read_records(corpus)
    corpus = as_trained(saes, corpus, records)
    records = split_records(records)[1]

    def measure() -> dict[int, float]:
        probe = probe_batches(model, records, corpus)
        with packed(model, fit_corpus(corpus, model)):
            changes = loss_change(model, saes.each(model, layers), probe)
        return {point.layer: change for point, change in changes.items()}

    return Quality(digest([corpora.hash_records(records), result_fields(corpus)]), measure)


@dataclass(frozen=True)
class Discovery:
    """SAEs, counts and the recommendation made of them."""

    saes: SaeRun
    counts: CountRun
    recommendation: RecommendationRun


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
    insertion: MeasureGains | None = None,
    gradient: MeasureLayers | None = None,
    change: MeasureLayers | None = None,
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
        insertion: measures what the SAEs do when inserted, for the selector insertion.
        gradient: measures norms of weight gradients by layer, for the selector gradient-probe.
        change: measures changes of activations by layer, for the selector activation-change.

    Raises:
        BadInputError: an unknown rule, selector or recipe, or no effects for a selector that needs
            them.
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
    measured = {
        "causal": causal, "insertion": insertion, "gradient-probe": gradient,
        "activation-change": change,
    }  # fmt: skip
    if selector in measured and measured[selector] is None:
        raise BadInputError(
            f"selector {selector!r} needs measured effects by layer; use mixture, most-features, "
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
    counts = count_run(ctx, model, run, count, layers)
    recommendation = recommend_run(
        ctx,
        model,
        counts,
        rule=rule,
        selector=selector,
        recipe=recipe,
        site=sae.site,
        quality=sae_quality(model, run, corpus, layers)
        if selector in ("quality", "blend")
        else None,
        causal=causal(run, counts) if causal and selector in ("causal", "blend") else None,
        insertion=insertion(run, layers) if insertion and selector == "insertion" else None,
        gradient=gradient(layers) if gradient and selector == "gradient-probe" else None,
        change=change(layers) if change and selector == "activation-change" else None,
    )
    return Discovery(run, counts, recommendation)


def newest_recommendation(ctx: Context, model: Model | None, site: str | None) -> Artifact | None:
    """Return the newest recommendation of a model (by its contents) and site, either left open.

    One whose origin cannot be verified is left out, and one that is damaged, which is said.
    """
    problems: list[str] = []
    artifacts = ctx.workspace.artifacts(RecommendationKind, problems=problems, schemas=True)
    for artifact in artifacts:
        problems += artifact.damage()
    for problem in problems:
        ctx.reporter.note(f"warning: {problem}")
    for artifact in artifacts:
        manifest = artifact.manifest
        if not manifest.verifiable or next(artifact.damage(), None):
            continue
        if model is not None and manifest.ingredients.get("model") != model.contents:
            continue
        if site is None or manifest.results.get("site") == site:
            return artifact
    return None


def recommended_model(ctx: Context, otherwise: str) -> str:
    """Return the model of the newest recommendation, else another one, and say which it is."""
    newest = newest_recommendation(ctx, None, None)
    name = otherwise if newest is None else str(newest.manifest.results["model"])
    why = "the bundled one" if newest is None else "of the newest recommendation"
    ctx.reporter.note(f"model: {name}, {why}")
    return name


def recommended_saes(ctx: Context, model: Model, recommendation: Artifact) -> SaeRun:
    """Return the SAEs whose counts a recommendation was made of.

    Raises:
        BadInputError: the counts or the SAEs are no longer there, or are not what they were.
    """
    remedy = "recommend again with resa-lens recommend-layers, or name a layer with --layer"
    site = recommendation.manifest.results["site"]
    problems: list[str] = []
    listed = ctx.workspace.artifacts(Counts, problems=problems, schemas=True)
    wanted = recommendation.ingredient("parents", "counts")
    counts = next((artifact for artifact in listed if artifact.manifest.identity == wanted), None)
    if counts is None:
        place = next(iter(recommendation.manifest.parents), "")
        why = next((problem for problem in problems if place in problem), f"{place} is gone")
        raise BadInputError(
            f"the counts that {recommendation.relative} was made of cannot be used: {why};\n"
            f"{remedy}"
        )
    identity = counts.ingredient("parents", "saes")
    layers = counts.ingredient("config", "layers")
    folder = ctx.workspace.root / counts.manifest.config["saes"]
    for artifact in ctx.workspace.artifacts(Saes, problems=problems, schemas=True):
        if artifact.path == folder:
            problems += artifact.damage()
        if artifact.manifest.results.get("site") == site:
            run = sae_run(artifact, site)
            # One that cannot be read is not what was counted on.
            with suppress(BadInputError):
                if set(layers) <= set(run.layers) and run.parent(layers).identity == identity:
                    return run
    if damage := next((problem for problem in problems if str(folder) in problem), None):
        raise BadInputError(f"{damage};\n{remedy}")
    # SAEs from elsewhere: by the folder that was named then.
    if folder.is_dir():
        run = open_saes(ctx, model, folder, site, only=layers)
        if run.parent(layers).identity == identity:
            return run
    raise BadInputError(
        f"the SAEs that {recommendation.relative} was counted on are gone or were changed "
        f"({counts.manifest.config['saes']});\n{remedy}"
    )
