"""How often contrast scores call features that know nothing of reasoning, and find planted ones.

    python -m benchmarks.contrast_nulls calibration [--seeds 100 120] [--features 50]
    python -m benchmarks.contrast_nulls ceiling [--seeds 100 110]
    python -m benchmarks.contrast_nulls speed

Documents are drawn with a prompt, thoughts and an answer of several lengths.  Seven kinds of null
features and five planted ones are scored by the product's nulls and by the former ones (labels
rotated within documents; labels shuffled over documents).  The statistic and the number of draws
were chosen on seeds below 100; rates are reported on seeds from 100 on.  `ceiling` says what power
there is to be had: that of the efficient score test of known variance on what positions and
documents leave of the labels, which no test that holds both fixed can exceed by more than chance.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.stats import norm

from resa_lens.features.contrast_nulls import split_labels
from resa_lens.features.evidence import Evidence
from resa_lens.features.scores import CONTRASTS, SCORES
from resa_lens.stats import (
    Floats,
    TailCounts,
    circular_shifts,
    clopper_pearson,
    permutation_draws,
    positions_of,
)

LEVEL = 0.05
LAYOUTS = ("short", "tied", "long", "apart")
"""short: 100 documents whose parts' lengths are independent; tied: 60, where long prompts have long
thoughts; long: 60, whose thoughts are cut at 256 tokens; apart: 100 documents, half of them with
thoughts that make them longer (design documents)."""


@dataclass(frozen=True)
class Text:
    """Documents without activations."""

    lengths: np.ndarray
    reasoning: np.ndarray
    """[token], bool."""

    @property
    def document(self) -> np.ndarray:
        """Of each token."""
        return np.repeat(np.arange(self.lengths.size), self.lengths)

    def evidence(self, acts: np.ndarray) -> Evidence:
        """Return the evidence of activations [feature, token]; silent features are left out."""
        active = np.flatnonzero((acts > 0).any(axis=1))
        return Evidence(
            active, sparse.csr_array(acts[active]), self.reasoning, self.lengths, len(acts)
        )


def draw_text(layout: str, rng: np.random.Generator) -> Text:
    """Draw documents of a layout."""
    count = 60 if layout in ("tied", "long") else 100
    prompt, thought = rng.integers(12, 40, count), rng.integers(10, 60, count)
    answer = rng.integers(3, 8, count)
    if layout == "tied":
        thought = np.maximum(3, (prompt * rng.uniform(0.5, 2.5, count)).astype(int))
    if layout == "long":
        prompt, thought = rng.integers(20, 80, count), rng.integers(60, 400, count)
    if layout == "apart":
        thought[::2] = 0
    parts = [
        np.repeat([False, True, False], sizes)[:256]
        for sizes in zip(prompt, thought, answer, strict=True)
    ]
    if layout == "apart":
        parts = [np.full(part.size, i % 2 == 1) for i, part in enumerate(parts)]
    return Text(np.array([part.size for part in parts]), np.concatenate(parts))


Plant = Callable[[Text, np.random.Generator], np.ndarray]


def _token(text: Text, rng: np.random.Generator) -> np.ndarray:
    """A token type of any frequency, the same everywhere."""
    return rng.random(text.reasoning.size) < 10 ** rng.uniform(-2.5, -0.7)


def _fixed(text: Text, rng: np.random.Generator) -> np.ndarray:
    """One to four positions of most documents."""
    at = np.isin(positions_of(text.lengths), rng.integers(3, 60, rng.integers(1, 5)))
    return at & (rng.random(text.lengths.size) < rng.uniform(0.5, 0.95))[text.document]


def _burst(text: Text, rng: np.random.Generator) -> np.ndarray:
    """Runs of 4 to 15 tokens that begin anywhere, at the same rate."""
    width, at = rng.integers(4, 16), positions_of(text.lengths)
    begins = rng.random(at.size) < rng.uniform(0.002, 0.02)
    # Tokens since the last beginning in the same document.
    last = np.maximum.accumulate(np.where(begins, np.arange(at.size), -1))
    since = np.arange(at.size) - last
    return (last >= 0) & (since <= at) & (since < width)


def _document(text: Text, rng: np.random.Generator) -> np.ndarray:
    """Four tokens of ten, in some documents only."""
    some = rng.random(text.lengths.size) < rng.uniform(0.1, 0.6)
    return (rng.random(text.reasoning.size) < 0.4) & some[text.document]


def _thoughtful(text: Text, rng: np.random.Generator) -> np.ndarray:
    """Four tokens of ten, mostly in documents with many thoughts; in all their phases alike."""
    share = np.bincount(text.document, text.reasoning) / text.lengths
    some = rng.random(text.lengths.size) < np.where(share > np.median(share), 0.8, 0.1)
    return (rng.random(text.reasoning.size) < 0.4) & some[text.document]


def _drift(text: Text, rng: np.random.Generator) -> np.ndarray:
    """The rate rises, or falls, with the position."""
    share = positions_of(text.lengths) / text.lengths.max()
    return rng.random(share.size) < 0.3 * (share if rng.random() < 0.5 else 1 - share)


def _rare(text: Text, rng: np.random.Generator) -> np.ndarray:
    """Six to eleven tokens in all."""
    return np.isin(
        np.arange(text.reasoning.size),
        rng.choice(text.reasoning.size, rng.integers(6, 12), replace=False),
    )


def _rates(inside: float, outside: float) -> Plant:
    def plant(text: Text, rng: np.random.Generator) -> np.ndarray:
        return rng.random(text.reasoning.size) < np.where(text.reasoning, inside, outside)

    return plant


def _run_of_thoughts(text: Text, rng: np.random.Generator) -> np.ndarray:
    """Five tokens of the thoughts of a third of the documents."""
    fires = np.zeros(text.reasoning.size, dtype=bool)
    for document in rng.permutation(text.lengths.size)[: text.lengths.size // 3]:
        inside = np.flatnonzero((text.document == document) & text.reasoning)
        if inside.size:
            begins = rng.integers(0, max(1, inside.size - 5))
            fires[inside[begins : begins + 5]] = True
    return fires


NULL: dict[str, Plant] = {
    "token type": _token,
    "fixed positions": _fixed,
    "bursts": _burst,
    "some documents": _document,
    "documents that think much": _thoughtful,
    "drift": _drift,
    "rare": _rare,
}
RATES = {
    "20 % in thoughts, 4 % elsewhere": (0.20, 0.04),
    "6 %, 2 %": (0.06, 0.02),
    "3 %, 1.5 %": (0.03, 0.015),
    "1 %, 4 %": (0.01, 0.04),
}
"""Of firing, in thoughts and elsewhere."""
PLANTED: dict[str, Plant] = {
    **{title: _rates(*pair) for title, pair in RATES.items()},
    "runs in a third of the documents": _run_of_thoughts,
}


def kinds_of(layout: str) -> dict[str, Plant]:
    """Return the kinds that mean something in a layout."""
    every = {**NULL, **PLANTED}
    if layout == "apart":
        # Whole documents are the groups: what follows the documents that think follows the label.
        del every["documents that think much"]
    return every


def plant(kind: Plant, text: Text, features: int, rng: np.random.Generator) -> np.ndarray:
    """Return activations [feature, token]: where the kind fires, with a strength of its own."""
    on = np.stack([kind(text, rng) for _ in range(features)])
    return on * rng.lognormal(size=on.shape)


def former_tails(phi: sparse.csr_array, evidence: Evidence, draws: int, seed: int) -> TailCounts:
    """Return the tails of the nulls that stood here before, which knew of no position."""
    labels = evidence.reasoning.astype(np.float64)
    if evidence.design == "phases":
        tails = TailCounts(phi @ labels, draws)
        for index in circular_shifts(evidence.lengths, draws, seed):
            tails.add(phi @ np.ascontiguousarray(labels[index].T))
        return tails
    tokens = np.arange(labels.size)
    own = sparse.csr_array((np.ones(labels.size), (tokens, evidence.document)))
    sums, lengths = sparse.csr_array(phi @ own).toarray(), evidence.lengths.astype(np.float64)
    label = (evidence.by_document > 0).astype(np.float64)

    def statistic(drawn: Floats) -> Floats:
        gap, variance = 0.0, 0.0
        for sign, chosen in ((1.0, drawn), (-1.0, 1 - drawn)):
            mean = sums @ chosen / (lengths @ chosen)
            spread = sums**2 @ chosen - 2 * mean * ((sums * lengths) @ chosen)
            spread = np.maximum(spread + mean**2 * (lengths**2 @ chosen), 1e-12)
            gap, variance = gap + sign * mean, variance + spread / (lengths @ chosen) ** 2
        return gap / np.sqrt(variance)

    tails = TailCounts(statistic(label[:, None])[:, 0], draws)
    tails.add(statistic(permutation_draws(label, draws, seed).T))
    return tails


def rate(p: np.ndarray) -> str:
    """Format the share of p-values at or below the level, with its exact interval."""
    called = int((p <= LEVEL).sum())
    low, high = clopper_pearson(called, p.size)
    return f"{100 * called / p.size:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def ceiling(left: Floats, reasoning: np.ndarray, inside: float, outside: float,
            spread: float = 0.0) -> float:  # fmt: skip
    """Return the power at `LEVEL` of sum(left x activation) over its own standard deviation.

    Args:
        left: what positions and documents leave of the labels, [token].
        reasoning: the labels, [token].
        inside: rate of firing in reasoning text.
        outside: and elsewhere; tokens fire independently of each other.
        spread: standard deviation of the logarithm of the strengths; 0: firing alone counts.
    """
    rate = np.where(reasoning, inside, outside)
    mean, square = np.exp(spread**2 / 2), np.exp(2 * spread**2)
    variance = rate * square - (rate * mean) ** 2
    shift = mean * (left @ rate) / np.sqrt(left**2 @ variance)
    bar = norm.isf(LEVEL / 2)
    return float(norm.sf(bar - shift) + norm.cdf(-bar - shift))


def ceilings(seeds: range) -> None:
    """Print the power that there is to be had, beside that of labels with nothing held fixed."""
    print("| text | feature | Cohen's d | AUC, frequency ratio | the latter, nothing held fixed |")
    print("|---|---|---|---|---|")
    for layout in LAYOUTS:
        texts = [draw_text(layout, np.random.default_rng([seed])) for seed in seeds]
        for title, rates in RATES.items():
            rows = []
            for text in texts:
                label = text.reasoning.astype(float)
                left = split_labels(text.evidence(np.ones((1, label.size)))).left
                rows.append([
                    ceiling(left, text.reasoning, *rates, spread=1.0),
                    ceiling(left, text.reasoning, *rates),
                    ceiling(label - label.mean(), text.reasoning, *rates),
                ])  # fmt: skip
            cells = " | ".join(f"{100 * value:.0f}" for value in np.mean(rows, axis=0))
            print(f"| {layout} | {title} | {cells} |")


def calibration(seeds: range, features: int, draws: int, names: tuple[str, ...]) -> None:
    """Print the tables."""
    for layout in LAYOUTS:
        left = np.mean(
            [
                split_labels(draw_text(layout, np.random.default_rng([s])).evidence(
                    np.ones((1, draw_text(layout, np.random.default_rng([s])).reasoning.size))
                )).informative
                for s in seeds
            ]
        )  # fmt: skip
        print(
            f"\n{layout}: {100 * left:.0f} % of the labels' variance is left by position"
            f"{'' if layout == 'apart' else ' and document'}; called at {LEVEL}, %\n"
        )
        print(f"| feature | n | {' | '.join(names)} | former null, {names[0]} |")
        print("|---" * (len(names) + 3) + "|")
        for number, (title, kind) in enumerate(kinds_of(layout).items()):
            p: dict[str, list[np.ndarray]] = {name: [] for name in (*names, "former")}
            for seed in seeds:
                text = draw_text(layout, np.random.default_rng([seed]))
                acts = plant(kind, text, features, np.random.default_rng([seed, number]))
                evidence = text.evidence(acts)
                for name in names:
                    p[name].append(SCORES[name](evidence, draws, seed).p)
                phi = CONTRASTS[names[0]].transform(evidence.acts)
                p["former"].append(former_tails(phi, evidence, draws, seed).two_sided())
            every = {name: np.concatenate(parts) for name, parts in p.items()}
            cells = " | ".join(rate(every[name]) for name in (*names, "former"))
            print(f"| {title} | {every['former'].size} | {cells} |", flush=True)


def speed(features: int, tokens: int, draws: int) -> None:
    """Print the CPU seconds of one score, by the product's null and by the former one."""
    for layout in ("short", "apart"):
        rng = np.random.default_rng(0)
        texts = [draw_text(layout, rng)]
        while sum(t.reasoning.size for t in texts) < tokens:
            texts.append(draw_text(layout, rng))
        text = Text(
            np.concatenate([t.lengths for t in texts]), np.concatenate([t.reasoning for t in texts])
        )
        # 32 active latents a token, of frequencies that fall as 1 / rank.
        weight = 1 / np.arange(1, features + 1)
        size = 32 * text.reasoning.size
        rows = rng.choice(features, size, p=weight / weight.sum())
        acts = sparse.csr_array(
            (rng.lognormal(size=size), (rows, np.arange(size) // 32)),
            shape=(features, text.reasoning.size),
        )
        acts.sum_duplicates()
        active = np.flatnonzero(np.diff(acts.indptr))
        evidence = Evidence(active, acts[active], text.reasoning, text.lengths, features)
        seconds = []
        for run in (SCORES["cohens_d"], None):
            began = time.process_time()
            if run is not None:
                run(evidence, draws, 0)
            else:
                phi = CONTRASTS["cohens_d"].transform(evidence.acts)
                former_tails(phi, evidence, draws, 0).two_sided()
            seconds.append(time.process_time() - began)
        print(
            f"{layout}: {active.size} features, {evidence.acts.nnz} activations of "
            f"{text.reasoning.size} tokens in {text.lengths.size} documents, {draws} draws: "
            f"{seconds[0]:.1f} s of CPU, former null {seconds[1]:.1f} s"
        )


def main() -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("calibration", "ceiling", "speed"))
    parser.add_argument("--seeds", type=int, nargs=2, default=(100, 120))
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--scores", nargs="+", choices=list(CONTRASTS), default=list(CONTRASTS))
    args = parser.parse_args()
    if args.part == "speed":
        speed(8192, 16_384, args.draws)
    elif args.part == "ceiling":
        ceilings(range(*args.seeds))
    else:
        calibration(range(*args.seeds), args.features, args.draws, tuple(args.scores))


if __name__ == "__main__":
    main()
