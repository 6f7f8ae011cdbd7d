"""The documents on which experts are looked at, and their classes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resa_lens.artifacts.stage import Context
from resa_lens.errors import BadInputError
from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.evals.run import EvalConfig, answerable, ask, score
from resa_lens.evals.tasks import EvalItem
from resa_lens.experts.config import RankConfig, UseConfig, class_files
from resa_lens.experts.rank import Classes
from resa_lens.experts.routing import Texts, read_texts
from resa_lens.hashes import digest
from resa_lens.models.host import Model
from resa_lens.models.unloaded import UnloadedModel
from resa_lens.stages.saes import phased_corpus
from resa_lens.stages.scores import unanswerable_text
from resa_lens.texts import corpora, prompts
from resa_lens.texts.corpora import CorpusConfig, Record
from resa_lens.texts.phases import permutation, phased_texts, worked_document

GENERATIONS = 400
"""Questions that are answered for the classes right and wrong, where no number is named."""


class Labelled(NamedTuple):
    """A document, its class, and the question that it is of."""

    text: str
    label: int
    pair: int


@dataclass(frozen=True)
class ExpertData:
    """Records that become documents, and those of the classes' files."""

    corpus: CorpusConfig
    records: Sequence[Record]
    files: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    """By the class's name."""

    @property
    def hashes(self) -> dict[str, str]:
        """What of the data enters an identity."""
        hashes = {"data": corpora.hash_records(self.records)}
        if self.files:
            hashes["classes"] = digest([corpora.hash_records(r) for r in self.files.values()])
        return hashes

    def half(self, odd: bool) -> ExpertData:
        """Return the records of one half of the questions, and of the other half with `odd`.

        The question's own text decides, so no order or number of records moves it.
        """

        def kept(records: Sequence[Record]) -> list[Record]:
            return [r for r in records if (int(digest(r.question or r.text)[:8], 16) % 2 == 1) is
                    odd]  # fmt: skip

        return replace(
            self, records=kept(self.records), files={n: kept(r) for n, r in self.files.items()}
        )

    def without(self, questions: set[str]) -> ExpertData:
        """Return the data without some questions."""
        return replace(self, records=[r for r in self.records if r.question not in questions])


def expert_data(
    model: Model | UnloadedModel, corpus: CorpusConfig, classes: str | None = None
) -> ExpertData:
    """Read the documents' records, and those of the classes where they are files.

    Raises:
        BadInputError: no such data.
    """
    fitted = phased_corpus(corpus, model)
    files = {}
    pair = class_files(classes) if classes else None
    for file in pair or ():
        name = Path(file).stem if Path(file).stem not in files else file
        files[name] = corpora.read_records(replace(fitted, source=file, rows=None))
    return ExpertData(fitted, corpora.read_records(fitted), files)


def class_key(classes: str | None) -> str | None:
    """Return what of the choice of classes enters an identity: no file's name."""
    return None if classes is None else "files" if class_files(classes) else classes


def documents(
    ctx: Context,
    model: Model | UnloadedModel,
    data: ExpertData,
    use: UseConfig,
    tags: Sequence[str] = (),
) -> Texts:
    """Return the documents of a corpus, or the model's own answers, tokenised.

    Args:
        ctx: who to tell.
        model: its tokenizer, and with generations its answers.
        data: the records.
        use: how many tokens, or generations.
        tags: marked beside the think and answer tags.
    """
    marked = tuple(dict.fromkeys((*prompts.TAGS, *tags)))
    if use.generations:
        texts = [text for text, _, _ in _answered(ctx, model, data, use)]
        return read_texts(model.tokenizer, texts, tokens=2**62, longest=model.context, tags=marked)
    return read_texts(
        model.tokenizer, phased_texts(data.records, data.corpus), tokens=use.tokens,
        longest=data.corpus.sequence, tags=marked,
    )  # fmt: skip


def class_documents(
    ctx: Context,
    model: Model | UnloadedModel,
    data: ExpertData,
    config: RankConfig,
    tags: Sequence[str] = (),
) -> tuple[Texts, Classes]:
    """Return the documents of the classes, tokenised, and which is of which.

    Raises:
        BadInputError: one class only, or one of fewer than 20 documents.
    """
    names, labelled = _labelled(ctx, model, data, config)
    rows: list[Labelled] = []

    def texts() -> Iterator[str]:
        for row in labelled:
            rows.append(row)
            yield row.text

    marked = tuple(dict.fromkeys((*prompts.TAGS, *tags)))
    tokens = 2**62 if config.classes == "right" else config.use.tokens
    longest = model.context if config.classes == "right" else data.corpus.sequence
    read = read_texts(model.tokenizer, texts(), tokens=tokens, longest=longest, tags=marked)
    of = np.array([row.label for row in rows[: read.count]])
    pairs = np.array([row.pair for row in rows[: read.count]])
    classes = Classes(names, of, pairs if config.classes == "steps" else None)
    classes.check()
    return read, classes


def _labelled(
    ctx: Context, model: Model | UnloadedModel, data: ExpertData, config: RankConfig
) -> tuple[tuple[str, ...], Iterator[Labelled]]:
    rng = random.Random(f"classes/{config.seed}")
    if data.files:
        # In turn, so that a limit of tokens cuts both alike.
        rows = [
            (at / max(len(records), 1), Labelled(worked_document(records[i]), label, i))
            for label, records in enumerate(data.files.values())
            for at, i in enumerate(permutation(rng, len(records)))
        ]
        return tuple(data.files), iter([row for _, row in sorted(rows, key=lambda r: r[0])])
    order = list(permutation(rng, len(data.records)))
    if config.classes == "families":
        names = tuple(sorted({r.family for r in data.records if r.family}))
        return names, iter(
            Labelled(worked_document(r), names.index(r.family), i)
            for i in order
            if (r := data.records[i]).family
        )
    if config.classes == "steps":
        return ("steps", "at-once"), iter(
            Labelled(text, label, i)
            for i in order
            if (r := data.records[i]).steps
            for label, text in enumerate((worked_document(r), direct_document(r)))
        )
    use = replace(config.use, generations=config.use.generations or GENERATIONS)
    answered = _answered(ctx, model, data, use)
    return ("right", "wrong"), iter(
        Labelled(text, 0 if right else 1, i) for text, right, i in answered
    )


def direct_document(record: Record) -> str:
    """Return a record's document with empty think tags and the answer at once."""
    start = prompts.direct_prompt(record.question)
    return f"{start} Answer: {record.answer} {prompts.ANSWER_CLOSE}"


def _answered(
    ctx: Context, model: Model | UnloadedModel, data: ExpertData, use: UseConfig
) -> list[tuple[str, bool, int]]:
    """Answer questions of the data greedily; text, whether it is right, and the question."""
    assert isinstance(model, Model), "only a loaded model answers"
    rng = random.Random(f"questions/{data.corpus.seed}")
    order = [i for i in permutation(rng, len(data.records)) if data.records[i].question]
    if not order:
        raise BadInputError(f"data {data.corpus.source!r} hold no questions to answer")
    items = [
        EvalItem(str(i), data.records[i].question, data.records[i].answer)
        for i in order[: use.generations]
    ]
    config = EvalConfig(generation=GenerationConfig(use.max_new_tokens))
    asking, left_out = answerable(ask(items, config), model.tokenizer, model.context)
    if left_out:
        ctx.note_once([unanswerable_text(left_out, len(items), model)])
    with ctx.bar(f"answering {len(asking)} questions", len(asking)) as advance:
        before = [0]

        def progress(done: int) -> None:
            advance(done - before[0])
            before[0] = done

        generations = HFEngine(model.model, model.tokenizer).generate(
            [one.prompt for one in asking], config.generation, progress
        )
    rows = score(asking, generations).samples
    return [(row["prompt"] + row["generation"], bool(row["correct"]), int(row["id"]))
            for row in rows]  # fmt: skip
