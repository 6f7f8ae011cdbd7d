"""Which layer to tune: selectors over tables {0-based layer: value} behind one interface.

A selector reads the tables of `Tables` and answers with a `Choice`.  `recommend` adds the fallback:
where the evidence supports no choice, the middle layer, and the reason says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resa_lens import stats
from resa_lens.errors import BadInputError
from resa_lens.hookpoints import describe_layer
from resa_lens.layers import FLAT, MixtureFit, nearest_layer
from resa_lens.layers.mixture import fit_mixture
from resa_lens.stats import Floats, Interval

TOP = 3  # a ranking's candidates: as many as the paper's mixture has
NOT_TESTED = "not tested"


@dataclass(frozen=True)
class Recommendation:
    """Layers to tune, best first, with the reason."""

    selector: str
    """The selector that decided: "middle" where the one asked for found no support."""
    requested: str
    layers: dict[int, float]
    """{0-based layer: features}."""
    recommended: tuple[int, ...]
    """0-based, best first, never empty."""
    verdict: str
    """The fit's verdict, or "not tested"."""
    reason: str
    next_step: str
    n_layers: int
    fit: MixtureFit | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; layers become [{layer, features}]."""
        return {
            "selector": self.selector,
            "requested": self.requested,
            "layers": [{"layer": layer, "features": v} for layer, v in self.layers.items()],
            "recommended": list(self.recommended),
            "verdict": self.verdict,
            "reason": self.reason,
            "next_step": self.next_step,
            "n_layers": self.n_layers,
            "fit": self.fit.to_dict() if self.fit else None,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recommendation:
        """Read what `to_dict` wrote."""
        layers = {item["layer"]: item["features"] for item in values["layers"]}
        fit = MixtureFit.from_dict(values["fit"]) if values["fit"] else None
        changed = {"layers": layers, "recommended": tuple(values["recommended"]), "fit": fit}
        return cls(**{**values, **changed})


@dataclass(frozen=True)
class Tables:
    """What a selector may look at."""

    features: Mapping[int, float]
    n_layers: int
    recipe: str = "robust"
    seed: int = 0
    draws: int = 1000
    quality: Mapping[int, float] | None = None
    """Change of the loss with the SAE inserted; lowest wins."""
    causal: Mapping[int, float] | None = None
    """Size of the effect of an intervention; largest wins."""


@dataclass(frozen=True)
class Choice:
    """A selector's answer; no layers where its evidence supports none."""

    layers: tuple[int, ...]
    reason: str
    next_step: str
    verdict: str = NOT_TESTED
    fit: MixtureFit | None = None


def middle_layer(n_layers: int, candidates: Sequence[int] | None = None) -> int:
    """The paper's default, layer 12 of 28 (0-based), at the same relative depth.

    Args:
        n_layers: of the model.
        candidates: trainable layers, 0-based; all but the first and the last where not given.

    Returns:
        The candidate nearest round(12 / 27 (n_layers - 1)).
    """
    if n_layers < 1:
        raise BadInputError(f"n_layers {n_layers}: a model has 1 layer or more")
    target = math.floor(12 / 27 * (n_layers - 1) + 0.5)
    inner = tuple(range(1, n_layers - 1)) or tuple(range(n_layers))
    return nearest_layer(target, tuple(candidates) if candidates else inner)


def _mixture(tables: Tables) -> Choice:
    fit = fit_mixture(tables.features, recipe=tables.recipe, seed=tables.seed, draws=tables.draws)
    chosen = () if fit.verdict == FLAT else fit.recommended
    return Choice(chosen, fit.reason, fit.next_step, fit.verdict, fit)


def _most_features(tables: Tables) -> Choice:
    fit = fit_mixture(tables.features, recipe=tables.recipe, seed=tables.seed, draws=tables.draws)
    middle = middle_layer(tables.n_layers)
    held = {layer: value for layer, value in tables.features.items() if value > 0}
    if not held:
        return Choice((), "No layer has a feature.", fit.next_step, FLAT, fit)
    # Equal counts: the layer nearer the middle, then the lower one, so that ties are no accident.
    ranked = sorted(held, key=lambda layer: (-held[layer], abs(layer - middle), layer))
    best = describe_layer(ranked[0], tables.n_layers)
    reason = f"{best} has the most features, {held[ranked[0]]:g}. {fit.reason}"
    return Choice(tuple(ranked[:TOP]), reason, fit.next_step, fit.verdict, fit)


def _middle(tables: Tables) -> Choice:
    layer = middle_layer(tables.n_layers, tuple(tables.features))
    name = describe_layer(layer, tables.n_layers)
    reason = f"{name} is the paper's default depth; no measurement was used."
    step = "Compare with the mixture or the causal selector."
    return Choice((layer,), reason, step)


def _ranked(
    table: Mapping[int, float] | None, name: str, what: str, sign: float, n_layers: int
) -> Choice:
    """Ranks a table of one value per layer; sign -1 where the lowest wins."""
    if not table:
        raise BadInputError(f'selector "{name}" has no table: give {name} = {{layer: value}}')
    ranked = sorted(table, key=lambda layer: (-sign * table[layer], layer))
    reason = f"{describe_layer(ranked[0], n_layers)} has the {what}, {table[ranked[0]]:.4g}."
    step = "Repeat with other seeds: one value per layer carries no interval."
    return Choice(tuple(ranked[:TOP]), reason, step)


def _quality(tables: Tables) -> Choice:
    what = "lowest change of the loss with its SAE inserted"
    return _ranked(tables.quality, "quality", what, -1.0, tables.n_layers)


def _causal(tables: Tables) -> Choice:
    return _ranked(tables.causal, "causal", "largest causal effect", 1.0, tables.n_layers)


SELECTORS: dict[str, Callable[[Tables], Choice]] = {
    "mixture": _mixture,
    "most-features": _most_features,
    "middle": _middle,
    "quality": _quality,
    "causal": _causal,
}


def recommend(
    table: Mapping[int, float],
    *,
    n_layers: int,
    selector: str = "mixture",
    recipe: str = "robust",
    seed: int = 0,
    quality: Mapping[int, float] | None = None,
    causal: Mapping[int, float] | None = None,
    draws: int = 1000,
) -> Recommendation:
    """Recommends layers from a table of feature counts.

    Args:
        table: {0-based layer: features}; the keys are the trainable layers.
        n_layers: layers of the model.
        selector: a key of `SELECTORS`.
        recipe: of the mixture.
        seed: of the mixture and its draws.
        quality: {layer: change of the loss}, for "quality".
        causal: {layer: effect}, for "causal".
        draws: of each null and of the bootstrap.

    Returns:
        Layers, best first.  Where the counts support no choice, the middle layer alone.

    Raises:
        BadInputError: an unknown selector, a missing table, a layer the model does not have.
    """
    if selector not in SELECTORS:
        raise BadInputError(f'selector "{selector}" is unknown: give {", ".join(SELECTORS)}')
    for name, values in (("table", table), ("quality", quality), ("causal", causal)):
        for layer, value in (values or {}).items():
            if not 0 <= layer < n_layers:
                raise BadInputError(
                    f"{name} has layer {layer}: the model has 0 to {n_layers - 1} (0-based)"
                )
            if not math.isfinite(value):
                raise BadInputError(f"{name}, layer {layer} (0-based): {value} is no finite number")
    tables = Tables(table, n_layers, recipe, seed, draws, quality, causal)
    choice = SELECTORS[selector](tables)
    chosen, name, reason = choice.layers, selector, choice.reason
    if not chosen:
        middle = middle_layer(n_layers, tuple(table))
        chosen, name = (middle,), "middle"
        because = reason.rstrip(".")
        reason = f"{describe_layer(middle, n_layers)}, the middle, because: {because}."
    return Recommendation(
        selector=name,
        requested=selector,
        layers={layer: float(table[layer]) for layer in sorted(table)},
        recommended=chosen,
        verdict=choice.verdict,
        reason=reason[0].upper() + reason[1:],
        next_step=choice.next_step,
        n_layers=n_layers,
        fit=choice.fit,
    )


@dataclass(frozen=True)
class Regret:
    """What choosing a layer cost against the best layer of the same table."""

    regret: float
    """Best score minus the chosen layer's; 0 where the choice was the best."""
    ci: Interval | None
    """Simultaneous interval; None without standard errors or replicates."""
    best: int
    chosen: int


def regret(
    scores: Mapping[int, float] | Mapping[int, Sequence[float]],
    chosen: int,
    *,
    se: Mapping[int, float] | None = None,
    level: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> Regret:
    """Best layer's score minus the chosen layer's.

    The best of many noisy scores is best partly by luck, so an interval around the difference of
    those two alone would be too high.  Here the differences of all layers to the chosen one get
    simultaneous intervals (multiple comparisons with the best, Hsu 1984); the largest lower and
    the largest upper bound, cut at 0, hold the true regret.

    Args:
        scores: {layer: score}, or {layer: replicates}: their mean is the score and their pooled
            variance the noise.
        chosen: a layer of the table.
        se: {layer: standard error} for single scores.
        level: of the interval.
        draws: for the simultaneous quantile.
        seed: for the draws.
    """
    if chosen not in scores:
        raise BadInputError(
            f"layer {chosen} (0-based) has no score: the table has {sorted(scores)}"
        )
    layers = sorted(scores)
    groups = [np.atleast_1d(np.asarray(scores[layer], dtype=np.float64)) for layer in layers]
    if any(group.size == 0 or not np.isfinite(group).all() for group in groups):
        raise BadInputError("a layer has no finite score: give a number or replicates for each")
    means = np.array([group.mean() for group in groups])
    at, top = layers.index(chosen), int(means.argmax())
    gaps = means - means[at]
    spread, freedom = _standard_errors(layers, groups, se)
    interval = None
    if spread is not None and len(layers) > 1:
        others = np.arange(len(layers)) != at
        errors = np.sqrt(spread**2 + spread[at] ** 2)[others]
        if bool((errors <= 0).any()):
            raise BadInputError("a standard error is 0: give the noise of each score, above 0")

        def draw(rng: np.random.Generator, count: int) -> Floats:
            noise = rng.normal(size=(count, len(layers))) * spread
            scaled = (noise - noise[:, [at]])[:, others] / errors
            if freedom is None:
                return scaled
            return scaled / np.sqrt(rng.chisquare(freedom, size=(count, 1)) / freedom)

        reach = stats.simultaneous_quantile(draw, level, draws, seed) * errors
        low = max(0.0, float((gaps[others] - reach).max()))
        interval = (low, max(0.0, float((gaps[others] + reach).max())))
    return Regret(float(gaps[top]), interval, layers[top], chosen)


def _standard_errors(
    layers: list[int], groups: list[Floats], se: Mapping[int, float] | None
) -> tuple[Floats | None, int | None]:
    """Standard error of each layer's score [L], with degrees of freedom where estimated."""
    if se is not None:
        missing = [layer for layer in layers if layer not in se]
        if missing:
            raise BadInputError(f"layer {missing[0]} (0-based) has no standard error: give all")
        return np.array([float(se[layer]) for layer in layers]), None
    freedom = sum(group.size - 1 for group in groups)
    if freedom == 0:
        return None, None
    pooled = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / freedom
    return np.sqrt(pooled / np.array([group.size for group in groups])), freedom
