"""SAEs trained beside given ones, as they were: of another seed, and of a random-weights model.

Each training is a job by itself (`jobs.joblist`), of all layers in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError, TakenError
from resa_lens.models.host import Model
from resa_lens.progress import SILENT
from resa_lens.saes.baselines import random_weights_model
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.sae_job import SaeJob, sae_job
from resa_lens.stages.sae_training import train_job
from resa_lens.stages.saes import SaeRun, sae_run
from resa_lens.texts.corpora import CorpusConfig

OTHER_SEED, RANDOM_WEIGHTS = "other-seed", "random-weights"
MATCHED = "matched"
"""Weights drawn with the trained ones' mean and spread: activations of a trained model's size."""
Trainings = Mapping[str, tuple[SaeConfig, CorpusConfig]]
"""How SAEs are trained, by the job's name; of `RANDOM_WEIGHTS` on the random-weights model."""


@dataclass
class FurtherSaes:
    """Trainings with what they share; called with a job's name, it does the job."""

    ctx: Context
    model: Model
    layers: tuple[int, ...]
    """0-based."""
    trainings: Trainings
    runs: dict[str, SaeRun] = field(default_factory=dict, init=False)
    begun: dict[str, SaeJob] = field(default_factory=dict, init=False)
    """Trainings that another command was at; their data are not read and hashed at every look."""

    def __call__(self, name: str) -> str:
        """Train SAEs; return their folder as manifests hold it.

        Raises:
            TakenError: another command is at this very training.
            RunFailedError: as `stages.sae_training.train_job`.
        """
        return self.run(name).relative

    def run(self, name: str) -> SaeRun:
        """Return the SAEs of a job: trained here, or by another process, or now.

        Raises:
            TakenError: as of a call.
            RunFailedError: as of a call.
        """
        if name not in self.runs:
            sae, corpus = self.trainings[name]
            host, own = self.host(name), replace(self.ctx, force=False)
            if name not in self.begun:
                self.begun[name] = sae_job(own, host, self.layers, sae, corpus, None)
            if name == RANDOM_WEIGHTS:
                title = f"SAEs of a model with random weights ({host.slug}), the null:"
            else:
                title = f"another seed's SAEs: seed {sae.seed}"
            try:
                self.runs[name] = train_job(own, self.begun[name], title=title)
            except TakenError as error:
                self.ctx.note_once([f"{name}: {error}"])
                raise
            del self.begun[name]
        return self.runs[name]

    def recorded(self, name: str, relative: str) -> SaeRun | None:
        """Return a finished job's SAEs by their folder; None where they are not as they were.

        An identity does not find them on every node: it holds the bits of the random weights, which
        depend on the device that their moments were measured on.
        """
        if name in self.runs and self.runs[name].relative == relative:
            return self.runs[name]
        try:
            artifact = self.ctx.workspace.read(self.ctx.workspace.path(relative))
        except BadInputError:
            return None
        if artifact is None or artifact.manifest.kind != Saes.name or any(artifact.damage()):
            return None
        run = sae_run(artifact, self.trainings[name][0].site)
        self.ctx.reporter.note(f"{name}: using {run.folder}")
        return run

    def host(self, name: str) -> Model:
        """Return the model that a job's SAEs are of."""
        return self.random_host if name == RANDOM_WEIGHTS else self.model

    @cached_property
    def random_host(self) -> Model:
        """The model with random weights."""
        return random_weights_model(self.model, self.ctx.seed, weights=MATCHED)


@dataclass(frozen=True)
class RemoteSaes:
    """The same trainings for a worker of Ray, which opens the model itself."""

    workspace: str
    model: str
    layers: tuple[int, ...]
    trainings: Trainings
    context: dict[str, Any]
    """Fields of `Context`."""

    def __call__(self, name: str) -> str:
        """Do a job as `FurtherSaes` does.

        Raises:
            BadInputError: the model cannot be opened on this node.
            RunFailedError: as of `FurtherSaes`.
        """
        ctx = Context(Workspace(self.workspace), SILENT, **self.context)
        return FurtherSaes(ctx, ctx.model(self.model), self.layers, self.trainings)(name)
