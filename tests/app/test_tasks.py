"""Twelve tasks of a researcher, each from the first page with at most three clicks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from app_driver import browser, new_page, served, state

from resa_lens.artifacts.listing import scan
from resa_lens.artifacts.notes import VARIABLE
from resa_lens.resources import data_path

SHIPPED = data_path("workspace")
MOST = 3
"""Clicks from the first page; a box that is clicked to type in it counts as one."""
LONG = 300_000  # ms


class Person:
    """A browser at the first page, and the clicks that were made in it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url, self.clicks = page, url, 0
        # A new person: streamlit keeps in the browser that the last one opened the side bar.
        page.add_init_script("localStorage.clear()")
        page.goto(url)
        self.sees("All runs")
        self.rests()

    @property
    def phone(self) -> bool:
        return self.page.viewport_size["width"] < 768

    def rests(self) -> None:
        self.page.wait_for_timeout(300)
        self.page.locator("[data-test-script-state='notRunning']").wait_for(timeout=LONG)

    def click(self, what: Any, **how: Any) -> None:
        self.clicks += 1
        what.click(**how)
        self.rests()

    def types(self, box: Any, text: str) -> None:
        self.click(box)
        box.fill(text)
        box.press("Enter")
        self.rests()

    def sees(self, text: str | re.Pattern[str]) -> Any:
        found = self.page.get_by_text(text).first
        found.wait_for(timeout=LONG)
        return found

    def goes(self, name: str) -> None:
        """By a link of the first page: on a phone the side bar is folded away."""
        self.click(self.page.get_by_test_id("stMain").get_by_role("link", name=name).first)

    def opens_first_row(self) -> None:
        # What is drawn below the table is there, so that nothing moves under the pointer.
        self.page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=LONG)
        table = self.page.locator("[data-testid=stDataFrame]:visible").first
        table.locator("canvas").first.wait_for(timeout=LONG)
        self.page.wait_for_timeout(500)
        self.click(table, position={"x": 12, "y": 52})
        self.sees("Link to this page")
        self.rests()


def layer_with_most_features(person: Person, workspace: Path) -> None:
    person.goes("Layers")
    person.sees(re.compile(r"Most features by rule \w+: [1-9]\d*, at layer \d+"))


def a_counted_feature_and_its_evidence(person: Person, workspace: Path) -> None:
    person.goes("Features")
    person.opens_first_row()
    person.sees("What it responds to")
    person.sees("Why: ")
    person.sees(re.compile("Counted by: "))


def features_on_my_prompt_and_one_switched_off(person: Person, workspace: Path) -> None:
    person.goes("Prompt lab")
    person.sees("What the model reads")
    person.rests()
    # The cursor is there.
    person.page.wait_for_function("document.activeElement.tagName === 'TEXTAREA'", timeout=LONG)
    person.page.keyboard.type("What is 8*7?")
    person.click(person.page.get_by_role("button", name="Generate"))
    person.sees("all layers:")
    person.rests()
    assert "8*7" in person.page.get_by_role("group", name="Tokens").inner_text()
    person.click(person.page.get_by_role("button", name="Switch off").first)
    person.sees(re.compile("Log-probability of the unchanged text"))


def did_a_layer_help(person: Person, workspace: Path) -> None:
    person.goes("Layers")
    person.click(person.page.get_by_role("radio", name="Tuned and inserted"))
    person.sees(re.compile(r"[+-]\d+\.\d \([+-]\d+\.\d to [+-]\d+\.\d\)|points \(95 %"))


def three_lost_answers(person: Person, workspace: Path) -> None:
    person.goes("Scores")
    lost = int(re.search(r"(\d+) lost", person.sees(re.compile(r"\d+ lost")).inner_text())[1])
    if lost:
        person.click(person.page.get_by_role("radio", name="lost"))
    person.sees("expected: ")
    person.rests()
    assert person.page.get_by_text("expected: ").count() >= min(3, lost)


def a_view_is_shared(person: Person, workspace: Path) -> None:
    person.goes("Features")
    person.opens_first_row()
    title = person.page.title()
    again, _ = new_page(person.page.context.browser, 1280, 900)
    again.goto(person.page.url)
    again.get_by_text("Link to this page").wait_for(timeout=LONG)
    assert again.title() == title
    again.close()


def downloaded(person: Person, button: Any) -> tuple[str, bytes]:
    person.clicks += 1
    with person.page.expect_download() as got:
        button.press("Enter")  # a figure above it may still move it
    return got.value.suggested_filename, Path(got.value.path()).read_bytes()


def a_figure_is_saved(person: Person, workspace: Path) -> None:
    person.goes("Layers")
    person.rests()
    buttons = person.page.get_by_test_id("stDownloadButton")
    name, content = downloaded(person, buttons.get_by_role("button", name="HTML").first)
    assert name.endswith(".html")
    assert b"plotly" in content


def a_table_is_saved(person: Person, workspace: Path) -> None:
    person.goes("Features")
    person.sees("features match")
    person.rests()
    buttons = person.page.get_by_test_id("stDownloadButton")
    name, content = downloaded(person, buttons.get_by_role("button", name="Download as CSV").first)
    assert name.endswith(".csv")
    assert len(content.splitlines()) > 3


def another_workspace(person: Person, workspace: Path) -> None:
    other = workspace.parent / "other"
    other.mkdir(exist_ok=True)
    if person.phone:
        person.click(person.page.get_by_test_id("stExpandSidebarButton"))
    person.click(person.page.get_by_role("button", name="Open a folder"))
    person.types(person.page.get_by_role("textbox", name="Workspace"), str(other))
    person.sees(re.compile("opened here"))


def by_keyboard(person: Person, workspace: Path) -> None:
    def tab_to(script: str, wanted: str) -> None:
        for _ in range(80):
            person.page.keyboard.press("Tab")
            text = person.page.evaluate(f"document.activeElement.{script} || ''")
            if str(text).strip().endswith(wanted):
                return
        pytest.fail(f"Tab does not reach {wanted!r}")

    tab_to("innerText", "Features")
    person.page.keyboard.press("Enter")
    person.sees("features match")
    person.rests()
    tab_to("placeholder", "5:62 or 6th:62")
    person.page.keyboard.type("5:100")
    person.page.keyboard.press("Enter")
    person.sees("Link to this page")
    assert person.clicks == 0


def search_by_label(person: Person, workspace: Path) -> None:
    person.goes("Features")
    person.types(person.page.get_by_role("textbox", name="Find in tokens"), "zebra")
    # A table's cells are drawn on a canvas; its text stands beside it for screen readers.
    tables = person.page.locator("[data-testid=stDataFrame]:visible")
    tables.filter(has_text="zebra crossing").first.wait_for(timeout=LONG)


def across_seeds(person: Person, workspace: Path) -> None:
    person.goes("Features")
    person.opens_first_row()
    person.sees(re.compile("SAE of another seed|in an SAE of another seed|another seed"))


def the_papers_data(person: Person, workspace: Path) -> None:
    person.goes("Layers")
    person.click(person.page.get_by_role("radio", name="The paper"))
    person.sees(re.compile("The paper's"))


TASKS: tuple[Callable[[Person, Path], None], ...] = (
    layer_with_most_features, a_counted_feature_and_its_evidence,
    features_on_my_prompt_and_one_switched_off, did_a_layer_help, three_lost_answers,
    a_view_is_shared, a_figure_is_saved, a_table_is_saved, another_workspace, by_keyboard,
    search_by_label, across_seeds, the_papers_data,
)  # fmt: skip
"""Saving is two of the thirteen, a figure and a table."""
SCREENS = {"desk": (1280, 900, "light"), "phone": (390, 844, "dark")}


def labelled(workspace: Path, file: Path) -> Path:
    """A file with a label of one counted feature."""
    from resa_lens.app.features.data import sources

    source = sources(scan(str(workspace)))[0]
    file.write_text(
        "saes,layer,feature,label,note,tags\n" + f"{source.notes_key},5,100,zebra crossing,,\n"
    )
    return file


RECORDED = [
    pytest.param(which, screen, marks=pytest.mark.recorded, id=f"{which}-{screen}")
    for which, screen in (("shipped", "phone"), ("demo", "desk"), ("demo", "phone"))
]


@pytest.mark.parametrize(
    ("which", "screen"),
    [pytest.param("shipped", "desk", marks=pytest.mark.slow, id="shipped-desk"), *RECORDED],
)
def test_each_task_takes_at_most_three_clicks(which, screen, request, tmp_path, monkeypatch):
    workspace = SHIPPED if which == "shipped" else request.getfixturevalue("demo").workspace
    monkeypatch.setenv(VARIABLE, str(labelled(workspace, tmp_path / "notes.csv")))
    link = tmp_path / "here"
    link.symlink_to(workspace)
    before, clicks = state(workspace), {}
    with browser() as opened, served(workspace, tmp_path / "server.log") as url:
        for task in TASKS:
            page, wrong = new_page(opened, *SCREENS[screen])
            person = Person(page, url)
            task(person, link)
            clicks[task.__name__] = person.clicks
            assert wrong == [], task.__name__
            page.close()
    print(json.dumps({which: clicks}))
    assert max(clicks.values()) <= MOST, clicks
    assert state(workspace) == before
