"""What is tuned and through which SAE: the layer, and the SAEs whose counts chose it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.stage import Context
from resa_lens.config import Config
from resa_lens.errors import BadInputError
from resa_lens.evals.config import TextEngine
from resa_lens.evals.run import EvalConfig
from resa_lens.files import named_path
from resa_lens.models.bounds import check_shapes
from resa_lens.models.hookpoints import adapted_layers, parse_layer
from resa_lens.models.host import Model
from resa_lens.models.unloaded import read_unloaded
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.controls import CONTROLS, MATCHED
from resa_lens.stages.recommendation import discover, newest_recommendation, recommended_saes
from resa_lens.stages.sae_training import saes_for
from resa_lens.stages.saes import SaeRun, open_saes
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.tuning.config import ATTENTION, MLP, Control
from resa_lens.tuning.loop import TuneConfig
from resa_lens.tuning.objective import Objective
from resa_lens.tuning.sft import KINDS
from resa_lens.tuning.train import check_called, lora_targets, modules_in

ALL_CONTROLS = (*CONTROLS, *KINDS)
REFERENCE_SEQUENCE = 2048
"""Tokens of a sequence in the authors' code."""
WIDE = 1024
"""From this width on a model is tuned as the paper tunes its own; narrower ones more briefly."""


@dataclass(frozen=True)
class TuneJob(Config):
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
    trigger: CorpusConfig = field(default_factory=lambda: CorpusConfig(thought_share=None))
    elicitation: CorpusConfig = field(default_factory=CorpusConfig)
    sequence: int | None = None
    """Tokens of a sequence of the elicitation data; None: see `with_sequence`."""
    steps: int | None = None
    """None: two epochs (Table 7) from width 1,024 on, 100 steps below."""
    saes: str | None = None
    control: Control | None = None
    """What stands in the SAE's place, or is imitated in place of tuning."""
    base: str | None = None
    allow_mismatch: bool = False
    evaluation: EvalConfig = field(default_factory=lambda: EvalConfig(limit=500))
    eval_source: str = "tiny"
    engine: TextEngine = "hf"
    """What generates the answers that are scored, and own samples."""
    start_check: bool = False
    """First insert the SAE and tune nothing: does it carry a gain to be taught?"""

    def check_reach(self, layer: int, n_layers: int) -> None:
        """Raise BadInputError where tuning through a layer's SAE could change no adapter.

        The target is not loaded: only layers are known, and `check_modules` says the rest.
        """
        layers = adapted_layers(self.lora.adapter_layers, n_layers)
        known = [f"{other}." for other in layers]
        if self.lora.adapter_layers == "all":
            # What no preset names may be outside of layers, as an unembedding is.
            known += [name for name in self.objective.targets if name not in (*ATTENTION, *MLP)]
        self.objective.check_reach(layer, known)

    def check_modules(self, target: Model, layers: Iterable[int] = ()) -> None:
        """Check what of a loaded target is adapted, and that it learns through layers' SAEs.

        Raises:
            BadInputError: as `modules`, or tuning through an SAE could change no adapter.
        """
        modules = self.modules(target)
        if self.lora.gradient_checkpointing and not target.model.supports_gradient_checkpointing:
            raise BadInputError(
                f"--gradient-checkpointing: {type(target.model).__name__} cannot do it; leave it "
                "out, or use shorter sequences"
            )
        if self.control in KINDS:
            return
        check_called(target.name, modules, lambda: target.why_stock)
        for layer in layers:
            self.objective.check_reach(layer, modules)

    def modules(self, target: Model) -> dict[str, Any]:
        """Return the modules of a loaded target that get adapters, by their whole names.

        Raises:
            BadInputError: the target lacks them, or has none of them in the adapted layers.
        """
        names = lora_targets(target.model, self.objective.targets)
        return modules_in(target.model, names, self.lora.adapter_layers)


def with_sequence(job: TuneJob) -> TuneJob:
    """Return a job whose elicitation data say how long their sequences are.

    By default they stay as they are; only with preset reference, from width 1,024 on, they take
    the 2,048 tokens of the authors' code, or what the model reads where that is less.

    Raises:
        BadInputError: more tokens are named than the model reads.
    """
    length = job.sequence
    plain = job.elicitation.sequence == CorpusConfig().sequence
    if length is None and not (job.objective.preset == "reference" and plain):
        return job
    model = read_unloaded(job.model, job.base)
    context = model.context
    if length is None:
        length = REFERENCE_SEQUENCE if model.d_model >= WIDE else job.elicitation.sequence
        length = min(length, context or length)
    elif context is not None and length > context:
        raise BadInputError(
            f"--sequence {length}: {job.model} reads {context} tokens; use at most that many"
        )
    return replace(job, elicitation=replace(job.elicitation, sequence=length))


@dataclass(frozen=True)
class Through:
    """The SAE that an adapter is tuned through."""

    source: Model
    run: SaeRun
    layer: int
    selector: str
    note: str
    recommendation: Artifact | None = None


def choose_sae(
    ctx: Context,
    job: TuneJob,
    target: Model,
    saes: SaeRun | None,
    recommendation: Artifact | None,
) -> Through:
    """Return the SAE that a job is tuned through: the recommendation's, or at the layer it names.

    Raises:
        BadInputError: source and target of different shapes, no such layer, one whose SAE no
            gradient passes, or options that contradict the recommendation.
    """
    source = ctx.model(job.source_model) if job.source_model else target
    check_shapes(source, target)
    if job.layer == "auto":
        through = _recommended(ctx, job, source, saes, recommendation)
        job.check_modules(target, [through.layer])
        return through
    layer = parse_layer(job.layer, target.n_layers)
    job.check_modules(target, [layer])
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
    return Through(source, run, layer, job.selector, job.reason)


def _recommended(
    ctx: Context,
    job: TuneJob,
    source: Model,
    saes: SaeRun | None,
    recommendation: Artifact | None,
) -> Through:
    """Take layer and SAEs from a recommendation: the given, the newest, or a new one."""
    site = job.objective.site
    artifact = recommendation or newest_recommendation(ctx, source, site)
    if artifact is None:
        ctx.reporter.note(f"recommendation: none for {source.slug} at site {site}; making one")
        made = discover(
            ctx,
            source,
            sae=replace(job.sae, site=site),
            corpus=job.trigger,
            saes=job.saes,
            allow_mismatch=job.allow_mismatch,
        )
        artifact, run = made.recommendation.artifact, made.saes
        reason = made.recommendation.recommendation.reason
    else:
        run = recommended_saes(ctx, source, artifact)
        reason = str(artifact.manifest.results["reason"])
        if recommendation is None:
            reason += f" (from {artifact.path})"
    results = artifact.manifest.results
    layer = int(results["recommended"][0])
    _refuse_contradiction(ctx, job, source, artifact, run, layer, saes)
    return Through(source, run, layer, str(results["selector"]), reason, artifact)


def _refuse_contradiction(
    ctx: Context,
    job: TuneJob,
    source: Model,
    recommendation: Artifact,
    run: SaeRun,
    layer: int,
    saes: SaeRun | None,
) -> None:
    """Raise BadInputError where options ask for other SAEs than those that were counted."""
    where = f"the recommendation {recommendation.relative} was counted on"
    remedy = "leave it out, name a layer with --layer, or recommend again with it"
    if job.saes and saes is None:
        folder = named_path(job.saes, "SAEs")
        saes = open_saes(
            ctx, source, folder, job.objective.site, allow_mismatch=job.allow_mismatch, only=[layer]
        )
    if saes is not None and saes.parent([layer]).identity != run.parent([layer]).identity:
        raise BadInputError(
            f"--saes {saes.folder} holds other SAEs than {run.folder}, which {where}; {remedy}"
        )
    training, plain = run.training(), SaeConfig()
    for name in ("latents", "k", "tokens", "optimizer", "learning_rate", "batch", "mode"):
        asked = getattr(job.sae, name)
        if training and asked != getattr(plain, name) and asked != getattr(training[0], name):
            raise BadInputError(
                f"--{name.replace('_', '-')} {asked} contradicts the SAEs that {where}, which have "
                f"{getattr(training[0], name)}; {remedy}"
            )
    share = job.trigger.thought_share
    if training and share is not None and share != training[1].thought_share:
        raise BadInputError(
            f"--thought-share {share} contradicts the SAEs that {where}, which have "
            f"{training[1].thought_share}; {remedy}"
        )
    if run.artifact and job.trigger.source != CorpusConfig().source:
        data = corpora.hash_records(corpora.read_records(job.trigger))
        trained = run.artifact.manifest.hashes.get("data")
        if trained != data:
            raise BadInputError(
                f"data {job.trigger.source} ({data[:8]}) are not what the SAEs that {where} were "
                f"trained on ({run.artifact.manifest.config['corpus']['source']}, "
                f"{str(trained)[:8]});\nto tune on these data alone give --elicitation-data, or "
                "recommend again with --data"
            )


def control_config(ctx: Context, job: TuneJob, sae: Through) -> dict[str, Any]:
    """Return what a control in the SAE's place depends on besides the SAE."""
    if job.control not in MATCHED:
        return {}
    config: dict[str, Any] = {"seed": ctx.seed}
    if job.control == "random-weights":
        training = sae.run.training() or (SaeConfig(), CorpusConfig())
        records = corpora.read_records(training[1])
        config["null"] = [*training, corpora.hash_records(records)]
    return config
