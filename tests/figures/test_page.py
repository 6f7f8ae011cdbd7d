"""The page: self-contained, escaped, with the verdict; and the progress notes."""

from __future__ import annotations

import errno
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.figures import page as report
from resa_lens.figures import plots
from resa_lens.progress import ConsoleReporter

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png>"


class Page(HTMLParser):
    """What a browser would load, and the text outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "data", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def page(demo: Any) -> Page:
    return Page((demo.workspace / "report.html").read_text())


def test_the_demos_page_loads_nothing(page: Page) -> None:
    assert page.loads == []
    assert not {"link", "iframe", "object", "embed", "img"} & set(page.tags)


def test_the_demos_page_holds_the_verdict_and_its_reason(demo: Any, page: Page) -> None:
    found = demo.result["recommendation"]
    assert demo.result["verdicts"]["all"] in page.text
    assert found["reason"] in page.text
    assert found["next_step"] in page.text
    assert "(0-based; " in page.text


def test_the_demos_page_holds_scores_with_n_and_interval(demo: Any, page: Page) -> None:
    base = demo.result["tune"]["base"]
    assert f"{100 * base['accuracy']:.1f} %" in page.text
    assert f"{100 * base['ci'][0]:.1f} to {100 * base['ci'][1]:.1f} %" in page.text
    if demo.result["tune"]["paired"]["changed"] == 0:
        assert "changed no answer" in page.text
    for place in (demo.result["tune"]["adapter"], *demo.result["tune"]["evals"]):
        assert place in page.text


def test_the_demos_page_says_what_the_features_respond_to(demo: Any, page: Page) -> None:
    assert demo.result["falsification"]["summary"]["reason"] in page.text
    assert f"{demo.result['activity']['documents']:,} documents" in page.text


def test_plotly_stands_in_the_page_once(demo: Any) -> None:
    text = (demo.workspace / "report.html").read_text()
    assert len(re.findall(r"\* plotly\.js v", text)) == 1
    assert text.count("Plotly.newPlot(") >= 4


def write(path: Path) -> str:
    figure = plots.scores_figure({HOSTILE: {HOSTILE: (0.5, (0.4, 0.6), 10)}})
    sections: list[report.Section] = [
        (HOSTILE, [HOSTILE, report.Verdict(HOSTILE, HOSTILE, False)]),
        ("table", [report.Table([HOSTILE], [[HOSTILE]]), figure]),
    ]
    report.write_page(path, HOSTILE, HOSTILE, sections)
    return path.read_text()


def test_hostile_text_is_shown_and_never_run(tmp_path: Path) -> None:
    text = write(tmp_path / "new" / "page.html")
    page = Page(text)
    assert HOSTILE not in text
    assert page.text.count(HOSTILE) == 9
    assert page.loads == []
    assert "<script>alert" not in text
    assert not list(tmp_path.rglob(".*"))


def test_only_a_supported_verdict_looks_supported(tmp_path: Path) -> None:
    for supported, kind in ((True, "verdict supported"), (False, "verdict")):
        section: report.Section = ("a", [report.Verdict("text", "why", supported)])
        report.write_page(tmp_path / "page.html", "t", "l", [section])
        assert f"<p class='{kind}'>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [(errno.ENOSPC, RunFailedError, "disk is full"), (errno.EACCES, BadInputError, "permission")],
)
def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception], says: str
) -> None:
    file = tmp_path / "page.html"
    file.write_text("old")

    def fail(self: Path, *args: Any, **options: Any) -> int:
        raise OSError(code, "no", str(self))

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(error, match=says):
        write(file)
    monkeypatch.undo()
    assert file.read_text() == "old"


def test_notes_go_to_stderr_in_one_piece(capsys: pytest.CaptureFixture[str]) -> None:
    long = "a path " + "/folder" * 60 + " [not markup]"
    ConsoleReporter().note(long)
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err == long + "\n"


def test_bar_without_a_terminal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleReporter().bar("working", 3) as advance:
        advance(1)
        advance(2)
    out = capsys.readouterr()
    assert (out.out, out.err) == ("", "working ...\n")


def test_verdicts_are_stacked_by_layer_in_either_numbering() -> None:
    verdicts = {4: {"token detector": 5, "survives": 1}, 2: {"prompt artefact": 3}}
    figure = plots.verdict_figure(verdicts, {2: 4, 4: 6}, one_based=True)
    bars = {bar.name: (tuple(bar.x), tuple(bar.y)) for bar in figure.data if bar.type == "bar"}
    assert bars["token detector"] == ((3, 5), (0, 5))
    assert bars["prompt artefact"] == ((3, 5), (3, 0))
    assert bars["survives"] == ((3, 5), (0, 1))
    assert set(bars) == {"token detector", "prompt artefact", "survives"}
    null = figure.data[-1]
    assert (tuple(null.x), tuple(null.y)) == ((3, 5), (4, 6))
    assert figure.layout.barmode == "stack"
    none = plots.verdict_figure({1: dict.fromkeys(bars, 0)})
    assert none.layout.annotations[0].text.startswith("no rule counts a feature")
