"""What chance gives among directions: against a simulation, and against itself turned around."""

from __future__ import annotations

import numpy as np
import pytest

from resa_lens.stats.directions import chance_bound, null_share


@pytest.mark.parametrize(("count", "d"), [(1, 3), (7, 2), (200, 16), (400, 64)])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_bound_is_the_quantile_of_a_simulation(count, d, level):
    rng = np.random.default_rng(0)
    draws = 4000
    best = np.empty(draws)
    for draw in range(draws):
        # One direction is as good as another: the cosines are with the first axis.
        rows = rng.standard_normal((count, d))
        best[draw] = (rows[:, 0] / np.linalg.norm(rows, axis=1)).max()
    share = (best < chance_bound(count, d, level)).mean()
    assert share == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / draws))


@pytest.mark.parametrize(("count", "d"), [(1, 2), (1, 64), (1024, 96), (65_536, 1536)])
@pytest.mark.parametrize("level", [0.05, 0.5, 0.95, 0.999])
def test_the_bound_inverts_the_share_above_a_threshold(count, d, level):
    bound = chance_bound(count, d, level)
    if bound >= 0:  # the share is of thresholds from 0 on
        assert null_share(count, d, bound) == pytest.approx(1 - level, rel=1e-6)
    else:
        assert count == 1
        assert chance_bound(count, d, 1 - level) == pytest.approx(-bound)


def test_the_bound_grows_with_the_directions_and_falls_with_the_width():
    assert chance_bound(1, 64, 0.5) == pytest.approx(0, abs=1e-6)
    counts = [chance_bound(count, 96) for count in (10, 1000, 100_000)]
    assert counts == sorted(counts)
    widths = [chance_bound(1000, d) for d in (8, 96, 1536)]
    assert widths == sorted(widths, reverse=True)
    # On a line a direction is another one or its opposite.
    assert (chance_bound(9, 1), chance_bound(1, 1, 0.3)) == (1.0, -1.0)
