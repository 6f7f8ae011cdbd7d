"""Which layer to tune: selectors over tables {0-based layer: value} behind one interface.

A selector reads the tables of `Tables` and answers with a `Choice`.  `recommend` adds the fallback:
where the evidence supports no choice, the middle layer, and the reason says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import rankdata

from resa_lens.errors import BadInputError
from resa_lens.layers import (
    FLAT,
    SUPPORTED,
    MixtureFit,
    nearest_layer,
)
from resa_lens.layers.effects import Effect, above_zero, effects_of
from resa_lens.layers.mixture import fit_mixture
from resa_lens.layers.regret import Regret, Regrets, Scores, regret, regrets
from resa_lens.models.hookpoints import describe_layer

__all__ = [
    "NOT_TESTED",
    "SELECTORS",
    "TOP",
    "Choice",
    "Effect",
    "Recommendation",
    "Regret",
    "Tables",
    "middle_layer",
    "recommend",
    "recommend_all",
    "regret",
    "regrets_of_selectors",
]

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
    causal: Mapping[int, Effect] | None = None
    """Effect of an intervention beyond its control; largest wins."""
    insertion: Mapping[int, Effect] | None = None
    """Change of accuracy with the SAE inserted and nothing tuned; largest wins."""
    gradient: Mapping[int, Effect] | None = None
    """Norms of weight gradients on the tuning data (`tuning.gradient_probe`); largest wins."""
    change: Mapping[int, Effect] | None = None
    """Relative change of the site's activations from source to target
    (`models.activation_change`); largest wins."""

    @cached_property
    def fit(self) -> MixtureFit:
        """The mixture fitted to the feature counts, once for all selectors."""
        return fit_mixture(self.features, recipe=self.recipe, seed=self.seed, draws=self.draws)

    @property
    def existing(self) -> tuple[str, ...]:
        """The selectors whose table is there."""
        has = {
            "mixture": bool(self.features),
            "most-features": bool(self.features),
            "middle": True,
            "quality": bool(self.quality),
            "causal": bool(self.causal),
            "insertion": bool(self.insertion),
            "gradient-probe": bool(self.gradient),
            "activation-change": bool(self.change),
        }
        has["blend"] = has["mixture"] or has["quality"] or has["causal"]
        return tuple(name for name in SELECTORS if has[name])


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
    fit = tables.fit
    chosen = () if fit.verdict == FLAT else fit.recommended
    return Choice(chosen, fit.reason, fit.next_step, fit.verdict, fit)


def _most_features(tables: Tables) -> Choice:
    fit = tables.fit
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
    table: Mapping[int, Effect] | None, name: str, what: str, sign: float, n_layers: int
) -> Choice:
    """Ranks a table by its values, without a test; sign -1 where the lowest wins."""
    if not table:
        raise BadInputError(f'selector "{name}" has no table: give {name} = {{layer: value}}')
    values = {layer: float(np.ravel(effect)[0]) for layer, effect in table.items()}
    ranked = sorted(values, key=lambda layer: (-sign * values[layer], layer))
    best = table[ranked[0]]
    error = f" (standard error {best[1]:.2g})" if isinstance(best, Sequence) else ""
    where = describe_layer(ranked[0], n_layers)
    reason = f"{where} has the {what}, {values[ranked[0]]:.4g}{error}."
    step = "Repeat with other seeds: one value per layer carries no interval."
    if error:
        step = "Tune there beside the middle layer: a ranking is no test that tuning there helps."
    return Choice(tuple(ranked[:TOP]), reason, step)


def _quality(tables: Tables) -> Choice:
    what = "lowest change of the loss with its SAE inserted"
    return _ranked(tables.quality, "quality", what, -1.0, tables.n_layers)


def _causal(tables: Tables) -> Choice:
    effects = effects_of(tables.causal)
    if effects is None:
        return _ranked(tables.causal, "causal", "largest causal effect", 1.0, tables.n_layers)
    layers, values, errors, freedom = effects
    if not errors.any():
        reason = (
            "no layer has a counted feature, so no layer's causal effect is above its control's."
        )
        return Choice((), reason, "Count by another rule, or use the middle layer.", FLAT)
    chosen, best, figures = above_zero(layers, values, errors, freedom)
    name = describe_layer(best, tables.n_layers)
    if not chosen:
        reason = f"no layer's causal effect is above its control's: the clearest, {name}, has"
        step = "Measure on more documents or questions, or use the middle layer."
        return Choice((), f"{reason} {figures}.", step, FLAT)
    more = f"; {len(chosen)} of {len(layers)} layers are above their control"
    reason = f"{name} has the largest causal effect beyond its control, {figures}{more}."
    step = "Tune there beside the middle layer: an effect on the loss need not be one on accuracy."
    return Choice(tuple(chosen[:TOP]), reason, step, SUPPORTED)


def _insertion(tables: Tables) -> Choice:
    effects = effects_of(tables.insertion, "insertion")
    if effects is None:
        what = "largest gain by insertion"
        return _ranked(tables.insertion, "insertion", what, 1.0, tables.n_layers)
    layers, *figures_of = effects
    chosen, best, figures = above_zero(layers, *figures_of)
    name = describe_layer(best, tables.n_layers)
    if not chosen:
        reason = f"no layer's SAE raises accuracy when it is inserted: the clearest, {name}, has"
        step = "There is nothing to hand on: tune for another reason, or use the middle layer."
        return Choice((), f"{reason} {figures}.", step, FLAT)
    reason = f"{name} has the SAE that raises accuracy most when it is inserted, {figures}"
    more = f"; {len(chosen)} of {len(layers)} layers raise it."
    return Choice(
        tuple(chosen[:TOP]), reason + more,
        "Tune there; PCA of the same FVU beside it says whether features are needed.", SUPPORTED,
    )  # fmt: skip


def _gradient(tables: Tables) -> Choice:
    what = "largest weight gradients on the tuning data"
    return _ranked(tables.gradient, "gradient", what, 1.0, tables.n_layers)


def _change(tables: Tables) -> Choice:
    what = "largest relative change of activations from source to target"
    if tables.change and not any(np.ravel(value)[0] for value in tables.change.values()):
        reason = "source and target have the same activations at every layer."
        return Choice((), reason, "Give two models that differ, or use the middle layer.", FLAT)
    return _ranked(tables.change, "change", what, 1.0, tables.n_layers)


def _blend(tables: Tables) -> Choice:
    """Mean rank over the tables that exist and that their own test does not call flat."""
    fit = tables.fit if tables.features else None
    sides: dict[str, dict[int, float]] = {}
    out = []
    if fit and fit.verdict == FLAT:
        out.append(f"feature counts ({FLAT})")
    elif fit:
        sides["feature counts"] = {layer: -value for layer, value in tables.features.items()}
    if tables.quality:
        sides["SAE quality"] = dict(tables.quality)
    if tables.causal and _causal(tables).layers:
        sides["causal effect"] = {
            layer: -float(np.ravel(value)[0]) for layer, value in tables.causal.items()
        }
    elif tables.causal:
        out.append("causal effects (none above its control)")
    left = f"; left out: {' and '.join(out)}" if out else ""
    if not sides:
        step = "Use the middle layer, or measure SAE quality, effects or a sweep."
        return Choice((), f"no table singles out a layer{left}.", step, FLAT, fit)
    layers = sorted(set.intersection(*(set(side) for side in sides.values())))
    if not layers:
        raise BadInputError(f"the tables {', '.join(sides)} have no layer in common to be ranked")
    ranks = np.mean([rankdata([side[x] for x in layers]) for side in sides.values()], axis=0)
    mean = dict(zip(layers, ranks.tolist(), strict=True))
    middle = middle_layer(tables.n_layers)
    ranked = sorted(layers, key=lambda x: (mean[x], abs(x - middle), x))
    reason = (
        f"{describe_layer(ranked[0], tables.n_layers)} has the best mean rank, "
        f"{mean[ranked[0]]:.3g} of {len(layers)}, over {' and '.join(sides)}{left}."
    )
    step = "Compare its regret with each selector's: equal weights are a choice, not a finding."
    return Choice(tuple(ranked[:TOP]), reason, step, NOT_TESTED, fit)


SELECTORS: dict[str, Callable[[Tables], Choice]] = {
    "mixture": _mixture,
    "most-features": _most_features,
    "middle": _middle,
    "quality": _quality,
    "causal": _causal,
    "blend": _blend,
    "insertion": _insertion,
    "gradient-probe": _gradient,
    "activation-change": _change,
}


def recommend(
    table: Mapping[int, float],
    *,
    n_layers: int,
    selector: str = "mixture",
    recipe: str = "robust",
    seed: int = 0,
    quality: Mapping[int, float] | None = None,
    causal: Mapping[int, Effect] | None = None,
    insertion: Mapping[int, Effect] | None = None,
    gradient: Mapping[int, Effect] | None = None,
    change: Mapping[int, Effect] | None = None,
    draws: int = 1000,
) -> Recommendation:
    """Recommends layers from a table of feature counts.

    Args:
        table: {0-based layer: features}; the keys are the trainable layers.
        n_layers: layers of the model.
        selector: a key of `SELECTORS`.
        recipe: of the mixture.
        seed: of the mixture and its draws.
        quality: {layer: change of the loss}, for "quality" and "blend".
        causal: {layer: effect}, or {layer: (effect beyond its control, standard error)} with or
            without the error's degrees of freedom, for "causal" and "blend".
        insertion: {layer: (change of accuracy with the SAE inserted, standard error)}.
        gradient: {layer: norm of its weights' gradients}, for "gradient-probe".
        change: {layer: relative change of activations}, for "activation-change".
        draws: of each null and of the bootstrap.

    Returns:
        Layers, best first.  Where the evidence supports no choice, the middle layer alone.

    Raises:
        BadInputError: an unknown selector, a missing table, a layer the model does not have.
    """
    if selector not in SELECTORS:
        raise BadInputError(f'selector "{selector}" is unknown: give {", ".join(SELECTORS)}')
    tables = Tables(
        table, n_layers, recipe, seed, draws, quality, causal, insertion, gradient, change
    )
    return _answer(_checked(tables), selector)


def recommend_all(
    table: Mapping[int, float],
    *,
    n_layers: int,
    recipe: str = "robust",
    seed: int = 0,
    quality: Mapping[int, float] | None = None,
    causal: Mapping[int, Effect] | None = None,
    insertion: Mapping[int, Effect] | None = None,
    gradient: Mapping[int, Effect] | None = None,
    change: Mapping[int, Effect] | None = None,
    draws: int = 1000,
) -> dict[str, Recommendation]:
    """Recommends by every selector whose table is there; arguments as `recommend`."""
    tables = _checked(
        Tables(table, n_layers, recipe, seed, draws, quality, causal, insertion, gradient, change)
    )
    return {name: _answer(tables, name) for name in tables.existing}


def regrets_of_selectors(
    scores: Scores,
    *,
    n_layers: int,
    counts: Mapping[int, float] | None = None,
    quality: Mapping[int, float] | None = None,
    causal: Mapping[int, Effect] | None = None,
    insertion: Mapping[int, Effect] | None = None,
    gradient: Mapping[int, Effect] | None = None,
    change: Mapping[int, Effect] | None = None,
    chosen: Mapping[str, int] | None = None,
    se: Mapping[int, float] | None = None,
    recipe: str = "robust",
    seed: int = 0,
    draws: int = 1000,
) -> tuple[Regrets, dict[str, Recommendation]]:
    """The regret on a sweep of every selector whose table is there.

    Args:
        scores: {layer: score}, or {layer: replicates}.
        n_layers: of the model.
        counts: {layer: features}; without it only the other tables' selectors and the middle.
        quality: as `recommend`.
        causal: as `recommend`.
        insertion: as `recommend`.
        gradient: as `recommend`.
        change: as `recommend`.
        chosen: {name: layer} to set beside them.
        se: {layer: standard error} of single scores.
        recipe: of the mixture.
        seed: of the draws.
        draws: of the mixture's nulls.

    Returns:
        The regrets, and what each selector recommended.
    """
    counted = counts or {}
    tables = _checked(
        Tables(counted, n_layers, recipe, seed, draws, quality, causal, insertion, gradient, change)
    )
    made = {name: _answer(tables, name) for name in tables.existing}
    picks = {name: answer.recommended[0] for name, answer in made.items()}
    if not counts:
        picks["middle"] = middle_layer(n_layers, tuple(scores))
    return regrets({**picks, **(chosen or {})}, scores, se=se, seed=seed), made


def _checked(tables: Tables) -> Tables:
    if tables.n_layers < 1:
        raise BadInputError(f"n_layers {tables.n_layers}: a model has 1 layer or more")
    named = {
        "table": tables.features, "quality": tables.quality, "causal": tables.causal,
        "insertion": tables.insertion, "gradient": tables.gradient, "change": tables.change,
    }  # fmt: skip
    for name, values in named.items():
        for layer, value in (values or {}).items():
            if not 0 <= layer < tables.n_layers:
                raise BadInputError(
                    f"{name} has layer {layer}: the model has 0 to {tables.n_layers - 1} (0-based)"
                )
            if not np.isfinite(value).all():
                raise BadInputError(f"{name}, layer {layer} (0-based): {value} is no finite number")
    return tables


def _answer(tables: Tables, selector: str) -> Recommendation:
    table, n_layers = tables.features, tables.n_layers
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
