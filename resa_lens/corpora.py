"""Verified question-answer records and the token sequences made of them.

Sources: the bundled set (`tiny`), a local jsonl, parquet or csv file, or a hub data set of the
paper by its short name.  Documents follow the CoT-free template (spec section 3; paper, section
2.1) and are packed into sequences without padding, deterministic by seed.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from resa_lens import prompts
from resa_lens.errors import BadInputError
from resa_lens.resources import data_path
from resa_lens.tables import READERS, read_rows

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """A question with its verified answer, and the worked steps where the source has them."""

    question: str
    answer: str
    steps: str = ""
    family: str = ""
    level: int = 0


@dataclass(frozen=True)
class HubSet:
    """A data set of the paper on the hub."""

    repo: str
    question: str
    answer: str


HUB_SETS: dict[str, HubSet] = {
    "still": HubSet("RUC-AIBOX/STILL-3-Preview-RL-Data", "question", "answer"),
    "deepscaler": HubSet("agentica-org/DeepScaleR-Preview-Dataset", "problem", "answer"),
    "open-s1": HubSet("knoveleng/open-s1", "problem", "answer"),
    "ii-thought": HubSet("Intelligent-Internet/II-Thought-RL-v0-Math-50K", "problem", "answer"),
    "openr1": HubSet("open-r1/OpenR1-Math-220k", "problem", "answer"),
}
"""The paper's data sets (spec section 3); the columns may be overridden."""

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "solution")


@dataclass(frozen=True)
class CorpusConfig:
    """Which records, and how they become sequences."""

    source: str = "tiny"
    """`tiny`, a file (.jsonl, .parquet, .csv), a short name of the paper's sets or a hub id."""
    question_column: str | None = None
    answer_column: str | None = None
    system_prompt: str = "r1"
    """A name in prompts.SYSTEM_PROMPTS or a text."""
    system_share: float = 0.5
    """Share of documents that carry the system prompt; without it in the data, the SAE's FVU on
    the prompt is 0.36 to 0.77 on a tiny model (0.02 to 0.05 with one half)."""
    sequence: int = 256
    """Tokens a sequence."""
    seed: int = 0


def load_records(
    source: str,
    *,
    split: str = "train",
    question_column: str | None = None,
    answer_column: str | None = None,
) -> list[Record]:
    """Read the records of a source.

    Raises:
        BadInputError: not found, empty, without the columns, or with empty answers.
    """
    if source == "tiny":
        rows = read_rows(data_path(f"tiny/{split}.jsonl"))
        where = "the bundled set"
    elif Path(source).suffix in READERS or Path(source).exists():
        rows, where = read_rows(Path(source).expanduser()), source
    else:
        known = HUB_SETS.get(source)
        rows = _read_hub(known.repo if known else source, source)
        where = source
        if known:
            question_column = question_column or known.question
            answer_column = answer_column or known.answer
    return _records(rows, where, question_column, answer_column)


def _read_hub(repo: str, asked: str) -> list[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    # Offline, its notes on every new try would bury the error.
    hub_logging.set_verbosity_error()
    try:
        loaded = datasets.load_dataset(repo, split="train")
    except (OSError, ValueError, RuntimeError, DatasetNotFoundError) as error:
        known = "" if asked in HUB_SETS else f", no short name ({', '.join(['tiny', *HUB_SETS])})"
        raise BadInputError(
            f"data {asked!r} is no file{known}, and the hub's data set {repo} is not in the cache "
            f"and cannot be fetched ({type(error).__name__}).\nWhere there is a network run "
            f"`hf download {repo} --repo-type dataset --local-dir FOLDER`, "
            "copy it here and pass one of its .parquet or .jsonl files."
        ) from error
    return [dict(row) for row in loaded]


def _column(rows: list[dict[str, Any]], asked: str | None, known: Sequence[str], where: str) -> str:
    present = list(rows[0])
    names = [asked] if asked else known
    for name in names:
        if name in present:
            return name
    raise BadInputError(
        f"{where} has no column {' or '.join(map(repr, names))}; it has {', '.join(present)}"
    )


def _records(
    rows: list[dict[str, Any]], where: str, question: str | None, answer: str | None
) -> list[Record]:
    if not rows:
        raise BadInputError(f"{where} is empty: it holds no question")
    q = _column(rows, question, QUESTION_COLUMNS, where)
    a = _column(rows, answer, ANSWER_COLUMNS, where)
    records = []
    for number, row in enumerate(rows, 1):
        for name in (q, a):
            if isinstance(row.get(name), list | dict):
                raise BadInputError(
                    f"{where}, row {number}: {name} is a {type(row[name]).__name__}, not a text; "
                    "choose other columns or flatten it"
                )
        text, value = _text(row.get(q)), _text(row.get(a))
        if not text or not value:
            raise BadInputError(
                f"{where}, row {number}: empty {a if text else q}; remove the row or fill it"
            )
        records.append(
            Record(
                text,
                value,
                _text(row.get("steps")),
                _text(row.get("family")),
                _level(row.get("level")),
            )
        )
    return records


def _text(value: Any) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else str(value).strip()


def _level(value: Any) -> int:
    """Return the number in 3, "3", 3.0 or "Level 3"; 0 where a source has levels of another kind.

    Levels group our own questions; a foreign column of that name must not stop a run.
    """
    found = re.fullmatch(r"\D*(\d+)(\.0)?", _text(value))
    return int(found[1]) if found else 0


def hash_records(records: Sequence[Record]) -> str:
    """Return the SHA-256 of the records' contents."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(record).encode())
    return digest.hexdigest()


def epochs(items: Sequence[T], config: CorpusConfig) -> Iterator[tuple[T, str | None]]:
    """Yield items without end, each with its system prompt or None, in a new order every epoch.

    Deterministic by seed: whatever is made of the same number of items comes in the same order.
    """
    if not items:
        raise BadInputError("no record was given; documents need at least one")
    rng = random.Random(f"corpus/{config.seed}")
    system = prompts.resolve_system_prompt(config.system_prompt)
    order = list(items)
    while True:
        rng.shuffle(order)
        for item in order:
            yield item, system if rng.random() < config.system_share else None


def documents(records: Sequence[Record], config: CorpusConfig) -> Iterator[str]:
    """Yield CoT-free documents without end, in the order of `epochs`."""
    for record, system in epochs(records, config):
        yield prompts.trigger_document(record.question, record.answer, system)


def pack(
    tokenizer: PreTrainedTokenizerBase, texts: Iterator[str], sequence: int, count: int
) -> Iterator[Int[Tensor, " position"]]:
    """Yield `count` sequences of `sequence` token ids: documents end to end, eos between them."""
    eos = tokenizer.eos_token_id
    separator = [] if eos is None else [int(eos)]  # pyright: ignore[reportArgumentType]
    buffer: list[int] = []
    while count > 0:
        while len(buffer) < sequence:
            batch = list(islice(texts, 64))
            if not batch:
                raise BadInputError(
                    f"the texts ran out with {count} sequences of {sequence} tokens to fill"
                )
            for ids in tokenizer(batch)["input_ids"]:  # pyright: ignore[reportGeneralTypeIssues]
                buffer += [*ids, *separator]
        yield torch.tensor(buffer[:sequence])
        buffer = buffer[sequence:]
        count -= 1


def batches(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    config: CorpusConfig,
    *,
    tokens: int,
    batch: int,
) -> Iterator[Int[Tensor, "batch position"]]:
    """Yield batches of packed sequences, `tokens` in all (rounded down to whole batches)."""
    steps = max(1, tokens // (batch * config.sequence))
    stream = pack(tokenizer, documents(records, config), config.sequence, steps * batch)
    for _ in range(steps):
        yield torch.stack([next(stream) for _ in range(batch)])
