"""Shared by the app's tests: a page through AppTest, and a workspace to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest


def _script(page: str) -> None:
    from resa_lens.app.explorer import main

    main(page)


@pytest.fixture
def open_page(monkeypatch) -> Callable[..., AppTest]:
    """`open_page(workspace, "features", layer="3")` opens a page with an address' query."""

    def run(workspace: Path, page: str, **query: str) -> AppTest:
        monkeypatch.setenv("RESA_LENS_WORKSPACE", str(workspace))
        app = AppTest.from_function(_script, default_timeout=60, kwargs={"page": page})
        for key, value in query.items():
            app.query_params[key] = value
        return app.run()

    return run


@pytest.fixture
def copied(demo, tmp_path) -> Path:
    """A copy of the demo's workspace, without weights, to be damaged."""
    target = tmp_path / "workspace"
    skip = shutil.ignore_patterns("*.safetensors", "report.html")
    shutil.copytree(demo.workspace, target, ignore=skip)
    return target
