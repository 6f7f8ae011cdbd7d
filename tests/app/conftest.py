"""Shared by the app's tests: a page through AppTest, and a workspace to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from app_driver import run_page
from streamlit.testing.v1 import AppTest


@pytest.fixture
def open_page(monkeypatch) -> Callable[..., AppTest]:
    """`open_page(workspace, "features", layer="3")` opens a page with an address' query."""

    def run(workspace: Path, page: str, /, **query: str) -> AppTest:
        monkeypatch.setenv("RESA_LENS_WORKSPACE", str(workspace))
        return run_page(page, **query)

    return run


@pytest.fixture
def copied(demo, tmp_path) -> Path:
    """A copy of the demo's workspace, without weights, to be damaged."""
    target = tmp_path / "workspace"
    skip = shutil.ignore_patterns("*.safetensors", "report.html")
    shutil.copytree(demo.workspace, target, ignore=skip)
    return target
