"""A sweep's scores: layers by seeds by questions, beside one base run on the same questions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from resa_lens.errors import BadInputError
from resa_lens.stats import arrays
from resa_lens.stats.arrays import DRAWS, Floats, Interval, Seed, check_level
from resa_lens.stats.multiple import simultaneous_quantile
from resa_lens.stats.oneway import OneWay, one_way, one_way_permutation
from resa_lens.stats.power import ALPHA, POWER, least_detectable, reach_of
from resa_lens.stats.resampling import permutation_p_value, spearman
from resa_lens.stats.seeds import error_of, honest_p, is_sparse, never_a_point, runs_of, spread_of


@dataclass(frozen=True)
class SweepDifferences:
    """Every layer's mean score minus the base's; tuples run over layers."""

    difference: tuple[float, ...]
    se: tuple[float, ...]
    """Over questions and seeds."""
    ci: tuple[Interval, ...]
    """One layer's own."""
    simultaneous_ci: tuple[Interval, ...]
    """All hold together: by the largest absolute t over the layers."""
    p_value: tuple[float, ...]
    adjusted_p: tuple[float, ...]
    """For all layers together, by the same largest t."""
    freedom: float
    """Degrees of freedom: the smallest of all layers."""
    critical: float
    """Standard errors of the simultaneous intervals."""
    seed_sd: float | None
    """Standard deviation between seeds, pooled over layers; None with one seed."""
    n: int
    """Questions."""
    seeds: int
    level: float


@dataclass(frozen=True)
class _Sweep:
    """Differences [layers, n] averaged over seeds, and their errors."""

    differences: Floats
    covariance: Floats
    """Of the layers' means [layers, layers]."""
    freedom: float
    seed_variance: float | None
    seeds: int


def _sweep(scores: ArrayLike, base: ArrayLike) -> _Sweep:
    runs = runs_of(scores, "scores", 3)
    reference = np.asarray(base, dtype=np.float64)
    if reference.shape != runs.shape[2:] or not bool(np.isfinite(reference).all()):
        raise BadInputError(
            f"base has shape {reference.shape} beside scores {runs.shape}: give one finite score "
            "for each of the same questions"
        )
    seeds, n = runs.shape[1:]
    differences = runs.mean(axis=1) - reference
    covariance = np.atleast_2d(np.cov(differences)) / n
    spreads = [spread_of(layer) for layer in runs]
    # A layer's few seeds say little of their variance: it is pooled.
    between = float(np.mean([s.seeds for s in spreads]))
    rest = float(np.mean([s.rest for s in spreads]))
    pooled = sum(s.freedom for s in spreads)
    freedoms = [
        error_of(float(own), s.rest / (n * seeds), [(between / seeds, pooled)], n)[1]
        for own, s in zip(np.diag(covariance), spreads, strict=True)
    ]
    seed_variance = max(0.0, between - rest / n) if seeds > 1 else None
    covariance = covariance + np.eye(len(runs)) * (seed_variance or 0.0) / seeds
    return _Sweep(differences, covariance, min(freedoms), seed_variance, seeds)


def _largest(sweep: _Sweep, draws: int, seed: Seed, level: float) -> tuple[float, Floats]:
    """Quantile of the largest absolute t over layers with an error, and its draws."""
    errors = np.sqrt(np.diag(sweep.covariance))
    moving = errors > 0
    if not moving.any():
        return float(scipy.stats.t.ppf(0.5 + level / 2, sweep.freedom)), np.zeros(draws)
    scale = np.outer(errors[moving], errors[moving])
    values, vectors = np.linalg.eigh(sweep.covariance[np.ix_(moving, moving)] / scale)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    kept: list[Floats] = []

    def draw(rng: np.random.Generator, count: int) -> Floats:
        noise = rng.normal(size=(count, values.size)) @ root.T
        drawn = noise / np.sqrt(rng.chisquare(sweep.freedom, size=(count, 1)) / sweep.freedom)
        kept.append(np.abs(drawn).max(axis=1))
        return drawn

    return simultaneous_quantile(draw, level, draws, seed), kept[0]


def sweep_differences(
    scores: ArrayLike, base: ArrayLike, level: float = 0.95, draws: int = DRAWS, seed: Seed = 0
) -> SweepDifferences:
    """Compare every layer of a sweep with the base run, question by question.

    Questions and seeds are both random: seeds are nested in layers, with one variance for all
    layers.  The base is one run and taken as it is.

    Args:
        scores: [layers, seeds, questions], 0 to 1.
        base: [questions], the same in the same order.
        level: of the intervals.
        draws: of the largest t.
        seed: of the draws.

    Raises:
        BadInputError: other shapes, a score that is missing.
    """
    check_level(level)
    made = _sweep(scores, base)
    means, errors = made.differences.mean(axis=1), np.sqrt(np.diag(made.covariance))
    critical, largest = _largest(made, draws, seed, level)
    own = float(scipy.stats.t.ppf(0.5 + level / 2, made.freedom))
    # The few changes of a layer get the level that the whole family's t amounts to.
    together = 2 * float(scipy.stats.t.cdf(critical, made.freedom)) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(means == 0, 0.0, np.abs(means) / errors)

    def intervals(reach: float, at: float) -> tuple[Interval, ...]:
        return tuple(
            never_a_point(row, (float(m - reach * e), float(m + reach * e)), at)
            for row, m, e in zip(made.differences, means, errors, strict=True)
        )

    own_p = [
        honest_p(row, float(2 * scipy.stats.t.sf(value, made.freedom)), seed)
        for row, value in zip(made.differences, t, strict=True)
    ]
    # Where differences are sparse the largest t says too much: Bonferroni's correction beside it.
    adjusted = [
        max(permutation_p_value(float(value), largest), min(1.0, p * (len(t) if few else 1)))
        for value, p, few in zip(t, own_p, map(is_sparse, made.differences), strict=True)
    ]
    variance = made.seed_variance
    return SweepDifferences(
        tuple(map(float, means)), tuple(map(float, errors)),
        intervals(own, level), intervals(critical, together),
        tuple(own_p),
        tuple(adjusted),
        made.freedom, critical, None if variance is None else math.sqrt(variance),
        made.differences.shape[1], made.seeds, level,
    )  # fmt: skip


def shuffled_within_questions(scores: ArrayLike, draws: int = 2000, seed: Seed = 0) -> float:
    """P of groups of runs that differ no more than if labels were shuffled inside each question.

    Cochran's Q test (1950) by permutation.  It asks whether these runs differ beyond the noise of
    the questions; that another seed would differ as much is not ruled out.

    Args:
        scores: [groups, runs, questions].
        draws: of the shuffles.
        seed: of the shuffles.
    """
    runs = runs_of(scores, "scores", 3)
    groups, size, _ = runs.shape
    flat = runs.reshape(groups * size, -1).T
    flat = flat[np.ptp(flat, axis=1) > 0]
    if not flat.size or groups < 2:
        return 1.0

    def statistic(tables: Floats) -> Floats:
        """Variance between the groups' means of tables [draws, groups * runs]."""
        return tables.reshape(len(tables), groups, size).mean(axis=2).var(axis=1)

    rng, rows = np.random.default_rng(seed), max(1, arrays.CHUNK // flat.size)
    null = []
    for start in range(0, draws, rows):
        count = min(rows, draws - start)
        tables = np.broadcast_to(flat, (count, *flat.shape)).copy()
        null.append(statistic(rng.permuted(tables, axis=2).sum(axis=1)))
    return permutation_p_value(float(statistic(flat.sum(axis=0)[None])[0]), np.concatenate(null))


@dataclass(frozen=True)
class LayerEffect:
    """Do the layers' scores differ more than seeds, or questions, explain?"""

    anova: OneWay | None
    """Of the runs' means by layer, against seeds; None with one seed or without any spread."""
    run_p: float | None
    """Whole runs shuffled over layers, which keeps their questions; None with one seed."""
    question_p: float
    """Layers shuffled inside each question (`shuffled_within_questions`); blind to seeds."""
    means: tuple[float, ...]
    """Of each layer."""
    layers: int
    seeds: int
    n: int
    """Questions."""


def layer_effect(
    scores: ArrayLike, draws: int = DRAWS, question_draws: int = 1000, seed: Seed = 0
) -> LayerEffect:
    """Test whether layers differ, scores [layers, seeds, questions].

    Every run answers the same questions, so the questions' difficulty is in no difference.

    Raises:
        BadInputError: other shapes, one layer, a score that is missing.
    """
    runs = runs_of(scores, "scores", 3)
    layers, seeds, n = runs.shape
    if layers < 2:
        raise BadInputError(f"{layers} layer: an effect of layers needs two or more")
    means = runs.mean(axis=2)
    groups = np.repeat(np.arange(layers), seeds)
    several = seeds > 1
    return LayerEffect(
        one_way(means.ravel(), groups) if several else None,
        one_way_permutation(means.ravel(), groups, draws, seed) if several else None,
        shuffled_within_questions(runs, question_draws, seed),
        tuple(map(float, means.mean(axis=1))),
        layers,
        seeds,
        n,
    )


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over layers."""

    rho: float
    p_value: float
    """Two-sided, by permutation."""
    ci: Interval
    """Bonett and Wright (2000)."""
    n: int
    """Layers."""
    detectable: float
    """Smallest |rho| that so many layers would show at 80 % power."""


def profile_correlation(
    means: ArrayLike, counts: ArrayLike, level: float = 0.95, draws: int = DRAWS, seed: Seed = 0
) -> Correlation:
    """Correlate the layers' mean scores [layers] with their counts [layers].

    Raises:
        BadInputError: other numbers of layers, or fewer than four.
    """
    check_level(level)
    rho, p_value = spearman(means, counts, draws, seed)
    n = int(np.size(means))
    if n < 4:
        raise BadInputError(f"{n} layers: an interval of a correlation needs four or more")
    # A perfect order has no finite z: it counts as the order with one pair of neighbours exchanged.
    most = 1 - 12 / (n * (n**2 - 1))
    z = math.atanh(max(-most, min(most, rho)))
    half = float(scipy.stats.norm.ppf(0.5 + level / 2)) * math.sqrt((1 + rho**2 / 2) / (n - 3))

    # The interval's own standard error, at the correlation that is to be seen.
    def excess(size: float) -> float:
        own = float(scipy.stats.norm.ppf(POWER)) * math.sqrt(1 + size**2 / 2)
        both = float(scipy.stats.norm.ppf(1 - ALPHA / 2)) + own
        return math.atanh(size) - both / math.sqrt(n - 3)

    detectable = scipy.optimize.root_scalar(excess, bracket=(0.0, 1 - 1e-12)).root
    return Correlation(rho, p_value, (math.tanh(z - half), math.tanh(z + half)), n, detectable)


@dataclass(frozen=True)
class SweepPower:
    """What a sweep of this design could see at the power, from the noise that it shows.

    Where hardly an answer changes there is hardly any noise; then what so many questions can show
    at all is the bound (`power.least_detectable`).
    """

    one_layer: float
    """Difference to the base of one layer chosen beforehand: the median over layers."""
    any_layer: float
    """The same of any layer, after the correction for all of them."""
    layer_spread: float | None
    """Standard deviation of the layers' true means that F would see; None with one seed, and where
    the seeds of each layer score alike: F is not defined then."""
    layers: int
    seeds: int
    n: int
    """Questions."""
    alpha: float
    power: float


def sweep_power(
    scores: ArrayLike,
    base: ArrayLike,
    alpha: float = ALPHA,
    power: float = POWER,
    draws: int = DRAWS,
    seed: Seed = 0,
) -> SweepPower:
    """Detectable differences of a sweep, scores [layers, seeds, questions] and base [questions].

    Raises:
        BadInputError: as `sweep_differences`.
    """
    runs = runs_of(scores, "scores", 3)
    made = _sweep(runs, base)
    layers, seeds, n = runs.shape
    error = float(np.median(np.sqrt(np.diag(made.covariance))))
    critical, _ = _largest(made, draws, seed, 1 - alpha)
    spread = None
    within = float(runs.mean(axis=2).var(axis=1, ddof=1).mean()) if seeds > 1 else 0.0
    if layers > 1 and within > 0:
        between, inside = layers - 1, layers * (seeds - 1)
        border = float(scipy.stats.f.ppf(1 - alpha, between, inside))

        def lacking(noncentrality: float) -> float:
            beyond = scipy.stats.ncf.sf(border, between, inside, noncentrality)
            return float(beyond) - power

        needed = scipy.optimize.root_scalar(lacking, bracket=(1e-6, 1e5)).root
        spread = math.sqrt(float(needed) * within / (seeds * between))
    together = 2 * float(scipy.stats.t.sf(critical, made.freedom))
    return SweepPower(
        max(reach_of(made.freedom, alpha, power) * error, least_detectable(n, alpha, power)),
        max(
            (critical + float(scipy.stats.t.ppf(power, made.freedom))) * error,
            least_detectable(n, together, power),
        ),
        spread,
        layers,
        seeds,
        n,
        alpha,
        power,
    )
