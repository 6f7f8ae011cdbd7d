"""Score a model on questions: prompts, generation, grading, accuracy with intervals."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resa_lens import prompts
from resa_lens.errors import BadInputError
from resa_lens.evals.engines import Engine, Generation, GenerationConfig
from resa_lens.evals.grading import extract_answer, extract_letter, is_chosen, is_correct
from resa_lens.evals.tasks import EvalItem, select
from resa_lens.stats import mean_interval

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
        ("task", pa.string()),
        ("timed_out", pa.bool_()),
    ]
)
"""One row a generation; `answer` is the extracted one, null where there is none."""
_LATER = {"task": None, "timed_out": False}
"""Columns that the first files lack, with what their rows mean."""


@dataclass(frozen=True)
class EvalConfig:
    """What is asked and how."""

    limit: int | None = None
    """At most so many questions, drawn as in `tasks.select`."""
    levels: tuple[int, ...] | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    prompt_style: PromptStyle = "reason"
    system_prompt: str | None = None
    """Stands before the problem, or is the chat template's system message."""
    samples: int = 1
    """Generations a question; more than one needs a temperature above 0."""
    question_seed: int = 0
    """Draws the questions where there is a limit; the generation has its own seed."""
    chat_template: bool = False
    """Whether the tokenizer's chat template makes the prompt, with the question as the user's."""

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
class Setting:
    """A named way to sample, for options that are not given."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 160
    samples: int = 1
    chat_template: bool = False


SETTINGS = {
    "greedy": Setting(),
    "paper": Setting(0.6, 0.95, 32_768, 1, chat_template=True),
}
"""`paper` is the evaluation of arXiv 2506.09967; `greedy` suits the bundled model."""


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
    """Generations that the longest length or the time-out ended."""
    timed_out: int = 0
    """Those that the time-out ended; they count as wrong."""
    peer: dict[str, Any] | None = None
    """What another harness's metric says of the same generations, where one was asked."""

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


def chat_prompt(
    tokenizer: Any,
    question: str,
    style: PromptStyle = "reason",
    system_prompt: str | None = None,
) -> str:
    """Return the tokenizer's chat template filled with the question, up to the model's turn.

    Raises:
        BadInputError: there is no template, or it cannot hold these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise BadInputError(
            "the model has no chat template; leave out --chat-template (and --setting paper, which "
            "asks for it), or put a chat_template.jinja into the model's folder"
        )
    messages = [{"role": "user", "content": question}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise BadInputError(f"the model's chat template fails: {error}") from error
    begin = tokenizer.bos_token
    # Tokenising adds the beginning again where it is not only the template that does.
    if (
        begin
        and text.startswith(begin)
        and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    ):
        text = text[len(begin) :]
    if style == "direct":
        opened = "" if text.rstrip().endswith(prompts.THINK_OPEN) else f" {prompts.THINK_OPEN}"
        text = f"{text.rstrip()}{opened} {prompts.THINK_CLOSE} {prompts.ANSWER_OPEN}"
    return text


def ask(items: Sequence[EvalItem], config: EvalConfig, tokenizer: Any = None) -> list[Asked]:
    """Return what an engine is to answer: `config.levels` and `config.limit` choose, in order.

    Args:
        items: the questions.
        config: what is asked and how.
        tokenizer: whose chat template is used, where the configuration wants it.

    Raises:
        BadInputError: no questions, none of the levels, or no chat template where one is wanted.
    """
    if not items:
        raise BadInputError("no questions to evaluate; give at least one")
    chosen = select(
        list(items), levels=config.levels, limit=config.limit, seed=config.question_seed
    )
    style, system = config.prompt_style, config.system_prompt
    asked = []
    for item in chosen:
        question = item.question if item.query is None else item.query
        if config.chat_template:
            prompt = chat_prompt(tokenizer, question, style, system)
            tail = prompt.rstrip()
            opened = prompts.THINK_OPEN if tail.endswith(prompts.THINK_OPEN) else ""
            if style == "direct":
                opened = f"{prompts.THINK_OPEN} {prompts.THINK_CLOSE} {prompts.ANSWER_OPEN}"
        else:
            # Tags of a system prompt or of the question are not the answer's.
            prompt, opened = build_prompt(question, style, system), build_prompt("", style)
        asked += [Asked(item, sample, prompt, opened) for sample in range(config.samples)]
    return asked


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
        RunFailedError: grading fails, see `grading.is_correct`.
    """
    asked = ask(items, config, tokenizer)
    began = time.perf_counter()
    generations = engine.generate(
        [one.prompt for one in asked],
        config.generation,
        None if progress is None else lambda done: progress(done, len(asked)),
        streams=[one.stream for one in asked],
    )
    return score(asked, generations, began=began)


def score(
    asked: Sequence[Asked], generations: Sequence[Generation], *, began: float | None = None
) -> EvalResult:
    """Grade the answers and return the scores.

    Args:
        asked: the questions as they were asked.
        generations: the answers, in the same order.
        began: reading of `time.perf_counter` from which the seconds count; by default now.

    Raises:
        RunFailedError: see `grading.is_correct`.
    """
    began = time.perf_counter() if began is None else began
    rows = [_graded(one, generation) for one, generation in zip(asked, generations, strict=True)]
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


def _graded(asked: Asked, generation: Generation) -> dict[str, Any]:
    item = asked.item
    completed = asked.opened + generation.text
    extract, right = (extract_letter, is_chosen) if item.choice else (extract_answer, is_correct)
    return {
        "id": item.id,
        "sample": asked.sample,
        "question": item.question,
        "gold": item.answer,
        "prompt": asked.prompt,
        "generation": generation.text,
        "answer": extract(completed),
        # How far a model comes before a time-out is the machine's doing, not its own.
        "correct": not generation.timed_out and right(completed, item.answer),
        "family": item.family,
        "level": item.level,
        "tokens": generation.tokens,
        "finished": generation.finished,
        "task": item.task,
        "timed_out": generation.timed_out,
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
    names = [name for name in SAMPLE_SCHEMA.names if name not in _LATER]
    if missing := [name for name in names if name not in table.column_names]:
        raise BadInputError(
            f"{path} has no column {', '.join(missing)}; give the samples.parquet of an evaluation"
        )
    return [{**_LATER, **row} for row in table.to_pylist()]
