"""Features weighed by what they do to the loss: attribution of one layer, causal effects of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.attribution import Attribution
from resa_lens.artifacts.kinds.effects import Effects
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.errors import BadInputError
from resa_lens.features.attribution import attribute, mean_loss, model_forward
from resa_lens.features.checks import check_features
from resa_lens.features.effects import Effect, causal_effects
from resa_lens.features.exclusive import RULES, check_rule
from resa_lens.hashes import digest
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.stages.counts import CountRun
from resa_lens.stages.recommendation import MeasureEffects
from resa_lens.stages.saes import SaeRun, phased_corpus, split_records
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig, Record
from resa_lens.texts.phases import TOKENS, PhasedBatch, phased_batches, phased_texts

EFFECT_TOKENS = 4096
"""Of the documents on which causal effects are measured."""
CONTROLS = 10
"""Random sets beside a layer's features: with few of them little is beyond their spread."""
METRICS = {"loss": ("think", "answer"), "think": ("think",), "answer": ("answer",)}
"""What is attributed: the mean loss over a document's tokens of these phases."""


def held_out(corpus: CorpusConfig) -> Sequence[Record]:
    """Return the held-out records of a corpus.

    Raises:
        BadInputError: as `corpora.load_records`, or plain text, which has no thoughts and answers.
    """
    records = split_records(corpora.read_records(corpus))[1]
    if any(record.text for record in records):
        raise BadInputError(
            f"data {corpus.source!r} are plain text: effects are measured on thoughts and answers; "
            "name --question-column and --answer-column, or give other data"
        )
    return records


def document_batches(
    model: Model, records: Sequence[Record], corpus: CorpusConfig, tokens: int
) -> list[PhasedBatch]:
    """Return records as documents, with their steps where they have them."""
    return phased_batches(
        model.tokenizer,
        phased_texts(records, corpus),
        tokens=tokens,
        longest=corpus.sequence,
        batch_tokens=1024,
    )


def check_metric(metric: str) -> None:
    """Raise BadInputError where a metric is unknown."""
    if metric not in METRICS:
        raise BadInputError(f"metric {metric!r} is unknown; use {', '.join(METRICS)}")


@dataclass(frozen=True)
class AttributionRun:
    """What features do to the loss, and the artifact that says it."""

    artifact: Artifact
    results: dict[str, Any]
    """Of `features.attribution.Attribution.to_dict`, with model, place and metric."""


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
    counts: CountRun | None = None,
) -> AttributionRun:
    """Attribute the loss to a layer's features, by gradient and by patching, or read the result.

    The manifest names the counts that the features, or the layer, are from.

    Raises:
        BadInputError: an unknown metric, no SAE at the place, or a feature out of range.
    """
    check_metric(metric)
    if top < 1 or tokens < 1:
        raise BadInputError(f"top is {top}, tokens {tokens}; both must be at least 1")
    coders = saes.coders(model, [point.layer])
    check_features(model, point, features or (), coders)
    corpus = phased_corpus(corpus, model)
    records = held_out(corpus)
    stage = ctx.stage(
        Attribution,
        model,
        name=point.site,
        config={
            "metric": metric,
            "features": features,
            "top": top if features is None else None,
            "tokens": tokens,
            "corpus": corpus,
            "layer": point.layer,
            "seed": ctx.seed,
        },
        data={"data": corpora.hash_records(records)},
        parents={"saes": saes.parent([point.layer])},
    )

    def work(draft: Draft) -> None:
        draft.expect(saes.size_mb([point.layer])[point.layer], 0)
        batches = document_batches(model, records, corpus, tokens)
        with ctx.bar("attributing", len(batches)) as advance:
            attribution = attribute(
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
            **attribution.to_dict(),
        }
        draft.results = {key: results[key] for key in ("layer", "site", "agreement", "documents")}
        draft.parents = [counts.artifact.relative] if counts else []
        draft.json("results.json", results)

    artifact = stage.obtain(work)
    return AttributionRun(artifact, artifact.value("results.json"))


@dataclass(frozen=True)
class EffectsRun:
    """What ablating each layer's counted features does, and the artifact that says it."""

    artifact: Artifact
    layers: dict[int, Effect]
    """By 0-based layer."""


def effects_run(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    counts: CountRun,
    rule: str,
    corpus: CorpusConfig,
    *,
    tokens: int = EFFECT_TOKENS,
    controls: int = CONTROLS,
) -> EffectsRun:
    """Measure what ablating each layer's counted features does to the loss, or read the result.

    Raises:
        BadInputError: an unknown rule, or too few documents.
    """
    check_rule(rule)
    features = {item.layer: item.features[rule] for item in counts.counts.layers}
    corpus = phased_corpus(corpus, model)
    records = held_out(corpus)
    stage = ctx.stage(
        Effects,
        model,
        name=saes.site,
        config={
            "rule": rule,
            "corpus": corpus,
            "tokens": tokens,
            "controls": controls,
            "seed": ctx.seed,
        },
        data={"data": corpora.hash_records(records)},
        parents={"saes": saes.parent(list(features)), "counts": counts.artifact.parent},
        noun="causal effects",
    )

    def work(draft: Draft) -> None:
        draft.expect(max(saes.size_mb(list(features)).values()), 0)
        batches = document_batches(model, records, corpus, tokens)
        effects: dict[str, dict[str, Any]] = {}
        with ctx.bar(f"causal effects of {len(features)} layers", len(features)) as advance:
            for layer, ablated in sorted(features.items()):
                # One at a time: an SAE of a large model is nearly a gigabyte.
                effect = causal_effects(
                    model,
                    saes.coders(model, [layer]),
                    {layer: ablated},
                    batches,
                    controls=controls,
                    seed=ctx.seed,
                )
                effects[str(layer)] = asdict(effect[layer])
                advance(1)
        draft.results = {"layers": effects, "rule": rule, "site": saes.site, "model": model.name}
        listed = {str(layer): list(ablated) for layer, ablated in features.items()}
        draft.settings = {"saes": saes.relative, "features": digest(listed)}
        draft.json("effects.json", effects)

    artifact = stage.obtain(work)
    stored = artifact.value("effects.json")
    return EffectsRun(artifact, {int(layer): Effect(**effect) for layer, effect in stored.items()})


def measure_effects(ctx: Context, model: Model, rule: str, corpus: CorpusConfig) -> MeasureEffects:
    """Return what the selectors causal and blend ask for: effect, se and its freedom by layer."""

    def measure(saes: SaeRun, counts: CountRun) -> dict[int, tuple[float, float, float]]:
        layers = counts.counts.layers
        if not any(item.features[rule] for item in layers):
            totals = {name: sum(len(item.features[name]) for item in layers) for name in RULES}
            others = ", ".join(f"{name} counts {n}" for name, n in totals.items() if name != rule)
            ctx.reporter.note(
                f"causal effects: none to measure, rule {rule!r} counts no feature at any layer; "
                f"{others}: name one with --rule"
            )
            return {item.layer: (0.0, 0.0, 1.0) for item in layers}
        effects = effects_run(ctx, model, saes, counts, rule, corpus, tokens=EFFECT_TOKENS)
        return {layer: (e.value, e.se, e.freedom) for layer, e in effects.layers.items()}

    return measure
