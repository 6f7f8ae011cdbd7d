"""Scores and nulls on routings that are made up, so that the truth is known."""

from __future__ import annotations

from typing import Any

import mixtures
import numpy as np
import pytest
import torch

from resa_lens.errors import BadInputError
from resa_lens.experts.config import RankConfig, SteerConfig, parse_experts
from resa_lens.experts.matching import matched_sets, use_of
from resa_lens.experts.rank import Classes, contrast_of, rank_experts
from resa_lens.experts.rankings import (
    Contrast,
    exchange_p,
    mean_maps,
    npmi,
    risk_difference,
    score_function,
    split_halves,
)
from resa_lens.experts.routers import find_routers
from resa_lens.experts.routing import (
    Routing,
    Texts,
    padded_batches,
    predicted_by_token,
    read_texts,
    route,
    use_maps,
)
from resa_lens.stats import holm
from resa_lens.texts.prompts import PHASES

EXPERTS = 6


class Tokenizer:
    """Names of ids, and no special ones."""

    all_special_ids: tuple[int, ...] = ()

    def decode(self, ids: list[int]) -> str:
        return f"t{ids[0]}"


def made(rng: np.random.Generator, documents: int = 60, length: int = 40) -> Texts:
    """Documents of tokens 0 to 29; token 0 is the tag, once in each, and thoughts follow it."""
    ids = rng.integers(1, 30, size=(documents, length))
    at = rng.integers(5, 15, size=documents)
    ids[np.arange(documents), at] = 0
    phases = (np.arange(length)[None] > at[:, None]).astype(int)
    mark = ids == 0
    return Texts(
        ids.ravel(), phases.ravel(), np.repeat(np.arange(documents), length),
        {"<tag>": mark.ravel()}, {"<tag>": 1},
    )  # fmt: skip


def routing_of(experts: np.ndarray[Any, Any]) -> Routing:
    """A routing of [token, layer, k] experts, weights even."""
    weights = np.full(experts.shape, 1 / experts.shape[2], dtype=np.float32)
    return Routing(tuple(range(experts.shape[1])), EXPERTS, experts.astype(np.int32), weights)


def lookup(rng: np.random.Generator, texts: Texts) -> Routing:
    """Two layers in which the token alone chooses two experts."""
    table = np.stack([[rng.permutation(EXPERTS)[:2] for _ in range(30)] for _ in range(2)], axis=1)
    return routing_of(table[texts.ids])


def noise(rng: np.random.Generator, texts: Texts) -> Routing:
    """Two layers in which chance chooses."""
    keys = rng.random((len(texts.ids), 2, EXPERTS))
    return routing_of(keys.argsort(-1)[:, :, :2])


def test_npmi_has_the_values_that_its_definition_says() -> None:
    values = npmi(np.array([10.0, 0.0, 5.0, 0.0]), np.array([10.0, 40.0, 50.0, 0.0]), 10.0, 100.0)
    assert values[0] == pytest.approx(1.0)  # only and always together
    assert (values[1], values[3]) == (-1.0, -1.0)  # never together, never used
    assert values[2] == pytest.approx(0.0)  # 5 of 10 where it is used at half of all
    p = 0.08
    assert npmi(np.array([8.0]), np.array([20.0]), 10.0, 100.0)[0] == pytest.approx(
        np.log(p / (0.2 * 0.1)) / -np.log(p)
    )


def test_a_router_that_looks_up_tokens_has_no_matched_difference() -> None:
    rng = np.random.default_rng(0)
    texts = made(rng)
    routing = lookup(rng, texts)
    contrast = contrast_of(texts, "think", None)
    matched = risk_difference(routing, texts, contrast, matched=True)
    assert matched is not None
    assert np.abs(matched.value).max() == pytest.approx(0, abs=1e-12)
    assert (matched.p_value > 0.99).all()
    assert min(predicted_by_token(routing, texts)) > 0.98
    tag = score_function(routing, texts, "rd")(contrast_of(texts, "<tag>", None))
    assert np.abs(tag).max() > 0.5
    assert max(predicted_by_token(noise(rng, texts), texts)) < 0.5


def test_a_context_that_routes_is_what_the_matched_difference_finds() -> None:
    rng = np.random.default_rng(1)
    texts = made(rng)
    experts = lookup(rng, texts).experts.copy()
    # In thoughts a third of the slots of layer 1 go to expert 3, whatever the token.
    moved = (texts.phases == 1) & (rng.random(len(texts.ids)) < 0.33)
    experts[moved, 1] = [3, 4]
    routing = routing_of(experts)
    ranking = rank_experts(routing, texts, RankConfig(by="rd-matched"), "think", Tokenizer())
    assert set(ranking.order[:2]) == {(1, 3), (1, 4)}
    assert ranking.p_holm[1, 3] < 1e-4
    assert (ranking.p_holm[0] > 0.9).all()
    # Where the token chose neither of the two, 0.33 of the uses are new.
    assert 0.1 < ranking.scores["rd-matched"][1, 3] < 0.4


def test_the_error_over_documents_is_that_of_repeated_draws() -> None:
    """Tokens of one document share a coin: the document is the unit, not the token."""
    values, errors, naive = [], [], []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        texts = made(rng, documents=40, length=20)
        coin = rng.random(40)[texts.documents] < 0.5
        experts = np.where(coin[:, None, None], [[[0, 1]]], [[[2, 3]]])
        half = texts.documents % 2 == 0
        contrast = Contrast(half, ~half, between=True)
        estimate = risk_difference(routing_of(experts), texts, contrast, matched=False)
        assert estimate is not None
        values.append(estimate.value[0, 0])
        errors.append(estimate.error[0, 0])
        naive.append(np.sqrt(0.25 / half.sum() * 2))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)
    assert np.mean(naive) < 0.4 * np.std(values)


def test_exchanged_labels_call_five_percent_where_nothing_is_there() -> None:
    values = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        texts = made(rng, documents=44, length=16)
        half = (texts.documents % 2).astype(bool)
        contrast = Contrast(half, ~half, between=True)
        maps, weights, signs = mean_maps(noise(rng, texts), texts, contrast)
        assert not signs
        values.append(exchange_p(maps, weights, signs=signs, draws=199, seed=seed).ravel())
    share = float((np.concatenate(values) <= 0.05).mean())
    assert 0.02 < share < 0.09


def test_a_tag_like_any_other_token_is_reached_by_the_others() -> None:
    rng = np.random.default_rng(4)
    texts = made(rng, documents=120)
    ranking = rank_experts(lookup(rng, texts), texts, RankConfig(types=25), "<tag>", Tokenizer())
    assert ranking.types is not None
    assert ranking.type_p is not None
    assert len(ranking.types.types) == 25
    assert ranking.null()["token_types"]["reached_by"] > 2
    assert (ranking.type_p > 1 / 26).all()
    # An expert of its own is what no other token has.
    experts = lookup(rng, texts).experts.copy()
    experts[experts == 5] = 4
    experts[texts.marks["<tag>"], 1, 0] = 5
    own = rank_experts(routing_of(experts), texts, RankConfig(), "<tag>", Tokenizer())
    assert own.rank_of(1, 5) == 1
    assert own.scores["npmi"][1, 5] == pytest.approx(1.0)
    assert own.null()["token_types"]["reached_by"] == 0
    assert own.row(own.order[0])["type_p"] == pytest.approx(1 / 26)
    assert own.split_half > 0.9


def test_classes_are_compared_by_documents_and_pairs() -> None:
    rng = np.random.default_rng(5)
    texts = made(rng, documents=80)
    experts = noise(rng, texts).experts.copy()
    label = np.arange(80) % 2
    hot = (label[texts.documents] == 0) & (rng.random(len(texts.ids)) < 0.3)
    experts[hot, 0] = [1, 2]
    classes = Classes(("a", "b"), label, np.arange(80) // 2)
    ranking = rank_experts(routing_of(experts), texts, RankConfig(by="ftri"), "a", Tokenizer(),
                           classes)  # fmt: skip
    assert set(ranking.order[:2]) == {(0, 1), (0, 2)}
    assert ranking.p_holm[0, 1] < 0.05
    assert ranking.types is None
    assert ranking.half_documents == 20
    maps, _, signs = mean_maps(routing_of(experts), texts, contrast_of(texts, "a", classes))
    assert signs
    assert len(maps) == 40


def test_what_cannot_be_contrasted_is_refused() -> None:
    texts = made(np.random.default_rng(6), documents=30)
    with pytest.raises(BadInputError, match="'<think>' stands in none of the 30 documents"):
        contrast_of(texts, "<think>", None)
    few = made(np.random.default_rng(6), documents=12)
    with pytest.raises(BadInputError, match=r"'<tag>' stands in 12 of 12 documents.*needs 20"):
        contrast_of(few, "<tag>", None)
    one = Classes(("a", "b"), np.zeros(30, dtype=int))
    with pytest.raises(BadInputError, match="there is one class of documents"):
        contrast_of(texts, "a", one)
    small = Classes(("a", "b"), (np.arange(30) < 11).astype(int))
    with pytest.raises(BadInputError, match="class 'a' has 19 documents and needs 20"):
        contrast_of(texts, "a", small)
    with pytest.raises(BadInputError, match="target 'c' is no class here; use a, b"):
        contrast_of(texts, "c", small)
    with pytest.raises(BadInputError, match="no contrast of answer"):
        contrast_of(texts, "answer", None)
    routing = noise(np.random.default_rng(6), texts)
    with pytest.raises(BadInputError, match="no token of the target stands elsewhere"):
        rank_experts(routing, texts, RankConfig(by="rd-matched"), "<tag>", Tokenizer())


# Padding


def test_padding_is_routed_and_counts_nowhere() -> None:
    model = mixtures.mixture("qwen3-moe")
    routers = find_routers(model)
    words = ["What is 3+4? <think> 3+4=7 </think> <answer> 7 </answer>", "Problem: <think> 1"]
    texts = read_texts(model.tokenizer, [f"{w} {w}"[: 9 + 7 * i] for i, w in
                                         enumerate(words * 4)], tokens=10**6)  # fmt: skip
    ((ids, places),) = padded_batches(texts)
    assert (places < 0).any()
    assert int((places >= 0).sum()) == len(texts.ids)
    routing = route(model, routers, texts)
    assert use_maps(routing, texts, unit="sum").use["all"].sum() * texts.count == pytest.approx(
        len(texts.ids) * 3 * 2
    )
    for number, start, end in texts.rows():
        row = torch.from_numpy(texts.ids[start:end])[None]
        one = Texts(row[0].numpy(), texts.phases[start:end], np.zeros(end - start, dtype=int), {})
        alone = route(model, routers, one)
        assert np.array_equal(np.sort(alone.experts, -1), np.sort(routing.experts[start:end], -1))
        assert number == texts.documents[start]
    assert ids.shape == places.shape


# Random sets


def test_random_sets_are_matched_over_all_layers_and_refused_otherwise() -> None:
    use = np.random.default_rng(2).gamma(2.0, 0.1, size=(4, 16))
    chosen = [(0, 3), (1, 5), (3, 0)]
    sets = matched_sets(use, chosen, 19, most=14, seed=0)
    assert len({one.experts for one in sets}) == 19
    target = use_of(use, chosen)
    for one in sets:
        assert len(set(one.experts)) == 3
        assert not set(one.experts) & set(chosen)
        assert one.use == pytest.approx(use_of(use, one.experts))
        assert abs(one.use - target) <= 0.2 * target
    assert sets == matched_sets(use, chosen, 19, most=14, seed=0)
    most = [tuple(np.unravel_index(i, use.shape)) for i in np.argsort(-use.ravel())[:1]]
    use[most[0]] = 5.0
    with pytest.raises(BadInputError, match=r"0 of 19 random sets of 1 experts match.*% off"):
        matched_sets(use, most, 19, most=14, seed=0)  # type: ignore[arg-type]
    use[0, 0] = 0.0
    with pytest.raises(BadInputError, match="used at no token"):
        matched_sets(use, [(0, 0)], 19, most=14, seed=0)


# Configurations


@pytest.mark.parametrize("text", ["", "5", "5:", "x:1", "5:9,", "-1:2", "5:9,5:9", "5:9:1"])
def test_experts_are_layer_and_expert(text: str) -> None:
    with pytest.raises(BadInputError, match=r"is none; write layer:expert|stands twice"):
        parse_experts(text)


def test_configurations_refuse_what_does_nothing_or_cannot_be() -> None:
    assert parse_experts("5:9, 2:3,5:1") == {5: (9, 1), 2: (3,)}
    for wrong, message in (
        ({"beta": -1.0, "how": "scale"}, "beta -1.0 is out of range"),
        ({"beta": float("nan"), "how": "scale"}, "beta nan is out of range"),
        ({"beta": 2.0}, "beta 2 is of --how scale"),
        ({"how": "scale"}, "changes nothing"),
        ({"random": 18}, "random 18 is out of range; give 19"),
        ({"how": "erase"}, "how 'erase' is unknown"),
    ):
        with pytest.raises(BadInputError, match=message):
            SteerConfig(**wrong)
    assert RankConfig().measure == "npmi"
    assert RankConfig(target="think").measure == "rd"
    assert RankConfig(classes="steps").measure == "ftri"
    assert RankConfig(classes="steps", target="</think>").measure == "npmi"
    with pytest.raises(BadInputError, match="types 19 is out of range; give 20"):
        RankConfig(types=19)


def test_holm_is_over_all_experts() -> None:
    rng = np.random.default_rng(7)
    texts = made(rng)
    ranking = rank_experts(noise(rng, texts), texts, RankConfig(draws=99), "think", Tokenizer())
    assert np.array_equal(ranking.p_holm.ravel(), holm(ranking.p_value.ravel()))
    assert (ranking.p_holm >= ranking.p_value).all()
    contrast = contrast_of(texts, "think", None)
    score = score_function(noise(rng, texts), texts, "rd")
    assert abs(split_halves(texts, contrast, score, 0)[0]) < 0.75
    assert PHASES[1] == "think"
