"""The models of a workspace, and the commands that make what it lacks.

Commands are those that a reader can paste: the model as it was named, the workspace, and the SAE
options of what is there, all quoted for a shell.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resa_lens.artifacts.artifact import KINDS, Artifact, Kind
from resa_lens.artifacts.kinds.adapter import Adapter
from resa_lens.artifacts.kinds.eval import Eval, is_adapted
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.listing import Listing
from resa_lens.artifacts.places import BUNDLED
from resa_lens.resources import data_path

_OF_SAES = ("--latents", "--tokens", "--k", "--site", "--seed")
"""Options that name the SAEs: every command that needs SAEs takes them and finds the same ones."""
_OF_QUESTIONS = ("--tasks", "--limit", "--levels", "--max-new-tokens")
"""Options that name the questions."""
_UNAIDED = ("saes", "counts", "recommendation", "adapter", "eval", "activity", "scores",
            "falsification")  # fmt: skip
"""Kinds whose command needs no more than a model and the SAEs' options."""


@dataclass(frozen=True)
class Model:
    """A model of which something in the workspace was made."""

    slug: str
    """Its folder's name."""
    weights: str
    """Hash, or its first eight digits where only they are known."""
    name: str
    """As it is given to a command."""

    @property
    def short(self) -> str:
        """The last part of its name."""
        return self.name.rstrip("/").rpartition("/")[2]

    @property
    def drawn(self) -> bool:
        """Whether its weights were drawn at random, as a control of falsification."""
        return "-random-" in self.name or "-random-" in self.slug


def models(listing: Listing) -> list[Model]:
    """Return the models of a workspace, those with most artifacts first; adapted ones are none."""
    by_weights: dict[str, list[Artifact]] = {}
    for artifact in listing.artifacts:
        if artifact.weights and not is_adapted(artifact):
            by_weights.setdefault(artifact.weights, []).append(artifact)
    ranked = []
    for weights, artifacts in by_weights.items():
        slugs = [s for a in artifacts for s in (_slug(a),) if s.endswith(f"-{weights[:8]}")]
        names = [str(n) for a in artifacts if (n := a.manifest.results.get("model"))]
        model = Model(slugs[0] if slugs else "", weights, names[0] if names else weights[:8])
        if not slugs:
            model = Model(f"{model.short}-{weights[:8]}", weights, model.name)
        ranked.append((model.drawn, -len(artifacts), model.slug, model))
    return [model for *_, model in sorted(ranked, key=lambda row: row[:3])]


def model_of(artifact: Artifact, known: Sequence[Model]) -> Model | None:
    """Return the model that an artifact was made with."""
    return next((model for model in known if model.weights == artifact.weights), None)


def _slug(artifact: Artifact) -> str:
    """The model's name in folders, by where the artifact lies or what it says."""
    parts = Path(artifact.relative).parts
    if len(parts) == 3:
        return parts[1]
    config, results = artifact.manifest.config, artifact.manifest.results
    return str(results.get("slug") or config.get("target") or "")


def command(listing: Listing, model: Model, words: Sequence[str]) -> str:
    """Return a command for a model of this workspace, with the SAE options of its newest run."""
    saes = listing.of(Saes, model.weights)
    options = sae_options(saes[0]) if saes else []
    return line(words[0], "--model", model.name, *words[1:], *options, *workspace_option(listing))


def command_of(listing: Listing, weights: str, *words: str) -> str:
    """Return a command for the model of these weights; it names none where that is unknown."""
    model = next((m for m in models(listing) if m.weights == weights), None)
    if model:
        return command(listing, model, words)
    return line(*words, *workspace_option(listing))


def made_by(artifact: Artifact, workspace: str | None) -> str | None:
    """Return the command line that makes an artifact again, None where none is known.

    Args:
        artifact: the artifact.
        workspace: where it lies, as a command is given it.
    """
    words = list(artifact.manifest.command)
    # `options` stands in those manifests whose command the command line itself wrote.
    if "options" not in artifact.manifest.model_fields_set or words[:1] != ["resa-lens"]:
        return None
    _, name, *words = words
    if "--workspace" in words:
        at = words.index("--workspace")
        del words[at : at + 2]
    return line(name, *(["--workspace", workspace] if workspace else []), *words)


def line(*words: str) -> str:
    """Return a command line, each word quoted where a shell needs it."""
    return shlex.join(["resa-lens", *words])


def workspace_option(listing: Listing) -> list[str]:
    """Name the workspace; not the bundled one, which is an example and may be read-only."""
    return _workspace_option(listing.root)


def _workspace_option(root: Path) -> list[str]:
    return [] if root == data_path(BUNDLED).resolve() else ["--workspace", str(root)]


def sae_options(artifact: Artifact) -> list[str]:
    """Return those options of the command that made an artifact which name its SAEs."""
    return _options(artifact, _OF_SAES)


def _options(artifact: Artifact, names: Sequence[str]) -> list[str]:
    options: list[str] = []
    words = artifact.manifest.command
    for place, word in enumerate(words):
        name, equals, value = str(word).partition("=")
        if name in names and equals:
            options += [name, value]
        elif name in names and place + 1 < len(words):
            options += [name, str(words[place + 1])]
    return options


def remake(path: str, kind: type[Kind], child: Artifact, model: Model | None) -> str | None:
    """Return the command that makes a missing parent, or None where it lies elsewhere.

    Args:
        path: of the parent, as the child's manifest names it.
        kind: of the parent.
        child: what was made from it.
        model: of the parent, where its path tells it.
    """
    if Path(path).is_absolute():
        return None
    place = _workspace_option(child.path.parents[len(Path(child.relative).parts) - 1])
    name = model.name if model else str(child.manifest.results.get("model", ""))
    options = sae_options(child)
    if kind is Saes:
        options = _by_name(path, options)
    if model and model.drawn:
        # Its SAEs are a control's: falsification trains them.
        base = re.split(r"-random-", model.name)[0]
        return line("falsify", "--model", base, *sae_options(child), *place)
    again = line(*(str(word) for word in child.manifest.command[1:]))
    if kind is Adapter and child.manifest.kind == Eval.name:
        # Scores hold the whole command where `tune` made both.
        return again if child.manifest.command[1:2] == ["tune"] else None
    if kind is Eval:
        options = _options(child, _OF_QUESTIONS)
    if kind.name not in _UNAIDED or not name:
        return again  # a command makes what it needs and does not find
    return line(kind.command[0], "--model", name, *kind.command[1:], *options, *place)


def _by_name(path: str, options: Sequence[str]) -> list[str]:
    """Complete SAE options by the run's name, as scratch-mlp_out-1024x32-3bd33d80."""
    parts = re.match(r"\w+-(\w+)-(\d+)x(\d+)-", Path(path).name)
    if not parts:
        return list(options)
    merged = dict(zip(options[::2], options[1::2], strict=True))
    merged |= {"--site": parts[1], "--latents": parts[2], "--k": parts[3]}
    return [word for pair in merged.items() for word in pair]


def kind_of(path: str) -> type[Kind]:
    """Tell the kind of an artifact by where it lies."""
    folders = {kind.folder: kind for kind in KINDS.values()}
    return next((folders[part] for part in Path(path).parts if part in folders), Saes)


def slug_of(path: str) -> str:
    """Return the model's folder that a path names, or ""."""
    parts = Path(path).parts[:-1]
    return next((part for part in parts if re.search(r"-[0-9a-f]{8}$", part)), "")
