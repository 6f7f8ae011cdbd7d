"""What a sweep says: score by layer, the layer effect, the counts, selectors and controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resa_lens import stats
from resa_lens.artifacts.kinds.sweep import ANSWERS, SCORES, SWEEP, SweepTables
from resa_lens.errors import BadInputError
from resa_lens.evals.compare import RunScores, check_paired, run_scores
from resa_lens.files import write_json
from resa_lens.layers.selectors import Effect, regrets_of_selectors

if TYPE_CHECKING:
    # The feature explorer reads sweeps, and never loads torch.
    from resa_lens.evals.run import EvalResult


@dataclass(frozen=True)
class JobScores:
    """One finished job; paths relative to the workspace."""

    name: str
    layer: int | None
    """0-based; None where no SAE was used."""
    seed: int
    control: str | None
    adapter: str
    eval: str


def analyse(
    *,
    base: EvalResult,
    runs: Mapping[str, RunScores],
    jobs: Sequence[JobScores],
    failed: Mapping[str, str],
    n_layers: int,
    counts: Mapping[str, Mapping[int, float]],
    rule: str,
    quality: Mapping[int, float],
    causal: Mapping[int, Effect] | None,
    insertion: Mapping[int, Effect] | None = None,
    gradient: Mapping[int, Effect] | None = None,
    change: Mapping[int, Effect] | None = None,
    fvu: Mapping[int, float],
    seed: int,
) -> SweepTables:
    """Compute every result of a sweep from its evaluations.

    Args:
        base: of the model without adapter.
        runs: answers by the jobs' names.
        jobs: the finished ones; layers that miss a seed are left out of the tests.
        failed: reasons by name.
        n_layers: of the model.
        counts: features by rule and layer.
        rule: whose counts the selectors see.
        quality: change of the loss with the SAE inserted, by layer.
        causal: effects by layer, for the selectors causal and blend.
        insertion: changes of accuracy with the SAE inserted, for the selector of that name.
        gradient: norms of weight gradients by layer, for the selector gradient-probe.
        change: changes of activations from source to target, for activation-change.
        fvu: of the SAEs.
        seed: of all draws.
    """
    told = _told(base, runs)
    base_Q = told["base"].means

    def answers(names: Sequence[str]) -> NDArray[np.float64]:
        return np.stack([told[name].means for name in names])

    seeds = sorted({job.seed for job in jobs})
    through = _grid([job for job in jobs if job.control is None], seeds)
    if not through:
        raise BadInputError("no layer of the sweep has all its seeds; start the sweep again")
    layers = sorted(layer for layer in through if layer is not None)
    scores_LSQ = np.stack([answers(through[layer]) for layer in layers])
    means = {x: scores_LSQ[i].mean(axis=1) for i, x in enumerate(layers)}
    found = stats.sweep_differences(scores_LSQ, base_Q, seed=seed)
    # Seeds that all answer alike are no measure of noise: the regrets then have no intervals.
    same = all(np.ptp(values) == 0 for values in means.values())
    regrets, made = regrets_of_selectors(
        {layer: 100 * values.mean() for layer, values in means.items()}
        if same
        else {layer: (100 * values).tolist() for layer, values in means.items()},
        n_layers=n_layers,
        counts={layer: counts[rule][layer] for layer in layers},
        quality={layer: quality[layer] for layer in layers},
        causal=None if causal is None else {layer: causal[layer] for layer in layers},
        insertion=None if insertion is None else {layer: insertion[layer] for layer in layers},
        gradient=None if gradient is None else {layer: gradient[layer] for layer in layers},
        change=None if change is None else {layer: change[layer] for layer in layers},
        seed=seed,
    )
    flat = {layer: float(values.mean()) for layer, values in means.items()}
    return SweepTables.model_validate(
        {
            "n": len(base_Q),
            "n_layers": n_layers,
            "base": {"accuracy": base.accuracy, "n": base.n, "ci": list(base.ci)},
            "jobs": [
                {**asdict(job), "accuracy": float(runs[job.name].means.mean()), "n": len(base_Q)}
                for job in jobs
            ],
            "layers": _layer_rows(layers, flat, found),
            "controls": _control_rows(
                jobs, seeds, answers, base_Q, dict(zip(layers, scores_LSQ, strict=True)), seed
            ),
            "effect": asdict(stats.layer_effect(scores_LSQ, seed=seed))
            if len(layers) > 1
            else None,
            "correlations": {
                name: asdict(
                    stats.profile_correlation(
                        [flat[x] for x in layers], [table[x] for x in layers], seed=seed
                    )
                )
                for name, table in counts.items()
                if len(layers) > 3
            },
            "regrets": regrets.to_dict(),
            "reasons": {name: answer.reason for name, answer in made.items()},
            "power": asdict(stats.sweep_power(scores_LSQ, base_Q)),
            "counts": {
                name: {x: float(v) for x, v in table.items()} for name, table in counts.items()
            },
            "fvu": dict(fvu),
            "failed": dict(failed),
        }
    )


def _told(base: EvalResult, runs: Mapping[str, RunScores]) -> dict[str, RunScores]:
    """Return every run's answers, on the same questions in the same order."""
    told = {"base": run_scores("base", base.samples), **runs}
    check_paired(list(told.values()))
    return told


def _grid(jobs: Sequence[JobScores], seeds: Sequence[int]) -> dict[int | None, list[str]]:
    """Return the jobs' names by layer, in the seeds' order, where no seed is missing."""
    names: dict[int | None, dict[int, str]] = {}
    for job in jobs:
        names.setdefault(job.layer, {})[job.seed] = job.name
    return {
        layer: [held[seed] for seed in seeds]
        for layer, held in names.items()
        if set(held) == set(seeds)
    }


def _layer_rows(
    layers: Sequence[int], means: Mapping[int, float], found: Any
) -> list[dict[str, Any]]:
    keys = ("difference", "ci", "simultaneous_ci", "p_value", "adjusted_p")
    return [
        {
            "layer": layer,
            "layer_1_indexed": layer + 1,
            "accuracy": means[layer],
            **{key: getattr(found, key)[i] for key in keys},
            "seed_sd": found.seed_sd,
            "seeds": found.seeds,
            "n": found.n,
        }
        for i, layer in enumerate(layers)
    ]


def _control_rows(
    jobs: Sequence[JobScores],
    seeds: Sequence[int],
    answers: Any,
    base_Q: NDArray[np.float64],
    through: Mapping[int, NDArray[np.float64]],
    seed: int,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for control in dict.fromkeys(job.control for job in jobs if job.control):
        grid = _grid([job for job in jobs if job.control == control], seeds)
        for layer, names in grid.items():
            own_SQ = answers(names)
            to_base = stats.sweep_differences(own_SQ[None], base_Q, seed=seed)
            row = {
                "control": control,
                "layer": layer,
                "accuracy": float(own_SQ.mean()),
                "difference": to_base.difference[0],
                "ci": to_base.ci[0],
                "p_value": to_base.p_value[0],
                "seeds": len(names),
                "n": len(base_Q),
                "sae_minus_control": None,
            }
            if layer is not None and layer in through:
                beside = stats.group_difference(own_SQ, through[layer])
                row["sae_minus_control"] = {
                    "difference": beside.difference,
                    "ci": beside.ci,
                    "p_value": beside.p_value,
                }
            rows.append(row)
    adjusted = stats.holm([row["p_value"] for row in rows]) if rows else []
    for row, value in zip(rows, adjusted, strict=True):
        row["adjusted_p"] = float(value)
    pairs = [row["sae_minus_control"] for row in rows if row["sae_minus_control"]]
    adjusted = stats.holm([pair["p_value"] for pair in pairs]) if pairs else []
    for pair, value in zip(pairs, adjusted, strict=True):
        pair["adjusted_p"] = float(value)
    return rows


def write_tables(
    sweep: SweepTables, base: EvalResult, runs: Mapping[str, RunScores], folder: Path
) -> None:
    """Write the sweep's JSON, its table of scores, and each run's answers by question."""
    write_json(folder / SWEEP, sweep.to_dict())
    header = ("job", "layer", "layer_1_indexed", "seed", "control", "accuracy", "n")
    lines = [",".join(header)]
    for job in sweep.jobs:
        place = ("", "") if job["layer"] is None else (job["layer"], job["layer"] + 1)
        cells = (job["name"], *place, job["seed"], job["control"] or "")
        lines.append(",".join(map(str, (*cells, f"{job['accuracy']:.6f}", job["n"]))))
    (folder / SCORES).write_text("\n".join(lines) + "\n")
    # All that the statistics need, at a hundredth of the size of the evaluations.
    told = _told(base, runs)
    columns: dict[str, Any] = {"id": [question.id for question in told["base"].questions]}
    columns |= {name: run.means for name, run in told.items()}
    pq.write_table(pa.table(columns), folder / ANSWERS, compression="zstd")
