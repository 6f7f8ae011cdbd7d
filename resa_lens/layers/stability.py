"""Does a recommendation return: over prompts, counting rules and SAE seeds, or any other tables.

Tables of one SAE share its features, whatever the prompt and the rule, so their agreement is no
independent evidence: its p says only that they are not unrelated.  What is independent is a block
(an SAE seed); the null moves the layers of every block at random, all tables of a block together,
and keeps what they share within it.  It takes layers as exchangeable: of independent profiles that
vary smoothly over 26 layers (correlation length 1 and 3) 12 and 20 % reach p of 0.05, so the
verdict also asks for the same first layer in two blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from resa_lens import stats
from resa_lens.errors import BadInputError
from resa_lens.layers.alignment import ALPHA, align, rank_agreement
from resa_lens.layers.selectors import Recommendation, recommend
from resa_lens.models.hookpoints import describe_layer
from resa_lens.stats import Floats

STABLE, UNSTABLE, UNTESTED = "stable", "not stable", "not testable"
Factors = Mapping[str, str]
"""What a table was made with: {"prompt": "r1", "rule": "all", "seed": "0"}."""


@dataclass(frozen=True)
class StableTable:
    """One table's own answer."""

    name: str
    factors: dict[str, str]
    n: float
    """Features."""
    verdict: str
    recommended: tuple[int, ...]
    selector: str
    """ "middle" where the table singles out no layer: it then counts as no answer."""
    reason: str

    @property
    def answered(self) -> bool:
        """Whether the layers come from the table."""
        return self.selector != "middle"


@dataclass(frozen=True)
class StablePair:
    """Two tables compared."""

    a: str
    b: str
    differ: tuple[str, ...]
    """The factors in which they differ."""
    spearman: float | None
    """Of the profiles over the layers in common."""
    spearman_p: float | None
    alignment: float | None
    """Largest difference of sorted means in layers; None where the fits have other K, or none."""
    alignment_p: float | None
    """Share of shuffles of a's profile that come as close."""
    same_first: bool | None
    """Whether both recommend the same layer first; None where one gives no answer."""


@dataclass(frozen=True)
class FactorAgreement:
    """Pairs that differ in one factor alone, or between blocks."""

    factor: str
    pairs: int
    spearman: float | None
    """Mean over the pairs; None without a pair that varies."""
    spearman_p: float | None
    """Share of draws with at least that mean, the layers moved at random: the same way in all
    tables with one value of the factor (in all tables of one block), another way in the others."""
    answered: int
    """Pairs where both tables answer."""
    same_first: int
    """Of those, pairs with the same first layer."""
    chance: float
    """Share of pairs that would have the same first layer if each were any layer: 1 / layers."""
    draws: int


@dataclass(frozen=True)
class Stability:
    """How far a recommendation depends on what it was made with."""

    tables: tuple[StableTable, ...]
    pairs: tuple[StablePair, ...]
    factors: tuple[FactorAgreement, ...]
    """One factor varied, the others kept."""
    between: FactorAgreement | None
    """All pairs of tables of two blocks; None with one block."""
    blocks: int
    layers: tuple[int, ...]
    """Those in common, 0-based."""
    first: dict[int, int]
    """{layer: tables that recommend it first}, answers only, most frequent first."""
    recommended: dict[int, int]
    """{layer: tables that recommend it at any rank}, answers only."""
    verdict: str
    reason: str
    next_step: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; layers with their counts become lists."""
        plain = asdict(self)
        for key in ("first", "recommended"):
            plain[key] = [{"layer": k, "tables": v} for k, v in plain[key].items()]
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Stability:
        """Read what `to_dict` wrote."""
        return cls(
            **{
                **values,
                "tables": tuple(
                    StableTable(**{**t, "recommended": tuple(t["recommended"])})
                    for t in values["tables"]
                ),
                "pairs": tuple(
                    StablePair(**{**p, "differ": tuple(p["differ"])}) for p in values["pairs"]
                ),
                "factors": tuple(FactorAgreement(**f) for f in values["factors"]),
                "between": FactorAgreement(**values["between"]) if values["between"] else None,
                "layers": tuple(values["layers"]),
                "first": {item["layer"]: item["tables"] for item in values["first"]},
                "recommended": {item["layer"]: item["tables"] for item in values["recommended"]},
            }
        )


def stability(
    tables: Mapping[str, Mapping[int, float]],
    *,
    n_layers: int,
    factors: Mapping[str, Factors] | None = None,
    block: str | None = None,
    selector: str = "mixture",
    recipe: str = "robust",
    draws: int = 1000,
    seed: int = 0,
) -> Stability:
    """Recommend from each table and say how often the answer returns.

    Args:
        tables: {name: {0-based layer: count}}, two or more.
        n_layers: of the model.
        factors: {name: what the table was made with}; every table has the same factors.  Without
            them the tables differ in one factor, "table".
        block: the factor whose values are independent of each other (the SAE seed); every table is
            a block of its own where not given.
        selector: of the recommendations.
        recipe: of the fits.
        draws: of every null.
        seed: of the fits and the draws.

    Returns:
        Verdict "stable" where one layer comes first in more than half of all tables, those of two
        blocks or more among them, and the profiles of different blocks go together beyond chance
        (p at most 0.05); "not testable" with one block, or where fewer than two tables give an
        answer.

    Raises:
        BadInputError: fewer than two tables, factors that do not match, no layer in common.
    """
    made_with = _checked_factors(tables, factors, block)
    common = sorted(set.intersection(*(set(table) for table in tables.values())))
    if not common:
        raise BadInputError("the tables have no layer in common: count at the same layers")
    answers = {
        name: recommend(
            table, n_layers=n_layers, selector=selector, recipe=recipe, seed=seed, draws=draws
        )
        for name, table in tables.items()
    }
    rows = tuple(
        StableTable(
            name=name,
            factors=dict(made_with[name]),
            n=float(sum(tables[name].values())),
            verdict=made.verdict,
            recommended=made.recommended,
            selector=made.selector,
            reason=made.reason,
        )
        for name, made in answers.items()
    )
    names = list(tables)
    pairs = tuple(
        _pair(a, b, tables, made_with, answers, draws, seed)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    )
    profiles = np.array([[float(tables[name][layer]) for layer in common] for name in names])
    by_factor = []
    for factor in next(iter(made_with.values())):
        chosen = [pair for pair in pairs if pair.differ == (factor,)]
        if chosen:
            together = _numbered([made_with[name][factor] for name in names])
            by_factor.append(_agreement(factor, chosen, names, profiles, together, draws, seed))
    labels = [made_with[name][block] if block else name for name in names]
    blocks = _numbered(labels)
    across = [p for p in pairs if labels[names.index(p.a)] != labels[names.index(p.b)]]
    between = None
    if across:
        what = f"between {block}s" if block else "between tables"
        between = _agreement(what, across, names, profiles, blocks, draws, seed)
    first = Counter(row.recommended[0] for row in rows if row.answered)
    anywhere = Counter(layer for row in rows if row.answered for layer in row.recommended)
    homes = {layer: set[int]() for layer in first}
    for row, home in zip(rows, blocks, strict=True):
        if row.answered:
            homes[row.recommended[0]].add(home)
    verdict, reason, step = _judge(rows, first, homes, between, block, n_layers, len(common))
    return Stability(
        tables=rows,
        pairs=pairs,
        factors=tuple(by_factor),
        between=between,
        blocks=len(set(blocks)),
        layers=tuple(common),
        first=_ordered(first),
        recommended=_ordered(anywhere),
        verdict=verdict,
        reason=reason,
        next_step=step,
    )


def _numbered(labels: list[str]) -> list[int]:
    return [sorted(set(labels)).index(label) for label in labels]


def _checked_factors(
    tables: Mapping[str, Any], factors: Mapping[str, Factors] | None, block: str | None
) -> dict[str, Factors]:
    if len(tables) < 2:
        raise BadInputError(f"{len(tables)} table: stability needs two or more to compare")
    if factors is None:
        factors = {name: {"table": name} for name in tables}
    if missing := sorted(set(tables) - set(factors)):
        raise BadInputError(f'table "{missing[0]}" has no factors: give them for every table')
    made_with = {name: factors[name] for name in tables}
    keys = {tuple(sorted(item)) for item in made_with.values()}
    if len(keys) > 1:
        raise BadInputError(f"the tables have different factors, {sorted(keys)}: give all the same")
    if block is not None and block not in next(iter(keys)):
        raise BadInputError(f'block "{block}" is no factor: give {", ".join(next(iter(keys)))}')
    return made_with


def _pair(
    a: str,
    b: str,
    tables: Mapping[str, Mapping[int, float]],
    made_with: Mapping[str, Factors],
    answers: Mapping[str, Recommendation],
    draws: int,
    seed: int,
) -> StablePair:
    rho, rho_p, _ = rank_agreement(tables[a], tables[b], draws, seed)
    first, second = answers[a], answers[b]
    gap = gap_p = None
    if first.fit and second.fit and first.fit.k == second.fit.k > 0:
        aligned = align(first.fit, second.fit, draws=draws, seed=seed)
        gap, gap_p = aligned.value, aligned.p
    both = "middle" not in (first.selector, second.selector)
    return StablePair(
        a=a,
        b=b,
        differ=tuple(key for key in made_with[a] if made_with[a][key] != made_with[b][key]),
        spearman=rho,
        spearman_p=rho_p,
        alignment=gap,
        alignment_p=gap_p,
        same_first=first.recommended[0] == second.recommended[0] if both else None,
    )


def _agreement(
    factor: str,
    pairs: list[StablePair],
    names: list[str],
    profiles: Floats,
    blocks: list[int],
    draws: int,
    seed: int,
) -> FactorAgreement:
    """Mean Spearman of the pairs against layers moved at random, the same way within a block."""
    layers = profiles.shape[1]
    scores = _standard_ranks(profiles)
    left = np.array([names.index(pair.a) for pair in pairs])
    right = np.array([names.index(pair.b) for pair in pairs])
    varies = (np.abs(scores).sum(axis=1) > 0)[left] & (np.abs(scores).sum(axis=1) > 0)[right]
    left, right = left[varies], right[varies]
    rho = rho_p = None
    if layers >= 3 and left.size:
        moves = stats.permutation_draws(
            np.arange(layers), draws * (max(blocks) + 1), [seed, 8]
        ).astype(int)
        moved = moves.reshape(draws, -1, layers)[:, blocks]
        null = np.take_along_axis(np.broadcast_to(scores, (draws, *scores.shape)), moved, axis=2)
        rho = float((scores[left] * scores[right]).sum(axis=1).mean())
        drawn = np.einsum("dpl,dpl->dp", null[:, left], null[:, right]).mean(axis=1)
        rho_p = stats.permutation_p_value(rho, drawn)
    known = [pair.same_first for pair in pairs if pair.same_first is not None]
    return FactorAgreement(
        factor=factor,
        pairs=len(pairs),
        spearman=rho,
        spearman_p=rho_p,
        answered=len(known),
        same_first=sum(known),
        chance=1 / layers,
        draws=draws,
    )


def _standard_ranks(profiles: Floats) -> Floats:
    """Ranks of each profile [tables, L] with mean 0 and norm 1; zeros where it does not vary."""
    ranks = rankdata(profiles, axis=1)
    ranks = ranks - ranks.mean(axis=1, keepdims=True)
    size = np.linalg.norm(ranks, axis=1, keepdims=True)
    return np.divide(ranks, size, out=np.zeros_like(ranks), where=size > 1e-9)


def _ordered(found: Counter[int]) -> dict[int, int]:
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _judge(
    rows: tuple[StableTable, ...],
    first: Counter[int],
    homes: Mapping[int, set[int]],
    between: FactorAgreement | None,
    block: str | None,
    n_layers: int,
    layers: int,
) -> tuple[str, str, str]:
    """Verdict, one sentence of reason, next step; homes are the blocks of each first layer."""
    total, answered = len(rows), sum(first.values())
    if answered == 0:
        reason = f"None of {total} tables singles out a layer, so there is none to return."
        return UNTESTED, reason, "Use the middle layer, or measure layers directly."
    layer, times = min(first.items(), key=lambda item: (-item[1], item[0]))
    name = describe_layer(layer, n_layers)
    name = name[0].upper() + name[1:]
    said = f"{name} comes first in {times} of {total} tables ({answered} single out a layer)"
    if between is None:
        reason = f"{said}, but they share one {block}: their agreement is no independent evidence."
        return UNTESTED, reason, f"Add a second {block} and compare again."
    if answered < 2:
        reason = f"{said}: nothing to compare it with."
        return UNTESTED, reason, "Use the middle layer, or measure layers directly."
    if between.spearman is None or between.spearman_p is None:
        what = f"{layers} layers in common are too few" if layers < 3 else "no two profiles vary"
        return UNTESTED, f"{said}, but {what} to compare profiles.", "Count at more layers."
    numbers = (
        f"{between.factor} the profiles' mean Spearman is {between.spearman:+.2f} "
        f"(p = {between.spearman_p:.2g}, {between.pairs} pairs), and the first layer is the same "
        f"in {between.same_first} of {between.answered} pairs where chance has "
        f"{100 * between.chance:.0f} %"
    )
    if times > total / 2 and len(homes[layer]) > 1 and between.spearman_p <= ALPHA:
        return STABLE, f"{said}; {numbers}.", "Tune there, beside the middle layer."
    alone = f", all of one {block}" if block and len(homes[layer]) == 1 else ""
    step = "Trust no single table: use the middle layer, or measure layers directly."
    return UNSTABLE, f"{said}{alone}; {numbers}.", step
