"""The command cost: its table, its JSON, prices given and missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from resa_lens.artifacts.workspace import Manifest, Workspace
from resa_lens.cli import app
from resa_lens.stages.reports.costs import dollars, duration


def invoke(*args: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["cost", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def space(tmp_path: Path) -> Path:
    root = Workspace(tmp_path / "space")
    for path, kind, seconds in (("saes/m/r", "saes", 1800.0), ("evals/e", "eval", 3600.0)):
        manifest = Manifest(kind=kind, config={}, seconds=seconds, results={"tokens": 1234567})
        manifest.peak_memory_mb = 512.0
        with root.artifact(root.path(*path.split("/")), manifest):
            pass
    return root.root


def test_the_table_beside_the_papers(space: Path) -> None:
    text = invoke("--workspace", space, "--usd-per-hour", "2").stdout
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["saes"][1:6] == ["1", "30", "min", "00", "s"]
    assert "1,234,567" in rows["saes"]
    assert rows["eval"][1:6] == ["1", "1", "h", "00", "min"]
    assert rows["total"][-1] == "3.00"
    assert "none read" in text
    here = next(line for line in text.splitlines() if "here: the whole workspace" in line)
    assert here.split()[-4:] == ["1.00", "2.00", "none", "3.00"]
    assert "Hypothesis: Modularity (in Table 5)" in text
    assert "2 L40S or RTX 6000 Ada GPUs" in text
    assert "2 of 2 artifacts were not metered" in text


def test_without_a_price_no_usd_and_how_to_give_one(space: Path, tmp_path: Path) -> None:
    text = invoke("--workspace", space).stdout
    assert "No price for cpu" in text
    assert "--usd-per-hour N" in text
    assert "--prices FILE" in text
    assert "no price" in next(line for line in text.splitlines() if line.split()[:1] == ["total"])
    table = tmp_path / "mine.csv"
    table.write_text("device,usd_per_hour,source,date\ncpu,0.5,my own bill,2026-01\n")
    priced = invoke("--workspace", space, "--prices", table).stdout
    assert "0.5 USD an hour (my own bill, 2026-01)" in priced
    assert "No price" not in priced


def test_json_is_one_object_with_everything(space: Path) -> None:
    result = invoke("--workspace", space, "--usd-per-hour", "2", "--json")
    assert result.stdout.count("\n") == 1
    values = json.loads(result.stdout)
    assert [s["stage"] for s in values["stages"]] == ["saes", "eval"]
    assert values["training"]["usd"] == pytest.approx(1.0)
    assert values["evaluation"]["usd"] == pytest.approx(2.0)
    assert values["total"]["tokens"] == 2 * 1234567
    assert len(values["paper"]) == 18
    assert values["unpriced"] == []
    assert json.loads(invoke("--workspace", space, "--json").stdout)["total"]["usd"] is None


def test_an_empty_workspace_says_how_to_begin(tmp_path: Path) -> None:
    assert "resa-lens demo" in invoke("--workspace", tmp_path / "none").stdout


def test_bad_input_is_named(space: Path, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("device,usd_per_hour,source,date\n")
    prices = ("--usd-per-hour", "2", "--prices", tmp_path / "x.csv")
    both = invoke("--workspace", space, *prices, code=2)
    assert "give one" in both.stderr
    assert "absent.csv" in invoke("--prices", tmp_path / "absent.csv", code=2).stderr
    assert "usd-per-hour" in invoke("--usd-per-hour", "nan", code=2).stderr
    missing = invoke("--workspace", space, "--adapter", "absent", code=2)
    assert "not an adapter" in missing.stderr
    # Another artifact's folder is none either.
    assert (
        "not an adapter"
        in invoke("--workspace", space, "--adapter", space / "saes" / "m" / "r", code=2).stderr
    )


def test_times_and_amounts_are_readable() -> None:
    shown = [duration(s) for s in (0.04, 59.94, 60, 3599.6, 11220)]
    assert shown == ["0.0 s", "59.9 s", "1 min 00 s", "1 h 00 min", "3 h 07 min"]
    amounts = [dollars(a) for a in (None, 0.0, 0.00123, 0.5, 0.996, 12.345)]
    assert amounts == ["no price", "0.00", "0.0012", "0.5", "1.00", "12.35"]
