from __future__ import annotations

import json

import numpy as np
import pytest

from resa_lens.errors import BadInputError
from resa_lens.layers.stability import Stability, stability

LAYERS = range(1, 27)


def lump(seed, centre=9, n=120):
    share = np.exp(-((np.arange(1, 27) - centre) ** 2) / 8) + 0.02
    counts = np.random.default_rng(seed).multinomial(n, share / share.sum())
    return dict(zip(LAYERS, counts.tolist(), strict=True))


def flat(seed, n=120):
    counts = np.random.default_rng(seed).multinomial(n, np.ones(26) / 26)
    return dict(zip(LAYERS, counts.tolist(), strict=True))


def crossed(make):
    """Tables of two prompts and three SAE seeds: make(prompt, seed)."""
    tables, factors = {}, {}
    for prompt in ("r1", "short"):
        for seed in range(3):
            name = f"{prompt}/{seed}"
            tables[name] = make(prompt, seed)
            factors[name] = {"prompt": prompt, "SAE seed": str(seed)}
    return tables, factors


def judged(tables, factors=None, block="SAE seed", **options):
    return stability(
        tables, n_layers=28, factors=factors, block=block if factors else None, draws=199, **options
    )


def test_a_lump_that_returns_is_stable():
    tables, factors = crossed(lambda prompt, seed: lump([seed, prompt == "r1"]))
    found = judged(tables, factors)
    assert found.verdict == "stable"
    assert list(found.first) == [9]
    assert found.first[9] == 6
    assert (len(found.pairs), found.blocks) == (15, 3)
    by = {item.factor: item for item in found.factors}
    assert (by["prompt"].pairs, by["SAE seed"].pairs) == (3, 6)
    assert by["SAE seed"].spearman > 0.5
    assert found.between.pairs == 12
    assert found.between.spearman_p == pytest.approx(1 / 200)
    assert (found.between.same_first, found.between.answered) == (12, 12)
    assert found.between.chance == pytest.approx(1 / 26)
    aligned = [pair for pair in found.pairs if pair.alignment is not None]
    assert aligned
    assert all(pair.alignment < 1.5 for pair in aligned if pair.alignment_p <= 0.05)
    assert "comes first in 6 of 6 tables" in found.reason
    assert Stability.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_lumps_that_move_with_the_seed_are_not():
    centres = (4, 14, 23)
    tables, factors = crossed(lambda prompt, seed: lump([seed, prompt == "r1"], centres[seed]))
    found = judged(tables, factors)
    assert found.verdict == "not stable"
    assert found.between.spearman_p > 0.1
    by = {item.factor: item for item in found.factors}
    # Within a seed both prompts agree: that is what would mislead without other seeds.
    assert by["prompt"].spearman > 0.5
    assert (by["prompt"].same_first, by["prompt"].answered) == (3, 3)
    assert by["SAE seed"].same_first == 0


def test_a_layer_that_one_seed_alone_puts_first_does_not_return():
    """Four of six tables agree, but all of one SAE: the other seed's tables single out none."""
    whole = lump(0)
    # The same profile with a tenth of the features, too few to tell.
    thin = {layer: round(count / 10) for layer, count in whole.items()}
    tables, factors = {}, {}
    for seed, prompts in ((0, "abcd"), (1, "ab")):
        for prompt in prompts:
            tables[f"{prompt}/{seed}"] = thin if seed else whole
            factors[f"{prompt}/{seed}"] = {"prompt": prompt, "SAE seed": str(seed)}
    found = judged(tables, factors)
    assert list(found.first.values()) == [4]
    assert found.between.spearman_p <= 0.05
    assert found.between.answered == 0
    assert found.verdict == "not stable"
    assert "4 of 6 tables (4 single out a layer), all of one SAE seed" in found.reason


def test_flat_tables_have_nothing_to_return():
    tables, factors = crossed(lambda prompt, seed: flat([seed, prompt == "r1"]))
    found = judged(tables, factors)
    assert found.verdict == "not testable"
    assert found.first == {}
    assert "None of 6 tables singles out a layer" in found.reason
    assert "middle" in found.next_step
    assert all(pair.same_first is None for pair in found.pairs)


def test_one_seed_is_no_independent_evidence():
    tables = {"r1": lump(0), "short": lump(1)}
    factors = {"r1": {"prompt": "r1", "seed": "0"}, "short": {"prompt": "short", "seed": "0"}}
    found = judged(tables, factors, block="seed")
    assert (found.verdict, found.between, found.blocks) == ("not testable", None, 1)
    assert "share one seed" in found.reason
    assert "second seed" in found.next_step


def test_null_keeps_what_a_block_shares():
    # Three copies of one profile in each of two blocks that have nothing to do with each other:
    # one pair's worth of evidence, so p is uniform.  Moved table by table it would be 9 pairs'.
    p_values = []
    for trial in range(40):
        rng = np.random.default_rng(trial)
        profiles = [dict(zip(range(5), rng.permutation(5).tolist(), strict=True)) for _ in "ab"]
        factors = {f"{s}/{c}": {"copy": str(c), "seed": str(s)} for s in range(2) for c in range(3)}
        tables = {name: profiles[int(item["seed"])] for name, item in factors.items()}
        found = stability(tables, n_layers=7, factors=factors, block="seed", draws=199)
        p_values.append(found.between.spearman_p)
    assert np.mean(np.array(p_values) <= 0.1) <= 0.25
    assert 0.35 < np.mean(p_values) < 0.7


def test_tables_without_factors_are_blocks_of_their_own():
    found = judged({"a": lump(0), "b": lump(1), "c": lump(2)})
    assert found.verdict == "stable"
    assert found.between.factor == "between tables"
    assert found.blocks == 3


def test_few_layers_get_a_verdict():
    tables = {"a": {1: 5, 2: 90, 3: 4}, "b": {1: 4, 2: 80, 3: 9}}
    found = stability(tables, n_layers=5, draws=50)
    assert found.verdict == "not testable"
    assert {row.verdict for row in found.tables} == {"not distinguishable from flat"}
    assert stability({"a": {1: 5}, "b": {1: 4}}, n_layers=3, draws=50).verdict == "not testable"
    zero = dict.fromkeys(LAYERS, 0)
    assert stability({"a": zero, "b": zero}, n_layers=28, draws=50).between.spearman is None


@pytest.mark.parametrize(
    ("tables", "options", "match"),
    [
        ({"a": {1: 2}}, {}, "1 table"),
        ({"a": {1: 2}, "b": {2: 2}}, {}, "no layer in common"),
        ({"a": {1: 2}, "b": {1: 2}}, {"factors": {"a": {"x": "1"}}}, '"b" has no factors'),
        (
            {"a": {1: 2}, "b": {1: 2}},
            {"factors": {"a": {"x": "1"}, "b": {"y": "1"}}},
            "different factors",
        ),
        ({"a": {1: 2}, "b": {1: 2}}, {"block": "seed"}, '"seed" is no factor'),
        ({"a": {40: 2}, "b": {40: 2}}, {}, "layer 40"),
    ],
)
def test_bad_input(tables, options, match):
    with pytest.raises(BadInputError, match=match):
        stability(tables, n_layers=28, draws=50, **options)
