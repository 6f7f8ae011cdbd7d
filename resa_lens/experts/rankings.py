"""Experts ranked by how much they answer to a target, beside nulls that tell something.

Let T be the tokens of the target (a tag's, a phase's, or those of a class of documents), R the
rest, and P the share of tokens that use an expert e of a layer.

    npmi         log(P(e, T) / (P(e) P(T))) / -log P(e, T)       1: only and always together
    rd           P(e | T) - P(e | R)
    rd-matched   sum_t w_t (P(e | t, T) - P(e | t, R))           tokens of one type t alone
    ftri         mean map of T's documents - mean map of R's     map: mean over a document's tokens

with Mantel and Haenszel's weights w_t of n_tT n_tR / (n_tT + n_tR).  nPMI of an expert that is
never used at T is -1.  The first two are those of arXiv 2505.14681 and 2509.09660, functional token
resonance imaging that of arXiv 2502.11096; the matched contrast is ours.

The document is the unit of every error, interval and null.  Words route: two classes of documents
differ in their words, so labels exchanged between documents call nearly every expert significant.
What tells more is an ordinary token type in the tag's place, and equal tokens compared alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_matrix

from resa_lens.errors import BadInputError
from resa_lens.experts.config import LEAST_DOCUMENTS, LEAST_TYPES
from resa_lens.experts.routing import Array, Routing, Texts, document_maps
from resa_lens.stats import arrays, holm, spearman


@dataclass(frozen=True)
class Contrast:
    """The tokens of a target and those that they are compared with."""

    target: Bool[Array, " token"]
    rest: Bool[Array, " token"]
    pairs: Int[Array, " document"] | None = None
    """Where the contrast is between documents, the question that a document is of, if every
    question has one on either side."""
    between: bool = False
    """Whether a document lies on one side as a whole."""

    def within(self, kept: Bool[Array, " token"]) -> Contrast:
        """Return the contrast of some tokens alone."""
        return Contrast(self.target & kept, self.rest & kept, self.pairs, self.between)


def npmi(
    both: Float[Array, "*shape"], expert: Float[Array, "*shape"], target: float, tokens: float
) -> Float[Array, "*shape"]:
    """Return normalised pointwise mutual information from counts of tokens.

    Args:
        both: of the target's tokens that use an expert.
        expert: of all tokens that use it.
        target: of the target's tokens.
        tokens: of all tokens.

    Returns:
        -1 (never together, also for an expert that is never used) to 1 (only and always together).
    """
    joint = np.asarray(both, dtype=float) / tokens
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(joint * tokens**2 / (np.asarray(expert, dtype=float) * target))
        value = value / -np.log(joint)
    value = np.where(joint >= 1, 1.0, value)
    return np.clip(np.where(joint > 0, value, -1.0), -1.0, 1.0)


@dataclass(frozen=True)
class Estimate:
    """A score of every expert with its error over documents."""

    value: Float[Array, "layer expert"]
    error: Float[Array, "layer expert"]
    p_value: Float[Array, "layer expert"]
    """Two-sided, Student's t over documents."""


def risk_difference(
    routing: Routing, texts: Texts, contrast: Contrast, *, matched: bool
) -> Estimate | None:
    """Return the risk difference of every expert, plain or of equal tokens alone.

    Its error is that of the sum of the documents' influences, so a document's tokens count as one
    draw, whatever they share.

    Args:
        routing: of the texts.
        texts: the documents.
        contrast: target and rest.
        matched: whether only tokens of one type are compared.

    Returns:
        None where no token type stands on both sides.
    """
    _, types = np.unique(texts.ids, return_inverse=True)
    types = types if matched else np.zeros_like(types)
    count = int(types.max()) + 1
    sides = (contrast.target, contrast.rest)
    sizes = [np.bincount(types[side], minlength=count).astype(float) for side in sides]
    common = (sizes[0] > 0) & (sizes[1] > 0)
    if not common.any():
        return None
    weight = np.where(common, sizes[0] * sizes[1] / np.maximum(sizes[0] + sizes[1], 1), 0.0)
    weight /= weight.sum()
    value = np.zeros((len(routing.layers), routing.count))
    influence = np.zeros((texts.count, *value.shape))
    for sign, side, size in zip((1.0, -1.0), sides, sizes, strict=True):
        labels = np.where(side & common[types], types, -1)
        share = routing.tally(labels, count) / np.maximum(size, 1)[:, None, None]
        value += sign * np.tensordot(weight, share, 1)
        # What one token adds to the sum; each document's tokens minus what is expected of them.
        each = np.where(labels >= 0, weight[types] / np.maximum(size[types], 1), 0.0)
        own = routing.tally(np.where(labels >= 0, texts.documents, -1), texts.count, each)
        among = coo_matrix((each, (texts.documents, types)), shape=(texts.count, count)).tocsr()
        expected = among @ share.reshape(count, -1)
        influence += sign * (own - expected.reshape(own.shape))
    n = texts.count
    error = np.sqrt((influence**2).sum(0) * n / max(n - 1, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.abs(value) / error
    p = 2 * scipy.stats.t.sf(np.where(error > 0, ratio, np.where(value == 0, 0.0, np.inf)), n - 1)
    return Estimate(value, error, p)


def mean_maps(
    routing: Routing, texts: Texts, contrast: Contrast, *, unit: str = "mean"
) -> tuple[Float[Array, "document layer expert"], Float[Array, " document"], bool]:
    """Return documents' maps, and the weights whose sum over them is the contrast.

    Returns:
        Maps [document, layer, expert], weights [document], and whether the maps are differences
        within a document (or a question), which are exchanged by their signs.

    Raises:
        BadInputError: fewer than 20 documents on a side.
    """
    first, ours = document_maps(routing, texts, contrast.target, unit=unit)
    second, others = document_maps(routing, texts, contrast.rest, unit=unit)
    for side, numbers in (("the target", ours), ("what it is compared with", others)):
        if len(numbers) < LEAST_DOCUMENTS:
            raise BadInputError(
                f"{side} has {len(numbers)} documents and needs {LEAST_DOCUMENTS}; give more "
                "--text-tokens"
            )
    if contrast.between and contrast.pairs is None:
        weights = np.r_[np.full(len(first), 1 / len(first)), np.full(len(second), -1 / len(second))]
        return np.concatenate([first, second]), weights, False
    key = np.arange(texts.count) if contrast.pairs is None else contrast.pairs
    common, left, right = np.intersect1d(key[ours], key[others], return_indices=True)
    return first[left] - second[right], np.full(len(common), 1 / len(common)), True


def exchange_p(
    maps: Float[Array, "document layer expert"],
    weights: Float[Array, " document"],
    *,
    signs: bool,
    draws: int,
    seed: int,
) -> Float[Array, "layer expert"]:
    """Return two-sided p-values of labels exchanged between documents.

    Args:
        maps: of documents, or differences within them.
        weights: whose sum over the maps is the contrast.
        signs: flip the maps' signs, in place of permuting the weights.
        draws: of the null.
        seed: of the draws.
    """
    flat = maps.reshape(len(maps), -1)
    observed = np.abs(weights @ flat)
    slack = 1e-9 * max(float(observed.max(initial=0.0)), 1e-12)
    rng, hits = np.random.default_rng(seed), np.zeros(flat.shape[1])
    rows = max(1, arrays.CHUNK // max(flat.shape[1], len(maps)))
    for start in range(0, draws, rows):
        many = min(rows, draws - start)
        if signs:
            drawn = weights * rng.choice((-1.0, 1.0), size=(many, len(maps)))
        else:
            drawn = rng.permuted(np.tile(weights, (many, 1)), axis=1)
        hits += (np.abs(drawn @ flat) >= observed - slack).sum(0)
    return ((1 + hits) / (1 + draws)).reshape(maps.shape[1:])


@dataclass(frozen=True)
class TypeNull:
    """Ordinary token types in a tag's place."""

    types: tuple[str, ...]
    """As texts."""
    ids: tuple[int, ...]
    best: Float[Array, " type"]
    """The largest score that any expert has for the type."""
    experts: tuple[tuple[int, int], ...]
    """(place of the layer, expert) that has it."""
    maps: Float[Array, "type layer expert"]
    """Scores of all experts."""

    def p_values(self, scores: Float[Array, "layer expert"]) -> Float[Array, "layer expert"]:
        """Return for each expert the share of types whose best expert answers as strongly.

        (1 + types whose best score is at least as large) / (1 + types): the largest of all experts
        is compared, so the values hold for all experts at once.
        """
        reach = (self.best[:, None, None] >= scores[None] - 1e-12).sum(0)
        return (1 + reach) / (1 + len(self.best))


Score = Callable[[Contrast], Float[Array, "layer expert"]]


def score_function(routing: Routing, texts: Texts, by: str, *, unit: str = "mean") -> Score:
    """Return what scores a contrast by npmi, rd or ftri.

    Args:
        routing: of the texts.
        texts: the documents.
        by: which one.
        unit: of a document's map.
    """

    def score(contrast: Contrast) -> Float[Array, "layer expert"]:
        kept = contrast.target | contrast.rest
        labels = np.where(contrast.target, 1, np.where(contrast.rest, 0, -1))
        rest, target = routing.tally(labels, 2)
        inside, all_tokens = int(contrast.target.sum()), int(kept.sum())
        if by == "npmi":
            return npmi(target, target + rest, inside, all_tokens)
        if by == "rd":
            return target / max(inside, 1) - rest / max(all_tokens - inside, 1)
        if by == "ftri":
            maps, weights, _ = mean_maps(routing, texts, contrast, unit=unit)
            return np.tensordot(weights, maps, 1)
        estimate = risk_difference(routing, texts, contrast, matched=True)
        if estimate is None:
            raise BadInputError(
                "no token of the target stands elsewhere too, so there are no equal tokens to "
                "compare; take another target, or rank by rd"
            )
        return estimate.value

    return score


def type_null(
    texts: Texts,
    marked: Bool[Array, " token"],
    score: Score,
    *,
    types: int,
    special: set[int],
    names: Callable[[int], str],
) -> TypeNull:
    """Put ordinary token types of like frequency in a tag's place.

    Args:
        texts: the documents.
        marked: the tag's tokens.
        score: of `score_function`.
        types: how many; those whose number of tokens is nearest to the tag's.
        special: ids that are no ordinary tokens.
        names: the text of an id.

    Raises:
        BadInputError: fewer than 20 types stand in 20 documents.
    """
    ids, counts = np.unique(texts.ids, return_counts=True)
    wide = coo_matrix(
        (np.ones(len(texts.ids)), (np.searchsorted(ids, texts.ids), texts.documents))
    ).tocsr()
    documents = np.diff(wide.indptr)
    barred = special | set(np.unique(texts.ids[marked]).tolist())
    ordinary = np.array([int(i) not in barred for i in ids]) & (documents >= LEAST_DOCUMENTS)
    if ordinary.sum() < LEAST_TYPES:
        raise BadInputError(
            f"{int(ordinary.sum())} ordinary token types stand in {LEAST_DOCUMENTS} documents, and "
            f"{LEAST_TYPES} must stand in the tag's place; give more --text-tokens"
        )
    distance = np.abs(np.log(counts / max(int(marked.sum()), 1)))
    order = np.argsort(np.where(ordinary, distance, np.inf), kind="stable")
    chosen = order[: min(types, int(ordinary.sum()))]
    maps = []
    for at in chosen:
        target = texts.ids == ids[at]
        maps.append(score(Contrast(target, ~target)))
    table = np.stack(maps)
    flat = table.reshape(len(table), -1)
    best = flat.argmax(1)
    return TypeNull(
        tuple(names(int(ids[at])) for at in chosen), tuple(int(ids[at]) for at in chosen),
        flat.max(1), tuple((int(b) // table.shape[2], int(b) % table.shape[2]) for b in best),
        table,
    )  # fmt: skip


def split_halves(texts: Texts, contrast: Contrast, score: Score, seed: int) -> tuple[float, int]:
    """Return Spearman's rank correlation of the scores of two halves, and the documents of one.

    Args:
        texts: the documents.
        contrast: target and rest.
        score: of `score_function`.
        seed: of the split; both documents of a question stay together.
    """
    key = np.arange(texts.count) if contrast.pairs is None else contrast.pairs
    names = np.unique(key)
    first = np.random.default_rng(seed).permutation(names)[: len(names) // 2]
    inside = np.isin(key, first)[texts.documents]
    halves = [score(contrast.within(side)).ravel() for side in (inside, ~inside)]
    return spearman(halves[0], halves[1], draws=1)[0], len(first)


def corrected(p_values: Float[Array, "layer expert"]) -> Float[Array, "layer expert"]:
    """Return p-values after Holm's correction for all experts of all layers."""
    return holm(p_values.ravel()).reshape(p_values.shape)
