"""Drives the app for its tests: what a page shows, the app served, a real browser."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from resa_lens.artifacts.manifest import MANIFEST
from resa_lens.hashes import digest, file_hash

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "apps" / "feature_explorer.py"
CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "<img src=x onerror=alert(1)> **bold** ![x](http://example.invalid/x.png) :red[red]"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def _script(page: str) -> None:
    from resa_lens.app.explorer import main

    main(page)


def run_page(page: str, /, **query: str) -> AppTest:
    """Open a page of the workspace that RESA_LENS_WORKSPACE names, with an address' query."""
    app = AppTest.from_function(_script, default_timeout=60, kwargs={"page": page})
    for key, value in query.items():
        app.query_params[key] = value
    return app.run()


def texts(app: AppTest) -> str:
    """What is shown as plain text; the page raised nothing."""
    assert not app.exception
    return "\n".join(element.value for element in app.text)


def marked_up(app: AppTest) -> str:
    """What is read as Markdown."""
    found = [*app.markdown, *app.caption, *app.subheader, *app.title]
    return "\n".join(element.value for element in found)


def manifest_of(workspace: Path, kind_folder: str) -> Path:
    return next(Path(workspace, kind_folder).rglob("manifest.json"))


def edit(file: Path, change: Callable[[Any], None], *, seal: bool = True) -> None:
    """Change a JSON file in place; sealed, its artifact is whole all the same."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))
    if seal:
        reseal(file)


def reseal(file: Path) -> None:
    """Let the manifest of a file's artifact say what is there now, as if it was written so."""
    folder = next((p for p in file.parents if (p / MANIFEST).is_file()), None)
    if folder is None:
        return
    value = json.loads((folder / MANIFEST).read_text())
    if not value.pop("checksum", None):
        return
    for name in value.get("files", {}):
        if (folder / name).is_file():
            value["files"][name] = file_hash(folder / name, cached=False)
    (folder / MANIFEST).write_text(json.dumps({**value, "checksum": digest(value)}))


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Times and sizes of all files: equal before and after where nothing was written."""
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.rglob("*")}


def clickable_markup(app: AppTest, key: str | None = None) -> str:
    """The HTML of the tokens that can be clicked, of one component or of all."""
    protos = [element.proto for element in app.get("bidi_component")]
    return "\n".join(
        json.loads(proto.json)["markup"]
        for proto in protos
        if key is None or proto.id.endswith(f"-{key}")
    )


def charts(app: AppTest) -> int:
    return len(app.get("plotly_chart"))


# A real browser


@contextmanager
def served(
    workspace: Path | None, log: Path, cwd: Path | None = None, script: Path = SCRIPT
) -> Iterator[str]:
    """The app, or another script, on a free port of this machine; ended by its own process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(script)]
    command += ["--server.address", "127.0.0.1", "--server.port", str(port)]
    command += ["--server.headless", "true"]
    command += ["--", "--workspace", str(workspace)] if workspace else []
    environment = {k: v for k, v in os.environ.items() if k != "RESA_LENS_WORKSPACE"}
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=cwd or log.parent, env=environment
        )
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        else:
            raise AssertionError(f"the app did not start: {log.read_text()}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)


@contextmanager
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed; install chromium to run the browser tests")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield opened.new_context()  # one for all pages: the scripts are loaded once
        opened.close()


def new_page(opened: Any, width: int, height: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """A page and the list of what went wrong on it."""
    page = opened.new_page()
    page.set_default_navigation_timeout(120_000)  # ms: a busy machine
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=scheme)
    wrong: list[str] = []

    def said(message: Any) -> None:
        # Streamlit looks for its server below the page's own address first, by design.
        probe = re.search(r"/[a-z]+/_stcore/(health|host-config)$", message.location.get("url", ""))
        if message.type == "error" and not probe:
            wrong.append(f"{message.text} {message.location}")

    page.on("console", said)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    return page, wrong


def fits_width(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
