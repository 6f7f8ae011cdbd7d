"""Notebooks run from top to bottom and find what they say they find."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
GAUSSIANS = ROOT / "notebooks" / "02_three_gaussians_over_layers.ipynb"
FLAT = "not distinguishable from flat"


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook on a workspace, in a kernel of this very interpreter."""
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "this interpreter", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    # Jupyter asks the user's folder before JUPYTER_PATH.
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(notebook: Path, workspace: Path) -> Any:
        monkeypatch.setenv("RESA_LENS_WORKSPACE", str(workspace))
        loaded = nbformat.read(notebook, as_version=4)
        client = NotebookClient(
            loaded,
            timeout=120,
            kernel_name="python3",
            resources={"metadata": {"path": str(tmp_path)}},
        )
        return client.execute()

    return run


def printed(cell: Any) -> str:
    return "".join(o["text"] for o in cell["outputs"] if o["output_type"] == "stream")


def drawn(executed: Any) -> int:
    outputs = [o for cell in executed.cells if cell.cell_type == "code" for o in cell["outputs"]]
    return sum(any("plotly" in kind for kind in o.get("data", {})) for o in outputs)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_stored_without_outputs(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert cells
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells)


def check_paper(found: dict[str, Any]) -> None:
    """The figures of the specification, section 5."""
    counts = [(14.48, 0.407), (4.86, 0.371), (22.70, 0.222)]
    scores = [(15.15, 0.390), (5.59, 0.368), (23.03, 0.242)]
    for fitted, expected in ((found["paper_counts"], counts), (found["paper_scores"], scores)):
        for (mean, weight), (other_mean, other_weight) in zip(fitted, expected, strict=True):
            assert mean == pytest.approx(other_mean, abs=0.006)
            assert weight == pytest.approx(other_weight, abs=0.0006)
    assert found["entropy"] == pytest.approx([3.1938, 3.2021, 3.2013], abs=6e-5)
    assert found["printed"]["counts"] == [[4.9, 41], [14.5, 37], [22.7, 22]]
    # The one digit that differs: the mean is 15.1514, printed as 15.1.
    assert found["printed"]["scores"] == [[5.6, 39], [15.2, 37], [23.0, 24]]
    assert found["differing"] == [["scores", [15.2, 37], [15.1, 37]]]
    assert found["recommended"] == [14, 5, 23]
    assert found["log_likelihood"] == pytest.approx([-3.3187, -3.2799, -3.2581], abs=6e-5)
    assert found["converged"] is False
    assert found["verdicts"] == [FLAT] * 3
    assert found["dispersion"] == pytest.approx(0.843, abs=1e-3)
    assert found["f_test"] == pytest.approx([1.148, 0.314], abs=6e-4)
    assert found["best_of_bias"] == pytest.approx(1.64, abs=6e-3)
    assert found["spearman"] == pytest.approx([-0.225, 0.12], abs=6e-3)
    assert found["alignment"][0] == pytest.approx(0.732, abs=1e-3)
    assert 0.04 < found["alignment"][1] < 0.11


def test_three_gaussians(demo, execute):
    executed = execute(GAUSSIANS, demo.workspace)
    found = json.loads(printed(executed.cells[-1]))
    check_paper(found)
    folder = Path(demo.workspace, "counts")
    manifest = json.loads(next(folder.rglob("manifest.json")).read_text())
    rows = manifest["results"]["layers"]
    assert found["own_totals"] == {r: sum(row[r] for row in rows) for r in ("all", "any", "either")}
    assert found["own_verdicts"] == demo.result["verdicts"]
    assert drawn(executed) == 4 + 4


@pytest.mark.slow
def test_three_gaussians_without_a_workspace(tmp_path, execute):
    missing = tmp_path / "nothing-here"
    executed = execute(GAUSSIANS, missing)
    found = json.loads(printed(executed.cells[-1]))
    check_paper(found)
    assert found["own_totals"] == {}
    text = "".join(printed(c) for c in executed.cells if c.cell_type == "code")
    assert f"no counts in {missing}" in text
    assert "resa-lens demo" in text
    assert drawn(executed) == 4
    assert not missing.exists()
