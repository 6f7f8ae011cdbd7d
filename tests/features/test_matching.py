"""Features found again: planted permutations, noise, other widths, dead latents, rows of zeros."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import optimize, sparse

from resa_lens.errors import BadInputError
from resa_lens.features import matching as module
from resa_lens.features.matching import (
    Matches,
    agreement,
    best_correlations,
    best_matches,
    follow,
    found_of,
    match_activations,
    match_directions,
    null_mean,
)
from resa_lens.stats import wilson_interval
from resa_lens.stats.directions import null_share


def unit(count: int, d: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(count, d, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=1, keepdim=True)


def shuffled(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def activity(features: int, tokens: int, seed: int, share: float = 0.05) -> sparse.csr_array:
    rng = np.random.default_rng(seed)
    dense = rng.lognormal(size=(features, tokens)) * (rng.random((features, tokens)) < share)
    return sparse.csr_array(dense.astype(np.float32))


# Directions


@pytest.mark.parametrize("limit", [4096, 10])
def test_a_planted_permutation_is_recovered_by_direction(limit: int) -> None:
    a, order = unit(300, 32, 0), shuffled(300)
    noise = 0.02 * torch.randn(300, 32, generator=torch.Generator().manual_seed(1))
    found = match_directions(a, 3 * (a + noise)[order], limit=limit)
    assert found.method == ("cosine, one to one" if limit == 4096 else "cosine, nearest")
    np.testing.assert_array_equal(order.numpy()[found.indices], np.arange(300))
    summary = found_of(found)
    assert (summary.share, summary.n, summary.ci) == (1.0, 300, wilson_interval(300, 300))
    assert summary.mean > 0.98
    assert summary.null_share < 0.1
    assert summary.null_mean < 0.7


def test_one_to_one_gives_each_feature_its_own() -> None:
    """Two features of one direction: the nearest is the same for both, an assignment is not."""
    b = torch.eye(4)
    a = torch.stack([b[0], b[0] + 0.5 * b[1], b[2], b[3]])
    assert match_directions(a, b, limit=2).indices.tolist() == [0, 0, 2, 3]
    assert match_directions(a, b).indices.tolist() == [0, 1, 2, 3]
    left = match_directions(a, b[:2])
    assert sorted(left.indices.tolist()) == [-1, -1, 0, 1]
    assert int(np.isnan(left.values).sum()) == 2


def test_nearest_in_blocks_of_a_few_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    """5,000 against 5,000 with 64 KB of cosines at once: what one matrix of 100 MB gives."""
    monkeypatch.setattr("resa_lens.saes.stability.BLOCK_BYTES", 2**16)
    a, b = unit(5000, 16, 0), unit(5000, 16, 1)
    indices, cosines = best_matches(a[:300], b)
    expected = (a[:300] @ b.mT).max(dim=1)
    torch.testing.assert_close(cosines, expected.values)
    assert torch.equal(indices, expected.indices)
    order = shuffled(5000)
    assert torch.equal(order[best_matches(a[:500], a[order])[0]], torch.arange(500))


def test_noise_gives_the_null_share_and_mean() -> None:
    a, b = unit(4000, 8, 0), unit(50, 8, 1)
    nearest = found_of(match_directions(a, b, limit=1))
    assert nearest.null_share == null_share(50, 8, 0.7)
    # One set of 50 others, so more than the binomial's spread.
    assert nearest.share == pytest.approx(nearest.null_share, abs=0.06)
    assert nearest.mean == pytest.approx(nearest.null_mean, abs=0.02)
    assigned = found_of(match_directions(unit(200, 8, 2), unit(200, 8, 3)))
    assert assigned.share == pytest.approx(assigned.null_share, abs=0.12)
    assert assigned.mean == pytest.approx(assigned.null_mean, abs=0.02)
    assert assigned.null == "random directions, one to one"


@pytest.mark.parametrize(("count", "d"), [(1, 3), (4, 3), (30, 12)])
def test_the_mean_of_the_largest_cosine_is_what_draws_give(count: int, d: int) -> None:
    others = unit(20_000 * count, d, 1).view(20_000, count, d)
    best = torch.einsum("nd,nmd->nm", unit(20_000, d, 0), others).amax(1)
    error = float(best.std()) / 20_000**0.5
    assert null_mean(count, d) == pytest.approx(float(best.mean()), abs=4 * error)
    assert null_mean(1, 2) == pytest.approx(0, abs=1e-6)
    assert null_mean(2, 1) == 0.5


def test_a_row_of_zeros_matches_nothing() -> None:
    a, b = unit(6, 8, 0), unit(6, 8, 1)
    a[2] = 0
    for limit in (6, 1):
        found = match_directions(a, b, limit=limit)
        assert found.indices[2] == -1
        assert np.isnan(found.values[2])
        assert found_of(found).n == 6
    cosines = best_matches(a, b)[1]
    assert cosines[2] == 0


def test_other_numbers_of_latents_match_both_ways() -> None:
    b = unit(60, 16, 0)
    assert found_of(match_directions(b[:20], b)).share == 1
    assert found_of(match_directions(b, b[:20])).share == pytest.approx(1 / 3)


# Activations


def test_correlations_are_numpys() -> None:
    a, b = activity(12, 400, 0), activity(9, 400, 1)
    indices, values = best_correlations(a, b)
    dense = np.corrcoef(a.toarray(), b.toarray())[:12, 12:]
    together = (a @ b.T).toarray() > 0
    best = np.where(together, dense, -np.inf)
    np.testing.assert_array_equal(indices, best.argmax(1))
    np.testing.assert_allclose(values, best.max(1), atol=1e-6)
    # A pair that never fires together is below zero: leaving it out loses no match.
    assert (dense[~together] < 0).all()


def test_a_planted_permutation_is_recovered_by_activations() -> None:
    """Scaled, cut by a threshold, of another order, among features of its own."""
    a, order = activity(80, 600, 0), shuffled(80).numpy()
    moved = 3 * a.toarray()[order]
    moved[moved < 1] = 0
    b = sparse.csr_array(np.vstack([activity(30, 600, 9).toarray(), moved]))
    found = match_activations(a, b)
    np.testing.assert_array_equal(order[found.indices - 30], np.arange(80))
    summary = found_of(found)
    assert summary.share == 1
    assert summary.null_share < 0.05
    assert summary.null_mean < 0.4 < 0.9 < summary.mean


def test_independent_activations_give_what_the_shifts_give() -> None:
    found = found_of(match_activations(activity(300, 500, 0), activity(300, 500, 1), threshold=0.3))
    assert 0.1 < found.null_share < 0.9
    assert found.share == pytest.approx(found.null_share, abs=0.12)
    assert found.mean == pytest.approx(found.null_mean, abs=0.02)


def test_the_null_keeps_densities() -> None:
    """Two dense features agree by chance; the null says so."""
    found = found_of(match_activations(activity(40, 300, 0, 0.9), activity(40, 300, 1, 0.9)))
    sparse_ones = found_of(
        match_activations(activity(40, 300, 0, 0.01), activity(40, 300, 1, 0.01))
    )
    assert found.null_mean < sparse_ones.null_mean
    assert found.mean == pytest.approx(found.null_mean, abs=0.05)


def test_dead_and_constant_latents_have_no_match() -> None:
    dense = activity(6, 200, 0).toarray()
    a = dense.copy()
    a[1], a[3] = 0, 2
    found = match_activations(sparse.csr_array(a), sparse.csr_array(dense))
    assert found.indices.tolist() == [0, -1, 2, -1, 4, 5]
    assert np.isnan(found.values[[1, 3]]).all()
    alive = np.array([True, False, True, True, True, True])
    assert found_of(found, alive).share == pytest.approx(4 / 5)
    assert found_of(found, alive).n == 5
    silent = match_activations(sparse.csr_array(0 * a), sparse.csr_array(dense))
    assert (silent.indices == -1).all()
    with pytest.raises(BadInputError, match="no feature fires"):
        found_of(silent, np.zeros(6, dtype=bool))


def test_blocks_give_what_one_product_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = activity(60, 300, 0), activity(50, 300, 1)
    whole = best_correlations(a, b)
    monkeypatch.setattr(module, "PRODUCT_ENTRIES", 100)
    assert len(list(module._blocks(a, sparse.csr_array(b.T)))) > 10
    parts = best_correlations(a, b)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_array_equal(whole[1], parts[1])


def test_a_block_never_holds_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 65,536 latents: the pairs of a block are bounded, whatever fires together."""
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, 65_536, 40_000), rng.integers(0, 1000, 40_000)
    a = sparse.csr_array((np.ones(40_000), (rows, columns)), shape=(65_536, 1000))
    monkeypatch.setattr(module, "PRODUCT_ENTRIES", 20_000)
    other = sparse.csr_array(a.T)
    parts = list(module._blocks(a, other))
    assert parts[0].start == 0
    assert parts[-1].stop == 65_536
    assert all(p.stop == q.start for p, q in itertools.pairwise(parts))
    assert max(sparse.csr_array(a[part] @ other).nnz for part in parts[::10]) <= 20_000
    indices, values = best_correlations(a, a)
    active = np.diff(a.indptr) > 0
    assert (values[active] > 0.99).all()
    assert (indices[~active] == -1).all()


# Both together


def matches(indices: list[int]) -> Matches:
    values = np.where(np.array(indices) < 0, np.nan, 0.9)
    return Matches("", np.array(indices), values, np.zeros((0, len(indices))), (0, 0), "", 0.7)


def test_agreement_and_its_chance() -> None:
    found = agreement(matches([0, 1, 2, 3, -1]), matches([0, 1, 3, 2, 4]))
    assert (found["share"], found["n"]) == (0.5, 4)
    assert found["ci"] == wilson_interval(2, 4)
    assert found["chance"] == pytest.approx(1 / 4)
    # Where all features have one match, agreement is no evidence: chance says 1.
    assert agreement(matches([2, 2, 2]), matches([2, 2, 2]))["chance"] == 1
    assert agreement(matches([-1]), matches([0]))["n"] == 0


def test_named_features_are_followed() -> None:
    rows = follow(
        {"all": [1], "any": [1, 2]},
        {"cosine": matches([5, 6, -1]), "correlation": None},
        {"all": [6], "any": []},
    )
    assert rows == [
        {
            "feature": 1, "rule": "all", "cosine_match": 6, "cosine": 0.9, "cosine_counted": True,
            "correlation_match": None, "correlation": None, "correlation_counted": None,
        },
        {
            "feature": 1, "rule": "any", "cosine_match": 6, "cosine": 0.9, "cosine_counted": False,
            "correlation_match": None, "correlation": None, "correlation_counted": None,
        },
        {
            "feature": 2, "rule": "any", "cosine_match": None, "cosine": None,
            "cosine_counted": None, "correlation_match": None, "correlation": None,
            "correlation_counted": None,
        },
    ]  # fmt: skip


def test_refusals() -> None:
    with pytest.raises(BadInputError, match="widths 4 and 6 have no cosine"):
        best_matches(unit(3, 4, 0), unit(3, 6, 0))
    with pytest.raises(BadInputError, match="no direction"):
        match_directions(unit(3, 4, 0), torch.zeros(0, 4))
    with pytest.raises(BadInputError, match=r"threshold 1\.2"):
        match_directions(unit(3, 4, 0), unit(3, 4, 1), threshold=1.2)
    with pytest.raises(BadInputError, match="100 and 90 tokens"):
        match_activations(activity(3, 100, 0), activity(3, 90, 0))


def test_the_assignment_is_the_best_of_all() -> None:
    a, b = unit(5, 3, 0), unit(5, 3, 1)
    cosines = (a @ b.mT).double().numpy()
    rows, columns = optimize.linear_sum_assignment(-cosines)
    found = match_directions(a, b)
    assert found.values.sum() == pytest.approx(cosines[rows, columns].sum(), abs=1e-5)
