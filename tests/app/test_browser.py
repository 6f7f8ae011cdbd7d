"""The app in a real browser, page by page."""

from __future__ import annotations

from pathlib import Path

from app_driver import browser, fits_width, new_page, served


def test_app_in_a_browser(demo, tmp_path):
    made = demo.result["recommendation"]
    views = {"desktop": (1280, 5200, "light"), "phone": (390, 6800, "light")}
    views["dark"] = (1280, 5200, "dark")
    with browser() as opened, served(demo.workspace, tmp_path / "server.log") as url:
        for name, (width, height, scheme) in views.items():
            page, wrong = new_page(opened, width, height, scheme)
            page.goto(url)
            figures = page.locator(".js-plotly-plot .subplot.xy")
            page.get_by_text("Tuned minus base").wait_for(timeout=60_000)
            figures.nth(6).wait_for(state="attached", timeout=30_000)
            assert page.get_by_text(f"Verdict: {made['verdict']}").first.is_visible()
            assert page.get_by_text(f"workspace: {demo.workspace}").is_visible()
            assert page.locator("[data-testid='stException']").count() == 0
            assert fits_width(page), name
            dark = page.evaluate("getComputedStyle(document.querySelector('.stApp')).colorScheme")
            assert dark == scheme
            if name == "desktop":
                page.get_by_role("radio", name="either").click()
                page.get_by_text("this rule only stands beside it").wait_for()
                page.locator("[data-test-script-state='notRunning']").wait_for()
                below = page.get_by_test_id("stExpander").filter(has_text="Table of scores")
                below.get_by_text("Table of scores").click()
                with page.expect_download() as download:
                    # By keyboard: the figures above still settle, and a click that the button
                    # slides away from between press and release is none.
                    below.get_by_test_id("stDownloadButton").locator("button").press("Enter")
                lines = Path(download.value.path()).read_text().splitlines()
                assert lines[0].startswith("run,group,")
                assert len(lines) > 4
            page.wait_for_timeout(500)
            shot = tmp_path / f"app-{name}.png"
            page.screenshot(path=shot)
            assert shot.stat().st_size > 50_000
            assert page.locator("[data-testid='stException']").count() == 0
            assert wrong == []
            page.close()


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
