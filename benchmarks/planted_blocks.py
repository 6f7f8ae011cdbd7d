"""Which selector names the block that was damaged?

    python -m benchmarks.planted_blocks run --work FOLDER [--draws 500 501]
    python -m benchmarks.planted_blocks collect --work FOLDER
    python -m benchmarks.planted_blocks analyse

A target is tiny-reasoner with Gaussian noise on the down projection of one block's MLP; the truth
is that block.  Its accuracy must lie between 15 and 45 % (100 bundled test questions, levels 1 to
3): otherwise the damage is drawn again with a seed that is 1,000 higher.  Two sets of ten draws,
candidates layers 1 to 10 (0-based, mlp_out):

- `four sd` (seeds 500 to 509): noise of four standard deviations of the weights, as in
  benchmarks/insertion_experiment.py.  Development draws (seeds 0 and 1, 100 questions) showed that
  this much noise takes accuracy into the window in blocks 4, 8, 9 and 10 alone; the draws go round
  these four, so a selector that always names the same layer names it in up to three of ten.
- `every block` (seeds 600 to 609): one draw for each of the ten blocks, the noise doubled from four
  standard deviations on until accuracy is in the window (at most 256; past the window the seed is
  raised).  A selector that always names the same layer names it in exactly one of ten.

Selectors, each through `layers.selectors.recommend`, so that a fallback to the middle counts as the
layer that it names.  SAEs are those of the intact source (512 latents, k 8, 200,000 tokens, half of
them worked documents, seed 0), one a layer:

- middle; most-features and mixture on the source's counts (three rules): the same layer whatever
  the target, since they never look at it;
- most-features and mixture on the target's counts through the source's SAEs;
- quality: change of the target's loss with the source's SAE inserted, lowest wins (1,024 tokens);
- gradient-probe: what the authors' package computes, on the target, worked documents (8 batches of
  4 x 128 tokens); and LoRA gradients: benchmarks/lora_gradients.py, on the same batches (when this
  was registered, the names were weight-gradients and gradient-probe);
- activation-change: source against target on the same batches;
- insertion: change of the target's accuracy with the source's SAE inserted, 100 questions of the
  training split, levels 1 to 3;
- causal: ablation of the features that rule either counts in the target (1,024 tokens, 5 controls).
  These two cost most and are of the set `four sd` alone.

The analysis, registered before the run.  For each selector and set: the draws whose first layer is
the planted block, of 10, with the Clopper-Pearson 95 % interval and the one-sided exact binomial p
against 1 in 10; Holm's correction over the selectors that look at the target, within a set
(`JUDGED`).  Beside it the mean rank of the planted block in the selector's own table (1 is best,
ties share their mean rank, chance 5.5), and which layers were named.  No threshold was chosen on
these draws; none of the selectors has one but the mixture's and Holm's 5 % of causal and insertion.
A selector is judged where its table is there for every draw of a set, and named as not judged
otherwise.  Selectors of sets (middle block, all layers) name no block and are not judged.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binom, rankdata
from torch import Tensor

from benchmarks.insertion_experiment.draws import answers, damaged, questions, records
from benchmarks.lora_gradients import lora_gradients
from benchmarks.shared import share
from resa_lens.evals.config import EvalConfig
from resa_lens.evals.insertion import evaluate_inserted
from resa_lens.features.config import RULES
from resa_lens.features.effects import causal_effects
from resa_lens.features.exclusive import count_features
from resa_lens.layers.selectors import recommend, recommend_all
from resa_lens.models.activation_change import activation_change
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.config import SaeConfig
from resa_lens.saes.quality import loss_change
from resa_lens.saes.train import train_saes
from resa_lens.stages.attribution import document_batches
from resa_lens.stages.insertion import standard_error
from resa_lens.stages.saes import split_records
from resa_lens.stats import clopper_pearson, holm
from resa_lens.texts import corpora
from resa_lens.tuning.gradient_probe import gradient_probe

LAYERS = tuple(range(1, 11))
POINTS = [Hookpoint(layer, "mlp_out") for layer in LAYERS]
WINDOW = (0.15, 0.45)
"""Of the target's accuracy."""
SD = 4.0
FOUR = (4, 8, 9, 10)
DRAWS = {
    "four sd": {500 + i: FOUR[i % 4] for i in range(10)},
    "every block": {600 + i: block for i, block in enumerate(LAYERS)},
}
"""{set: {seed: planted block}}."""
BATCH, SEQUENCE, TOKENS = 4, 128, 4096
QUESTIONS = 100
JUDGED = (
    "most-features either, target", "mixture either, target", "quality", "causal",
    "LoRA gradients", "gradient-probe", "activation-change", "insertion",
)  # fmt: skip
"""Selectors that look at the target: Holm's correction is over those of a set."""


def question_set(split: str, limit: int = QUESTIONS) -> tuple[Any, EvalConfig]:
    """Return questions and how they are asked: all in one batch, which costs least."""
    items, config = questions(split)
    generation = replace(config.generation, batch_size=limit)
    return items, replace(config, limit=limit, generation=generation)


def worked_batches(model: Model, seed: int, tokens: int = TOKENS) -> list[Tensor]:
    """Return batches of worked documents of the training split."""
    rows, corpus = records(1.0, seed)
    corpus = replace(corpus, sequence=SEQUENCE)
    return list(corpora.batches(model.tokenizer, rows, corpus, tokens=tokens, batch=BATCH))


def source_saes(folder: Path, tokens: int | None = None) -> dict[Hookpoint, SparseCoder]:
    """Train the source's SAEs, one a layer in one pass, or read them."""
    file = folder / "saes.pt"
    if not file.exists():
        model = load_model("tiny-reasoner")
        rows, corpus = records(0.5, 0)
        config = SaeConfig(latents=512, k=8, tokens=tokens, seed=0).for_width(model.d_model)
        assert config.tokens is not None
        assert config.batch is not None
        training, held_out = split_records(rows)
        tail = corpora.batches(model.tokenizer, held_out, corpus, tokens=8192, batch=config.batch)
        batches = corpora.batches(
            model.tokenizer, training, corpus, tokens=config.tokens, batch=config.batch
        )
        began = time.process_time()
        trained = train_saes(model, list(LAYERS), batches, list(tail), config)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(trained.coders, file)
        print(f"SAEs: {time.process_time() - began:.0f} s of CPU", flush=True)
    coders = torch.load(file, weights_only=False)
    return {point: coders[point].requires_grad_(False) for point in POINTS}


@dataclass
class Draw:
    """One damaged target; every table is made when it is first needed, and kept in a file."""

    name: str
    """Of the set."""
    seed: int
    block: int
    folder: Path
    coders: Mapping[Hookpoint, SparseCoder]
    source: Model

    def stored(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a finished piece of work, or do it."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            began = time.process_time()
            result = {**work(), "cpu_seconds": 0.0}
            result["cpu_seconds"] = round(time.process_time() - began, 1)
            self.folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(result))
            part.replace(file)
            print(f"draw {self.seed}, {name}: {result['cpu_seconds']} s of CPU", flush=True)
        return json.loads(file.read_text())

    def damage(self) -> dict[str, Any]:
        """Return the damage that the rule accepts: its seed and size, and the accuracy left."""

        def work() -> dict[str, Any]:
            items, config = question_set("test")
            refused = []
            for seed in range(self.seed, self.seed + 10_000, 1000):
                sd = SD
                while sd <= 64 * SD:
                    scored = evaluate_inserted(damaged(seed, self.block, sd), items, config)
                    if WINDOW[0] <= scored.accuracy <= WINDOW[1]:
                        return {"seed": seed, "sd": sd, "refused": refused, **answers(scored)}
                    refused.append([seed, sd, scored.accuracy])
                    if self.name == "four sd" or scored.accuracy < WINDOW[0]:
                        break
                    sd *= 2
            raise SystemExit(f"draw {self.seed}, block {self.block}: no damage was accepted")

        return self.stored("damage", work)

    @cached_property
    def target(self) -> Model:
        """The damaged model."""
        accepted = self.damage()
        return damaged(accepted["seed"], self.block, accepted["sd"])

    def table(self, name: str) -> dict[str, Any]:
        """Return a selector's table: {"values": {layer: value or (value, error, ...)}}."""
        _ = self.target
        return self.stored(name, lambda: {"values": getattr(self, f"_{name}")()})

    def _counts(self) -> dict[str, Any]:
        """Features by rule and layer, of the source and of the target."""
        return {
            who: {rule: count_features(model, self.coders).table(rule) for rule in RULES}
            for who, model in (("source", self.source), ("target", self.target))
        }

    def _quality(self) -> dict[int, float]:
        changes = loss_change(
            self.target, self.coders, worked_batches(self.target, self.seed, 2048)
        )
        return {point.layer: change for point, change in changes.items()}

    def _causal(self) -> dict[int, tuple[float, float, float]]:
        rows, corpus = records(1.0, self.seed)
        documents = document_batches(self.target, split_records(rows)[1], corpus, 1024)
        counts = count_features(self.target, self.coders)
        features = {item.layer: item.features["either"] for item in counts.layers}
        effects = causal_effects(
            self.target, self.coders, features, documents, controls=5, seed=self.seed
        )
        return {layer: (e.value, e.se, e.freedom) for layer, e in effects.items()}

    def _gradient(self) -> dict[int, tuple[float, float]]:
        table = lora_gradients(self.target, worked_batches(self.target, self.seed))
        return {layer: table[layer] for layer in LAYERS}

    def _weights(self) -> dict[int, tuple[float, float]]:
        table = gradient_probe(self.target, worked_batches(self.target, self.seed))
        return {layer: table[layer] for layer in LAYERS}

    def _change(self) -> dict[int, tuple[float, float]]:
        batches = worked_batches(self.target, self.seed)
        return activation_change(self.source, self.target, batches, POINTS)

    def _insertion(self) -> dict[int, tuple[float, float]]:
        items, config = question_set("train")

        def right(point: Hookpoint | None) -> list[float]:
            inserted = None if point is None else self.coders[point]
            scored = evaluate_inserted(self.target, items, config, point, inserted)
            return [float(mark) for mark in answers(scored)["correct"]]

        base, gains = right(None), {}
        for point in POINTS:
            other = right(point)
            difference = float(np.mean(other) - np.mean(base))
            gains[point.layer] = (
                difference,
                standard_error(base, other) or 1 / len(base),
            )
        return gains


TABLES = ("counts", "quality", "gradient", "weights", "change")
"""Of every draw."""
DEAR = ("insertion", "causal")
"""Of the first set's draws."""


def tables_of(name: str) -> tuple[str, ...]:
    """Return which tables a set's draws have."""
    return (*TABLES, *DEAR) if name == "four sd" else TABLES


def run(work: Path, only: Sequence[int]) -> None:
    """Do what is missing: the first set's cheap tables and insertion, the second set, causal.

    Several processes share the draws of each.
    """
    torch.set_num_threads(1)
    share(work, {"saes": lambda: source_saes(work)})
    coders, source = source_saes(work), load_model("tiny-reasoner")

    def tables(name: str, seed: int, block: int, group: Sequence[str]) -> None:
        draw = Draw(name, seed, block, work / f"draw-{seed}", coders, source)
        for table in group:
            draw.table(table)

    for name, group in (
        ("four sd", TABLES), ("four sd", DEAR[:1]), ("every block", TABLES), ("four sd", DEAR[1:]),
    ):  # fmt: skip
        share(work, {
            f"{group[0]}-{seed}": partial(tables, name, seed, block, group)
            for seed, block in DRAWS[name].items() if not only or seed in only
        })  # fmt: skip


def collect(work: Path, into: Path) -> None:
    """Write what is there as one file a draw."""
    into.mkdir(parents=True, exist_ok=True)
    for name, blocks in DRAWS.items():
        for seed, block in blocks.items():
            files = {file.stem: json.loads(file.read_text())
                     for file in sorted((work / f"draw-{seed}").glob("*.json"))}  # fmt: skip
            if not set(TABLES) <= set(files):
                continue
            damage = {key: files["damage"][key]
                      for key in ("seed", "sd", "accuracy", "n", "refused")}  # fmt: skip
            tables = {key: files[key]["values"] for key in tables_of(name) if key in files}
            cpu = round(sum(value["cpu_seconds"] for value in files.values()), 1)
            counted = {
                who: {rule: counting_answers(numbers(table)) for rule, table in rules.items()}
                for who, rules in tables["counts"].items()
            }
            value = {
                "set": name, "block": block, "damage": damage, **tables, "counted": counted,
                "cpu_seconds": cpu,
            }  # fmt: skip
            (into / f"draw-{seed}.json").write_text(json.dumps(value, indent=1) + "\n")


@dataclass(frozen=True)
class Answer:
    """What a selector says of one draw."""

    layer: int
    """That it names first."""
    rank: float | None
    """Of the planted block in its table; None where it has no value a layer."""


def numbers(table: Mapping[str, Any]) -> dict[int, Any]:
    """Return a table of JSON as the selectors read it."""
    return {int(layer): tuple(v) if isinstance(v, list) else v for layer, v in table.items()}


def named_by(selector: str, counts: Mapping[int, float], **tables: Any) -> int:
    """Return the layer that a selector names first, a fallback to the middle with it."""
    return recommend(counts, n_layers=12, selector=selector, **tables).recommended[0]


def counting_answers(table: Mapping[int, float]) -> dict[str, int]:
    """Return what the selectors of counts name first, of one fit."""
    choices = recommend_all(table, n_layers=12, draws=200)
    return {name: choices[name].recommended[0] for name in ("most-features", "mixture")}


def answers_of(stored: dict[str, Any]) -> dict[str, Answer]:
    """Return every selector's answer to one draw; those from counts are what `collect` computed."""
    block = int(stored["block"])

    def rank(table: Mapping[int, Any], sign: float) -> float:
        values = [-sign * float(np.ravel(table[layer])[0]) for layer in LAYERS]
        return float(rankdata(values)[LAYERS.index(block)])

    plain = dict.fromkeys(LAYERS, 0)
    rows = {"middle": Answer(named_by("middle", plain), None)}
    for who in ("source", "target"):
        for rule in RULES:
            table = numbers(stored["counts"][who][rule])
            first = stored["counted"][who][rule]
            rows[f"most-features {rule}, {who}"] = Answer(first["most-features"], rank(table, 1.0))
            rows[f"mixture {rule}, {who}"] = Answer(first["mixture"], None)
    for key, selector, argument, sign in (
        ("quality", "quality", "quality", -1.0), ("causal", "causal", "causal", 1.0),
        ("gradient", "LoRA gradients", "gradient", 1.0),
        ("weights", "gradient-probe", "gradient", 1.0),
        ("change", "activation-change", "change", 1.0),
        ("insertion", "insertion", "insertion", 1.0),
    ):  # fmt: skip
        if key in stored:
            table = numbers(stored[key])
            through = "gradient-probe" if argument == "gradient" else selector
            rows[selector] = Answer(
                named_by(through, plain, **{argument: table}), rank(table, sign)
            )
    return rows


def judge(draws: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a selector: hits, interval, p, Holm's p, mean rank and the layers named."""
    blocks = [int(draw["block"]) for draw in draws]
    replies = [answers_of(draw) for draw in draws]
    names = [name for name in replies[0] if all(name in reply for reply in replies)]
    rows = []
    for name in names:
        layers = [answer[name].layer for answer in replies]
        ranks = [answer[name].rank for answer in replies]
        hits = sum(layer == block for layer, block in zip(layers, blocks, strict=True))
        known = [value for value in ranks if value is not None]
        rows.append({
            "selector": name, "hits": hits, "draws": len(draws),
            "ci": clopper_pearson(hits, len(draws)),
            "p_value": float(binom.sf(hits - 1, len(draws), 1 / len(LAYERS))),
            "rank": float(np.mean(known)) if known else None, "layers": layers,
        })  # fmt: skip
    family = [row for row in rows if row["selector"] in JUDGED]
    for row, p in zip(family, holm([row["p_value"] for row in family]), strict=True):
        row["holm"] = float(p)
    return rows


def stored_draws(place: Path, name: str) -> list[dict[str, Any]]:
    """Return a set's draws, all of them.

    Raises:
        SystemExit: a draw, or a cheap table of one, is not there yet.
    """
    draws = []
    for seed in DRAWS[name]:
        file = place / f"draw-{seed}.json"
        stored = json.loads(file.read_text()) if file.exists() else {}
        if missing := [key for key in TABLES if key not in stored]:
            raise SystemExit(f"draw {seed} has no {missing[0]} yet: nothing is judged before all")
        draws.append(stored)
    return draws


def analyse(place: Path) -> None:
    """Print the registered tables; selectors that name the same layers unseen share a row."""
    for name in DRAWS:
        try:
            draws = stored_draws(place, name)
        except SystemExit as reason:
            print(f"Set {name}: not judged, {reason}\n")
            continue
        blocks = " ".join(str(draw["block"]) for draw in draws)
        print(f"Set {name}: planted blocks {blocks}\n")
        print("| selector | planted block first | 95 % | p against 1 in 10 | mean rank | named |")
        print("|---|---|---|---|---|---|")
        rows = judge(draws)
        shared: dict[tuple[int, ...], list[str]] = {}
        for row in rows:
            if row["selector"] not in JUDGED:
                shared.setdefault(tuple(row["layers"]), []).append(row["selector"])
        for row in rows:
            names = [row["selector"]]
            if row["selector"] not in JUDGED:
                names = shared.pop(tuple(row["layers"]), [])
            if not names:
                continue
            low, high = row["ci"]
            p = f"{row['p_value']:.2g}" + (f" (Holm {row['holm']:.2g})" if "holm" in row else "")
            rank = "" if row["rank"] is None else f"{row['rank']:.1f}"
            layers = " ".join(map(str, row["layers"]))
            print(
                f"| {'; '.join(names)} | {row['hits']} of {row['draws']} | {100 * low:.0f} to "
                f"{100 * high:.0f} % | {p} | {rank} | {layers} |"
            )
        absent = [key for key in DEAR if not all(key in draw for draw in draws)]
        print(f"\nnot judged: {', '.join(absent) or 'none'}\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("run", "collect", "analyse"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--into", type=Path, default=Path("data/experiment/planted_blocks"))
    parser.add_argument("--draws", type=int, nargs="+", default=[])
    args = parser.parse_args()
    if args.what == "analyse":
        analyse(args.into)
        return
    if args.work is None:
        parser.error(f"{args.what} needs --work FOLDER")
    if args.what == "run":
        run(args.work, args.draws)
    else:
        collect(args.work, args.into)


if __name__ == "__main__":
    main()
