"""Permutations of labels that keep what a position and a document explain by themselves.

Sequences of several lengths lie end to end; a token's position is counted from the beginning of its
sequence.  ``tokens`` is the sum of the lengths.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from resa_lens.errors import BadInputError
from resa_lens.stats import arrays
from resa_lens.stats.arrays import Floats, Seed, vector_of

SWEEPS = 500
"""Alternating projections at most; a few dozen suffice."""


def positions_of(lengths: ArrayLike) -> NDArray[np.int64]:
    """Return each token's position in its sequence, [tokens]."""
    sizes = np.asarray(lengths, dtype=np.int64)
    return np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)


def position_exchanges(
    lengths: ArrayLike, draws: int, seed: Seed = 0
) -> Iterator[NDArray[np.int64]]:
    """Yield indices [part of draws, tokens] that hand every sequence another one's values.

    ``values[index]`` gives sequence i, position by position, the values of sequence pi(i), where pi
    is a uniform permutation of the sequences.  Where pi(i) is too short, pi(pi(i)) stands in, and
    so on: among the sequences that reach a position this is a uniform permutation too, so every
    position keeps its values exactly, and a sequence is torn only where another one ends.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    start, whole = sizes.cumsum() - sizes, int(sizes.sum())
    rng, rows = np.random.default_rng(seed), max(1, arrays.CHUNK // max(1, whole))
    for first in range(0, draws, rows):
        many = min(rows, draws - first)
        order = rng.permuted(np.tile(np.arange(sizes.size), (many, 1)), axis=1)
        begins, moves = _segments(order, sizes, start)
        ends = np.append(begins[1:], many * whole)
        yield np.arange(whole) + np.repeat(moves, ends - begins).reshape(many, whole)


def _segments(
    order: NDArray[np.int64], sizes: NDArray[np.int64], start: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each stretch of a source begins in [draw x token], and how far off it lies."""
    row, sequence = (part.ravel() for part in np.indices(order.shape))
    source, reached = order.ravel(), np.zeros(row.size, dtype=np.int64)
    begins, moves = [], []
    while row.size:
        # A source no longer than those before it adds nothing.
        adds = sizes[source] > reached
        at, to = sequence[adds], source[adds]
        begins.append(row[adds] * int(sizes.sum()) + start[at] + reached[adds])
        moves.append(start[to] - start[at])
        reached = np.maximum(reached, sizes[source])
        left = reached < sizes[sequence]
        row, sequence, source, reached = row[left], sequence[left], source[left], reached[left]
        source = order[row, source]
    begin, move = np.concatenate(begins), np.concatenate(moves)
    by_place = begin.argsort(kind="stable")
    return begin[by_place], move[by_place]


def centred_within(values: ArrayLike, lengths: ArrayLike) -> Floats:
    """Return what positions and sequences do not explain of values [tokens].

    The residual of a least-squares fit of one constant a position and one a sequence: its sum over
    each position, and over each sequence, is zero.

    Raises:
        BadInputError: the lengths do not add up to the values.
    """
    left, sizes = vector_of(values, "values").copy(), np.asarray(lengths, dtype=np.int64)
    if sizes.sum() != left.size:
        raise BadInputError(
            f"{left.size} values and lengths of {sizes.sum()} in all: give one each"
        )
    place, sequence = positions_of(sizes), np.repeat(np.arange(sizes.size), sizes)
    many = np.bincount(place)
    close = 1e-12 * max(1.0, float(np.abs(left).sum()))
    for _ in range(SWEEPS):
        left -= (np.bincount(place, left) / many)[place]
        left -= (np.bincount(sequence, left, sizes.size) / np.maximum(sizes, 1))[sequence]
        if np.abs(np.bincount(place, left)).max() <= close:
            break
    # Rounding is no residual.
    return np.where(np.abs(left) > 1e-9 * np.ptp(values), left, 0.0)
