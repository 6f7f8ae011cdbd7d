"""Features weighed by what they do to the loss: attribution of one layer, causal effects of all."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from resa_lens.corpora import CorpusConfig, load_records
from resa_lens.errors import BadInputError
from resa_lens.features.attribution import attribute, mean_loss, model_forward
from resa_lens.features.checks import check_features
from resa_lens.features.effects import causal_effects
from resa_lens.features.exclusive import RULES, FeatureCounts
from resa_lens.hookpoints import Hookpoint
from resa_lens.models import Model
from resa_lens.phases import TOKENS, PhasedBatch, phased_batches, phased_texts
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.discovery import MeasureEffects
from resa_lens.pipeline.saes import SaeRun, fit_corpus, split_records
from resa_lens.saes.coder import hash_tensors
from resa_lens.workspace import config_dict, digest, read_json, write_json

EFFECT_TOKENS = 4096
"""Of the documents on which causal effects are measured."""
CONTROLS = 10
"""Random sets beside a layer's features: with few of them little is beyond their spread."""
METRICS = {"loss": ("think", "answer"), "think": ("think",), "answer": ("answer",)}
"""What is attributed: the mean loss over a document's tokens of these phases."""


def document_batches(
    model: Model, corpus: CorpusConfig, tokens: int, batch_tokens: int = 1024
) -> list[PhasedBatch]:
    """Return held-out documents of a corpus, with their steps where it has them."""
    corpus = fit_corpus(corpus, model)
    records = split_records(
        load_records(
            corpus.source,
            question_column=corpus.question_column,
            answer_column=corpus.answer_column,
        )
    )[1]
    return phased_batches(
        model.tokenizer,
        phased_texts(records, corpus),
        tokens=tokens,
        longest=corpus.sequence,
        batch_tokens=batch_tokens,
    )


def check_metric(metric: str) -> None:
    """Raise BadInputError where a metric is unknown."""
    if metric not in METRICS:
        raise BadInputError(f"metric {metric!r} is unknown; use {', '.join(METRICS)}")


def attribute_run(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    point: Hookpoint,
    corpus: CorpusConfig,
    *,
    metric: str = "loss",
    features: tuple[int, ...] | None = None,
    top: int = 20,
    tokens: int = TOKENS,
) -> tuple[Path, dict[str, Any]]:
    """Attribute the loss to a layer's features, by gradient and by patching, or read the result.

    Raises:
        BadInputError: an unknown metric, no SAE at the place, or a feature out of range.
    """
    check_metric(metric)
    if top < 1 or tokens < 1:
        raise BadInputError(f"top is {top}, tokens {tokens}; both must be at least 1")
    coders = saes.coders(model, [point.layer])
    check_features(model, point, features or (), coders)
    identity = {
        "metric": metric,
        "features": features,
        "top": top,
        "tokens": tokens,
        "corpus": config_dict(corpus),
        "sae": hash_tensors(coders[point]),
        "layer": point.layer,
        "dtype": model.dtype,
        "seed": ctx.seed,
    }
    folder = ctx.workspace.path("attributions", model.slug, f"{point.site}-{digest(identity)}")
    if ctx.done(folder):
        ctx.reporter.note(f"attribution: done before, in {folder}")
        return folder, read_json(folder / "results.json")
    batches = document_batches(model, corpus, tokens)
    with ctx.bar("attributing", len(batches)) as advance:
        found = attribute(
            model_forward(model, point),
            coders[point],
            batches,
            mean_loss(METRICS[metric]),
            features=features,
            top=top,
            seed=ctx.seed,
            advance=advance,
        )
    results = {
        "model": model.name,
        "layer": point.layer,
        "site": point.site,
        "where": point.describe(model.n_layers),
        "saes": str(saes.folder),
        "metric": metric,
        "warnings": list(saes.warnings),
        **found.to_dict(),
    }
    manifest = ctx.manifest(
        "attribution",
        model,
        config=identity,
        parents=[ctx.workspace.relative(saes.folder)],
        results={key: results[key] for key in ("layer", "site", "agreement", "documents")},
    )
    with ctx.workspace.artifact(folder, manifest) as target:
        write_json(target / "results.json", results)
    return folder, results


def effects_run(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    counts: FeatureCounts,
    rule: str,
    corpus: CorpusConfig,
    *,
    tokens: int = EFFECT_TOKENS,
    controls: int = CONTROLS,
) -> tuple[Path, dict[int, dict[str, Any]]]:
    """Measure what ablating each layer's counted features does to the loss, or read the result.

    Returns:
        The folder, and {layer: the fields of `effects.Effect`}.

    Raises:
        BadInputError: an unknown rule, or too few documents.
    """
    if rule not in RULES:
        raise BadInputError(f"rule {rule!r} is unknown; use {', '.join(RULES)}")
    features = {item.layer: item.features[rule] for item in counts.layers}
    site = saes.points[0].site
    identity = {
        "saes": ctx.workspace.relative(saes.folder),
        "rule": rule,
        "features": digest({str(k): v for k, v in features.items()}),
        "corpus": config_dict(corpus),
        "tokens": tokens,
        "controls": controls,
        "error": "documents and sets",
        "dtype": model.dtype,
        "seed": ctx.seed,
    }
    folder = ctx.workspace.path("effects", model.slug, f"{site}-{digest(identity)}")
    if saes.manifest and ctx.done(folder, saes.folder):
        ctx.reporter.note(f"causal effects: done before, in {folder}")
        held = read_json(folder / "effects.json")
        return folder, {int(layer): effect for layer, effect in held.items()}
    batches = document_batches(model, corpus, tokens)
    found: dict[int, dict[str, Any]] = {}
    with ctx.bar(f"causal effects of {len(features)} layers", len(features)) as advance:
        for layer, chosen in sorted(features.items()):
            # One at a time: an SAE of a large model is nearly a gigabyte.
            made = causal_effects(
                model,
                saes.coders(model, [layer]),
                {layer: chosen},
                batches,
                controls=controls,
                seed=ctx.seed,
            )
            found[layer] = asdict(made[layer])
            advance(1)
    manifest = ctx.manifest(
        "effects",
        model,
        config=identity,
        parents=[identity["saes"]],
        results={"layers": {str(k): v for k, v in found.items()}, "rule": rule, "site": site},
    )
    with ctx.workspace.artifact(folder, manifest) as target:
        write_json(target / "effects.json", {str(k): v for k, v in found.items()})
    return folder, found


def measure_effects(ctx: Context, model: Model, rule: str, corpus: CorpusConfig) -> MeasureEffects:
    """Return what the selectors causal and blend ask for: effect, se and its freedom by layer."""

    def measure(saes: SaeRun, counts: FeatureCounts) -> dict[int, tuple[float, float, float]]:
        if not any(item.features[rule] for item in counts.layers):
            totals = {name: sum(len(x.features[name]) for x in counts.layers) for name in RULES}
            others = ", ".join(f"{name} counts {n}" for name, n in totals.items() if name != rule)
            ctx.reporter.note(
                f"causal effects: none to measure, rule {rule!r} counts no feature at any layer; "
                f"{others}: name one with --rule"
            )
            return {item.layer: (0.0, 0.0, 1.0) for item in counts.layers}
        _, found = effects_run(ctx, model, saes, counts, rule, corpus, tokens=EFFECT_TOKENS)
        return {layer: (e["value"], e["se"], e["freedom"]) for layer, e in found.items()}

    return measure
