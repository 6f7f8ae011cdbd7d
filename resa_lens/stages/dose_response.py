"""Dose and response from the samples of an ablation's arms: no model, only statistics.

Questions are paired throughout.  Features are compared with strength 0, and with random features
at the same strength.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from resa_lens.errors import BadInputError
from resa_lens.stats import (
    clopper_pearson,
    compare_paired,
    difference_from_sets,
    paired_bootstrap,
    permutation_p_value,
    sign_flip_p_value,
)
from resa_lens.stats.resampling import student_interval

POWER = 1.959964 + 0.841621
"""Normal quantiles: a two-sided test at 5 % finds a difference of so many standard errors in 80 %
of runs."""

Rows = Sequence[Mapping[str, Any]]
"""Samples, as in `evals.run.SAMPLE_SCHEMA`."""


@dataclass(frozen=True)
class Outcome:
    """Measures of one arm, [question, sample], in the order of the ids."""

    ids: tuple[str, ...]
    correct: np.ndarray
    tokens: np.ndarray
    finished: np.ndarray


def outcome(rows: Rows) -> Outcome:
    """Return the measures of an arm's samples."""
    ordered = sorted(rows, key=lambda row: (row["id"], row["sample"]))
    samples = 1 + max(row["sample"] for row in ordered)

    def table(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in ordered]).reshape(-1, samples)

    ids = tuple(row["id"] for row in ordered[::samples])
    return Outcome(ids, table("correct"), table("tokens"), table("finished"))


def compare_shares(before: np.ndarray, after: np.ndarray, seed: int) -> dict[str, Any]:
    """Compare shares [question, sample] of two arms, with the difference that could be found."""
    found = compare_paired(before, after, seed)
    return {**asdict(found), "ci": list(found.ci), "detectable": detectable(before, after)}


def _lengths(before: np.ndarray, after: np.ndarray, seed: int) -> dict[str, Any]:
    change = after.mean(1) - before.mean(1)
    changed = int(np.count_nonzero(change))
    # With no change there is no spread to draw from.
    difference, ci = paired_bootstrap(before, after, seed=seed) if changed else (0.0, None)
    return {
        "difference": difference,
        "ci": None if ci is None else list(ci),
        "p_value": sign_flip_p_value(change, seed=seed),
        "changed": changed,
        "n": len(change),
    }


def detectable(before: np.ndarray, after: np.ndarray) -> float:
    """Return the paired difference that a run like this one finds in 80 % of runs, at 5 %.

    From the spread of the differences; where none differs, from the share of flips that could have
    been missed (Clopper and Pearson's upper bound).
    """
    change = after.mean(1) - before.mean(1)
    n = len(change)
    spread = float(change.std(ddof=1)) if n > 1 else 1.0
    return POWER * (spread or math.sqrt(clopper_pearson(0, n)[1])) / math.sqrt(n)


def dose_response(
    base: Rows,
    target: Mapping[float, Rows],
    controls: Mapping[float, Sequence[Rows]],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Compare every dose with the base, and with random features at the same dose.

    Questions are paired.  `beyond` compares the features with the mean of the random sets, question
    by question; its p-value and interval are over questions and over sets, which differ from each
    other too (`stats.difference_from_sets`; one set alone is taken as fixed).  `rank_p` is over the
    sets: (1 + sets whose effect is at least as large) / (1 + sets), so with 5 never below 1/6.

    Args:
        base: samples at strength 0.
        target: samples by strength.
        controls: samples of each random set, by strength; a strength may lack.
        seed: of the intervals.

    Returns:
        A row a strength.

    Raises:
        BadInputError: the arms answer different questions.
    """
    before = outcome(base)
    for arm in (*target.values(), *(one for drawn in controls.values() for one in drawn)):
        if outcome(arm).ids != before.ids:
            raise BadInputError("the arms answer different questions; score all on the same ones")
    rows = []
    for strength, samples in sorted(target.items()):
        after = outcome(samples)
        row: dict[str, Any] = {
            "strength": strength,
            "n": len(after.correct),
            "samples": after.correct.shape[1],
            "accuracy": float(after.correct.mean()),
            "effect": compare_shares(before.correct, after.correct, seed),
            "tokens": {
                "mean": float(after.tokens.mean()),
                **_lengths(before.tokens, after.tokens, seed),
            },
            "finished": {
                "share": float(after.finished.mean()),
                **compare_shares(before.finished, after.finished, seed),
            },
            "control": None,
        }
        if drawn := controls.get(strength):
            row["control"] = _against(before, after, [outcome(one) for one in drawn], seed)
        rows.append(row)
    return rows


def _beyond(
    every: np.ndarray, after: np.ndarray, drawn: Sequence[np.ndarray], seed: int
) -> dict[str, Any]:
    """Compare the features with all random sets [question, sample]."""
    found = compare_shares(every, after, seed)
    if len(drawn) < 2 or len(after) < 2 or not found["changed"]:
        return found
    against = difference_from_sets(after.mean(1), np.stack([one.mean(1) for one in drawn]))
    return {
        **found,
        "ci": list(student_interval(against.value, against.se, against.freedom)),
        "p_value": against.p_value,
        "note": "t over questions and random sets",
    }


def _against(
    before: Outcome, after: Outcome, drawn: Sequence[Outcome], seed: int
) -> dict[str, Any]:
    correct, tokens, finished = (
        np.concatenate([getattr(one, name) for one in drawn], axis=1)
        for name in ("correct", "tokens", "finished")
    )
    each = [float(one.correct.mean() - before.correct.mean()) for one in drawn]
    each_tokens = [float(one.tokens.mean() - before.tokens.mean()) for one in drawn]
    effect = float(after.correct.mean() - before.correct.mean())
    longer = float(after.tokens.mean() - before.tokens.mean())
    return {
        "sets": len(drawn),
        "effect": compare_shares(before.correct, correct, seed),
        "each": each,
        "beyond": _beyond(correct, after.correct, [one.correct for one in drawn], seed),
        "rank_p": permutation_p_value(abs(effect), np.abs(each)),
        "tokens": _lengths(before.tokens, tokens, seed),
        "each_tokens": each_tokens,
        "beyond_tokens": _lengths(tokens, after.tokens, seed),
        "rank_p_tokens": permutation_p_value(abs(longer), np.abs(each_tokens)),
        "finished": compare_shares(before.finished, finished, seed),
    }
