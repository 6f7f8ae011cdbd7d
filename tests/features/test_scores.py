"""Scores against dense formulas and peers; planted features found; nulls that hold."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats as reference
from sklearn.metrics import roc_auc_score

from resa_lens.errors import BadInputError
from resa_lens.features import contrast_nulls as nulls
from resa_lens.features import scores as module
from resa_lens.features.chance import rule_chance
from resa_lens.features.evidence import (
    REASONING_WORDS,
    Accumulator,
    Evidence,
    PromptActs,
    sparse_rows,
    word_windows,
)
from resa_lens.features.exclusive import RULES, TaggedPrompt, exclusive_features
from resa_lens.features.scores import (
    CORRECTIONS,
    SCORES,
    check_scores,
    intervals,
    midrank_excess,
)
from resa_lens.saes.coder import SparseActs
from resa_lens.stats import TailCounts, circular_shifts, clopper_pearson, sign_flip_p_value


def acts_of(dense: np.ndarray) -> SparseActs:
    """Sparse activations of a dense table [token, feature]."""
    rows, latents = dense.nonzero()
    values = torch.tensor(dense[rows, latents], dtype=torch.float32)
    return SparseActs(torch.tensor(rows), torch.tensor(latents), values, *dense.shape)


def collect(
    dense: np.ndarray,
    reasoning: np.ndarray,
    documents: np.ndarray,
    windows: np.ndarray | None = None,
    words: tuple[str, ...] = (),
    prompt: PromptActs | None = None,
) -> Evidence:
    made = Accumulator(dense.shape[1], words)
    made.add(
        acts_of(dense),
        torch.tensor(reasoning),
        torch.tensor(documents),
        windows=None if windows is None else torch.tensor(windows),
    )
    return made.evidence(prompt)


def thoughts(documents: int, length: int, size: int) -> np.ndarray:
    """Labels of some of each document's tokens, that begin at a place of its own.

    Where every document thinks at the same positions, no position tells thoughts from others.
    """
    place, begins = np.arange(length), (np.arange(documents) * 7) % (length - size)
    return ((place >= begins[:, None]) & (place < begins[:, None] + size)).flatten()


def drawn(
    documents: int = 12, features: int = 7, seed: int = 0, length: int = 30
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dense activations with many zeros and ties, labels of the middle third, documents."""
    rng = np.random.default_rng(seed)
    tokens = documents * length
    dense = rng.integers(1, 5, size=(tokens, features)) * (rng.random((tokens, features)) < 0.3)
    reasoning = thoughts(documents, length, length // 3)
    return dense.astype(np.float64), reasoning, np.repeat(np.arange(documents), length)


# Values, against dense formulas and peers


def test_cohens_d_is_that_of_the_dense_activations() -> None:
    dense, reasoning, documents = drawn()
    found = SCORES["cohens_d"](collect(dense, reasoning, documents), 1, 0)
    a, b = dense[reasoning], dense[~reasoning]
    pooled = ((len(a) - 1) * a.var(0, ddof=1) + (len(b) - 1) * b.var(0, ddof=1)) / (len(dense) - 2)
    np.testing.assert_allclose(found.values, (a.mean(0) - b.mean(0)) / np.sqrt(pooled))
    # Two groups' t is d times a function of the sizes.
    t = np.asarray(reference.ttest_ind(a, b)[0])
    np.testing.assert_allclose(found.values, t * math.sqrt(1 / len(a) + 1 / len(b)))


def test_auc_counts_ties_exactly() -> None:
    dense, reasoning, documents = drawn()
    found = SCORES["auc"](collect(dense, reasoning, documents), 1, 0)
    for column, value in zip(dense.T, found.values, strict=True):
        assert value == pytest.approx(roc_auc_score(reasoning, column), abs=1e-12)
        u = reference.mannwhitneyu(column[reasoning], column[~reasoning]).statistic
        assert value == pytest.approx(u / (reasoning.sum() * (~reasoning).sum()), abs=1e-12)


def test_midranks_are_scipys() -> None:
    dense, reasoning, documents = drawn()
    evidence = collect(dense, reasoning, documents)
    ranks = reference.rankdata(dense, axis=0)
    expected = (ranks - ranks.min(0)) * (dense > 0)
    np.testing.assert_allclose(midrank_excess(evidence.acts).toarray(), expected.T)


def test_frequency_ratio_is_smoothed() -> None:
    dense, reasoning, documents = drawn()
    dense[reasoning, 0] = 0
    found = SCORES["frequency_ratio"](collect(dense, reasoning, documents), 1, 0)
    inside, outside = (dense[g] > 0 for g in (reasoning, ~reasoning))
    expected = (inside.sum(0) + 0.5) / (len(inside) + 1) / (outside.sum(0) + 0.5)
    np.testing.assert_allclose(found.values, expected * (len(outside) + 1))
    assert 0 < found.values[0] < 0.05


def dense_reason_score(dense: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """The formula of arXiv 2503.18878 as written, word by word and feature by feature."""
    near = windows.any(0)
    plus, minus = dense[near].mean(0), dense[~near].mean(0)
    out = []
    for i in range(dense.shape[1]):
        means = [dense[w, i].mean() if w.any() else 0.0 for w in windows]
        shares = [m / sum(means) for m in means] if sum(means) else [0.0] * len(means)
        h = -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(windows))
        out.append(plus[i] / plus.sum() * h**0.7 - minus[i] / minus.sum())
    return np.array(out)


def test_reason_score_is_its_formula() -> None:
    dense, reasoning, documents = drawn(seed=3)
    rng = np.random.default_rng(5)
    windows = rng.random((4, len(dense))) < 0.06
    windows[3] = False  # a word that does not occur still counts in log(number of words)
    dense[windows.any(0), 2] = 0  # silent near every word
    evidence = collect(dense, reasoning, documents, windows, ("a", "b", "c", "d"))
    found = SCORES["reason_score"](evidence, 3, 0)
    np.testing.assert_allclose(found.values, dense_reason_score(dense, windows), atol=1e-5)
    assert found.values[2] < 0
    near = windows.any(0)
    assert found.sizes["reasoning_tokens"] == near.sum()
    assert found.sizes["reasoning_documents"] == len(set(documents[near]))


def test_reason_score_of_one_word_has_no_entropy() -> None:
    dense, reasoning, documents = drawn()
    windows = np.random.default_rng(0).random((1, len(dense))) < 0.1
    found = SCORES["reason_score"](collect(dense, reasoning, documents, windows, ("a",)), 1, 0)
    near = windows[0]
    plus, minus = dense[near].mean(0), dense[~near].mean(0)
    np.testing.assert_allclose(found.values, plus / plus.sum() - minus / minus.sum())


def test_batches_in_any_order_give_the_same() -> None:
    """Also where documents come interleaved, and where rows are left out."""
    dense, reasoning, documents = drawn()
    whole = collect(dense, reasoning, documents)
    made = Accumulator(dense.shape[1])
    extra = np.vstack([dense, 9 * np.ones((1, dense.shape[1]))])
    for doc in (5, 3, 0, 11, 1, 2, 4, 6, 7, 8, 9, 10):
        rows = np.append(np.flatnonzero(documents == doc), len(dense))
        made.add(
            acts_of(extra[rows]),
            torch.tensor(np.append(reasoning, True)[rows]),
            torch.full((len(rows),), doc),
            keep=torch.arange(len(rows)) < len(rows) - 1,
        )
    for name in ("cohens_d", "auc"):
        a, b = (SCORES[name](e, 50, 1) for e in (whole, made.evidence()))
        np.testing.assert_array_equal(a.p, b.p)
        np.testing.assert_allclose(a.values, b.values)


def test_silent_features_are_left_out_and_counts_are_right() -> None:
    dense, reasoning, documents = drawn()
    dense[:, 4] = 0
    dense[documents != 2, 5] = 0
    evidence = collect(dense, reasoning, documents)
    found = SCORES["auc"](evidence, 1, 0)
    assert found.features.tolist() == [0, 1, 2, 3, 5, 6]
    assert found.active_tokens.tolist() == (dense > 0).sum(0)[[0, 1, 2, 3, 5, 6]].tolist()
    assert found.active_documents.tolist() == [12, 12, 12, 12, 1, 12]
    assert found.sizes == {
        "reasoning_tokens": 120, "other_tokens": 240,
        "reasoning_documents": 12, "other_documents": 12,
    }  # fmt: skip
    assert evidence.design == "phases"


def test_nothing_dense_is_needed_for_65536_latents() -> None:
    """The whole range of latents, a few active: results are those of the few."""
    dense, reasoning, documents = drawn()
    acts = acts_of(dense)
    made = Accumulator(65_536)
    wide = SparseActs(acts.rows, acts.latents * 9_000, acts.values, acts.n_rows, 65_536)
    made.add(wide, torch.tensor(reasoning), torch.tensor(documents))
    found, narrow = SCORES["auc"](made.evidence(), 50, 0), collect(dense, reasoning, documents)
    assert found.features.tolist() == [9_000 * i for i in range(7)]
    np.testing.assert_array_equal(found.p, SCORES["auc"](narrow, 50, 0).p)


def test_blocks_of_features_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, reasoning, documents = drawn()
    windows = np.random.default_rng(0).random((2, len(dense))) < 0.1
    for labels in (reasoning, documents < 6):
        evidence = collect(dense, labels, documents, windows, ("a", "b"))
        names = ("cohens_d", "reason_score")
        whole = [SCORES[name](evidence, 80, 0) for name in names]
        with monkeypatch.context() as patched:
            patched.setattr(nulls, "ROWS", 2)
            patched.setattr(nulls, "PAIRS", 5)
            patched.setattr(nulls, "FEW", 7)
            patched.setattr("resa_lens.stats.arrays.CHUNK", 1000)
            parts = [SCORES[name](evidence, 80, 0) for name in names]
        for a, b in zip(whole, parts, strict=True):
            np.testing.assert_allclose(a.values, b.values)
            # Offsets are drawn part by part, so only the chance differs.
            np.testing.assert_allclose(a.p, b.p, atol=0.25)


# Nulls


def runs_of_activity(
    seed: int, documents: int, features: int, length: int = 60, run: int = 12, share: float = 0.7
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features that fire in runs at random places of most documents, whatever the label."""
    rng = np.random.default_rng(seed)
    place = np.arange(length)
    begins = rng.integers(0, length, size=(documents, features))
    on = ((place[None, :, None] - begins[:, None]) % length < run) & (
        rng.random((documents, 1, features)) < share
    )
    strength = rng.lognormal(size=(documents, 1, features))
    dense = (on * strength * rng.lognormal(size=on.shape)).reshape(-1, features)
    # The thoughts are a quarter of the document: unequal groups.
    labels = thoughts(documents, length, length // 4)
    return dense, labels, np.repeat(np.arange(documents), length)


def token_level_p(dense: np.ndarray, labels: np.ndarray, draws: int = 200) -> np.ndarray:
    """The test that must not be used: single tokens' labels are shuffled."""
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(np.tile(labels, (draws, 1)), axis=1)
    null, seen = shuffled @ dense, labels @ dense
    tails = ((null >= seen).sum(0), (null <= seen).sum(0))
    return np.minimum(1, 2 * (1 + np.minimum(*tails)) / (1 + draws))


@pytest.mark.parametrize("name", ["cohens_d", "auc", "frequency_ratio"])
def test_the_null_within_documents_holds_where_tokens_are_dependent(name: str) -> None:
    dense, labels, documents = runs_of_activity(0, 20, 600)
    found = SCORES[name](collect(dense, labels, documents), 400, 1)
    share = (found.p <= 0.05).mean()
    assert clopper_pearson(int((found.p <= 0.05).sum()), 600, 0.99)[0] < 0.05, share
    assert share > 0.02, "a test that never rejects holds nothing"
    # The same data by a permutation of tokens: wrong in half of the features.
    if name == "cohens_d":
        assert (token_level_p(dense, labels) <= 0.05).mean() > 0.3


def test_rare_features_are_no_reasoning_features_and_no_others() -> None:
    """One activation in each of 8 documents of 40: all may well lie outside of the thoughts.

    Their chance is 0.75^8 = 0.1; flipping the signs of the documents' differences, all of them
    negative then, gives 2 x 2^-8, and so too many features.
    """
    rng = np.random.default_rng(2)
    dense, labels, documents = runs_of_activity(2, 40, 400)
    dense[:] = 0
    for feature in range(400):
        chosen = rng.choice(40, 8, replace=False)
        dense[chosen * 60 + rng.integers(0, 60, 8), feature] = 1 + rng.random(8)
    found = SCORES["auc"](collect(dense, labels, documents), 400, 0)
    assert clopper_pearson(int((found.p <= 0.05).sum()), 400, 0.99)[0] < 0.05
    inside, outside = (
        np.stack([dense[documents == d][labels[documents == d] == side].mean(0) for d in range(40)])
        for side in (True, False)
    )
    flipped = sum(sign_flip_p_value(d, 400) <= 0.05 for d in (inside - outside).T)
    assert clopper_pearson(flipped, 400, 0.99)[0] > 0.05


@pytest.mark.parametrize("name", ["cohens_d", "auc", "frequency_ratio"])
def test_the_null_between_documents_holds_with_unequal_lengths(name: str) -> None:
    """Ten long documents of reasoning against thirty short ones, features that follow documents."""
    rng = np.random.default_rng(3)
    lengths = np.append(np.full(10, 60), np.full(30, 15))
    documents = np.repeat(np.arange(40), lengths)
    level = rng.lognormal(size=(40, 500)) * (rng.random((40, 500)) < 0.6)
    dense = level[documents] * (rng.random((len(documents), 500)) < 0.4)
    evidence = collect(dense, documents < 10, documents)
    assert evidence.design == "documents"
    found = SCORES[name](evidence, 400, 0)
    share = (found.p <= 0.05).mean()
    assert 0.01 < share < 0.09, share
    if name == "cohens_d":
        assert (token_level_p(dense, documents < 10) <= 0.05).mean() > 0.3
    # Beyond position 15 the long documents are alone: single nulls scatter, their mean does not.
    assert found.null.mean() == pytest.approx({"cohens_d": 0, "auc": 0.5}.get(name, 1.0), abs=0.03)


@pytest.mark.parametrize("correction", ["bh", "holm"])
def test_without_effect_few_runs_call_anything(correction: str) -> None:
    """60 runs of 15 features: a run with any q below 0.05 is a false alarm."""
    dense, labels, documents = runs_of_activity(4, 20, 900)
    p = SCORES["auc"](collect(dense, labels, documents), 1000, 0).p
    alarms = sum(bool((CORRECTIONS[correction](r) < 0.05).any()) for r in np.split(p, 60))
    assert clopper_pearson(alarms, 60, 0.99)[0] < 0.05, alarms


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Feature 0 fires more in the thoughts, 1 less, 2 to 19 anywhere in runs."""
    dense, labels, documents = runs_of_activity(seed, 24, 20)
    rng = np.random.default_rng(seed)
    dense[:, 0] += 4 * labels * (rng.random(len(labels)) < 0.5)
    dense[:, 1] = (1 - labels) * (rng.random(len(labels)) < 0.5)
    return dense, labels, documents


@pytest.mark.parametrize(("name", "none"), [("cohens_d", 0), ("auc", 0.5), ("frequency_ratio", 1)])
@pytest.mark.parametrize("design", ["phases", "documents"])
def test_planted_features_are_found_with_their_sign(name: str, none: float, design: str) -> None:
    dense, labels, documents = planted()
    if design == "documents":
        documents = documents * 2 + labels
    evidence = collect(dense, labels, documents)
    assert evidence.design == design
    found = SCORES[name](evidence, 1000, 0)
    q = CORRECTIONS["bh"](found.p)
    assert (q[:2] < 0.05).all()
    assert found.values[0] > found.null[0]
    assert found.values[1] < found.null[1]
    assert (q[2:] < 0.05).sum() <= 2
    assert found.null[2:].mean() == pytest.approx(none, abs=0.1)
    low, high = intervals(name, evidence, [0, 1], draws=200).T
    assert low[0] > none
    assert high[1] < none
    assert ((low <= found.values[:2]) & (found.values[:2] <= high)).all()


def test_reason_score_finds_the_features_of_the_words() -> None:
    rng = np.random.default_rng(0)
    dense, labels, documents = runs_of_activity(1, 24, 20)
    windows = np.zeros((3, len(labels)), dtype=bool)
    for row, column in itertools.product(range(3), range(24)):
        at = column * 60 + rng.integers(1, 57)
        windows[row, at - 1 : at + 3] = True
    dense[:, 0] = windows.any(0) * (rng.random(len(labels)) < 0.8)
    dense[:, 1] = 5 * windows[0]  # of one word alone: no spread
    evidence = collect(dense, labels, documents, windows, ("a", "b", "c"))
    found = SCORES["reason_score"](evidence, 500, 0)
    q = CORRECTIONS["bh"](found.p)
    assert found.values.argmax() == 0
    assert q[0] < 0.05
    assert found.values[0] > 0.02 > found.null[0]
    assert (q[2:] < 0.05).sum() <= 1
    low, high = intervals("reason_score", evidence, [0], draws=200)[0]
    assert 0 < low < found.values[0] < high


def test_intervals_come_of_weighted_documents() -> None:
    """A weight of two is the document twice: every score, against the evidence so built."""
    dense, reasoning, documents = drawn(documents=4)
    windows = np.random.default_rng(0).random((2, len(dense))) < 0.2
    evidence = collect(dense, reasoning, documents, windows, ("a", "b"))
    counts = np.array([2.0, 0.0, 1.0, 1.0])
    rows = np.concatenate([np.flatnonzero(documents == d) for d in (0, 0, 2, 3)])
    twice = collect(
        dense[rows], reasoning[rows], np.repeat(np.arange(4), 30), windows[:, rows], ("a", "b")
    )
    for name in ("cohens_d", "auc", "frequency_ratio", "reason_score"):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(module, "_document_weights", lambda *_: counts[:, None])
            low, high = intervals(name, evidence, range(7)).T
        np.testing.assert_allclose(low, SCORES[name](twice, 1, 0).values, atol=1e-12)
        np.testing.assert_array_equal(low, high)


# The exclusive rules


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("ignore_first", [False, True])
def test_chance_of_a_rule_is_that_of_all_placements(rule: str, ignore_first: bool) -> None:
    """Every placement of one span of two tokens and three of one, by enumeration."""
    n, opened, closed = 7, (1, 2), (1, 1)
    for active in ((0,), (3,), (2, 3), (0, 4), (1, 2, 5), (0, 3, 4, 6), (1, 2, 3, 4), range(6)):
        latents = acts_of(np.isin(np.arange(n), list(active))[:, None].astype(float))
        good = total = 0
        for starts in itertools.permutations(range(n), 4):
            spans = [
                tuple(range(s, s + size))
                for s, size in zip(starts, (*opened, *closed), strict=True)
            ]
            flat = [p for span in spans for p in span]
            if len(set(flat)) < 5 or max(flat) >= n:
                continue
            prompt = TaggedPrompt(
                "", tuple(range(n)), ("x",) * n, tuple(spans[:2]), tuple(spans[2:])
            )
            total += 1
            good += exclusive_features(latents, prompt, ignore_first=ignore_first)[rule] == (0,)
        found = rule_chance(rule, frozenset(active), n, opened, closed, ignore_first)
        assert found == pytest.approx(good / total), active


def test_chance_of_a_rule_in_closed_form() -> None:
    assert rule_chance("all", frozenset({1, 5, 7, 30}), 40, (1, 1), (1, 1)) == pytest.approx(
        1 / math.comb(40, 4)
    )
    assert rule_chance("any", frozenset({1, 5}), 40, (1, 1), (1, 1)) == pytest.approx(
        4 / math.comb(40, 2)
    )
    assert rule_chance("either", frozenset({1}), 40, (1, 1), (1, 1)) == pytest.approx(4 / 40)


def test_rules_as_scores() -> None:
    prompt = TaggedPrompt("", tuple(range(8)), tuple("o<>o<o>o"), ((1,), (4,)), ((2,), (6,)))
    table = np.zeros((8, 5))
    table[[1, 2, 4, 6], 0] = 1
    table[[1, 2], 1] = 1
    table[[1, 3], 2] = 1
    table[:, 4] = 1
    dense, reasoning, documents = drawn()
    evidence = collect(dense, reasoning, documents, prompt=PromptActs(acts_of(table), prompt))
    found = SCORES["all"](evidence, 1, 0)
    assert found.features.tolist() == [0, 1, 2, 4]
    assert found.values.tolist() == [1, 0, 0, 0]
    np.testing.assert_allclose(found.p, [1 / math.comb(8, 4), 1, 1, 1])
    np.testing.assert_allclose(found.null, [1 / math.comb(8, 4), 0, 0, 0])
    assert SCORES["any"](evidence, 1, 0).values.tolist() == [1, 1, 0, 0]
    assert np.isnan(intervals("all", evidence, [0])).all()
    with pytest.raises(BadInputError, match="'any' is about the tagged prompt"):
        SCORES["any"](replace(evidence, prompt=None), 1, 0)


# Reasoning words


def test_words_are_found_by_characters() -> None:
    text = "But butter, let me wait. WAIT"
    offsets = [(i, i + 1) for i in range(len(text))]
    marked = word_windows(text, offsets, ("but", "let me", "wait", "hmm"), (0, 0))
    assert marked.sum(1).tolist() == [3, 6, 8, 0]
    assert marked[0].nonzero()[:, 0].tolist() == [0, 1, 2]


def test_windows_are_cut_at_the_ends_of_a_document() -> None:
    text = "= 1 2 3 4 5 ="
    offsets = [(i, i + 1) for i in range(0, len(text), 2)]
    marked = word_windows(text, offsets, ("=",))
    assert marked[0].tolist() == [True, True, True, False, False, True, True]


def test_the_default_words_are_ten_and_none_twice() -> None:
    assert len(set(REASONING_WORDS)) == 10


# What stats.py draws for them


def test_shifts_rotate_each_document_by_itself() -> None:
    lengths = [4, 1, 6]
    index = np.concatenate(list(circular_shifts(lengths, 3000, 1)))
    assert index.shape == (3000, 11)
    place = 0
    for n in lengths:
        block = index[:, place : place + n] - place
        assert ((np.diff(block, axis=1) % n == 1) | (n == 1)).all()
        counts = np.bincount(block[:, 0], minlength=n)
        assert reference.chisquare(counts).pvalue > 0.001 if n > 1 else counts.tolist() == [3000]
        place += n
    # Documents turn independently of each other.
    assert abs(np.corrcoef(index[:, 0], index[:, 5])[0, 1]) < 0.08


def test_tails_count_ties_and_both_sides() -> None:
    tails = TailCounts([1.0, 5.0, 0.3], 4)
    null = np.array([[0.0, 1.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [0.1 + 0.2] * 4])
    tails.add(null[:2], slice(0, 2))
    tails.add(null[2:], slice(2, 3))
    np.testing.assert_allclose(tails.upper(), [4 / 5, 1 / 5, 1])
    np.testing.assert_allclose(tails.two_sided(), [1, 2 / 5, 1])


# Bad input


def test_refusals() -> None:
    dense, reasoning, documents = drawn()
    with pytest.raises(BadInputError, match="no token was given"):
        Accumulator(4).evidence()
    with pytest.raises(BadInputError, match="0 documents hold reasoning text"):
        collect(dense, np.zeros_like(reasoning), documents)
    with pytest.raises(BadInputError, match="1 document holds reasoning text"):
        collect(dense, reasoning & (documents == 3), documents)
    with pytest.raises(BadInputError, match="1 document holds other text"):
        collect(dense, documents > 0, documents)
    with pytest.raises(BadInputError, match="no feature is active"):
        collect(0 * dense, reasoning, documents)
    with pytest.raises(BadInputError, match="score 'best' is unknown; use all, any, either"):
        check_scores(["auc", "best"])


def test_a_text_without_the_words_is_a_clear_message() -> None:
    dense, reasoning, documents = drawn()
    silent = np.zeros((2, len(dense)), dtype=bool)
    for windows, what in ((silent, r"none .* 'hmm'\) occurs"), (~silent, "near every token")):
        evidence = collect(dense, reasoning, documents, windows, ("wait", "hmm"))
        with pytest.raises(BadInputError, match=what):
            SCORES["reason_score"](evidence, 1, 0)


def test_values_that_are_not_above_zero_are_silent() -> None:
    acts = SparseActs(
        torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), torch.tensor([0.0, 2.0, -1.0]), 2, 3
    )
    assert sparse_rows(acts).toarray().tolist() == [[0, 0, 0], [2, 0, 0]]
