"""The quality report of a run's SAEs, and how much two seeds' features agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.quality import Quality
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.models.hookpoints import describe_layer
from resa_lens.models.host import Model
from resa_lens.saes.quality import measure_quality
from resa_lens.saes.stability import decoder_stability
from resa_lens.stages.saes import SaeRun, phased_corpus, split_records
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig, Record
from resa_lens.texts.phases import PhasedBatch, phased_batches, phased_texts

REPORT_TOKENS = 2048


@dataclass(frozen=True)
class QualityReport:
    """Each SAE's figures by phase."""

    artifact: Artifact
    layers: dict[int, dict[str, dict[str, Any]]]
    """{0-based layer: {phase: figures}}; phases prompt, think, answer and all."""


def report_batches(
    model: Model, held_out: Sequence[Record], corpus: CorpusConfig, tokens: int = REPORT_TOKENS
) -> list[PhasedBatch]:
    """Return the documents that a report reads, in batches.

    Args:
        model: the model the SAEs stand in.
        held_out: records that were not trained on.
        corpus: how they become documents.
        tokens: of all documents, or a few more.
    """
    corpus = phased_corpus(corpus, model)
    return phased_batches(
        model.tokenizer, phased_texts(held_out, corpus), tokens=tokens, longest=corpus.sequence
    )


def quality_run(
    ctx: Context, model: Model, run: SaeRun, corpus: CorpusConfig, tokens: int = REPORT_TOKENS
) -> QualityReport:
    """Measure each SAE by phase on held-out documents, or read the finished report.

    Args:
        ctx: the workspace and who to tell.
        model: the model the SAEs stand in.
        run: the SAEs.
        corpus: whose held-out records become documents, with their steps where they have them.
        tokens: of those documents.
    """
    corpus = phased_corpus(corpus, model)
    records = split_records(corpora.read_records(corpus))[1]
    stage = ctx.stage(
        Quality,
        model,
        name=run.site,
        config={"corpus": corpus, "tokens": tokens},
        data={"data": corpora.hash_records(records)},
        parents={"saes": run.parent()},
    )

    def work(draft: Draft) -> None:
        draft.expect(max(run.size_mb(run.layers).values()), 0)
        batches = report_batches(model, records, corpus, tokens)
        figures: dict[str, dict[str, Any]] = {}
        with ctx.bar(f"quality of {len(run.points)} SAEs", len(run.points)) as advance:
            for point in run.points:
                # One at a time: an SAE of a large model is nearly a gigabyte.
                coders = run.coders(model, [point.layer])
                figures[str(point.layer)] = measure_quality(model, coders, batches)[point].to_dict()
                advance(1)
        draft.results = {
            "layers": {layer: phases["all"] for layer, phases in figures.items()},
            "model": model.name,
            "site": run.site,
        }
        draft.json("quality.json", figures)

    artifact = stage.obtain(work)
    layers = artifact.value("quality.json")
    return QualityReport(artifact, {int(layer): phases for layer, phases in layers.items()})


def stability_of(model: Model, runs: Sequence[SaeRun]) -> list[dict[str, Any]]:
    """Compare the decoders of several seeds, layer by layer, over all pairs.

    Returns:
        A row a layer: share of directions found again in the other seed (mean over pairs and both
        ways), the share that random directions would give, directions, and each pair's figures.
    """
    rows = []
    for layer in (p.layer for p in runs[0].points):
        pairs = []
        for (i, a), (j, b) in combinations(enumerate(runs), 2):
            agreement = decoder_stability(a.coders(model, [layer]), b.coders(model, [layer]))
            pairs += [{"runs": [i, j], **value.to_dict()} for value in agreement.values()]
        rows.append(
            {
                "layer": layer,
                "name": describe_layer(layer, model.n_layers),
                "share": sum(p["share"] for p in pairs) / len(pairs),
                "null": sum(p["a_in_b"]["null"] for p in pairs) / len(pairs),
                "n": pairs[0]["a_in_b"]["n"],
                "pairs": pairs,
            }
        )
    return rows


def training_values(
    model: Model, runs: Sequence[SaeRun], report: QualityReport | None
) -> dict[str, Any]:
    """Return what `train-saes` says of SAEs that were trained, of one seed or several.

    Args:
        model: the model.
        runs: the SAEs of each seed; quality is that of the first.
        report: their quality by phase, where it was measured.
    """
    run = runs[0]
    rows = [
        {
            "layer": p.layer,
            "path": str(run.folder / p.sparsify),
            **{key: run.quality[p.layer][key] for key in ("fvu", "l0", "dead_share")},
            "fvu_special": run.quality[p.layer].get("fvu_special"),
            "quality": report.layers.get(p.layer, {}) if report else {},
        }
        for p in run.points
    ]
    return {
        "saes": rows, "tokens": run.tokens, "seconds": run.seconds,
        "resumed_at_tokens": run.resumed_at_tokens, "fresh": run.fresh, "folder": str(run.folder),
        "report": str(report.artifact.path) if report else None,
        "seeds": [str(r.folder) for r in runs],
        "stability": stability_of(model, runs) if len(runs) > 1 else [],
    }  # fmt: skip
