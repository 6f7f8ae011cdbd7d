"""Score a model on questions: prompts, generation, grading, accuracy with intervals."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resa_lens import prompts
from resa_lens.errors import BadInputError
from resa_lens.evals.engines import Engine, Generation, GenerationConfig
from resa_lens.evals.grading import extract_answer, is_correct
from resa_lens.evals.tasks import EvalItem, select
from resa_lens.stats import bootstrap_mean_interval, wilson_interval

PromptStyle = Literal["reason", "direct"]
"""`reason` ends at `<think>`; `direct` leaves the think tags empty and asks for the answer."""

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
    ]
)
"""One row a generation; `answer` is the extracted one, null where there is none."""


@dataclass(frozen=True)
class EvalConfig:
    """What is asked and how."""

    limit: int | None = None
    """At most so many questions, drawn as in `tasks.select`."""
    levels: tuple[int, ...] | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    prompt_style: PromptStyle = "reason"
    system_prompt: str | None = None
    samples: int = 1
    """Generations a question; more than one needs a temperature above 0."""
    question_seed: int = 0
    """Draws the questions where there is a limit; the generation has its own seed."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadInputError: an unknown prompt style, no samples, or several that would be equal.
        """
        if self.prompt_style not in get_args(PromptStyle):
            styles = ", ".join(get_args(PromptStyle))
            raise BadInputError(f"prompt style is {self.prompt_style!r}; use one of {styles}")
        if self.samples < 1:
            raise BadInputError(f"samples is {self.samples}; use at least 1")
        if self.samples > 1 and self.generation.temperature == 0:
            raise BadInputError(
                f"{self.samples} samples at temperature 0 are the same answer; set a temperature"
            )


@dataclass(frozen=True)
class Score:
    """Accuracy over some questions."""

    accuracy: float
    """Share of right answers, 0 to 1: the mean over questions of the mean over samples."""
    n: int
    """Questions."""
    ci: tuple[float, float]
    """95 %: Wilson's with one sample a question, else by bootstrap over questions."""
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
    """By family; empty where the questions have none."""
    by_level: dict[int, Score]
    samples: list[dict[str, Any]]
    """Rows as in `SAMPLE_SCHEMA`."""
    seconds: float
    """Wall time of generation and grading."""
    tokens: int
    """Generated tokens."""

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
        }


def build_prompt(
    question: str, style: PromptStyle = "reason", system_prompt: str | None = None
) -> str:
    """Return the text that the model continues."""
    build = prompts.question_prompt if style == "reason" else prompts.direct_prompt
    return build(question, system_prompt)


def evaluate(
    engine: Engine,
    items: Sequence[EvalItem],
    config: EvalConfig,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Let the engine answer the questions and score the answers.

    A question's random stream is named by its id and the sample's number, so its answers do not
    depend on which other questions are asked.

    Args:
        engine: generates the answers.
        items: the questions; `config.levels` and `config.limit` choose among them.
        config: what is asked and how.
        progress: called with (finished, all) generations.

    Raises:
        BadInputError: no questions, or none of the levels.
        RuntimeError: grading outside the main thread, see `grading.is_correct`.
    """
    if not items:
        raise BadInputError("no questions to evaluate; give at least one")
    chosen = select(
        list(items), levels=config.levels, limit=config.limit, seed=config.question_seed
    )
    asked = [(item, sample) for item in chosen for sample in range(config.samples)]
    texts = [
        build_prompt(item.question, config.prompt_style, config.system_prompt) for item, _ in asked
    ]
    began = time.perf_counter()
    generations = engine.generate(
        texts,
        config.generation,
        None if progress is None else lambda done: progress(done, len(asked)),
        streams=[(_key(item.id), sample) for item, sample in asked],
    )
    rows = [
        _graded(item, sample, text, generation, config.prompt_style)
        for (item, sample), text, generation in zip(asked, texts, generations, strict=True)
    ]
    seconds = time.perf_counter() - began
    overall = _score(rows)
    return EvalResult(
        accuracy=overall.accuracy,
        n=overall.n,
        ci=overall.ci,
        by_task=_scores_by(rows, "family"),
        by_level=_scores_by(rows, "level"),
        samples=rows,
        seconds=seconds,
        tokens=sum(generation.tokens for generation in generations),
    )


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _graded(
    item: EvalItem, sample: int, prompt: str, generation: Generation, style: PromptStyle
) -> dict[str, Any]:
    # Tags that the prompt opened belong to the answer's text; those of a system prompt or of the
    # question do not.
    completed = build_prompt("", style) + generation.text
    return {
        "id": item.id,
        "sample": sample,
        "question": item.question,
        "gold": item.answer,
        "prompt": prompt,
        "generation": generation.text,
        "answer": extract_answer(completed),
        "correct": is_correct(completed, item.answer),
        "family": item.family,
        "level": item.level,
        "tokens": generation.tokens,
        "finished": generation.finished,
    }


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
    one_each = len(rows) == n
    interval = wilson_interval(correct, n) if one_each else bootstrap_mean_interval(means)
    return Score(accuracy=correct / len(rows), n=n, ci=interval, correct=correct)


def write_samples(result: EvalResult, path: Path) -> None:
    """Write the samples to a parquet file, atomically.

    Raises:
        OSError: the place is not writable or full; nothing is left there.
    """
    table = pa.Table.from_pylist(result.samples, schema=SAMPLE_SCHEMA)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(table, temporary)
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
    if missing := [name for name in SAMPLE_SCHEMA.names if name not in table.column_names]:
        raise BadInputError(
            f"{path} has no column {', '.join(missing)}; give the samples.parquet of an evaluation"
        )
    return table.to_pylist()
