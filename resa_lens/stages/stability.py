"""Whether a recommendation returns with other prompts, rules and SAE seeds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.kinds.stability import Stability as StabilityKind
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import RULES, CountConfig, tag_prompt
from resa_lens.layers.stability import Stability, stability
from resa_lens.models.hookpoints import trainable_layers
from resa_lens.models.host import Model
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.counts import CountRun, count_run
from resa_lens.stages.recommendation import RECIPES
from resa_lens.stages.sae_training import saes_for
from resa_lens.stages.saes import SaeRun, sae_run
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.texts.prompts import SYSTEM_PROMPTS

SAE_SEED = "SAE seed"


def seed_runs(ctx: Context, model: Model, run: SaeRun, layers: Sequence[int]) -> list[SaeRun]:
    """Return the run and those of the workspace that differ from it in their seed alone."""
    if run.artifact is None or not run.artifact.verifiable or not run.trained_on(model):
        return [run]
    runs = {_seed(run.artifact): run}
    for artifact in ctx.workspace.artifacts(Saes, schemas=True):
        both = artifact.manifest.ingredients, run.artifact.manifest.ingredients
        alike = both[0].keys() == both[1].keys() and _but_seed(artifact) == _but_seed(run.artifact)
        if not alike or _seed(artifact) in runs or next(artifact.damage(), None):
            continue
        other = sae_run(artifact, run.site)
        if set(layers) <= set(other.layers):
            runs[_seed(artifact)] = other
    return [runs[seed] for seed in sorted(runs)]


def _seed(artifact: Artifact) -> int:
    return artifact.manifest.config["sae"]["seed"]


def _but_seed(artifact: Artifact) -> dict[str, Any]:
    """Return what a run was made from, but for its seed and its layers."""
    ingredients = copy.deepcopy(artifact.manifest.ingredients)
    ingredients["config"].pop("layers")
    for part in ("sae", "corpus"):
        ingredients["config"][part].pop("seed")
    return ingredients


@dataclass(frozen=True)
class StabilityRun:
    """How stable a recommendation is, and the artifact that says it."""

    artifact: Artifact
    stability: Stability


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
) -> StabilityRun:
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
    tables: dict[str, dict[int, int]] = {}
    factors: dict[str, dict[str, str]] = {}
    counted: dict[str, CountRun] = {}
    runs = seed_runs(ctx, model, run, chosen)
    with ctx.bar("counting", len(runs) * len(configs)) as advance:
        for one in runs:
            number = str(_seed(one.artifact)) if one.artifact else "given"
            for config in configs:
                counts = count_run(ctx, model, one, config, chosen)
                counted[f"seed {number}, prompt {config.prompt}"] = counts
                for rule in rules:
                    name = f"{SAE_SEED} {number}, prompt {config.prompt}, rule {rule}"
                    tables[name] = counts.counts.table(rule)
                    factors[name] = {"prompt": config.prompt, "rule": rule, SAE_SEED: number}
                advance(1)
    settings = {
        "rules": list(rules),
        "selector": selector,
        "recipe": recipe,
        "seed": ctx.seed,
    }
    stage = ctx.stage(
        StabilityKind,
        model,
        name=sae.site,
        config=settings,
        parents={name: counts.artifact.parent for name, counts in counted.items()},
        settings={"counts": [c.artifact.relative for c in counted.values()], **settings},
    )

    def work(draft: Draft) -> None:
        ctx.reporter.note(f"fitting {len(tables)} tables and comparing them pair by pair")
        answer = stability(
            tables,
            n_layers=model.n_layers,
            factors=factors,
            block=SAE_SEED,
            selector=selector,
            recipe=recipe,
            seed=ctx.seed,
        )
        draft.results = {
            "verdict": answer.verdict,
            "reason": answer.reason,
            "tables": len(answer.tables),
            "site": sae.site,
            "model": model.name,
            "n_layers": model.n_layers,
        }
        draft.json("stability.json", answer.to_dict())

    artifact = stage.obtain(work)
    return StabilityRun(artifact, Stability.from_dict(artifact.value("stability.json")))
