"""SAEs and features in the running model: ablate, attribute, insert."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import AdapterBase, AskedOf, Planned, Ruled, SaeUse, WithSaesAt
from resa_lens.cli.options import command, options, part
from resa_lens.config import setting
from resa_lens.evals.config import EvalConfig, GenerationConfig
from resa_lens.features.config import CountConfig, check_features
from resa_lens.files import check_path
from resa_lens.models.hookpoints import Hookpoint, check_layer, parse_layer, trainable_layers
from resa_lens.stages.config import AblationConfig, InsertionConfig
from resa_lens.stages.reports import interventions as reports
from resa_lens.stages.reports.plans import plan as plan_report

if TYPE_CHECKING:
    from resa_lens.artifacts.stage import Context
    from resa_lens.models.host import Model
    from resa_lens.stages.counts import CountRun
    from resa_lens.stages.saes import SaeRun


@options("Features")
class AtLayer(Ruled, SaeUse):
    """Features of one layer."""

    layer: str = setting(
        "auto", 'auto (where the rule counts most), "12" (0-based) or "13th" (1-based).',
        layers=check_layer,
    )  # fmt: skip
    count: CountConfig = part(CountConfig, "prompt", "Counting")
    features = ""
    """An option of each command: "counted", or indices."""

    def index(self, model: Model) -> int | None:
        """Return the layer, 0-based, None for auto."""
        return None if self.layer == "auto" else parse_layer(self.layer, model.n_layers)

    def choose(
        self, ctx: Context, model: Model, features: tuple[int, ...] | None
    ) -> tuple[SaeRun, int, tuple[int, ...] | None, CountRun | None]:
        """Return the SAEs, the layer, the features, and the counts that chose either of them."""
        from resa_lens.stages.ablation import counted_features

        # Of one layer the SAE alone is opened, or trained.
        layer = self.index(model)
        only = None if layer is None else [layer]
        saes = self.obtain(ctx, model, only or trainable_layers(model.n_layers), only)
        if layer is not None and self.features != "counted":
            return saes, layer, features, None
        counted = counted_features(ctx, model, saes, self.rule, layer, self.count)
        where = Hookpoint(counted.layer, self.sae.site).describe(model.n_layers)
        ctx.reporter.note(f"{where}: rule {self.rule!r} counts {len(counted.features)} features")
        named = counted.features if self.features == "counted" else features
        return saes, counted.layer, named, counted.counts


@options("Features")
class Ablate(AskedOf, AtLayer):
    """What is changed, how strongly, and on which questions."""

    features: str = setting("counted", 'counted (by --rule), or indices: "3,17,40".')
    change: dict[str, Any] = part(
        AblationConfig, "kind strength doses phases at keep_error value controls all_doses seed",
        "Change", given="values",
    )  # fmt: skip
    answering: dict[str, Any] = part(
        EvalConfig, "limit samples extraction", "Questions", limit=500, given="values"
    )
    generation: GenerationConfig = part(
        GenerationConfig, "max_new_tokens temperature batch_size seed", "Questions"
    )

    def __post_init__(self) -> None:
        """Raise BadInputError where the change cannot be; any feature will do."""
        self.config(0, check_features(self.features, "counted") or (0,))

    def evaluation(self) -> EvalConfig:
        """Return the configuration of the answers."""
        return EvalConfig(generation=self.generation, **self.answering)

    def config(self, layer: int, features: tuple[int, ...]) -> AblationConfig:
        """Return the configuration of the ablation of these features at a layer."""
        rule = self.rule if self.features == "counted" else None
        point = Hookpoint(layer, self.sae.site)
        return AblationConfig(point, features, rule, eval=self.evaluation(), **self.change)


@command("ablate")
def ablate(args: Ablate) -> Outcome:
    """Change features while the model answers.

    Accuracy and length, against random features that are matched in activation mass and drawn anew
    for every control. Strength 0 is the identity.

    Example: resa-lens ablate --model tiny-reasoner --layer 4 --rule either
    """
    from resa_lens.stages.ablation import ablate_run

    features = check_features(args.features, "counted")
    items = args.items()
    ctx, model = args.load()
    saes, layer, features, counts = args.choose(ctx, model, features)
    config = args.config(layer, features or ())
    run = ablate_run(ctx, model, saes, items, config, source=args.tasks, counts=counts)
    values = {**run.results, "folder": str(run.artifact.path)}
    return values, reports.ablation(model.slug, values)


@options("Features")
class Attribute(AtLayer):
    """Which features are weighed, by which measure."""

    features: str = setting(
        "active", 'active (the --top most active), counted, or indices: "3,17,40".',
        check=check_features,
    )  # fmt: skip
    top: int = setting(20, "Features, the most active first.", min=1, max=10**6)
    metric: Literal["loss", "think", "answer"] = setting(
        "loss", "Loss over think and answer tokens (loss), or over one of them."
    )
    text_tokens: int = setting(4096, "Tokens of the documents that are looked at.", min=1)


@command("attribute")
def attribute(args: Attribute) -> Outcome:
    """Weigh features by gradient and by patching.

    Gradient x activation, and patching; and how far the two agree.

    Example: resa-lens attribute --model tiny-reasoner --layer 4 --top 20
    """
    from resa_lens.stages.attribution import attribute_run

    features = check_features(args.features)
    ctx, model = args.load()
    saes, layer, features, counts = args.choose(ctx, model, features)
    run = attribute_run(
        ctx, model, saes, Hookpoint(layer, args.sae.site), args.corpus, metric=args.metric,
        features=features, top=args.top, tokens=args.text_tokens, counts=counts,
    )  # fmt: skip
    values = {**run.results, "folder": str(run.artifact.path)}
    return values, reports.attribution(model.slug, values)


@options("Insertion")
class Insert(Planned, AdapterBase, AskedOf, WithSaesAt):
    """What is inserted into which model."""

    source_model: str | None = setting(
        None, "Model whose SAEs are inserted; the target by default.", check=check_path
    )
    insertion: InsertionConfig = part(InsertionConfig, "arms tokens seed", "Insertion")
    asking: EvalConfig = part(EvalConfig, "limit levels extraction", "Questions", limit=500)
    second_model, one_shape = "source_model", True


@command("insert")
def insert(args: Insert) -> Outcome:
    """Insert SAEs while the model answers, tuning nothing.

    What an SAE does to the answers is what preset distil would hand on. Beside it stand PCA and
    noise of its size, the target's own SAE and the source's activations.

    Example: resa-lens insert --model tiny-reasoner --layers 5 --limit 100
    """
    from resa_lens.stages.insertion import insertion_run

    items = args.items()
    ctx, target = args.load()
    source = ctx.model(args.source_model) if args.source_model else target
    config = replace(args.insertion, eval=args.evaluation())
    if args.plan:
        from resa_lens.stages.look_plans import plan_insert

        plan = plan_insert(
            ctx, target, items, args.corpus, config, args.sae, layers=args.indices(source),
            folder=args.saes, source=source, allow_mismatch=args.allow_site_mismatch,
        )  # fmt: skip
        return plan.to_dict(), plan_report(plan)
    saes = args.find(ctx, source)
    run = insertion_run(
        ctx, target, saes, items, args.corpus, config,
        layers=args.scope(source) or saes.layers, source=source, tasks=args.tasks,
    )  # fmt: skip
    return run.to_dict(), reports.insertion(target.slug, target.n_layers, run.to_dict())
