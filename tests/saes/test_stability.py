"""Directions found again by another seed: identical, permuted, random, half and half."""

from __future__ import annotations

import pytest
import torch

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.saes import stability
from resa_lens.saes.coder import SparseCoder, new_coder
from resa_lens.saes.stability import best_cosines, decoder_stability
from resa_lens.stats import wilson_interval
from resa_lens.stats.directions import null_share

POINT = Hookpoint(1)


def coder(directions: torch.Tensor) -> SparseCoder:
    made = new_coder(directions.shape[1], directions.shape[0], 4, seed=0)
    with torch.no_grad():
        assert made.W_dec is not None
        made.W_dec.copy_(directions)
    return made.requires_grad_(False)


def unit(count: int, d: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(count, d, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=1, keepdim=True)


def compare(a: torch.Tensor, b: torch.Tensor, threshold: float = 0.7) -> stability.Stability:
    return decoder_stability({POINT: coder(a)}, {POINT: coder(b)}, threshold)[POINT]


def test_identical_and_permuted_are_stable() -> None:
    a = unit(300, 64, 0)
    for b in (a, a.flip(0), 3 * a[torch.randperm(300, generator=torch.Generator())]):
        found = compare(a, b)
        assert (found.a_in_b.share, found.b_in_a.share, found.share) == (1, 1, 1)
        assert found.a_in_b.mean_cosine == pytest.approx(1, abs=1e-5)
        assert found.a_in_b.ci == wilson_interval(300, 300)


def test_random_and_orthogonal_are_not() -> None:
    found = compare(unit(300, 64, 0), unit(300, 64, 1))
    assert found.share == 0
    assert found.a_in_b.null < 1e-3
    eye = torch.eye(16)
    assert compare(eye[:8], eye[8:]).a_in_b.mean_cosine == 0


def test_the_opposite_direction_is_another() -> None:
    a = unit(10, 64, 0)
    assert compare(a, -a).share == 0


def test_half_replaced_is_one_half() -> None:
    a, b = unit(300, 64, 0), unit(300, 64, 1)
    b[:150] = a[150:]
    found = compare(a, b)
    assert (found.a_in_b.share, found.b_in_a.share) == (0.5, 0.5)
    assert found.a_in_b.ci == wilson_interval(150, 300)


def test_the_two_ways_differ() -> None:
    """The larger SAE holds all of the smaller, and the smaller a third of the larger."""
    b = unit(300, 64, 0)
    found = compare(b[:100], b)
    assert (found.a_in_b.share, found.a_in_b.n) == (1, 100)
    assert found.b_in_a.share == pytest.approx(1 / 3)
    assert found.b_in_a.n == 300
    assert found.share == pytest.approx(2 / 3)
    assert set(found.to_dict()) == {"share", "a_in_b", "b_in_a", "threshold"}


def test_blocks_give_what_the_whole_matrix_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = unit(50, 8, 0), unit(70, 8, 1)
    monkeypatch.setattr(stability, "BLOCK_BYTES", 4 * 16 * 16)
    found = best_cosines(a, b)
    cosines = a @ b.mT
    torch.testing.assert_close(found[0], cosines.amax(1))
    torch.testing.assert_close(found[1], cosines.amax(0))


def test_a_row_of_zeros_matches_nothing() -> None:
    a = torch.zeros(2, 4)
    assert torch.equal(best_cosines(a, torch.eye(4))[0], torch.zeros(2))


@pytest.mark.parametrize("d", [2, 3, 6])
def test_the_null_is_what_random_directions_give(d: int) -> None:
    """Against draws: 20,000 directions, each against 12 others."""
    share = null_share(12, d, 0.7)
    others = unit(20_000 * 12, d, 1).view(20_000, 12, d)
    best = torch.einsum("nd,nmd->nm", unit(20_000, d, 0), others).amax(1)
    low, high = wilson_interval(int((best > 0.7).sum()), 20_000, level=0.999)
    assert low < share < high


def test_the_null_at_known_places() -> None:
    assert null_share(1, 2, 0.5) == pytest.approx(1 / 3)  # a sixth of the circle each way
    assert null_share(1, 3, 0.5) == pytest.approx(1 / 4)  # the cap's area
    assert 0 < null_share(65_536, 1536, 0.7) < 1e-12


def test_only_what_both_have_is_compared() -> None:
    a = coder(unit(8, 4, 0))
    runs = {POINT: a, Hookpoint(2): a}, {POINT: a, Hookpoint(3): a}
    assert list(decoder_stability(*runs)) == [POINT]
    with pytest.raises(BadInputError, match="nothing to compare"):
        decoder_stability({POINT: a}, {Hookpoint(2): a})


def test_refusals() -> None:
    with pytest.raises(BadInputError, match="widths 4 and 6"):
        compare(unit(8, 4, 0), unit(8, 6, 0))
    with pytest.raises(BadInputError, match=r"threshold 1\.5"):
        compare(unit(8, 4, 0), unit(8, 4, 0), 1.5)
