"""The pictures of the feature explorer in README and tutorial, taken anew.

    python benchmarks/app_pictures.py /home/ada

The shipped workspace is copied to HOME/resa-workspace, which the side bar of the pictures names.
Chromium takes them; look at them before they are committed.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

PICTURES = {
    "app-overview": ("", 1330, "How each result was made"),
    "app-feature": ("features?layer=7&feature=976", 1500, "Density by phase"),
    "app-layers": ("layers", 1500, "Table of counts"),
}
"""File, address, height in pixels, and a text that stands there once the page is whole."""


def main(home: Path, target: Path = ROOT / "docs" / "images") -> None:
    """Take the pictures."""
    from app_driver import browser, new_page, served

    from resa_lens.resources import data_path

    shutil.copytree(data_path("workspace"), home / "resa-workspace", dirs_exist_ok=True)
    with browser() as opened, served(None, home / "app.log", cwd=home) as url:
        for name, (address, height, last) in PICTURES.items():
            page, wrong = new_page(opened, 1280, height)
            page.goto(f"{url}/{address}")
            page.get_by_text(last).first.wait_for(timeout=120_000, state="attached")
            page.locator("[data-test-script-state='notRunning']").wait_for(timeout=120_000)
            page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=120_000)
            page.wait_for_timeout(3000)  # a figure is moved to its place after it is drawn
            page.screenshot(path=target / f"{name}.png")
            page.close()
            assert not wrong, wrong


if __name__ == "__main__":
    typer.run(main)
