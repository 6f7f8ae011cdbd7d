"""One-way analysis of variance: groups against the spread within them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from resa_lens.errors import BadInputError
from resa_lens.stats import arrays
from resa_lens.stats.arrays import DRAWS, Floats, Interval, Seed, check_level, vector_of
from resa_lens.stats.resampling import permutation_p_value


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
    vector = vector_of(values, "values")
    check_level(level)
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
        f / float(scipy.stats.f.ppf(1 - tail, df_between, df_within)),
        f * float(scipy.stats.f.ppf(1 - tail, df_within, df_between)),
    )
    icc, icc_low, icc_high = ((r - 1) / (r + size - 1) for r in ratios)
    return OneWay(
        f,
        float(scipy.stats.f.sf(f, df_between, df_within)),
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
        return float(scipy.stats.ncf.cdf(f, df_between, df_within, noncentrality)) - share

    # scipy's noncentral F is the central one at 0 only in the limit.
    if float(scipy.stats.f.cdf(f, df_between, df_within)) <= share:
        return 0.0
    top = max(1.0, f * df_between)
    while gap(top) > 0:
        top *= 2
    return scipy.optimize.root_scalar(gap, bracket=(1e-9, top), method="brentq", xtol=1e-6).root


def one_way_permutation(
    values: ArrayLike, groups: ArrayLike, draws: int = DRAWS, seed: Seed = 0
) -> float:
    """Return p of the F of values [n] in groups [n], shuffled over the groups for its null."""
    vector = vector_of(values, "values")
    between, total, _ = _sums_of_squares(vector[None], groups)
    if total[0] == 0.0:
        return 1.0
    # The total stays as it is, so the sum between grows with F.
    rng = np.random.default_rng(seed)
    rows = max(1, arrays.CHUNK // vector.size)
    parts = []
    for start in range(0, draws, rows):
        tables = np.tile(vector, (min(rows, draws - start), 1))
        parts.append(_sums_of_squares(rng.permuted(tables, axis=1), groups)[0])
    return permutation_p_value(1.0, np.concatenate(parts) / between[0]) if between[0] else 1.0


def one_way_power(
    between: float,
    within: float,
    *,
    groups: int,
    each: int,
    alpha: float = 0.05,
    draws: int = DRAWS,
    seed: Seed = 0,
) -> float:
    """Return how often the F test finds groups whose true means differ by so much; simulated.

    Args:
        between: standard deviation of the groups' true means.
        within: standard deviation of the values of one group.
        groups: how many groups.
        each: values a group.
        alpha: level of the test.
        draws: simulated tables.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(groups), each)
    border = scipy.stats.f.ppf(1 - alpha, groups - 1, groups * (each - 1))
    true = between * rng.standard_normal((draws, groups))[:, index]
    tables = true + within * rng.standard_normal((draws, index.size))
    return float((one_way_f(tables, index) > border).mean())
