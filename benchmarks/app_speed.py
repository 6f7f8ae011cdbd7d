"""How long a person waits for the feature explorer, in a real browser.

    python benchmarks/app_speed.py                                first page, and clicks
    python benchmarks/app_speed.py --layers 3 --latents 2048       on a smaller synthetic workspace

First page: from the start of the process, with a browser that has never seen the app, to the
answers at its top, and to everything.  Clicks: on a synthetic activity run of 26 layers of 65,536
latents, from the click to a page at rest.  Medians of the rounds.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

ANSWERS, EVERYTHING, CLICK = 3.0, 4.0, 1.0
"""Targets in seconds: the first page's answers, all of it, and a click."""
MEMORY_MB = 500.0
"""Target of the server's memory at its peak, after the clicks."""
PEAK = "the server's memory at its peak"


def at_rest(page: Any) -> None:
    """Wait until the page's script has ended."""
    page.locator("[data-test-script-state='notRunning']").wait_for(timeout=60_000)


def peak_mb(url: str) -> float:
    """Return the largest memory of the process that serves an address, in MB; on Linux alone."""
    port = url.rpartition(":")[2].encode()
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (place / "cmdline").read_bytes().split(b"\0")
            if b"streamlit" in words and port in words:
                lines = (place / "status").read_text().splitlines()
                return next(int(line.split()[1]) for line in lines if line[:6] == "VmHWM:") / 1024
    raise RuntimeError(f"no process serves {url}")


def first_page(log: Path) -> dict[str, float]:
    """Start the app on the shipped workspace; seconds from there."""
    from app_driver import browser, new_page, served

    from resa_lens.resources import data_path

    found: dict[str, float] = {}
    with browser() as opened:
        page, _ = new_page(opened, 1280, 900)
        began = time.monotonic()
        with served(data_path("workspace"), log) as url:
            for name in ("cold", "warm"):
                page.goto(url)
                page.get_by_text("Tuned minus untuned").wait_for(timeout=60_000)
                found[f"first page, {name}: its answers"] = time.monotonic() - began
                page.get_by_text("All runs").first.wait_for(timeout=60_000)
                page.locator(".js-plotly-plot .points path").first.wait_for(timeout=60_000)
                at_rest(page)
                found[f"first page, {name}: everything"] = time.monotonic() - began
                page.close()
                page, _ = new_page(opened, 1280, 900)
                began = time.monotonic()
    return found


def clicks(workspace: Path, log: Path, layers: int) -> dict[str, float]:
    """Walk the features of a workspace; seconds from each click to a page at rest."""
    from app_driver import browser, new_page, served

    found: dict[str, float] = {}
    with browser() as opened, served(workspace, log) as url:
        page, _ = new_page(opened, 1280, 1000)
        page.goto(f"{url}/features")
        page.get_by_text("features match").wait_for(timeout=60_000)
        at_rest(page)
        page.wait_for_timeout(1000)

        def matches() -> str:
            return page.get_by_text("features match").inner_text()

        def timed(name: str, act: Callable[[], None], done: Callable[[], None]) -> None:
            began = time.monotonic()
            act()
            done()
            at_rest(page)
            found[name] = time.monotonic() - began
            page.wait_for_timeout(700)

        def changed(before: str) -> Callable[[], None]:
            script = (
                "before => [...document.querySelectorAll('[data-testid=stText]')].some("
                "e => e.innerText.includes('features match') && e.innerText !== before)"
            )
            return lambda: page.wait_for_function(script, arg=before, timeout=60_000)

        def choose(name: str, label: str, option: str) -> None:
            box = page.get_by_role("combobox", name=label).first
            box.click()
            box.fill(option)
            listed = page.get_by_role("option", name=option, exact=True)
            listed.wait_for()
            timed(name, listed.click, changed(matches()))

        def row() -> None:
            table = page.get_by_test_id("stDataFrame").first
            table.click(position={"x": 12, "y": 52})

        def feature_shown() -> None:
            page.get_by_text("Link to this page").wait_for(timeout=60_000)
            page.locator(".js-plotly-plot .subplot.xy").nth(1).wait_for(state="attached")

        def back() -> None:
            page.get_by_role("button", name="Back to the list").click()

        def listed() -> None:
            page.get_by_text("features match").wait_for(timeout=60_000)

        timed("a feature, the first of a session", row, feature_shown)
        timed("next feature", page.get_by_role("button", name="Next").click, feature_shown)
        timed("back to the list", back, listed)
        choose("filter: one layer", "Layer", str(layers - 1))
        choose("filter: not only counted ones", "Counted by rule", "every feature")
        choose("filter: dense in thoughts", "Where it fires", "twice as dense in thoughts")
        timed("a feature of the filtered list", row, feature_shown)
        timed("back to the filtered list", back, listed)
        find = page.get_by_role("textbox", name="Find in tokens")

        def search() -> None:
            find.fill("word39")
            find.press("Enter")

        timed("text search in one layer", search, changed(matches()))
        before = matches()
        find.fill("")
        find.press("Enter")
        changed(before)()
        at_rest(page)
        choose("all layers", "Layer", "all layers")
        choose("all features of all layers", "Where it fires", "every feature")
        timed("a feature of all of them", row, feature_shown)
        found[PEAK] = peak_mb(url)
    return found


def main(layers: int = 26, latents: int = 65_536, rounds: int = 3) -> None:
    """Time the first page and the clicks."""
    from synthetic_workspace import Size, write_workspace

    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        workspace = write_workspace(place / "workspace", Size(layers=layers, latents=latents))
        stored = sum(f.stat().st_size for f in workspace.rglob("*") if f.is_file()) / 1e6
        print(f"synthetic: {layers} layers x {latents} latents, {stored:.0f} MB; {rounds} rounds")
        for _ in range(rounds):
            found = {**first_page(place / "a.log"), **clicks(workspace, place / "b.log", layers)}
            for name, seconds in found.items():
                rows.setdefault(name, []).append(seconds)
    peak = max(rows.pop(PEAK))
    print(f"{PEAK:36} {peak:5.0f} MB {'' if peak <= MEMORY_MB else f'misses {MEMORY_MB:g} MB'}")
    for name, seconds in rows.items():
        target = CLICK
        if name.startswith("first page"):
            target = EVERYTHING if name.endswith("everything") else ANSWERS
        value = median(seconds)
        print(f"{name:36} {value:5.2f} s  {'' if value <= target else f'misses {target:g} s'}")


if __name__ == "__main__":
    typer.run(main)
