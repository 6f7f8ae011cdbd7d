"""Features changed or weighed in the running model: ablate, attribute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import Questions, Ruled, SaeUse
from resa_lens.cli.options import command, options, part
from resa_lens.config import setting
from resa_lens.evals.config import EvalConfig, GenerationConfig
from resa_lens.features.config import CountConfig, check_features
from resa_lens.models.hookpoints import Hookpoint, check_layer, parse_layer, trainable_layers
from resa_lens.stages.config import AblationConfig
from resa_lens.stages.reports import interventions as reports

if TYPE_CHECKING:
    from resa_lens.artifacts.stage import Context
    from resa_lens.models.host import Model
    from resa_lens.stages.saes import SaeRun


@options("Features")
class AtLayer(Ruled, SaeUse):
    """Features of one layer."""

    layer: str = setting(
        "auto", 'auto (where the rule counts most), "12" (0-based) or "13th" (1-based).',
        check=check_layer,
    )  # fmt: skip
    count: CountConfig = part(CountConfig, "prompt", "Counting")

    def index(self, model: Model) -> int | None:
        """Return the layer, 0-based, None for auto."""
        return None if self.layer == "auto" else parse_layer(self.layer, model.n_layers)

    def find(self, ctx: Context, model: Model) -> SaeRun:
        """Return the SAEs: of the one layer where no other is looked at, else the default ones."""
        at = self.index(model)
        only = None if at is None else [at]
        return self.obtain(ctx, model, only or trainable_layers(model.n_layers), only)


@options("Features")
class Ablate(Questions, AtLayer):
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
    from resa_lens.stages.ablation import ablate_run, counted_features
    from resa_lens.stages.scores import check_context, load_eval_items

    features = check_features(args.features, "counted")
    columns = {name: getattr(args.corpus, name) for name in ("question_column", "answer_column")}
    items = load_eval_items(args.tasks, args.evaluation(), **columns, required=False)
    check_context(args.model, None, items, args.evaluation())
    ctx, model = args.load()
    layer = args.index(model)
    saes = args.find(ctx, model)
    counts = None
    if features is None or layer is None:
        counted = counted_features(ctx, model, saes, args.rule, layer, args.count)
        layer, counts = counted.layer, counted.counts
        features = features or counted.features
        where = Hookpoint(layer, args.sae.site).describe(model.n_layers)
        ctx.reporter.note(f"{where}: rule {args.rule!r} counts {len(counted.features)} features")
    config = args.config(layer, features)
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
    from resa_lens.stages.ablation import counted_features
    from resa_lens.stages.attribution import attribute_run

    features = check_features(args.features)
    ctx, model = args.load()
    layer = args.index(model)
    saes = args.find(ctx, model)
    counts = None
    if args.features == "counted" or layer is None:
        counted = counted_features(ctx, model, saes, args.rule, layer, args.count)
        layer, counts = counted.layer, counted.counts
        features = counted.features if args.features == "counted" else features
    run = attribute_run(
        ctx, model, saes, Hookpoint(layer, args.sae.site), args.corpus, metric=args.metric,
        features=features, top=args.top, tokens=args.text_tokens, counts=counts,
    )  # fmt: skip
    values = {**run.results, "folder": str(run.artifact.path)}
    return values, reports.attribution(model.slug, values)
