"""Figures of one feature: bins, phases, trials."""

from __future__ import annotations

import pytest

from resa_lens.figures.features import activation_figure, phases_figure, trials_figure

EDGES = [0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0]


def test_empty_bins_at_the_ends_are_left_out():
    bars = activation_figure(EDGES, [0, 0, 5, 0, 7, 0]).data[0]
    assert list(bars.y) == [0, 5, 0, 7, 0]
    assert bars.customdata[1] == "0.5 to 0.75"
    assert list(bars.x)[1] == 2.5
    figure = activation_figure(EDGES, [0, 0, 5, 0, 7, 0])
    # A tick stands at its edge: 0.5 begins the third bin.
    ticks = dict(zip(figure.layout.xaxis.tickvals, figure.layout.xaxis.ticktext, strict=True))
    assert ticks[2] == "0.5"
    assert ticks[4] == "1"


def test_a_feature_that_never_fired_has_a_figure():
    assert list(activation_figure(EDGES, [0] * 6).data[0].y) == [0, 0]


def test_only_the_whole_has_an_interval():
    shares = {"prompt": 0.01, "think": 0.5, "answer": 0.0}
    figure = phases_figure(shares, 0.2, (0.15, 0.26), 40)
    phases, whole = figure.data
    assert [pytest.approx(x) for x in phases.x] == [1.0, 50.0, 0.0]
    assert phases.error_x.array is None
    assert whole.error_x.array[0] == pytest.approx(6.0)
    assert whole.error_x.arrayminus[0] == pytest.approx(5.0)
    assert [text.split(",")[0] for text in (*phases.y, *whole.y)] == [
        "prompt", "think", "answer", "all",
    ]  # fmt: skip
    assert "40 documents" in figure.layout.title.subtitle.text


def test_trials_on_the_wrong_side_speak_against_it():
    wide = (0.0, 1.0)
    shares = {
        "injected": (30, 40, wide),
        "plain": (2, 40, wide),
        "shuffled": (10, 20, wide),
        "neutral": (0, 10, wide),
        "paraphrase": (3, 8, wide),
        "unknown <b>": (1, 1, wide),
    }
    good, bad = trials_figure(shares, 0.5).data
    assert list(good.y) == ["plain text, no tags", "other tags in their places"]
    # At the border it fires; at other prompts for the same it should.
    assert list(bad.y) == [
        "plain text, tags put in", "the prompt's words shuffled", "other prompts for the same",
    ]  # fmt: skip
    assert list(bad.x) == [75.0, 50.0, 37.5]
