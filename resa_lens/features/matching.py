"""Is a feature of one SAE there in another: of another seed, or of another model?

Two answers, each beside what chance would give.  Decoder directions are compared by cosine, which
needs SAEs of one width: one to one by the Hungarian algorithm up to `HUNGARIAN` latents, by the
nearest neighbour beyond.  Activations on the same tokens are compared by Pearson's correlation,
which works across widths and models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import integrate, optimize, sparse
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.features.evidence import Ints, Mask, shape_of
from resa_lens.saes.stability import THRESHOLD, best_pairs
from resa_lens.stats import Floats, Interval, wilson_interval
from resa_lens.stats.directions import null_share

HUNGARIAN = 4096
"""Latents of the larger SAE up to which directions are matched one to one; the work grows with the
third power, the matrix of cosines with the second."""
PRODUCT_ENTRIES = 4_000_000
"""Pairs of features held at once while correlating: 48 MB."""
SHIFTS = 3
"""Shifts of the second SAE's tokens that the null of the correlations is taken from."""


def best_matches(
    a: Float[Tensor, "m d"], b: Float[Tensor, "n d"]
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """Return each row's nearest row of b by cosine, and that cosine; memory is bounded by blocks.

    A row of zeros has the cosine 0 with every row, and its index says nothing.

    Raises:
        BadInputError: another width, or b has no row.
    """
    if a.shape[1] != b.shape[1]:
        raise BadInputError(
            f"directions of widths {a.shape[1]} and {b.shape[1]} have no cosine; SAEs of different "
            "width can be matched by the correlation of their activations alone"
        )
    if b.shape[0] == 0:
        raise BadInputError("the second SAE has no direction; nothing can match")
    return best_pairs(a, b)[0]


@dataclass(frozen=True)
class Matches:
    """The match of each feature of one SAE in another."""

    method: str
    indices: Ints
    """-1 where there is none: a latent of zeros, one that is never active, or one left over."""
    values: Floats
    """Cosine or correlation; nan where there is no match."""
    null_values: Floats
    """[draw, feature]: the same where chance alone matches; no draw where the null is analytic."""
    null_expects: tuple[float, float] | None
    """Share above the threshold and mean, of an analytic null."""
    null: str
    """What the null is."""
    threshold: float


@dataclass(frozen=True)
class Found:
    """How many features of one SAE are there in another."""

    share: float
    """Of the features, those whose match is above the threshold."""
    n: int
    """Features that were looked for."""
    ci: Interval
    """Wilson's 95 % interval, as if the features were independent draws."""
    mean: float
    """Of the matches."""
    null_share: float
    null_mean: float
    null: str
    """What the null is."""
    method: str


def match_directions(
    a: Float[Tensor, "m d"],
    b: Float[Tensor, "n d"],
    *,
    threshold: float = THRESHOLD,
    limit: int = HUNGARIAN,
    seed: int = 0,
) -> Matches:
    """Match decoder directions by cosine.

    Args:
        a: directions that are looked for.
        b: where they are looked for.
        threshold: a feature is found where its match is above it.
        limit: up to so many rows of either side one to one, beyond each to its nearest.
        seed: of the random directions that a one-to-one match is compared with.

    Raises:
        BadInputError: another width, no direction, or a threshold that is no cosine.
    """
    check_threshold(threshold)
    nearest, cosines = (found.cpu().numpy() for found in best_matches(a, b))
    if max(a.shape[0], b.shape[0]) > limit:
        found = nearest.astype(np.int64), cosines.astype(np.float64)
        expects = null_share(b.shape[0], a.shape[1], threshold), null_mean(b.shape[0], a.shape[1])
        method, null = "cosine, nearest", "random directions, analytic"
        drawn = np.zeros((0, a.shape[0]))
    else:
        found = _assigned(a, b)
        generator = torch.Generator().manual_seed(seed)
        random_a, random_b = (torch.randn(side.shape, generator=generator) for side in (a, b))
        drawn, expects = _assigned(random_a, random_b)[1][None], None
        method, null = "cosine, one to one", "random directions, one to one"
    empty = (a == 0).all(1).cpu().numpy()
    return Matches(
        method,
        np.where(empty, -1, found[0]),
        np.where(empty, np.nan, found[1]),
        drawn,
        expects,
        null,
        threshold,
    )


def check_threshold(threshold: float) -> None:
    """Raise BadInputError for a threshold that is no similarity between 0 and 1."""
    if not 0 < threshold < 1:
        raise BadInputError(f"threshold {threshold} is no similarity between 0 and 1")


def _assigned(a: Float[Tensor, "m d"], b: Float[Tensor, "n d"]) -> tuple[Ints, Floats]:
    """One-to-one matches of the largest sum of cosines; -1 where b has too few rows."""
    a, b = (side.detach().float().cpu() for side in (a, b))
    a, b = (side / side.norm(dim=1, keepdim=True).clamp_min(1e-12) for side in (a, b))
    cosines = (a @ b.mT).numpy()
    rows, columns = optimize.linear_sum_assignment(cosines, maximize=True)
    indices, values = np.full(len(a), -1, dtype=np.int64), np.full(len(a), np.nan)
    indices[rows], values[rows] = columns, cosines[rows, columns]
    return indices, values


def null_mean(count: int, d: int) -> float:
    """Return the expected largest cosine of a random unit direction with `count` others."""

    def above(t: float) -> float:
        return null_share(count, d, t)

    def below(t: float) -> float:
        return null_share(1, d, t) ** count

    if d < 2:
        return 1 - 2 * 0.5**count
    # E[max] = integral of P(max > t) over t > 0 less that of P(max < -t).
    return float(integrate.quad(above, 0, 1)[0] - integrate.quad(below, 0, 1)[0])


def match_activations(
    a: sparse.csr_array,
    b: sparse.csr_array,
    *,
    threshold: float = THRESHOLD,
    shifts: int = SHIFTS,
) -> Matches:
    """Match features by the correlation of their activations, [feature, token], on shared tokens.

    The null shifts the second side's tokens around, by equal parts of the text: every feature keeps
    its values, its density and its runs.

    Raises:
        BadInputError: the sides have other tokens, or fewer than a shift needs.
    """
    check_threshold(threshold)
    tokens, others = shape_of(a)[1], shape_of(b)[1]
    if tokens != others or tokens <= shifts:
        raise BadInputError(
            f"{tokens} and {others} tokens: correlations need the same tokens, more than {shifts}"
        )
    indices, values = best_correlations(a, b)
    drawn = [
        best_correlations(a, _rotated(b, tokens * (i + 1) // (shifts + 1)))[1]
        for i in range(shifts)
    ]
    null = f"the second SAE's tokens shifted around, {shifts} shifts"
    return Matches("correlation", indices, values, np.stack(drawn), None, null, threshold)


def _rotated(acts: sparse.csr_array, offset: int) -> sparse.csr_array:
    moved = (acts.indices + offset) % shape_of(acts)[1]
    return sparse.csr_array((acts.data, moved, acts.indptr), shape=acts.shape)


def best_correlations(a: sparse.csr_array, b: sparse.csr_array) -> tuple[Ints, Floats]:
    """Return each feature's most correlated feature of b, and Pearson's r over all tokens.

    Only pairs that fire together at some token are formed: all others have r below zero, or none.
    Index -1 and nan where a feature never fires, never varies, or fires with none of b.
    """
    a, b = (sparse.csr_array(side.astype(np.float64)) for side in (a, b))
    tokens = shape_of(a)[1]
    (mean_a, sd_a), (mean_b, sd_b) = (_moments(side) for side in (a, b))
    indices = np.full(shape_of(a)[0], -1, dtype=np.int64)
    values = np.full(shape_of(a)[0], np.nan)
    other = sparse.csr_array(b.T)
    for part in _blocks(a, other):
        product = sparse.csr_array(a[part] @ other)
        product.sort_indices()
        counts = np.diff(product.indptr)
        rows = np.repeat(np.arange(part.start, part.stop), counts)
        scale = sd_a[rows] * sd_b[product.indices]
        covariance = product.data / tokens - mean_a[rows] * mean_b[product.indices]
        r = np.where(scale > 0, covariance / np.where(scale > 0, scale, 1.0), -np.inf)
        held = np.flatnonzero(counts)
        if not held.size:
            continue
        best = np.maximum.reduceat(r, product.indptr[held])
        # The first of equals: from the last entry to the first, each overwrites.
        hits = np.flatnonzero(r == np.repeat(best, counts[held]))[::-1]
        indices[rows[hits]] = product.indices[hits]
        values[held + part.start] = best
    values[~np.isfinite(values)] = np.nan
    indices[np.isnan(values)] = -1
    return indices, np.clip(values, -1.0, 1.0)


def _moments(acts: sparse.csr_array) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each feature over all tokens, zeros included."""
    tokens = shape_of(acts)[1]
    mean = np.asarray(acts.sum(axis=1)) / tokens
    square = np.asarray(acts.power(2).sum(axis=1)) / tokens
    variance = square - mean**2
    # What is left after subtraction is rounding where a feature does not vary.
    return mean, np.sqrt(np.where(variance > 1e-12 * square, variance, 0.0))


def _blocks(a: sparse.csr_array, other: sparse.csr_array) -> Iterator[slice]:
    """Rows of a whose products with all features stay within `PRODUCT_ENTRIES`."""
    pattern = sparse.csr_array((np.ones(a.nnz), a.indices, a.indptr), shape=a.shape)
    entries = np.minimum(pattern @ np.diff(other.indptr), shape_of(other)[1])
    start, held = 0, 0.0
    for row, more in enumerate(entries.tolist()):
        if held + more > PRODUCT_ENTRIES and row > start:
            yield slice(start, row)
            start, held = row, 0.0
        held += more
    yield slice(start, len(entries))


def found_of(matches: Matches, among: Mask | None = None) -> Found:
    """Summarise matches.

    Args:
        matches: of one SAE in another.
        among: the features to look at, for example those that fire on a text; all by default.

    Raises:
        BadInputError: no feature is left.
    """
    values, drawn = matches.values, matches.null_values
    if among is not None:
        values, drawn = values[among], drawn[:, among]
    if values.size == 0:
        raise BadInputError("no feature fires on this text; nothing can be matched (more --tokens)")
    hits = int((values > matches.threshold).sum())
    null = matches.null_expects or (float((drawn > matches.threshold).mean()), _mean(drawn))
    return Found(
        hits / values.size,
        values.size,
        wilson_interval(hits, values.size),
        _mean(values),
        *null,
        matches.null,
        matches.method,
    )


def _mean(values: Floats) -> float:
    """Mean of the matches there are; 0 where there is none."""
    held = values[~np.isnan(values)]
    return float(held.mean()) if held.size else 0.0


def agreement(first: Matches, second: Matches) -> dict[str, Any]:
    """Return the share of features whose two matches are one and the same, with its chance.

    Of the features that have both matches.  Chance is what the second's matches give when they are
    dealt out to the features at random.
    """
    both = (first.indices >= 0) & (second.indices >= 0)
    a, b = first.indices[both], second.indices[both]
    if not a.size:
        return {"share": 0.0, "n": 0, "ci": (0.0, 1.0), "chance": 0.0}
    hits, last = int((a == b).sum()), int(max(a.max(), b.max())) + 1
    chance = np.bincount(a, minlength=last) @ np.bincount(b, minlength=last) / a.size**2
    return {
        "share": hits / a.size, "n": int(a.size), "ci": wilson_interval(hits, a.size),
        "chance": float(chance),
    }  # fmt: skip


def follow(
    named: Mapping[str, Sequence[int]],
    by_name: Mapping[str, Matches | None],
    named_there: Mapping[str, Sequence[int]],
) -> list[dict[str, Any]]:
    """Say where each named feature is in the other SAE, and what its match is named there.

    Args:
        named: by rule, the features of this SAE that it counts.
        by_name: matches, under the name of their value ("cosine", "correlation"); None where
            there are none.
        named_there: by rule, the features that it counts in the other SAE.

    Returns:
        A row a feature and rule: each match, its value, and whether the same rule counts it.
    """
    rows = []
    for rule, features in named.items():
        for feature in features:
            row: dict[str, Any] = {"feature": int(feature), "rule": rule}
            for name, matches in by_name.items():
                index = -1 if matches is None else int(matches.indices[feature])
                found = matches is not None and index >= 0
                row[f"{name}_match"] = index if found else None
                row[name] = float(matches.values[feature]) if matches and found else None
                row[f"{name}_counted"] = index in named_there[rule] if found else None
            rows.append(row)
    return rows
