"""The sweep of planted blocks: its arithmetic by hand, and its tables in the document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import planted_sweep as sweep
from benchmarks.planted_blocks import LAYERS

ROOT = Path(__file__).resolve().parents[1]


def test_rho_is_scipys_and_its_p_that_of_permutations() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=10)
    for gains in (rng.normal(size=10), values + rng.normal(size=10), np.round(values)):
        rho, p = sweep.correlation(values, gains)
        peer: Any = stats.spearmanr(values, gains)
        assert rho == pytest.approx(peer.statistic)
        # The peer's p is Student's approximation.
        assert p == pytest.approx(peer.pvalue, abs=0.03)
    assert sweep.correlation(np.ones(10), values)[1] == 1.0


def test_marks_are_points_against_the_base() -> None:
    cells = {"base": {"correct": "0011"}}
    cells |= {f"sae-{layer}": {"correct": "0011"} for layer in LAYERS} | {
        "sae-4": {"correct": "1011"}, "sae-5": {"correct": "0000"},
    }  # fmt: skip
    gains = sweep.marks(cells, "sae").mean(axis=1)
    assert list(gains[3:5]) == [25.0, -50.0]
    assert not np.delete(gains, [3, 4]).any()


def stored(place: Path, block: int) -> None:
    """A draw in which tuning helps at the block alone, and only one table knows the block."""
    rng = np.random.default_rng(1)
    base = rng.random(400) < 0.3
    right = {layer: base | (rng.random(400) < (0.3 if layer == block else 0.0)) for layer in LAYERS}
    rows = {"base": base, **{f"sae-{layer}": row for layer, row in right.items()}}
    text = {name: "".join("1" if mark else "0" for mark in row) for name, row in rows.items()}
    cells = {name: {"correct": row, "n": 400, "accuracy": row.count("1") / 400}
             for name, row in text.items()}  # fmt: skip
    (place / "layers.json").write_text(json.dumps({"500": {"block": block, "cells": cells}}))
    known = {str(x): [1.0 if x == block else 0.0, 0.1] for x in LAYERS}
    zero = {rule: {str(x): 0 for x in LAYERS} for rule in ("all", "any", "either")}
    picks = {rule: {"most-features": 5, "mixture": 5} for rule in zero}
    draw: dict[str, Any] = {
        "block": block, "counts": {"source": zero, "target": zero}, "change": known,
        "counted": {"source": picks, "target": picks},
    }  # fmt: skip
    (place / "draw-500.json").write_text(json.dumps(draw))


def test_a_block_that_alone_gains_is_found_by_the_table_that_knows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path, 7)
    sweep.analyse(tmp_path)
    out = capsys.readouterr().out
    at_block = next(line for line in out.splitlines() if line.startswith("at the block"))
    gain, low = (float(word) for word in at_block.replace("(", " ").split()[5:7])
    assert 12 < low < gain < 30
    row = next(line for line in out.splitlines() if line.startswith("| activation-change | 7"))
    assert "| 0.0 (0.0 to 0.0) |" in row
    middle = next(line for line in out.splitlines() if line.startswith("| middle | 5 | +0.0"))
    assert float(middle.split("|")[4].split()[0]) == pytest.approx(gain, abs=0.1)
    assert "| counts all, source | none: the same at every layer | 1 | 1 |" in out
    assert "SAE less PCA" not in out


def test_the_documents_tables_are_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep.analyse(ROOT / sweep.STORED)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) > 60
    text = (ROOT / "docs" / "experiment-insertion.md").read_text()
    # A draw's first line stands in bold there.
    assert [line for line in lines if line not in text] == []
