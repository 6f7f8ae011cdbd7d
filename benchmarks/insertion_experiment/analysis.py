"""The registered analysis: contrasts over draws, and the tables of the document."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from benchmarks.insertion_experiment.draws import CELLS, INSERTED, PRIMARY
from resa_lens.stats import holm

CONTRASTS = (
    ("A", "B"), ("A", "C"), ("A", "base"), ("B", "base"), ("C", "base"), ("A", "D"), ("A", "J"),
    ("A", "K"), ("D", "base"), ("J", "base"), ("K", "base"), ("E", "base"), ("F", "base"),
    ("E", "F"), ("E", "A"), ("G", "base"), ("G negated", "base"), ("H", "base"), ("I", "base"),
    ("A", "H"),
)  # fmt: skip
"""The first two are primary and co-primary."""
GATE = 0.1
"""Gain by the source's SAE, inserted."""
MARGIN = 3.0
"""Points."""


@dataclass(frozen=True)
class Contrast:
    """The mean over draws of the difference of two cells, in points."""

    name: str
    differences: tuple[float, ...]
    ci: tuple[float, float]
    p_value: float
    p_equivalent: float
    """The larger p of the two one-sided tests against the margin."""

    @property
    def mean(self) -> float:
        """The mean over the draws."""
        return statistics.fmean(self.differences)


def contrast(name: str, differences: Sequence[float]) -> Contrast:
    """Return the t interval and tests of differences over draws; NaN with fewer than two."""
    n = len(differences)
    if n < 2:
        return Contrast(name, tuple(differences), (math.nan, math.nan), math.nan, math.nan)
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n)
    law = student(n - 1)
    half = float(law.ppf(0.975)) * error
    p_value = 2 * float(law.sf(abs(mean) / error)) if error else float(mean == 0)
    sides = [float(law.sf((MARGIN + sign * mean) / error)) if error else 0.0 for sign in (1, -1)]
    return Contrast(name, tuple(differences), (mean - half, mean + half), p_value, max(sides))


def stored_draws(work: Path, draws: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Return what is there of each draw, by cell."""
    stored: dict[int, dict[str, Any]] = {}
    for seed in draws:
        together = work / f"draw-{seed}.json"
        cells = json.loads(together.read_text()) if together.exists() else {
            file.stem: json.loads(file.read_text())
            for file in sorted((work / f"draw-{seed}").glob("*.json"))
        }  # fmt: skip
        if "G" in cells:
            cells["G negated"] = cells["G"]["negated"]
        stored[seed] = cells
    return stored


def analyse(work: Path, draws: Sequence[int]) -> None:
    """Print the registered tables; refuse while a primary cell of a draw is missing."""
    stored = stored_draws(work, draws)
    for seed, cells in stored.items():
        if lacking := [name for name in ("base", *PRIMARY) if name not in cells]:
            raise SystemExit(
                f"draw {seed} has no {', '.join(lacking)} yet: no contrast is looked at before"
            )
    _print_insertion(stored)
    print("\n| cell | " + " | ".join(f"draw {seed}" for seed in stored) + " | mean |")
    print("|---" * (len(stored) + 2) + "|")
    for name in ("base", *CELLS, "G negated"):
        values = [100 * cells[name]["accuracy"] if name in cells else None
                  for cells in stored.values()]  # fmt: skip
        known = [value for value in values if value is not None]
        if known:
            shown = " | ".join("" if value is None else f"{value:.1f}" for value in values)
            print(f"| {name} {CELLS.get(name, '')} | {shown} | {statistics.fmean(known):.1f} |")
    rows = [
        contrast(
            f"{first} - {second}",
            [100 * (cells[first]["accuracy"] - cells[second]["accuracy"])
             for cells in stored.values() if first in cells and second in cells],
        )
        for first, second in CONTRASTS
    ]  # fmt: skip
    corrected = holm([row.p_value for row in rows[:2]])
    print("\n| contrast | draws | points | 95 % | p | within 3 points, p |")
    print("|---|---|---|---|---|---|")
    for number, row in enumerate(row for row in rows if row.differences):
        p_value = f"{row.p_value:.2g}" + (f" (Holm {corrected[number]:.2g})" if number < 2 else "")
        print(
            f"| {row.name} | {len(row.differences)} | {row.mean:+.1f} | {row.ci[0]:+.1f} to "
            f"{row.ci[1]:+.1f} | {p_value} | {row.p_equivalent:.2g} |"
        )
    for seed, cells in stored.items():
        for name, cell in cells.items():
            if "loss" in cell and "A" in cells and cell["accuracy"] < cells["base"]["accuracy"] / 2:
                print(f"draw {seed}, {name}: accuracy below half of the base's, loss on documents "
                      f"{cell['loss']:.3f} (A: {cells['A']['loss']:.3f})")  # fmt: skip


def _print_insertion(stored: dict[int, dict[str, Any]]) -> None:
    known = {seed: cells["insertion"] for seed, cells in stored.items() if "insertion" in cells}
    if not known:
        return
    print(
        "| inserted | " + " | ".join(f"draw {seed}" for seed in known) + " | change, mean | 95 % |"
    )
    print("|---" * (len(known) + 3) + "|")
    for name in INSERTED:
        shares = [test["inserted"][name]["accuracy"] for test in known.values()]
        row = contrast(name, [
            100 * (share - test["inserted"]["base"]["accuracy"])
            for share, test in zip(shares, known.values(), strict=True)
        ])  # fmt: skip
        shown = " | ".join(f"{100 * share:.1f}" for share in shares)
        print(f"| {name} | {shown} | {row.mean:+.1f} | {row.ci[0]:+.1f} to {row.ci[1]:+.1f} |")
    gate = [
        seed
        for seed, test in known.items()
        if test["inserted"]["sae"]["accuracy"] - test["inserted"]["base"]["accuracy"] >= GATE
    ]
    print(f"\ngate (SAE of the source +10 points or more): draws {gate or 'none'}")


def collect(work: Path, draws: Sequence[int], place: Path) -> None:
    """Write what is there of each draw as one file."""
    place.mkdir(parents=True, exist_ok=True)
    for seed, cells in stored_draws(work, draws).items():
        cells.pop("G negated", None)
        (place / f"draw-{seed}.json").write_text(json.dumps(cells, indent=1) + "\n")
