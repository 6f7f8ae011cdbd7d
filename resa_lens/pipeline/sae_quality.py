"""The quality report of a run's SAEs, and how much two seeds' features agree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from resa_lens import corpora
from resa_lens.corpora import CorpusConfig
from resa_lens.hookpoints import describe_layer
from resa_lens.models import Model
from resa_lens.phases import phased_batches, phased_texts
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.saes import SaeRun, fit_corpus, split_records
from resa_lens.saes.quality import measure_quality
from resa_lens.saes.stability import decoder_stability
from resa_lens.workspace import config_dict, digest, read_json, write_json

REPORT_TOKENS = 2048


def quality_run(
    ctx: Context, model: Model, run: SaeRun, corpus: CorpusConfig, tokens: int = REPORT_TOKENS
) -> tuple[Path, dict[int, dict[str, dict[str, Any]]]]:
    """Measure each SAE by phase on held-out documents, or read the finished report.

    Args:
        ctx: the workspace and who to tell.
        model: the model the SAEs stand in.
        run: the SAEs.
        corpus: whose held-out records become documents, with their steps where they have them.
        tokens: of those documents.

    Returns:
        The folder, and {layer: {phase: figures}}; phases prompt, think, answer and all.
    """
    corpus = fit_corpus(corpus, model)
    identity = {
        "saes": ctx.workspace.relative(run.folder),
        "corpus": config_dict(corpus),
        "tokens": tokens,
        "dtype": model.dtype,
    }
    folder = ctx.workspace.path("quality", model.slug, f"{run.points[0].site}-{digest(identity)}")
    if run.manifest and ctx.done(folder, run.folder):
        held = read_json(folder / "quality.json")
        return folder, {int(layer): phases for layer, phases in held.items()}
    records = split_records(corpora.load_records(corpus.source))[1]
    batches = phased_batches(
        model.tokenizer, phased_texts(records, corpus), tokens=tokens, longest=corpus.sequence
    )
    found: dict[int, dict[str, dict[str, Any]]] = {}
    with ctx.bar(f"quality of {len(run.points)} SAEs", len(run.points)) as advance:
        for point in run.points:
            # One at a time: an SAE of a large model is nearly a gigabyte.
            coders = run.coders(model, [point.layer])
            found[point.layer] = measure_quality(model, coders, batches)[point].to_dict()
            advance(1)
    manifest = ctx.manifest(
        "quality",
        model,
        config=identity,
        parents=[identity["saes"]],
        results={"layers": {str(k): v["all"] for k, v in found.items()}, "model": model.name},
    )
    with ctx.workspace.artifact(folder, manifest) as target:
        write_json(target / "quality.json", {str(k): v for k, v in found.items()})
    return folder, found


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
            found = decoder_stability(a.coders(model, [layer]), b.coders(model, [layer]))
            pairs += [{"runs": [i, j], **value.to_dict()} for value in found.values()]
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
