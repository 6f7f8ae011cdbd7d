"""The app in a real browser: every page, on the shipped workspace and on a fresh demo's."""

from __future__ import annotations

import json
import re
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from app_driver import browser, fits_width, new_page, served, state
from typer.testing import CliRunner

from resa_lens.cli import app
from resa_lens.resources import data_path

SHIPPED = data_path("workspace")
COMPLETE = {
    "": "All runs",
    "layers": "What falsification leaves of the counts",
    "features": "features match",
    "lab": "What the model reads",
    "scores": "questions; 10 a page",
}
"""Of each page by its path: a text at its end."""


def settled(page: Any) -> None:
    """Wait until the script and the figures have come to rest."""
    page.wait_for_timeout(300)  # a click's own run begins
    page.locator("[data-test-script-state='notRunning']").wait_for(timeout=60_000)
    page.locator("[data-testid='stSkeleton']").first.wait_for(state="detached", timeout=60_000)


def open_at(page: Any, url: str, path: str, text: str) -> None:
    page.goto(f"{url}/{path}")
    page.get_by_text(text).first.wait_for(timeout=60_000)
    settled(page)


def walk_through(page: Any, name: str, text: str) -> None:
    """Go to a page by the side bar, as a person does."""
    page.get_by_test_id("stSidebarNav").get_by_text(name, exact=True).click()
    page.get_by_text(text).first.wait_for(timeout=60_000)
    settled(page)


def check(page: Any, wrong: list[str], shot: Path) -> None:
    """Nothing failed, nothing sticks out, and something was drawn."""
    assert page.locator("[data-testid='stException']").count() == 0
    assert "Traceback" not in page.content()
    assert fits_width(page), shot.stem
    page.screenshot(path=shot)
    assert shot.stat().st_size > 20_000
    assert wrong == []


@pytest.mark.slow
def test_every_page_of_the_shipped_workspace(tmp_path):
    """Opened without a workspace, from an empty folder: on a desk, and on a phone in the dark."""
    before = state(SHIPPED)
    empty = tmp_path / "empty"
    empty.mkdir()
    with browser() as opened, served(None, tmp_path / "server.log", cwd=empty) as url:
        for name, (width, height, scheme) in {
            "desk": (1280, 2400, "light"),
            "phone": (390, 2600, "dark"),
        }.items():
            page, wrong = new_page(opened, width, height, scheme)
            for path, text in COMPLETE.items():
                open_at(page, url, path, text)
                dark = page.evaluate(
                    "getComputedStyle(document.querySelector('.stApp')).colorScheme"
                )
                assert dark == scheme
                check(page, wrong, tmp_path / f"{name}-{path or 'overview'}.png")
            page.close()
    assert state(SHIPPED) == before
    assert list(empty.iterdir()) == []


@pytest.mark.slow
def test_every_page_of_a_fresh_demo_and_what_a_person_does_there(demo, tmp_path):
    made = demo.result["recommendation"]
    before = state(demo.workspace)
    with browser() as opened, served(demo.workspace, tmp_path / "server.log") as url:
        page, wrong = new_page(opened, 1280, 2400)
        open_at(page, url, "", COMPLETE[""])
        assert page.get_by_text(f"workspace: {demo.workspace}").is_visible()
        check(page, wrong, tmp_path / "overview.png")
        # A square of the graph, then the page that shows it.
        box = page.locator(".js-plotly-plot .points path").nth(2).bounding_box()
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_url(re.compile("artifact="), timeout=20_000)
        page.get_by_text("Made from").first.wait_for()
        walk_through(page, "Layers", f"Verdict: {made['verdict']}")
        page.get_by_role("radio", name="either").click()
        page.get_by_text("this rule only stands beside it").wait_for()
        check(page, wrong, tmp_path / "layers.png")
        walk_through(page, "Features", COMPLETE["features"])
        check(page, wrong, tmp_path / "features.png")
        walk_through(page, "Scores", COMPLETE["scores"])
        check(page, wrong, tmp_path / "scores.png")
        walk_through(page, "Prompt lab", COMPLETE["lab"])
        check(page, wrong, tmp_path / "lab.png")
    assert state(demo.workspace) == before


@pytest.mark.recorded
def test_a_feature_is_found_tried_and_switched_off(tmp_path):
    before = state(SHIPPED)
    with browser() as opened, served(SHIPPED, tmp_path / "server.log") as url:
        page, wrong = new_page(opened, 1280, 2400)
        open_at(page, url, "", COMPLETE[""])
        walk_through(page, "Features", COMPLETE["features"])
        # The box of the table's first row: it is drawn on a canvas.
        page.get_by_test_id("stDataFrame").first.click(position={"x": 12, "y": 52})
        page.get_by_text("Link to this page").wait_for(timeout=30_000)
        settled(page)
        assert re.search(r"layer=\d+&feature=\d+|feature=\d+&layer=\d+", page.url)
        assert re.fullmatch(r"feature \d+ · tiny-reasoner · layer \d+ · resa-lens", page.title())
        # What it responds to is read without scrolling.
        first = page.locator(".example").first.bounding_box()
        assert first["y"] + first["height"] < 800
        check(page, wrong, tmp_path / "feature.png")
        page.get_by_role("link", name="Try it in the prompt lab").click()
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("all layers:").wait_for(timeout=300_000)
        assert page.get_by_text("Answer: ").first.is_visible()
        place = page.url
        layer, feature = (re.search(rf"{key}=(\d+)", place)[1] for key in ("layer", "feature"))
        page.get_by_placeholder("5:978, 5:490").fill(f"{layer}:{feature}")
        page.keyboard.press("Enter")
        settled(page)
        page.get_by_role("button", name="Compare", exact=True).click()
        page.get_by_text("Log-probability").first.wait_for(timeout=60_000)
        settled(page)
        check(page, wrong, tmp_path / "changed.png")
        # A long command runs here, says how far it is, and can be stopped.
        page.get_by_role("button", name="Run it here").click()
        page.get_by_text("arm plain").first.wait_for(timeout=300_000)
        page.get_by_test_id("stMainBlockContainer").get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").first.wait_for(timeout=30_000)
        # Another feature that is active there has a page too.
        page.get_by_role("link", name=re.compile(r"^\d+:\d+$")).first.click()
        page.get_by_text("Link to this page").wait_for(timeout=30_000)
    assert state(SHIPPED) == before


@pytest.mark.recorded
def test_figures_and_tables_are_saved_and_the_address_opens_the_same_view(tmp_path):
    with browser() as opened, served(SHIPPED, tmp_path / "server.log") as url:
        page, wrong = new_page(opened, 1280, 1400)
        open_at(page, url, "layers", COMPLETE["layers"])

        def download(click: Any) -> tuple[str, bytes]:
            with page.expect_download() as got:
                click()
            return got.value.suggested_filename, Path(got.value.path()).read_bytes()

        figure = page.locator(".js-plotly-plot").first
        camera = figure.locator(".modebar-btn[data-title*='Download plot']")

        def press() -> None:
            figure.scroll_into_view_if_needed()
            figure.hover()
            camera.click()

        name, content = download(press)
        assert name.endswith(".png")
        assert content.startswith(b"\x89PNG")
        page.get_by_test_id("stSidebar").get_by_text("SVG", exact=True).click()
        settled(page)
        name, content = download(press)
        assert name.endswith(".svg")
        assert b"<svg" in content[:200]
        # Downloads by keyboard: a click that the button slides away from, while the figures above
        # it still settle, is none.
        html = page.get_by_test_id("stDownloadButton").get_by_role("button", name="HTML").first
        name, content = download(lambda: html.press("Enter"))
        assert name.endswith(".html")
        assert b"plotly" in content
        assert len(content) > 1_000_000
        csv = page.get_by_test_id("stExpander").filter(has_text="Table of counts")
        csv.get_by_text("Table of counts").click()
        button = csv.get_by_test_id("stDownloadButton").locator("button")
        name, content = download(lambda: button.press("Enter"))
        assert content.decode().startswith("layer,layer_1_indexed,")

        # The same view again: numbering and a filter stand in the address.
        page.get_by_test_id("stSidebar").get_by_text("Count layers from 1").click()
        page.wait_for_url(re.compile("one_based=true"))
        walk_through(page, "Scores", COMPLETE["scores"])
        page.get_by_role("radio", name="lost").click()
        lost = page.get_by_text(re.compile(r"^(?!500)\d+ of 500 questions"))
        lost.wait_for()
        page.wait_for_url(re.compile("flips=lost"))
        said, address = lost.inner_text(), page.url
        assert "one_based=true" in address
        again, also_wrong = new_page(opened, 1280, 1400)
        again.goto(address)
        again.get_by_text(said).wait_for(timeout=60_000)
        assert [*wrong, *also_wrong] == []


@pytest.mark.slow
def test_the_app_is_used_by_keyboard(tmp_path):
    """Tab reaches the pages and the widgets, Enter and space act."""
    with browser() as opened, served(SHIPPED, tmp_path / "server.log") as url:
        page, _ = new_page(opened, 1280, 1200)
        open_at(page, url, "", COMPLETE[""])

        def focused(script: str) -> str:
            return str(page.evaluate(f"document.activeElement.{script} || ''"))

        def tab_to(script: str, wanted: str) -> None:
            for _ in range(60):
                page.keyboard.press("Tab")
                if focused(script).strip().endswith(wanted):
                    return
            pytest.fail(f"Tab does not reach {wanted!r}")

        tab_to("innerText", "Layers")
        page.keyboard.press("Enter")
        page.get_by_text("By layer").first.wait_for(timeout=60_000)
        assert "/layers" in page.url
        settled(page)
        tab_to("ariaLabel", "Count layers from 1")
        page.keyboard.press("Space")
        page.wait_for_url(re.compile("one_based=true"), timeout=20_000)


@pytest.mark.slow
def test_the_first_page_is_quick(tmp_path):
    """From the start of the process to the answers; the target is 3 s on two quiet cores.

    CPU seconds of the server are asserted, for machines are busy; seconds of waiting are printed,
    and docs/log.md has them as measured on a quiet one.
    """
    with browser() as opened:
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        with served(SHIPPED, tmp_path / "server.log") as url:
            started = time.monotonic()
            page, _ = new_page(opened, 1280, 1200)
            page.goto(url)
            page.get_by_text("Tuned minus untuned").wait_for(timeout=60_000)
            print(json.dumps({"server": started - began, "page": time.monotonic() - started}))
            again, _ = new_page(opened, 1280, 1200)
            began = time.monotonic()
            again.goto(url)
            again.get_by_text("Tuned minus untuned").wait_for(timeout=60_000)
            print(json.dumps({"again": time.monotonic() - began}))
        # The server has ended; the browser has not.
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime
        print(json.dumps({"CPU": used}))
        assert 0 < used < 6


def test_report_in_a_browser(demo, tmp_path):
    with browser() as opened:
        for width in (1100, 390):
            page, wrong = new_page(opened, width, 900)
            page.goto(Path(demo.workspace, "report.html").as_uri())
            page.locator(".js-plotly-plot .subplot.xy").nth(3).wait_for(state="attached")
            assert page.get_by_text(demo.result["recommendation"]["verdict"]).first.is_visible()
            assert fits_width(page)
            shot = tmp_path / f"report-{width}.png"
            page.screenshot(path=shot, full_page=True)
            assert shot.stat().st_size > 50_000
            assert wrong == []
            page.close()


@pytest.mark.slow
def test_a_tables_page_survives_a_feature_and_the_browsers_back(tmp_path):
    with browser() as opened, served(SHIPPED, tmp_path / "server.log") as url:
        page, wrong = new_page(opened, 1280, 800)
        open_at(page, url, "features?rule=every+feature", "rows 1 to 200 of")
        page.get_by_label("Page 2", exact=True).click()
        page.get_by_text("rows 201 to 400 of").wait_for(timeout=60_000)
        settled(page)
        assert "page=2" in page.url
        page.get_by_test_id("stDataFrame").first.click(position={"x": 12, "y": 52})
        page.get_by_text("Neighbours and counterparts").wait_for(timeout=60_000)
        settled(page)
        # What streamlit drops from the address when the filters leave the page is a step, too.
        for _ in range(2):
            page.go_back()
            page.wait_for_timeout(1000)
            settled(page)
        page.get_by_text("rows 201 to 400 of").wait_for(timeout=60_000)
        # And a filter begins anew.
        page.get_by_test_id("stExpander").first.click()
        page.get_by_text("In reverse").click()
        page.get_by_text("rows 1 to 200 of").wait_for(timeout=60_000)
        page.wait_for_url(re.compile(r"^(?!.*page=2)"), timeout=20_000)
        assert wrong == []


@pytest.mark.slow
def test_the_experts_of_a_mixture_on_a_desk_and_on_a_phone(tmp_path):
    place = tmp_path / "workspace"
    words = ["--model", "tiny-moe-reasoner", "--text-tokens", "5000", "--workspace", str(place)]
    steer = ["--limit", "4", "--max-new-tokens", "24", "--answer-sets", "1", "--top", "2"]
    for done in (["measure"], ["rank", "--draws", "199"], ["steer", "--draws", "199", *steer]):
        invoked = CliRunner().invoke(app, ["experts", *done, *words, "--threads", "1"])
        assert invoked.exit_code == 0, invoked.stderr
    before = state(place)
    with browser() as opened, served(place, tmp_path / "server.log") as url:
        for name, size in {
            "desk": (1280, 2600, "light"), "phone": (390, 3000, "dark"),
        }.items():  # fmt: skip
            page, wrong = new_page(opened, *size)
            open_at(page, url, "experts", "Use of the experts")
            for title in ("Experts for a target", "Experts changed"):
                page.get_by_text(title).first.wait_for(timeout=60_000)
            settled(page)
            check(page, wrong, tmp_path / f"{name}-experts.png")
            # Another phase draws its own map.
            page.get_by_text("think", exact=True).first.click()
            page.wait_for_url(re.compile("place_of=think"), timeout=60_000)
            page.get_by_text("Share of tokens, think").first.wait_for(timeout=60_000)
            settled(page)
            check(page, wrong, tmp_path / f"{name}-experts-think.png")
            page.close()
    assert state(place) == before
