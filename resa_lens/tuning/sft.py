"""Supervised fine-tuning in place of SAE-Tuning: the same adapters, steps and tokens, another loss.

Three things to imitate (spec, section 7):

- `cot-free`: the paper's CoT-free documents, the very sequences that SAE-Tuning reads: only the
  answer stands between the think tags;
- `cot`: the records' own worked steps between the tags;
- `own-samples`: the model's own answers that were verified to be right (rejection fine-tuning,
  arXiv 2308.01825): the positive control, which must gain.

The loss is the next-token cross entropy of the completion alone: what follows the question's
`<think>`, with the end of the document.  Question and system prompt are given when the model
answers; to learn them too would move the adapters without any bearing on an answer.  They still
count as tokens: a run of as many steps reads as many.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from resa_lens.errors import BadInputError
from resa_lens.texts import corpora, prompts
from resa_lens.texts.corpora import CorpusConfig, Record
from resa_lens.tuning.kl import Head, chunked_cross_entropy, head_input

KINDS = ("cot-free", "cot", "own-samples")
IGNORED = -100
"""The label of a token that is not learned: torch's default in `cross_entropy`."""


@dataclass(frozen=True)
class Example:
    """A question and the text to imitate."""

    question: str
    completion: str
    """All that follows the prompt's `<think>`."""


class SftBatch(NamedTuple):
    """Packed sequences and what is learned of them."""

    ids: Int[Tensor, "batch position"]
    labels: Int[Tensor, "batch position"]
    """The ids themselves, not shifted; `IGNORED` where a token is not learned."""


def examples(records: Sequence[Record], kind: str) -> list[Example]:
    """Return what "cot-free" or "cot" imitates, one example a record.

    Raises:
        BadInputError: no record, an empty answer, no steps where they are needed, another kind.
    """
    if kind not in ("cot-free", "cot"):
        raise BadInputError(f"{kind!r} cannot be made of records; use cot-free or cot")
    _check_answers(records, kind)
    for number, record in enumerate(records, 1):
        if kind == "cot" and not record.steps.strip():
            raise BadInputError(
                f"elicitation data, row {number}: no steps to imitate; CoT SFT needs a column "
                "`steps` (or --steps-column) with the reasoning of every row"
            )
    made = []
    for record in records:
        thought = record.answer if kind == "cot-free" else record.steps
        text = prompts.document(record.question, thought, record.answer)
        start = prompts.question_prompt(record.question)
        made.append(Example(record.question, text.removeprefix(start)))
    return made


def _check_answers(records: Sequence[Record], kind: str) -> None:
    if not records:
        raise BadInputError("the elicitation data hold no record; give at least one question")
    for number, record in enumerate(records, 1):
        if record.text:
            raise BadInputError(
                f"elicitation data, row {number}: a plain text without question and answer, which "
                f"{kind} needs; name their columns, or give other data"
            )
        if not record.answer.strip():
            raise BadInputError(
                f"elicitation data, row {number}: empty answer; remove the row or fill it"
            )


def sft_batches(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Example],
    config: CorpusConfig,
    *,
    tokens: int,
    batch: int,
) -> Iterator[SftBatch]:
    """Yield batches packed as `corpora.batches` packs them: as many, of as many tokens.

    The order of the examples and the share behind the system prompt are that function's too, so for
    `cot-free` examples the ids are the same.

    Args:
        tokenizer: a fast one, whose offsets tell a completion's tokens from its prompt's.
        items: repeated in a new order every epoch.
        config: sequence length, system prompt and its share, seed.
        tokens: in all, rounded down to whole batches.
        batch: sequences a batch.

    Raises:
        BadInputError: no example, or a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise BadInputError("the tokenizer gives no offsets; fine-tuning needs a fast one")
    if not items:
        raise BadInputError("no example to imitate; fine-tuning needs at least one")
    steps = max(1, tokens // (batch * config.sequence))
    stream = _windows(tokenizer, items, config)
    for _ in range(steps):
        ids, labels = zip(*islice(stream, batch), strict=True)
        yield SftBatch(torch.tensor(ids), torch.tensor(labels))


def _windows(
    tokenizer: Any, items: Sequence[Example], config: CorpusConfig
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield ids and labels of `config.sequence` tokens without end, eos between documents."""
    eos = tokenizer.eos_token_id
    separator = [] if eos is None else [int(eos)]
    ids: list[int] = []
    labels: list[int] = []
    stream = corpora.epochs(items, config)
    while True:
        part = list(islice(stream, 64))
        starts = [prompts.question_prompt(item.question, system) for item, system in part]
        texts = [start + item.completion for start, (item, _) in zip(starts, part, strict=True)]
        encoded = tokenizer(texts, return_offsets_mapping=True)
        for start, row, offsets in zip(
            starts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            # A token that reaches over the boundary is the prompt's.
            learned = [first >= len(start) for first, _ in offsets]
            ids += [*row, *separator]
            labels += [i if known else IGNORED for i, known in zip(row, learned, strict=True)]
            labels += separator
        while len(ids) >= config.sequence:
            yield ids[: config.sequence], labels[: config.sequence]
            ids, labels = ids[config.sequence :], labels[config.sequence :]


def sft_loss(
    model: Any, batch: SftBatch, head: Head | None = None
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Return the mean cross entropy of the learned tokens, and the counts of tokens.

    The first token of a sequence has no context and is not learned.  A batch without a learned
    token (a long system prompt fills a sequence) has loss 0 and teaches nothing.

    Args:
        model: a causal language model, plain or wrapped by PEFT.
        batch: see `SftBatch`.
        head: the model's, to go through it a piece at a time (`kl.find_plain_head`); without it
            the logits of all learned tokens are there at once.
    """
    device = next(model.parameters()).device
    ids, labels = batch.ids.to(device), batch.labels.to(device)
    wanted = labels[:, 1:]
    learned = wanted != IGNORED
    if head is None:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        # Only the learned rows are taken to single precision.
        total = F.cross_entropy(logits[learned].float(), wanted[learned], reduction="sum")
    else:
        total = chunked_cross_entropy(
            head_input(model, ids)[:, :-1][learned], wanted[learned], head
        )
    count = int(learned.sum())
    return total / max(1, count), {"tokens": ids.numel(), "learned": count}


# Own samples


class Answer(Protocol):
    """One generated answer, as an engine returns it."""

    @property
    def text(self) -> str:
        """What was written after the prompt."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the model ended it itself."""
        ...


Generate = Callable[[Sequence[str], Sequence[tuple[int, int]]], Sequence[Answer]]
"""From prompts and the names of their random streams (record, sample) to one answer each."""
Verify = Callable[[str, str], bool]
"""Whether a text, its `<think>` included, ends in the gold answer."""


@dataclass(frozen=True)
class OwnConfig:
    """How many answers are drawn and which are imitated."""

    samples: int = 4
    """Answers a question."""
    keep: int = 2
    """Different right answers of a question that are imitated at most."""
    easy_share: float = 0.25
    """Share kept of the questions that were answered right every time: they teach little, and
    without them the model would forget them."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            BadInputError: a value is out of its range.
        """
        if self.samples < 1 or self.keep < 1:
            raise BadInputError(
                f"samples is {self.samples}, keep {self.keep}; both must be at least 1"
            )
        if not 0 <= self.easy_share <= 1:
            raise BadInputError(f"easy share {self.easy_share} must be from 0 to 1")


@dataclass(frozen=True)
class OwnSamples:
    """The model's own right answers."""

    examples: tuple[Example, ...]
    questions: int
    solved: int
    """Questions with at least one right answer."""
    answers: int
    right: int
    """Answers that are right and that the model ended itself."""

    def to_dict(self) -> dict[str, float]:
        """Return the figures, without the texts."""
        return {
            "questions": self.questions,
            "solved": self.solved,
            "answers": self.answers,
            "right": self.right,
            "kept": len(self.examples),
        }


def own_samples(
    records: Sequence[Record], generate: Generate, verify: Verify, config: OwnConfig
) -> OwnSamples:
    """Let the model answer every question several times; keep the answers that are right.

    Args:
        records: questions with their gold answers.
        generate: draws the answers, at a temperature above 0.
        verify: compares one with the gold answer.
        config: see `OwnConfig`.

    Raises:
        BadInputError: no record, an empty gold answer, or not one answer is right.
    """
    _check_answers(records, "own-samples")
    names = [(i, s) for i in range(len(records)) for s in range(config.samples)]
    texts = [prompts.question_prompt(records[i].question) for i, _ in names]
    right: dict[int, list[str]] = {}
    for (i, _), answer in zip(names, generate(texts, names), strict=True):
        if answer.finished and verify(prompts.THINK_OPEN + answer.text, records[i].answer):
            right.setdefault(i, []).append(answer.text)
    rng = random.Random(f"own/{config.seed}")
    kept: list[Example] = []
    for i, answers in right.items():
        if len(answers) == config.samples and rng.random() >= config.easy_share:
            continue
        different = list(dict.fromkeys(answers))[: config.keep]
        kept += [Example(records[i].question, text) for text in different]
    if not kept:
        raise BadInputError(
            f"none of {len(names)} answers of the model's own can be imitated: "
            f"{sum(map(len, right.values()))} are right; draw more, or from easier questions"
        )
    return OwnSamples(
        tuple(kept), len(records), len(right), len(names), sum(map(len, right.values()))
    )
