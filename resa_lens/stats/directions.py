"""What chance gives where a direction is looked for among many: exact, for random unit vectors."""

from __future__ import annotations

import math

from scipy import special


def null_share(count: int, d: int, threshold: float) -> float:
    """Return P(a random unit direction has a cosine above the threshold with one of `count`).

    For two directions uniform on the sphere the squared cosine is Beta(1/2, (d - 1)/2).
    """
    if d < 2:
        return 1 - 0.5**count
    one = 0.5 * float(special.betainc((d - 1) / 2, 0.5, 1 - threshold**2))
    return float(-special.expm1(count * special.log1p(-one)))


def chance_bound(count: int, d: int, level: float = 0.95) -> float:
    """Return the cosine that the best of `count` random directions stays below with P = `level`.

    The `count` cosines of one unit vector with independent ones, uniform on the sphere of R^d, are
    independent, so their largest is below t with P = F(t)^count, where by the Beta distribution of
    the squared cosine

        1 - F(t) = I_{1 - t^2}((d - 1)/2, 1/2) / 2    for t >= 0.

    The bound solves F(t)^count = level without a simulation: with p = 1 - level^(1/count) it is
    t = sqrt(1 - I^{-1}((d - 1)/2, 1/2; 2 p)).  It inverts `null_share`.  Trained directions are not
    uniform: they share the few directions in which activations vary most, so what lies little above
    the bound is no match yet; what lies below it says nothing at all.

    Args:
        count: directions that are looked at, 1 or more.
        d: their width.
        level: probability, above 0 and below 1.
    """
    if d < 2:
        return 1.0 if 0.5**count < level else -1.0
    tail = -math.expm1(math.log(level) / count)
    side = min(tail, 1 - tail)
    size = math.sqrt(1 - float(special.betaincinv((d - 1) / 2, 0.5, 2 * side)))
    return size if tail < 0.5 else -size
