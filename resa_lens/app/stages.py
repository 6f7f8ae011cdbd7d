"""The models of a workspace, the stages that each went through, and the commands that are missing.

Commands are those that a reader can paste: the model as it was named, the workspace, and the SAE
options of what is there, all quoted for a shell.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resa_lens.app.listing import FOLDERS, Artifact, Listing, Unfinished
from resa_lens.app.places import BUNDLED
from resa_lens.resources import data_path

DONE, UNFINISHED, MISSING = "done", "unfinished", "missing"
_KEPT = ("--latents", "--tokens", "--k", "--site", "--seed")
"""Options that name the SAEs: every command that needs SAEs takes them and finds the same ones."""
_ASKED = ("--tasks", "--limit", "--levels", "--max-new-tokens")
"""Options that name the questions."""


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
    def drawn(self) -> bool:
        """Whether its weights were drawn at random, as a control of falsification."""
        return "-random-" in self.name or "-random-" in self.slug


@dataclass(frozen=True)
class Stage:
    """A stage of the work: how a page names it and which command does it."""

    name: str
    what: str
    kind: str
    command: tuple[str, ...]
    control: bool | None = None
    """Of adapters: whether something stands in the SAE's place."""


STAGES = (
    Stage("SAEs", "sparse autoencoders, one a layer", "saes", ("train-saes",)),
    Stage(
        "Counts", "features active at the think tags alone", "counts", ("count-features",)
    ),
    Stage("Recommendation", "layers to tune, with a verdict", "recommendation",
          ("recommend-layers",)),
    Stage("Falsification", "which counted features survive tests", "falsification", ("falsify",)),
    Stage("Activity", "how often, how strongly and where features fire", "activity",
          ("activity",)),
    Stage("Scores", "features between reasoning and other text", "scores", ("score-features",)),
    Stage("Tuning", "adapters through a layer's SAE, scored before and after", "adapter",
          ("tune", "--layer", "auto"), False),
    Stage("Controls", "the same with noise in the SAE's place", "adapter",
          ("tune", "--layer", "auto", "--control", "noise"), True),
    Stage("Sweep", "tunings at every layer, with several seeds", "sweep",
          ("sweep", "--layers", "all", "--seeds", "3")),
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """How far a stage came for a model."""

    stage: Stage
    state: str
    """`DONE`, `UNFINISHED` or `MISSING`."""
    artifacts: tuple[Artifact, ...]
    unfinished: tuple[Unfinished, ...]
    command: str
    """That makes what is missing, or goes on with what is unfinished."""


def models(listing: Listing) -> list[Model]:
    """Return the models of a workspace, those with most artifacts first; adapted ones are none."""
    found: dict[str, list[Artifact]] = {}
    for artifact in listing.artifacts:
        if artifact.weights and not _scores_adapter(artifact):
            found.setdefault(artifact.weights, []).append(artifact)
    made = []
    for weights, artifacts in found.items():
        slugs = [s for a in artifacts for s in (_slug(a),) if s.endswith(f"-{weights[:8]}")]
        names = [str(n) for a in artifacts if (n := a.manifest.results.get("model"))]
        name = names[0] if names else weights[:8]
        slug = slugs[0] if slugs else f"{name.rstrip('/').rpartition('/')[2]}-{weights[:8]}"
        made.append((len(artifacts), Model(slug, weights, name)))
    made.sort(key=lambda item: (item[1].drawn, -item[0], item[1].slug))
    return [model for _, model in made]


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


def _scores_adapter(artifact: Artifact) -> bool:
    name = Path(str(artifact.manifest.results.get("model", "")))
    return artifact.manifest.kind == "eval" and name.parent.name == FOLDERS["adapter"]


def checklist(listing: Listing, model: Model) -> list[Step]:
    """Return the stages of the main job and what comes after it, for a model."""
    return [_step(listing, model, stage) for stage in STAGES]


def _step(listing: Listing, model: Model, stage: Stage) -> Step:
    held = [a for a in listing.of(stage.kind) if a.weights == model.weights]
    if stage.control is not None:
        held = [a for a in held if bool(a.manifest.config.get("control")) == stage.control]
    if stage.control:
        held += [s for s in listing.of("sweep") if s.weights == model.weights and _controls(s)]
    begun = [
        u
        for u in listing.under_way
        if u.folder == FOLDERS[stage.kind] and model.slug in u.relative and not stage.control
    ]
    state = DONE if held else UNFINISHED if begun else MISSING
    made = command(listing, model, stage.command)
    return Step(stage, state, tuple(held), tuple(begun), made)


def _controls(sweep: Artifact) -> bool:
    settings = sweep.manifest.config.get("sweep")
    return isinstance(settings, dict) and bool(settings.get("controls"))


def command(listing: Listing, model: Model, parts: Sequence[str]) -> str:
    """Return a command for a model of this workspace, with the SAE options of its newest run."""
    saes = [a for a in listing.of("saes") if a.weights == model.weights]
    options = kept(saes[0].manifest.command) if saes else []
    return line(parts[0], "--model", model.name, *parts[1:], *options, *workspace_option(listing))


def command_of(listing: Listing, weights: str, *parts: str) -> str:
    """Return a command for the model of these weights; it names none where that is unknown."""
    model = next((m for m in models(listing) if m.weights == weights), None)
    if model:
        return command(listing, model, parts)
    return line(*parts, *workspace_option(listing))


def line(*parts: str) -> str:
    """Return a command line, each word quoted where a shell needs it."""
    return shlex.join(["resa-lens", *parts])


def workspace_option(listing: Listing) -> list[str]:
    """Name the workspace; not the bundled one, which is an example and may be read-only."""
    bundled = listing.root == data_path(BUNDLED).resolve()
    return [] if bundled else ["--workspace", str(listing.root)]


def kept(words: Sequence[str], names: Sequence[str] = _KEPT) -> list[str]:
    """Return those of a command's options that are named; those of the SAEs by default."""
    found: list[str] = []
    for place, word in enumerate(words):
        name, equals, value = str(word).partition("=")
        if name in names and equals:
            found += [name, value]
        elif name in names and place + 1 < len(words):
            found += [name, str(words[place + 1])]
    return found


def remake(path: str, kind: str, child: Artifact, model: Model | None) -> str | None:
    """Return the command that makes a missing parent, or None where it lies elsewhere.

    Args:
        path: of the parent, as the child's manifest names it.
        kind: of the parent.
        child: what was made from it.
        model: of the parent, where its path tells it.
    """
    if Path(path).is_absolute():
        return None
    root = child.path
    for _ in Path(child.relative).parts:
        root = root.parent
    place = [] if root == data_path(BUNDLED).resolve() else ["--workspace", str(root)]
    name = model.name if model else str(child.manifest.results.get("model", ""))
    options = kept(child.manifest.command)
    if kind == "saes":
        options = _by_name(path, options)
    if model and model.drawn:
        # Its SAEs are a control's: falsification trains them.
        base = re.split(r"-random-", model.name)[0]
        return line("falsify", "--model", base, *kept(child.manifest.command), *place)
    words = {
        "saes": ["train-saes"],
        "counts": ["count-features"],
        "recommendation": ["recommend-layers"],
        "adapter": ["tune", "--layer", "auto"],
        "eval": ["eval"],
        "activity": ["activity"],
        "scores": ["score-features"],
        "falsification": ["falsify"],
    }.get(kind)
    again = line(*(str(word) for word in child.manifest.command[1:]))
    if kind == "adapter" and child.manifest.kind == "eval":
        # Scores hold the whole command where `tune` made both.
        return again if child.manifest.command[1:2] == ["tune"] else None
    if kind == "eval":
        options = kept(child.manifest.command, _ASKED)
    if not words or not name:
        return again  # a command makes what it needs and does not find
    return line(words[0], "--model", name, *words[1:], *options, *place)


def _by_name(path: str, options: Sequence[str]) -> list[str]:
    """Complete SAE options by the run's name, as scratch-mlp_out-1024x32-3bd33d80."""
    found = re.match(r"\w+-(\w+)-(\d+)x(\d+)-", Path(path).name)
    if not found:
        return list(options)
    given = dict(zip(options[::2], options[1::2], strict=True))
    given |= {"--site": found[1], "--latents": found[2], "--k": found[3]}
    return [word for pair in given.items() for word in pair]
