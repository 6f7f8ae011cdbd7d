"""What the gradient probe and the change of activations would have cost on the shipped sweeps.

    python -m benchmarks.sweep_selectors measure [--into data/experiment/planted_blocks/sweeps.json]
    python -m benchmarks.sweep_selectors show

`measure` takes each sweep of data/workspace, its target, source, site and adapted modules from its
manifest, and measures both tables on the documents that it tuned on (8 batches of 4 sequences,
seed 0).  `show` gives every selector's regret, the sweep's own and these, from its scores.  No
sweep of these has a row for adapters on the middle block alone, and in every row LoRA is on all
layers, so these two are not judged; nor is insertion, which would need each sweep's SAEs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.lora_gradients import lora_gradients
from resa_lens.layers.regret import Regrets, SelectorRegret, regrets
from resa_lens.layers.selectors import recommend
from resa_lens.models.activation_change import activation_change
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import load_model
from resa_lens.stages.layer_probes import documents
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.tuning.gradient_probe import gradient_probe

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = ROOT / "data" / "workspace" / "sweeps"
STORED = ROOT / "data" / "experiment" / "planted_blocks" / "sweeps.json"


def measure(into: Path) -> None:
    """Measure both tables for every sweep and write them."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for folder in sorted(SWEEPS.iterdir()):
        config = json.loads((folder / "manifest.json").read_text())["config"]["sweep"]
        layers, job = config["layers"], config["tune"]
        corpus = CorpusConfig(**job["elicitation"])
        target = load_model(job["model"])
        batches = documents(target, corpus)
        tables: dict[str, Any] = {
            "gradient": lora_gradients(target, batches, targets=job["objective"]["targets"]),
            "weights": gradient_probe(target, batches),
        }
        if job["source_model"]:
            points = [Hookpoint(layer, job["objective"]["site"]) for layer in layers]
            source = load_model(job["source_model"])
            tables["change"] = activation_change(source, target, batches, points)
        result[folder.name] = {
            name: {str(layer): table[layer] for layer in layers} for name, table in tables.items()
        }
        print(folder.name, *tables, flush=True)
    into.parent.mkdir(parents=True, exist_ok=True)
    into.write_text(json.dumps(result, indent=1) + "\n")


def judged(folder: Path, tables: dict[str, Any]) -> Regrets:
    """Return the regret of every selector of a sweep: those that it stored, and the measured."""
    sweep = json.loads((folder / "sweep.json").read_text())
    layers = [row["layer"] for row in sweep["layers"]]
    scores: dict[int, list[float]] = {layer: [] for layer in layers}
    for job in sweep["jobs"]:
        if job["control"] is None and job["layer"] in scores:
            scores[job["layer"]].append(100 * job["accuracy"])
    picks = {row["selector"]: int(row["layer"]) for row in sweep["regrets"]["selectors"]}
    for name, table in tables.items():
        values = {int(layer): tuple(pair) for layer, pair in table.items()}
        selector = "activation-change" if name == "change" else "gradient-probe"
        argument: dict[str, Any] = {"change" if name == "change" else "gradient": values}
        answer = recommend({}, n_layers=sweep["n_layers"], selector=selector, **argument)
        picks["LoRA gradients" if name == "gradient" else selector] = answer.recommended[0]
    return regrets(picks, scores)


def show(stored: Path) -> None:
    """Print every selector's layer and regret, a column a sweep, those by random layers last."""
    results = {
        name: judged(SWEEPS / name, tables)
        for name, tables in json.loads(stored.read_text()).items()
    }
    for name, result in results.items():
        print(f"{name}: best layer {result.best} of {result.layers}")
    cells = [{row.selector: row for row in result.selectors} for result in results.values()]
    print("\n| selector | " + " | ".join(name.split("-", 3)[3] for name in results) + " |")
    print("|---" * (len(results) + 1) + "|")
    for selector in dict.fromkeys(name for column in cells for name in column):
        row = [_cell(column.get(selector)) for column in cells]
        print(f"| {selector} | {' | '.join(row)} |")
    chance = []
    for result in results.values():
        low, high = result.random_ci or (0.0, 0.0)
        chance.append(f"{result.random:.2f} ({low:.2f} to {high:.2f})")
    print(f"| a layer at random | {' | '.join(chance)} |")


def _cell(row: SelectorRegret | None) -> str:
    if row is None:
        return "not judged"
    low, high = row.ci or (0.0, 0.0)
    return f"{row.layer}: {row.regret:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("measure", "show"))
    parser.add_argument("--into", type=Path, default=STORED)
    args = parser.parse_args()
    if args.what == "measure":
        measure(args.into)
    else:
        show(args.into)


if __name__ == "__main__":
    main()
