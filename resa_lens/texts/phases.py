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
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

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
    for record in rng.sample(list(records), len(records)):
        with_system = rng.random() < config.system_share
        yield worked_document(record, system if with_system else None)


def worked_document(record: Record, system: str | None = None) -> str:
    """Return a record's document with its steps, where it has some; a plain text as it is.

    Before a plain text no system prompt stands: its tags would be taken for the text's.
    """
    if record.text:
        return record.text
    return prompts.document(record.question, record.steps or record.answer, record.answer, system)


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
    if not tokenizer.is_fast:
        raise BadInputError("the tokenizer gives no offsets; phases need a fast one")
    by_length: dict[int, list[tuple[list[int], list[int], int]]] = {}
    for number, (ids, phases) in enumerate(_tokenised(tokenizer, texts, tokens, longest)):
        by_length.setdefault(len(ids), []).append((ids, phases, number))
    if not by_length:
        raise BadInputError("no document was given; a report needs at least one")
    batches = []
    for length, rows in sorted(by_length.items()):
        at_once = max(1, batch_tokens // length)
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            batches.append(
                PhasedBatch(
                    torch.tensor([ids for ids, _, _ in part]),
                    torch.tensor([phases for _, phases, _ in part]),
                    torch.tensor([[number] * length for _, _, number in part]),
                )
            )
    return batches


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], tokens: int, longest: int | None
) -> Iterator[tuple[list[int], list[int]]]:
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
