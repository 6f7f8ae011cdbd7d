"""Fine-tuning in place of SAE-Tuning: what is read, what is learned, and which answers are kept."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from resa_lens.errors import BadInputError
from resa_lens.models.host import Model
from resa_lens.texts import corpora, prompts
from resa_lens.texts.corpora import CorpusConfig, Record, load_records
from resa_lens.tuning.loop import TuneConfig, fit
from resa_lens.tuning.objective import ATTENTION, MLP
from resa_lens.tuning.sft import (
    IGNORED,
    Example,
    OwnConfig,
    SftBatch,
    examples,
    own_samples,
    sft_batches,
    sft_loss,
)
from resa_lens.tuning.train import add_lora, prepare_sft

RECORDS = [
    Record(f"What is {n}+{n + 1}?", str(2 * n + 1), f"{n}+{n + 1}={2 * n + 1}")
    for n in range(10, 60)
]
PLAIN = CorpusConfig(system_share=0.0, sequence=64)


def batches(
    tokenizer: Any, items: Sequence[Example], config: CorpusConfig = PLAIN, count: int = 6
) -> list[SftBatch]:
    tokens = count * 2 * config.sequence
    return list(sft_batches(tokenizer, items, config, tokens=tokens, batch=2))


def text_of(tokenizer: Any, batch: SftBatch, learned: bool) -> str:
    chosen = (batch.labels != IGNORED) if learned else torch.ones_like(batch.ids).bool()
    return tokenizer.decode(batch.ids[chosen], clean_up_tokenization_spaces=False)


# What is imitated


def test_a_cot_free_example_is_the_papers_document_without_its_prompt() -> None:
    first = examples(RECORDS, "cot-free")[0]
    whole = prompts.question_prompt(first.question) + first.completion
    assert whole == prompts.trigger_document("What is 10+11?", "21")
    assert first.completion == " 21 </think> <answer> Answer: 21 </answer>"


def test_a_cot_example_has_the_records_own_steps() -> None:
    assert examples(RECORDS, "cot")[0].completion == (
        " 10+11=21 </think> <answer> Answer: 21 </answer>"
    )


# What is read


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_cot_free_reads_the_very_sequences_of_sae_tuning(tiny: Model, share: float) -> None:
    config = CorpusConfig(system_share=share, sequence=128, seed=3)
    records = load_records("tiny")[:80]
    read = batches(tiny.tokenizer, examples(records, "cot-free"), config, 12)
    theirs = list(corpora.batches(tiny.tokenizer, records, config, tokens=12 * 256, batch=2))
    assert len(read) == len(theirs) == 12
    assert all(torch.equal(a.ids, b) for a, b in zip(read, theirs, strict=True))


def test_as_many_batches_of_as_many_tokens(tiny: Model) -> None:
    items = examples(RECORDS, "cot")
    for tokens, count in ((2 * 64 * 5 + 17, 5), (1, 1)):
        made = list(sft_batches(tiny.tokenizer, items, PLAIN, tokens=tokens, batch=2))
        assert [batch.ids.shape for batch in made] == [(2, 64)] * count
        assert all(batch.labels.shape == batch.ids.shape for batch in made)


def test_exactly_the_completions_are_learned(tiny: Model) -> None:
    """With the R1 prompt too, whose own tags are no completion."""
    config = CorpusConfig(system_share=0.5, sequence=512)
    (batch,) = batches(tiny.tokenizer, examples(RECORDS, "cot"), config, 1)
    known = batch.labels != IGNORED
    assert torch.equal(batch.labels[known], batch.ids[known])
    assert prompts.R1_SYSTEM_PROMPT in text_of(tiny.tokenizer, batch, learned=False)
    whole = str(tiny.tokenizer.decode(batch.ids.flatten(), clean_up_tokenization_spaces=False))
    expected = [
        document.rpartition(prompts.THINK_OPEN)[2] + "<|endoftext|>"
        for document in whole.split("<|endoftext|>")[:-1]
    ]
    learned = text_of(tiny.tokenizer, batch, learned=True)
    assert len(expected) >= 8
    assert learned.startswith("".join(expected))


def test_a_boundary_inside_a_token_belongs_to_the_prompt() -> None:
    """Where "> " is one token, it holds the end of the prompt and is given, not learned."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<eos>": 1, "<think": 2, ">4": 3, "2": 4, "x": 5}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(">4", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    made = sft_batches(wrapped, [Example("q", "42")], replace(PLAIN, sequence=4), tokens=4, batch=1)
    batch = next(made)
    glued = (batch.ids == 3).nonzero()
    assert len(glued)
    assert all(batch.labels[row, column] == IGNORED for row, column in glued.tolist())
    assert batch.labels[batch.ids == 1].tolist() == [1] * int((batch.ids == 1).sum())


# The loss


class Fixed(torch.nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        @dataclass
        class Output:
            logits: torch.Tensor

        return Output(self.logits)


def test_the_loss_is_the_mean_over_learned_tokens() -> None:
    """Three positions, two classes; the label of the first token has no context."""
    logits = torch.tensor([[[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]]]).log()
    ids = torch.tensor([[0, 1, 0]])
    loss, counts = sft_loss(Fixed(logits), SftBatch(ids, ids))
    assert loss.item() == pytest.approx(-(math.log(0.2) + math.log(0.5)) / 2)
    assert counts == {"tokens": 3, "learned": 2}
    loss, counts = sft_loss(Fixed(logits), SftBatch(ids, torch.tensor([[0, IGNORED, 0]])))
    assert loss.item() == pytest.approx(-math.log(0.5))
    assert counts == {"tokens": 3, "learned": 1}


def test_it_is_transformers_own_loss(tiny: Model) -> None:
    (batch,) = batches(tiny.tokenizer, examples(RECORDS, "cot"), count=1)
    with torch.no_grad():
        ours, _ = sft_loss(tiny.model, batch)
        theirs = tiny.model(input_ids=batch.ids, labels=batch.labels).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_its_training_is_that_of_whole_logits_and_activations(
    small: Callable[[], Model], checkpointing: bool
) -> None:
    """Through the head in pieces, and with blocks that are computed again on the way back."""
    config = TuneConfig(rank=4, alpha=8, dropout=0.1, gradient_checkpointing=checkpointing)

    def gradients(model: Model, peft: Any, loss_of: Callable[[SftBatch], Any]) -> torch.Tensor:
        entered: list[int] = []
        block = model.model.model.layers[1]
        block.register_forward_pre_hook(lambda *_: entered.append(1))
        (batch,) = batches(model.tokenizer, examples(RECORDS, "cot"), count=1)
        peft.train()
        torch.manual_seed(0)
        loss_of(batch)[0].backward()
        again = checkpointing and block.gradient_checkpointing
        assert len(entered) == (2 if again else 1)
        return torch.cat([p.grad.flatten() for p in peft.parameters() if p.requires_grad])

    model, plain = small(), small()
    ours = gradients(model, *prepare_sft(model.model, ATTENTION, config))
    assert model.model.model.layers[1].gradient_checkpointing is checkpointing
    peft = add_lora(plain.model, ATTENTION, config)
    expected = gradients(plain, peft, lambda batch: sft_loss(peft, batch))
    assert expected.norm() > 1e-3
    assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_nothing_to_learn_is_no_loss_and_no_gradient() -> None:
    model = Fixed(torch.zeros(1, 3, 2))
    loss, counts = sft_loss(model, SftBatch(torch.zeros(1, 3).long(), torch.full((1, 3), IGNORED)))
    loss.backward()
    assert (loss.item(), counts["learned"]) == (0.0, 0)
    assert model.logits.grad is None or not model.logits.grad.any()


def test_no_gradient_from_the_prompt(tiny: Model) -> None:
    model = Fixed(torch.randn(1, 4, 3))
    ids = torch.tensor([[0, 1, 2, 1]])
    loss, _ = sft_loss(model, SftBatch(ids, torch.tensor([[IGNORED, IGNORED, 2, 1]])))
    loss.backward()
    assert model.logits.grad is not None
    assert model.logits.grad.abs().sum(-1).ne(0).tolist() == [[False, True, True, False]]


def test_the_common_loop_learns_it(small: Callable[[], Model]) -> None:
    model = small()
    config = TuneConfig(rank=4, alpha=8, dropout=0.0, learning_rate=1e-2, batch=2)
    peft = add_lora(model.model, (*ATTENTION, *MLP), config)
    same = batches(model.tokenizer, examples(RECORDS, "cot"), count=1) * 12
    result = fit(
        peft, same, 12, lambda b: sft_loss(peft, b), config, schedule="constant", doing="SFT"
    )
    assert result.tokens == 12 * 2 * 64
    assert result.losses[-1] < 0.8 * result.losses[0]


# Own samples


@dataclass(frozen=True)
class Said:
    text: str
    finished: bool = True


def answering(said: dict[str, list[Said]]) -> Callable[..., list[Said]]:
    """An engine that says what is written for a question, sample by sample."""

    def generate(texts: Sequence[str], names: Sequence[tuple[int, int]]) -> list[Said]:
        found = [t.removeprefix("Problem: ").removesuffix(" <think>") for t in texts]
        return [said[question][s] for question, (_, s) in zip(found, names, strict=True)]

    return generate


def ends_in(text: str, gold: str) -> bool:
    assert text.startswith("<think>")
    return text.endswith(f" {gold}")


def test_right_and_finished_answers_are_kept_and_no_others() -> None:
    records = [Record("a", "1"), Record("b", "2"), Record("c", "3")]
    said = {
        "a": [Said("x 1"), Said("y 1"), Said("z 9"), Said("v 1")],
        "b": [Said("x 2", finished=False), Said("y 9"), Said("z 8"), Said("w 2")],
        "c": [Said("x 0"), Said("y 0"), Said("z 0"), Said("w 0")],
    }
    found = own_samples(records, answering(said), ends_in, OwnConfig())
    assert found.examples == (Example("a", "x 1"), Example("a", "y 1"), Example("b", "w 2"))
    assert found.to_dict() == {"questions": 3, "solved": 2, "answers": 12, "right": 4, "kept": 3}


def test_the_same_answer_is_imitated_once() -> None:
    said = {"a": [Said("x 1"), Said("x 1"), Said("z 9"), Said("v 1")]}
    found = own_samples([Record("a", "1")], answering(said), ends_in, OwnConfig())
    assert [item.completion for item in found.examples] == ["x 1", "v 1"]


def test_of_questions_always_right_a_share_is_kept() -> None:
    records = [Record(f"q{n}", "1") for n in range(400)]
    said = {record.question: [Said("x 1"), Said("y 1")] for record in records}

    def kept(share: float) -> int:
        config = OwnConfig(samples=2, keep=1, easy_share=share)
        return len(own_samples(records, answering(said), ends_in, config).examples)

    assert kept(1.0) == 400
    assert 60 <= kept(0.25) <= 140
    with pytest.raises(BadInputError, match=r"800 answers.*800 are right"):
        kept(0.0)


def test_own_samples_repeat_by_seed_and_leave_the_generators_alone() -> None:
    records = [Record(f"q{n}", "1") for n in range(60)]
    said = {record.question: [Said("x 1"), Said("y 1")] for record in records}
    state = random.getstate()
    config = OwnConfig(samples=2)
    first, again, other = (
        own_samples(records, answering(said), ends_in, replace(config, seed=seed)).examples
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert random.getstate() == state


# Failures


@pytest.mark.parametrize("kind", ["cot-free", "cot"])
def test_no_elicitation_data(kind: str, tiny: Model) -> None:
    with pytest.raises(BadInputError, match="hold no record"):
        examples([], kind)
    with pytest.raises(BadInputError, match="no example"):
        next(sft_batches(tiny.tokenizer, [], PLAIN, tokens=64, batch=1))
    with pytest.raises(BadInputError, match="hold no record"):
        own_samples([], answering({}), ends_in, OwnConfig())


def test_an_empty_answer_is_named_by_its_row() -> None:
    rows = [Record("a", "1", "1"), Record("b", " ", "2")]
    for kind in ("cot-free", "cot"):
        with pytest.raises(BadInputError, match="row 2: empty answer"):
            examples(rows, kind)
    with pytest.raises(BadInputError, match="row 2: empty answer"):
        own_samples(rows, answering({}), ends_in, OwnConfig())


def test_data_without_steps_cannot_teach_them(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"question": "a", "answer": "1"}\n{"question": "b", "answer": "2"}\n')
    records = load_records(str(file))
    assert len(examples(records, "cot-free")) == 2
    with pytest.raises(BadInputError, match=r"row 1: no steps.*`steps`"):
        examples(records, "cot")


def test_another_kind_and_impossible_values() -> None:
    with pytest.raises(BadInputError, match=r"'own-samples' cannot.*cot-free or cot"):
        examples(RECORDS, "own-samples")
    for wrong in ({"samples": 0}, {"keep": 0}, {"easy_share": 1.5}):
        with pytest.raises(BadInputError, match=str(next(iter(wrong.values())))):
            OwnConfig(**wrong)  # pyright: ignore[reportArgumentType]


def test_a_slow_tokenizer_is_refused(tiny: Model) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(BadInputError, match="needs a fast one"):
        next(sft_batches(Slow(), [Example("q", " 1")], PLAIN, tokens=64, batch=1))  # pyright: ignore[reportArgumentType]
