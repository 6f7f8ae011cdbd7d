"""Verified question-answer records and the token sequences made of them.

Sources: the bundled set (`tiny`), a local file, or a hub data set of the paper by its short name.
Documents follow the CoT-free template (spec section 3; paper, section 2.1) and are packed into
sequences without padding, deterministic by seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from resa_lens.errors import BadInputError
from resa_lens.files import named_path
from resa_lens.resources import data_path
from resa_lens.texts import prompts
from resa_lens.texts.config import HUB_SETS, check_source
from resa_lens.texts.config import CorpusConfig as CorpusConfig
from resa_lens.texts.records import Columns, doubts, records_of
from resa_lens.texts.records import Record as Record  # of its first address too
from resa_lens.texts.tables import READERS, Row, read_rows

T = TypeVar("T")


def load_records(
    source: str,
    *,
    split: str = "train",
    question_column: str | None = None,
    answer_column: str | None = None,
    steps_column: str | None = None,
    text_column: str | None = None,
) -> list[Record]:
    """Read the records of a source; see `records.records_of`.

    Args:
        source: as `CorpusConfig.source`.
        split: of the bundled set.
        question_column: of a file or a hub set; the bundled set has its own.
        answer_column: likewise; of a worked solution the result is the answer.
        steps_column: likewise.
        text_column: likewise, of documents that are read as they are.

    Raises:
        BadInputError: not found, empty, without the columns, or a cell that is no text.
    """
    columns = Columns(question_column, answer_column, steps_column, text_column)
    if source == "tiny":
        return records_of(read_rows(data_path(f"tiny/{split}.jsonl")), "the bundled set")
    if (path := named_path(source, "data")).suffix in READERS or path.exists():
        return records_of(read_rows(path), source, columns)
    check_source(source)
    known = HUB_SETS.get(source)
    rows = _read_hub(known.repo if known else source, source)
    if known:
        columns = replace(
            columns,
            question=question_column or known.question,
            answer=answer_column or known.answer,
        )
    return records_of(rows, source, columns)


def read_records(corpus: CorpusConfig, *, split: str = "train") -> list[Record]:
    """Read the records that a configuration names; see `load_records`."""
    names = ("question_column", "answer_column", "steps_column", "text_column")
    return load_records(
        corpus.source, split=split, **{name: getattr(corpus, name) for name in names}
    )


def _read_hub(repo: str, asked: str) -> list[Row]:
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
            "copy it here and pass one of its .parquet, .jsonl or .json files."
        ) from error
    return [Row(row, f"row {number}") for number, row in enumerate(loaded, start=1)]


def doubtful(records: Sequence[Record], where: str) -> list[str]:
    """Return warnings of answers that no matcher can meet; see `records.doubts`."""
    return doubts([record.answer for record in records if not record.text], where)


THOUGHTS = 0.5
"""Share of an SAE's documents with their worked steps, where nothing else is said.  Without any,
40 to 60 % of the variance of thoughts stays unexplained (spec, section 2)."""


def settled(corpus: CorpusConfig, records: Sequence[Record]) -> CorpusConfig:
    """Return a corpus with its share of thoughts: a half where none is asked for, 0 without steps.

    Raises:
        BadInputError: a share of thoughts is asked for, and no record has worked steps.
    """
    steps = corpus.own_thoughts > 0 or any(record.steps for record in records)
    if corpus.thought_share and not steps:
        raise BadInputError(
            f"thought share {corpus.thought_share}: data {corpus.source!r} hold no worked steps; "
            "name their column with --steps-column, let the model write some (train-saes "
            "--own-thoughts), or leave the share out"
        )
    if corpus.thought_share is not None:
        return corpus
    return replace(corpus, thought_share=THOUGHTS if steps else 0.0)


def hash_records(records: Sequence[Record]) -> str:
    """Return the SHA-256 of the records' contents."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(record).encode())
        digest.update(repr(record.text).encode() if record.text else b"")
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
    """Yield documents without end, in the order of `epochs`: CoT-free, or with their worked steps.

    `config.thought_share` of those whose record has steps hold them inside the think tags.  A plain
    text is a document as it is; the system prompt stands before it as before a problem.

    Raises:
        ValueError: the share is not settled.
    """
    if config.thought_share is None:
        raise ValueError("the share of thoughts is not settled; see corpora.settled")
    # A stream of its own: the order and the system prompts do not depend on the share.
    rng = random.Random(f"thoughts/{config.seed}")
    for record, system in epochs(records, config):
        if rng.random() < config.thought_share and record.steps:
            yield prompts.document(record.question, record.steps, record.answer, system)
        else:
            yield trigger_document(record, system)


def trigger_document(record: Record, system: str | None = None) -> str:
    """Return a record's CoT-free document, or its plain text."""
    if record.text:
        return prompts.behind(system, record.text)
    return prompts.trigger_document(record.question, record.answer, system)


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
