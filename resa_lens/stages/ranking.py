"""Experts ranked for a tag, a phase or a class of documents, beside nulls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.ranking import Ranking as RankingKind
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.experts.config import RankConfig
from resa_lens.experts.rank import Classes, Ranking, contrast_of, rank_experts
from resa_lens.experts.routers import Router, find_routers
from resa_lens.experts.routing import Routing, Texts
from resa_lens.models.host import Model
from resa_lens.models.unloaded import UnloadedModel
from resa_lens.stages.expert_texts import (
    ExpertData,
    class_documents,
    class_key,
    documents,
    expert_data,
)
from resa_lens.stages.routing import observed, routing_mb
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.texts.prompts import PHASES, THINK_OPEN


@dataclass(frozen=True)
class RankingRun:
    """The ranking, and the artifact that says it."""

    artifact: Artifact
    results: dict[str, Any]
    """As in `artifacts.kinds.ranking.RankingResults`."""


def ranking_run(ctx: Context, model: Model, corpus: CorpusConfig, config: RankConfig) -> RankingRun:
    """Rank the experts of a mixture for a target, or read the ranking.

    Args:
        ctx: the workspace and who to tell.
        model: a mixture of experts.
        corpus: the documents.
        config: the target, by what it ranks, and the nulls.

    Raises:
        BadInputError: a dense model, a target that is missing, or too few documents.
    """
    routers = find_routers(model)
    data = expert_data(model, corpus, config.classes)
    stage = ctx.stage(
        RankingKind,
        model,
        name=config.measure,
        config={
            "rank": config, "classes": class_key(config.classes), "corpus": data.corpus,
        },
        data=data.hashes,
    )  # fmt: skip

    def work(draft: Draft) -> None:
        draft.expect(routing_mb(routers, config.use.tokens), 1)
        ranking, texts, _, classes = ranked(ctx, model, routers, data, config)
        first, null = ranking.row(ranking.order[0]), ranking.null()
        types = null["token_types"]
        draft.results = {
            "model": model.name, "target": ranking.target, "by": ranking.by,
            "layer": first["layer"], "expert": first["expert"],
            "score": first["scores"][ranking.by],
            "reached_by": types["reached_by"] if types else None,
            "types": len(types["types"]) if types else None, "documents": texts.count,
        }  # fmt: skip
        draft.json("ranking.json", {
            "target": ranking.target, "by": ranking.by,
            "classes": list(classes.names) if classes else None,
            "experts": [ranking.row(place) for place in ranking.order], "null": null,
            "documents": texts.count, "tokens": len(texts.ids), "notes": list(ranking.notes),
        })  # fmt: skip

    artifact = stage.obtain(work)
    return RankingRun(artifact, artifact.value("ranking.json"))


def check_target(
    ctx: Context, model: Model | UnloadedModel, corpus: CorpusConfig, config: RankConfig
) -> None:
    """Raise BadInputError where data have no such target or classes; nothing is loaded for it.

    What only the model's own answers show is not looked at.
    """
    data = expert_data(model, corpus, config.classes)
    target = config.target
    tags = (target,) if target is not None and target not in PHASES else ()
    if config.classes == "right" or (config.use.generations and not config.classes):
        return
    if config.classes:
        texts, classes = class_documents(ctx, model, data, config, tags)
        contrast_of(texts, target or classes.names[0], classes)
    else:
        contrast_of(documents(ctx, model, data, config.use, tags), target or THINK_OPEN, None)


def ranked(
    ctx: Context,
    model: Model,
    routers: Mapping[int, Router],
    data: ExpertData,
    config: RankConfig,
) -> tuple[Ranking, Texts, Routing, Classes | None]:
    """Rank experts on data that are read, with the documents and their routing."""
    target = config.target
    tags = (target,) if target is not None and target not in PHASES else ()
    classes = None
    if config.classes:
        texts, classes = class_documents(ctx, model, data, config, tags)
        target = target or classes.names[0]
    else:
        texts = documents(ctx, model, data, config.use, tags)
    target = target or THINK_OPEN
    contrast_of(texts, target, classes)  # refuses what cannot be, before the model runs
    routing = observed(ctx, model, routers, texts)
    ranking = rank_experts(routing, texts, config, target, model.tokenizer, classes)
    ctx.note_once(ranking.notes)
    return ranking, texts, routing, classes
