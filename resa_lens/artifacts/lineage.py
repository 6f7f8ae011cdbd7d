"""The lineage: artifacts of a workspace as a graph, from their manifests alone.

Nodes stand in columns by stage.  Many alike, as a sweep makes them, are folded into one node; a
parent that is not in the workspace is a node too, with the command that makes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from resa_lens.artifacts import commands
from resa_lens.artifacts.artifact import COLUMNS, Artifact, Kind
from resa_lens.artifacts.commands import kind_of, slug_of
from resa_lens.artifacts.kinds.adapter import Adapter
from resa_lens.artifacts.kinds.eval import Eval, adapter_name, adapter_of, by_adapter, is_adapted
from resa_lens.artifacts.kinds.model import MergedModel
from resa_lens.artifacts.kinds.sweep import Sweep
from resa_lens.artifacts.listing import Listing
from resa_lens.models.hookpoints import list_layers

FOLD = 3
"""From so many alike ones on, one node stands for all."""


@dataclass(frozen=True)
class Node:
    """A model, an artifact, several alike ones, or a parent that is missing."""

    key: str
    """What the address holds and the reader chooses: the path, as `resa-lens runs` shows it."""
    kind: type[Kind]
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
        return _column(self.kind)

    @property
    def base(self) -> bool:
        """Whether it is a model that artifacts were made with, and itself no artifact."""
        return self.kind is MergedModel and not self.members

    @property
    def missing(self) -> bool:
        """Whether it is named as a parent and not in the workspace."""
        return not self.members and not self.base


@dataclass(frozen=True)
class Graph:
    """Nodes in the order of their columns, and edges from parent to child."""

    nodes: tuple[Node, ...]
    edges: tuple[tuple[str, str], ...]

    def node(self, key: str) -> Node | None:
        """Return the node of a key, or the one that an artifact's path is folded into."""
        for node in self.nodes:
            if node.key == key or any(a.relative == key for a in node.members):
                return node
            if any(n.key == key for n in node.absent):
                return node
        return None

    def parents(self, node: Node) -> list[Node]:
        """Return what it was made from."""
        return [n for n in self.nodes if (n.key, node.key) in self.edges]

    def children(self, node: Node) -> list[Node]:
        """Return what was made from it."""
        return [n for n in self.nodes if (node.key, n.key) in self.edges]


def build(listing: Listing, *, fold: int = FOLD, one_based: bool = False) -> Graph:
    """Make the graph of a workspace.

    Args:
        listing: what the workspace holds.
        fold: from so many alike artifacts on (of one kind, with the same parents) one node stands
            for all.
        one_based: how layers are counted in what the nodes say.
    """
    return _Builder(listing, fold, one_based).build()


class _Builder:
    """A graph on its way."""

    def __init__(self, listing: Listing, fold: int, one_based: bool) -> None:
        self.fold, self.one_based = fold, one_based
        self.models = commands.models(listing)
        self.artifacts = {artifact.relative: artifact for artifact in listing.artifacts}
        self.identities = {
            a.manifest.identity: a.relative for a in listing.artifacts if a.verifiable
        }
        self.adapters = by_adapter(listing.of(Adapter))
        self.parents = {a.relative: self._parents(a) for a in listing.artifacts}
        self.weights = {a.weights[:8]: a.weights for a in reversed(listing.artifacts)}
        self.nodes: dict[str, Node] = {}
        self.edges: set[tuple[str, str]] = set()
        self.places: dict[str, str] = {}
        """The node that a path is folded into."""

    def _parents(self, artifact: Artifact) -> list[str]:
        """Return the paths of what an artifact was made from; of an adapter's scores, the adapter.

        By identity where that is known: a folder may have been renamed since.
        """
        manifest = artifact.manifest
        identities = manifest.ingredients.get("parents", {}) if artifact.verifiable else {}
        known = [self.identities[i] for i in identities.values() if i in self.identities]
        kinds = {kind_of(path) for path in known}
        paths = [p for p in manifest.parents if p in self.artifacts or kind_of(p) not in kinds]
        if adapter := adapter_of(artifact, self.adapters) if is_adapted(artifact) else None:
            known.append(adapter.relative)
        elif is_adapted(artifact) and (name := adapter_name(artifact)):
            known.append(f"{Adapter.folder}/{name}")
        return [path for path in dict.fromkeys([*paths, *known]) if path != artifact.relative]

    def build(self) -> Graph:
        # From left to right: what parents are folded into is known when their children come.
        for column in range(len(COLUMNS)):
            alike: dict[tuple[object, ...], list[Artifact]] = {}
            for artifact in sorted(self.artifacts.values(), key=lambda a: a.relative):
                if _column(artifact.kind) == column:
                    above = self._above(artifact)
                    alike.setdefault((*_alike(artifact), above), []).append(artifact)
                    self.edges |= {(parent, artifact.relative) for parent in above}
            for group in alike.values():
                folded = len(group) >= self.fold
                nodes = [self._folded(group)] if folded else map(self._single, group)
                for node in nodes:
                    self.nodes[node.key] = node
                    self.places |= {artifact.relative: node.key for artifact in node.members}
        self._fold_missing()
        edges = {tuple(self.places.get(end, end) for end in edge) for edge in self.edges}
        ordered = sorted(self.nodes.values(), key=lambda node: (node.column, node.key))
        return Graph(tuple(ordered), tuple(sorted((parent, child) for parent, child in edges)))

    def _above(self, artifact: Artifact) -> frozenset[str]:
        """Return the keys of the nodes that an artifact hangs on."""
        parents = self.parents[artifact.relative]
        above = {
            self.places.get(path, path) if path in self.artifacts else self._missing(path, artifact)
            for path in parents
        }
        own = self._base_weights(artifact)
        model = next((model for model in self.models if model.weights == own), None)
        if model and model.weights not in {self._weights(path) for path in parents}:
            above.add(self._model(model))
        return frozenset(above)

    def _model(self, model: commands.Model) -> str:
        key = f"model {model.slug}"
        title = "random weights" if model.drawn else model.short
        self.nodes.setdefault(key, Node(key, MergedModel, title, f"weights {model.weights[:8]}"))
        return key

    def _missing(self, path: str, child: Artifact) -> str:
        if path in self.nodes:
            return path
        kind, slug = kind_of(path), slug_of(path)
        model = next((m for m in self.models if m.slug == slug), None)
        if model is None and slug:
            model = commands.Model(slug, slug.rpartition("-")[2], slug.rpartition("-")[0])
        remake = commands.remake(path, kind, child, model)
        self.nodes[path] = Node(path, kind, kind.title, "missing", command=remake)
        # Of its own parents nothing is known but what the child's manifest names besides it.
        nearest = [
            other
            for other in self.parents[child.relative]
            if _column(kind_of(other)) < _column(kind) and slug_of(other) == slug
        ]
        if nearest and kind is not Eval:
            above = self.places.get(nearest[-1]) or self._missing(nearest[-1], child)
            self.edges.add((above, path))
        elif model:
            self.edges.add((self._model(model), path))
        return path

    def _base_weights(self, artifact: Artifact) -> str:
        """Hash of the model's weights without adapters; "" where only an adapter is named."""
        if not is_adapted(artifact):
            return artifact.weights
        model = artifact.manifest.ingredients.get("model", {}) if artifact.verifiable else {}
        return model.get("weights", "")

    def _weights(self, path: str) -> str:
        """Hash of the weights of an artifact's model, or what a missing one's path tells of it."""
        if path in self.artifacts:
            return self.artifacts[path].weights
        tail = slug_of(path).rpartition("-")[2]
        return self.weights.get(tail, tail)

    def _single(self, artifact: Artifact) -> Node:
        kind = artifact.kind
        detail = kind.detail(artifact, one_based=self.one_based)
        return Node(artifact.relative, kind, kind.title, detail, (artifact,))

    def _folded(self, group: list[Artifact]) -> Node:
        kind = group[0].kind
        title = f"{len(group)} {kind.titles}"
        newest = max(group, key=lambda a: (a.manifest.created, a.relative))
        key = f"{title}, the newest {newest.relative}"
        return Node(key, kind, title, self._alike_detail(group), tuple(group))

    def _alike_detail(self, group: list[Artifact]) -> str:
        if control := _control(group[0]):
            return f"control {control}"
        layers = sorted(
            {n for a in group if isinstance(n := getattr(a.results, "layer", None), int)}
        )
        if len(layers) == 1:
            return list_layers(layers, one_based=self.one_based)
        return f"{len(layers)} layers" if layers else ""

    def _fold_missing(self) -> None:
        """Put one node in place of a model's missing ones of a kind."""
        alike: dict[tuple[type[Kind], str], list[Node]] = {}
        for node in self.nodes.values():
            if node.missing:
                alike.setdefault((node.kind, slug_of(node.key)), []).append(node)
        for (kind, _), group in alike.items():
            if len(group) == 1:
                continue
            title = f"{len(group)} {kind.titles}"
            key = f"{title} missing, {group[0].key}"
            self.nodes[key] = Node(key, kind, title, "missing", absent=tuple(group))
            for node in group:
                del self.nodes[node.key]
                self.places[node.key] = key


def _column(kind: type[Kind]) -> int:
    return COLUMNS.index(kind.column)


def _control(artifact: Artifact) -> str:
    return artifact.settings.control or "" if artifact.kind is Adapter else ""


def _alike(artifact: Artifact) -> tuple[object, ...]:
    """What artifacts that are folded have in common besides their parents."""
    # Sweeps are few, and each stands for many; a control is told from what it is compared with.
    apart = artifact.relative if artifact.kind is Sweep else _control(artifact)
    return artifact.kind, apart
