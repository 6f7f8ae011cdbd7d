"""What the page of scores reads: which runs answered the same questions, and the texts.

Texts are read only of the rows that are shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import streamlit as st
from numpy.typing import NDArray

from resa_lens.app.answers import Answers, Key, answers, damaged
from resa_lens.app.data import HASHES
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.adapter import Adapter
from resa_lens.artifacts.kinds.eval import (
    SAMPLES,
    Asking,
    Eval,
    adapter_of,
    by_adapter,
    is_adapted,
)
from resa_lens.artifacts.kinds.sweep import ANSWERS, Job, Sweep
from resa_lens.artifacts.listing import Listing, name_of
from resa_lens.errors import BadInputError
from resa_lens.evals.compare import (
    Comparison,
    Comparisons,
    RunScores,
    RunSummary,
    compare_many,
    compare_runs,
    summarise,
)
from resa_lens.models.hookpoints import describe_layer
from resa_lens.stats import DRAWS
from resa_lens.texts import prompts

GAINED, LOST, RIGHT, WRONG, PART = "gained", "lost", "both right", "both wrong", "both in part"
KINDS = (GAINED, LOST, RIGHT, WRONG, PART)
"""Questions by what the second run made of them; the last only where runs have several answers."""
TEXTS = ("question", "gold", "prompt", "generation", "answer", "correct", "tokens", "finished")
SEARCHED = ("question", "gold", "generation", "answer")
BUDGET, LEAST = 25_000_000, 1000
"""Answers that are drawn in all for one interval, and the fewest draws."""
_BATCH = 4096

Booleans = NDArray[np.bool_]
Places = NDArray[np.int64]


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
        adapter = adapter_of(artifact, adapters)
        model = artifact.results.model.rpartition("/")[2]
        if adapter:
            what = f"{Adapter.through(adapter)}, adapter {model}"
        else:
            what = f"adapter {model}" if is_adapted(artifact) else f"{model}, as it is"
        runs.append(
            Run(
                artifact.relative,
                artifact,
                None,
                f"{what}; {_asking(artifact.settings.eval)}",
                adapter is not None and not adapter.settings.control,
                not is_adapted(artifact),
                adapter.weights if adapter else artifact.weights,
            )
        )
    for artifact in listing.of(Sweep):
        jobs: dict[str, Job | None] = {job.name: job for job in artifact.settings.jobs}
        jobs["base"] = None
        try:
            columns = _columns(artifact)
        except (BadInputError, OSError, pa.ArrowException) as error:
            problems.append(f"{artifact.relative}: its runs cannot be compared: {error}")
            continue
        for column in (name for name in columns if name in jobs):
            job = jobs[column]
            runs.append(
                Run(
                    f"{artifact.relative}:{column}",
                    artifact,
                    column,
                    _job(artifact, column, job),
                    job is not None and not job.control,
                    job is None,
                    artifact.weights,
                )
            )
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


@st.cache_data(show_spinner=False, max_entries=100, hash_funcs=HASHES)
def _columns(sweep: Artifact) -> list[str]:
    return pq.read_schema(sweep.file(ANSWERS)).names


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


def _named(key: Key, name: str) -> RunScores:
    return replace(answers(key).scores, name=name)


def draws_for(n: int) -> int:
    """Draws of a bootstrap over so many questions: fewer where each costs more and says more."""
    return min(DRAWS, max(LEAST, BUDGET // max(1, n)))


@st.cache_resource(show_spinner=False, max_entries=60, hash_funcs=HASHES)
def summary(key: Key, name: str) -> RunSummary:
    """One run by itself; see `answers`."""
    scores = _named(key, name)
    return summarise(scores, draws=draws_for(len(scores.questions)))


@st.cache_resource(show_spinner=False, max_entries=60, hash_funcs=HASHES)
def compared(left: Key, right: Key, names: tuple[str, str], margin: float) -> Comparison:
    """Compare two runs.

    Args:
        left: the run to compare with.
        right: the other one.
        names: what they are called.
        margin: of the equivalence test, a share.

    Raises:
        BadInputError: they cannot be read or paired.
    """
    base, other = (_named(key, name) for key, name in zip((left, right), names, strict=True))
    return compare_runs(base, other, margin=margin, draws=draws_for(len(base.questions)))


@st.cache_resource(show_spinner=False, max_entries=20, hash_funcs=HASHES)
def ranked(keys: tuple[Key, ...], names: tuple[str, ...], margin: float) -> Comparisons:
    """Compare several runs with the first; see `compared`."""
    base, *others = (_named(key, name) for key, name in zip(keys, names, strict=True))
    return compare_many(base, others, margin=margin, draws=draws_for(len(base.questions)))


@dataclass(frozen=True)
class Filter:
    """Which questions are shown."""

    kind: str | None = None
    """One of `KINDS`; None for all."""
    groups: tuple[str, ...] = ()
    """Families or tasks; none for all."""
    levels: tuple[int, ...] = ()
    text: str = ""
    """That the question, its answer or what a model wrote contains, in either case."""


def kinds_of(left: Answers, right: Answers | None) -> NDArray[np.object_]:
    """Return the kind of each question, one of `KINDS`; of one run alone, compared with itself."""
    before = left.scores.means
    after = before if right is None else right.scores.means
    whole = (before == after) & ((before == 0) | (before == 1))
    kinds = np.full(before.shape, PART, dtype=object)
    kinds[after > before], kinds[after < before] = GAINED, LOST
    kinds[whole & (before == 1)], kinds[whole & (before == 0)] = RIGHT, WRONG
    return kinds


def matching(left: Run, right: Run | None, query: Filter) -> Places:
    """Return the places of the questions that pass a filter, in the order of their ids.

    Raises:
        BadInputError: a run cannot be read.
    """
    runs = [run for run in (left, right) if run is not None]
    pair = [answers(run.key) for run in runs]
    kept = np.ones(len(pair[0].scores.questions), dtype=bool)
    if query.kind:
        kept &= kinds_of(pair[0], pair[1] if right is not None else None) == query.kind
    questions = known(*pair).scores.questions
    if query.groups:
        kept &= np.array([question.task in query.groups for question in questions])
    if query.levels:
        kept &= np.array([question.level in query.levels for question in questions])
    if query.text:
        hit = np.zeros_like(kept)
        for run, one in zip(runs, pair, strict=True):
            if one.rows is not None:
                hit |= holding(run.key, query.text)[one.rows].any(axis=1)
        kept &= hit
    return np.flatnonzero(kept)


def known(*pair: Answers) -> Answers:
    """Return the run that knows the families and levels: a sweep's does not."""
    return next((one for one in pair if one.rows is not None), pair[0])


def groups_of(pair: Sequence[Answers]) -> tuple[list[str], list[int]]:
    """Return families or tasks, and levels, of the questions."""
    questions = known(*pair).scores.questions
    return (
        sorted({question.task for question in questions if question.task is not None}),
        sorted({question.level for question in questions if question.level is not None}),
    )


@st.cache_resource(show_spinner=False, max_entries=20, hash_funcs=HASHES)
def holding(key: Key, text: str) -> Booleans:
    """Return for each row of a run's file whether one of its texts contains the text.

    Raises:
        BadInputError: damaged.
    """
    options, parts = pc.MatchSubstringOptions(text, ignore_case=True), []
    for _, table in _batches(key, SEARCHED):
        hit = np.zeros(table.num_rows, dtype=bool)
        for name in SEARCHED:
            mask: Any = pc.call_function("match_substring", [table[name]], options)
            hit |= mask.fill_null(False).to_numpy(zero_copy_only=False)
        parts.append(hit)
    return np.concatenate(parts)


@st.cache_data(show_spinner=False, max_entries=200, hash_funcs=HASHES)
def texts(key: Key, rows: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    """Return the texts of some rows of a run's file.

    Raises:
        BadInputError: damaged.
    """
    places, by_row = np.array(sorted(rows), dtype=np.int64), {}
    for start, table in _batches(key, TEXTS, places):
        here = places[(places >= start) & (places < start + table.num_rows)]
        by_row |= dict(zip(here.tolist(), table.take(here - start).to_pylist(), strict=True))
    return by_row


def _batches(
    key: Key, columns: Sequence[str], places: Places | None = None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield an evaluation's rows part by part, each with the place of its first row.

    A run's texts may be larger than the memory.  Of row groups without one of the places nothing
    is read.
    """
    file, start = key[0].file(SAMPLES), 0
    try:
        with pq.ParquetFile(file) as stream:
            if lacking := sorted(set(columns) - set(stream.schema_arrow.names)):
                raise BadInputError(
                    f"{file} has no column {lacking[0]}; it is of another version or program: "
                    "score again"
                )
            for group in range(stream.num_row_groups):
                end = start + stream.metadata.row_group(group).num_rows
                if places is None or ((places >= start) & (places < end)).any():
                    for batch in stream.iter_batches(_BATCH, [group], list(columns)):
                        yield start, batch
                        start += batch.num_rows
                start = end
    except (OSError, pa.ArrowException, KeyError) as error:
        raise damaged(file) from error


def thought_and_answer(prompt: str, generation: str) -> tuple[str | None, str | None]:
    """Split what a model wrote by its think tags; None for a part that it did not come to.

    The thought begins where the prompt leaves off with its tag, or after the tag that the model
    wrote itself; without any tag all is answer.
    """
    rest = generation
    if not prompt.rstrip().endswith(prompts.THINK_OPEN):
        before, opened, rest = generation.partition(prompts.THINK_OPEN)
        if not opened:
            return None, generation
        if before.strip():
            rest = before + rest
    thought, closed, answer = rest.partition(prompts.THINK_CLOSE)
    return thought, answer if closed else None
