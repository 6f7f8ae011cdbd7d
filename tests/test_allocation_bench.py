"""The tables of sparse allocation in the findings are what the stored results say."""

from __future__ import annotations

from pathlib import Path

from benchmarks import allocation

ROOT = Path(__file__).resolve().parents[1]


def test_the_tables_are_those_of_the_stored_results() -> None:
    assert allocation.analyse() in (ROOT / "docs" / "findings.md").read_text()
