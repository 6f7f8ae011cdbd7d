"""Random sets of experts that are used as much as chosen ones, over all layers.

Within a layer the most used expert has no equal, so sets are matched as a whole: as many experts,
from any layers, whose uses add up to nearly the same: within a quarter of what is allowed where
there are sets enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float

from resa_lens.errors import BadInputError
from resa_lens.experts.config import MISMATCH
from resa_lens.experts.routing import Array

PROPOSALS = 20_000
"""Sets that are proposed at a time."""
ROUNDS = 4
NEAR = (0, 64, 32, 16, 8)
"""Of how many experts nearest in use each is drawn, where sets of all experts do not match; 0: of
all."""

Place = tuple[int, int]
"""(place of the layer among those with experts, expert)."""


@dataclass(frozen=True)
class MatchedSet:
    """A random set and its use."""

    experts: tuple[Place, ...]
    use: float
    """Mean slots of a token that the set takes."""


def matched_sets(
    use: Float[Array, "layer expert"],
    chosen: Sequence[Place],
    count: int,
    *,
    most: int,
    seed: int,
    mismatch: float = MISMATCH,
) -> list[MatchedSet]:
    """Return random sets, none twice, of as many experts and nearly the same use.

    Args:
        use: share of tokens that use an expert.
        chosen: the set that is matched; none of its experts is drawn.
        count: of sets.
        most: experts of one layer at most.
        seed: of the draws.
        mismatch: largest difference of the use, relative to that of the chosen set.

    Raises:
        BadInputError: the chosen experts are never used, or too few sets match.
    """
    rng = np.random.default_rng(seed)
    target = float(sum(use[place] for place in chosen))
    if target <= 0:
        raise BadInputError("the chosen experts are used at no token, so no random set matches")
    every = [(at, e) for at in range(use.shape[0]) for e in range(use.shape[1])]
    pool = [place for place in every if place not in set(chosen)]
    amounts = np.array([use[place] for place in pool])
    layers = np.array([place[0] for place in pool])
    sets: dict[tuple[Place, ...], float] = {}
    nearest = float("inf")
    for close, near in product((mismatch / 4, mismatch / 2, mismatch), NEAR):
        if near >= len(pool):
            continue
        columns = [
            np.arange(len(pool)) if not near else np.argsort(np.abs(amounts - use[place]))[:near]
            for place in chosen
        ]
        for _ in range(ROUNDS if not near else 1):
            rows = np.stack([rng.choice(column, PROPOSALS) for column in columns], axis=1)
            rows.sort(axis=1)
            rows = rows[(np.diff(rows, axis=1) > 0).all(1)]
            off = np.abs(amounts[rows].sum(1) - target) / target
            nearest = min(nearest, float(off.min(initial=np.inf)))
            for row in rows[off <= close]:
                if max(Counter(layers[row].tolist()).values()) > most:
                    continue
                key = tuple(pool[i] for i in row)
                sets.setdefault(key, float(amounts[row].sum()))
                if len(sets) == count:
                    return [MatchedSet(experts, total) for experts, total in sets.items()]
    nearness = f"the nearest is {100 * nearest:.0f} % off" if np.isfinite(nearest) else "none fits"
    raise BadInputError(
        f"{len(sets)} of {count} random sets of {len(chosen)} experts match the use of the chosen "
        f"({target:.3g} slots a token) within {100 * mismatch:.0f} %; {nearness}: choose fewer or "
        "less used experts"
    )


def use_of(use: Float[Array, "layer expert"], experts: Sequence[Place]) -> float:
    """Return the mean slots of a token that a set takes."""
    return float(sum(use[place] for place in experts))
