"""Tokens that are clicked: in examples, answers and the lab, with the model behind them."""

from __future__ import annotations

import re
import textwrap
import time
from urllib.parse import parse_qs

import pytest
from app_driver import HOSTILE, browser, clickable_markup, fits_width, new_page, served, texts
from streamlit.testing.v1 import AppTest

from resa_lens.app.lab import jobs
from resa_lens.jobs.children import Worker
from resa_lens.resources import data_path

BUNDLED = data_path("workspace")
FEATURE = {"layer": "5", "feature": "490"}


@pytest.fixture(scope="module")
def worker():
    """One for all: loading the model takes seconds."""
    process = Worker(jobs.WORKER)
    yield process
    process.close()


@pytest.fixture
def opened(open_page, monkeypatch, worker):
    def run(page: str, **query: str) -> AppTest:
        monkeypatch.setattr(jobs, "worker", lambda: worker)
        return open_page(BUNDLED, page, **query)

    return run


def settled(app: AppTest) -> AppTest:
    until = time.monotonic() + 300  # a busy machine loads torch in a minute
    while any(button.label == "Stop" for button in app.button) and time.monotonic() < until:
        time.sleep(0.05)
        app.run()
    assert not app.exception
    return app


def links_to_the_lab(app: AppTest) -> list[dict[str, list[str]]]:
    found = [link.proto for link in app.get("page_link") if link.proto.label == "Switch off"]
    return [parse_qs(proto.query_string) for proto in found]


def test_a_token_of_an_example_opens_its_document_and_what_fires_there(opened):
    app = opened("features", **FEATURE)
    assert 'class="example"' in clickable_markup(app, "examples-text")
    (run,) = {a for a in BUNDLED.glob("activity/*/*") if a.is_dir()}
    app.session_state["document-place"] = (str(run.relative_to(BUNDLED)), 0, 30)
    app = settled(app.run())
    jobs_held = app.session_state["lab-requests"]
    layer, token = jobs_held["document"], jobs_held["document-token"]
    count = len(layer.request["ids"])
    fired = sum(feature == 490 for feature in layer.result["features"])
    assert f"Document 0, whole: active at {fired} of {count} tokens" in texts(app)
    assert token.request["ids"] == layer.request["ids"][:31]
    markup = clickable_markup(app, "document-text")
    assert len(re.findall(r"<span[^>]* title=", markup)) == count
    assert "At token 30 " in texts(app)
    # In the lab the document's prompt is asked again, without the feature.
    ranked, found = token.result["features"], links_to_the_lab(app)
    assert [q["change"][0] for q in found] == [f"{r['layer']}:{r['feature']}" for r in ranked]
    assert {q["host"][0] for q in found} == {"tiny-reasoner"}
    assert all(q["raw"] == ["true"] and q["prompt"][0].endswith("<think>") for q in found)
    # Another feature's page opens by a button: a link to the page it stands on does nothing.
    row = ranked[0]
    app.button(key=f"document-{row['layer']}-{row['feature']}").click().run()
    assert f"Feature {row['feature']}, layer {row['layer']} " in app.subheader[0].value
    app.button(key="document-close").click().run()
    assert "whole: active at" not in texts(app)


def test_a_document_of_another_run_is_not_shown(opened):
    app = opened("features", **FEATURE)
    app.session_state["document-place"] = ("activity/gone", 0, 0)
    assert "whole: active at" not in texts(app.run())
    (run,) = {a for a in BUNDLED.glob("activity/*/*") if a.is_dir()}
    app.session_state["document-place"] = (str(run.relative_to(BUNDLED)), 10**6, 0)
    assert "has no document 1000000" in texts(app.run())


def test_an_answer_is_read_token_by_token(opened):
    app = opened("scores")
    ways = [button for button in app.button if str(button.label).startswith("Features at the tok")]
    app = settled(ways[0].click().run())
    document = app.session_state["lab-requests"]["answer"].result["document"]
    assert len(re.findall(r"<span[^>]* title=", clickable_markup(app, "answer-text"))) == len(
        document["ids"]
    )
    assert any("Click a token" in caption.value for caption in app.caption)
    app.session_state["answer-place"] = 12
    app = settled(app.run())
    assert "At token 12 " in texts(app)
    found = links_to_the_lab(app)
    ranked = app.session_state["lab-requests"]["answer-token"].result["features"]
    assert [q["change"][0] for q in found] == [f"{r['layer']}:{r['feature']}" for r in ranked]
    assert found
    # The same button closes it.
    key = ways[0].key
    app = app.button(key=key).click().run()
    assert "At token 12 " not in texts(app)


SCRIPT = """
import streamlit as st
from resa_lens.app.tokens import clickable
from resa_lens.figures import tokens

words = {words!r}
markup = tokens.coloured(words, [1.0] * len(words), phases=["think"] * len(words), peak=1)
clickable(markup, "them", lambda number: st.session_state.update(number=number), "Words")
st.text(f"picked {{st.session_state.get('number')}}")
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_tokens_are_clicked_and_walked_through_in_a_browser(tmp_path, scheme, monkeypatch):
    monkeypatch.setenv("STREAMLIT_BROWSER_GATHER_USAGE_STATS", "false")
    words = ["plain", HOSTILE, "</span><script>alert(1)</script>", "$x^2$", "\u202eabc", "x" * 5000]
    script = tmp_path / "page.py"
    script.write_text(textwrap.dedent(SCRIPT.format(words=words)))
    with browser() as chromium, served(None, tmp_path / "log", script=script) as url:
        page, wrong = new_page(chromium, 390, 800, scheme)
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(url)
        group = page.get_by_role("group", name="Words")
        group.wait_for(timeout=60_000)
        tokens = group.get_by_role("button")
        assert tokens.count() == len(words)
        assert group.locator("img, script").count() == 0
        assert HOSTILE.split()[0] in tokens.nth(1).inner_text()
        tokens.nth(2).click()
        page.get_by_text("picked 2").wait_for(timeout=20_000)
        # One token is reached by Tab, the others by the arrows.
        assert group.locator("[tabindex='0']").count() == 1
        tokens.nth(2).focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        page.get_by_text("picked 3").wait_for(timeout=20_000)
        page.keyboard.press("ArrowDown")  # no farther than the last one
        page.keyboard.press(" ")
        page.get_by_text("picked 5").wait_for(timeout=20_000)
        assert fits_width(page)
        assert page.evaluate("document.body.scrollHeight") < 3000
        assert wrong == []
