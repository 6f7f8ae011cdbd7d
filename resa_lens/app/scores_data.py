"""What the page of scores reads: who answered which questions, right or wrong, and the texts.

Right and wrong are read by column, and texts only of the rows that are shown, so that a run of
100,000 answers opens as one of a hundred.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import streamlit as st
from numpy.typing import NDArray

from resa_lens import prompts
from resa_lens.app.data import AdapterResults, Artifact, Listing, checked, state
from resa_lens.errors import BadInputError
from resa_lens.evals.compare import (
    Comparison,
    Comparisons,
    Question,
    RunScores,
    RunSummary,
    compare_many,
    compare_runs,
    summarise,
)
from resa_lens.hookpoints import describe_layer
from resa_lens.stats import DRAWS

SAMPLES, ANSWERS = "samples.parquet", "answers.parquet"
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
    file: Path
    column: str | None
    """Of a sweep's table of answers; None for an evaluation, which has texts."""
    questions: str
    """Digest of the questions: runs are paired where it is the same."""
    what: str
    """Model or adapter, and how it was asked."""
    tuned: bool
    """Through an SAE; a control is neither that nor the base."""
    base: bool
    weights: str
    """Hash of the weights; of the base model's for an adapter."""
    artifact: Artifact

    @property
    def key(self) -> tuple[str, str | None, int]:
        """What its answers are cached by.

        Raises:
            BadInputError: the file is missing.
        """
        try:
            return str(self.file), self.column, state(self.file)
        except OSError as error:
            raise BadInputError(
                f"{self.file} is missing or unreadable: {error.strerror}; score again"
            ) from error


Key = tuple[str, str | None, int]


@dataclass(frozen=True)
class Answers:
    """Right and wrong of one run, without texts."""

    scores: RunScores
    rows: Places | None
    """[questions, samples]: each answer's row in the file; None where no text is kept."""
    tokens: float | None
    """Mean length of an answer."""
    unfinished: int | None
    """Answers that the longest length or the time-out ended."""


def runs_of(listing: Listing) -> tuple[list[Run], list[str]]:
    """List what can be compared, evaluations before sweeps, and what cannot be read."""
    found, problems = [], []
    adapters = {artifact.path.name: artifact for artifact in listing.of("adapter")}
    for artifact in listing.of("eval"):
        config = artifact.manifest.config
        # By name: a workspace may have been moved since.
        model = Path(str(artifact.manifest.results.get("model", ""))).name
        adapter = adapters.get(model)
        found.append(
            Run(
                artifact.relative,
                artifact.path / SAMPLES,
                None,
                str(config.get("questions")),
                f"{_what(model, adapter)}; {_asked(config.get('eval'))}",
                adapter is not None and not adapter.manifest.config.get("control"),
                adapter is None,
                adapter.weights if adapter else artifact.weights,
                artifact,
            )
        )
    for artifact in listing.of("sweep"):
        file = artifact.path / ANSWERS
        try:
            columns = _columns(str(file), state(file))
        except (OSError, pa.ArrowException):
            problems.append(f"{file} is missing or damaged: its runs cannot be compared")
            continue
        config = artifact.manifest.config
        listed = config.get("jobs")
        jobs = {job.get("name"): job for job in listed} if isinstance(listed, list) else {}
        n_layers = artifact.manifest.results.get("n_layers")
        found += [
            Run(
                f"{artifact.relative}:{column}",
                file,
                column,
                str(config.get("questions")),
                _job(column, jobs.get(column), n_layers, artifact),
                isinstance(job := jobs.get(column), dict) and not job.get("control"),
                column == "base",
                artifact.weights,
                artifact,
            )
            for column in columns
            if column != "id"
        ]
    return found, problems


def _what(model: str, adapter: Artifact | None) -> str:
    if adapter is None:
        return f"{model}, as it is"
    try:
        made = checked(AdapterResults, adapter.manifest.results, adapter.path)
    except BadInputError:
        return f"adapter {model}"
    return f"{made.what(adapter.manifest.config.get('control'))}, adapter {model}"


def _asked(config: Any) -> str:
    """How the questions were put, as far as it differs between runs."""
    if not isinstance(config, dict):
        return "settings unknown"
    generation = config.get("generation")
    made = generation if isinstance(generation, dict) else {}
    samples, temperature = config.get("samples"), made.get("temperature")
    parts = [f"{samples} answer{'' if samples == 1 else 's'} a question"]
    parts.append("greedy" if temperature == 0 else f"temperature {temperature}")
    parts.append(f"prompt {config.get('prompt_style')}")
    if config.get("system_prompt"):
        parts.append("with a system prompt")
    if config.get("chat_template"):
        parts.append("chat template")
    return ", ".join(parts)


def _job(column: str, job: Any, n_layers: Any, sweep: Artifact) -> str:
    tail = f"run {column} of sweep {sweep.path.name}; right or wrong only, no texts"
    if column == "base":
        return f"the model before tuning, {tail}"
    if not isinstance(job, dict) or not isinstance(n_layers, int):
        return tail
    layer, control = job.get("layer"), job.get("control")
    place = describe_layer(layer, n_layers) if isinstance(layer, int) else "no SAE"
    how = f"control {control}" if control else "tuned through the SAE"
    return f"{how}, {place}, seed {job.get('seed')}: {tail}"


@st.cache_data(show_spinner=False, max_entries=100)
def _columns(file: str, changed: int) -> list[str]:
    return pq.read_schema(file).names


def partners(runs: Sequence[Run], left: Run) -> list[Run]:
    """The other runs on the same questions."""
    return [run for run in runs if run.questions == left.questions and run is not left]


def defaults(runs: Sequence[Run]) -> tuple[Run, Run | None]:
    """The base model's run and the newest tuned one on its questions, else what there is."""
    for tuned in (run for run in runs if run.tuned):
        found = partners(runs, tuned)
        bases = [run for run in found if run.base and run.weights == tuned.weights]
        if bases:
            # Asked alike, where there is such a one; a sweep's from the same sweep.
            asked = tuned.artifact.manifest.config.get("eval")
            bases.sort(
                key=lambda run: (
                    run.artifact.manifest.config.get("eval") != asked,
                    tuned.column is not None and run.file != tuned.file,
                )
            )
            return bases[0], tuned
    for left in runs:
        if found := partners(runs, left):
            return left, found[0]
    return runs[0], None


def answers(key: Key) -> Answers:
    """Read right and wrong of a run, once for each state of its file.

    Raises:
        BadInputError: damaged, of another version, or not the same number of answers everywhere.
    """
    file, column, _ = key
    try:
        return _answers(*key)
    except BadInputError:
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        held = f"column {column} of {file}" if column else file
        raise BadInputError(
            f"{held} is damaged or of another version; score again, for example with: resa-lens "
            "demo"
        ) from error


# A resource, not data: the same arrays for all, where data would be copied at every click.
@st.cache_resource(show_spinner=False, max_entries=30)
def _answers(file: str, column: str | None, changed: int) -> Answers:
    if column is not None:
        held = pq.read_table(file, columns=["id", column]).to_pandas().sort_values("id")
        questions = tuple(Question(str(i), "", "") for i in held["id"])
        correct = _shares(held[column], file)[:, None]
        return Answers(_scores(questions, correct), None, None, None)
    names = ["id", "sample", "correct", "family", "level", "tokens", "finished"]
    later = [c for c in ("task",) if c in pq.read_schema(file).names]
    held = pq.read_table(file, columns=[*names, *later]).to_pandas()
    if held.empty:
        raise BadInputError(f"{file} holds no answers; score again")
    group = "task" if "task" in held and held["task"].nunique() > 1 else "family"
    # The id alone may be a task's name and a row number.
    by = ["id", "task", "sample"] if "task" in held else ["id", "sample"]
    held = held.sort_values(by, kind="stable")
    found = held.groupby(by[:-1], sort=False, dropna=False)["sample"].size().to_numpy()
    samples = int(found.max())
    if short := int((found < samples).sum()):
        raise BadInputError(
            f"{file}: {short} of {len(found)} questions have fewer than {samples} answers; run its "
            "eval again, it goes on where it stopped"
        )
    first = held.iloc[::samples]
    questions = tuple(
        Question(
            str(row_id), "", "",
            None if pd.isna(task) else str(task), None if pd.isna(level) else int(level),
        )
        for row_id, task, level in zip(first["id"], first[group], first["level"], strict=True)
    )  # fmt: skip
    return Answers(
        _scores(questions, _shares(held["correct"], file).reshape(-1, samples)),
        held.index.to_numpy(dtype=np.int64).reshape(-1, samples),
        float(held["tokens"].mean()) if held["tokens"].notna().any() else None,
        int((~held["finished"].fillna(True).astype(bool)).sum()),
    )


def _shares(column: pd.Series, file: str) -> NDArray[np.float64]:
    values = column.to_numpy(dtype=np.float64)
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise BadInputError(f"{file} holds a score outside 0 to 1; score again")
    return values


def _scores(questions: tuple[Question, ...], correct: NDArray[np.float64]) -> RunScores:
    correct.setflags(write=False)
    # The texts of the answers are read where they are shown.
    return RunScores("", questions, correct, ((),) * len(questions))


def _named(key: Key, name: str) -> RunScores:
    return replace(answers(key).scores, name=name)


def draws_for(n: int) -> int:
    """Draws of a bootstrap over so many questions: fewer where each costs more and says more."""
    return min(DRAWS, max(LEAST, BUDGET // max(1, n)))


@st.cache_resource(show_spinner=False, max_entries=60)
def summary(key: Key, name: str) -> RunSummary:
    """One run by itself; see `answers`."""
    scores = _named(key, name)
    return summarise(scores, draws=draws_for(len(scores.questions)))


@st.cache_resource(show_spinner=False, max_entries=60)
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


@st.cache_resource(show_spinner=False, max_entries=20)
def ranked(keys: tuple[Key, ...], names: tuple[str, ...], margin: float) -> Comparisons:
    """Compare several runs with the first; see `compared`."""
    base, *others = (_named(key, name) for key, name in zip(keys, names, strict=True))
    return compare_many(base, others, margin=margin, draws=draws_for(len(base.questions)))


@dataclass(frozen=True)
class Wanted:
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


def matching(left: Run, right: Run | None, wanted: Wanted) -> Places:
    """Return the places of the wanted questions, in the order of their ids.

    Raises:
        BadInputError: a run cannot be read.
    """
    pair = [answers(run.key) for run in (left, right) if run is not None]
    kept = np.ones(len(pair[0].scores.questions), dtype=bool)
    if wanted.kind:
        kept &= kinds_of(pair[0], pair[1] if right is not None else None) == wanted.kind
    questions = pair[_told(pair)].scores.questions
    if wanted.groups:
        kept &= np.array([question.task in wanted.groups for question in questions])
    if wanted.levels:
        kept &= np.array([question.level in wanted.levels for question in questions])
    if wanted.text:
        found = np.zeros_like(kept)
        for run, held in zip((left, right), pair, strict=False):
            if run is not None and held.rows is not None:
                found |= holding(run.key, wanted.text)[held.rows].any(axis=1)
        kept &= found
    return np.flatnonzero(kept)


def _told(pair: Sequence[Answers]) -> int:
    """The run that knows the families: a sweep's does not."""
    return next((place for place, held in enumerate(pair) if held.rows is not None), 0)


def groups_of(left: Answers, right: Answers | None) -> tuple[list[str], list[int]]:
    """Families or tasks, and levels, of the questions."""
    pair = [held for held in (left, right) if held is not None]
    questions = pair[_told(pair)].scores.questions
    return (
        sorted({question.task for question in questions if question.task is not None}),
        sorted({question.level for question in questions if question.level is not None}),
    )


@st.cache_resource(show_spinner=False, max_entries=20)
def holding(key: Key, text: str) -> Booleans:
    """Return for each row of a run's file whether one of its texts contains the text.

    Raises:
        BadInputError: damaged.
    """
    found = []
    for table in _batches(key, SEARCHED):
        hit = np.zeros(table.num_rows, dtype=bool)
        for name in SEARCHED:
            mask: Any = pc.call_function(
                "match_substring",
                [table[name]],
                pc.MatchSubstringOptions(text, ignore_case=True),
            )
            hit |= mask.fill_null(False).to_numpy(zero_copy_only=False)
        found.append(hit)
    return np.concatenate(found)


@st.cache_data(show_spinner=False, max_entries=200)
def texts(key: Key, rows: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    """Return the texts of some rows of a run's file.

    Raises:
        BadInputError: damaged.
    """
    wanted, found, start = np.array(sorted(rows), dtype=np.int64), {}, 0
    for table in _batches(key, TEXTS, wanted):
        here = wanted[(wanted >= start) & (wanted < start + table.num_rows)]
        for row, values in zip(here, table.take(here - start).to_pylist(), strict=True):
            found[int(row)] = values
        start += table.num_rows
        if len(found) == wanted.size:
            break
    return found


def _batches(
    key: Key, columns: Sequence[str], wanted: Places | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield a file's rows part by part: a run's texts may be larger than the memory.

    Row groups without a wanted row are not read; empty columns stand for them.
    """
    file = key[0]
    try:
        with pq.ParquetFile(file) as held:
            if lacking := sorted(set(columns) - set(held.schema_arrow.names)):
                raise BadInputError(
                    f"{file} has no column {lacking[0]}; it is of another version or program: "
                    "score again"
                )
            start = 0
            for group in range(held.num_row_groups):
                rows = held.metadata.row_group(group).num_rows
                inside = wanted is None or bool(((wanted >= start) & (wanted < start + rows)).any())
                start += rows
                if inside:
                    yield from held.iter_batches(_BATCH, [group], list(columns))
                else:
                    yield _absent(rows)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise BadInputError(
            f"{file} is damaged or of another version; score again, for example with: resa-lens "
            "demo"
        ) from error


def _absent(rows: int) -> pa.RecordBatch:
    return pa.record_batch({"unread": pa.nulls(rows)})


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
