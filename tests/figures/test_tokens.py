"""Tokens as HTML: shown as they are, whatever they hold."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser

import pytest
from app_driver import HOSTILE

from resa_lens.figures import tokens

BIDI, ZERO = "\u202eevil\u202c", "a\u200bb\u2060c\ufeff"
NASTY = (
    HOSTILE,
    "</span></div><script>alert(1)</script>",
    '"><svg/onload=alert(1)>',
    "$x^2$ `code` :material/home: &lt;b&gt;",
    "line\none\ttab\r\x00\x1b[31m",
    BIDI,
    ZERO,
    "שלום",
    "",
)


class _Page(HTMLParser):
    """What a browser makes of it: the tags, their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.text = ""
        self._style = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        self._style = tag == "style"

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        if not self._style:
            self.text += data


@pytest.mark.parametrize(
    "made",
    [
        lambda: tokens.coloured(NASTY, [1.0] * len(NASTY), phases=["think"] * len(NASTY), peak=0),
        lambda: tokens.chips(NASTY, [(-1.0) ** i for i in range(len(NASTY))]),
    ],
    ids=["coloured", "chips"],
)
def test_only_our_tags_and_attributes_come_out(made):
    page = _Page(made())
    assert set(page.tags) == {"style", "div", "span"}
    assert {name for held in page.attributes for name in held} <= {"class", "style", "title"}
    for held in page.attributes:
        # A style is made of our own names and numbers.
        assert re.fullmatch(r"[a-zA-Z0-9#:;.,() -]*", held.get("style") or "")
    for whole in (NASTY[0], NASTY[1], NASTY[2]):
        seen = page.text.replace("␣", " ")
        assert whole in seen


def test_text_stands_as_it_is():
    page = _Page(tokens.coloured(["a  b", "<think>", "\n", "&amp;"], [0, 1, 0, 0]))
    assert page.text == "a  b<think>↵\n&amp;"


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" maybe", "␣maybe"),
        ("\n\n", "↵↵"),
        ("\ta", "⇥a"),
        ("\x00", "[U+0000]"),
        (BIDI, "[U+202E]evil[U+202C]"),
        (ZERO, "a[U+200B]b[U+2060]c[U+FEFF]"),
        ("\u00a0", "[U+00A0]"),
        ("\u2028", "[U+2028]"),
        ("", "(empty)"),
        ("שלום", "שלום"),
    ],
)
def test_every_character_can_be_seen(token, shown):
    assert tokens.visible(token) == shown
    assert "\u202e" not in tokens.coloured([token], [1.0])
    assert "\u200b" not in tokens.coloured([token], [1.0])
    assert "\x00" not in tokens.coloured([token], [1.0])


def test_text_among_ours_keeps_its_spaces():
    assert tokens.plain("a b\n\u202ec\x07 **d**") == "a b\n[U+202E]c[U+0007] **d**"


def test_no_token_turns_its_neighbours_around():
    assert "unicode-bidi:isolate" in tokens.STYLE


def test_strength_phase_and_peak():
    made = tokens.coloured(
        ["a", "b", "c"], [0.0, 2.0, 4.0], phases=["prompt", "think", "answer"], peak=2
    )
    spans = re.findall(r'<span( class="peak")? title="([^"]*)" style="([^"]*)">', made)
    assert [bool(framed) for framed, _, _ in spans] == [False, False, True]
    assert [title for _, title, _ in spans] == ["a: 0, prompt", "b: 2, think", "c: 4, answer"]
    shades = [re.search(r"rgba\([\d, ]+,(0\.\d+)\)", style) for _, _, style in spans]
    assert shades[0] is None
    assert [float(found[1]) for found in shades[1:]] == [0.46, 0.80]
    patterns = [re.search(r"3px (\w+)", style)[1] for _, _, style in spans]
    assert len(set(patterns)) == 3
    # One scale for several texts: half of the strongest is half of the colour.
    alone = tokens.coloured(["b"], [2.0], most=4.0)
    assert ",0.46)" in alone


def test_chips_tell_what_is_raised_from_what_is_lowered():
    made = tokens.chips([" up", " down"], [3.0, -1.5])
    up, down = re.findall(r"rgba\((\d+, \d+, \d+),(0\.\d+)\)", made)
    assert up[0] != down[0]
    assert float(up[1]) > float(down[1])
    assert _Page(made).text.split() == ["␣up", "3.00", "␣down", "-1.50"]


def test_a_token_of_thousands_of_characters_leaves_room_for_the_rest():
    token = "<" * 5000
    for made in (tokens.coloured([token], [1.0]), tokens.chips([token], [1.0])):
        assert "[5,000 characters]" in _Page(made).text
        assert _Page(made).text.count("<") == tokens.LONGEST


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError):
        tokens.coloured(["a", "b"], [1.0])


def test_words_that_differ_are_coloured_and_stay_text() -> None:
    left, right = tokens.differing("2+2=4 <b>so</b> 5", "2+2=4 <b>so</b> 6")
    coloured = [re.findall(r'background:[^"]*">([^<]*)<', side) for side in (left, right)]
    assert coloured == [["5"], ["6"]]
    assert "<b>" not in left
    assert "&lt;b&gt;so&lt;/b&gt;" in left
    same, again = tokens.differing("a b", "a b")
    assert "background" not in same.split("</style>")[1]
    assert same == again


def test_long_texts_of_few_words_are_compared_at_once() -> None:
    # Sums are made of few words: difflib took 100 s of a page's time here.
    began = time.process_time()
    long = tokens.differing("x " * 10_000, "y " * 10_000)[0]
    assert long.count("<span") == tokens.COMPARED
    assert time.process_time() - began < 2
