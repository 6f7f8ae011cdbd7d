"""Verified question-answer records and the token sequences made of them.

Sources: the bundled set (`tiny`), a local file or a folder of shards, or a hub data set, also by
its short name where it is the paper's.  Small data are a list; large ones stay on the disk
(`stored`), and are read in the same order.
Documents follow the CoT-free template (spec section 3; paper, section 2.1) and are packed into
sequences without padding, deterministic by seed.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from resa_lens.errors import BadInputError
from resa_lens.files import named_path
from resa_lens.resources import data_path
from resa_lens.texts import prompts, stored
from resa_lens.texts.config import HUB_SETS, check_source
from resa_lens.texts.config import CorpusConfig as CorpusConfig
from resa_lens.texts.hub import hub_table
from resa_lens.texts.records import Columns, doubts, records_of
from resa_lens.texts.records import Record as Record  # of its first address too
from resa_lens.texts.stored import StoredRecords
from resa_lens.texts.tables import READERS, Table, read_table

T = TypeVar("T")


def load_records(
    source: str,
    *,
    split: str = "train",
    question_column: str | None = None,
    answer_column: str | None = None,
    steps_column: str | None = None,
    text_column: str | None = None,
    rows: int | None = None,
) -> Sequence[Record]:
    """Read the records of a source; see `records.records_of`.

    Beyond `stored.IN_MEMORY` bytes they stay on the disk (`stored.stored_records`).

    Args:
        source: as `CorpusConfig.source`.
        split: of the bundled set.
        question_column: of a file or a hub set; the bundled set has its own.
        answer_column: likewise; of a worked solution the result is the answer.
        steps_column: likewise.
        text_column: likewise, of documents that are read as they are.
        rows: the first so many alone; of a hub set no more than these are fetched.

    Raises:
        BadInputError: not found, empty, without the columns, or a cell that is no text.
    """
    if rows is not None and rows < 1:
        raise BadInputError(f"rows {rows}: give 1 or more, or None for all of them")
    columns = Columns(question_column, answer_column, steps_column, text_column)
    if source == "tiny":
        table = read_table(data_path(f"tiny/{split}.jsonl")).first(rows)
        return records_of(list(table), "the bundled set")
    if (path := named_path(source, "data")).suffix in READERS or path.exists():
        return _records(read_table(path).first(rows), source, columns)
    check_source(source)
    known = HUB_SETS.get(source)
    table = hub_table(known.repo if known else source, source, rows)
    if known:
        columns = replace(
            columns,
            question=question_column or known.question,
            answer=answer_column or known.answer,
        )
    return _records(table, source, columns)


def _records(table: Table, where: str, columns: Columns) -> Sequence[Record]:
    if table.nbytes <= stored.IN_MEMORY:
        return records_of(list(table), where, columns)
    return stored.stored_records(table, where, columns)


def read_records(corpus: CorpusConfig, *, split: str = "train") -> Sequence[Record]:
    """Read the records that a configuration names; see `load_records`."""
    names = ("question_column", "answer_column", "steps_column", "text_column", "rows")
    return load_records(
        corpus.source, split=split, **{name: getattr(corpus, name) for name in names}
    )


def doubtful(records: Sequence[Record], where: str) -> list[str]:
    """Return warnings of answers that no matcher can meet; see `records.doubts`."""
    if isinstance(records, StoredRecords):
        return records.facts.doubts.warnings(where)
    return doubts((record.answer for record in records if not record.text), where)


THOUGHTS = 0.5
"""Share of an SAE's documents with their worked steps, where nothing else is said.  Without any,
40 to 60 % of the variance of thoughts stays unexplained (spec, section 2)."""


def settled(corpus: CorpusConfig, records: Sequence[Record]) -> CorpusConfig:
    """Return a corpus with its share of thoughts: a half where none is asked for, 0 without steps.

    Raises:
        BadInputError: a share of thoughts is asked for, and no record has worked steps.
    """
    if isinstance(records, StoredRecords):
        steps = records.facts.with_steps > 0
    else:
        steps = any(record.steps for record in records)
    steps = steps or corpus.own_thoughts > 0
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
    return stored.hash_of(records)


def epochs(
    items: Sequence[T], config: CorpusConfig, *, start: int = 0
) -> Iterator[tuple[T, str | None]]:
    """Yield items without end, each with its system prompt or None, in a new order every epoch.

    Deterministic by seed: whatever is made of the same number of items comes in the same order.
    Items before number `start` are not looked up.
    """
    if not items:
        raise BadInputError("no record was given; documents need at least one")
    for index, system in islice(_drawn(len(items), config), start, None):
        yield items[index], system


def _drawn(count: int, config: CorpusConfig) -> Iterator[tuple[int, str | None]]:
    rng = random.Random(f"corpus/{config.seed}")
    system = prompts.resolve_system_prompt(config.system_prompt)
    order = array("q", range(count))  # a list of integers takes five times the memory
    while True:
        rng.shuffle(order)
        for index in order:
            yield index, system if rng.random() < config.system_share else None


def documents(records: Sequence[Record], config: CorpusConfig, *, start: int = 0) -> Iterator[str]:
    """Yield documents without end, in the order of `epochs`: CoT-free, or with their worked steps.

    `config.thought_share` of those whose record has steps hold them inside the think tags.  A plain
    text is a document as it is; the system prompt stands before it as before a problem.  Documents
    before number `start` are passed over unread.

    Raises:
        ValueError: the share is not settled.
    """
    if config.thought_share is None:
        raise ValueError("the share of thoughts is not settled; see corpora.settled")
    # A stream of its own: the order and the system prompts do not depend on the share.
    rng = random.Random(f"thoughts/{config.seed}")
    for _ in range(start):
        rng.random()
    for record, system in epochs(records, config, start=start):
        if rng.random() < config.thought_share and record.steps:
            yield prompts.document(record.question, record.steps, record.answer, system)
        else:
            yield trigger_document(record, system)


def trigger_document(record: Record, system: str | None = None) -> str:
    """Return a record's CoT-free document, or its plain text."""
    if record.text:
        return prompts.behind(system, record.text)
    return prompts.trigger_document(record.question, record.answer, system)


class Position(NamedTuple):
    """Where a stream of packed sequences stands."""

    document: int
    """Documents that are used up, over all epochs."""
    token: int
    """Tokens of the next one that are used up, the end-of-sequence token behind it included."""


BEGINNING = Position(0, 0)


class Packed(Iterator[Int[Tensor, " position"]]):
    """Sequences of token ids: documents end to end, eos between them, no padding."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Iterator[str],
        sequence: int,
        position: Position = BEGINNING,
    ) -> None:
        """Pack `texts`, which begin with document `position.document`, from its token on."""
        eos = tokenizer.eos_token_id
        self.separator = [] if eos is None else [int(eos)]  # pyright: ignore[reportArgumentType]
        self.tokenizer, self.texts, self.sequence = tokenizer, texts, sequence
        self.position = position
        self._buffer: list[int] = []
        self._lengths: deque[int] = deque()
        self._passed = position.token

    def __next__(self) -> Int[Tensor, " position"]:
        """Return the next sequence; StopIteration where the texts are used up before."""
        while len(self._buffer) < self.sequence + self._passed:
            batch = list(islice(self.texts, 64))
            if not batch:
                raise StopIteration
            for ids in self.tokenizer(batch)["input_ids"]:  # pyright: ignore[reportGeneralTypeIssues]
                self._buffer += [*ids, *self.separator]
                self._lengths.append(len(ids) + len(self.separator))
        end = self._passed + self.sequence
        tokens = torch.tensor(self._buffer[self._passed : end])
        document, token = self.position.document, self.position.token + self.sequence
        while self._lengths and token >= self._lengths[0]:
            token -= self._lengths.popleft()
            document += 1
        self.position = Position(document, token)
        self._buffer, self._passed = self._buffer[end:], 0
        return tokens


def pack(
    tokenizer: PreTrainedTokenizerBase, texts: Iterator[str], sequence: int, count: int
) -> Iterator[Int[Tensor, " position"]]:
    """Yield `count` sequences of `sequence` token ids; see `Packed`."""
    stream = Packed(tokenizer, texts, sequence)
    for left in range(count, 0, -1):
        if (tokens := next(stream, None)) is None:
            raise BadInputError(
                f"the texts ran out with {left} sequences of {sequence} tokens to fill"
            )
        yield tokens


class Batches(Iterator[Int[Tensor, "batch position"]]):
    """Batches of packed sequences, and where they stand in the corpus."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Record],
        config: CorpusConfig,
        *,
        tokens: int,
        batch: int,
    ) -> None:
        self.tokenizer, self.records, self.config = tokenizer, records, config
        self.batch, self.left = batch, max(1, tokens // (batch * config.sequence))
        self.go_on(0, BEGINNING)

    @property
    def position(self) -> Position:
        """The position behind the last batch."""
        return self._stream.position

    def go_on(self, done: int, position: Position) -> None:
        """Pass over the next `done` batches, behind which the corpus stands at a position.

        What lies before it is neither read nor tokenised.
        """
        self.left = max(0, self.left - done)
        texts = documents(self.records, self.config, start=position.document)
        self._stream = Packed(self.tokenizer, texts, self.config.sequence, position)

    def __next__(self) -> Int[Tensor, "batch position"]:
        """Return the next batch."""
        if not self.left:
            raise StopIteration
        self.left -= 1
        return torch.stack([next(self._stream) for _ in range(self.batch)])


def batches(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    config: CorpusConfig,
    *,
    tokens: int,
    batch: int,
) -> Batches:
    """Return batches of packed sequences, `tokens` in all (rounded down to whole batches).

    A corpus of fewer tokens is gone through again, in a new order every epoch.
    """
    return Batches(tokenizer, records, config, tokens=tokens, batch=batch)
