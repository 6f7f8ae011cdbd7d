"""What came from what: the artifacts of a workspace as a graph, from their manifests alone.

Nodes stand in columns by stage.  Many alike, as a sweep makes them, are folded into one node; a
parent that is not in the workspace is a node too, with the command that makes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from resa_lens.app import stages
from resa_lens.app.listing import FOLDERS, Artifact, Listing

MODEL = "model"
COLUMNS = (
    ("Model", (MODEL,)),
    ("SAEs", ("saes",)),
    ("Measured", ("counts", "activity", "scores", "quality")),
    (
        "Judged",
        ("recommendation", "falsification", "stability", "effects", "matches",
         "ablation", "attribution"),
    ),
    ("Tuned", ("adapter",)),
    ("Evaluated", ("eval",)),
    ("Swept", ("sweep",)),
)  # fmt: skip
"""Headings and kinds, from left to right: a parent stands to the left of what was made from it."""
NAMES = {
    MODEL: "model",
    "saes": "SAEs",
    "counts": "counts",
    "activity": "activity",
    "scores": "feature scores",
    "quality": "SAE quality",
    "recommendation": "recommendation",
    "falsification": "falsification",
    "stability": "stability",
    "effects": "layer effects",
    "matches": "matches",
    "ablation": "ablation",
    "attribution": "attribution",
    "adapter": "adapter",
    "eval": "evaluation",
    "sweep": "sweep",
}
PLURALS = {name: name if name.endswith("s") else f"{name}s" for name in NAMES.values()}
FOLD = 3
"""From so many alike ones on, one node stands for all."""


@dataclass(frozen=True)
class Node:
    """A model, an artifact, several alike ones, or a parent that is missing."""

    key: str
    """What the address holds and the reader chooses: the path, as `resa-lens runs` shows it."""
    kind: str
    title: str
    detail: str
    members: tuple[Artifact, ...] = ()
    """One artifact, or those that are folded; none of a model or a missing parent."""
    command: str | None = None
    """That makes a missing parent."""
    absent: tuple[Node, ...] = ()
    """The missing parents that are folded into one."""

    @property
    def column(self) -> int:
        """Its place in `COLUMNS`."""
        return next(i for i, (_, kinds) in enumerate(COLUMNS) if self.kind in kinds)

    @property
    def missing(self) -> bool:
        """Whether it is named as a parent and not in the workspace."""
        return not self.members and self.kind != MODEL


@dataclass(frozen=True)
class Graph:
    """Nodes in the order of their columns, and edges from parent to child."""

    nodes: tuple[Node, ...]
    edges: tuple[tuple[str, str], ...]

    def node(self, key: str) -> Node | None:
        """The node of a key, or the one that an artifact's path is folded into."""
        for node in self.nodes:
            if node.key == key or any(a.relative == key for a in node.members):
                return node
            if any(n.key == key for n in node.absent):
                return node
        return None

    def parents(self, node: Node) -> list[Node]:
        """What it was made from."""
        return [n for n in self.nodes if (n.key, node.key) in self.edges]

    def children(self, node: Node) -> list[Node]:
        """What was made from it."""
        return [n for n in self.nodes if (node.key, n.key) in self.edges]


def build(listing: Listing, *, fold: int = FOLD, one_based: bool = False) -> Graph:
    """Make the graph of a workspace.

    Args:
        listing: what the workspace holds.
        fold: from so many alike artifacts on (of one kind, with the same parents) one node stands
            for all.
        one_based: how layers are counted in what the nodes say.
    """
    models = stages.models(listing)
    nodes: dict[str, Node] = {}
    edges: set[tuple[str, str]] = set()

    def model_node(model: stages.Model) -> str:
        key = f"model {model.slug}"
        title = "random weights" if model.drawn else model.name.rstrip("/").rpartition("/")[2]
        nodes.setdefault(key, Node(key, MODEL, title, f"weights {model.weights[:8]}"))
        return key

    def missing_node(path: str, child: Artifact) -> str:
        if path not in nodes:
            kind = kind_of(path)
            slug = slug_of(path)
            known = next((m for m in models if m.slug == slug), None)
            if known is None and slug:
                known = stages.Model(slug, slug.rpartition("-")[2], slug.rpartition("-")[0])
            nodes[path] = Node(
                path, kind, NAMES[kind], "missing", command=stages.remake(path, kind, child, known)
            )
            # Of its own parents nothing is known but what stands beside it in the child's manifest.
            beside = [
                p
                for p in of[child.relative]
                if _column(kind_of(p)) < _column(kind) and slug_of(p) == slug
            ]
            if beside and kind != "eval":
                edges.add((placed.get(beside[-1]) or missing_node(beside[-1], child), path))
            elif known:
                edges.add((model_node(known), path))
        return path

    held = {artifact.relative: artifact for artifact in listing.artifacts}
    of = {artifact.relative: _parents(artifact) for artifact in listing.artifacts}
    by_column = sorted(listing.artifacts, key=lambda a: (_column(a.manifest.kind), a.relative))
    placed: dict[str, str] = {}
    # From left to right: what parents are folded into is known when their children come.
    for column in range(len(COLUMNS)):
        groups: dict[tuple[Any, ...], list[Artifact]] = {}
        for artifact in by_column:
            if _column(artifact.manifest.kind) != column:
                continue
            above = {
                placed.get(p, p) if p in held else missing_node(p, artifact)
                for p in of[artifact.relative]
            }
            model = stages.model_of(artifact, models)
            drawn_from = {_weights(parent, held) for parent in of[artifact.relative]}
            if model and model.weights not in drawn_from and not adapted(artifact):
                above.add(model_node(model))
            groups.setdefault((*_alike(artifact), frozenset(above)), []).append(artifact)
            edges |= {(parent, artifact.relative) for parent in above}
        for group in groups.values():
            if len(group) < fold:
                made = [_single(artifact, one_based) for artifact in group]
            else:
                made = [_folded(group, one_based)]
            for node in made:
                nodes[node.key] = node
                placed |= {artifact.relative: node.key for artifact in node.members}
    placed |= _fold_missing(nodes)
    edges = {(placed.get(parent, parent), placed.get(child, child)) for parent, child in edges}
    ordered = sorted(nodes.values(), key=lambda node: (node.column, node.key))
    return Graph(tuple(ordered), tuple(sorted(edges)))


def kind_of(path: str) -> str:
    """Tell the kind of an artifact by where it lies."""
    kinds = {folder: kind for kind, folder in FOLDERS.items()}
    found = [kinds[part] for part in PurePosixPath(path).parts if part in kinds]
    return found[0] if found and found[0] in NAMES else "saes"


def slug_of(path: str) -> str:
    """Return the model's folder that a path names, or ""."""
    found = [part for part in PurePosixPath(path).parts[:-1] if re.search(r"-[0-9a-f]{8}$", part)]
    return found[0] if found else ""


def _alike(artifact: Artifact) -> tuple[str, ...]:
    """What artifacts that are folded have in common besides their parents."""
    kind, config = artifact.manifest.kind, artifact.manifest.config
    if kind == "sweep":  # few, and each stands for many
        return kind, artifact.relative
    # A control is told from what it is compared with.
    return kind, str(config.get("control", "")) if kind == "adapter" else ""


def _column(kind: str) -> int:
    return next((i for i, (_, kinds) in enumerate(COLUMNS) if kind in kinds), 0)


def _parents(artifact: Artifact) -> list[str]:
    """Paths of what it was made from; of an adapter's scores, the adapter."""
    found = [str(parent) for parent in artifact.manifest.parents]
    if name := adapted(artifact):
        found.append(f"adapters/{name}")
    return [path for path in dict.fromkeys(found) if path != artifact.relative]


def adapted(artifact: Artifact) -> str:
    """The adapter that an evaluation scored, "" of a plain model.

    By name: the workspace may have been moved since.
    """
    if artifact.manifest.kind != "eval":
        return ""
    path = PurePosixPath(str(artifact.manifest.results.get("model", "")))
    return path.name if path.parent.name == FOLDERS["adapter"] else ""


def _weights(relative: str, held: Mapping[str, Artifact]) -> str:
    """Hash of the weights of an artifact's model, or what a missing one's path tells of it."""
    if relative in held:
        return held[relative].weights
    tail = slug_of(relative).rpartition("-")[2]
    return next((a.weights for a in held.values() if tail and a.weights[:8] == tail), tail)


def _single(artifact: Artifact, one_based: bool) -> Node:
    kind = artifact.manifest.kind
    said = detail(artifact, one_based=one_based)
    return Node(artifact.relative, kind, NAMES.get(kind, kind), said, (artifact,))


def _folded(group: list[Artifact], one_based: bool) -> Node:
    kind = group[0].manifest.kind
    control = group[0].manifest.config.get("control")
    what = PLURALS[NAMES.get(kind, kind)]
    places = sorted({n for a in group if isinstance(n := a.manifest.results.get("layer"), int)})
    said = f"control {control}" if control else ""
    if not control and places:
        said = _layers(places, one_based) if len(places) == 1 else f"{len(places)} layers"
    newest = max(group, key=lambda a: (a.manifest.created, a.relative))
    key = f"{len(group)} {what}, the newest {newest.relative}"
    return Node(key, kind, f"{len(group)} {what}", said, tuple(group))


def _fold_missing(nodes: dict[str, Node]) -> dict[str, str]:
    """Put one node in place of a model's missing ones of a kind; returns {path: its key}."""
    groups: dict[tuple[str, str], list[Node]] = {}
    for node in nodes.values():
        if node.missing:
            groups.setdefault((node.kind, slug_of(node.key)), []).append(node)
    placed = {}
    for (kind, _), group in groups.items():
        if len(group) == 1:
            continue
        what = f"{len(group)} {PLURALS[NAMES[kind]]}"
        pile = Node(f"{what} missing, {group[0].key}", kind, what, "missing", absent=tuple(group))
        nodes[pile.key] = pile
        for node in group:
            del nodes[node.key]
            placed[node.key] = pile.key
    return placed


def _layers(layers: Iterable[int], one_based: bool) -> str:
    return f"layer {', '.join(str(int(layer) + one_based) for layer in layers)}"


def detail(artifact: Artifact, *, one_based: bool = False) -> str:
    """Say in a few words what tells an artifact from its like; "" where it does not say."""
    config, results = artifact.manifest.config, artifact.manifest.results
    try:
        match artifact.manifest.kind:
            case "saes":
                return (
                    f"{int(config['sae']['latents']):,} latents, seed {int(config['sae']['seed'])}"
                )
            case "counts":
                return f"{sum(int(row['either']) for row in results['layers'])} by either tag"
            case "activity":
                return f"{sum(results['tokens'].values()):,} tokens"
            case "scores":
                return f"{len(results['significant'])} scores"
            case "recommendation":
                return _layers(results["recommended"], one_based)
            case "falsification":
                return _survivors(results["summary"]["rules"])
            case "ablation" | "attribution":
                return _layers([results["layer"]], one_based)
            case "adapter":
                control = config.get("control")
                layer = results["layer"]
                parts = [] if layer is None else [_layers([layer], one_based)]
                return ", ".join([*parts, f"control {control}"] if control else parts)
            case "eval":
                return f"{100 * float(results['accuracy']):.1f} % of {int(results['n'])}"
            case "sweep":
                return f"{len(config['jobs'])} tunings"
            case _:
                return str(results["site"])
    except (KeyError, TypeError, ValueError, AttributeError):
        # Of another version, or changed by hand: the graph stands without it.
        return ""


def _survivors(rules: Iterable[Mapping[str, Any]]) -> str:
    most = max(rules, key=lambda row: row["counted"])
    counted = int(most["counted"])
    return f"{int(most['survivors'])} of {counted} survive" if counted else "none counted"
