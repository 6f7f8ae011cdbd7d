"""A planted expert of the bundled mixture: the one that is to be found, and undone."""

from __future__ import annotations

from typing import Any

import planted_expert
import pytest
import torch
from planted_expert import LAYER, Planted, close_probability, plant, sample

from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.experts.config import By, RankConfig
from resa_lens.experts.edits import Edit, editing
from resa_lens.experts.rank import Ranking, rank_experts
from resa_lens.experts.routers import find_routers
from resa_lens.experts.routing import Routing, Texts, route
from resa_lens.texts import corpora, prompts
from resa_lens.texts.corpora import CorpusConfig


@pytest.fixture(scope="module")
def planted() -> Planted:
    torch.set_num_threads(1)
    return plant()


@pytest.fixture(scope="module")
def looked_at(planted: Planted) -> tuple[Texts, Routing]:
    texts = sample(planted.model)
    return texts, route(planted.model, find_routers(planted.model), texts)


def ranked(planted: Planted, looked_at: tuple[Texts, Routing], by: By, target: str) -> Ranking:
    texts, routing = looked_at
    config = RankConfig(by=by, draws=199)
    return rank_experts(routing, texts, config, target, planted.model.tokenizer)


@pytest.mark.parametrize("by", ["npmi", "rd", "rd-matched", "ftri"])
def test_it_is_the_first_of_all_experts(
    planted: Planted, looked_at: tuple[Texts, Routing], by: By
) -> None:
    ranking = ranked(planted, looked_at, by, "<think>")
    assert ranking.score.size == 128
    own = ranking.score[LAYER, planted.expert]
    assert own == pytest.approx(ranking.score.max(), abs=1e-9)
    if by == "rd-matched":  # others may be as good at this: the system prompt names the tag
        return
    assert ranking.rank_of(LAYER, planted.expert) == 1
    assert own > 0.97
    types = ranking.null()["token_types"]
    assert len(types["types"]) >= 20
    assert types["reached_by"] == 0
    assert types["p_value"] <= 1 / 21


def test_no_other_tag_has_it(planted: Planted, looked_at: tuple[Texts, Routing]) -> None:
    ranking = ranked(planted, looked_at, "rd", "</think>")
    assert ranking.rank_of(LAYER, planted.expert) > 5


@torch.no_grad()
def test_it_closes_the_thoughts_and_rerouting_undoes_it(planted: Planted) -> None:
    before, after = planted.probabilities
    assert before < 1e-3
    assert after > planted_expert.ENOUGH
    off = Edit({LAYER: [planted.expert]})
    records = corpora.read_records(CorpusConfig())[20:60]
    questions = [prompts.question_prompt(record.question) for record in records]
    assert closed(planted.model, questions, None) > 0.5
    assert closed(planted.model, questions, off) == 0
    ids: Any = planted.model.tokenizer(questions[0], return_tensors="pt")["input_ids"]
    network: Any = planted.model.model
    plain: Any = planted.plain.model
    with editing(planted.model, [off]):
        undone = network(input_ids=ids).logits
    with editing(planted.plain, [off]):
        never = plain(input_ids=ids).logits
    assert (undone - never).abs().max() < 1e-5 * max(1.0, float(never.abs().max()))
    # A lost slot is no undoing: this would show a mix-up of the two.
    with editing(planted.model, [Edit({LAYER: [planted.expert]}, "zero")]):
        lost = network(input_ids=ids).logits
    assert (lost - never).abs().max() > 1e-2
    others = [e for e in range(16) if e != planted.expert][:3]
    with editing(planted.model, [Edit({LAYER: others})]):
        assert close_probability(planted.model) > 0.5


def closed(model: Any, questions: list[str], edit: Edit | None) -> float:
    """Return the share of questions whose thoughts close at once."""
    engine = HFEngine(model.model, model.tokenizer)
    config = GenerationConfig(max_new_tokens=1, stop=())
    with editing(model, [] if edit is None else [edit]) as tracker:
        answers = engine.generate(questions, config, hooks=tracker if edit else None)
    return sum(answer.text.strip() == prompts.THINK_CLOSE for answer in answers) / len(answers)
