"""Scores of features between reasoning text and other text, each with its null (spec, section 8).

One interface: a score takes the `Evidence` and gives, for every feature that is active at all, a
value, the value that its null expects, and a p-value.  Activations stay sparse: a feature's zeros
are one block of equal values, counted and never stored.

Tokens are not independent, so no null moves single tokens, and a text's thoughts stand at some
positions rather than others, so the contrasts' nulls (`features.contrast_nulls`) compare within
positions.  ReasonScore's null rotates the words' places in every document by an offset of its own:
it keeps a feature's runs, not its positions, so ReasonScore alone also names features of positions
near which the words use to stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import log

import numpy as np
from jaxtyping import Float
from scipy import sparse

from resa_lens.errors import BadInputError
from resa_lens.features.chance import rule_chance
from resa_lens.features.contrast_nulls import NULLS, contrast_tails, row_blocks, split_labels
from resa_lens.features.evidence import Evidence, Ints, Mask, shape_of
from resa_lens.features.exclusive import RULES, exclusive_features
from resa_lens.stats import (
    Floats,
    Seed,
    TailCounts,
    benjamini_hochberg,
    circular_shifts,
    holm,
    multinomial_draws,
)

ALPHA = 0.7
"""Exponent of the entropy in ReasonScore (arXiv 2503.18878)."""
SMOOTHING = 0.5
"""Added to the active and to the silent tokens of each group in `frequency_ratio`."""
DRAWS = 1000
CORRECTIONS = {"bh": benjamini_hochberg, "holm": holm}
"""Of p-values for all features tested: false discovery rate, or any false call at all."""


@dataclass(frozen=True)
class Scored:
    """One score of all features that it can test."""

    features: Ints
    values: Floats
    null: Floats
    """The value that the null expects."""
    p: Floats
    active_tokens: Ints
    active_documents: Ints
    sizes: dict[str, int]
    """Tokens and documents on either side: of the two groups, of reasoning words and the rest, of
    the tags and the rest of the prompt."""


# Differences between the groups: Cohen's d, AUC, frequency ratio


@dataclass(frozen=True)
class Contrast:
    """A score made of a feature's mean over reasoning tokens and over other tokens."""

    transform: Callable[[sparse.csr_array], sparse.csr_array]
    """What is averaged, made of the activations; zero where a feature is silent."""
    value: Callable[..., Floats]
    """The score from: sum over reasoning tokens, sum and sum of squares over all, tokens."""


def cohens_d(part: Floats, total: Floats, squares: Floats, n_part: Floats, n: Floats) -> Floats:
    """(mean_R - mean_O) / pooled standard deviation within the groups (Cohen 1988)."""
    rest, n_rest = total - part, n - n_part
    gap = part / n_part - rest / n_rest
    inside = squares - part**2 / n_part - rest**2 / n_rest
    # What is left after subtraction is rounding where neither group varies.
    sd = np.sqrt(np.where(inside > 1e-12 * squares, inside, 0.0) / (n - 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gap == 0, 0.0, gap / sd)


def _auc(part: Floats, total: Floats, squares: Floats, n_part: Floats, n: Floats) -> Floats:
    """P(reasoning token above other token) + P(equal) / 2, from midranks (Mann-Whitney)."""
    return 0.5 + (part / n_part - (total - part) / (n - n_part)) / n


def _ratio(part: Floats, total: Floats, squares: Floats, n_part: Floats, n: Floats) -> Floats:
    """Share of reasoning tokens where a feature is active, over that of other tokens; smoothed."""
    shares = (part + SMOOTHING) / (n_part + 2 * SMOOTHING)
    return shares / ((total - part + SMOOTHING) / (n - n_part + 2 * SMOOTHING))


def _same(acts: sparse.csr_array, values: Floats) -> sparse.csr_array:
    return sparse.csr_array((values, acts.indices, acts.indptr), shape=acts.shape)


def midrank_excess(acts: sparse.csr_array) -> sparse.csr_array:
    """Return each active token's midrank among all tokens, less the midrank of the zeros."""
    tokens, active = shape_of(acts)[1], np.diff(acts.indptr)
    row = np.repeat(np.arange(active.size), active)
    order = np.lexsort((acts.data, row))
    ranked, rows = acts.data[order], row[order]
    new = np.ones(order.size, dtype=bool)
    new[1:] = (ranked[1:] != ranked[:-1]) | (rows[1:] != rows[:-1])
    first = np.flatnonzero(new)
    ties = np.diff(np.append(first, order.size))
    run = new.cumsum() - 1
    below = first[run] - acts.indptr[rows]
    zeros = tokens - active[rows]
    excess = np.empty(order.size)
    excess[order] = zeros + below + (ties[run] + 1) / 2 - (zeros + 1) / 2
    return _same(acts, excess)


CONTRASTS = {
    "cohens_d": Contrast(lambda acts: _same(acts, acts.data.astype(np.float64)), cohens_d),
    "auc": Contrast(midrank_excess, _auc),
    "frequency_ratio": Contrast(lambda acts: _same(acts, np.ones(acts.nnz)), _ratio),
}


def score_contrast(contrast: Contrast, evidence: Evidence, draws: int, seed: Seed) -> Scored:
    """Compute a contrast and its two-sided p-value.

    What is tested is the difference of the two means, of which each score is a rising function,
    beyond what positions and documents explain, in its standard error over documents.
    """
    phi = contrast.transform(evidence.acts)
    n, labels = np.float64(shape_of(phi)[1]), evidence.reasoning.astype(np.float64)
    total, squares = phi.sum(axis=1), phi.power(2).sum(axis=1)
    chance = split_labels(evidence).expected
    tails = contrast_tails(phi, evidence, draws, seed)
    value, null = (
        contrast.value(phi @ part, total, squares, part.sum(), n) for part in (labels, chance)
    )
    return _scored(evidence, evidence.reasoning, value, null, tails.two_sided())


def _scored(evidence: Evidence, part: Mask, value: Floats, null: Floats, p: Floats) -> Scored:
    held = _per_document(evidence.acts, evidence)
    return Scored(
        evidence.features, value, null, p,
        np.diff(evidence.acts.indptr).astype(np.int64),
        np.diff(held.indptr).astype(np.int64), evidence.sizes(part),
    )  # fmt: skip


def _per_document(phi: sparse.csr_array, evidence: Evidence) -> sparse.csr_array:
    """Sums over each document's tokens, [feature, document]."""
    tokens = np.arange(evidence.document.size)
    belongs = sparse.csr_array((np.ones(tokens.size), (tokens, evidence.document)))
    return sparse.csr_array(phi @ belongs)


# ReasonScore


def reason_score(
    near: Floats, by_word: Sequence[Floats], away: Floats, all_near: Floats, all_away: Floats
) -> Floats:
    """mean+ / sum(mean+) x H_norm^0.7 - mean- / sum(mean-) (arXiv 2503.18878).

    The authors scale activations by the decoder's norms; here decoders are of unit norm.

    Args:
        near: mean activation over the tokens near any reasoning word, mean+.
        by_word: the same of each word.
        away: over all other tokens, mean-.
        all_near: mean+ summed over all features.
        all_away: mean- summed over all features.
    """
    whole, spread = np.zeros_like(near), np.zeros_like(near)
    for mean in by_word:
        whole = whole + mean
        spread = spread + np.where(mean > 0, mean * np.log(np.where(mean > 0, mean, 1.0)), 0.0)
    entropy = np.ones_like(near)
    if len(by_word) > 1:
        safe = np.where(whole > 0, whole, 1.0)
        # -sum p ln p with p = mean / whole; rounding may pass below zero.
        entropy = np.maximum(np.log(safe) - spread / safe, 0.0) / log(len(by_word))
    return near / all_near * entropy**ALPHA - away / all_away


def score_reason(evidence: Evidence, draws: int, seed: Seed) -> Scored:
    """ReasonScore, and P(at least as large) where each document's words stand elsewhere in it."""
    check_words(evidence.words, evidence.windows)
    phi = _same(evidence.acts, evidence.acts.data.astype(np.float64))
    masks = np.concatenate([evidence.windows.any(0, keepdims=True), evidence.windows])
    activity = np.asarray(phi.sum(axis=0))
    value = _reason(phi, masks[:, None], activity)[:, 0]
    tails, null = TailCounts(value, draws), np.zeros_like(value)
    for index in circular_shifts(evidence.lengths, draws, seed):
        # Few draws at once: every word has its own product.
        for few in np.array_split(index, max(1, len(index) // 32)):
            drawn = masks[:, few]
            for part in row_blocks(shape_of(phi)[0]):
                found = _reason(phi[part], drawn, activity)
                tails.add(found, part)
                null[part] += found.sum(axis=1)
    return _scored(evidence, masks[0], value, null / draws, tails.upper())


def check_words(words: Sequence[str], windows: Mask) -> None:
    """Raise BadInputError where no reasoning word occurs, or every token is near one."""
    near = windows.any(0) if len(windows) else np.zeros(1, dtype=bool)
    if not near.any() or near.all():
        what, does = ("one", "stands near every token") if near.any() else ("none", "occurs")
        named = ", ".join(map(repr, words)) or "no word given"
        raise BadInputError(
            f"reason_score: {what} of the reasoning words ({named}) {does} in this text; give "
            "words of it, for example --words '=,;' where the steps are arithmetic"
        )


def _reason(phi: sparse.csr_array, masks: Mask, activity: Floats) -> Floats:
    """ReasonScore [feature, draw]; masks [1 + word, draw, token], first the words' union."""
    tokens, total = masks.shape[2], np.asarray(phi.sum(axis=1))[:, None]
    silent = np.zeros((shape_of(phi)[0], masks.shape[1]))
    sums = [phi @ mask.T.astype(np.float64, "C") if mask.any() else silent for mask in masks]
    counts = masks.sum(axis=2)
    near_all = masks[0] @ activity
    return _reason_of_sums(sums, counts, total, tokens, near_all, activity.sum())


def _reason_of_sums(
    sums: Sequence[Floats],
    counts: Sequence[Floats],
    total: Floats,
    tokens: Floats | int,
    near_all: Floats,
    total_all: Floats,
) -> Floats:
    """ReasonScore from sums near any word and near each, their tokens, and all features' sums."""
    away = tokens - counts[0]
    means = [s / np.maximum(c, 1) for s, c in zip(sums, counts, strict=True)]
    return reason_score(
        means[0], means[1:], (total - sums[0]) / away,
        np.maximum(near_all / counts[0], 1e-12), np.maximum((total_all - near_all) / away, 1e-12),
    )  # fmt: skip


# The exclusive rules


def score_rule(rule: str, evidence: Evidence, draws: int, seed: Seed) -> Scored:
    """1 where the rule names a feature, else 0, and the exact chance of it.

    The null keeps each feature's active positions and puts the tags' occurrences at random places
    of the same prompt; nothing is drawn.
    """
    held = evidence.prompt
    if held is None:
        raise BadInputError(f"score {rule!r} is about the tagged prompt; none was given")
    acts = held.acts
    above = acts.values > held.threshold
    rows, latents = acts.rows[above].cpu().numpy(), acts.latents[above].cpu().numpy()
    named = exclusive_features(
        acts, held.prompt, threshold=held.threshold, ignore_first=held.ignore_first
    )[rule]
    features, counts = np.unique(latents, return_counts=True)
    order = latents.argsort(kind="stable")
    places = np.split(rows[order], counts.cumsum()[:-1]) if features.size else []
    spans = tuple(
        tuple(sorted(len(span) for span in side))
        for side in (held.prompt.open_spans, held.prompt.close_spans)
    )
    null = np.array(
        [
            rule_chance(rule, frozenset(p.tolist()), acts.n_rows, *spans, held.ignore_first)
            for p in places
        ]
    )
    value = np.isin(features, named).astype(np.float64)
    tags = sum(map(sum, spans))
    return Scored(
        features, value, null, np.where(value > 0, null, 1.0), counts.astype(np.int64),
        np.ones_like(features), {
            "reasoning_tokens": tags, "other_tokens": acts.n_rows - tags,
            "reasoning_documents": 1, "other_documents": 1,
        },
    )  # fmt: skip


SCORES: dict[str, Callable[[Evidence, int, Seed], Scored]] = {
    **{rule: partial(score_rule, rule) for rule in RULES},
    "reason_score": score_reason,
    **{name: partial(score_contrast, contrast) for name, contrast in CONTRASTS.items()},
}
"""Scores by name: evidence, draws of the null and a seed in, `Scored` out."""


def null_of(name: str, design: str) -> str:
    """Return in words what chance does in the null of a score."""
    if name in RULES:
        return "tags at random places of the prompt"
    if name in CONTRASTS:
        return NULLS[design]
    return "words rotated within documents"


def check_scores(names: Sequence[str]) -> None:
    """Raise BadInputError for a score that does not exist."""
    for name in names:
        if name not in SCORES:
            raise BadInputError(f"score {name!r} is unknown; use {', '.join(SCORES)}")


# Intervals


def intervals(
    name: str,
    evidence: Evidence,
    features: Sequence[int],
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: Seed = 0,
) -> Float[np.ndarray, "feature 2"]:
    """Bootstrap a score over documents, for a few features; each group's documents apart.

    An exclusive rule is about one prompt: it has no interval (nan).
    """
    rows = np.searchsorted(evidence.features, features)
    if name in RULES or not rows.size:
        return np.full((rows.size, 2), np.nan)
    weights = _document_weights(evidence, draws, seed)
    phi = _same(evidence.acts, evidence.acts.data.astype(np.float64))
    if name == "auc":
        few = np.array_split(weights, -(-draws // 50), axis=1)
        aucs = ([_weighted_auc(phi[[row]], evidence, part) for part in few] for row in rows)
        drawn = np.stack([np.concatenate(parts) for parts in aucs])
    elif name == "reason_score":
        drawn = _weighted_reason(phi, rows, evidence, weights)
    else:
        phi = CONTRASTS[name].transform(phi[rows])
        tables = (phi * evidence.reasoning, phi, phi.power(2))
        sums = (_per_document(sparse.csr_array(t), evidence) @ weights for t in tables)
        sizes = (evidence.by_document @ weights, evidence.lengths @ weights)
        drawn = CONTRASTS[name].value(*sums, *sizes)
    tails = [0.5 - level / 2, 0.5 + level / 2]
    # A draw without a token of one group has no value.
    return np.nanquantile(drawn, tails, axis=1).T


def _document_weights(evidence: Evidence, draws: int, seed: Seed) -> Floats:
    """How often each document is drawn, [document, draw]; groups of whole documents apart."""
    strata = np.zeros(evidence.lengths.size, dtype=bool)
    if evidence.design == "documents":
        strata = evidence.by_document > 0
    weights = np.empty((strata.size, draws))
    for number, stratum in enumerate((strata, ~strata)):
        if n := int(stratum.sum()):
            drawn = multinomial_draws(n, np.ones(n), draws, [*np.atleast_1d(seed), number])
            weights[stratum] = drawn.T
    return weights


def _weighted_auc(acts: sparse.csr_array, evidence: Evidence, weights: Floats) -> Floats:
    """AUC of one feature [1, token] with a weight a document, [draw]; its ties counted anew."""
    order = acts.data.argsort(kind="stable")
    tokens, values = acts.indices[order], acts.data[order]
    first = np.flatnonzero(np.append(True, values[1:] != values[:-1])) if values.size else []
    reasoning = evidence.reasoning[tokens, None]
    each = weights[evidence.document[tokens]]
    size = evidence.by_document @ weights
    sizes = (size, evidence.lengths @ weights - size)
    parts = []
    for n, chosen in zip(sizes, (reasoning, ~reasoning), strict=True):
        steps = np.add.reduceat(each * chosen, first, axis=0)
        parts.append(np.vstack([n - steps.sum(axis=0), steps]))  # first the zeros
    above, below = parts
    lower = below.cumsum(axis=0) - below / 2
    with np.errstate(invalid="ignore"):
        return (above * lower).sum(axis=0) / (sizes[0] * sizes[1])


def _weighted_reason(
    phi: sparse.csr_array, rows: Ints, evidence: Evidence, weights: Floats
) -> Floats:
    """ReasonScore of some features with a weight a document, [feature, draw]."""
    masks = np.concatenate([evidence.windows.any(0, keepdims=True), evidence.windows])
    activity = np.asarray(phi.sum(axis=0))

    def by_document(values: Floats) -> Floats:
        return np.bincount(evidence.document, values, evidence.lengths.size) @ weights

    chosen = sparse.csr_array(phi[rows])
    sums = [_per_document(sparse.csr_array(chosen * mask), evidence) @ weights for mask in masks]
    counts = [by_document(mask.astype(np.float64)) for mask in masks]
    counts[0] = np.where(counts[0] > 0, counts[0], np.nan)  # a draw without any of the words
    return _reason_of_sums(
        sums, counts, _per_document(chosen, evidence) @ weights, evidence.lengths @ weights,
        by_document(activity * masks[0]), by_document(activity),
    )  # fmt: skip
