"""Which part of a document a token belongs to: the prompt, the thoughts or the answer.

    Problem: {question} <think>   {thought} </think>   <answer> Answer: {answer} </answer>
    `-------- prompt --------'    `---- think ----'    `------------- answer ------------'

The borders are those of generation: the prompt ends with `<think>`, where the model takes over
(`prompts.question_prompt`), the thoughts end with `</think>`, and what follows, the end-of-sequence
token included, is the answer.  A system prompt that names the tags is prompt: the last `<think>`
of the text counts.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from resa_lens.errors import BadInputError
from resa_lens.texts import prompts
from resa_lens.texts.corpora import CorpusConfig, Record
from resa_lens.texts.prompts import PHASES as PHASES  # of the phases' own module too

TOKENS = 4096
BATCH_TOKENS = 512


class PhasedBatch(NamedTuple):
    """Token sequences of one length, without padding, and where each token belongs."""

    ids: Int[Tensor, "batch position"]
    phases: Int[Tensor, "batch position"]
    """Index into `PHASES`."""
    documents: Int[Tensor, "batch position"]
    """Number of the document, over all batches: the unit of standard errors."""


def tokens_within(offsets: Sequence[tuple[int, int]], first: int, end: int) -> tuple[int, ...]:
    """Return the tokens that share a character with text[first:end]."""
    return tuple(i for i, (a, b) in enumerate(offsets) if a < end and b > first)


def tag_spans(
    text: str, tag: str, offsets: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], ...]:
    """Return the token positions of each occurrence of a tag.

    A token belongs to an occurrence when it shares a character with it, so tags of several tokens
    work, and so does a token that reaches over the tag's edge.

    Args:
        text: the tokenised text.
        tag: what is looked for.
        offsets: first character and end of each token.
    """
    spans, start = [], text.find(tag)
    while start >= 0:
        end = start + len(tag)
        spans.append(tokens_within(offsets, start, end))
        start = text.find(tag, end)
    return tuple(spans)


def tag_phases(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Return the phase of each token of one document.

    A token that shares a character with a tag belongs to the tag's phase.  Without `<think>` all is
    prompt, without `</think>` after it there is no answer.
    """
    opened = text.rfind(prompts.THINK_OPEN)
    if opened < 0:
        return (0,) * len(offsets)
    thinks = opened + len(prompts.THINK_OPEN)
    closed = text.find(prompts.THINK_CLOSE, thinks)
    answers = closed + len(prompts.THINK_CLOSE) if closed >= 0 else len(text) + 1
    return tuple(0 if a < thinks else 1 if a < answers else 2 for a, _ in offsets)


def phased_texts(records: Sequence[Record], config: CorpusConfig) -> Iterator[str]:
    """Yield each record once as a document, with its steps where the source has them.

    Without steps the answer alone stands inside the think tags (the trigger template, spec section
    3).  The order and the share of documents with the system prompt are drawn by the seed.
    """
    rng = random.Random(f"phases/{config.seed}")
    system = prompts.resolve_system_prompt(config.system_prompt)
    for index in permutation(rng, len(records)):
        with_system = rng.random() < config.system_share
        yield worked_document(records[index], system if with_system else None)


def permutation(rng: random.Random, count: int) -> Iterator[int]:
    """Return `rng.sample(range(count), count)`, in 8 bytes a number in place of 40."""
    # A sample of all is the same exchange of places, listed from its end; it draws for the last
    # place too, which has no other to be exchanged with.
    order = array("q", range(count))
    rng.shuffle(order)
    rng.randrange(1)
    return reversed(order)


def worked_document(record: Record, system: str | None = None) -> str:
    """Return a record's document with its steps, where it has some; a plain text as it is.

    Before a plain text no system prompt stands: its tags would be taken for the text's.
    """
    if record.text:
        return record.text
    return prompts.document(record.question, record.steps or record.answer, record.answer, system)


class PhasedBatches(Sequence[PhasedBatch]):
    """Documents in batches of one length, the shorter first; each is made when it is looked up."""

    def __init__(
        self,
        ids: np.ndarray[Any, Any],
        phases: np.ndarray[Any, Any],
        ends: np.ndarray[Any, Any],
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        """Divide documents that lie end to end into batches.

        Args:
            ids: [token], of all documents.
            phases: [token], likewise.
            ends: [document], where each one ends.
            batch_tokens: of one batch, unless a single document is longer.
        """
        self.ids, self.phases, self.ends = ids, phases, ends
        lengths = np.diff(ends, prepend=0)
        self._order = np.argsort(lengths, kind="stable")
        values, counts = np.unique(lengths, return_counts=True)
        parts, first = [], 0
        for length, count in zip(values.tolist(), counts.tolist(), strict=True):
            at_once = max(1, batch_tokens // length)
            for start in range(0, count, at_once):
                parts.append((length, first + start, first + min(start + at_once, count)))
            first += count
        self._parts = np.array(parts, dtype=np.int64).reshape(-1, 3)

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.ends)

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return len(self.ids)

    @property
    def largest(self) -> int:
        """The number of the first of the batches with the most tokens."""
        return int(np.argmax(self._parts[:, 0] * (self._parts[:, 2] - self._parts[:, 1])))

    def document(self, number: int) -> tuple[list[int], list[int]]:
        """Return the ids and the phases of a document's tokens."""
        here = slice(self.ends[number - 1] if number else 0, self.ends[number])
        return self.ids[here].tolist(), self.phases[here].tolist()

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> PhasedBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[PhasedBatch]: ...
    def __getitem__(self, index: int | slice) -> PhasedBatch | list[PhasedBatch]:
        """Return a batch, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        length, first, end = self._parts[index].tolist()
        numbers = self._order[first:end]
        places = self.ends[numbers][:, None] + np.arange(-length, 0)
        documents = np.repeat(numbers[:, None], length, axis=1)
        parts = (self.ids[places], self.phases[places], documents)
        return PhasedBatch(*(torch.from_numpy(part.astype(np.int64)) for part in parts))


def phased_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    tokens: int = TOKENS,
    longest: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[PhasedBatch]:
    """Tokenise documents, `tokens` in all or a few more, and put those of one length together.

    Each document stands alone, with the end-of-sequence token behind it: no padding, and no other
    document before it.

    Args:
        tokenizer: a fast one, for its offsets.
        texts: documents; no more are read than are needed.
        tokens: stop once so many are there.
        longest: cut documents beyond this length (the model's context).
        batch_tokens: of one batch, unless a single document is longer.

    Raises:
        BadInputError: no document, or a tokenizer without offsets.
    """
    ids, phases, ends = array("i"), array("b"), array("q")
    for row, phase in _tokenised(tokenizer, texts, tokens, longest):
        ids.extend(row)
        phases.extend(phase)
        ends.append(len(ids))
    parts = (np.asarray(part) for part in (ids, phases, ends))
    return list(PhasedBatches(*parts, batch_tokens=batch_tokens))


def phase_counts(batches: Iterable[PhasedBatch]) -> list[int]:
    """Return the tokens of each phase."""
    counts = torch.zeros(len(PHASES), dtype=torch.long)
    for batch in batches:
        counts += torch.bincount(batch.phases.flatten(), minlength=len(PHASES))
    return counts.tolist()


def stored_batches(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    tokens: int = TOKENS,
    longest: int | None = None,
) -> PhasedBatches:
    """Return the batches of `phased_batches` with their tokens in a folder, not in memory.

    What a run that was killed had tokenised is taken as it is: the folder is that of one run.

    Raises:
        BadInputError: as `phased_batches`.
    """
    files = [folder / f"{name}.bin" for name in ("ids", "phases", "ends")]
    if not files[2].exists():
        folder.mkdir(parents=True, exist_ok=True)
        ends = array("q")
        with files[0].open("wb") as ids, files[1].open("wb") as phases:
            for row, phase in _tokenised(tokenizer, texts, tokens, longest):
                array("i", row).tofile(ids)
                array("b", phase).tofile(phases)
                ends.append((ends[-1] if ends else 0) + len(row))
        # Last: with it the tokens are whole.
        temporary = folder / "ends.tmp"
        with temporary.open("wb") as stream:
            ends.tofile(stream)
        temporary.replace(files[2])
    ids, phases, ends = (
        np.memmap(file, dtype, "r") for file, dtype in zip(files, ("i4", "i1", "i8"), strict=True)
    )
    return PhasedBatches(ids, phases, ends)


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], tokens: int, longest: int | None
) -> Iterator[tuple[list[int], list[int]]]:
    if not tokenizer.is_fast:
        raise BadInputError("the tokenizer gives no offsets; phases need a fast one")
    count, stream = 0, iter(texts)
    eos: Any = tokenizer.eos_token_id
    while count < tokens and (some := list(islice(stream, 64))):
        encoded: Any = tokenizer(some, return_offsets_mapping=True)
        for text, row, offsets in zip(
            some, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            end = [] if eos is None else [int(eos)]
            ids = [*row, *end][:longest]
            phases = tag_phases(text, [*offsets, (len(text), len(text))])
            yield ids, list(phases[: len(ids)])
            count += len(ids)
            if count >= tokens:
                return
    if not count:
        raise BadInputError("no document was given; a report needs at least one")
