"""Does sparse allocation give fewer dead features and a better reconstruction?

    python -m benchmarks.allocation run --work FOLDER [--world planted] [--seeds 0 1 2]
    python -m benchmarks.allocation collect --work FOLDER
    python -m benchmarks.allocation analyse
    python -m benchmarks.allocation speed

The claim under test, of the abstract of arXiv 2411.02124: Mutual Choice and Feature Choice SAEs
have fewer dead features and a lower reconstruction loss at the same sparsity than TopK.

Two worlds.

- `planted`: 1,024 true features, unit directions drawn at random in 256 dimensions (superposed).
  The r-th has a frequency in proportion to 1 / r, at most 1/4, 8 active a token on average; they
  fall by chance into 64 groups and a feature's latent Gaussian has the correlation 0.5 with its
  group's, so that features of a group fire together; an active one is as strong as
  0.5 + |N(0, 1)|; isotropic noise of 0.02 a dimension is added.  SAEs of 1,024 latents, k 8.
- `real`: mlp_out of layer 4 (0-based) of tiny-reasoner, training split with half worked documents,
  131,072 tokens without BOS, EOS and padding.  SAEs of 1,024 latents, k 16.  At layer 4 the mean in
  the output's place costs 0.019 nats a token, at layers 3 and 5 to 9 under 0.005, of which nothing
  could be recovered measurably.

The truth of `planted` and the texts of `real` are the same for every seed; a seed draws the SAE's
first weights, and the tokens (`planted`) or their order (`real`).  Every SAE of a world sees the
same number of tokens, 1,024 a step (`STEPS`): adam, a rate of 5e-3 (of five from 1e-3
to 2e-2, chosen with TopK alone on seed 99, which is not judged) that falls to zero, dead after
32,768 tokens.

Arms: topk, batchtopk, mutual-choice (the same computation to the bit as batchtopk, a test holds it:
not trained again), feature-choice with even places, feature-choice by Zipf's law; each with aux
none, auxk and zipf (weight 1/32).  Beside each activation a frozen random dictionary: the decoder
stays as it was drawn, the rest is trained (the frozen decoder of arXiv 2602.14111), aux none.

Measured with the codes of inference (thresholds) on tokens that were not trained on, 16,384
(`planted`) or 8,192 (`real`): FVU; mean L0; dead share (latents that are active on none of these
tokens); under-used share (`under_used` of the densities there, dead ones with them).  `planted`:
recovered share (true features whose partner in the one-to-one assignment that maximises the sum of
the cosines has a cosine of 0.9 or more), and the same among the rarer half.  `real`: loss recovered
(1 - the change of the next-token loss with the reconstruction inserted over the change with the
mean, on 4,096 of the tokens), and the think-tag features under each rule.  Between seeds: PW-MCC
(arXiv 2505.20254), the mean absolute cosine of decoder directions under the best one-to-one
assignment, of each pair of seeds; dead latents take part.

The analysis, written down before the run.  Three seeds.  Each figure is a mean over the seeds with
the 95 % t interval (two degrees of freedom; PW-MCC: the range of the three pairs, which are not
independent).  For the claim each allocation is compared with topk under the same aux, and with
batchtopk beside it, by the paired differences of the seeds (same tokens, same first weights) in
dead share and FVU: `lower` or `higher` where the 95 % t interval leaves out zero, `open` otherwise.
No correction for the number of comparisons.  The claim is called confirmed for an arm where both
are lower than topk's in both worlds, refuted where one of them is higher in both worlds, and open
otherwise.  Thresholds make the L0 of the held-out tokens differ from k: an arm whose mean L0 is
over 5 % away from topk's is marked `*`, and its FVU is no comparison at equal sparsity.

Reduced against issue 19 for time: three seeds in place of five, no interval of the PW-MCC, loss
recovered on 4,096 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.insertion_experiment.draws import records
from benchmarks.shared import share
from resa_lens.features.exclusive import count_features
from resa_lens.models.activations import ordinary, special_ids, stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes.allocation import under_used
from resa_lens.saes.coder import Coder, decode, encode, new_coder
from resa_lens.saes.config import SaeConfig
from resa_lens.saes.quality import loss_change
from resa_lens.saes.train import LayerTrainer
from resa_lens.stages.saes import split_records
from resa_lens.texts import corpora

STORED = Path(__file__).resolve().parents[1] / "data" / "experiment" / "allocation"
ROWS = 1024
LATENTS = 1024
RATE = 5e-3
STEPS = {"planted": 192, "real": 128}
K = {"planted": 8, "real": 16}
HELD = {"planted": 16_384, "real": 8_192}
SEEDS = (0, 1, 2)
POINT = Hookpoint(4, "mlp_out")
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "topk": {"activation": "topk"},
    "batchtopk": {"activation": "batchtopk"},
    "feature-choice": {"activation": "feature-choice"},
    "feature-choice zipf": {"activation": "feature-choice", "allocation": "zipf"},
}
"""Mutual Choice is batchtopk to the bit."""
AUX: dict[str, dict[str, Any]] = {
    "none": {},
    "auxk": {"auxk_alpha": 1 / 32},
    "zipf": {"auxk_alpha": 1 / 32, "aux": "zipf"},
}
FROZEN = "frozen"
"""In the place of an auxiliary loss: the random dictionary that stays."""
ARMS = [(a, x) for x in (*AUX, FROZEN) for a in ACTIVATIONS]


# The planted world


class Truth(NamedTuple):
    """True features: directions [feature, d], and how often each is active."""

    directions: Tensor
    frequencies: Tensor
    groups: Tensor


def truth(features: int = 1024, width: int = 256, active: float = 8.0) -> Truth:
    """Draw the true features of the planted world, the same ones every time."""
    generator = torch.Generator().manual_seed(19)
    directions = torch.randn(features, width, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    weight = 1 / torch.arange(1, features + 1, dtype=torch.double)
    low, high = 0.0, float(features)
    # The scale at which the capped frequencies add up to the mean number active.
    for _ in range(100):
        scale = (low + high) / 2
        low, high = (
            (scale, high) if (scale * weight).clamp_max(0.25).sum() < active else (low, scale)
        )
    groups = torch.randint(64, (features,), generator=generator)
    return Truth(directions, (low * weight).clamp_max(0.25).float(), groups)


def planted_tokens(world: Truth, rows: int, generator: torch.Generator) -> Tensor:
    """Draw activations [rows, d] of the planted world."""
    features, width = world.directions.shape
    shared = torch.randn(rows, 64, generator=generator)[:, world.groups]
    own = torch.randn(rows, features, generator=generator)
    latent = math.sqrt(0.5) * shared + math.sqrt(0.5) * own
    bar = torch.from_numpy(stats.norm.isf(world.frequencies.double().numpy())).float()
    strength = 0.5 + torch.randn(rows, features, generator=generator).abs()
    codes = torch.where(latent > bar, strength, 0.0)
    noise = torch.randn(rows, width, generator=generator)
    return codes @ world.directions + 0.02 * noise


# The real one


def real_tokens(work: Path, model: Model) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return activations to train on, held-out ones, and sequences for the loss."""
    file = work / "real.pt"
    rows, corpus = records(0.5, 0)
    training, held_out = split_records(rows)

    def batches(part: Sequence[Any], tokens: int) -> list[Tensor]:
        return list(corpora.batches(model.tokenizer, part, corpus, tokens=tokens, batch=8))

    held = batches(held_out, HELD["real"] + 2048)
    if not file.exists():
        special = special_ids(model)
        kept = []
        for part, count in (
            (batches(training, 150_000), STEPS["real"] * ROWS),
            (held, HELD["real"]),
        ):
            acts = []
            for batch, ids in zip(stream_activations(model, part, [POINT]), part, strict=True):
                x = batch.acts[POINT].flatten(0, 1).float()
                acts.append(x[ordinary(ids, special)])
            whole = torch.cat(acts)[:count]
            assert whole.shape[0] == count, whole.shape
            kept.append(whole)
        work.mkdir(parents=True, exist_ok=True)
        torch.save(kept, file)
    train, test = torch.load(file)
    sequences = [ids for batch in held for ids in batch.split(8)]
    return train, test, sequences[: max(1, 4096 // sequences[0].numel())]


# One cell


def config_of(world: str, activation: str, aux: str, steps: int) -> SaeConfig:
    """Return how the SAE of a cell is trained."""
    return SaeConfig(
        latents=LATENTS, k=K[world], optimizer="adam", learning_rate=RATE, schedule="linear",
        dead_threshold=32_768, tokens=steps * ROWS, batch=1,
        **ACTIVATIONS[activation], **AUX.get(aux, {}),
    )  # fmt: skip


def trained(
    config: SaeConfig, batches: Iterator[Tensor], steps: int, seed: int, *, frozen: bool = False
) -> Coder:
    """Train an SAE on batches of activations; a frozen one keeps its first decoder."""
    first = next(batches)
    coder = new_coder(
        first.shape[1], config.latents or 0, config.k, seed=seed, activation=config.activation
    )
    trainer = LayerTrainer(coder, config, steps)
    if frozen:
        update = trainer.optimizer.update
        trainer.optimizer.update = lambda name, gradient: (
            None if name == "W_dec" else update(name, gradient)
        )
    for number in range(steps):
        trainer.step(next(batches) if number else first)
    return trainer.finish()


@torch.no_grad()
def common(coder: Coder, x: Tensor) -> dict[str, float]:
    """Return the figures of both worlds on held-out activations."""
    acts = encode(coder, x)
    error = (x - decode(coder, acts)).double().pow(2).sum()
    density = torch.bincount(acts.latents, minlength=coder.d_sae).double() / x.shape[0]
    return {
        "fvu": float(error / (x - x.mean(0)).double().pow(2).sum()),
        "l0": acts.latents.numel() / x.shape[0],
        "dead": float((density == 0).float().mean()),
        "under": float(under_used(density).float().mean()),
    }


def assigned(a: Tensor, b: Tensor) -> np.ndarray:
    """Return the absolute cosine of each row of `a` with its partner: the best assignment."""
    a, b = (side / side.norm(dim=1, keepdim=True).clamp_min(1e-12) for side in (a, b))
    cosines = (a @ b.mT).abs().numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    best = np.zeros(a.shape[0])
    best[rows] = cosines[rows, columns]
    return best


def recovered(coder: Coder, world: Truth) -> dict[str, float]:
    """Return the share of true features that are found, of all and of the rarer half."""
    assert coder.W_dec is not None
    hits = assigned(world.directions, coder.W_dec.detach()) >= 0.9
    return {"recovered": float(hits.mean()), "recovered_rare": float(hits[len(hits) // 2 :].mean())}


def on_the_model(
    coder: Coder, model: Model, sequences: list[Tensor], mean: Tensor
) -> dict[str, Any]:
    """Return the loss recovered and the think-tag features under each rule."""
    silent = new_coder(coder.d_in, 1, 1, seed=0)
    with torch.no_grad():
        silent.encoder.bias.fill_(-1e9)
        silent.b_dec.copy_(mean)
    ablated = loss_change(model, {POINT: silent.requires_grad_(False)}, sequences)[POINT]
    changed = loss_change(model, {POINT: coder}, sequences)[POINT]
    counts = count_features(model, {POINT: coder}).layers[0].features
    return {
        "loss_recovered": 1 - changed / ablated,
        "counts": {rule: len(found) for rule, found in counts.items()},
    }


def run(work: Path, worlds: Sequence[str], seeds: Sequence[int]) -> None:
    """Do the cells that are missing, seed by seed.  Several processes share them."""
    torch.set_num_threads(1)
    if "real" in worlds:
        share(work, {"tokens": lambda: real_tokens(work, load_model("tiny-reasoner"))})
    share(work, {
        name_of(*place): partial(cell, work, *place)
        for seed in seeds for world in worlds for activation, aux in ARMS
        for place in ((world, activation, aux, seed),)
    })  # fmt: skip


def name_of(world: str, activation: str, aux: str, seed: int) -> str:
    """Return the name of a cell and of its files."""
    return f"{world}-{activation.replace(' ', '-')}-{aux}-{seed}"


def cell(work: Path, world: str, activation: str, aux: str, seed: int) -> None:
    """Train and measure one SAE, unless that was done."""
    name = name_of(world, activation, aux, seed)
    file = work / f"{name}.json"
    if file.exists():
        return
    steps = STEPS[world]
    if world == "planted":
        real, features = None, truth()
        held = planted_tokens(features, HELD[world], torch.Generator().manual_seed(10**6))
        generator = torch.Generator().manual_seed(seed)
        batches = iter(lambda: planted_tokens(features, ROWS, generator), None)
    else:
        model = load_model("tiny-reasoner")
        train, held, sequences = real_tokens(work, model)
        real, features = (model, sequences, train.mean(0)), None
        order = torch.randperm(train.shape[0], generator=torch.Generator().manual_seed(seed))
        batches = (train[part] for part in order.split(ROWS))
    config = config_of(world, activation, aux, steps)
    began = time.process_time()
    coder = trained(config, batches, steps, seed, frozen=aux == FROZEN)
    training = time.process_time() - began
    values: dict[str, Any] = {"cell": name, **common(coder, held)}
    if features is not None:
        values |= recovered(coder, features)
    if real is not None:
        values |= on_the_model(coder, *real)
    values |= {"cpu_training": round(training, 1), "cpu": round(time.process_time() - began, 1)}
    assert coder.W_dec is not None
    work.mkdir(parents=True, exist_ok=True)
    torch.save(coder.W_dec.detach().clone(), work / f"{name}.pt")
    file.write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps(values), flush=True)


# What the cells say


def collect(work: Path, into: Path) -> None:
    """Write the figures of all cells as one file a world, with the PW-MCC of the seeds."""
    into.mkdir(parents=True, exist_ok=True)
    for world in STEPS:
        cells: dict[str, Any] = {}
        for activation, aux in ARMS:
            stem = f"{world}-{activation.replace(' ', '-')}-{aux}"
            done = [s for s in SEEDS if (work / f"{stem}-{s}.json").exists()]
            if not done:
                continue
            tables = {s: json.loads((work / f"{stem}-{s}.json").read_text()) for s in done}
            decoders = {s: torch.load(work / f"{stem}-{s}.pt") for s in done}
            cells[f"{activation}, {aux}"] = {
                "seeds": {str(s): tables[s] for s in done},
                "pw_mcc": [
                    round(float(assigned(decoders[a], decoders[b]).mean()), 4)
                    for a, b in combinations(done, 2)
                ],
            }
        (into / f"{world}.json").write_text(json.dumps(cells, indent=1) + "\n")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % t interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(half)


def figures(stored: Mapping[str, Any], arm: str, key: str) -> list[float]:
    """Return a figure of an arm, seed by seed; `counts.all` is one of a table."""
    name, _, inner = key.partition(".")
    cells = stored[arm]["seeds"]
    return [cells[s][name][inner] if inner else cells[s][name] for s in sorted(cells)]


def paired(stored: Mapping[str, Any], arm: str, base: str, key: str) -> tuple[float, float, str]:
    """Return the mean paired difference of two arms, half its interval, and what it says."""
    pairs = zip(figures(stored, arm, key), figures(stored, base, key), strict=True)
    mean, half = interval([a - b for a, b in pairs])
    return mean, half, "lower" if mean + half < 0 else "higher" if mean - half > 0 else "open"


def verdict(worlds: Mapping[str, Any], activation: str, aux: str) -> str:
    """Return whether the paper's claim holds of an arm: confirmed, refuted or open."""
    said = [
        [paired(stored, f"{activation}, {aux}", f"topk, {aux}", key)[2] for key in ("dead", "fvu")]
        for stored in worlds.values()
    ]
    if all(word == "lower" for words in said for word in words):
        return "confirmed"
    if any(all(words[place] == "higher" for words in said) for place in (0, 1)):
        return "refuted"
    return "open"


COLUMNS = {
    "planted": {
        "FVU": ("fvu", 1), "dead %": ("dead", 100), "under-used %": ("under", 100),
        "recovered %": ("recovered", 100), "rarer half %": ("recovered_rare", 100),
    },
    "real": {
        "FVU": ("fvu", 1), "dead %": ("dead", 100), "under-used %": ("under", 100),
        "loss recovered %": ("loss_recovered", 100),
    },
}  # fmt: skip


def table(world: str, stored: Mapping[str, Any]) -> list[str]:
    """Return the lines of a world's table."""
    rules = list(next(iter(stored["topk, none"]["seeds"].values())).get("counts", ()))
    heads = [
        "arm",
        "L0",
        *COLUMNS[world],
        "PW-MCC",
        *(["tags " + ", ".join(rules)] if rules else []),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    base = statistics.fmean(figures(stored, "topk, none", "l0"))
    for activation, aux in ARMS:
        arm = f"{activation}, {aux}"
        level = statistics.fmean(figures(stored, arm, "l0"))
        row = [arm, f"{level:.1f}{'*' if abs(level / base - 1) > 0.05 else ''}"]
        for key, scale in COLUMNS[world].values():
            mean, half = interval([scale * value for value in figures(stored, arm, key)])
            digits = 3 if scale == 1 else 1
            row.append(f"{mean:.{digits}f} ± {half:.{digits}f}")
        pairs = stored[arm]["pw_mcc"]
        row.append(f"{statistics.fmean(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})")
        if rules:
            means = (statistics.fmean(figures(stored, arm, f"counts.{rule}")) for rule in rules)
            row.append(", ".join(f"{mean:.1f}" for mean in means))
        lines.append("| " + " | ".join(row) + " |")
    return lines


def comparisons(worlds: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of paired differences with topk and batchtopk."""
    heads = ["arm, same aux", *(f"{w}: {k}" for w in worlds for k in ("dead, points", "FVU"))]
    lines = ["| " + " | ".join([*heads, "claim"]) + " |", "|" + "---|" * (len(heads) + 1)]
    for base in ("topk", "batchtopk"):
        for aux in AUX:
            for activation in list(ACTIVATIONS)[list(ACTIVATIONS).index(base) + 1 :]:
                row = [f"{activation} less {base}, {aux}"]
                for stored in worlds.values():
                    for key, scale, digits in (("dead", 100, 1), ("fvu", 1, 3)):
                        mean, half, word = paired(
                            stored, f"{activation}, {aux}", f"{base}, {aux}", key
                        )
                        row.append(f"{scale * mean:+.{digits}f} ± {scale * half:.{digits}f} {word}")
                row.append(verdict(worlds, activation, aux) if base == "topk" else "")
                lines.append("| " + " | ".join(row) + " |")
    return lines


def analyse(stored: Path = STORED) -> str:
    """Return the tables of what is stored."""
    worlds = {world: json.loads((stored / f"{world}.json").read_text()) for world in STEPS}
    parts = [[f"`{world}`:", "", *table(world, values)] for world, values in worlds.items()]
    return "\n\n".join("\n".join(part) for part in [*parts, comparisons(worlds)])


def speed(steps: int = 15) -> dict[str, tuple[float, float]]:
    """Time a step of each activation, interleaved: median CPU ms, and over batchtopk's."""
    torch.set_num_threads(1)
    width, latents, k = 128, 2048, 32
    x = torch.randn(steps, ROWS, width, generator=torch.Generator().manual_seed(0))
    kinds = {**ACTIVATIONS, "mutual-choice": {"activation": "mutual-choice"}}
    trainers, spent = {}, {name: [] for name in kinds}
    for name, options in kinds.items():
        config = SaeConfig(latents=latents, k=k, **options).for_width(width)
        coder = new_coder(width, latents, k, seed=0, activation=config.activation)
        trainers[name] = LayerTrainer(coder, config, steps)
    for batch in x:
        for name, trainer in trainers.items():
            began = time.process_time()
            trainer.step(batch)
            spent[name].append(time.process_time() - began)
    medians = {name: 1000 * statistics.median(times[2:]) for name, times in spent.items()}
    return {name: (value, value / medians["batchtopk"]) for name, value in medians.items()}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("run", "collect", "analyse", "speed"))
    parser.add_argument("--work", type=Path, default=Path("allocation-work"))
    parser.add_argument("--world", choices=tuple(STEPS), action="append")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    args = parser.parse_args()
    if args.command == "run":
        run(args.work, args.world or tuple(STEPS), args.seeds)
    elif args.command == "collect":
        collect(args.work, STORED)
    elif args.command == "speed":
        for name, (value, ratio) in speed().items():
            print(f"{name:20} {value:7.1f} ms  {ratio:.2f}")
    else:
        print(analyse())


if __name__ == "__main__":
    main()
