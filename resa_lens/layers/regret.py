"""What a choice of layer cost: the best layer's score minus the chosen layer's, with its interval.

The best of many noisy scores is best partly by luck, so an interval around the difference of those
two alone would be too high.  Here the differences of all layers to the chosen one get simultaneous
intervals (multiple comparisons with the best, Hsu 1984); the largest lower and the largest upper
bound, cut at 0, hold the true regret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats as distributions

from resa_lens import stats
from resa_lens.errors import BadInputError
from resa_lens.stats import Floats, Interval

Scores = Mapping[int, float] | Mapping[int, Sequence[float]]
"""{0-based layer: score}, or {layer: replicates}."""


@dataclass(frozen=True)
class Regret:
    """What choosing a layer cost against the best layer of the same table."""

    regret: float
    """Best score minus the chosen layer's; 0 where the choice was the best."""
    ci: Interval | None
    """Simultaneous interval; None without standard errors or replicates."""
    best: int
    chosen: int


@dataclass(frozen=True)
class SelectorRegret:
    """One selector's choice, beside choosing a layer at random."""

    selector: str
    layer: int
    """0-based."""
    score: float
    regret: float
    ci: Interval | None
    """Simultaneous interval of the regret; None without noise."""
    gain: float
    """Score minus that of a layer chosen at random (the mean over layers)."""
    gain_ci: Interval | None
    as_good: float
    """Share of the layers that score at least as well, the chosen one too: the p of a choice made
    at random."""


@dataclass(frozen=True)
class Regrets:
    """Every selector's regret, and the null: a layer at random."""

    selectors: tuple[SelectorRegret, ...]
    best: int
    """Layer with the highest score, 0-based."""
    layers: int
    random: float
    """Expected regret of a layer chosen at random."""
    random_ci: Interval | None
    noise: float | None
    """Standard deviation of one score: pooled over the replicates, or as given."""
    freedom: int | None
    """Degrees of freedom of the noise; None where it is given or unknown."""
    level: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Sweep:
    """Scores by layer: means [L] with their standard errors [L], None where unknown."""

    layers: tuple[int, ...]
    means: Floats
    errors: Floats | None
    freedom: int | None
    noise: float | None

    def excess(
        self, baseline: Floats, level: float, draws: int, seed: int
    ) -> tuple[float, Interval | None]:
        """Best layer's score minus a weighted mean of all: weights [L], one layer's being 1."""
        contrasts = np.eye(len(self.layers)) - baseline
        gaps = contrasts @ self.means
        if self.errors is None or len(self.layers) < 2:
            return float(gaps.max()), None
        spread = self.errors
        size = np.sqrt((contrasts**2) @ spread**2)
        # The chosen layer's own difference is 0 without error.
        others = np.abs(contrasts).sum(axis=1) > 1e-12
        if bool((size[others] <= 0).any()):
            raise BadInputError("a standard error is 0: give the noise of each score, above 0")

        def draw(rng: np.random.Generator, count: int) -> Floats:
            noise = rng.normal(size=(count, len(self.layers))) * spread
            scaled = (noise @ contrasts.T)[:, others] / size[others]
            if self.freedom is None:
                return scaled
            return scaled / np.sqrt(rng.chisquare(self.freedom, size=(count, 1)) / self.freedom)

        reach = stats.simultaneous_quantile(draw, level, draws, seed) * size[others]
        low = max(0.0, float((gaps[others] - reach).max()))
        return float(gaps.max()), (low, max(0.0, float((gaps[others] + reach).max())))

    def gain(self, at: int, level: float) -> tuple[float, Interval | None]:
        """One layer's score minus the mean over all layers, with its own interval."""
        weights = np.eye(len(self.layers))[at] - 1 / len(self.layers)
        value = float(weights @ self.means)
        if self.errors is None or len(self.layers) < 2:
            return value, None
        tail = 0.5 + level / 2
        reach = float(
            distributions.norm.ppf(tail)
            if self.freedom is None
            else distributions.t.ppf(tail, self.freedom)
        ) * float(np.sqrt(weights**2 @ self.errors**2))
        return value, (value - reach, value + reach)


def regret(
    scores: Scores,
    chosen: int,
    *,
    se: Mapping[int, float] | None = None,
    level: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> Regret:
    """Best layer's score minus the chosen layer's.

    Args:
        scores: {layer: score}, or {layer: replicates}: their mean is the score and their pooled
            variance the noise.
        chosen: a layer of the table, chosen without looking at these scores.
        se: {layer: standard error} for single scores.
        level: of the interval.
        draws: for the simultaneous quantile.
        seed: for the draws.

    Raises:
        BadInputError: a layer without score, a score that is not finite, a standard error of 0.
    """
    sweep = _sweep(scores, se)
    at = _place(sweep, chosen)
    value, interval = sweep.excess(np.eye(len(sweep.layers))[at], level, draws, seed)
    return Regret(value, interval, sweep.layers[int(sweep.means.argmax())], chosen)


def regrets(
    selections: Mapping[str, int],
    scores: Scores,
    *,
    se: Mapping[int, float] | None = None,
    level: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> Regrets:
    """The regret of every selector on one sweep, beside that of a layer chosen at random.

    Args:
        selections: {selector: the layer it puts first}, made without looking at these scores.
        scores: as `regret`.
        se: as `regret`.
        level: of every interval; each selector's holds by itself.
        draws: for the simultaneous quantiles.
        seed: for the draws.

    Raises:
        BadInputError: as `regret`, or no selection.
    """
    if not selections:
        raise BadInputError("no selector made a choice: give {selector: layer}")
    sweep = _sweep(scores, se)
    size = len(sweep.layers)
    rows = []
    for name, layer in selections.items():
        at = _place(sweep, layer)
        value, interval = sweep.excess(np.eye(size)[at], level, draws, seed)
        gain, gain_ci = sweep.gain(at, level)
        score = float(sweep.means[at])
        as_good = float((sweep.means >= score - 1e-9 * max(1.0, abs(score))).mean())
        rows.append(SelectorRegret(name, layer, score, value, interval, gain, gain_ci, as_good))
    chance, chance_ci = sweep.excess(np.full(size, 1 / size), level, draws, seed)
    return Regrets(
        selectors=tuple(rows),
        best=sweep.layers[int(sweep.means.argmax())],
        layers=size,
        random=chance,
        random_ci=chance_ci,
        noise=sweep.noise,
        freedom=sweep.freedom,
        level=level,
    )


def _place(sweep: _Sweep, layer: int) -> int:
    if layer not in sweep.layers:
        raise BadInputError(
            f"layer {layer} (0-based) has no score: the table has {list(sweep.layers)}"
        )
    return sweep.layers.index(layer)


def _sweep(scores: Scores, se: Mapping[int, float] | None) -> _Sweep:
    layers = tuple(sorted(scores))
    groups = [np.atleast_1d(np.asarray(scores[layer], dtype=np.float64)) for layer in layers]
    if not groups:
        raise BadInputError("the table of scores is empty: give {layer: score}")
    if any(group.size == 0 or not np.isfinite(group).all() for group in groups):
        raise BadInputError("a layer has no finite score: give a number or replicates for each")
    means = np.array([group.mean() for group in groups])
    if se is not None:
        if missing := [layer for layer in layers if layer not in se]:
            raise BadInputError(f"layer {missing[0]} (0-based) has no standard error: give all")
        errors = np.array([float(se[layer]) for layer in layers])
        same = bool((errors == errors[0]).all())
        return _Sweep(layers, means, errors, None, float(errors[0]) if same else None)
    freedom = sum(group.size - 1 for group in groups)
    if freedom == 0:
        return _Sweep(layers, means, None, None, None)
    pooled = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / freedom
    errors = np.sqrt(pooled / np.array([group.size for group in groups]))
    return _Sweep(layers, means, errors, freedom, float(np.sqrt(pooled)))
