"""Nulls of the contrasts: positions and documents alone call nothing, planted features stay."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.contrast_nulls import (
    NULL,
    PLANTED,
    ceiling,
    draw_text,
    former_tails,
    kinds_of,
    plant,
)
from resa_lens.features.contrast_nulls import split_labels
from resa_lens.features.scores import CONTRASTS, SCORES
from resa_lens.stats import centred_within, clopper_pearson, position_exchanges, positions_of

LENGTHS = np.array([3, 9, 5, 5, 1, 30])
DOCUMENT = np.repeat(np.arange(6), LENGTHS)


def test_an_exchange_keeps_every_position_and_is_a_permutation() -> None:
    place = positions_of(LENGTHS)
    for index in np.concatenate(list(position_exchanges(LENGTHS, 40, 1))):
        assert sorted(index) == list(range(place.size))
        np.testing.assert_array_equal(place[index], place)


def test_sequences_of_one_length_are_exchanged_whole() -> None:
    owner = np.repeat(np.arange(8), 6)
    for index in np.concatenate(list(position_exchanges([6] * 8, 30, 0))):
        sources = owner[index].reshape(8, 6)
        assert (sources == sources[:, :1]).all()
        assert sorted(sources[:, 0]) == list(range(8))


def test_each_source_is_as_likely_as_any_that_reaches_the_position() -> None:
    index = np.concatenate(list(position_exchanges(LENGTHS, 6000, 2)))
    place = positions_of(LENGTHS)
    for position in (0, 2, 4, 8):
        reach = np.flatnonzero(place == position)
        share = [[(index[:, i] == j).mean() for j in reach] for i in reach]
        np.testing.assert_allclose(share, 1 / reach.size, atol=0.03)


def test_parts_of_the_draws_are_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resa_lens.stats.arrays.CHUNK", 200)
    parts = list(position_exchanges(LENGTHS, 10, 3))
    assert [len(part) for part in parts] == [3, 3, 3, 1]
    for index in np.concatenate(parts):
        assert sorted(index) == list(range(LENGTHS.sum()))


def test_what_positions_and_documents_say_is_taken_out() -> None:
    rng, place = np.random.default_rng(0), positions_of(LENGTHS)
    by_place, by_document = rng.normal(size=30), rng.normal(size=6)
    explained = by_place[place] + by_document[DOCUMENT]
    np.testing.assert_allclose(centred_within(explained, LENGTHS), 0, atol=1e-8)
    # Against a dense least-squares fit.
    values = rng.normal(size=place.size)
    design = np.hstack([np.eye(30)[place], np.eye(6)[DOCUMENT]])
    fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    np.testing.assert_allclose(centred_within(values, LENGTHS), values - fitted, atol=1e-8)


@pytest.mark.parametrize("layout", ["short", "apart"])
@pytest.mark.parametrize("name", list(CONTRASTS))
def test_a_feature_of_fixed_positions_is_what_the_null_expects(layout: str, name: str) -> None:
    """Positions explain it to the last: the null is the value, and it is never called."""
    text = draw_text(layout, np.random.default_rng([0]))
    place = positions_of(text.lengths)
    acts = np.stack([np.isin(place, at) for at in ([3], [20, 21], [40])]).astype(float)
    evidence = text.evidence(acts)
    found = SCORES[name](evidence, 99, 0)
    assert (found.p > 0.5).all()
    np.testing.assert_allclose(found.values, found.null, atol=1e-9)
    # The former null calls those that stand where thoughts are likelier, or less likely.
    former = former_tails(CONTRASTS[name].transform(evidence.acts), evidence, 99, 0)
    assert (former.two_sided() <= 0.05).any()


def test_labels_that_positions_settle_leave_nothing_to_test() -> None:
    text = draw_text("short", np.random.default_rng([0]))
    same = np.full(20, 30)
    settled = type(text)(same, np.tile(np.arange(30) >= 12, 20))
    rng = np.random.default_rng(1)
    evidence = settled.evidence(plant(PLANTED["20 % in thoughts, 4 % elsewhere"], settled, 5, rng))
    assert split_labels(evidence).informative == 0
    np.testing.assert_array_equal(SCORES["auc"](evidence, 50, 0).p, 1)
    ones = text.evidence(np.ones((1, text.reasoning.size)))
    assert 0.3 < split_labels(ones).informative < 0.6


# Seeds of their own: the design was chosen on others.  In docs/log.md the whole is recorded.


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (layout, kind)
        for layout in ("short", "apart")
        for kind in NULL
        # Where whole documents are the groups, a kind may follow the label: it is no null there.
        if kind in kinds_of(layout)
    ],
)
def test_features_that_know_nothing_are_called_at_the_level(layout: str, kind: str) -> None:
    called = tested = 0
    for seed in (300, 301, 302):
        text = draw_text(layout, np.random.default_rng([seed]))
        acts = plant(NULL[kind], text, 80, np.random.default_rng([seed, 1]))
        p = SCORES["cohens_d"](text.evidence(acts), 199, seed).p
        called, tested = called + int((p <= 0.05).sum()), tested + p.size
    low, high = clopper_pearson(called, tested, 0.99)
    assert low < 0.05 < high, (called, tested)


@pytest.mark.parametrize("layout", ["short", "apart"])
@pytest.mark.parametrize("kind", ["20 % in thoughts, 4 % elsewhere", "1 %, 4 %"])
def test_planted_features_are_still_called(layout: str, kind: str) -> None:
    text = draw_text(layout, np.random.default_rng([310]))
    acts = plant(PLANTED[kind], text, 40, np.random.default_rng([310, 1]))
    found = SCORES["cohens_d"](text.evidence(acts), 199, 0)
    assert (found.p <= 0.05).mean() >= 0.8
    sign = 1 if kind.startswith("20") else -1
    assert (sign * (found.values - found.null) > 0).all()


def test_the_ceiling_is_what_drawn_features_reach_and_the_level_where_rates_are_equal() -> None:
    rng = np.random.default_rng(3)
    text = draw_text("tied", rng)
    left = split_labels(text.evidence(np.ones((1, text.reasoning.size)))).left
    assert ceiling(left, text.reasoning, 0.03, 0.03) == pytest.approx(0.05)
    rate = np.where(text.reasoning, 0.06, 0.03)
    for spread in (0.0, 1.0):
        acts = (rng.random((4000, rate.size)) < rate) * rng.lognormal(0, spread, (4000, rate.size))
        sums = acts @ left
        # The standard deviation is known from features of the same kind.
        power = (np.abs(sums) > 1.96 * sums.std()).mean()
        assert ceiling(left, text.reasoning, 0.06, 0.03, spread) == pytest.approx(power, abs=0.03)
