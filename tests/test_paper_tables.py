"""The paper's tables in miniature: a rotation, contrasts by hand, the tables in the document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import paper_tables
from benchmarks.insertion_experiment.draws import random_rotation

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "data" / "experiment" / "paper_tables"


def test_a_rotation_keeps_what_is_added_but_for_its_direction() -> None:
    turn = random_rotation(64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn @ turn.T, torch.eye(64), atol=1e-5, rtol=0)
    added = torch.randn(64, 4) @ torch.randn(4, 64)
    before, after = torch.linalg.svdvals(added), torch.linalg.svdvals(added @ turn)
    torch.testing.assert_close(before, after, atol=1e-3, rtol=1e-4)
    assert torch.nn.functional.cosine_similarity(added, added @ turn, dim=1).abs().mean() < 0.3


def test_differences_are_of_the_same_questions_and_families() -> None:
    families = ["product", "product", "count", "count"]
    cells = {
        name: {"correct": correct, "families": families}
        for name, correct in (("base", "1000"), ("scratch", "1110"))
    }
    cells |= {f"rotated {n}": cells["base"] for n in range(paper_tables.ROTATIONS)}
    assert paper_tables.difference(cells, "scratch - base") == 50.0
    assert paper_tables.difference(cells, "scratch - base", ("count",)) == 50.0
    assert paper_tables.accuracy(cells, "rotated") == 25.0


def test_one_draw_or_half_a_draw_is_not_analysed(tmp_path: Path) -> None:
    whole = json.loads((STORED / "draw-600.json").read_text())
    (tmp_path / "draw-600.json").write_text(json.dumps(whole))
    del whole["attached"]
    (tmp_path / "draw-601.json").write_text(json.dumps(whole))
    with pytest.raises(SystemExit, match="1 whole draws"):
        paper_tables.analyse(tmp_path)


def test_the_documents_tables_are_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    paper_tables.analyse(STORED)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 30
    text = (ROOT / "docs" / "experiment-paper-tables.md").read_text()
    assert [line for line in lines if line not in text] == []


def test_every_stored_answer_is_there() -> None:
    for file in sorted(STORED.glob("draw-*.json")):
        cells = json.loads(file.read_text())
        for name in ("base", *paper_tables.CELLS, *paper_tables.SCORED):
            correct = cells[name]["correct"]
            assert len(correct) == cells[name]["n"] == paper_tables.QUESTIONS
            assert correct.count("1") / len(correct) == pytest.approx(cells[name]["accuracy"])
