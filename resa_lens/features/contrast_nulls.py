"""What labels do by chance to the contrast scores: nulls that keep positions and documents.

A feature that fires at fixed positions of every document knows nothing of reasoning, yet a text's
thoughts stand at some positions rather than others.  So labels are compared, and moved, within
positions alone, and with whole documents, since tokens of a document are not independent.

- phases (documents hold both groups): of the labels only that is looked at which neither the
  position nor the document explains, r.  A document d adds S_d = sum over its tokens of phi r to a
  feature; the statistic is sum_d S_d / sqrt(sum_d S_d^2).  A draw exchanges the r of whole
  documents position by position (`stats.position_exchanges`) and takes each document's mean out
  again.
- documents (each holds one group): activations are taken less their mean over the documents that
  reach the position, at positions that both groups reach; a draw shuffles the labels of whole
  documents.  The statistic is the difference of the groups' means in its standard error, which
  knows that lengths differ (a studentised permutation test).

Both are exact where documents are of equal length and close to it elsewhere: docs/log.md has the
measured rates.  Where position settles the labels nothing is left to test (`Labels.informative` is
0) and every p-value is 1.  Where a feature allows few different statistics, as many draws tie with
the observed one and count as extreme: p is then too large, never too small.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import sparse

from resa_lens.features.evidence import Evidence, shape_of
from resa_lens.stats import (
    Floats,
    Seed,
    TailCounts,
    centred_within,
    permutation_draws,
    position_exchanges,
    positions_of,
)

ROWS = 4096
"""Features multiplied at once with a few hundred draws."""
PAIRS = 8192
"""Pairs of a feature and a document at once with `FEW` draws: 4 MB."""
FEW = 64
NULLS = {
    "phases": "labels exchanged between documents, position by position",
    "documents": "labels shuffled over documents, activations compared within positions",
}
"""By design, in words, as summary.json has it."""


@dataclass(frozen=True)
class Labels:
    """The labels of some evidence, as the null sees them; each [token]."""

    expected: Floats
    """The share of reasoning text that position (and, in design phases, document) explains."""
    left: Floats
    """What remains of the label."""

    @property
    def informative(self) -> float:
        """Share of the labels' variance that position and document leave; 0: nothing to test."""
        label = self.expected + self.left
        whole = float(((label - label.mean()) ** 2).sum())
        return float((self.left**2).sum()) / whole if whole else 0.0


def split_labels(evidence: Evidence) -> Labels:
    """Return what positions and documents say of the labels, and what they leave."""
    label = evidence.reasoning.astype(np.float64)
    if evidence.design == "phases":
        left = centred_within(label, evidence.lengths)
        return Labels(label - left, left)
    place = positions_of(evidence.lengths)
    share = (np.bincount(place, label) / np.bincount(place))[place]
    return Labels(share, label - share)


def row_blocks(rows: int, size: int = ROWS) -> list[slice]:
    """Return consecutive slices that cover so many rows."""
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def contrast_tails(phi: sparse.csr_array, evidence: Evidence, draws: int, seed: Seed) -> TailCounts:
    """Return how often chance does as much as each feature [feature, token] of the evidence."""
    if evidence.design == "phases":
        return _exchanged(phi, evidence, draws, seed)
    return _shuffled(phi, evidence, draws, seed)


def _ratio(top: Floats, squares: Floats) -> Floats:
    """Return top / sqrt(squares), and 0 where there is nothing but rounding."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(squares > 0, top / np.sqrt(squares), 0.0)


def _exchanged(phi: sparse.csr_array, evidence: Evidence, draws: int, seed: Seed) -> TailCounts:
    left = split_labels(evidence).left
    split, owner = _by_document(phi, evidence)
    # A feature's documents lie end to end: blocks of features hold a few thousand pairs each.
    ends = np.searchsorted(owner.indptr, np.arange(PAIRS, owner.indptr[-1], PAIRS), "right") - 1
    cuts = np.unique([0, *ends, shape_of(phi)[0]])
    parts = [slice(a, b) for a, b in pairwise(cuts.tolist())]
    pairs = [slice(owner.indptr[part.start], owner.indptr[part.stop]) for part in parts]
    blocks = [
        (part, split[own], sparse.csr_array(owner[part][:, own]))
        for part, own in zip(parts, pairs, strict=True)
    ]
    # In the scale of the largest term, so that rounding has a size.
    floor = 1e-18 * (phi.power(2) @ np.ones(left.size)) * float((left**2).max(initial=0.0))

    def statistic(part: slice, own: sparse.csr_array, add: sparse.csr_array, r: Floats) -> Floats:
        sums = own @ r
        top = add @ sums
        squares = add @ np.square(sums, out=sums)
        return _ratio(top, np.where(squares > floor[part, None], squares, 0.0))

    each = 1.0 / evidence.lengths[evidence.document]
    own_mean = sparse.csr_array((each, (evidence.document, np.arange(left.size))))
    tails = TailCounts(np.concatenate([statistic(*b, left[:, None])[:, 0] for b in blocks]), draws)
    for index in position_exchanges(evidence.lengths, draws, seed):
        for few in np.array_split(index, max(1, len(index) // FEW)):
            drawn = np.ascontiguousarray(left[few].T)
            # Torn labels no longer cancel over a document, as the observed ones do.
            drawn -= (own_mean @ drawn)[evidence.document]
            for block in blocks:
                tails.add(statistic(*block, drawn), block[0])
    return tails


def _by_document(
    phi: sparse.csr_array, evidence: Evidence
) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Split rows at the documents' borders: [pair, token], and whose each is: [feature, pair]."""
    ordered = phi.sorted_indices()
    rows = np.repeat(np.arange(shape_of(phi)[0]), np.diff(ordered.indptr))
    documents = evidence.document[ordered.indices]
    new = np.ones(rows.size, dtype=bool)
    new[1:] = (rows[1:] != rows[:-1]) | (documents[1:] != documents[:-1])
    first = np.flatnonzero(new)
    split = sparse.csr_array(
        (ordered.data, ordered.indices, np.append(first, rows.size)),
        shape=(first.size, shape_of(phi)[1]),
    )
    counts = np.bincount(rows[first], minlength=shape_of(phi)[0])
    owner = sparse.csr_array(
        (np.ones(first.size), np.arange(first.size), np.append(0, counts.cumsum())),
        shape=(shape_of(phi)[0], first.size),
    )
    return split, owner


def _shuffled(phi: sparse.csr_array, evidence: Evidence, draws: int, seed: Seed) -> TailCounts:
    place, document = positions_of(evidence.lengths), evidence.document
    label = (evidence.by_document > 0).astype(np.float64)
    reached = [np.bincount(place[label[document] == side]) for side in (0, 1)]
    # Where one group alone goes on there is nothing to compare it with.
    shared = int(min((counts >= 2).sum() for counts in reached))
    tokens = np.arange(place.size)
    inside = (place < shared).astype(np.float64)
    lengths = np.minimum(evidence.lengths, shared).astype(np.float64)
    by_place = sparse.csr_array((inside, (tokens, place)))
    by_place = sparse.csr_array(by_place[:, :shared])
    by_own = sparse.csr_array((inside, (tokens, document)))
    reach = np.arange(shared)[:, None] < lengths  # [position, document]
    share = reach / reach.sum(axis=1, keepdims=True)

    def beyond(part: slice) -> Floats:
        """What each document holds beyond its positions' means, [feature, document]."""
        rows = phi[part]
        return (rows @ by_own).toarray() - (rows @ by_place) @ share

    def studentised(rows: Floats, drawn: Floats) -> Floats:
        tables = (rows, rows**2, rows * lengths)
        whole = [table.sum(axis=1, keepdims=True) for table in tables]
        first = [table @ drawn for table in tables]
        size, square = lengths @ drawn, (lengths**2) @ drawn
        sides = (
            (1.0, first, size, square),
            (-1.0, [w - f for w, f in zip(whole, first, strict=True)],
             lengths.sum() - size, (lengths**2).sum() - square),
        )  # fmt: skip
        gap, variance = np.zeros(1), np.zeros(1)
        for sign, (value, squares, cross), tokens_of, squared in sides:
            average = value / tokens_of
            gap = gap + sign * average
            # Sum over documents of (sum - mean x length)^2: what a document adds to the mean.
            spread = squares - 2 * average * cross + average**2 * squared
            variance = variance + np.maximum(spread, 1e-12 * squares) / tokens_of**2
        return _ratio(gap, variance)

    blocks = [(part, beyond(part)) for part in row_blocks(shape_of(phi)[0])]
    tails = TailCounts(
        np.concatenate([studentised(rows, label[:, None])[:, 0] for _, rows in blocks]), draws
    )
    permuted = permutation_draws(label, draws, seed).T
    for first in range(0, draws, 256):
        for part, rows in blocks:
            tails.add(studentised(rows, permuted[:, first : first + 256]), part)
    return tails
