"""What a model will read of some data: documents with their phases, tokens and tags marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from resa_lens.errors import BadInputError
from resa_lens.texts import prompts
from resa_lens.texts.corpora import CorpusConfig, Record, doubtful, read_records, trigger_document
from resa_lens.texts.phases import tag_phases, tag_spans, worked_document

DOCUMENTS = 3


@dataclass(frozen=True)
class MarkedToken:
    """One token of a document."""

    text: str
    id: int
    phase: str
    tag: str | None
    """The tag that it shares a character with, where it does."""


@dataclass(frozen=True)
class MarkedDocument:
    """A document as a stage reads it."""

    form: str
    """What reads it so."""
    tokens: tuple[MarkedToken, ...]

    def lines(self) -> Iterator[str]:
        """Yield the document for people: a heading, then a line a phase; | ends a token."""
        counts = {p: sum(t.phase == p for t in self.tokens) for p in prompts.PHASES}
        yield f"{self.form}: {len(self.tokens)} tokens (" + ", ".join(
            f"{phase} {count}" for phase, count in counts.items()
        ) + ")"  # fmt: skip
        for phase, tokens in groupby(self.tokens, key=lambda token: token.phase):
            line = "".join(
                (f"[{token.text}]" if token.tag else token.text).replace("\n", "\\n") + "|"
                for token in tokens
            )
            yield f"  {phase:<6} {line}"


@dataclass(frozen=True)
class DataPreview:
    """What data hold, and how a few of their documents are read."""

    source: str
    records: int
    with_steps: int
    plain_texts: int
    warnings: tuple[str, ...]
    documents: tuple[MarkedDocument, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Yield the preview for people."""
        kind = "plain texts" if self.plain_texts else f"questions, {self.with_steps} with steps"
        yield f"data {self.source}: {self.records} {kind}"
        yield from self.warnings
        for document in self.documents:
            yield from document.lines()


def preview(tokenizer: Any, corpus: CorpusConfig) -> DataPreview:
    """Read data and mark three documents, as a model's tokenizer divides them.

    The first records stand in three forms: for SAEs and tuning, without steps; the same behind the
    system prompt; and with their steps, for reports by phase, activity and `--control cot`.

    Raises:
        BadInputError: as `corpora.load_records`, or a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise BadInputError("the tokenizer gives no offsets; phases need a fast one")
    records = read_records(corpus)
    system = prompts.resolve_system_prompt(corpus.system_prompt)
    forms = (
        ("for SAEs and tuning, CoT-free", lambda record: trigger_document(record)),
        ("the same behind the system prompt", lambda record: trigger_document(record, system)),
        ("with its steps, for activity and phases", worked_document),
    )
    documents = []
    for number, (form, build) in enumerate(forms[:DOCUMENTS]):
        record: Record = records[number % len(records)]
        tokens = marked_tokens(tokenizer, build(record))
        documents.append(MarkedDocument(f"record {number % len(records) + 1}, {form}", tokens))
    return DataPreview(
        corpus.source,
        len(records),
        sum(bool(record.steps) for record in records),
        sum(bool(record.text) for record in records),
        tuple(doubtful(records, corpus.source)),
        tuple(documents),
    )


def marked_tokens(tokenizer: Any, text: str) -> tuple[MarkedToken, ...]:
    """Return a document's tokens, the end-of-sequence token last, with phase and tag."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])
    offsets: list[tuple[int, int]] = [*encoded["offset_mapping"]]
    texts: Sequence[str] = [
        text[a:b] or tokenizer.decode([i]) for i, (a, b) in zip(ids, offsets, strict=True)
    ]
    if tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
        offsets.append((len(text), len(text)))
        texts = [*texts, tokenizer.eos_token]
    tags = {
        place: tag
        for tag in prompts.TAGS
        for span in tag_spans(text, tag, offsets)
        for place in span
    }
    phases = tag_phases(text, offsets)
    return tuple(
        MarkedToken(texts[place], ids[place], prompts.PHASES[phases[place]], tags.get(place))
        for place in range(len(ids))
    )
