"""What the selectors gradient-probe and activation-change read, measured on documents.

A sweep measures both on the documents that it tunes on; where nothing is tuned yet, `worked` gives
those with their worked steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from resa_lens.models.activation_change import activation_change
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.stages.recommendation import Effects, MeasureLayers
from resa_lens.stages.saes import fit_corpus, packed, split_records
from resa_lens.stages.tune_job import TuneJob
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.tuning.gradient_probe import gradient_probe

BATCHES, SEQUENCES = 8, 4
"""Batches, and sequences in each: enough for a standard error, and short beside a tuning."""


def measure_gradient(target: Model, corpus: CorpusConfig) -> MeasureLayers:
    """Return what the selector gradient-probe asks for: the norms of weight gradients by layer.

    Args:
        target: the model that would be tuned.
        corpus: the documents, in place of those of a tuning.
    """

    def measure(layers: Sequence[int]) -> Effects:
        with packed(target, fit_corpus(corpus, target)):
            table = gradient_probe(target, documents(target, corpus))
        return {layer: table[layer] for layer in layers}

    return measure


def measure_change(source: Model, target: Model, corpus: CorpusConfig, site: str) -> MeasureLayers:
    """Return what the selector activation-change asks for: the site's relative change by layer.

    Args:
        source: whose activations are the measure.
        target: the model that would be tuned.
        corpus: the documents, which both read.
        site: the place in the layer.
    """

    def measure(layers: Sequence[int]) -> Effects:
        points = [Hookpoint(layer, site) for layer in layers]
        reading = fit_corpus(corpus, source)
        with packed(source, reading), packed(target, reading):
            return activation_change(source, target, documents(source, corpus), points)

    return measure


def measure_probes(
    source: Model, target: Model, job: TuneJob, layers: Sequence[int]
) -> dict[str, Effects]:
    """Return both tables of a sweep, by the names that `sweep_tables.analyse` gives them.

    Args:
        source: the SAEs' model.
        target: the model that is tuned; where it is the source, nothing can have changed.
        job: what the sweep's tunings share: documents and site.
        layers: 0-based.
    """
    corpus, objective = job.elicitation, job.objective
    tables = {"gradient": measure_gradient(target, corpus)(layers)}
    if source is not target:
        tables["change"] = measure_change(source, target, corpus, objective.site)(layers)
    return tables


def worked(corpus: CorpusConfig) -> CorpusConfig:
    """Return a corpus whose documents hold their worked steps, where its records have them."""
    return replace(corpus, thought_share=1.0)


def documents(model: Model, corpus: CorpusConfig) -> list[Tensor]:
    """Return a few batches of token ids of a corpus' training split.

    Args:
        model: whose tokenizer makes them.
        corpus: the documents.
    """
    corpus = fit_corpus(corpus, model)
    records = split_records(corpora.read_records(corpus))[0]
    tokens = BATCHES * SEQUENCES * corpus.sequence
    return list(corpora.batches(model.tokenizer, records, corpus, tokens=tokens, batch=SEQUENCES))
