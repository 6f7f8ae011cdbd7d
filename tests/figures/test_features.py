"""Figures of one feature: bins, phases, trials."""

from __future__ import annotations

import numpy as np
import pytest

from resa_lens.figures.features import (
    activation_figure,
    densities_figure,
    phases_figure,
    trials_figure,
)

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


def test_trials_fire_or_are_silent_by_their_intervals():
    shares = {
        "injected": (30, 40, (0.6, 0.86)),
        "plain": (2, 40, (0.01, 0.17)),
        "shuffled": (11, 40, (0.16, 0.43)),
        "neutral": (0, 10, (0.0, 0.28)),
        "paraphrase": (5, 8, (0.3, 0.86)),
        "unknown <b>": (1, 1, (0.2, 1.0)),
    }
    fires, silent, unsure = trials_figure(shares, 0.5).data
    assert list(fires.y) == ["plain text, tags put in"]
    assert list(silent.y) == ["plain text, no tags", "other tags in their places"]
    assert list(unsure.y) == ["the prompt's words shuffled", "other prompts for the same"]
    assert list(unsure.x) == [27.5, 62.5]


def test_densities_stand_in_quarters_of_a_decade():
    bars = densities_figure(np.array([0.0, 0.011, 0.012, 0.15, 0.9, np.nan])).data[0]
    assert list(bars.y) == [2, 0, 0, 0, 1, 0, 0, 1]
    # Each bar covers its quarter and nothing else.
    assert bars.x[0] - bars.width[0] / 2 == pytest.approx(10**-2)
    assert bars.x[0] + bars.width[0] / 2 == pytest.approx(10**-1.75)
    assert bars.customdata[0] == "0.01 to 0.018"
    assert not list(densities_figure(np.zeros(3)).data[0].y)
    # However rarely it fires, a feature is in one of the bars.
    assert sum(densities_figure(np.array([1e-9, 1e-7, 0.5, 1.0])).data[0].y) == 4
