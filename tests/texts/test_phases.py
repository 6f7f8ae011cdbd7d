"""Phases of a document: the borders, tags of several tokens, and a partition of the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resa_lens.errors import BadInputError
from resa_lens.models.host import Model
from resa_lens.texts import prompts
from resa_lens.texts.corpora import CorpusConfig, Record, load_records
from resa_lens.texts.phases import PHASES, phased_batches, phased_texts, tag_phases, tag_spans

TEXT = prompts.document("1+2?", "1+2=3", "3")


def characters(text: str) -> list[tuple[int, int]]:
    """A tokenizer of single characters."""
    return [(i, i + 1) for i in range(len(text))]


def by_phase(text: str, offsets: list[tuple[int, int]]) -> list[str]:
    found = tag_phases(text, offsets)
    return [
        "".join(text[a:b] for (a, b), p in zip(offsets, found, strict=True) if p == phase)
        for phase in range(len(PHASES))
    ]


def test_the_borders_are_those_of_generation() -> None:
    prompt, think, answer = by_phase(TEXT, characters(TEXT))
    assert prompt == prompts.question_prompt("1+2?")
    assert think == " 1+2=3 </think>"
    assert answer == " <answer> Answer: 3 </answer>"


def test_tags_in_the_system_prompt_are_prompt() -> None:
    text = prompts.document("1+2?", "1+2=3", "3", prompts.R1_SYSTEM_PROMPT)
    prompt, think, _ = by_phase(text, characters(text))
    assert prompt == prompts.question_prompt("1+2?", prompts.R1_SYSTEM_PROMPT)
    assert think == " 1+2=3 </think>"


def test_a_token_over_a_border_belongs_to_the_tag() -> None:
    """Tokens of seven characters, cut without regard to the tags."""
    offsets = [(i, min(i + 7, len(TEXT))) for i in range(0, len(TEXT), 7)]
    found = tag_phases(TEXT, offsets)
    assert list(found) == sorted(found)
    for tag, phase in ((prompts.THINK_OPEN, 0), (prompts.THINK_CLOSE, 1)):
        (span,) = tag_spans(TEXT, tag, offsets)
        assert span
        assert {found[i] for i in span} == {phase}


@pytest.mark.parametrize(
    ("text", "present"),
    [("no tag at all", {0}), ("a <think> b", {0, 1}), ("a </think> <think> b", {0, 1})],
)
def test_unfinished_documents(text: str, present: set[int]) -> None:
    assert set(tag_phases(text, characters(text))) == present


def test_spans_name_every_occurrence() -> None:
    text = "<think> and <think>"
    assert tag_spans(text, "<think>", characters(text)) == (
        tuple(range(7)),
        tuple(range(12, 19)),
    )
    assert tag_spans(text, "</think>", characters(text)) == ()


def test_batches_partition_the_tokens_without_padding(tiny: Model) -> None:
    records = load_records("tiny")[:60]
    texts = list(phased_texts(records, CorpusConfig()))
    batches = phased_batches(tiny.tokenizer, texts, tokens=1500)
    total = sum(b.ids.numel() for b in batches)
    assert 1500 <= total < 1500 + 400
    seen: dict[int, int] = {}
    for batch in batches:
        assert batch.ids.shape == batch.phases.shape == batch.documents.shape
        assert batch.ids.shape[0] == 1 or batch.ids.numel() <= 512
        for ids, phases, documents in zip(*batch, strict=True):
            number = int(documents[0])
            assert (documents == number).all()
            seen[number] = len(ids)
            # The text comes back whole: nothing padded, cut or left out.
            tokenizer: Any = tiny.tokenizer
            assert ids[:-1].tolist() == tokenizer(texts[number])["input_ids"]
            assert ids[-1] == tokenizer.eos_token_id
            assert (phases.diff() >= 0).all()
            assert set(phases.tolist()) == {0, 1, 2}
            opened = tokenizer.convert_tokens_to_ids("<think>")
            assert (ids[phases == 1] != opened).all()
            assert ids[phases == 0][-1] == opened
    assert sorted(seen) == list(range(len(seen)))


def test_steps_stand_where_the_source_has_them() -> None:
    records = [Record("q", "7", steps="3+4=7"), Record("r", "8")]
    texts = set(phased_texts(records, CorpusConfig(system_share=0.0)))
    assert texts == {
        prompts.document("q", "3+4=7", "7"),
        prompts.trigger_document("r", "8"),
    }


def test_repeatable_by_seed() -> None:
    records = load_records("tiny")[:40]

    def texts(seed: int) -> list[str]:
        return list(phased_texts(records, CorpusConfig(seed=seed)))

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_long_documents_are_cut(tiny: Model) -> None:
    batches = phased_batches(tiny.tokenizer, [TEXT] * 3, tokens=10**6, longest=12)
    assert torch.cat([b.ids for b in batches]).shape == (3, 12)


def test_no_document_is_refused(tiny: Model) -> None:
    with pytest.raises(BadInputError, match="at least one"):
        phased_batches(tiny.tokenizer, [])
