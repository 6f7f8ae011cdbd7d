"""Adapters in the workspace: through an SAE, a control, or by fine-tuning instead."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resa_lens import corpora, prompts
from resa_lens.corpora import CorpusConfig, Record
from resa_lens.errors import BadInputError
from resa_lens.evals.run import EvalConfig
from resa_lens.hookpoints import Hookpoint, describe_layer, parse_layer
from resa_lens.model_files import hash_files
from resa_lens.models import Model, load_model
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.controls import CONTROLS, replacement_for, sft_examples
from resa_lens.pipeline.discovery import discover, newest_recommendation
from resa_lens.pipeline.sae_training import saes_for
from resa_lens.pipeline.saes import SaeRun, fit_corpus, probe_batches, split_records
from resa_lens.saes.checkpoint import newest, run_lock
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.fit import check_fit
from resa_lens.saes.train import SaeConfig
from resa_lens.saes.world import ALONE, World
from resa_lens.tuning.log import LOG
from resa_lens.tuning.loop import TuneConfig, TuneResult, fit
from resa_lens.tuning.objective import Objective
from resa_lens.tuning.sft import KINDS, OwnConfig, sft_batches, sft_loss
from resa_lens.tuning.train import add_lora, lora_targets, save_adapter, tune
from resa_lens.workspace import Manifest, config_dict, digest

ALL_CONTROLS = (*CONTROLS, *KINDS)
WORK = ".work-"
Work = Callable[[Path, Callable[[int], None]], tuple[Any, TuneResult]]
"""From the folder of state and log, and who is told of the steps, to the PeftModel and course."""


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
    """One of `ALL_CONTROLS`: what stands in the SAE's place, or is imitated in place of tuning."""
    base: str | None = None
    allow_mismatch: bool = False
    evaluation: EvalConfig = field(default_factory=lambda: EvalConfig(limit=500))
    eval_source: str = "tiny"

    def __post_init__(self) -> None:
        """Check the control.

        Raises:
            BadInputError: there is none of this name.
        """
        if self.control is not None and self.control not in ALL_CONTROLS:
            raise BadInputError(
                f"control {self.control!r} is unknown; use {', '.join(ALL_CONTROLS)}"
            )


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


@dataclass(frozen=True)
class Adapter:
    """A finished adapter and where it came from."""

    folder: Path
    manifest: Manifest
    target: Model
    layer: int | None
    """0-based; None where no SAE was used."""
    selector: str
    note: str
    saes: Path | None = None
    """The SAEs it was tuned through."""


def elicitation_records(job: TuneJob) -> list[Record]:
    """Read the data that a job tunes on.

    Raises:
        BadInputError: as `corpora.load_records`.
    """
    return corpora.load_records(
        job.elicitation.source,
        question_column=job.elicitation.question_column,
        answer_column=job.elicitation.answer_column,
    )


def adapter_run(
    ctx: Context, job: TuneJob, saes: SaeRun | None = None, *, world: World = ALONE
) -> Adapter:
    """Tune adapters as the job says, go on with a killed run, or read the finished ones.

    Args:
        ctx: the workspace and who to tell.
        job: what to tune.
        saes: the SAEs to use where they are at hand; else they are looked for, or trained.
        world: the processes that train together.

    Raises:
        BadInputError: a layer or data that does not exist, models of different shapes, or SAEs
            that do not fit.
        RunFailedError: a loss or gradient that is not finite.
    """
    records = elicitation_records(job)
    target = ctx.model(job.model, job.base)
    if target.peft is not None:
        raise BadInputError(
            f"{job.model} is an adapter; tune its base model (adapters on adapters are not stacked)"
        )
    lora_targets(target.model, job.objective.targets)
    corpus = fit_corpus(job.elicitation, target)
    steps = job.steps or default_steps(target, records, corpus, job.lora)
    identity = {
        "lora": config_dict(job.lora),
        "elicitation": config_dict(corpus),
        "data": corpora.hash_records(records),
        "steps": steps,
        "dtype": target.dtype,
        **({"control": job.control} if job.control else {}),
    }
    run = _Run(ctx, job, target, records, corpus, steps, identity, world)
    if job.control in KINDS:
        return run.imitate(job.control)
    return run.through(world.first(lambda: _through(ctx, job, target, saes)))


@dataclass
class _Run:
    """One adapter to be made: what all its kinds share."""

    ctx: Context
    job: TuneJob
    target: Model
    records: list[Record]
    corpus: CorpusConfig
    steps: int
    identity: dict[str, Any]
    world: World

    @property
    def batches(self) -> int:
        return self.steps * self.job.lora.accumulation

    @property
    def tokens(self) -> int:
        return self.batches * self.job.lora.batch * self.corpus.sequence

    def through(self, sae: _Through) -> Adapter:
        """Tune through an SAE, or a control in its place."""
        ctx, job, target = self.ctx, self.job, self.target
        point = Hookpoint(sae.layer, job.objective.site)
        where = describe_layer(point.layer, target.n_layers)
        ctx.reporter.note(f"{where}, selector {sae.selector}: {sae.note}")
        self.identity |= {
            "layer": point.layer,
            "objective": config_dict(job.objective),
            "sae": ctx.workspace.relative(sae.run.folder),
            # SAEs can be trained anew in the same folder.
            "sae_hash": hash_files([sae.run.place(point) / "sae.safetensors"]),
            "source": sae.source.slug,
        }
        name = f"{job.objective.preset}-{point.site}-L{point.layer:02d}"
        results = {"layer": point.layer, "site": point.site}

        def prepare() -> Work:
            coder = sae.run.coders(sae.source, [point.layer])[point]
            results["warnings"] = self._check(sae, point, coder)
            inserted = coder
            if (control := job.control) is not None:
                inserted = self.world.first(
                    lambda: replacement_for(
                        ctx,
                        target,
                        point,
                        coder,
                        control,
                        job.elicitation,
                        self.records,
                        trained=sae.run.training(),
                    )
                )
            fresh = self._fresh()
            batches = corpora.batches(
                fresh.tokenizer,
                self.records,
                self.corpus,
                tokens=self.tokens,
                batch=job.lora.batch,
            )
            return lambda folder, advance: tune(
                fresh,
                inserted,
                point,
                batches,
                self.steps,
                job.objective,
                job.lora,
                folder=folder,
                identity=self.identity,
                world=self.world,
                advance=advance,
                note=ctx.reporter.note,
            )

        folder, manifest = self._make(
            name, f"tuning through layer {point.layer}", prepare, results, sae.run.folder
        )
        return Adapter(
            folder, manifest, target, point.layer, sae.selector, sae.note, sae.run.folder
        )

    def imitate(self, kind: str) -> Adapter:
        """Fine-tune on texts, at equal steps and tokens, in place of SAE-Tuning."""
        ctx, job, target = self.ctx, self.job, self.target
        objective = job.objective
        self.identity["objective"] = {
            "targets": list(objective.targets),
            "schedule": objective.schedule,
            "clip_norm": objective.clip_norm,
        }
        results: dict[str, Any] = {"layer": None, "site": None}

        def prepare() -> Work:
            items, own = sft_examples(
                ctx, target, kind, self.records, own=OwnConfig(seed=job.lora.seed)
            )
            if own is not None:
                results["own_samples"] = own.to_dict()
            fresh = self._fresh()
            peft = add_lora(fresh.model, lora_targets(fresh.model, objective.targets), job.lora)
            batches = sft_batches(
                fresh.tokenizer, items, self.corpus, tokens=self.tokens, batch=job.lora.batch
            )

            def work(folder: Path, advance: Callable[[int], None]) -> tuple[Any, TuneResult]:
                course = fit(
                    peft,
                    batches,
                    self.steps,
                    lambda batch: sft_loss(peft, batch),
                    job.lora,
                    schedule=objective.schedule,
                    clip_norm=objective.clip_norm,
                    doing=kind,
                    device=fresh.device,
                    folder=folder,
                    save=lambda place: save_adapter(peft, place, target.folder),
                    identity=self.identity,
                    world=self.world,
                    advance=advance,
                )
                return peft, course

            return work

        folder, manifest = self._make(kind, f"fine-tuning ({kind})", prepare, results)
        return Adapter(folder, manifest, target, None, "given", kind)

    def _fresh(self) -> Model:
        # PEFT changes the module in place: the shared model stays plain.
        return load_model(
            self.job.model, device=self.ctx.device, dtype=self.ctx.dtype, base=self.job.base
        )

    def _check(self, sae: _Through, point: Hookpoint, coder: SparseCoder) -> list[str]:
        _, warnings = check_fit(
            self.target,
            {point: coder},
            probe_batches(self.target, split_records(self.records)[1], self.job.elicitation),
            allow_mismatch=self.job.allow_mismatch,
            known=sae.run.trained_on(self.target),
        )
        for warning in warnings:
            self.ctx.reporter.note(f"warning: {warning}")
        return warnings

    def _make(
        self,
        name: str,
        doing: str,
        prepare: Callable[[], Work],
        results: dict[str, Any],
        *parents: Path,
    ) -> tuple[Path, Manifest]:
        """Do the work unless it is done, in a folder that a killed run leaves and finds again."""
        ctx = self.ctx
        folder = ctx.workspace.path(
            "adapters", f"{self.target.slug}-{name}-{digest(self.identity)}"
        )
        place = folder.parent / f"{WORK}{folder.name}"
        first = self.world.rank == 0

        def done() -> Manifest | None:
            return self.world.agree(ctx.done(folder, *parents))

        if manifest := done():
            ctx.reporter.note(f"adapter: done before, in {folder}")
            return folder, manifest
        # Around all of it: between state and artifact nobody else may begin.
        with run_lock(place / "whole", doing) if first else nullcontext():
            if first and ctx.force:
                for part in place.glob("*"):
                    if part.name != "whole":
                        shutil.rmtree(part) if part.is_dir() else part.unlink()
            self.world.barrier()
            if not (manifest := done()):
                try:
                    manifest = self._work(folder, place, doing, prepare, results, parents)
                except BaseException:
                    if first and newest(place) is None:
                        shutil.rmtree(place, ignore_errors=True)
                    raise
            if first:
                shutil.rmtree(place, ignore_errors=True)
        self.world.barrier()
        return folder, manifest

    def _work(
        self,
        folder: Path,
        place: Path,
        doing: str,
        prepare: Callable[[], Work],
        results: dict[str, Any],
        parents: Sequence[Path],
    ) -> Manifest:
        ctx, target = self.ctx, self.target
        work = prepare()
        label = f"{doing} ({self.job.objective.preset}, {self.steps} steps)"
        with ctx.bar(label, self.steps, devices=self.world.size) as advance:
            peft, course = work(place, advance)
        if course.resumed_at:
            ctx.reporter.note(f"went on at step {course.resumed_at} of {self.steps}")
        manifest = ctx.manifest(
            "adapter",
            target,
            parents=[ctx.workspace.relative(parent) for parent in parents],
            hashes={"data": self.identity["data"]},
            config={
                **self.identity,
                "base_hash": target.weights_hash,
                "base": str(target.folder),
                "processes": self.world.size,
            },
            results={
                "losses": list(course.losses),
                "grad_norms": list(course.grad_norms),
                "tokens": course.tokens,
                "trainable": course.trainable,
                "model": target.name,
                "n_layers": target.n_layers,
                "resumed_at": course.resumed_at,
                **results,
            },
        )
        manifest.seconds = round(course.seconds, 3)
        if self.world.rank == 0:
            with ctx.workspace.artifact(folder, manifest) as temporary:
                save_adapter(peft, temporary, target.folder)
                # Copies: a full disk here must not cost them.
                shutil.copy(place / LOG, temporary / LOG)
                for kept in place.glob("step-*"):
                    shutil.copytree(kept, temporary / kept.name)
        return manifest


@dataclass(frozen=True)
class _Through:
    """The SAE that an adapter is tuned through."""

    source: Model
    run: SaeRun
    layer: int
    selector: str
    note: str


def _through(ctx: Context, job: TuneJob, target: Model, saes: SaeRun | None) -> _Through:
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
    run = saes or saes_for(
        ctx,
        source,
        [layer],
        replace(job.sae, site=job.objective.site),
        job.trigger,
        job.saes,
        allow_mismatch=job.allow_mismatch,
        only=[layer],
    )
    return _Through(source, run, layer, selector, note)


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
    return max(1, math.ceil(2 * tokens / (lora.batch * lora.accumulation * corpus.sequence)))
