"""How often the insertion test's verdict is wrong, where the true change of accuracy is known.

    python -m benchmarks.insertion_verdicts              draws 100 to 1099 of each row, a minute

Answers without the SAE and with it are drawn question by question: a share of them flips, and the
true change is the share that is gained less the share that is lost.  Of no change "the teacher
carries a gain" is a false alarm, and so is "costs"; of a gain of ten points the test should say so.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np

from resa_lens.evals.insertion import insertion_verdict
from resa_lens.stats import compare_paired, wilson_interval

ROWS = [
    (n, flips, change)
    for n in (200, 500)
    for flips in (0.05, 0.15, 0.3)
    for change in (-0.1, 0.0, 0.05, 0.1)
    if abs(change) <= flips
]
"""Questions, share of answers that flip, true change of accuracy."""
ACCURACY = 0.5


def verdicts(n: int, flips: float, change: float, draws: range) -> Counter[str]:
    """Return how often each verdict is said.

    Args:
        n: questions.
        flips: share of questions whose answer changes sides.
        change: true change of accuracy, at most `flips`.
        draws: seeds.
    """
    counts: Counter[str] = Counter()
    gained, lost = (flips + change) / 2, (flips - change) / 2
    for seed in draws:
        rng = np.random.default_rng(seed)
        before = rng.random(n) < ACCURACY
        # Of the wrong ones a share is gained, of the right ones a share is lost.
        flip = rng.random(n) < np.where(before, lost / ACCURACY, gained / (1 - ACCURACY))
        pair = compare_paired(before.astype(float), (before ^ flip).astype(float))
        counts[insertion_verdict(pair.ci, one_model=False)] += 1
    return counts


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, nargs=2, default=(100, 1100))
    draws = range(*parser.parse_args().draws)
    words = ("the teacher carries a gain", "costs", "nothing to learn", "undetermined")
    print(f"| questions | flips | true change | {' | '.join(words)} |")
    print("|---" * (len(words) + 3) + "|")
    for n, flips, change in ROWS:
        counts = verdicts(n, flips, change, draws)
        cells = []
        for word in words:
            low, high = wilson_interval(counts[word], len(draws))
            cells.append(
                f"{100 * counts[word] / len(draws):.1f} ({100 * low:.1f} to {100 * high:.1f})"
                if counts[word] else ""
            )  # fmt: skip
        print(f"| {n} | {100 * flips:.0f} % | {100 * change:+.0f} points | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
