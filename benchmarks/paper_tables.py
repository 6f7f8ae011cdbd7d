"""The paper's Tables 3 to 5 in miniature, where a teacher exists: docs/experiment-paper-tables.md.

    python -m benchmarks.paper_tables run --work FOLDER [--draws 600 601 602 603]
    python -m benchmarks.paper_tables collect --work FOLDER
    python -m benchmarks.paper_tables analyse

Resumable; about a minute of one core a cell, 20 scores a draw.  Equal processes on one folder share
the draws.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from benchmarks.insertion_experiment.analysis import contrast
from benchmarks.insertion_experiment.draws import (
    BATCH,
    POINT,
    SEQUENCE,
    STEPS,
    Draw,
    activations,
    adapters,
    answers,
    damaged,
    objective,
    questions,
    records,
    trained_sae,
    with_adapter,
)
from benchmarks.shared import share
from resa_lens.evals.insertion import evaluate_inserted
from resa_lens.models.host import Model, load_model
from resa_lens.saes.baselines import pca
from resa_lens.saes.coder import SparseCoder
from resa_lens.stats import holm
from resa_lens.texts import corpora
from resa_lens.tuning.train import save_adapter, tune

DRAWS = (600, 601, 602, 603)
QUESTIONS = 750
TOKENS = 200_000
"""Of every SAE's training, in every arm."""
SIBLING = "tiny-reasoner-rl"
SOURCES = {
    "scratch": "tiny-reasoner",
    "step 35": "tiny-reasoner-rl/step-35",
    "step 109": "tiny-reasoner-rl/step-109",
    "step 184": "tiny-reasoner-rl/step-184",
}
"""{cell: source}; the base is step 0."""
EXTRACTED = ("chain_sum", "count", "equation", "expression")
"""Families of the foreign SAE: the first four of the seven by name."""
ELICITED = ("product", "remainder", "word_problem")
ROTATIONS = 5
CELLS = (
    "scratch", "pca", "pretrained", "finetuned", "step 35", "step 109", "step 184",
    "same families", "other families", "sibling",
)  # fmt: skip
"""Tuned."""
SCORED = ("sibling base", "attached", *(f"rotated {number}" for number in range(ROTATIONS)))
"""Not tuned: the sibling, and the sibling with an adapter attached."""
CONTRASTS = {
    "finetuned - pretrained": True,
    "step 184 - scratch": True,
    "other families - same families": True,
    "attached - rotated": True,
    "scratch - base": False,
    "pca - base": False,
    "pretrained - base": False,
    "finetuned - base": False,
    "finetuned - scratch": False,
    "scratch - pca": False,
    "step 35 - scratch": False,
    "step 109 - scratch": False,
    "same families - base": False,
    "other families - base": False,
    "attached - sibling base": False,
    "rotated - sibling base": False,
    "sibling - sibling base": False,
    "attached - sibling": False,
}
"""{contrast: whether it is primary}."""
STORED = Path("data/experiment/paper_tables")


@dataclass
class Tables:
    """One draw: the damage, every SAE, every cell; each is made when it is first asked for."""

    seed: int
    folder: Path
    draw: Draw = field(init=False)

    def __post_init__(self) -> None:
        """Take the damage by the rule of the insertion experiment."""
        self.draw = Draw(self.seed, self.folder)

    def sae(self, name: str) -> SparseCoder:
        """Return the SAE of a cell, from its file or trained."""
        file = self.folder / f"{name}.pt"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(self._trained(name), file)
        return torch.load(file, weights_only=False)

    def _trained(self, name: str) -> SparseCoder:
        base, seed = self.draw.source, self.seed
        match name:
            case "pretrained":
                return trained_sae(base, seed, thought_share=0.0, tokens=TOKENS)
            case "half pretrained":
                return trained_sae(base, seed, thought_share=0.0, tokens=TOKENS // 2)
            case "finetuned":
                initial = self.sae("half pretrained")
                return trained_sae(base, seed, tokens=TOKENS // 2, initial=initial)
            case "same families":
                return trained_sae(base, seed, tokens=TOKENS, families=ELICITED)
            case "other families":
                return trained_sae(base, seed, tokens=TOKENS, families=EXTRACTED)
        return trained_sae(load_model(SOURCES[name]), seed, tokens=TOKENS)

    def target(self, cell: str) -> Model:
        """Return a fresh damaged model: the sibling where the cell is about it."""
        seed = self.draw.damage_seed
        about = cell in ("sibling", *SCORED)
        return damaged(seed, name=SIBLING) if about else damaged(seed)

    @cached_property
    def _inserted(self) -> Mapping[str, Callable[[], Any]]:
        scratch = "scratch"
        return {
            "pca": lambda: pca(activations(self.draw.source, self.seed), self.sae(scratch)),
            "sibling": lambda: self.sae(scratch),
        }

    def cell(self, name: str) -> dict[str, Any]:
        """Return what a cell scored, tuned first where it is tuned."""
        _ = self.draw.damage_seed
        if name == "750":
            return self.draw.stored(name, lambda: scored(self.draw.target()))
        return self.draw.stored(name, lambda: self._tuned(name) if name in CELLS
                                else self._attached(name))  # fmt: skip

    def _tuned(self, name: str) -> dict[str, Any]:
        fresh = self.target(name)
        rows, corpus = records(1.0, self.seed)
        if name.endswith("families"):
            rows = [row for row in rows if row.family in ELICITED]
        inserted = self._inserted.get(name, lambda: self.sae(name))()
        tokens = STEPS * BATCH * SEQUENCE
        batches = corpora.batches(fresh.tokenizer, rows, corpus, tokens=tokens, batch=BATCH)
        config = adapters(self.seed)
        peft, course = tune(fresh, inserted, POINT, batches, STEPS, objective("A"), config)
        save_adapter(peft, self.adapter(name), fresh.folder)
        merged = with_adapter(self.target(name), self.adapter(name))
        return {**scored(merged), "tokens": course.tokens,
                "losses": [round(loss, 6) for loss in course.losses]}  # fmt: skip

    def adapter(self, cell: str) -> Path:
        """Return the folder of a cell's adapter."""
        return self.folder / f"adapter-{cell}"

    def _attached(self, name: str) -> dict[str, Any]:
        sibling = self.target(name)
        if name == "sibling base":
            return scored(sibling)
        rotation = None if name == "attached" else int(name.split()[1])
        folder = self.adapter("scratch")
        return scored(with_adapter(sibling, folder, rotation=rotation))


def scored(model: Model) -> dict[str, Any]:
    """Return a model's score on the first 750 test questions drawn, levels 1 to 3."""
    items, config = questions("test")
    generation = replace(config.generation, batch_size=QUESTIONS // 3)
    config = replace(config, limit=QUESTIONS, generation=generation)
    result = evaluate_inserted(model, items, config)
    family = {item.id: item.family for item in items}
    rows = sorted(result.samples, key=lambda row: row["id"])
    return {**answers(result), "families": [family[row["id"]] for row in rows]}


def run(work: Path, draws: Sequence[int]) -> None:
    """Do what is missing; a draw is a job that one of several processes does."""
    torch.set_num_threads(1)

    def cells(seed: int) -> None:
        tables = Tables(seed, work / f"draw-{seed}")
        for name in ("750", *CELLS, *SCORED):
            tables.cell(name)

    share(work, {f"draw-{seed}": partial(cells, seed) for seed in draws})


def stored_draws(place: Path) -> dict[int, dict[str, Any]]:
    """Return the stored draws; only those of which every cell is there.

    Raises:
        SystemExit: fewer than two draws are whole.
    """
    whole = {}
    for file in sorted(place.glob("draw-*.json")):
        cells = json.loads(file.read_text())
        if all(name in cells for name in ("base", *CELLS, *SCORED)):
            whole[int(file.stem.removeprefix("draw-"))] = cells
    if len(whole) < 2:
        raise SystemExit(f"{place}: {len(whole)} whole draws; an interval over draws needs two")
    return whole


def accuracy(cells: Mapping[str, Any], name: str, families: Sequence[str] = ()) -> float:
    """Return a cell's accuracy in %, of some families' questions; `rotated` is the mean of five."""
    if name == "rotated":
        each = (accuracy(cells, f"rotated {number}", families) for number in range(ROTATIONS))
        return statistics.fmean(each)
    cell = cells[name]
    right = [mark == "1" for mark, family in zip(cell["correct"], cell["families"], strict=True)
             if not families or family in families]  # fmt: skip
    return 100 * statistics.fmean(right)


def difference(cells: Mapping[str, Any], name: str, families: Sequence[str] = ()) -> float:
    """Return a contrast of one draw, in points."""
    first, second = name.split(" - ")
    return accuracy(cells, first, families) - accuracy(cells, second, families)


def analyse(place: Path) -> None:
    """Print the registered tables."""
    draws = stored_draws(place)
    print("| cell | " + " | ".join(f"draw {seed}" for seed in draws) + " | mean |")
    print("|---" * (len(draws) + 2) + "|")
    for name in ("base", *CELLS, "sibling base", "attached", "rotated"):
        values = [accuracy(cells, name) for cells in draws.values()]
        shown = " | ".join(f"{value:.1f}" for value in values)
        print(f"| {name} | {shown} | {statistics.fmean(values):.1f} |")
    rows = {name: contrast(name, [difference(cells, name) for cells in draws.values()])
            for name in CONTRASTS}  # fmt: skip
    primary = [name for name, first in CONTRASTS.items() if first]
    corrected = dict(zip(primary, holm([rows[n].p_value for n in primary]), strict=True))
    print("\n| contrast | points | 95 % | p | within 3 points, p |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        p_value = f"{row.p_value:.2g}"
        p_value += f" (Holm {corrected[name]:.3g})" if name in corrected else ""
        print(f"| {name} | {row.mean:+.1f} | {row.ci[0]:+.1f} to {row.ci[1]:+.1f} | {p_value} | "
              f"{row.p_equivalent:.2g} |")  # fmt: skip
    _print_families(draws)
    _print_steps(draws)


def _print_families(draws: Mapping[int, Mapping[str, Any]]) -> None:
    print("\n| gain on the questions of | families of the SAE | points | 95 % |")
    print("|---|---|---|---|")
    for asked, families in (("tuned families", ELICITED), ("other families", EXTRACTED)):
        for cell in ("same families", "other families"):
            name = f"{cell} - base"
            row = contrast(name, [difference(c, name, families) for c in draws.values()])
            interval = f"{row.ci[0]:+.1f} to {row.ci[1]:+.1f}"
            print(f"| {asked} | {cell.split()[0]} | {row.mean:+.1f} | {interval} |")


def _print_steps(draws: Mapping[int, Mapping[str, Any]]) -> None:
    steps = [0, 35, 109, 184]
    results: list[Any] = [
        spearmanr(steps, [accuracy(cells, name) for name in SOURCES]) for cells in draws.values()
    ]
    known = [r.statistic for r in results if not math.isnan(r.statistic)]
    row = contrast("rho", known)
    low, high = max(-1.0, row.ci[0]), min(1.0, row.ci[1])
    print(f"\nrank correlation of the source's step with the gain: mean {row.mean:+.2f} "
          f"({low:+.2f} to {high:+.2f}) over {len(known)} draws")  # fmt: skip


def collect(work: Path, into: Path) -> None:
    """Write what is there of each draw as one file."""
    into.mkdir(parents=True, exist_ok=True)
    for folder in sorted(work.glob("draw-*")):
        cells = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
        # The base of the rule is scored on 1,500 questions; contrasts use the 750 of the cells.
        if "750" in cells:
            cells["base"] = cells.pop("750")
        (into / f"{folder.name}.json").write_text(json.dumps(cells) + "\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "analyse", "collect"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--draws", type=int, nargs="+", default=list(DRAWS))
    args = parser.parse_args()
    if args.what == "analyse":
        analyse(STORED)
        return
    if args.work is None:
        parser.error("--work FOLDER is needed")
    if args.what == "run":
        run(args.work, args.draws)
    else:
        collect(args.work, STORED)


if __name__ == "__main__":
    main()
