"""SAE-Tuning of a model through a recommended layer, scored before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from resa_lens import corpora, prompts
from resa_lens.activations import stream_activations
from resa_lens.corpora import CorpusConfig, Record
from resa_lens.errors import BadInputError
from resa_lens.evals.run import EvalConfig, EvalResult
from resa_lens.hookpoints import Hookpoint, describe_layer, parse_layer
from resa_lens.models import Model, load_model
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.discovery import discover, newest_recommendation
from resa_lens.pipeline.sae_training import saes_for
from resa_lens.pipeline.saes import fit_corpus, probe_batches, split_records
from resa_lens.pipeline.scores import compare_results, eval_run, load_eval_items
from resa_lens.saes.baselines import Replacement, baselines, fvu_on
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.fit import check_fit
from resa_lens.saes.train import SaeConfig
from resa_lens.stats import PairedComparison
from resa_lens.tuning.objective import Objective
from resa_lens.tuning.train import TuneConfig, lora_targets, save_adapter, tune
from resa_lens.workspace import Manifest, config_dict, digest


@dataclass(frozen=True)
class TuneJob:
    """One tuning: where, with what, how long."""

    model: str
    layer: str = "auto"
    """"auto", 0-based number, or 1-based ordinal."""
    selector: str = "given"
    """What chose a layer that is not "auto"."""
    reason: str = "as given"
    source_model: str | None = None
    """The model whose SAE is inserted; the target itself by default."""
    objective: Objective = field(default_factory=Objective)
    lora: TuneConfig = field(default_factory=TuneConfig)
    sae: SaeConfig = field(default_factory=SaeConfig)
    trigger: CorpusConfig = field(default_factory=CorpusConfig)
    elicitation: CorpusConfig = field(default_factory=CorpusConfig)
    steps: int | None = None
    """None: two epochs (Table 7) from width 1,024 on, 100 steps below."""
    saes: str | None = None
    control: str | None = None
    """Insert a control of the same FVU in the SAE's place: a name of saes/baselines.py."""
    base: str | None = None
    allow_mismatch: bool = False
    evaluation: EvalConfig = field(default_factory=lambda: EvalConfig(limit=500))
    eval_source: str = "tiny"


@dataclass(frozen=True)
class Tuned:
    """The adapter and the scores before and after."""

    adapter: Path
    model: Model
    layer: int
    site: str
    base: EvalResult
    base_folder: Path
    tuned: EvalResult
    tuned_folder: Path
    paired: PairedComparison
    losses: tuple[float, ...]
    selector: str
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that the command line promises."""

        def short(result: EvalResult) -> dict[str, Any]:
            return {"accuracy": result.accuracy, "n": result.n, "ci": list(result.ci)}

        paired = self.paired
        return {
            "adapter": str(self.adapter),
            "model": self.model.name,
            "layer": self.layer,
            "layer_1_indexed": self.layer + 1,
            "site": self.site,
            "base": short(self.base),
            "tuned": short(self.tuned),
            "paired": {
                "difference": paired.difference,
                "ci": list(paired.ci),
                "p_value": paired.p_value,
                "changed": paired.changed,
                "gained": paired.gained,
                "lost": paired.lost,
                "n": paired.n,
                "note": paired.note,
            },
            "selector": self.selector,
            "note": self.note,
            "evals": [str(self.base_folder), str(self.tuned_folder)],
            "steps": len(self.losses),
            "loss": [self.losses[0], self.losses[-1]],
        }


def _auto_layer(ctx: Context, source: Model, job: TuneJob) -> tuple[int, str, str]:
    """Return layer, selector and what to say, of the newest recommendation or of a new one."""
    site = job.objective.site
    found = newest_recommendation(ctx, source, site)
    if found:
        results = found[1].results
        layer, selector = int(results["recommended"][0]), str(results["selector"])
        return layer, selector, f"{results['reason']} (from {found[0]})"
    ctx.reporter.note(f"recommendation: none for {source.slug} at site {site}; making one")
    made = discover(
        ctx,
        source,
        sae=replace(job.sae, site=site),
        corpus=job.trigger,
        saes=job.saes,
        allow_mismatch=job.allow_mismatch,
    ).recommendation
    return made.recommended[0], made.selector, made.reason


def tune_run(ctx: Context, job: TuneJob) -> Tuned:
    """Tune adapters through the SAE of a layer and score base and tuned on the same questions."""
    site = job.objective.site
    records = corpora.load_records(
        job.elicitation.source,
        question_column=job.elicitation.question_column,
        answer_column=job.elicitation.answer_column,
    )
    items = load_eval_items(job.eval_source, job.evaluation)
    if job.control not in (None, *CONTROLS):
        raise BadInputError(f"control {job.control!r} is unknown; use {', '.join(CONTROLS)}")
    target = ctx.model(job.model, job.base)
    if target.peft is not None:
        raise BadInputError(
            f"{job.model} is an adapter; tune its base model (adapters on adapters are not stacked)"
        )
    lora_targets(target.model, job.objective.targets)
    source = ctx.model(job.source_model) if job.source_model else target
    if (source.d_model, source.n_layers) != (target.d_model, target.n_layers):
        raise BadInputError(
            f"source {source.name} has {source.n_layers} layers x {source.d_model}, target "
            f"{target.name} {target.n_layers} x {target.d_model}; they must be of one shape"
        )
    if job.layer == "auto":
        layer, selector, note = _auto_layer(ctx, source, job)
    else:
        layer = parse_layer(job.layer, target.n_layers)
        selector, note = job.selector, job.reason
    ctx.reporter.note(f"{describe_layer(layer, target.n_layers)}, selector {selector}: {note}")
    sae_config = replace(job.sae, site=site)
    run = saes_for(
        ctx,
        source,
        [layer],
        sae_config,
        job.trigger,
        job.saes,
        allow_mismatch=job.allow_mismatch,
        only=[layer],
    )
    point = Hookpoint(layer, site)
    coder = run.coders(source, [layer])[point]
    probe = probe_batches(target, split_records(records)[1], job.elicitation)
    _, warnings = check_fit(
        target,
        {point: coder},
        probe,
        allow_mismatch=job.allow_mismatch,
        known=run.trained_on(target),
    )
    for warning in warnings:
        ctx.reporter.note(f"warning: {warning}")
    inserted: SparseCoder | Replacement = coder
    if job.control is not None:
        inserted = control_for(ctx, target, point, coder, job, records)
    corpus = fit_corpus(job.elicitation, target)
    steps = job.steps or default_steps(target, records, corpus, job.lora)
    identity = {
        "layer": layer,
        "objective": config_dict(job.objective),
        "lora": config_dict(job.lora),
        "elicitation": config_dict(corpus),
        "data": corpora.hash_records(records),
        "steps": steps,
        "sae": ctx.workspace.relative(run.folder),
        "source": source.slug,
        "dtype": target.dtype,
        **({"control": job.control} if job.control else {}),
    }
    name = f"{target.slug}-{job.objective.preset}-{site}-L{layer:02d}-{digest(identity)}"
    folder = ctx.workspace.path("adapters", name)
    manifest = ctx.done(folder, run.folder)
    if manifest:
        ctx.reporter.note(f"adapter: done before, in {folder}")
    else:
        manifest = _train_adapter(
            ctx,
            job,
            target,
            inserted,
            point,
            records,
            corpus,
            steps,
            identity,
            folder,
            parents=[ctx.workspace.relative(run.folder)],
            warnings=warnings,
        )
    plain = ctx.model(job.model, job.base)
    base_folder, base = eval_run(
        ctx, plain, items, job.evaluation, source=job.eval_source, label="the base model"
    )
    adapted = load_model(
        str(folder), device=ctx.device, dtype=ctx.dtype, base=job.base or job.model
    )
    tuned_folder, tuned = eval_run(
        ctx, adapted, items, job.evaluation, source=job.eval_source, label="the tuned model"
    )
    return Tuned(
        adapter=folder,
        model=target,
        layer=layer,
        site=site,
        base=base,
        base_folder=base_folder,
        tuned=tuned,
        tuned_folder=tuned_folder,
        paired=compare_results(base, tuned, ctx.seed),
        losses=tuple(manifest.results["losses"]),
        selector=selector,
        note=note,
    )


CONTROLS = ("noise", "pca", "shuffled", "random")


def control_for(
    ctx: Context,
    model: Model,
    point: Hookpoint,
    coder: SparseCoder,
    job: TuneJob,
    records: Sequence[Record],
) -> Replacement:
    """Return the control that the job names, matched to the SAE's FVU on its own activations."""
    corpus = fit_corpus(job.elicitation, model)
    # PCA needs several times as many tokens as dimensions.
    tokens = 8 * max(model.d_model, corpus.sequence)
    ids = corpora.batches(model.tokenizer, records, corpus, tokens=tokens, batch=2)
    rows = [b.acts[point].flatten(0, 1) for b in stream_activations(model, ids, [point])]
    sample = torch.cat(rows)
    made = baselines(coder, sample, ctx.seed)
    assert job.control is not None
    chosen = made[job.control]
    ctx.reporter.note(
        f"control {job.control} in the SAE's place: FVU {fvu_on(chosen, sample):.4f} on "
        f"{len(sample)} tokens, the SAE's {fvu_on(coder, sample):.4f}"
    )
    return chosen


def default_steps(
    model: Model, records: Sequence[Record], corpus: CorpusConfig, lora: TuneConfig
) -> int:
    """Return the steps of two epochs for a wide model, 100 for a narrow one."""
    if model.d_model < 1024:
        return 100
    tokenizer: Any = model.tokenizer
    system = len(tokenizer(prompts.resolve_system_prompt(corpus.system_prompt))["input_ids"])
    sample = records[:200]
    texts = [prompts.trigger_document(r.question, r.answer) for r in sample]
    length = sum(len(ids) for ids in tokenizer(texts)["input_ids"]) / len(sample)
    tokens = len(records) * (length + 1 + corpus.system_share * system)
    return max(1, math.ceil(2 * tokens / (lora.batch * corpus.sequence)))


def _train_adapter(
    ctx: Context,
    job: TuneJob,
    target: Model,
    coder: SparseCoder | Replacement,
    point: Hookpoint,
    records: Sequence[Record],
    corpus: CorpusConfig,
    steps: int,
    identity: dict[str, Any],
    folder: Path,
    *,
    parents: list[str],
    warnings: list[str],
) -> Manifest:
    # PEFT changes the module in place: the shared model stays plain.
    fresh = load_model(job.model, device=ctx.device, dtype=ctx.dtype, base=job.base)
    label = f"tuning through layer {point.layer} ({job.objective.preset}, {steps} steps)"
    with ctx.reporter.bar(label, steps) as advance:
        peft, course = tune(
            fresh,
            coder,
            point,
            corpora.batches(
                fresh.tokenizer,
                records,
                corpus,
                tokens=steps * job.lora.batch * corpus.sequence,
                batch=job.lora.batch,
            ),
            steps,
            job.objective,
            job.lora,
            advance=advance,
        )
    manifest = ctx.manifest(
        "adapter",
        target,
        parents=parents,
        hashes={"data": identity["data"]},
        config={**identity, "base_hash": target.weights_hash, "base": str(target.folder)},
        results={
            "losses": list(course.losses),
            "grad_norms": list(course.grad_norms),
            "tokens": course.tokens,
            "trainable": course.trainable,
            "layer": point.layer,
            "site": point.site,
            "model": target.name,
            "n_layers": target.n_layers,
            "warnings": warnings,
        },
    )
    manifest.seconds = round(course.seconds, 3)
    with ctx.workspace.artifact(folder, manifest) as temporary:
        save_adapter(peft, temporary, target.folder)
    return manifest
