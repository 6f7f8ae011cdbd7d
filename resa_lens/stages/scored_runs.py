"""The scored runs of a workspace, evaluations and those of sweeps: which can be compared.

Nothing here loads torch: the feature explorer compares by it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.adapter import Adapter
from resa_lens.artifacts.kinds.eval import Asking, Eval, adapter_of, by_adapter, is_adapted
from resa_lens.artifacts.kinds.sweep import ANSWERS, Job, Sweep
from resa_lens.artifacts.listing import Listing, name_of
from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import describe_layer

Key = tuple[Artifact, str | None]
"""An evaluation, or a sweep and the column of its table of answers."""


@dataclass(frozen=True)
class Run:
    """Answers that can be compared: an evaluation, or one run of a sweep."""

    name: str
    """In the address: the workspace-relative path, of a sweep's run with `:` and its column."""
    artifact: Artifact
    column: str | None
    """Of a sweep's table of answers; None for an evaluation, which has texts."""
    what: str
    """Model or adapter, and how it was asked."""
    tuned: bool
    """Through an SAE; a control is neither that nor the base."""
    base: bool
    weights: str
    """Hash of the weights; of the base model's for an adapter."""

    @property
    def short(self) -> str:
        """What was scored, without how it was asked."""
        # A layer's name has a semicolon inside of its parentheses.
        return re.split(r";(?![^(]*\))|, site |, adapter|: run", self.what)[0]

    @property
    def label(self) -> str:
        """What a person tells it by, among others."""
        return f"{self.short}, {name_of(self.artifact)}"

    @property
    def questions(self) -> str:
        """Digest of the questions: runs are paired where it is the same."""
        return self.artifact.settings.questions

    @property
    def asking(self) -> Asking | None:
        """How the questions were put, of an evaluation."""
        return None if self.column else self.artifact.settings.eval

    @property
    def key(self) -> Key:
        """What its answers are read by."""
        return self.artifact, self.column


def runs_of(listing: Listing) -> tuple[list[Run], list[str]]:
    """List what can be compared, evaluations before sweeps, and what cannot be read."""
    runs, problems = [], []
    adapters = by_adapter(listing.of(Adapter))
    for artifact in listing.of(Eval):
        adapter, adapted = adapter_of(artifact, adapters), is_adapted(artifact)
        model = artifact.results.model.rpartition("/")[2]
        if adapter:
            what = f"{Adapter.through(adapter)}, adapter {model}"
        else:
            what = f"adapter {model}" if adapted else f"{model}, as it is"
        what = f"{what}; {_asking(artifact.settings.eval)}"
        tuned = adapter is not None and not adapter.settings.control
        weights = (adapter or artifact).weights
        runs.append(Run(artifact.relative, artifact, None, what, tuned, not adapted, weights))
    for artifact in listing.of(Sweep):
        jobs: dict[str, Job | None] = {job.name: job for job in artifact.settings.jobs}
        jobs["base"] = None
        try:
            names = [n for n in pq.read_schema(artifact.file(ANSWERS)).names if n in jobs]
        except (BadInputError, OSError, pa.ArrowException) as error:
            problems.append(f"{artifact.relative}: its runs cannot be compared: {error}")
            continue
        for column in names:
            job, what = jobs[column], _job(artifact, column, jobs[column])
            name, tuned = f"{artifact.relative}:{column}", job is not None and not job.control
            runs.append(Run(name, artifact, column, what, tuned, job is None, artifact.weights))
    return runs, problems


def _asking(asking: Asking) -> str:
    """Say how the questions were put, as far as it differs between runs."""
    temperature = asking.generation.temperature
    parts = [
        f"{asking.samples} answer{'' if asking.samples == 1 else 's'} a question",
        "greedy" if temperature == 0 else f"temperature {temperature:g}",
        f"prompt {asking.prompt_style}",
    ]
    if asking.system_prompt:
        parts.append("with a system prompt")
    if asking.chat_template:
        parts.append("chat template")
    return ", ".join(parts)


def _job(sweep: Artifact, column: str, job: Job | None) -> str:
    tail = f"run {column} of sweep {sweep.path.name}; right or wrong only, no texts"
    if job is None:
        return f"the model before tuning, {tail}"
    place = "no SAE" if job.layer is None else describe_layer(job.layer, sweep.results.n_layers)
    how = f"control {job.control}" if job.control else "tuned through the SAE"
    return f"{how}, {place}, seed {job.seed}: {tail}"


def partners(runs: Sequence[Run], left: Run) -> list[Run]:
    """Return the other runs on the same questions."""
    return [run for run in runs if run.questions == left.questions and run is not left]


def defaults(runs: Sequence[Run]) -> tuple[Run, Run | None]:
    """Return the base model's run and the newest tuned one on its questions, else what there is."""
    for tuned in (run for run in runs if run.tuned):
        others = partners(runs, tuned)
        bases = [run for run in others if run.base and run.weights == tuned.weights]
        if bases:
            # Asked alike, where there is such a one; a sweep's from the same sweep.
            def apart(run: Run, tuned: Run = tuned) -> tuple[bool, bool]:
                elsewhere = tuned.column is not None and run.artifact is not tuned.artifact
                return run.asking != tuned.asking, elsewhere

            return min(bases, key=apart), tuned
    for left in runs:
        if others := partners(runs, left):
            return left, others[0]
    return runs[0], None
