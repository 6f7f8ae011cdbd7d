from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from resa_lens.errors import BadInputError
from resa_lens.layers.mixture import read_table
from resa_lens.layers.selectors import SELECTORS, middle_layer, recommend, recommend_all

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
            LUMP, n_layers=28, selector=name, quality={9: 0.2}, causal={9: 0.3},
            insertion={9: 0.1}, gradient={9: 0.1}, change={9: 0.1}, draws=50,
        )  # fmt: skip
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


@pytest.mark.parametrize(
    ("selector", "table"), [("gradient-probe", "gradient"), ("activation-change", "change")]
)
def test_rivals_rank_their_tables_and_give_their_errors(selector: str, table: str) -> None:
    values = {1: (0.5, 0.1), 2: (0.9, 0.02), 3: (0.7, 0.1), 4: (0.1, 0.1)}
    best = recommend({}, n_layers=6, selector=selector, **{table: values})
    assert (best.selector, best.recommended, best.verdict) == (selector, (2, 3, 1), "not tested")
    assert "0.9 (standard error 0.02)" in best.reason
    with pytest.raises(BadInputError, match=f"give {table} ="):
        recommend(LUMP, n_layers=28, selector=selector)
    made = recommend_all({1: 1}, n_layers=6, **{table: values}, draws=50)
    assert selector in made


# Effects and the blend ---------------------------------------------------------------------------


def test_causal_takes_effects_beyond_their_control():
    table = {1: (0.02, 0.02), 2: (0.30, 0.05), 3: (0.50, 0.06), 4: (-0.9, 0.05), 5: (0.0, 0.0)}
    best = recommend({}, n_layers=7, selector="causal", causal=table)
    assert (best.selector, best.verdict) == ("causal", "supported")
    assert best.recommended == (3, 2)  # a layer whose control does more is none to tune
    assert "layer 3 (0-based; 4th of 7)" in best.reason.lower()
    assert "2 of 5 layers are above their control" in best.reason
    json.dumps(best.to_dict(), allow_nan=False)


def test_causal_falls_back_to_the_middle():
    table = {layer: (0.01 * layer, 0.05) for layer in range(1, 11)}
    result = recommend(dict.fromkeys(table, 3), n_layers=12, selector="causal", causal=table)
    assert (result.selector, result.requested) == ("middle", "causal")
    assert result.recommended == (5,)
    assert result.verdict == "not distinguishable from flat"
    assert "no layer's causal effect is above its control's" in result.reason
    assert "Holm's correction for 10 layers" in result.reason


def test_causal_false_alarms_stay_at_their_level():
    # 10 layers without effect: one of them at 5 % each would be chosen in 40 % of the draws.
    rng = np.random.default_rng(0)
    alarms = 0
    for values in rng.normal(size=(300, 10)):
        effects = {layer: (float(v), 1.0) for layer, v in enumerate(values, start=1)}
        result = recommend(dict.fromkeys(effects, 0), n_layers=12, selector="causal",
                           causal=effects)  # fmt: skip
        alarms += result.selector == "causal"
    assert 4 <= alarms <= 28  # 0.05 +- 3.3 standard errors


def test_causal_with_few_controls_uses_students_t():
    # Standard errors from 5 sets: read as if they were known, some layer would pass in 18 %.
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(300):
        scale = np.sqrt(rng.chisquare(4, size=10) / 4)
        effects = {
            layer: (float(v), float(s), 4.0)
            for layer, (v, s) in enumerate(zip(rng.normal(size=10), scale, strict=True), start=1)
        }
        result = recommend(dict.fromkeys(effects, 0), n_layers=12, selector="causal",
                           causal=effects)  # fmt: skip
        alarms += result.selector == "causal"
    assert 4 <= alarms <= 28


def test_blend_ranks_the_tables_that_say_something():
    quality = {layer: abs(layer - 8) / 10 for layer in LUMP}
    result = recommend(LUMP, n_layers=28, selector="blend", quality=quality, draws=50)
    assert result.selector == "blend"
    # Ranks by hand: layer 8 is 2.5 (a tie with 10) and 1, layer 9 is 1 and 2.5 (a tie with 7).
    assert set(result.recommended[:2]) == {8, 9}
    assert result.recommended[0] == 9  # equal mean ranks: the layer nearer the middle, 12
    assert "mean rank, 1.75 of 26, over feature counts and SAE quality" in result.reason
    again = recommend(LUMP, n_layers=28, selector="blend", quality=quality, draws=50)
    assert again == result


def test_blend_leaves_out_what_its_own_test_calls_flat():
    counts = read_table(TABLE, "feature_count")
    effects = dict.fromkeys(counts, (0.01, 0.05))
    quality = {layer: abs(layer - 20.2) for layer in counts}
    result = recommend(
        counts, n_layers=28, selector="blend", quality=quality, causal=effects, draws=50
    )
    assert result.recommended[0] == 20
    assert (
        "over SAE quality; left out: feature counts (not distinguishable from flat) and causal"
        in (result.reason)
    )
    nothing = recommend(counts, n_layers=28, selector="blend", causal=effects, draws=50)
    assert (nothing.selector, nothing.recommended) == ("middle", (12,))
    assert "no table singles out a layer" in nothing.reason


def test_all_selectors_share_one_fit():
    made = recommend_all(LUMP, n_layers=28, quality={9: 0.1, 8: 0.2}, draws=50)
    assert list(made) == ["mixture", "most-features", "middle", "quality", "blend"]
    assert made["mixture"].fit is made["most-features"].fit is made["blend"].fit
    for name, answer in made.items():
        quality = {9: 0.1, 8: 0.2} if name in ("quality", "blend") else None
        assert answer == recommend(LUMP, n_layers=28, selector=name, quality=quality, draws=50)


@pytest.mark.parametrize("selector", SELECTORS)
def test_few_layers_get_a_verdict(selector):
    table = {1: 4, 2: 90, 3: 5, 4: 1, 5: 2}
    result = recommend(
        table, n_layers=7, selector=selector, quality={3: 1.0}, causal={3: 1.0},
        insertion={3: 1.0}, gradient={3: 1.0}, change={3: 1.0}, draws=50,
    )  # fmt: skip
    assert result.recommended
    if selector == "mixture":
        assert result.selector == "middle"
        assert "5 layers are too few to tell" in result.reason


@pytest.mark.parametrize(
    ("causal", "match"),
    [
        ({1: (0.1, 0.0)}, "standard error 0"),
        ({1: (0.1, -1.0)}, "standard error -1"),
        ({1: (0.1, float("nan"))}, "nan"),
        ({1: (0.1, 0.1), 2: 0.3}, "layer 2 .* no standard error"),
        ({1: (0.1, 0.1, 0.1, 0.1)}, "no .effect, standard error."),
        ({1: (0.1, 0.1, 0.0)}, "degrees of freedom above 0"),
    ],
)
def test_bad_effects(causal, match):
    with pytest.raises(BadInputError, match=match):
        recommend(LUMP, n_layers=28, selector="causal", causal=causal)


def test_blend_of_tables_without_a_common_layer():
    with pytest.raises(BadInputError, match="no layer in common"):
        recommend(LUMP, n_layers=40, selector="blend", quality={30: 1.0}, draws=50)


def test_causal_effects_of_no_feature_at_all_say_that() -> None:
    made = recommend(
        {1: 0, 2: 0, 3: 0}, n_layers=5, selector="causal",
        causal={1: (0.0, 0.0), 2: (0.0, 0.0), 3: (0.0, 0.0)},
    )  # fmt: skip
    assert made.selector == "middle"
    assert "no layer has a counted feature" in made.reason
