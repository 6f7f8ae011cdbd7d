"""The registered analysis: its arithmetic, its patience, and the tables in the document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from benchmarks.insertion_experiment import analysis, draws

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "data" / "experiment" / "insertion"
ALL = list(range(100, 108))


def test_a_contrast_is_the_t_test_over_draws() -> None:
    differences = [1.0, 2.5, -0.5, 3.0, 1.5, 0.5]
    row = analysis.contrast("x", differences)
    peer = stats.ttest_1samp(differences, 0.0)
    assert row.p_value == pytest.approx(peer.pvalue)
    interval = peer.confidence_interval(0.95)
    assert row.ci == pytest.approx((interval.low, interval.high))
    sides = [
        stats.ttest_1samp(differences, bound, alternative=side).pvalue
        for bound, side in ((-analysis.MARGIN, "greater"), (analysis.MARGIN, "less"))
    ]
    assert row.p_equivalent == pytest.approx(max(sides))


def test_no_contrast_is_looked_at_before_every_draw_is_there(tmp_path: Path) -> None:
    for seed in (100, 101):
        cells = json.loads((STORED / f"draw-{seed}.json").read_text())
        if seed == 101:
            del cells["C"]
        (tmp_path / f"draw-{seed}.json").write_text(json.dumps(cells))
    with pytest.raises(SystemExit, match="draw 101 has no C yet"):
        analysis.analyse(tmp_path, [100, 101])


def test_the_documents_tables_are_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    analysis.analyse(STORED, ALL)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 20
    text = (ROOT / "docs" / "experiment-insertion.md").read_text()
    assert [line for line in lines if line not in text] == []


def test_every_stored_answer_is_there() -> None:
    for seed in ALL:
        cells = json.loads((STORED / f"draw-{seed}.json").read_text())
        for name in ("base", *draws.PRIMARY):
            correct = cells[name]["correct"]
            assert len(correct) == cells[name]["n"] == draws.QUESTIONS
            assert correct.count("1") / len(correct) == pytest.approx(cells[name]["accuracy"])
