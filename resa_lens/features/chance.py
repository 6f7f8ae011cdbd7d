"""What an exclusive rule would name by chance: the tags put at random places of the same prompt."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from math import comb, factorial, prod


@lru_cache(maxsize=2**16)
def rule_chance(
    rule: str,
    active: frozenset[int],
    n: int,
    open_lengths: tuple[int, ...],
    close_lengths: tuple[int, ...],
    ignore_first: bool = False,
) -> float:
    """Return P(a rule names a feature) where the tags stand at random places, all equally likely.

    Args:
        rule: all, any or either.
        active: token positions where the feature is active.
        n: tokens of the prompt.
        open_lengths: tokens of each occurrence of the opening tag.
        close_lengths: of the closing tag.
        ignore_first: whether the first position may be active outside of the tags.
    """
    kinds = Counter([(0, length) for length in open_lengths])
    kinds.update((1, length) for length in close_lengths)
    names, counts = list(kinds), tuple(kinds.values())
    covered = sum(length * count for (_, length), count in kinds.items())
    outside = active - {0} if ignore_first else active
    longest = max(length for _, length in names)
    if not active or _spans_needed(outside, longest) > sum(counts):
        return 0.0
    # Placements counted from left to right: what is left to place, and which tags were active.
    ways: list[Counter[tuple[tuple[int, ...], bool, bool]]] = [Counter() for _ in range(n + 1)]
    ways[0][counts, False, False] = 1
    for place in range(n):
        for (left, opened, closed), count in ways[place].items():
            if place not in outside:
                ways[place + 1][left, opened, closed] += count
            for index, (kind, length) in enumerate(names):
                end = place + length
                if not left[index] or end > n:
                    continue
                hit = any(p in active for p in range(place, end))
                if rule == "all" and not hit:
                    continue
                rest = (*left[:index], left[index] - 1, *left[index + 1 :])
                flags = (opened or (hit and kind == 0), closed or (hit and kind == 1))
                ways[end][rest, *flags] += count
    wanted = {
        "all": lambda opened, closed: opened and closed,
        "any": lambda opened, closed: opened and closed,
        "either": lambda opened, closed: opened or closed,
    }[rule]
    good = sum(
        count for (left, *flags), count in ways[n].items() if not any(left) and wanted(*flags)
    )
    number = sum(counts)
    orders = factorial(number) // prod(factorial(c) for c in counts)
    return good / (comb(n - covered + number, number) * orders)


def _spans_needed(places: frozenset[int], length: int) -> int:
    """How many spans of a length cover all places, at the least."""
    needed, end = 0, -1
    for place in sorted(places):
        if place >= end:
            needed, end = needed + 1, place + length
    return needed
