"""A model's own thoughts in the place of worked steps, for records that have none.

The paper's data hold questions and answers alone, and an SAE that never sees a thought leaves much
of it unexplained.  Only on request (`CorpusConfig.own_thoughts`): writing them costs a generation,
which is planned before.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from resa_lens.artifacts.stage import Context
from resa_lens.evals.config import GenerationConfig
from resa_lens.evals.engines.hf import HFEngine
from resa_lens.files import write_errors
from resa_lens.machine.plans import Trial, timed
from resa_lens.models.host import Model
from resa_lens.texts import prompts
from resa_lens.texts.corpora import CorpusConfig, Record

FILE = "own-thoughts.jsonl"
AT_ONCE = 64
"""Questions between two writes."""
PROBE = 8
"""Questions that the plan is made of."""


def chosen(records: Sequence[Record], corpus: CorpusConfig) -> list[int]:
    """Return the indices of the records whose questions are answered, drawn by the seed."""
    draw = random.Random(f"own thoughts/{corpus.seed}")
    # The records of a table are all questions, or all plain texts.
    askable = range(0 if records and records[0].text else len(records))
    return sorted(draw.sample(askable, min(corpus.own_thoughts, len(askable))))


def try_thoughts(model: Model, records: Sequence[Record], corpus: CorpusConfig) -> Trial:
    """Return what the thoughts will take, from the first few of them."""
    indices = chosen(records, corpus)
    with timed(model.device) as trial:
        _answers(model, [records[index] for index in indices[:PROBE]], corpus)
    return trial[0] * (len(indices) / max(1, min(PROBE, len(indices))))


def with_own_thoughts(
    ctx: Context, model: Model, records: Sequence[Record], corpus: CorpusConfig, work: Path
) -> Sequence[Record]:
    """Return the records, with the model's own thought as the steps of those that are drawn.

    Greedy; a thought counts whether its answer is right or wrong, and as far as a sequence reaches.
    What is finished is kept in `work`, from where a killed run goes on.

    Args:
        ctx: who to tell.
        model: it answers.
        records: questions with their answers.
        corpus: how many, drawn by its seed; its sequence bounds a thought's tokens.
        work: folder of what is finished.
    """
    indices, file = chosen(records, corpus), work / FILE
    with write_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        # A line that a kill cut off is written anew.
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        file.write_text("".join(f"{line}\n" for line in lines))
    thoughts = [json.loads(line) for line in lines]
    with ctx.bar(f"{model.name}: own thoughts", len(indices)) as advance:
        advance(len(thoughts))
        while len(thoughts) < len(indices):
            some = indices[len(thoughts) : len(thoughts) + AT_ONCE]
            texts = _answers(model, [records[index] for index in some], corpus)
            with write_errors(work), file.open("a") as lines_file:
                lines_file.writelines(f"{json.dumps(text)}\n" for text in texts)
            thoughts += texts
            advance(len(texts))
    return WithSteps(records, dict(zip(indices, thoughts, strict=True)))


@dataclass(frozen=True)
class WithSteps(Sequence[Record]):
    """Records, some of which have other steps than the source says."""

    records: Sequence[Record]
    steps: Mapping[int, str]
    """By the record's index."""

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Return a record, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        record = self.records[index]
        return replace(record, steps=self.steps.get(index, record.steps))


def _answers(model: Model, records: Sequence[Record], corpus: CorpusConfig) -> list[str]:
    config = GenerationConfig(max_new_tokens=corpus.sequence, stop=(prompts.THINK_CLOSE,))
    texts = [prompts.question_prompt(record.question) for record in records]
    answers = HFEngine(model.model, model.tokenizer).generate(texts, config)
    return [answer.text.partition(prompts.THINK_CLOSE)[0].strip() for answer in answers]
