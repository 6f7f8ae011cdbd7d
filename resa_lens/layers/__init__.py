"""Tables over layers in, recommendations out; nothing here knows a model.

This file holds what the rooms share: the table reader and the result of a fit.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from resa_lens.errors import BadInputError
from resa_lens.files import named_path
from resa_lens.stats import Floats, Interval

MAX_LAYERS, MAX_VALUE = 10_000, 1e12
"""What a table may hold: beyond it a number was mistyped."""
MAX_CANDIDATES = 512
"""Candidate layers at most: fits and nulls take seconds up to here."""
SUPPORTED, TREND, WEAK, FLAT = "supported", "trend", "weak", "not distinguishable from flat"
"""The verdicts: lumps; rates that rise, fall or wander; uneven by one test; no more than chance."""


@dataclass(frozen=True)
class Profile:
    """Checked input of every recipe: values [L] at layers [L], ascending."""

    layers: tuple[int, ...]
    values: Floats
    kind: str
    baseline: float | None
    noise: float | None
    draws: int
    seed: int

    @property
    def positions(self) -> Floats:
        """The layers as floats [L]."""
        return np.asarray(self.layers, dtype=np.float64)


@dataclass(frozen=True)
class Component:
    """One Gaussian: mean and standard deviation in layers (0-based), weight a share of one."""

    mean: float
    weight: float
    std: float


@dataclass(frozen=True)
class ComponentInterval:
    """Bootstrap 95 % intervals of a component's mean and weight; draws are matched by mean."""

    mean: Interval
    weight: Interval


@dataclass(frozen=True)
class MixtureFit:
    """A mixture over layers with its nulls and its verdict."""

    recipe: str
    """"paper" or "robust"."""
    kind: str
    """"counts" or "scores"."""
    layers: tuple[int, ...]
    """Candidate layers, 0-based, ascending."""
    values: tuple[float, ...]
    """Count or score of each candidate layer."""
    n: int
    """Features; for scores, repetitions (paper) or layers (robust)."""
    k: int
    """Components; 0 is the uniform distribution, or no fit."""
    components: tuple[Component, ...]
    """`paper`: the library's order, each mean with its own weight; `robust`: by mean."""
    entropy: float | None
    """`paper`: of the density on 300 points over the layers, plus ln(step), in nats; `robust`:
    of the fitted probabilities of the candidate layers, so ln(layers) for k = 0."""
    log_likelihood: float | None
    """A sample, after the last step; None where values are no counts (`robust`) or without fit."""
    converged: bool
    """`paper`: running on gains less than the library's tolerance, 1e-3 a sample."""
    iterations: int
    intervals: tuple[ComponentInterval, ...]
    """One per component, in the same order; empty where nothing can be resampled."""
    bic: dict[int, float]
    """K to the Bayesian information criterion, n = features; empty for scores."""
    nulls: dict[str, Any]
    """Each null with its statistic, value, p and draws; plain values."""
    verdict: str
    reason: str
    next_step: str
    recommended: tuple[int, ...]
    """Nearest candidate layer of each component, by weight, without duplicates."""
    baseline: float | None = None
    """What the paper's recipe took off each score, where given."""
    seed: int = 0
    trends: dict[str, float] = field(default_factory=dict)
    """`robust`, of counts: each trend that the mixture was compared with, and its score on the
    scale of `bic` (`trends.trend_scores`)."""

    def density(self, x: Floats) -> Floats:
        """Fitted density per layer at positions x [points]; k = 0 is flat over the candidates."""
        positions = np.asarray(x, dtype=np.float64)
        first, last = self.layers[0] - 0.5, self.layers[-1] + 0.5
        inside = (positions >= first) & (positions <= last)
        if not self.components:
            return np.where(inside, 1.0 / (last - first), 0.0)
        total = np.zeros_like(positions)
        for part in self.components:
            bell = np.exp(-0.5 * ((positions - part.mean) / part.std) ** 2)
            bell *= part.weight / (part.std * math.sqrt(2 * math.pi))
            if self.recipe == "robust":
                edges = scipy.special.ndtr((np.array([first, last]) - part.mean) / part.std)
                bell = np.where(inside, bell / (edges[1] - edges[0]), 0.0)
            total += bell
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        plain["bic"] = {str(k): value for k, value in self.bic.items()}
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MixtureFit:
        """Read what `to_dict` wrote, also by way of JSON."""
        intervals = [
            ComponentInterval(
                (item["mean"][0], item["mean"][1]), (item["weight"][0], item["weight"][1])
            )
            for item in values["intervals"]
        ]
        changed = {
            "layers": tuple(values["layers"]),
            "values": tuple(values["values"]),
            "components": tuple(Component(**part) for part in values["components"]),
            "intervals": tuple(intervals),
            "bic": {int(k): value for k, value in values["bic"].items()},
            "recommended": tuple(values["recommended"]),
        }
        return cls(**{**values, **changed})


def nearest_layer(mean: float, layers: tuple[int, ...]) -> int:
    """The candidate layer nearest a mean; the lower one of two equally near."""
    return min(layers, key=lambda layer: (abs(layer - mean), layer))


def checked_profile(
    values: Mapping[int, float],
    kind: str,
    baseline: float | None,
    noise: float | None,
    draws: int,
    seed: int,
) -> Profile:
    """Checks the arguments of `mixture.fit_mixture`; raises BadInputError."""
    table = checked_table(values)
    for name, number in (("baseline", baseline), ("noise", noise)):
        if number is not None and not math.isfinite(number):
            raise BadInputError(f"{name} {number}: give a finite number")
    if noise is not None and noise <= 0:
        raise BadInputError(f"noise {noise}: the standard deviation of one score is above 0")
    if draws < 20 or seed < 0:
        raise BadInputError(f"draws {draws}, seed {seed}: give 20 draws or more and a seed from 0")
    odd = next((layer for layer, v in table.items() if v < 0 or v != round(v)), None)
    if kind == "auto":
        kind = "counts" if baseline is None and odd is None else "scores"
    if kind not in ("counts", "scores"):
        raise BadInputError(f'kind "{kind}" is unknown: give "counts", "scores" or "auto"')
    if kind == "counts" and odd is not None:
        raise BadInputError(
            f"layer {odd} (0-based) has the value {table[odd]:g}, which is no count: counts are "
            "whole numbers from 0 (or say kind scores)"
        )
    return Profile(tuple(table), np.array(list(table.values())), kind, baseline, noise, draws, seed)


def checked_table(values: Mapping[Any, Any]) -> dict[int, float]:
    """Checks a table of one number per layer and sorts it by layer.

    Numbers of numpy, pandas and torch are numbers; a text is none, whatever it says.

    Raises:
        BadInputError: no layer or too many, a layer that is no whole number from 0, or a value that
            is no finite number.
    """
    if not values:
        raise BadInputError("the table of layers is empty: give at least one {layer: value}")
    if len(values) > MAX_CANDIDATES:
        raise BadInputError(
            f"{len(values)} candidate layers: give {MAX_CANDIDATES} or fewer, for example every "
            "second one"
        )
    table: dict[int, float] = {}
    for name, entry in values.items():
        layer, value = _plain_number(name), _plain_number(entry)
        if layer is None or layer != round(layer) or layer < 0:
            raise BadInputError(f"layer {name!r:.60}: layers are whole numbers from 0 (0-based)")
        if layer >= MAX_LAYERS:
            raise BadInputError(
                f"layer {name}: no model has so many; give layers below {MAX_LAYERS}"
            )
        if value is None:
            raise BadInputError(
                f"layer {name} (0-based) has the value {entry!r:.60}: give a finite number"
            )
        if abs(value) > MAX_VALUE:
            raise BadInputError(f"layer {name} (0-based) has the value {value}: give at most 1e12")
        table[int(layer)] = value
    return dict(sorted(table.items()))


def _plain_number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def read_table(
    path: str | Path, column: str, *, layer_column: str | None = None
) -> dict[int, float]:
    """Reads one column of a CSV as {0-based layer: value}.

    Args:
        path: a CSV file with a header.
        column: name of the values.
        layer_column: ``layer`` (0-based) or ``layer_1_indexed``; found by itself where not given.

    Returns:
        One value per layer, in the file's order.

    Raises:
        BadInputError: a missing or unreadable file, a missing column, a value that is no finite
            number, no rows, the same layer twice.
    """
    table: dict[int, float] = {}
    for line, shown, layer, value in _rows(path, column, layer_column):
        if layer in table:
            raise BadInputError(f"{path}, line {line}: {shown} stands there twice")
        table[layer] = value
    return table


def read_replicates(
    path: str | Path, column: str, *, layer_column: str | None = None
) -> dict[int, list[float]]:
    """Reads one column of a CSV with several rows a layer (checkpoints, seeds).

    Args, errors: as `read_table`, but for layers that stand there more than once.

    Returns:
        {0-based layer: values}, in the file's order.
    """
    table: dict[int, list[float]] = {}
    for _, _, layer, value in _rows(path, column, layer_column):
        table.setdefault(layer, []).append(value)
    return table


def _rows(
    path: str | Path, column: str, layer_column: str | None
) -> Iterator[tuple[int, str, int, float]]:
    """Yield line, the layer as written, 0-based layer and value of each row of a CSV."""
    source = named_path(path, "table")
    if not source.is_file():
        raise BadInputError(f"{source} is not a file: give a CSV with a header")
    try:
        with source.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            header = [str(name).strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as problem:
        raise BadInputError(f"{source} cannot be read as CSV text: {problem}") from problem
    known = ("layer", "layer_1_indexed")
    name = layer_column or next((option for option in known if option in header), known[0])
    if name not in known:
        raise BadInputError(f'"{name}" is no layer column: give layer (0-based) or layer_1_indexed')
    if not header:
        raise BadInputError(f"{source} is empty: give a CSV with a header and one row per layer")
    for needed in (name, column):
        if needed not in header:
            raise BadInputError(f'{source} has no column "{needed}": it has {", ".join(header)}')
    if not rows:
        raise BadInputError(f"{source} has a header and no rows: give one row per layer")
    for line, row in enumerate(rows, start=2):
        layer = _number(row[name], source, line, name)
        value = _number(row[column], source, line, column)
        layer -= 1 if name == "layer_1_indexed" else 0
        if layer != int(layer) or layer < 0:
            raise BadInputError(f'{source}, line {line}: {name} "{row[name]}" is no layer number')
        yield line, f'{name} "{row[name]}"', int(layer), value


def _number(text: str | None, source: Path, line: int, column: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadInputError(f'{source}, line {line}: {column} "{text or ""}" is no finite number')
    return value
