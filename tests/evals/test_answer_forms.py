"""Right answers in every form are right, and near misses are wrong: drawn from seeds, by kind."""

from __future__ import annotations

from collections import Counter

import pytest
from answer_forms import near_misses, right_cases

from resa_lens.evals.grading import grade


def misjudged(cases):
    return [
        (case, verdict)
        for case in cases
        if (verdict := grade(case.text, case.gold, choice=case.choice)).correct != case.right
        or verdict.refused
    ]


@pytest.mark.parametrize("seed", range(4))
def test_right_answers_in_every_form(seed):
    assert misjudged(right_cases(seed)) == []


@pytest.mark.parametrize("seed", range(4))
def test_near_misses_are_wrong(seed):
    """More than 300 in all: sign, bound, unit, order, digit, option, and plain sentences."""
    assert misjudged(near_misses(seed)) == []


def test_there_are_enough_of_every_kind():
    wrong = Counter(case.kind for seed in range(4) for case in near_misses(seed))
    assert sum(wrong.values()) >= 300
    assert {"sign", "bound", "unit", "order", "digit", "option", "plain"} == set(wrong)
    assert min(wrong.values()) >= 30
    right = Counter(case.kind for seed in range(4) for case in right_cases(seed))
    assert len(right) >= 20
    assert right["plain"] >= 80
    assert right["option"] >= 100


@pytest.mark.recorded
def test_many_seeds():
    for seed in range(100, 200):
        assert misjudged(right_cases(seed)) == []
        assert misjudged(near_misses(seed)) == []
