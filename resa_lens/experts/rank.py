"""A ranking of experts, whole: scores, nulls, and what is called by which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from resa_lens.errors import BadInputError
from resa_lens.experts.config import LEAST_DOCUMENTS, RankConfig
from resa_lens.experts.rankings import (
    Contrast,
    Estimate,
    TypeNull,
    corrected,
    exchange_p,
    mean_maps,
    risk_difference,
    score_function,
    split_halves,
    type_null,
)
from resa_lens.experts.routing import Array, Routing, Texts
from resa_lens.stats import spearman
from resa_lens.texts.prompts import PHASES

LEVEL = 0.05
OVERLAP = 10
"""Of so many best experts two rankings are compared."""


@dataclass(frozen=True)
class Classes:
    """Documents by class."""

    names: tuple[str, ...]
    of: Int[Array, " document"]
    """Index of each document's class."""
    pairs: Int[Array, " document"] | None = None
    """The question that a document is of, where each has one of every class."""

    def check(self) -> None:
        """Raise BadInputError where there is one class only, or one with too few documents."""
        sizes = np.bincount(self.of, minlength=len(self.names))
        if len(self.names) < 2 or (sizes > 0).sum() < 2:
            raise BadInputError(
                f"there is one class of documents ({self.names[0] if self.names else 'none'}); a "
                "contrast needs two"
            )
        for name, size in zip(self.names, sizes.tolist(), strict=True):
            if size < LEAST_DOCUMENTS:
                raise BadInputError(
                    f"class {name!a:.60} has {size} documents and needs {LEAST_DOCUMENTS}; give "
                    "more data, or more --text-tokens"
                )


def contrast_of(texts: Texts, target: str, classes: Classes | None) -> Contrast:
    """Return the tokens of a target and those that they are compared with.

    Args:
        texts: the documents.
        target: a class, a phase, or a tag that the texts mark.
        classes: of the documents.

    Raises:
        BadInputError: the target is missing, or a class or a tag has too few documents.
    """
    if classes is not None and target in classes.names:
        classes.check()
        inside = (classes.of == classes.names.index(target))[texts.documents]
        pairs = classes.pairs if len(classes.names) == 2 else None
        return Contrast(inside, ~inside, pairs, between=True)
    if target in PHASES:
        inside = texts.phases == PHASES.index(target)
        if not inside.any() or inside.all():
            raise BadInputError(f"the documents have no contrast of {target}: all or none of it")
        return Contrast(inside, ~inside)
    if classes is not None and target not in texts.marks:
        raise BadInputError(
            f"target {target!a:.60} is no class here; use {', '.join(classes.names)}"
        )
    inside = texts.mark(target)
    return Contrast(inside, ~inside)


@dataclass(frozen=True)
class Ranking:
    """Scores of all experts for a target, and what the nulls make of them."""

    target: str
    by: str
    layers: tuple[int, ...]
    score: Float[Array, "layer expert"]
    """By `by`: what ranks, the largest first."""
    scores: Mapping[str, Float[Array, "layer expert"]]
    """By every measure that can be had."""
    errors: Mapping[str, Float[Array, "layer expert"]]
    p_value: Float[Array, "layer expert"]
    """Of labels exchanged between documents; of rd-matched Student's t over documents."""
    p_holm: Float[Array, "layer expert"]
    types: TypeNull | None
    type_p: Float[Array, "layer expert"] | None
    split_half: float
    half_documents: int
    agreement: Mapping[str, Any]
    """Between plain and token-matched: Spearman, and how many of the ten best are the same."""
    notes: tuple[str, ...] = ()

    @property
    def order(self) -> list[tuple[int, int]]:
        """(place of the layer, expert), the strongest first."""
        count = self.score.shape[1]
        order = np.argsort(-self.score.ravel(), kind="stable").tolist()
        return [(i // count, i % count) for i in order]

    def rank_of(self, layer: int, expert: int) -> int:
        """Return the rank of an expert of a 0-based layer, 1 for the strongest."""
        return self.order.index((self.layers.index(layer), expert)) + 1

    def row(self, place: tuple[int, int]) -> dict[str, Any]:
        """Return one expert as JSON has it."""
        row: dict[str, Any] = {
            "layer": self.layers[place[0]],
            "expert": place[1],
            "scores": {name: float(values[place]) for name, values in self.scores.items()},
            "errors": {name: float(values[place]) for name, values in self.errors.items()},
            "p_value": float(self.p_value[place]),
            "p_holm": float(self.p_holm[place]),
            "type_p": None if self.type_p is None else float(self.type_p[place]),
        }
        return row

    def null(self) -> dict[str, Any]:
        """Return what the nulls say, as JSON has it."""
        best = self.order[0]
        value: dict[str, Any] = {
            "exchanged_labels": {
                "called": int((self.p_holm < LEVEL).sum()), "of": int(self.p_holm.size),
            },
            "split_half": {"spearman": self.split_half, "documents": self.half_documents},
            "token_matched": dict(self.agreement),
            "token_types": None,
        }  # fmt: skip
        if self.types is not None and self.type_p is not None:
            value["token_types"] = {
                "types": list(self.types.types),
                "best": [float(v) for v in self.types.best],
                "experts": [[self.layers[at], e] for at, e in self.types.experts],
                "reached_by": int((self.types.best >= self.score[best] - 1e-12).sum()),
                "p_value": float(self.type_p[best]),
                "called": int((self.type_p < LEVEL).sum()),
            }
        return value


def rank_experts(
    routing: Routing,
    texts: Texts,
    config: RankConfig,
    target: str,
    tokenizer: Any,
    classes: Classes | None = None,
) -> Ranking:
    """Rank the experts for a target.

    Args:
        routing: of the texts.
        texts: the documents.
        config: by what, and the nulls' sizes.
        target: as of `contrast_of`.
        tokenizer: for the names of token types.
        classes: of the documents.

    Raises:
        BadInputError: as `contrast_of`, and where `by` cannot be had.
    """
    contrast = contrast_of(texts, target, classes)
    unit, by = config.use.unit, config.measure
    scores: dict[str, Array] = {}
    errors: dict[str, Array] = {}
    for name in ("npmi", "rd", "ftri"):
        scores[name] = score_function(routing, texts, name, unit=unit)(contrast)
    plain = risk_difference(routing, texts, contrast, matched=False)
    matched = risk_difference(routing, texts, contrast, matched=True)
    assert plain is not None
    errors["rd"] = plain.error
    notes = []
    if matched is not None:
        scores["rd-matched"], errors["rd-matched"] = matched.value, matched.error
    elif by == "rd-matched":
        score_function(routing, texts, by)(contrast)  # says why
    else:
        notes.append("no token of the target stands elsewhere, so nothing is token-matched")
    p_value = _p_values(routing, texts, contrast, config, matched)
    if by != "rd-matched" and p_value.size / (config.draws + 1) > LEVEL:
        needed = int(p_value.size / LEVEL)
        notes.append(f"Holm over {p_value.size} experts calls none with less than {needed} --draws")
    types = None
    if target in texts.marks and (classes is None or target not in classes.names):
        if texts.pieces.get(target, 1) > 1:
            notes.append(f"{target} is {texts.pieces[target]} tokens here; its last one counts")
        if by != "rd-matched":
            special = set(tokenizer.all_special_ids)
            special |= {int(i) for mark in texts.marks.values() for i in texts.ids[mark]}
            types = type_null(
                texts, contrast.target, score_function(routing, texts, by, unit=unit),
                types=config.types, special=special, names=lambda i: tokenizer.decode([i]),
            )  # fmt: skip
    score = score_function(routing, texts, by, unit=unit)
    split, documents = split_halves(texts, contrast, score, config.seed)
    return Ranking(
        target, by, routing.layers, scores[by], scores, errors, p_value, corrected(p_value), types,
        None if types is None else types.p_values(scores[by]), split, documents,
        _agreement(scores), tuple(notes),
    )  # fmt: skip


def _p_values(
    routing: Routing, texts: Texts, contrast: Contrast, config: RankConfig, matched: Estimate | None
) -> Array:
    if config.measure == "rd-matched":
        assert matched is not None
        return matched.p_value
    maps, weights, signs = mean_maps(routing, texts, contrast, unit=config.use.unit)
    return exchange_p(maps, weights, signs=signs, draws=config.draws, seed=config.seed)


def _agreement(scores: Mapping[str, Array]) -> dict[str, Any]:
    if "rd-matched" not in scores:
        return {"spearman": None, "same_of_best": None, "of": OVERLAP}
    first, second = (np.abs(scores[name]).ravel() for name in ("rd", "rd-matched"))
    tops = [set(np.argsort(-values, kind="stable")[:OVERLAP].tolist()) for values in
            (first, second)]  # fmt: skip
    rho, _ = spearman(scores["rd"].ravel(), scores["rd-matched"].ravel(), draws=1)
    return {"spearman": rho, "same_of_best": len(tops[0] & tops[1]), "of": OVERLAP}


def best_of_types(
    types: TypeNull, layers: Sequence[int], top: int
) -> dict[str, dict[int, tuple[int, ...]]]:
    """Return, by token type, its best experts by 0-based layer: what a tag's are compared with."""
    table: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, scores in zip(types.types, types.maps, strict=True):
        chosen: dict[int, list[int]] = {}
        for i in np.argsort(-scores.ravel(), kind="stable")[:top].tolist():
            chosen.setdefault(layers[i // scores.shape[1]], []).append(i % scores.shape[1])
        table[name] = {layer: tuple(experts) for layer, experts in chosen.items()}
    return table
