"""Score a model on questions: prompts, generation, grading, accuracy with intervals."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resa_lens.errors import BadInputError
from resa_lens.evals.config import SETTINGS as SETTINGS
from resa_lens.evals.config import EvalConfig as EvalConfig
from resa_lens.evals.config import Extraction
from resa_lens.evals.config import PromptStyle as PromptStyle
from resa_lens.evals.engines import Engine, Generation
from resa_lens.evals.grading import grade
from resa_lens.evals.tasks import EvalItem, select
from resa_lens.stats import mean_interval
from resa_lens.texts import prompts
from resa_lens.texts.chat import Note, chat_prompts, opened_tags

SAMPLE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("sample", pa.int32()),
        ("question", pa.string()),
        ("gold", pa.string()),
        ("prompt", pa.string()),
        ("generation", pa.string()),
        ("answer", pa.string()),
        ("correct", pa.bool_()),
        ("family", pa.string()),
        ("level", pa.int32()),
        ("tokens", pa.int32()),
        ("finished", pa.bool_()),
        ("task", pa.string()),
        ("timed_out", pa.bool_()),
        ("math_verify", pa.bool_()),
        ("refused", pa.string()),
    ]
)
"""One row a generation; `answer` is the extracted one, null where there is none; `math_verify` is
that library's verdict beside `correct`, null where it has none; `refused` says why answers were not
compared to the end."""
_LATER = {"task": None, "timed_out": False, "math_verify": None, "refused": None}
"""Columns that the first files lack, with what their rows mean."""


@dataclass(frozen=True)
class Score:
    """Accuracy over some questions."""

    accuracy: float
    """Share of right answers, 0 to 1: the mean over questions of the mean over samples."""
    n: int
    """Questions."""
    ci: tuple[float, float]
    """95 %, over questions: `stats.mean_interval`."""
    correct: int
    """Right answers, over all samples."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {**asdict(self), "ci": list(self.ci)}


@dataclass(frozen=True)
class EvalResult:
    """Scores of one run and every generation behind them."""

    accuracy: float
    n: int
    ci: tuple[float, float]
    by_task: dict[str, Score]
    """By family; with several tasks by task and "task:family"; by task where no question has a
    family; empty where there is neither."""
    by_level: dict[int, Score]
    samples: list[dict[str, Any]]
    """Rows as in `SAMPLE_SCHEMA`."""
    seconds: float
    """Wall time of generation and grading."""
    tokens: int
    """Generated tokens."""
    unfinished: int = 0
    """Generations that the longest length, the model's context or the time-out ended."""
    timed_out: int = 0
    """Those that the time-out ended; they count as wrong."""
    peer: dict[str, Any] | None = None
    """What another harness's metric says of the same generations, where one was asked."""
    unanswerable: int = 0
    """Questions that were not asked, because the model's context does not hold their prompts."""

    @property
    def truncated_share(self) -> float:
        """Share of the generations that were cut off."""
        return self.unfinished / max(1, len(self.samples))

    @property
    def unanswerable_share(self) -> float:
        """Share of all questions that were not asked."""
        return self.unanswerable / max(1, self.n + self.unanswerable)

    def groups(self) -> dict[str, tuple[float, tuple[float, float], int]]:
        """Return accuracy, 95 % interval and n of all questions, of each level and of each task."""
        scores = {f"level {level}": score for level, score in sorted(self.by_level.items())}
        scores |= dict(sorted(self.by_task.items()))
        rest = {name: (score.accuracy, score.ci, score.n) for name, score in scores.items()}
        return {"all": (self.accuracy, self.ci, self.n), **rest}

    @property
    def grading(self) -> dict[str, Any]:
        """How our verdict and math-verify's differ, with every answer on which they do.

        Keys `compared` (answers with both verdicts), `differing`, `only_math_verify` (that it alone
        calls right), `only_resa_lens`, `refused` (answers not compared to the end) and `answers`.
        """
        rows = [{**_LATER, **row} for row in self.samples]
        both = [row for row in rows if row["math_verify"] is not None]
        differing = [row for row in both if row["math_verify"] != row["correct"]]
        columns = ("id", "sample", "gold", "answer", "correct", "math_verify", "refused")
        return {
            "compared": len(both),
            "differing": len(differing),
            "only_math_verify": sum(row["math_verify"] for row in differing),
            "only_resa_lens": sum(row["correct"] for row in differing),
            "refused": sum(row["refused"] is not None for row in rows),
            "answers": [{name: row[name] for name in columns} for row in differing],
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the samples for JSON."""
        return {
            "accuracy": self.accuracy,
            "n": self.n,
            "ci": list(self.ci),
            "by_task": {name: score.to_dict() for name, score in self.by_task.items()},
            "by_level": {str(level): score.to_dict() for level, score in self.by_level.items()},
            "seconds": self.seconds,
            "tokens": self.tokens,
            "unfinished": self.unfinished,
            "timed_out": self.timed_out,
            "grading": self.grading,
            "truncated_share": self.truncated_share,
            "unanswerable": self.unanswerable,
            "unanswerable_share": self.unanswerable_share,
            **({} if self.peer is None else {"peer": self.peer}),
        }


@dataclass(frozen=True)
class Asked:
    """One sample of one question, as the engine gets it."""

    item: EvalItem
    sample: int
    prompt: str
    opened: str
    """The tags that the prompt opened for the answer: they belong to the answer's text."""

    @property
    def key(self) -> tuple[str, int]:
        """The question's id and the sample's number."""
        return self.item.id, self.sample

    @property
    def stream(self) -> tuple[int, ...]:
        """What names the random stream."""
        return _key(self.item.id), self.sample


def build_prompt(
    question: str, style: PromptStyle = "reason", system_prompt: str | None = None
) -> str:
    """Return the text that the model continues."""
    build = prompts.question_prompt if style == "reason" else prompts.direct_prompt
    return build(question, system_prompt)


def ask(
    items: Sequence[EvalItem],
    config: EvalConfig,
    tokenizer: Any = None,
    *,
    note: Note = lambda text: None,
) -> list[Asked]:
    """Return what an engine is to answer: `config.levels` and `config.limit` choose, in order.

    Args:
        items: the questions.
        config: what is asked and how.
        tokenizer: whose chat template is used, where the configuration wants it.
        note: told what a chat template writes otherwise than asked.

    Raises:
        BadInputError: no questions, none of the levels, or no chat template where one is wanted.
    """
    if not items:
        raise BadInputError("no questions to evaluate; give at least one")
    chosen = select(
        list(items), levels=config.levels, limit=config.limit, seed=config.question_seed
    )
    style, system = config.prompt_style, config.system_prompt
    questions = [item.question if item.query is None else item.query for item in chosen]
    chats = questions
    if config.chat_template:
        chats = chat_prompts(tokenizer, questions, system, direct=style == "direct", note=note)
    asked = []
    for item, question, prompt in zip(chosen, questions, chats, strict=True):
        if config.chat_template:
            opened = opened_tags(prompt)
        else:
            # Tags of a system prompt or of the question are not the answer's.
            prompt, opened = build_prompt(question, style, system), build_prompt("", style)
        asked += [Asked(item, sample, prompt, opened) for sample in range(config.samples)]
    return asked


def answerable(
    asked: Sequence[Asked], tokenizer: Any, context: int | None
) -> tuple[list[Asked], int]:
    """Return what fits a model's context with one token of an answer, and how many do not.

    Args:
        asked: the questions as they are asked.
        tokenizer: the model's.
        context: tokens that it reads at most; None without a bound.

    Returns:
        The questions that fit, and the number of questions (not samples) that do not.

    Raises:
        BadInputError: none fits.
    """
    if context is None:
        return list(asked), 0
    texts = list(dict.fromkeys(one.prompt for one in asked))
    lengths = dict(zip(texts, map(len, tokenizer(texts)["input_ids"]), strict=True))
    fitting = [one for one in asked if lengths[one.prompt] < context]
    if not fitting:
        raise BadInputError(
            f"none of the questions fits: the shortest prompt has {min(lengths.values())} tokens "
            f"and the model reads {context}, the answer included; ask shorter ones"
        )
    return fitting, len({one.item.id for one in asked} - {one.item.id for one in fitting})


def evaluate(
    engine: Engine,
    items: Sequence[EvalItem],
    config: EvalConfig,
    progress: Callable[[int, int], None] | None = None,
    *,
    tokenizer: Any = None,
) -> EvalResult:
    """Let the engine answer the questions and score the answers.

    A question's random stream is named by its id and the sample's number, so its answers do not
    depend on which other questions are asked.

    Args:
        engine: generates the answers.
        items: the questions; `config.levels` and `config.limit` choose among them.
        config: what is asked and how.
        progress: called with (finished, all) generations.
        tokenizer: whose chat template is used, where the configuration wants it.

    Raises:
        BadInputError: as `ask`.
        RunFailedError: grading fails, see `grading.grade`.
    """
    questions = ask(items, config, tokenizer)
    began = time.perf_counter()
    generations = engine.generate(
        [one.prompt for one in questions],
        config.generation,
        None if progress is None else lambda done: progress(done, len(questions)),
        streams=[one.stream for one in questions],
    )
    return score(questions, generations, extraction=config.extraction, began=began)


def score(
    asked: Sequence[Asked],
    generations: Sequence[Generation],
    *,
    extraction: Extraction = "resa",
    began: float | None = None,
) -> EvalResult:
    """Grade the answers and return the scores.

    Args:
        asked: the questions as they were asked.
        generations: the answers, in the same order.
        extraction: by whose rules the answers are found.
        began: reading of `time.perf_counter` from which the seconds count; by default now.

    Raises:
        RunFailedError: see `grading.grade`.
    """
    began = time.perf_counter() if began is None else began
    rows = [
        _graded(one, generation, extraction)
        for one, generation in zip(asked, generations, strict=True)
    ]
    seconds = time.perf_counter() - began
    overall = _score(rows)
    return EvalResult(
        accuracy=overall.accuracy,
        n=overall.n,
        ci=overall.ci,
        by_task=_scores_by_task(rows),
        by_level=_scores_by(rows, "level"),
        samples=rows,
        seconds=seconds,
        tokens=sum(generation.tokens for generation in generations),
        unfinished=sum(not generation.finished for generation in generations),
        timed_out=sum(generation.timed_out for generation in generations),
    )


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _graded(asked: Asked, generation: Generation, extraction: Extraction) -> dict[str, Any]:
    item = asked.item
    verdict = grade(
        asked.opened + generation.text, item.answer, choice=item.choice, extraction=extraction
    )
    return {
        "id": item.id,
        "sample": asked.sample,
        "question": item.question,
        "gold": item.answer,
        "prompt": asked.prompt,
        "generation": generation.text,
        "answer": verdict.answer,
        # How far a model comes before a time-out is the machine's doing, not its own.
        "correct": verdict.correct and not generation.timed_out,
        "family": item.family,
        "level": item.level,
        "tokens": generation.tokens,
        "finished": generation.finished,
        "task": item.task,
        "timed_out": generation.timed_out,
        # An answer that its time-out made wrong is no difference of two gradings.
        "math_verify": None if generation.timed_out else verdict.math_verify,
        "refused": verdict.refused,
    }


def _scores_by_task(rows: list[dict[str, Any]]) -> dict[str, Score]:
    families, tasks = _scores_by(rows, "family"), _scores_by(rows, "task")
    if len(tasks) < 2:
        return families or tasks
    named = [
        {**row, "family": f"{row['task']}:{row['family']}"}
        for row in rows
        if row["family"] is not None
    ]
    return {**tasks, **_scores_by(named, "family")}


def _scores_by(rows: list[dict[str, Any]], column: str) -> dict[Any, Score]:
    groups: dict[Hashable, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row[column] is not None:
            groups[row[column]].append(row)
    return {name: _score(groups[name]) for name in sorted(groups)}  # pyright: ignore[reportArgumentType]


def _score(rows: list[dict[str, Any]]) -> Score:
    by_question: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_question[row["id"]].append(row["correct"])
    means = np.array([np.mean(answers) for answers in by_question.values()])
    correct, n = sum(row["correct"] for row in rows), len(by_question)
    return Score(accuracy=correct / len(rows), n=n, ci=mean_interval(means), correct=correct)


def write_samples(result: EvalResult, path: Path) -> None:
    """Write the samples to a parquet file, atomically.

    Raises:
        OSError: the place is not writable or full; nothing is left there.
    """
    table = pa.Table.from_pylist(result.samples, schema=SAMPLE_SCHEMA)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the rows that `write_samples` wrote.

    Raises:
        BadInputError: no such file, or no samples file.
    """
    if not path.is_file():
        raise BadInputError(f"{path} is no file; give the samples.parquet of an evaluation")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise BadInputError(f"{path} is no readable parquet file; run the evaluation again") from (
            error
        )
    names = [name for name in SAMPLE_SCHEMA.names if name not in _LATER]
    if missing := [name for name in names if name not in table.column_names]:
        raise BadInputError(
            f"{path} has no column {', '.join(missing)}; give the samples.parquet of an evaluation"
        )
    return [{**_LATER, **row} for row in table.to_pylist()]
