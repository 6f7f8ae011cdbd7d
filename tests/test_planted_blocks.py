"""Planted blocks: one small draw from its seed, the arithmetic, and the tables in the document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from benchmarks import planted_blocks as planted
from benchmarks import sweep_selectors
from benchmarks.lora_gradients import lora_gradients
from resa_lens.models.activation_change import activation_change
from resa_lens.models.host import load_model
from resa_lens.tuning.gradient_probe import gradient_probe

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "data" / "experiment" / "planted_blocks"


def test_a_planted_block_from_its_seed() -> None:
    # A development draw: block 6, seed 0, eight standard deviations.
    target = planted.damaged(0, block=6, sd=8.0)
    batches = planted.worked_batches(target, 0, 1024)
    change = activation_change(load_model("tiny-reasoner"), target, batches, planted.POINTS)
    assert max(change, key=lambda layer: change[layer][0]) == 6
    assert all(change[layer] == (0.0, 0.0) for layer in range(1, 6))
    assert change[6][0] > 10 * max(change[layer][0] for layer in range(7, 11))
    weights = gradient_probe(target, batches)
    assert max(planted.LAYERS, key=lambda layer: weights[layer][0]) == 6
    energy = lora_gradients(target, batches)
    ranked = sorted(planted.LAYERS, key=lambda layer: -energy[layer][0])
    assert 6 in ranked[:2]


def draw(block: int, peak: int) -> dict[str, Any]:
    """A stored draw whose tables have their best value at a layer, and counts of nothing."""
    table = {str(layer): [2.0 if layer == peak else 1.0, 0.1] for layer in planted.LAYERS}
    counts = {rule: {str(layer): 0 for layer in planted.LAYERS} for rule in planted.RULES}
    quality = {layer: -value for layer, (value, _) in table.items()}
    return {
        "block": block, "counts": {"source": counts, "target": counts}, "quality": quality,
        "gradient": table, "weights": table, "change": table,
        "counted": {
            who: {rule: {"most-features": 5, "mixture": 5} for rule in planted.RULES}
            for who in ("source", "target")
        },
    }  # fmt: skip


def test_hits_intervals_and_ranks_by_hand() -> None:
    draws = [draw(4, 4), draw(8, 8), draw(9, 2), draw(10, 10)]
    rows = {row["selector"]: row for row in planted.judge(draws)}
    for name in ("quality", "LoRA gradients", "gradient-probe", "activation-change"):
        row = rows[name]
        assert (row["hits"], row["layers"]) == (3, [4, 8, 2, 10])
        peer = stats.binomtest(3, 4, 0.1, alternative="greater")
        assert row["p_value"] == pytest.approx(peer.pvalue)
        both = stats.binomtest(3, 4, 0.1).proportion_ci(0.95, "exact")
        assert row["ci"] == pytest.approx((both.low, both.high))
        # First three times; once one of nine that share the ranks 2 to 10.
        assert row["rank"] == pytest.approx((1 + 1 + 6 + 1) / 4)
        # Six selectors look at the target here: the two of counts have p = 1.
        assert row["holm"] == pytest.approx(6 * peer.pvalue)
    assert rows["middle"]["layers"] == [5] * 4
    assert "holm" not in rows["middle"]
    assert "insertion" not in rows


def test_nothing_is_judged_before_every_draw_is_there(tmp_path: Path) -> None:
    (tmp_path / "draw-500.json").write_text(json.dumps(draw(4, 4)))
    with pytest.raises(SystemExit, match="draw 501 has no counts yet"):
        planted.stored_draws(tmp_path, "four sd")


def test_the_sets_are_as_registered() -> None:
    first, second = planted.DRAWS.values()
    assert len(first) == len(second) == 10
    assert set(first.values()) == {4, 8, 9, 10}
    assert sorted(second.values()) == list(planted.LAYERS)


@pytest.mark.parametrize("script", ["planted", "sweeps"])
def test_the_documents_tables_are_what_the_commands_print(
    capsys: pytest.CaptureFixture[str], script: str
) -> None:
    if script == "planted":
        planted.analyse(STORED)
    else:
        sweep_selectors.show(STORED / "sweeps.json")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 8
    text = (ROOT / "docs" / "findings.md").read_text()
    assert [line for line in lines if line not in text] == []


def test_every_stored_draw_is_the_damage_that_its_rule_accepts() -> None:
    files = list(STORED.glob("draw-*.json"))
    assert len(files) >= 10
    for name, blocks in planted.DRAWS.items():
        for seed, block in blocks.items():
            if (file := STORED / f"draw-{seed}.json") not in files:
                continue
            stored = json.loads(file.read_text())
            assert (stored["set"], stored["block"]) == (name, block)
            low, high = planted.WINDOW
            assert low <= stored["damage"]["accuracy"] <= high
            assert stored["damage"]["n"] == planted.QUESTIONS
            assert stored["damage"]["seed"] % 1000 == seed % 1000
