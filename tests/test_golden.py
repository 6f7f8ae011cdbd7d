"""An old workspace says what it always said: `golden/workspace` against `golden/figures.json`.

The workspace is the one that shipped on 2026-11-28, cut down: SAE weights of layer 5 alone, no
losses, trials, logs or answers of ablations, one sweep, one adapter without its weights, and in the
tables of activity and scores the rows of some features of layer 5.  No manifest was touched.
`PYTHONPATH=tests/support python tests/test_golden.py` writes the figures anew: only for a change
that is meant.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from app_driver import state
from streamlit.testing.v1 import AppTest
from typer.testing import CliRunner

from resa_lens.cli import app as commands

GOLDEN = Path(__file__).parent / "golden"
BASE = "tiny-reasoner-459a3904-2963ff01"
TUNED = "tiny-reasoner-459a3904-paper-mlp-out-L05-b8301693-1f9a0157-fbad39f5"
NOISE = "tiny-reasoner-459a3904-paper-mlp-out-L05-f3bbe0b4-1aee8835-d00bdb89"
ADAPTER = "tiny-reasoner-459a3904-paper-mlp_out-L05-b8301693"
SWEEP = "sweeps/tiny-reasoner-459a3904-paper-mlp_out-937b1cc0"
COMMANDS = {
    "runs": ["runs"],
    "cost": ["cost", "--usd-per-hour", "0.5"],
    "cost of the adapter": ["cost", "--adapter", ADAPTER],
    "compare": ["compare", BASE, TUNED],
    "compare three": ["compare", BASE, TUNED, NOISE],
}
PAGES: dict[str, tuple[str, dict[str, str]]] = {
    "overview": ("overview", {}),
    "overview of the sweep": ("overview", {"artifact": SWEEP}),
    "layers": ("layers", {"view": "Everything"}),
    "features": ("features", {}),
    "a feature": ("features", {"layer": "5", "feature": "223"}),
    "scores": ("scores", {"scores_view": "Everything"}),
}
"""What is opened of the explorer: page and address."""


def command_figures(workspace: Path, name: str) -> Any:
    """Return the object that a command prints."""
    done = CliRunner().invoke(commands, [*COMMANDS[name], "--json", "--workspace", str(workspace)])
    assert done.exit_code == 0, done.output
    return placeless(json.loads(done.stdout), workspace)


def page_figures(workspace: Path, name: str) -> Any:
    """Return the texts and the tables of a page of the explorer, and how many charts it has."""
    page, query = PAGES[name]
    app = AppTest.from_function(_script, default_timeout=120, kwargs={"page": page})
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception
    kinds = (app.metric, app.text, app.markdown, app.caption, app.code)
    shown = [element.value for kind in kinds for element in kind]
    tables = [
        json.loads(str(frame.value.to_json(orient="split", double_precision=15)))
        for frame in app.dataframe
    ]
    charts = len(app.get("plotly_chart"))
    return placeless({"texts": shown, "tables": tables, "charts": charts}, workspace)


def _script(page: str) -> None:
    from resa_lens.app.explorer import main

    main(page)


def placeless(value: Any, workspace: Path) -> Any:
    """Return a JSON value with a mark for the place of the workspace."""
    return json.loads(json.dumps(value).replace(str(workspace), "WORKSPACE"))


def differences(expected: Any, value: Any, path: str = "") -> list[str]:
    """Return a line for each place where two JSON values differ, floats beyond rounding."""
    if isinstance(expected, dict) and isinstance(value, dict) and expected.keys() == value.keys():
        return [
            d for key in expected for d in differences(expected[key], value[key], f"{path}/{key}")
        ]
    if isinstance(expected, list) and isinstance(value, list) and len(expected) == len(value):
        pairs = enumerate(zip(expected, value, strict=True))
        return [d for n, (a, b) in pairs for d in differences(a, b, f"{path}/{n}")]
    if isinstance(expected, float) and isinstance(value, float):
        same = math.isclose(expected, value, rel_tol=1e-9, abs_tol=1e-12)
    else:
        same = type(expected) is type(value) and expected == value
    return [] if same else [f"{path}: {str(expected)[:300]!r} is now {str(value)[:300]!r}"]


def copied(place: Path) -> Path:
    """Return a copy of the golden workspace; its times are those of the manifests."""
    target = place / "workspace"
    shutil.copytree(GOLDEN / "workspace", target)
    for n, file in enumerate(sorted(target.rglob("manifest.json"))):
        created = datetime.fromisoformat(json.loads(file.read_text())["created"])
        os.utime(file, (n, created.timestamp() + n / 1000))
    return target


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the golden workspace, which the explorer opens too."""
    target = copied(tmp_path)
    monkeypatch.setenv("RESA_LENS_WORKSPACE", str(target))
    return target


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """What stood there when the workspace was frozen."""
    return json.loads((GOLDEN / "figures.json").read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_what_it_always_printed(workspace, figures, name):
    before = state(workspace)
    assert differences(figures["commands"][name], command_figures(workspace, name)) == []
    assert state(workspace) == before


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_what_it_always_showed(workspace, figures, name):
    before = state(workspace)
    assert differences(figures["pages"][name], page_figures(workspace, name)) == []
    assert state(workspace) == before


def freeze() -> None:
    """Write the figures anew."""
    with tempfile.TemporaryDirectory() as place:
        target = copied(Path(place))
        os.environ["RESA_LENS_WORKSPACE"] = str(target)
        kept = {
            "commands": {name: command_figures(target, name) for name in COMMANDS},
            "pages": {name: page_figures(target, name) for name in PAGES},
        }
    (GOLDEN / "figures.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    freeze()
