"""How much the experts of a mixture are used, by phase and at the tags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.routing import Routing as RoutingKind
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.experts.config import UseConfig
from resa_lens.experts.routers import Router, find_routers
from resa_lens.experts.routing import Maps, Routing, Texts, predicted_by_token, route, use_maps
from resa_lens.models.host import Model
from resa_lens.stages.expert_texts import documents, expert_data
from resa_lens.texts.corpora import CorpusConfig


@dataclass(frozen=True)
class RoutingRun:
    """The use of every expert, and the artifact that says it."""

    artifact: Artifact
    results: dict[str, Any]
    """As in `artifacts.kinds.routing.RoutingResults`."""


def routing_run(ctx: Context, model: Model, corpus: CorpusConfig, config: UseConfig) -> RoutingRun:
    """Count the use of every expert over documents or the model's own answers, or read it.

    Args:
        ctx: the workspace and who to tell.
        model: a mixture of experts.
        corpus: the documents.
        config: how many tokens, or answers.

    Raises:
        BadInputError: a dense model, a router of an unknown form, or no document.
    """
    routers = find_routers(model)
    data = expert_data(model, corpus)
    stage = ctx.stage(
        RoutingKind, model, name="use", config={"use": config, "corpus": data.corpus},
        data=data.hashes,
    )  # fmt: skip

    def work(draft: Draft) -> None:
        draft.expect(routing_mb(routers, config.tokens), 1)
        texts = documents(ctx, model, data, config)
        routing = observed(ctx, model, routers, texts)
        maps = use_maps(routing, texts, unit=config.unit)
        draft.results = {
            "model": model.name, "layers": list(routing.layers), "n_layers": model.n_layers,
            "experts": routing.count, "k": routing.experts.shape[2], "documents": texts.count,
            "tokens": len(texts.ids),
        }  # fmt: skip
        draft.json("routing.json", routing_table(routing, texts, routers, maps, config.unit))

    artifact = stage.obtain(work)
    return RoutingRun(artifact, artifact.value("routing.json"))


def routing_mb(routers: Mapping[int, Router], tokens: int) -> float:
    """Return the MB that the experts of so many tokens take, with what is counted of them."""
    k = max(router.k for router in routers.values())
    return 4 * 8 * tokens * len(routers) * k / 2**20


def observed(ctx: Context, model: Model, routers: Mapping[int, Router], texts: Texts) -> Routing:
    """Return the experts of every token, with a bar."""
    with ctx.bar("reading which experts are used", texts.count) as advance:
        return route(model, routers, texts, advance)


def routing_table(
    routing: Routing, texts: Texts, routers: Mapping[int, Router], maps: Maps, unit: str
) -> dict[str, Any]:
    """Return the map as JSON has it."""
    predicted = predicted_by_token(routing, texts)
    counts = routing.tally(texts.phases * 0, 1)[0]
    even = counts / counts.mean(1, keepdims=True)
    rows = []
    for at, layer in enumerate(routing.layers):
        router = routers[layer]
        rows.append({
            "layer": layer, "name": router.name, "experts": router.experts, "k": router.k,
            "rule": None if router.rule is None else str(router.rule), "error": router.error,
            "shared": router.shared, "predicted_by_token": predicted[at],
            "least": float(even[at].min()), "most": float(even[at].max()),
        })  # fmt: skip
    experts = [
        {
            "layer": layer, "expert": expert,
            "scores": {
                name: {place: float(table[at, expert]) for place, table in tables.items()}
                for name, tables in (("use", maps.use), ("error", maps.error), ("mass", maps.mass))
            },
        }
        for at, layer in enumerate(routing.layers)
        for expert in range(routing.count)
    ]  # fmt: skip
    return {
        "routers": rows, "experts": experts, "documents": maps.documents, "tokens": maps.tokens,
        "unit": unit,
    }  # fmt: skip
