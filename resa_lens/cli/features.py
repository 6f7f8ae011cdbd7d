"""Single features: activity, falsify."""

from __future__ import annotations

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import COUNTING, MemoryLimit, WithSaesAt
from resa_lens.cli.options import command, options, part
from resa_lens.config import setting
from resa_lens.evals.config import GenerationConfig
from resa_lens.features.config import (
    ActivityConfig,
    CountConfig,
    FalsifyConfig,
    Rule,
    check_feature,
)
from resa_lens.files import check_file
from resa_lens.models.hookpoints import parse_feature
from resa_lens.stages.reports import features as reports


@options("Activity")
class Activity(MemoryLimit, WithSaesAt):
    """The documents that features are tallied over."""

    show: str | None = setting(
        None, "LAYER:FEATURE: print this feature's page, for example 5:62.", check=check_feature
    )
    activity: ActivityConfig = part(ActivityConfig, "examples threshold", "Activity")
    text_tokens: int = setting(100_000, "Tokens of the documents that are looked at.", min=1)
    generations: int = setting(
        0, "Look at the model's own answers to so many questions.", min=0, max=10**7
    )
    generation: GenerationConfig = part(GenerationConfig, "max_new_tokens", "Activity")


@command("activity")
def activity(args: Activity) -> Outcome:
    """Tally every feature over documents, with examples.

    How often, how strongly, and in which phase it fires.

    Example: resa-lens activity --model tiny-reasoner --layers 1-10 --show 5:62
    """
    from resa_lens.stages.activity import activity_run, feature_page

    ctx, model = args.load()
    feature = parse_feature(args.show, model.n_layers) if args.show else None
    saes = args.find(ctx, model)
    run = activity_run(
        ctx, model, saes, args.corpus, args.activity, layers=args.scope(model),
        tokens=args.text_tokens, max_new_tokens=args.generation.max_new_tokens,
        **args.pick("generations", "memory_limit_mb"),
    )  # fmt: skip
    page = feature_page(model, saes, run, *feature) if feature else None
    values = {
        "layers": run.layers, "tokens": run.tokens, "documents": run.documents,
        "seconds": run.artifact.manifest.seconds, "resumed_at": run.resumed_at,
        "model": model.name, "site": args.sae.site, "folder": str(run.artifact.path),
        "feature": page,
    }  # fmt: skip
    return values, reports.page_of(page, model.n_layers) if page else reports.activity(
        values, model
    )


@options("Tests")
class Falsify(WithSaesAt):
    """How hard the counted features are tried."""

    rule: Rule | None = setting(
        None, "Counting rule; the features of all are tried, and this one's alone are shown."
    )
    count: CountConfig = part(CountConfig, COUNTING, "Counting")
    tests: FalsifyConfig = part(FalsifyConfig, "texts shuffles fires seed", "Tests")
    plain_texts: str | None = setting(
        None, "File of plain texts, one a line, in place of ours.", check=check_file
    )
    other_seed: bool = setting(True, "Look for each feature in another seed's SAEs.")
    random_weights: bool = setting(True, "Put a random-weights model's SAEs to the same tests.")


@command("falsify")
def falsify(args: Falsify) -> Outcome:
    """Try to refute every counted feature.

    What does it depend on: the tag, the prompt's words, their order, the wording, the delimiter's
    spelling, the SAE? Needs SAEs of the model, of another seed and of a random-weights model; what
    is missing is trained.

    Example: resa-lens falsify --model tiny-reasoner --json
    """
    from resa_lens.features.battery import error_rates
    from resa_lens.features.exclusive import tag_prompt
    from resa_lens.features.stimuli import PLAIN_TEXTS
    from resa_lens.stages.counts import count_run
    from resa_lens.stages.falsification import falsify_run, read_plain_texts

    plain = read_plain_texts(args.plain_texts) if args.plain_texts else PLAIN_TEXTS
    ctx, model = args.load()
    tag_prompt(model, args.count)
    saes = args.find(ctx, model)
    counts = count_run(ctx, model, saes, args.count, args.scope(model))
    run = falsify_run(
        ctx, model, saes, counts, args.tests, plain_texts=plain,
        **args.pick("other_seed", "random_weights"),
    )  # fmt: skip
    values = {
        "features": [f for f in run.features if args.rule is None or args.rule in f["rules"]],
        "summary": run.summary, "trials": run.trials, "skipped": run.skipped,
        "battery": error_rates(),
        "model": model.name, "site": args.sae.site, "folder": str(run.artifact.path),
    }  # fmt: skip
    return values, reports.verdicts_of(values, model.slug, model.n_layers)
