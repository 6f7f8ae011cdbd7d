"""The insertion test: what an SAE could teach, before anything is tuned through it.

One arm is one pass over the questions: the target as it is, and with the SAE or a control in its
activations' place.  A killed run keeps its finished arms, and the same command goes on after them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.insertion import Insertion
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.errors import BadInputError
from resa_lens.evals.config import EvalConfig
from resa_lens.evals.insertion import GAIN, MeanAblation, evaluate_inserted, insertion_verdict
from resa_lens.evals.run import read_samples, write_samples
from resa_lens.evals.tasks import EvalItem
from resa_lens.files import write_errors
from resa_lens.models.activations import stream_activations
from resa_lens.models.bounds import check_shapes
from resa_lens.models.hookpoints import Hookpoint, describe_layer
from resa_lens.models.host import Model
from resa_lens.saes.baselines import Noise, match_fvu, pca
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.quality import measure_quality
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.config import InsertionConfig as InsertionConfig
from resa_lens.stages.sae_training import saes_for
from resa_lens.stages.saes import SaeRun, phased_corpus, split_records
from resa_lens.stages.scores import (
    chosen_questions,
    expect_answers,
    load_eval_items,
    questions_hash,
)
from resa_lens.stats import compare_paired, mean_interval
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig, Record
from resa_lens.texts.phases import PhasedBatch, phased_batches, phased_texts

SAMPLE_ROWS = 8
"""Tokens of activations for each dimension, which PCA is fitted and controls are matched on."""
SHORT, SHORT_TOKENS = 200, 4096
"""Questions of the short form at most, and tokens of its documents."""


@dataclass(frozen=True)
class InsertionRun:
    """The insertion test of one or several layers."""

    artifact: Artifact
    layers: list[dict[str, Any]]
    """As in `artifacts.kinds.insertion.LayerInsertion`."""
    base: dict[str, Any]
    """Accuracy, n and interval of the target as it is."""

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that the command line promises."""
        return {
            **{key: self.artifact.manifest.results[key] for key in ("model", "source", "site")},
            "base": self.base,
            "layers": self.layers,
            "folder": str(self.artifact.path),
        }

    def start(self) -> dict[str, Any]:
        """Return what `tune` says of the layer that it begins with."""
        (row,) = self.layers
        return {
            "kl": {"tuning": row["kl_tuning"], "thoughts": row["kl_thoughts"]},
            "fvu": row["fvu"],
            "ablation": {name: cost["loss"] for name, cost in row["ablation"].items()},
            "insertion": {
                "base": self.base, **row["inserted"],
                "verdict": row["verdict"], "reason": row["reason"],
            },
        }  # fmt: skip


def insertion_run(
    ctx: Context,
    target: Model,
    saes: SaeRun,
    items: Sequence[EvalItem],
    corpus: CorpusConfig,
    config: InsertionConfig,
    *,
    layers: Sequence[int] | None = None,
    source: Model | None = None,
    tasks: str = "tiny",
) -> InsertionRun:
    """Insert SAEs and their controls into a model that answers, or read the finished test.

    Args:
        ctx: the workspace and who to tell.
        target: the model that answers.
        saes: the SAEs that are inserted.
        items: the questions; `config.eval` chooses among them.
        corpus: the documents; of records with worked steps the thoughts are looked at too.
        config: what is inserted, read and asked.
        layers: 0-based; all that have an SAE by default.
        source: the model whose SAEs they are; the target by default.
        tasks: the questions' name, for the manifest.

    Raises:
        BadInputError: no SAE at a layer, models of different shapes, or no question that fits.
        TakenError: another process is at this very test.
    """
    check_shapes(source or target, target)
    places = [p for p in saes.points if layers is None or p.layer in layers]
    if missing := sorted(set(layers or ()) - {p.layer for p in places}):
        raise BadInputError(
            f"{saes.folder} has no SAE at {describe_layer(missing[0], target.n_layers)}"
        )
    scored = config.eval
    items, prompts, every = chosen_questions(ctx, target, items, scored)
    corpus = phased_corpus(corpus, target)
    records = split_records(corpora.read_records(corpus))[1]
    other = source if source is not None and source is not target else None
    stage = ctx.stage(
        Insertion,
        target,
        name=f"{saes.site}-{config.arms}",
        config={
            "insertion": config, "corpus": corpus, "layers": [p.layer for p in places],
            "source": other.contents if other else None,
        },
        data={
            "data": corpora.hash_records(records),
            "questions": questions_hash(items, sampled=scored.generation.temperature > 0),
        },
        parents={"saes": saes.parent([p.layer for p in places])},
        settings={"insertion": asdict(config), "corpus": asdict(corpus), "questions": tasks,
                  "source": (other or target).name},
    )  # fmt: skip

    def work(draft: Draft) -> None:
        arms = 1 + len(places) * (2 if config.arms == "short" else 7)
        expect_answers(draft, target, prompts, every, arms)
        test = _Test(ctx, target, other, saes, items, records, corpus, config, draft.work)
        rows = [test.layer(point) for point in places]
        draft.results = {
            "layers": rows,
            "base": _share(test.arm("base", None, None)),
            "site": saes.site,
            "model": target.name,
            "source": (other or target).name,
            "n_layers": target.n_layers,
        }

        def write(folder: Path) -> None:
            for file in draft.work.glob("*.parquet"):
                shutil.copy2(file, folder)

        draft.write(write)

    artifact = stage.obtain(work, doing="inserting SAEs")
    results = artifact.manifest.results
    return InsertionRun(artifact, list(results["layers"]), dict(results["base"]))


def starting_point(
    ctx: Context,
    target: Model,
    saes: SaeRun,
    items: Sequence[EvalItem],
    corpus: CorpusConfig,
    evaluation: EvalConfig,
    layers: Sequence[int],
    *,
    source: Model,
    tasks: str,
) -> InsertionRun:
    """Run the short form before a tuning, and warn of layers whose SAE carries no gain.

    Args:
        ctx: the workspace and who to tell; --force is about the tuning.
        target: the model that will be tuned.
        saes: it will be tuned through.
        items: the questions; at most `SHORT` of them are asked.
        corpus: the documents.
        evaluation: how the questions are asked.
        layers: 0-based.
        source: the SAEs' model.
        tasks: the questions' name.
    """
    asking = replace(evaluation, limit=min(SHORT, evaluation.limit or SHORT))
    config = InsertionConfig(arms="short", tokens=SHORT_TOKENS, eval=asking, seed=ctx.seed)
    run = insertion_run(
        replace(ctx, force=False), target, saes, items, corpus, config, layers=layers,
        source=source, tasks=tasks,
    )  # fmt: skip
    for row in run.layers:
        where = describe_layer(row["layer"], target.n_layers)
        warning = "" if row["verdict"] == GAIN else "warning: nothing to hand on is shown, "
        ctx.reporter.note(f"{where}: {warning}{row['verdict']}: {row['reason']}")
    return run


def measure_gains(
    ctx: Context,
    target: Model,
    source: Model,
    corpus: CorpusConfig,
    evaluation: EvalConfig | None = None,
) -> Callable[[SaeRun, Sequence[int]], dict[int, tuple[float, float]]]:
    """Return what the selector insertion asks for: the short form at the layers of some SAEs.

    Args:
        ctx: the workspace and who to tell.
        target: the model that answers; bundled questions are asked.
        source: the SAEs' model.
        corpus: the documents.
        evaluation: how they are asked.
    """

    def measure(saes: SaeRun, layers: Sequence[int]) -> dict[int, tuple[float, float]]:
        items = load_eval_items("tiny", evaluation or EvalConfig())
        run = starting_point(
            ctx, target, saes, items, corpus, evaluation or EvalConfig(), layers, source=source,
            tasks="tiny",
        )  # fmt: skip
        return gains(run)

    return measure


def _share(arm: dict[str, Any]) -> dict[str, Any]:
    return {key: arm[key] for key in ("accuracy", "n", "ci")}


def own_training(
    training: tuple[SaeConfig, CorpusConfig] | None,
    site: str,
    coder: SparseCoder,
    corpus: CorpusConfig,
    seed: int,
) -> tuple[SaeConfig, CorpusConfig]:
    """Return how an SAE of the target is trained that stands beside the source's.

    Args:
        training: how the source's were trained, where that is known; theirs is taken then.
        site: their place in a layer.
        coder: one of them, whose size is taken.
        corpus: the documents.
        seed: of the training.
    """
    config, data = training or (SaeConfig(seed=seed), replace(corpus, thought_share=None))
    return replace(config, site=site, latents=coder.num_latents, k=coder.cfg.k), data


@dataclass
class _Test:
    """The arms of one insertion test, each run once."""

    ctx: Context
    target: Model
    other: Model | None
    """The source where it is another model."""
    saes: SaeRun
    items: list[EvalItem]
    records: Sequence[Record]
    corpus: CorpusConfig
    config: InsertionConfig
    work: Path

    def arm(self, name: str, point: Hookpoint | None, inserted: Any) -> dict[str, Any]:
        """Score one arm, or read it."""
        file = self.work / f"{name.replace(' ', '-')}.parquet"
        if file.is_file():
            return _arm_of(read_samples(file))
        before = 0
        with self.ctx.bar(f"inserted: {name}", len(self.items)) as advance:

            def progress(done: int, total: int) -> None:
                nonlocal before
                advance(done - before)
                before = done

            config = replace(self.config.eval, limit=None, levels=None)
            result = evaluate_inserted(self.target, self.items, config, point, inserted, progress)
        with write_errors(self.work):
            write_samples(result, file)
        return _arm_of(result.samples)

    def layer(self, point: Hookpoint) -> dict[str, Any]:
        """Measure one layer's SAE."""
        coder = self.saes.coders(self.other or self.target, [point.layer])[point]
        worked, free = self.documents(1.0), self.documents(0.0)
        quality = measure_quality(self.target, {point: coder}, worked)[point].phases
        thoughts = quality.get("think") if any(record.steps for record in self.records) else None
        tuning = measure_quality(self.target, {point: coder}, free)[point].all
        ablated = "zero", "mean"
        arms: dict[str, Any] = {}
        for name, inserted in self.replacements(point, coder):
            arms[name] = self.against_base(f"{name} L{point.layer}", point, inserted)
        verdict = insertion_verdict(tuple(arms["sae"]["difference_ci"]), one_model=not self.other)
        costs = {"zero": thoughts.ablation_change if thoughts else None}
        if "mean" in arms:
            mean = {point: MeanAblation(self.sample(self.target, point).mean(0))}
            by_phase = measure_quality(self.target, mean, worked)[point].phases
            costs["mean"] = by_phase["think"].loss_change if thoughts else None
        row = {
            "layer": point.layer,
            "kl_tuning": tuning.kl,
            "kl_thoughts": thoughts.kl if thoughts else None,
            "fvu": {phase: figures.fvu for phase, figures in quality.items()},
            "ablation": {
                name: {"loss": loss, "accuracy": arms.get(name)} for name, loss in costs.items()
            },
            "inserted": {name: arm for name, arm in arms.items() if name not in ablated},
            "verdict": verdict,
        }
        return {**row, "reason": reason_of(row)}

    def against_base(self, name: str, point: Hookpoint, inserted: Any) -> dict[str, Any]:
        """Score one arm beside the target as it is, question by question."""
        base, scored = self.arm("base", None, None), self.arm(name, point, inserted)
        paired = compare_paired(base["correct"], scored["correct"], self.config.seed)
        return {
            **_share(scored), "difference": paired.difference, "difference_ci": list(paired.ci),
            "difference_se": standard_error(base["correct"], scored["correct"]),
            "p_value": paired.p_value,
        }  # fmt: skip

    def replacements(self, point: Hookpoint, coder: SparseCoder) -> Iterator[tuple[str, Any]]:
        """Yield what stands in the activations' place, one after another."""
        yield "sae", coder
        yield "noise", Noise(coder, self.config.seed)
        if self.config.arms == "short":
            return
        yield "pca", pca(self.sample(self.other or self.target, point), coder)
        acts = self.sample(self.target, point)
        yield "zero", MeanAblation(torch.zeros_like(acts[0]))
        yield "mean", MeanAblation(acts.mean(0))
        if self.other is None:
            return
        yield "own", match_fvu(self.own(point, coder), coder, acts)
        yield "oracle", self.other

    def own(self, point: Hookpoint, coder: SparseCoder) -> SparseCoder:
        """Return an SAE of the target, trained as the source's was where that is known."""
        training = own_training(
            self.saes.training(), point.site, coder, self.corpus, self.config.seed
        )
        run = saes_for(replace(self.ctx, force=False), self.target, [point.layer], *training)
        return run.coders(self.target, [point.layer])[point]

    def documents(self, thought_share: float) -> list[PhasedBatch]:
        """Return held-out documents with their worked steps, or CoT-free."""
        records = self.records
        if not thought_share:
            records = [replace(record, steps="") for record in records]
        return phased_batches(
            self.target.tokenizer, phased_texts(records, self.corpus), tokens=self.config.tokens,
            longest=self.corpus.sequence,
        )  # fmt: skip

    def sample(self, model: Model, point: Hookpoint) -> Tensor:
        """Return activations of a model on documents with worked steps, [token, d_model]."""
        tokens = SAMPLE_ROWS * max(model.d_model, self.corpus.sequence)
        corpus = replace(self.corpus, thought_share=1.0)
        ids = corpora.batches(model.tokenizer, self.records, corpus, tokens=tokens, batch=2)
        parts = stream_activations(model, ids, [point])
        return torch.cat([part.acts[point].flatten(0, 1) for part in parts])


def _arm_of(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return an arm's score and each question's, in the order of their ids."""
    by_question: dict[str, list[float]] = {}
    for row in samples:
        by_question.setdefault(row["id"], []).append(float(row["correct"]))
    means = [sum(values) / len(values) for _, values in sorted(by_question.items())]
    return {
        "accuracy": sum(means) / len(means),
        "n": len(means),
        "ci": list(mean_interval(means)),
        "correct": means,
    }


def reason_of(row: dict[str, Any]) -> str:
    """Return one sentence on what a layer's SAE does when it is inserted."""
    sae, noise = row["inserted"]["sae"], row["inserted"]["noise"]
    low, high = (100 * bound for bound in sae["difference_ci"])
    divergence = "" if row["kl_tuning"] is None else f"; KL {row['kl_tuning']:.2g} nats a token"
    if row["kl_thoughts"] is not None:
        divergence += f", on thoughts {row['kl_thoughts']:.2g}"
    return (
        f"with the SAE inserted accuracy changes by {100 * sae['difference']:+.1f} points "
        f"({low:+.1f} to {high:+.1f}, n = {sae['n']}), with noise as long as its error by "
        f"{100 * noise['difference']:+.1f}{divergence}"
    )


def standard_error(base: Sequence[float], other: Sequence[float]) -> float:
    """Return the standard error of a paired difference of accuracies over questions."""
    differences = np.subtract(other, base)
    n = differences.size
    return float(differences.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf


def gains(run: InsertionRun) -> dict[int, tuple[float, float]]:
    """Return {0-based layer: (change of accuracy, its standard error)}, for the selector.

    Where no answer changed the error is that of one changed answer: none was seen, which is not
    the same as that there is none.
    """
    table = {}
    for row in run.layers:
        arm = row["inserted"]["sae"]
        table[int(row["layer"])] = arm["difference"], arm["difference_se"] or 1 / arm["n"]
    return table
