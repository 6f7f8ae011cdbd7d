"""Adapters in the workspace: through an SAE, a control, or by fine-tuning instead."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from resa_lens.artifacts.artifact import Artifact, Parent
from resa_lens.artifacts.kinds.adapter import Adapter as AdapterKind
from resa_lens.artifacts.stage import Context, Draft, Stage
from resa_lens.config import config_dict
from resa_lens.errors import BadInputError
from resa_lens.evals.engines.choice import check_engine, engine_part, generated_by
from resa_lens.evals.grading import RULES
from resa_lens.evals.tasks import EvalItem
from resa_lens.machine.hardware import MB
from resa_lens.machine.needs import activations_mb, read_shape
from resa_lens.models.bounds import check_shapes
from resa_lens.models.hookpoints import (
    Hookpoint,
    adapted_layers,
    check_layer,
    describe_layer,
    parse_layer,
)
from resa_lens.models.host import Model, load_model
from resa_lens.models.packing import end_of_documents, separate_documents
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.fit import check_fit
from resa_lens.saes.world import ALONE, World
from resa_lens.stages.controls import own_generation, replacement_for, sft_examples
from resa_lens.stages.insertion import InsertionRun, starting_point
from resa_lens.stages.saes import SaeRun, fit_corpus, packed, probe_batches, split_records
from resa_lens.stages.scores import questions_for
from resa_lens.stages.tune_job import (
    WIDE,
    Through,
    TuneJob,
    choose_sae,
    control_config,
    with_sequence,
)
from resa_lens.texts import corpora, prompts
from resa_lens.texts.corpora import CorpusConfig, Record
from resa_lens.tuning.log import LOG
from resa_lens.tuning.loop import TuneConfig, TuneResult, check_accumulation, fit
from resa_lens.tuning.sft import KINDS, OwnConfig, sft_batches
from resa_lens.tuning.train import (
    FUSED_MLP,
    left_out,
    lora_targets,
    prepare_sft,
    save_adapter,
    tune,
)


@dataclass(frozen=True)
class Adapter:
    """A finished adapter and where it came from."""

    artifact: Artifact
    target: Model
    layer: int | None
    """0-based; None where no SAE was used."""
    selector: str
    note: str
    saes: SaeRun | None = None
    """The SAEs it was tuned through."""
    recommendation: Artifact | None = None
    """What chose the layer, where that was left to a recommendation."""
    start: InsertionRun | None = None
    """What the SAE does when it is inserted and nothing is tuned, where that was looked at."""

    @property
    def folder(self) -> Path:
        """A plain PEFT adapter folder."""
        return self.artifact.path


def elicitation_records(job: TuneJob) -> Sequence[Record]:
    """Read the data that a job tunes on.

    Raises:
        BadInputError: as `corpora.load_records`.
    """
    return corpora.read_records(job.elicitation)


def questions_of(ctx: Context, job: TuneJob) -> list[EvalItem]:
    """Return the questions that a job is scored on; a file may have the data's named columns.

    Nothing is loaded for it, and what the job asks of its models is checked first.

    Raises:
        BadInputError: as `questions_for`, no such layer or one whose SAE no gradient passes,
            models of different shapes, or an engine that is not installed.
    """
    check_engine(job.engine)
    target = ctx.unloaded(job.model, job.base)
    check_layer(job.layer, target.n_layers)
    adapted_layers(job.lora.adapter_layers, target.n_layers)
    if job.layer != "auto" and job.control not in KINDS:
        job.check_reach(parse_layer(job.layer, target.n_layers), target.n_layers)
    if job.source_model:
        check_shapes(ctx.unloaded(job.source_model), target)
    columns = job.elicitation
    return questions_for(
        target, job.eval_source, job.evaluation, question_column=columns.question_column,
        answer_column=columns.answer_column, required=False,
    )  # fmt: skip


def adapter_run(
    ctx: Context,
    job: TuneJob,
    saes: SaeRun | None = None,
    recommendation: Artifact | None = None,
    *,
    world: World = ALONE,
) -> Adapter:
    """Tune adapters as the job says, go on with a killed run, or read the finished ones.

    Args:
        ctx: the workspace and who to tell.
        job: what to tune.
        saes: the SAEs to use where they are at hand; else they are the recommendation's, or looked
            for, or trained.
        recommendation: of a job whose layer is "auto"; else the newest one, or a new one.
        world: the processes that train together.

    Raises:
        BadInputError: a layer or data that does not exist, models of different shapes, or SAEs
            that do not fit.
        RunFailedError: a loss or gradient that is not finite.
    """
    check_accumulation(job.lora, world)
    job = with_sequence(job)
    records = elicitation_records(job)
    ctx.note_once(corpora.doubtful(records, job.elicitation.source))
    target = ctx.model(job.model, job.base)
    if target.peft is not None:
        raise BadInputError(
            f"{job.model} is an adapter; tune its base model (adapters on adapters are not stacked)"
        )
    ctx.note_once(left_out(target.model, lora_targets(target.model, job.objective.targets)))
    job.check_modules(target)
    corpus = fit_corpus(job.elicitation, target)
    steps = job.steps or default_steps(target, records, corpus, job.lora)
    run = _Run(ctx, job, target, records, corpus, steps, world)
    if job.control in KINDS:
        return run.imitate(job.control)
    return run.through(world.first(lambda: choose_sae(ctx, job, target, saes, recommendation)))


@dataclass
class _Run:
    """One adapter to be made: what all its kinds share."""

    ctx: Context
    job: TuneJob
    target: Model
    records: Sequence[Record]
    corpus: CorpusConfig
    steps: int
    world: World

    @property
    def tokens(self) -> int:
        lora = self.job.lora
        return self.steps * lora.accumulation * lora.batch * self.corpus.sequence

    def through(self, sae: Through) -> Adapter:
        """Tune through an SAE, or a control in its place."""
        ctx, job, target = self.ctx, self.job, self.target
        point = Hookpoint(sae.layer, job.objective.site)
        where = describe_layer(point.layer, target.n_layers)
        ctx.reporter.note(f"{where}, selector {sae.selector}: {sae.note}")
        start = self.world.first(lambda: self._start(sae)) if job.start_check else None
        parents = {"sae": sae.run.parent([point.layer])}
        if sae.recommendation:
            parents["recommendation"] = sae.recommendation.parent
        stage = self._stage(
            f"{job.objective.preset}-{point.site}-L{point.layer:02d}",
            {
                "layer": point.layer,
                "objective": job.objective,
                **self._computed(),
                **control_config(ctx, job, sae),
            },
            parents,
            {
                "layer": point.layer,
                "objective": config_dict(job.objective),
                "sae": sae.run.relative,
                "source": sae.source.slug,
            },
        )

        def work(draft: Draft) -> None:
            coder = sae.run.coders(sae.source, [point.layer])[point]
            warnings = self._check(sae, point, coder)
            inserted: Any = coder
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

            def train(advance: Callable[[int], None]) -> tuple[Any, TuneResult]:
                return tune(
                    fresh,
                    inserted,
                    point,
                    batches,
                    self.steps,
                    job.objective,
                    job.lora,
                    folder=draft.work,
                    identity={"identity": stage.identity},
                    world=self.world,
                    advance=advance,
                    note=ctx.reporter.note,
                )

            self._train(draft, fresh, f"tuning through layer {point.layer}", train)
            draft.results |= {"layer": point.layer, "site": point.site, "warnings": warnings}

        artifact = stage.obtain(work, doing=f"tuning through layer {point.layer}", world=self.world)
        return Adapter(
            artifact, target, point.layer, sae.selector, sae.note, sae.run, sae.recommendation,
            start,
        )  # fmt: skip

    def _start(self, sae: Through) -> InsertionRun:
        """Insert the SAE before anything is tuned, and warn where it carries no gain."""
        job = self.job
        return starting_point(
            self.ctx, self.target, sae.run, questions_of(self.ctx, job), job.elicitation,
            job.evaluation, [sae.layer], source=sae.source, tasks=job.eval_source,
        )  # fmt: skip

    def imitate(self, kind: str) -> Adapter:
        """Fine-tune on texts, at equal steps and tokens, in place of SAE-Tuning."""
        ctx, job, target = self.ctx, self.job, self.target
        objective = job.objective
        part = {
            "targets": list(objective.targets),
            "schedule": objective.schedule,
            "clip_norm": objective.clip_norm,
        }
        own = OwnConfig(seed=job.lora.seed)
        drawing = own_generation(own)
        sampled: dict[str, Any] = {}
        if kind == "own-samples":
            sampled = {"own": own, "rules": RULES, **engine_part(job.engine)}
        stage = self._stage(kind, {"objective": part, **sampled}, {}, {"objective": part})

        def work(draft: Draft) -> None:
            items, samples = self.world.first(
                lambda: sft_examples(
                    ctx, draft, target, kind, self.records, own=own, generation=drawing,
                    engine=job.engine,
                )
            )  # fmt: skip
            fresh = self._fresh()
            peft, loss_of = prepare_sft(
                fresh.model, objective.targets, job.lora, note=ctx.reporter.note
            )
            batches = sft_batches(
                fresh.tokenizer, items, self.corpus, tokens=self.tokens, batch=job.lora.batch
            )

            def train(advance: Callable[[int], None]) -> tuple[Any, TuneResult]:
                course = fit(
                    peft,
                    batches,
                    self.steps,
                    loss_of,
                    job.lora,
                    schedule=objective.schedule,
                    clip_norm=objective.clip_norm,
                    doing=kind,
                    device=fresh.device,
                    folder=draft.work,
                    save=lambda place: save_adapter(peft, place, target.folder),
                    identity={"identity": stage.identity},
                    world=self.world,
                    advance=advance,
                )
                return peft, course

            self._train(draft, fresh, f"fine-tuning ({kind})", train)
            draft.results |= {"layer": None, "site": None}
            if samples is not None:
                by = generated_by(target, drawing, job.engine)
                draft.results["own_samples"] = {**samples.to_dict(), "generated_by": by}

        artifact = stage.obtain(work, doing=f"fine-tuning ({kind})", world=self.world)
        return Adapter(artifact, target, None, "given", kind)

    def _computed(self) -> dict[str, str]:
        """Return what tells an adapter from one of the same job that was computed otherwise.

        Until 2026-11-30 passes with hooks went around an adapter on a fused MLP.
        """
        names = tuple(f".{name}" for name in FUSED_MLP)
        modules = self.job.modules(self.target)
        fused = any(f".{module}".endswith(names) for module in modules)
        return {"fused_mlp": "adapted"} if fused else {}

    def _stage(
        self,
        name: str,
        config: dict[str, Any],
        parents: dict[str, Parent],
        settings: dict[str, Any],
    ) -> Stage:
        job, target = self.job, self.target
        data = corpora.hash_records(self.records)
        control = {"control": job.control} if job.control else {}
        return self.ctx.stage(
            AdapterKind,
            target,
            name=name,
            config={
                "lora": job.lora, "elicitation": self.corpus, "steps": self.steps, **control,
                **config,
            },
            data={"data": data},
            parents=parents,
            settings={
                "lora": config_dict(job.lora),
                "elicitation": config_dict(self.corpus),
                "data": data,
                "steps": self.steps,
                "dtype": target.dtype,
                **control,
                **settings,
                "base_hash": target.weights_hash,
                "base": str(target.folder),
                "processes": self.world.size,
            },
        )  # fmt: skip

    def _needs(self) -> tuple[float, float]:
        """Return the MB of memory and of disk that the loop takes."""
        lora = self.job.lora
        shape = read_shape(str(self.target.folder))
        adapter = adapter_mb(self.target, self.job)
        each = self.target.model.dtype.itemsize
        tokens = lora.batch * self.corpus.sequence
        gpu = self.target.device.startswith("cuda")
        acts = activations_mb(shape, tokens, each, gpu=gpu)
        if lora.gradient_checkpointing:
            acts /= shape.layers
        # Weights, gradients and AdamW's two averages; on the disk two states without gradients.
        kept = self.steps // lora.checkpoint_every if lora.checkpoint_every else 0
        return 4 * adapter + acts, (2 * 3 + 1 + 2 * kept) * adapter

    def _fresh(self) -> Model:
        # PEFT changes the module in place: the shared model stays plain, the weights are one.
        return load_model(
            self.job.model, device=self.ctx.device, dtype=self.ctx.dtype, base=self.job.base,
            weights_of=self.target,
        )  # fmt: skip

    def _check(self, sae: Through, point: Hookpoint, coder: SparseCoder) -> list[str]:
        if sae.source is self.target and point.layer in sae.run.checked:
            # When they were opened, and it was said then.
            where = f"{point.describe(self.target.n_layers)}, "
            return [text for text in sae.run.warnings if where in text]
        with packed(self.target, self.corpus):
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

    def _packed(self, fresh: Model) -> AbstractContextManager[None]:
        if self.corpus.packing == "joined":
            return nullcontext()
        with packed(self.target, self.corpus):
            pass  # it can
        return separate_documents(fresh.model, end_of_documents(fresh.tokenizer))

    def _train(
        self,
        draft: Draft,
        fresh: Model,
        doing: str,
        train: Callable[[Callable[[int], None]], tuple[Any, TuneResult]],
    ) -> None:
        """Run the loop and fill the draft with its course and the adapter."""
        ctx, target = self.ctx, self.target
        draft.expect(*self._needs())
        label = f"{doing} ({self.job.objective.preset}, {self.steps} steps)"
        with self._packed(fresh), ctx.bar(label, self.steps) as advance:
            peft, course = train(advance)
        if course.resumed_at:
            ctx.reporter.note(f"went on at step {course.resumed_at} of {self.steps}")
        draft.results = {
            "losses": list(course.losses),
            "grad_norms": list(course.grad_norms),
            "tokens": course.tokens,
            "trainable": course.trainable,
            "model": target.name,
            "n_layers": target.n_layers,
            "resumed_at": course.resumed_at,
            "collapsed_at": course.collapsed_at,
            "kept_step": course.kept_step,
        }
        draft.seconds = course.seconds

        def write(folder: Path) -> None:
            save_adapter(peft, folder, target.folder)
            # Copies: a full disk here must not cost them.
            shutil.copy(draft.work / LOG, folder / LOG)
            for kept in draft.work.glob("step-*"):
                shutil.copytree(kept, folder / kept.name)

        draft.write(write)


def adapter_mb(model: Model, job: TuneJob) -> float:
    """Return the MB of a job's adapter, whose weights are in float32."""
    sizes = (sum(module.weight.shape) for module in job.modules(model).values())
    return job.lora.rank * 4 * sum(sizes) / MB


def default_steps(
    model: Model, records: Sequence[Record], corpus: CorpusConfig, lora: TuneConfig
) -> int:
    """Return the steps of two epochs for a wide model, 100 for a narrow one."""
    if model.d_model < WIDE:
        return 100
    tokenizer: Any = model.tokenizer
    system = len(tokenizer(prompts.resolve_system_prompt(corpus.system_prompt))["input_ids"])
    # As they are read: drawn from all rows, and as many with their worked steps.
    stream = corpora.documents(records, replace(corpus, system_share=0.0))
    texts = list(islice(stream, min(200, len(records))))
    length = sum(len(ids) for ids in tokenizer(texts)["input_ids"]) / len(texts)
    tokens = len(records) * (length + 1 + corpus.system_share * system)
    return max(1, math.ceil(2 * tokens / (lora.batch * lora.accumulation * corpus.sequence)))
