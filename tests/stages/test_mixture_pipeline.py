"""The bundled mixture through every step that the dense model takes, at tiny shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from resa_lens.cli import app

COMMON = ["--model", "tiny-moe-reasoner", "--threads", "1", "--tokens", "4096", "--latents", "128"]


def result(place: Path, *words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*words, "--workspace", str(place), "--json"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_saes_counts_a_recommendation_a_tuning_and_scores(tmp_path: Path) -> None:
    saes = result(tmp_path, "train-saes", *COMMON, "--layers", "2-5")
    assert [row["layer"] for row in saes["saes"]] == [2, 3, 4, 5]
    assert all(0 < row["fvu"] < 1 for row in saes["saes"])
    counts = result(tmp_path, "count-features", *COMMON, "--layers", "2-5")
    assert [row["layer"] for row in counts["layers"]] == [2, 3, 4, 5]
    choice = result(tmp_path, "recommend-layers", *COMMON, "--layers", "2-5")
    assert set(choice["recommended"]) <= {2, 3, 4, 5}
    tuned = result(
        tmp_path, "tune", *COMMON, "--layer", "4", "--steps", "2", "--limit", "8",
        "--max-new-tokens", "64",
    )  # fmt: skip
    assert tuned["layer"] == 4
    assert tuned["paired"]["n"] == 8
    scored = result(
        tmp_path, "eval", "--model", "tiny-moe-reasoner", "--limit", "16", "--threads", "1"
    )
    assert scored["accuracy"] > 0.5


def test_targets_that_are_no_modules_of_a_mixture_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["tune", *COMMON, "--layer", "4", "--targets", "q_proj,up_proj", "--steps", "1",
              "--workspace", str(tmp_path)],
    )  # fmt: skip
    assert done.exit_code == 2
    assert "no module named 'up_proj'" in done.stderr
    assert "experts" in done.stderr
