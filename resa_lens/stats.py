"""All resampling of the project: intervals, paired comparisons, permutation p-values.

Every function takes numpy arrays (or what numpy can read) and a seed, and returns plain floats or
frozen dataclasses.  Shapes: ``n`` questions, ``samples`` answers per question, ``draws`` resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from resa_lens.errors import BadInputError

Seed = int | Sequence[int]
Interval = tuple[float, float]
Floats = NDArray[np.float64]

DRAWS = 10_000
_CHUNK = 4_000_000  # elements held at once while resampling: 32 MB


def _vector(values: ArrayLike, name: str) -> Floats:
    """Finite floats [n] from values [n], or from [n, samples] averaged over samples."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 2 and array.shape[1] > 0:
        finite = bool(np.isfinite(array).all())
        array = array.mean(axis=1)
    else:
        finite = bool(np.isfinite(array).all())
    if array.ndim != 1 or array.size == 0:
        raise BadInputError(f"{name} has shape {np.shape(values)}: give [n] or [n, samples], n > 0")
    if not finite:
        raise BadInputError(
            f"{name} holds a value that is not finite: every score must be a number"
        )
    return array


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise BadInputError(f"level {level} is no confidence level: give one between 0 and 1")


def _check_counts(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise BadInputError(f"{successes} successes of {n}: give 0 <= successes <= n and n >= 1")


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (1927)."""
    _check_counts(successes, n)
    _check_level(level)
    z = float(special.ndtri(0.5 + level / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 of n and n of n the formula reaches the border exactly; rounding may miss it.
    low = 0.0 if successes == 0 else max(0.0, float(centre - half))
    high = 1.0 if successes == n else min(1.0, float(centre + half))
    return low, high


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Exact two-sided interval of a proportion (Clopper and Pearson 1934)."""
    _check_counts(successes, n)
    _check_level(level)
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, n - successes + 1, tail))
    high = 1.0
    if successes < n:
        high = float(special.betaincinv(successes + 1, n - successes, 1 - tail))
    return low, high


def percentile_interval(samples: ArrayLike, level: float = 0.95) -> Interval:
    """Central interval that holds ``level`` of the samples [draws]."""
    _check_level(level)
    low, high = np.quantile(
        np.asarray(samples, dtype=np.float64), [0.5 - level / 2, 0.5 + level / 2]
    )
    return float(low), float(high)


def bootstrap_means(values: ArrayLike, draws: int = DRAWS, seed: Seed = 0) -> Floats:
    """Means of resamples with replacement over questions.

    Args:
        values: [n], or [n, samples]: then whole questions are drawn, with all their samples.
        draws: number of resamples.
        seed: for the random generator.

    Returns:
        [draws] means.
    """
    vector = _vector(values, "values")
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // vector.size)
    means = np.empty(draws)
    for start in range(0, draws, rows):
        stop = min(start + rows, draws)
        picks = rng.integers(0, vector.size, size=(stop - start, vector.size), dtype=np.int32)
        means[start:stop] = vector[picks].mean(axis=1)
    return means


def bootstrap_mean_interval(
    values: ArrayLike, level: float = 0.95, draws: int = DRAWS, seed: Seed = 0
) -> Interval:
    """Percentile bootstrap interval of the mean over questions; values as `bootstrap_means`."""
    return percentile_interval(bootstrap_means(values, draws, seed), level)


def _differences(a: ArrayLike, b: ArrayLike) -> Floats:
    first, second = _vector(a, "a"), _vector(b, "b")
    if first.size != second.size:
        raise BadInputError(
            f"{first.size} and {second.size} questions: paired runs need the same questions"
        )
    return second - first


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, level: float = 0.95, draws: int = DRAWS, seed: Seed = 0
) -> tuple[float, Interval]:
    """Mean of b - a over the same questions, with its percentile bootstrap interval.

    a and b are [n] or [n, samples]; the number of samples may differ.  Where all differences are
    equal the interval has no width: `compare_paired` handles that case.
    """
    differences = _differences(a, b)
    interval = percentile_interval(bootstrap_means(differences, draws, seed), level)
    return float(differences.mean()), interval


def mcnemar_exact(b_only: int, a_only: int) -> float:
    """McNemar's exact two-sided p-value from the questions that only one of two runs solved."""
    if b_only < 0 or a_only < 0:
        raise BadInputError(f"counts {b_only} and {a_only}: discordant pairs cannot be negative")
    if b_only + a_only == 0:
        return 1.0
    tail = float(stats.binom.cdf(min(b_only, a_only), b_only + a_only, 0.5))
    return min(1.0, 2 * tail)


def permutation_p_value(observed: float, null_draws: ArrayLike) -> float:
    """(1 + number of null draws at least as large) / (1 + number of draws)."""
    null = np.asarray(null_draws, dtype=np.float64)
    # Equal statistics reached by another order of summation must count as ties, in any unit.
    finite = np.abs(null[np.isfinite(null)])
    slack = 1e-9 * max(abs(observed), float(finite.max(initial=0.0)))
    return float((1 + np.count_nonzero(null >= observed - slack)) / (1 + null.size))


def sign_flip_p_value(differences: ArrayLike, draws: int = DRAWS, seed: Seed = 0) -> float:
    """Two-sided p of a zero mean: the sign of each difference [n] is flipped at random."""
    vector = _vector(differences, "differences")
    vector = vector[vector != 0]
    if vector.size == 0:
        return 1.0
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // vector.size)
    parts = []
    for start in range(0, draws, rows):
        signs = rng.integers(0, 2, size=(min(rows, draws - start), vector.size), dtype=np.int8)
        parts.append(np.abs((2.0 * signs - 1.0) @ vector))
    return permutation_p_value(abs(float(vector.sum())), np.concatenate(parts))


def permutation_draws(values: ArrayLike, draws: int, seed: Seed = 0) -> Floats:
    """Shuffled copies [draws, n] of values [n], each independent of the others."""
    vector = _vector(values, "values")
    return np.random.default_rng(seed).permuted(np.tile(vector, (draws, 1)), axis=1)


def multinomial_draws(n: int, weights: ArrayLike, draws: int, seed: Seed = 0) -> Floats:
    """Counts [draws, bins] of n things thrown into bins with probabilities weights / sum."""
    vector = _vector(weights, "weights")
    if n < 0 or bool((vector < 0).any()) or vector.sum() <= 0:
        raise BadInputError(f"n = {n}, weights {vector.tolist()[:4]}...: none may be negative")
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, vector / vector.sum(), size=draws).astype(np.float64)


def circular_shifts(lengths: ArrayLike, draws: int, seed: Seed = 0) -> Iterator[NDArray[np.int64]]:
    """Yield indices [part of draws, n] that rotate consecutive blocks, each by its own offset.

    ``values[index]`` keeps every block's values and their order but for where the block begins.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    block = np.repeat(np.arange(sizes.size), sizes)
    start = np.repeat(sizes.cumsum() - sizes, sizes)
    place = np.arange(block.size) - start
    rng, rows = np.random.default_rng(seed), max(1, _CHUNK // max(1, block.size))
    for first in range(0, draws, rows):
        offsets = rng.integers(0, sizes, size=(min(rows, draws - first), sizes.size))
        yield start + (place - offsets[:, block]) % sizes[block]


class TailCounts:
    """Of many statistics at once, how many null draws were at least as extreme."""

    def __init__(self, observed: ArrayLike, draws: int) -> None:
        self.observed, self.draws = np.asarray(observed, dtype=np.float64), draws
        self.above, self.below = (np.zeros(self.observed.shape, np.int64) for _ in range(2))

    def add(self, null: Floats, part: slice = slice(None)) -> None:
        """Count draws [statistics of the part, some draws]."""
        observed = self.observed[part, None]
        # Equal statistics reached by another order of summation must count as ties.
        slack = 1e-9 * np.abs(observed) + 1e-12
        self.above[part] += (null >= observed - slack).sum(axis=1)
        self.below[part] += (null <= observed + slack).sum(axis=1)

    def upper(self) -> Floats:
        """P-values of statistics that are large."""
        return (1 + self.above) / (1 + self.draws)

    def two_sided(self) -> Floats:
        """Twice the smaller tail, which a skewed null does not bias."""
        return np.minimum(1.0, 2 * (1 + np.minimum(self.above, self.below)) / (1 + self.draws))


def spearman(x: ArrayLike, y: ArrayLike, draws: int = DRAWS, seed: Seed = 0) -> tuple[float, float]:
    """Spearman's rank correlation of x [n] and y [n], and its two-sided permutation p-value.

    Returns (0, 1) where one side does not vary.
    """
    first, second = stats.rankdata(_vector(x, "x")), stats.rankdata(_vector(y, "y"))
    if first.size != second.size or first.size < 3:
        raise BadInputError(
            f"{first.size} and {second.size} values: give the same number, 3 or more"
        )
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((first @ first) * (second @ second)))
    if scale == 0.0:
        return 0.0, 1.0
    rho = float(first @ second) / scale
    null = np.abs(permutation_draws(first, draws, seed) @ second) / scale
    return rho, permutation_p_value(abs(rho), null)


def holm(p_values: ArrayLike) -> Floats:
    """Return p-values [n] after Holm's step-down correction for all of them (1979)."""
    p = _p_values(p_values)
    order = p.argsort(kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1.0)
    return corrected


def benjamini_hochberg(p_values: ArrayLike) -> Floats:
    """Return q-values [n]: the false discovery rate at which each would be called (1995)."""
    p = _p_values(p_values)
    order = p.argsort(kind="stable")[::-1]
    steps = p[order] * p.size / np.arange(p.size, 0, -1)
    q = np.empty_like(p)
    q[order] = np.minimum(np.minimum.accumulate(steps), 1.0)
    return q


def _p_values(p_values: ArrayLike) -> Floats:
    p = _vector(p_values, "p-values")
    if bool(((p < 0) | (p > 1)).any()):
        raise BadInputError(f"a p-value lies outside 0 to 1: {p.min()} to {p.max()}")
    return p


def fisher_greater(hits_a: int, n_a: int, hits_b: int, n_b: int) -> float:
    """Fisher's exact test, one-sided: is the share of a larger than that of b?"""
    for hits, n in ((hits_a, n_a), (hits_b, n_b)):
        if not 0 <= hits <= n:
            raise BadInputError(f"{hits} of {n}: give 0 <= hits <= n")
    # P(at least hits_a of the hits fall into a), all margins given.
    return min(1.0, float(stats.hypergeom.sf(hits_a - 1, n_a + n_b, hits_a + hits_b, n_a)))


def simultaneous_quantile(
    draw: Callable[[np.random.Generator, int], Floats],
    level: float = 0.95,
    draws: int = DRAWS,
    seed: Seed = 0,
) -> float:
    """Quantile of the largest absolute statistic over a family.

    ``draw(generator, draws)`` returns standardised errors [draws, family]; intervals of that many
    standard errors hold for the whole family at once.
    """
    _check_level(level)
    errors = np.abs(draw(np.random.default_rng(seed), draws))
    return float(np.quantile(errors.max(axis=1), level))


@dataclass(frozen=True)
class PairedComparison:
    """Two runs on the same questions: tuned minus base."""

    difference: float
    """Mean score of the tuned run minus that of the base run."""
    ci: Interval
    """Interval of the difference; never of zero width at zero."""
    p_value: float
    """McNemar's exact test, or a sign-flip test where scores are means of several samples."""
    changed: int
    """Questions with a different score; gained + lost."""
    gained: int
    lost: int
    n: int
    """Questions."""
    note: str
    """"changed no answer" where the two runs agree on every question, else how p was computed."""


def compare_paired(
    correct_base: ArrayLike,
    correct_tuned: ArrayLike,
    seed: Seed = 0,
    level: float = 0.95,
    draws: int = DRAWS,
) -> PairedComparison:
    """Compares two runs on the same questions (paired bootstrap and McNemar's exact test).

    Args:
        correct_base: [n] or [n, samples], 1 where correct.
        correct_tuned: the same questions in the same order.
        seed: of the bootstrap.
        level: of the interval.
        draws: of the bootstrap.

    Returns:
        The comparison.  Where no question differs, the interval is (-u, u) with u the upper
        Clopper-Pearson bound of the flip rate at 0 of n: so many flips could have been missed.
        Where every question flipped the same way, it is likewise exact instead of a point.
    """
    differences = _differences(correct_base, correct_tuned)
    n = int(differences.size)
    gained = int(np.count_nonzero(differences > 0))
    lost = int(np.count_nonzero(differences < 0))
    if gained + lost == 0:
        bound = clopper_pearson(0, n, level)[1]
        return PairedComparison(0.0, (-bound, bound), 1.0, 0, 0, 0, n, "changed no answer")
    binary = bool(np.isin(differences, (-1.0, 0.0, 1.0)).all())
    difference, ci = paired_bootstrap(correct_base, correct_tuned, level, draws, seed)
    if binary and max(gained, lost) == n:
        bound = clopper_pearson(n, n, level)[0]
        ci = (bound, 1.0) if gained else (-1.0, -bound)
    if binary:
        p_value, note = mcnemar_exact(gained, lost), "McNemar's exact test"
    else:
        p_value = sign_flip_p_value(differences, draws, seed)
        note = "sign-flip permutation test over questions"
    return PairedComparison(difference, ci, p_value, gained + lost, gained, lost, n, note)


@dataclass(frozen=True)
class SetDifference:
    """How far one set lies from random sets that were measured on the same units."""

    value: float
    """Mean of the set minus the mean of the random sets."""
    se: float
    """Standard error over units and over random sets."""
    freedom: float
    """Its degrees of freedom (Welch and Satterthwaite)."""
    p_value: float
    """Two-sided, of the set being one more random one: Student's t."""


def difference_from_sets(target: ArrayLike, random: ArrayLike) -> SetDifference:
    """Compare a set's values [n] with those of random sets [sets, n] on the same units.

    Random sets differ from each other too, and units do not average that away: taken as fixed, any
    set would lie beyond them once there are units enough.

    Raises:
        BadInputError: fewer than two units or random sets, or other shapes.
    """
    own, others = np.asarray(target, dtype=np.float64), np.asarray(random, dtype=np.float64)
    if own.ndim != 1 or others.ndim != 2 or others.shape[1:] != own.shape or min(others.shape) < 2:
        raise BadInputError(
            f"a set {own.shape} and random sets {others.shape}: give [n] and [sets, n], two or more"
        )
    sets, n = others.shape
    beyond = own - others.mean(axis=0)
    value = float(beyond.mean())
    over_units = float(beyond.var(ddof=1)) / n
    over_sets = float(others.mean(axis=1).var(ddof=1)) * (1 + 1 / sets)
    total = over_units + over_sets
    if total <= 0:
        return SetDifference(value, 0.0, n - 1.0, 1.0 if value == 0 else 0.0)
    freedom = total**2 / (over_units**2 / (n - 1) + over_sets**2 / (sets - 1))
    p_value = 2 * float(stats.t.sf(abs(value) / np.sqrt(total), freedom))
    return SetDifference(value, float(np.sqrt(total)), float(freedom), p_value)


def expected_maximum(n: int) -> float:
    """Expected maximum of n independent standard normals: 0 for 1, 0.564 for 2, 1.029 for 4."""
    if n < 1:
        raise BadInputError(f"the maximum of {n} values: give 1 or more")
    grid = np.linspace(-12.0, 12.0, 4801)
    below = special.ndtr(grid) ** (n - 1)
    density = n * np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi) * below
    return float(np.trapezoid(grid * density, grid))


@dataclass(frozen=True)
class OneWay:
    """Variance between groups against variance within them; sizes may differ."""

    f_statistic: float | None
    """None where F is not defined: no group of two, or no variance within groups."""
    p_value: float | None
    df_between: int
    df_within: int
    ms_between: float
    ms_within: float | None
    omega_squared: float | None
    """Share of the variance that lies between groups, nearly unbiased: below 0 for F < 1."""
    eta_squared_ci: Interval | None
    """Interval of the population's share of variance between groups (noncentral F)."""
    icc: float | None
    """Correlation of two values of one group, ICC(1)."""
    icc_ci: Interval | None
    """From the F distribution; exact for equal sizes."""


def _sums_of_squares(tables: Floats, groups: ArrayLike) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Between and total [draws], and the groups' sizes, from tables [draws, n]."""
    _, codes, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if tables.ndim != 2 or codes.shape != tables.shape[1:] or sizes.size < 2:
        raise BadInputError(
            f"values {tables.shape} in {sizes.size} groups: give one group a value and two groups"
        )
    centred = tables - tables.mean(axis=1, keepdims=True)
    by_group = centred[:, codes.argsort(kind="stable")]
    sums = np.add.reduceat(by_group, np.cumsum(sizes) - sizes, axis=1)
    return (sums**2 / sizes).sum(axis=1), (centred**2).sum(axis=1), sizes


def one_way_f(tables: ArrayLike, groups: ArrayLike) -> Floats:
    """F statistics [draws] of tables [draws, n] whose columns belong to groups [n]."""
    values = np.atleast_2d(np.asarray(tables, dtype=np.float64))
    between, total, sizes = _sums_of_squares(values, groups)
    df_between, df_within = sizes.size - 1, values.shape[1] - sizes.size
    if df_within < 1:
        raise BadInputError(f"{values.shape[1]} values in {sizes.size} groups: no group has two")
    with np.errstate(divide="ignore", invalid="ignore"):
        return (between / df_between) / ((total - between) / df_within)


def one_way(values: ArrayLike, groups: ArrayLike, level: float = 0.95) -> OneWay:
    """One-way analysis of variance of values [n] in groups [n], sizes equal or not."""
    vector = _vector(values, "values")
    _check_level(level)
    sums, totals, sizes = _sums_of_squares(vector[None], groups)
    between, total, n = float(sums[0]), float(totals[0]), int(vector.size)
    df_between, df_within = int(sizes.size - 1), int(n - sizes.size)
    ms_between = between / df_between
    # What is left after subtraction is rounding where the rows of every group agree.
    inside = total - between if total - between > 1e-12 * total else 0.0
    ms_within = inside / df_within if df_within else None
    if not ms_within:
        return OneWay(
            None, None, df_between, df_within, ms_between, ms_within, None, None, None, None
        )
    f = ms_between / ms_within
    tail = (1 - level) / 2
    low, high = (_noncentrality(f, df_between, df_within, p) for p in (1 - tail, tail))
    size = (n - float((sizes**2).sum()) / n) / df_between  # the mean size, for unequal groups
    ratios = (
        f,
        f / float(stats.f.ppf(1 - tail, df_between, df_within)),
        f * float(stats.f.ppf(1 - tail, df_within, df_between)),
    )
    icc, icc_low, icc_high = ((r - 1) / (r + size - 1) for r in ratios)
    return OneWay(
        f,
        float(stats.f.sf(f, df_between, df_within)),
        df_between,
        df_within,
        ms_between,
        ms_within,
        (between - df_between * ms_within) / (total + ms_within),
        (low / (low + n), high / (high + n)),
        icc,
        (icc_low, icc_high),
    )


def _noncentrality(f: float, df_between: int, df_within: int, share: float) -> float:
    """The noncentrality under which `share` of the F distribution lies below f; 0 if none."""

    def gap(noncentrality: float) -> float:
        return float(stats.ncf.cdf(f, df_between, df_within, noncentrality)) - share

    # scipy's noncentral F is the central one at 0 only in the limit.
    if float(stats.f.cdf(f, df_between, df_within)) <= share:
        return 0.0
    top = max(1.0, f * df_between)
    while gap(top) > 0:
        top *= 2
    return optimize.root_scalar(gap, bracket=(1e-9, top), method="brentq", xtol=1e-6).root


def one_way_permutation(
    values: ArrayLike, groups: ArrayLike, draws: int = DRAWS, seed: Seed = 0
) -> float:
    """Return p of the F of values [n] in groups [n], shuffled over the groups for its null."""
    vector = _vector(values, "values")
    between, total, _ = _sums_of_squares(vector[None], groups)
    if total[0] == 0.0:
        return 1.0
    # The total stays as it is, so the sum between grows with F.
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // vector.size)
    parts = []
    for start in range(0, draws, rows):
        tables = np.tile(vector, (min(rows, draws - start), 1))
        parts.append(_sums_of_squares(rng.permuted(tables, axis=1), groups)[0])
    return permutation_p_value(1.0, np.concatenate(parts) / between[0]) if between[0] else 1.0


def best_of_noise(sizes: Sequence[int], draws: int = DRAWS, seed: Seed = 0) -> Floats:
    """Mean over groups of maximum minus mean [draws], all values being standard normal noise."""
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    for size in sizes:
        values = rng.standard_normal((draws, size))
        total += values.max(axis=1) - values.mean(axis=1)
    return total / len(sizes)
