"""The error rates of the verdicts: those that ship are those of a battery that can be run again."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks import falsification_battery as battery
from resa_lens.features.battery import error_rates, in_words
from resa_lens.features.config import FalsifyConfig
from resa_lens.features.words import SILENT, STANDS, VERDICTS, WORDS


@pytest.fixture(scope="module")
def draw(tiny):
    """The first draw of those that the figures are of."""
    return battery.verdicts_of(tiny, battery.REPORT[0])


def test_the_first_draw_comes_out_as_it_is_stored(draw):
    assert [list(row) for row in draw] == error_rates()["first_draw"]


def test_the_figures_are_of_the_settings_that_verdicts_have():
    rates, settings = error_rates(), FalsifyConfig()
    assert rates["settings"] == {
        "texts": settings.texts, "shuffles": settings.shuffles, "fires": settings.fires,
        "silent": SILENT,
    }  # fmt: skip
    assert rates["draws"] == [100, 199]
    # The bounds were set on other draws.
    assert set(battery.TUNING).isdisjoint(battery.REPORT)
    assert set(rates["kinds"]) == set(battery.KINDS)
    assert sum(kind["true"] for kind in rates["kinds"].values()) >= 8
    assert sum(not kind["true"] for kind in rates["kinds"].values()) >= 8 + len(battery.RATES)


def test_the_rates_are_those_of_the_confusion_matrix():
    rates = error_rates()
    stand = {
        name: sum(n for word, n in kind["verdicts"].items() if WORDS[word].group == STANDS)
        for name, kind in rates["kinds"].items()
    }
    false = [n for n, k in rates["kinds"].items() if not k["true"] and n not in battery.NOISY]
    assert rates["false_survivals"]["errors"] == sum(stand[name] for name in false)
    assert rates["noisy_survivals"]["errors"] == sum(stand[name] for name in battery.NOISY)
    for kind in rates["kinds"].values():
        assert sum(kind["verdicts"].values()) == kind["n"] == 400
        assert set(kind["verdicts"]) <= set(VERDICTS)


def test_the_rates_meet_their_targets():
    rates = error_rates()
    assert {name for name, most in battery.TARGETS.items() if rates[name]["ci"][1] > most} == set()
    for rate in rates["noisy_by_rate"].values():
        assert rate["share"] <= 0.05
    assert f"{rates['false_kills']['errors']} of {rates['false_kills']['n']}" in in_words()


def test_one_draw_has_every_kind_four_times(draw):
    assert set(Counter(name for name, _ in draw).values()) == {4}
    report = battery.report(draw)
    assert report["false_kills"]["n"] == 4 * sum(kind.true for kind in battery.KINDS.values())
    assert report["false_kills"]["errors"] == 0
    assert report["noisy_survivals"]["errors"] == 0
