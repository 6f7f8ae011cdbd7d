from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from resa_lens.errors import BadInputError
from resa_lens.layers.mixture import read_table
from resa_lens.layers.selectors import SELECTORS, middle_layer, recommend, regret

TABLE = Path(__file__).parents[2] / "data" / "paper" / "table6_hookpoints.csv"
LUMP = {layer: int(40 * np.exp(-((layer - 9) ** 2) / 8)) for layer in range(1, 27)}


def test_middle_layer():
    assert middle_layer(28) == 12  # the paper's default
    assert [middle_layer(n) for n in (1, 2, 3, 12, 14, 16, 36)] == [0, 0, 1, 5, 6, 7, 16]
    assert middle_layer(28, [20, 22]) == 20
    with pytest.raises(BadInputError):
        middle_layer(0)


def test_mixture_follows_a_supported_fit():
    result = recommend(LUMP, n_layers=28, draws=100)
    assert (result.selector, result.verdict) == ("mixture", "supported")
    assert result.recommended[0] == 9
    assert result.fit is not None
    assert result.recommended == result.fit.recommended


def test_mixture_falls_back_to_the_middle():
    counts = read_table(TABLE, "feature_count")
    for recipe in ("robust", "paper"):
        result = recommend(counts, n_layers=28, recipe=recipe, draws=100)
        assert (result.selector, result.requested) == ("middle", "mixture")
        assert result.recommended == (12,)
        assert result.reason.startswith("Layer 12 (0-based; 13th of 28), the middle, because")
        json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("table", [dict.fromkeys(range(1, 13), 0), {3: 1, 4: 0}, {5: 2}])
@pytest.mark.parametrize("selector", ["mixture", "most-features", "middle"])
def test_never_empty(table, selector):
    result = recommend(table, n_layers=14, selector=selector, draws=50)
    assert len(result.recommended) >= 1
    assert set(result.recommended) <= set(table)


def test_most_features_breaks_ties_towards_the_middle():
    result = recommend({1: 5, 2: 1, 5: 5, 10: 5, 11: 2}, n_layers=14, selector="most-features")
    assert result.recommended == (5, 10, 1)
    assert "layer 5 (0-based; 6th of 14)" in result.reason.lower()


def test_quality_and_causal_rank_their_tables():
    table = {1: 0.5, 2: 0.1, 3: 0.3}
    best = recommend({}, n_layers=5, selector="quality", quality=table)
    assert best.recommended == (2, 3, 1)
    best = recommend({}, n_layers=5, selector="causal", causal=table)
    assert best.recommended == (1, 3, 2)


def test_every_selector_answers():
    for name in SELECTORS:
        result = recommend(
            LUMP, n_layers=28, selector=name, quality={1: 0.2}, causal={2: 0.3}, draws=50
        )
        assert result.recommended
        assert result.requested == name
        assert json.loads(json.dumps(result.to_dict()))["layers"][0] == {"layer": 1, "features": 0}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"selector": "oracle"}, "oracle"),
        ({"selector": "quality"}, "quality"),
        ({"selector": "causal", "causal": {1: float("nan")}}, "nan"),
        ({"n_layers": 20}, "layer 20"),
        ({"causal": {99: 1.0}}, "layer 99"),
    ],
)
def test_bad_input(options, match):
    with pytest.raises(BadInputError, match=match):
        recommend(LUMP, **{"n_layers": 28, **options})


def test_regret_of_the_papers_table():
    result = regret(read_table(TABLE, "average"), 12)
    assert (result.best, result.chosen, result.ci) == (17, 12, None)
    assert result.regret == pytest.approx(49.42 - 47.28)


def test_regret_of_a_planted_table():
    rng = np.random.default_rng(0)
    truth = {layer: 50.0 - 2.0 * abs(layer - 6) for layer in range(1, 13)}
    table = {layer: (value + 0.5 * rng.normal(size=8)).tolist() for layer, value in truth.items()}
    result = regret(table, 9)
    assert result.best == 6
    assert result.ci is not None
    assert result.ci[0] < 6.0 < result.ci[1]
    assert result.ci[1] - result.ci[0] < 2.5
    best = regret(table, 6)
    assert best.regret == 0.0
    assert best.ci == (0.0, 0.0)


def test_regret_interval_holds_where_all_layers_are_equal():
    # The best of 12 equal layers is luck: the interval must still contain the true regret, 0.
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(100):
        scores = dict(enumerate(rng.normal(size=12)))
        result = regret(scores, 3, se=dict.fromkeys(range(12), 1.0), draws=1000, seed=trial)
        assert result.ci is not None
        held += result.ci[0] == 0.0
    assert held >= 92


def test_regret_bad_input():
    with pytest.raises(BadInputError, match="layer 7"):
        regret({1: 2.0}, 7)
    with pytest.raises(BadInputError, match="standard error"):
        regret({1: 2.0, 2: 3.0}, 1, se={1: 0.1})
    with pytest.raises(BadInputError, match="finite"):
        regret({1: 2.0, 2: float("nan")}, 1)
