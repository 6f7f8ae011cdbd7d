"""The stages that a model of the workspace went through, and those that are missing."""

from __future__ import annotations

from dataclasses import dataclass

from resa_lens.artifacts.artifact import Artifact, Kind
from resa_lens.artifacts.commands import Model, command
from resa_lens.artifacts.kinds.activity import Activity
from resa_lens.artifacts.kinds.adapter import Adapter
from resa_lens.artifacts.kinds.counts import Counts
from resa_lens.artifacts.kinds.falsification import Falsification
from resa_lens.artifacts.kinds.recommendation import Recommendation
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.kinds.scores import Scores
from resa_lens.artifacts.kinds.sweep import Sweep
from resa_lens.artifacts.listing import Listing, Unfinished

DONE, UNFINISHED, MISSING = "done", "unfinished", "missing"


STAGES: tuple[tuple[str, str, type[Kind], bool | None], ...] = (
    ("SAEs", "sparse autoencoders, one a layer", Saes, None),
    ("Counts", "features active at the think tags alone", Counts, None),
    ("Recommendation", "layers to tune, with a verdict", Recommendation, None),
    ("Falsification", "which counted features survive tests", Falsification, None),
    ("Activity", "how often, how strongly and where features fire", Activity, None),
    ("Scores", "features between reasoning and other text", Scores, None),
    ("Tuning", "adapters through a layer's SAE, scored before and after", Adapter, False),
    ("Controls", "the same with noise in the SAE's place", Adapter, True),
    ("Sweep", "tunings at every layer, with several seeds", Sweep, None),
)
"""Of the work: name, what it makes, its kind, and of adapters whether something stands in the SAE's
place."""


@dataclass(frozen=True)
class Step:
    """How far a stage came for a model."""

    name: str
    what: str
    state: str
    """`DONE`, `UNFINISHED` or `MISSING`."""
    artifacts: tuple[Artifact, ...]
    unfinished: tuple[Unfinished, ...]
    command: str
    """That makes what is missing, or goes on with what is unfinished."""


def checklist(listing: Listing, model: Model) -> list[Step]:
    """Return the stages of the main job and what comes after it, for a model."""
    steps = []
    for name, what, kind, control in STAGES:
        artifacts = listing.of(kind, model.weights)
        if control is not None:
            artifacts = [a for a in artifacts if bool(a.settings.control) == control]
        if control:
            sweeps = listing.of(Sweep, model.weights)
            artifacts += [a for a in sweeps if a.settings.sweep.controls]
        unfinished = [
            folder
            for folder in listing.under_way
            if folder.folder == kind.folder and model.slug in folder.relative and not control
        ]
        state = DONE if artifacts else UNFINISHED if unfinished else MISSING
        words = (*kind.command, *(("--control", "noise") if control else ()))
        line = command(listing, model, words)
        steps.append(Step(name, what, state, tuple(artifacts), tuple(unfinished), line))
    return steps
