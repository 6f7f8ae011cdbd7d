"""Does anything that counts think-tag features find the layer where tuning through an SAE pays?

    python -m benchmarks.planted_sweep run --work FOLDER [--draws 500]
    python -m benchmarks.planted_sweep collect --work FOLDER
    python -m benchmarks.planted_sweep analyse

The damaged targets of benchmarks/planted_blocks.py, the first two of its set `four sd` (seed 500,
block 4; seed 501, block 8), with its SAEs of the intact source, one a layer.  Each target is tuned
with preset paper through the source's SAE of every layer 1 to 10, and through PCA of the source's
activations at the same FVU there: 40 updates of 8 x 256 tokens, LoRA and rate of
benchmarks/insertion_experiment, the same documents in the same order, the draw's seed throughout;
scored with the SAE gone, on 750 test questions of levels 1 to 3.

The analysis, registered before the run.  A layer's gain is its accuracy less the target's, in
points, over the same questions.  For each draw:

- the gain at the planted block less the mean gain of the other nine layers, SAE arm, with a
  bootstrap interval over questions (2,000 draws);
- SAE less PCA: the mean over the ten layers, with the same bootstrap;
- for each selector of planted_blocks, from the tables that it stored for the same draw: the gain at
  the layer that it names first, its regret (the best layer's gain less that one; in each bootstrap
  draw the best is found anew), and the same regret of a layer drawn at random;
- for each selector with a value a layer, Spearman's correlation of the value (larger is better)
  with the gain over the ten layers; p from 10,000 permutations of layers, Holm's correction over
  the selectors of a draw.  Ten layers see |rho| of about 0.8 in 80 % of cases.

Both draws are reported whatever they say.  Two draws of one model say nothing of others.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from benchmarks import planted_blocks as planted
from benchmarks.insertion_experiment.draws import (
    BATCH,
    SEQUENCE,
    STEPS,
    activations,
    adapters,
    answers,
    objective,
    records,
    with_adapter,
)
from benchmarks.shared import share
from resa_lens.evals.insertion import evaluate_inserted
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import load_model
from resa_lens.saes.baselines import pca
from resa_lens.stats import Floats, holm
from resa_lens.texts import corpora
from resa_lens.tuning.train import save_adapter, tune

DRAWS = {500: 4, 501: 8}
"""{seed: planted block}."""
ARMS = ("sae", "pca")
QUESTIONS = 750
BOOTSTRAP, PERMUTATIONS = 2000, 10_000
STORED = Path("data/experiment/planted_blocks")


def cell(target: planted.Draw, point: Hookpoint, arm: str) -> dict[str, Any]:
    """Tune a fresh target through one layer, and score it with nothing inserted."""
    fresh, rest = fresh_target(target), fresh_target(target)
    rows, corpus = records(1.0, target.seed)
    coder = target.coders[point]
    inserted: Any = coder
    if arm == "pca":
        inserted = pca(activations(target.source, target.seed, point), coder)
    tokens = STEPS * BATCH * SEQUENCE
    batches = corpora.batches(fresh.tokenizer, rows, corpus, tokens=tokens, batch=BATCH)
    config = adapters(target.seed)
    peft, course = tune(fresh, inserted, point, batches, STEPS, objective("A"), config)
    folder = target.folder / f"adapter-{arm}-{point.layer}"
    save_adapter(peft, folder, fresh.folder)
    return {**scored(with_adapter(rest, folder)), "tokens": course.tokens,
            "losses": [round(loss, 6) for loss in course.losses]}  # fmt: skip


def fresh_target(target: planted.Draw) -> Any:
    """Return the draw's damaged model, untouched."""
    accepted = target.damage()
    return planted.damaged(accepted["seed"], target.block, accepted["sd"])


def scored(model: Any) -> dict[str, Any]:
    """Return a model's score on the test questions."""
    items, config = planted.question_set("test", QUESTIONS)
    return answers(evaluate_inserted(model, items, config))


def run(work: Path, seeds: list[int]) -> None:
    """Do what is missing: the SAE arm of every draw first.  Several processes share the cells."""
    torch.set_num_threads(1)
    share(work, {"saes": lambda: planted.source_saes(work)})
    coders, source = planted.source_saes(work), load_model("tiny-reasoner")
    draws = [
        planted.Draw("four sd", seed, DRAWS[seed], work / f"draw-{seed}", coders, source)
        for seed in seeds
    ]

    def base(draw: planted.Draw) -> None:
        draw.stored("sweep-base", lambda: scored(fresh_target(draw)))

    def tuned(draw: planted.Draw, point: Hookpoint, arm: str) -> None:
        draw.stored(f"sweep-{arm}-{point.layer}", lambda: cell(draw, point, arm))

    share(work, {f"sweep-base-{draw.seed}": partial(base, draw) for draw in draws})
    for arm in ARMS:
        share(work, {
            f"sweep-{arm}-{point.layer}-{draw.seed}": partial(tuned, draw, point, arm)
            for draw in draws for point in planted.POINTS
        })  # fmt: skip


def collect(work: Path, into: Path) -> None:
    """Write what is there of the draws as one file."""
    result: dict[str, Any] = {}
    for seed, block in DRAWS.items():
        files = sorted((work / f"draw-{seed}").glob("sweep-*.json"))
        cells = {file.stem.removeprefix("sweep-"): json.loads(file.read_text()) for file in files}
        if cells:
            result[str(seed)] = {"block": block, "cells": cells}
    into.mkdir(parents=True, exist_ok=True)
    (into / "layers.json").write_text(json.dumps(result, indent=1) + "\n")


def marks(cells: dict[str, Any], arm: str) -> Floats:
    """Return which questions are right more than before, [layer, question], in points."""
    rows = [cells[f"{arm}-{layer}"]["correct"] for layer in planted.LAYERS]
    base = np.array([float(mark) for mark in cells["base"]["correct"]])
    return 100 * (np.array([[float(mark) for mark in row] for row in rows]) - base)


def resampled(size: int, seed: int = 0) -> np.ndarray:
    """Return questions drawn with replacement, [draw, question]."""
    return np.random.default_rng(seed).integers(0, size, (BOOTSTRAP, size))


def interval(values: Floats) -> tuple[float, float]:
    """Return the central 95 % of bootstrap draws."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def correlation(values: Floats, gains: Floats, seed: int = 0) -> tuple[float, float]:
    """Return Spearman's rho over layers and its two-sided p, by permutation of the layers.

    A table that says the same of every layer has neither: (nan, 1.0).
    """
    if np.ptp(values) == 0 or np.ptp(gains) == 0:
        return float("nan"), 1.0
    first, second = (rankdata(side) - (len(gains) + 1) / 2 for side in (values, gains))
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    rho = float(first @ second) / norm
    order = np.argsort(np.random.default_rng(seed).random((PERMUTATIONS, len(gains))), axis=1)
    drawn = np.abs(second[order] @ first) / norm
    return rho, (1 + int(np.sum(drawn >= abs(rho) - 1e-12))) / (1 + PERMUTATIONS)


def tables(stored: dict[str, Any]) -> dict[str, Floats]:
    """Return every table of a stored draw of planted_blocks, larger is better, [layer]."""
    columns: dict[str, Floats] = {}
    for who in ("source", "target"):
        for rule in planted.RULES:
            columns[f"counts {rule}, {who}"] = _column(stored["counts"][who][rule])
    for key, name, sign in (
        ("quality", "quality", -1.0), ("gradient", "LoRA gradients", 1.0),
        ("weights", "gradient-probe", 1.0), ("change", "activation-change", 1.0),
        ("insertion", "insertion", 1.0), ("causal", "causal", 1.0),
    ):  # fmt: skip
        if key in stored:
            columns[name] = sign * _column(stored[key])
    return columns


def _column(table: dict[str, Any]) -> Floats:
    return np.array([float(np.ravel(table[str(layer)])[0]) for layer in planted.LAYERS])


def analyse(place: Path) -> None:
    """Print the registered tables."""
    stored = json.loads((place / "layers.json").read_text())
    for seed, of in stored.items():
        cells, block = of["cells"], of["block"]
        arms = [arm for arm in ARMS if all(f"{arm}-{x}" in cells for x in planted.LAYERS)]
        base = cells["base"]
        print(f"Draw {seed}, block {block}, {100 * base['accuracy']:.1f} % before, n = {base['n']}")
        if "sae" not in arms:
            print("not judged: the SAE arm is not whole\n")
            continue
        gained = {arm: marks(cells, arm) for arm in arms}
        print(f"\n| arm | {' | '.join(map(str, planted.LAYERS))} |")
        print("|---" * (len(planted.LAYERS) + 1) + "|")
        for arm, rows in gained.items():
            print(f"| {arm} | {' | '.join(f'{value:+.1f}' for value in rows.mean(axis=1))} |")
        drawn = resampled(base["n"])
        boot = {arm: np.stack([row[drawn].mean(axis=1) for row in rows])
                for arm, rows in gained.items()}  # fmt: skip
        at = planted.LAYERS.index(block)
        _show_block(gained["sae"].mean(axis=1), boot["sae"], at)
        if "pca" in boot:
            difference = (gained["sae"] - gained["pca"]).mean()
            low, high = interval((boot["sae"] - boot["pca"]).mean(axis=0))
            print(f"SAE less PCA, mean over layers: {difference:+.1f} ({low:+.1f} to {high:+.1f})")
        draw = json.loads((place / f"draw-{seed}.json").read_text())
        _show_selectors(draw, gained["sae"].mean(axis=1), boot["sae"])
        _show_correlations(draw, gained["sae"].mean(axis=1))


def _show_block(gains: Floats, boot: Floats, at: int) -> None:
    others = np.arange(len(gains)) != at
    low, high = interval(boot[at] - boot[others].mean(axis=0))
    difference = gains[at] - gains[others].mean()
    print(f"\nat the block less elsewhere: {difference:+.1f} ({low:+.1f} to {high:+.1f})")


def _show_selectors(draw: dict[str, Any], gains: Floats, boot: Floats) -> None:
    regrets = boot.max(axis=0) - boot
    low, high = interval(regrets.mean(axis=0))
    print("\n| selector | layer | gain | regret (95 %) |")
    print("|---|---|---|---|")
    for name, answer in planted.answers_of(draw).items():
        at = planted.LAYERS.index(answer.layer)
        ci = interval(regrets[at])
        regret = gains.max() - gains[at]
        print(f"| {name} | {answer.layer} | {gains[at]:+.1f} | {regret:.1f} "
              f"({ci[0]:.1f} to {ci[1]:.1f}) |")  # fmt: skip
    mean = gains.max() - gains.mean()
    print(f"| a layer at random | | {gains.mean():+.1f} | {mean:.1f} ({low:.1f} to {high:.1f}) |")


def _show_correlations(draw: dict[str, Any], gains: Floats) -> None:
    rows = {name: correlation(table, gains) for name, table in tables(draw).items()}
    corrected = holm([p for _, p in rows.values()])
    print("\n| table | rho with the gain | p | after Holm |")
    print("|---|---|---|---|")
    for (name, (rho, p)), q in zip(rows.items(), corrected, strict=True):
        said = "none: the same at every layer" if np.isnan(rho) else f"{rho:+.2f}"
        print(f"| {name} | {said} | {p:.2g} | {q:.2g} |")
    print()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("run", "collect", "analyse"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--into", type=Path, default=STORED)
    parser.add_argument("--draws", type=int, nargs="+", default=list(DRAWS), choices=list(DRAWS))
    args = parser.parse_args()
    if args.what == "analyse":
        analyse(args.into)
        return
    if args.work is None:
        parser.error("name --work, where the runs are")
    if args.what == "run":
        run(args.work, args.draws)
    else:
        collect(args.work, args.into)


if __name__ == "__main__":
    main()
