"""Every architecture through every step: a seeded third in each run, all of it on demand."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.model_grid import COLUMNS, REFUSALS, VARIANTS, row, run_variant

SEED = os.environ.get("RESA_LENS_GRID_SEED", "0")
THIRD = set(random.Random(SEED).sample(sorted(VARIANTS), len(VARIANTS) // 3))
README = Path(__file__).resolve().parents[2] / "README.md"


def variants() -> list[Any]:
    marks = {name: () if name in THIRD else (pytest.mark.recorded,) for name in VARIANTS}
    return [pytest.param(name, marks=marks[name]) for name in VARIANTS]


@pytest.mark.parametrize("name", variants())
def test_an_architecture_works_in_every_step(name: str, tmp_path: Path) -> None:
    outcome = run_variant(name, tmp_path / name)
    assert outcome == {column: REFUSALS.get((name, column), "") for column in COLUMNS}
    assert row(name, outcome) in README.read_text()


def test_the_grid_is_as_wide_as_it_says() -> None:
    assert len(VARIANTS) >= 22
    refused = {name for name, _ in REFUSALS}
    assert len(VARIANTS) - len(refused) >= 16
    text = README.read_text()
    assert all(f"| `{name}` |" in text for name in VARIANTS)
