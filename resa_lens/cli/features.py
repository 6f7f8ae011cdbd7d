"""Features one by one: activity, falsify, score-features, match-features."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import (
    AtLayers,
    Counting,
    Generating,
    ManyMachines,
    MemoryLimit,
    OnData,
    Planned,
    WithSaesAt,
)
from resa_lens.cli.options import argument, command, options, part
from resa_lens.config import setting
from resa_lens.errors import BadInputError
from resa_lens.evals.config import GenerationConfig
from resa_lens.features.config import (
    ActivityConfig,
    CountConfig,
    FalsifyConfig,
    Rule,
    check_feature,
)
from resa_lens.files import check_file, check_path
from resa_lens.models.hookpoints import parse_feature
from resa_lens.saes.config import SaeConfig
from resa_lens.stages.config import MatchConfig, ScoreConfig
from resa_lens.stages.reports import features as reports
from resa_lens.stages.reports import scores as score_reports
from resa_lens.stages.reports.plans import plan as plan_report

if TYPE_CHECKING:
    from resa_lens.artifacts.stage import Context


@options("Activity")
class Activity(Generating, Planned, MemoryLimit, WithSaesAt):
    """The documents that features are tallied over."""

    show: str | None = setting(
        None, "LAYER:FEATURE: print this feature's page, for example 5:62.", layers=check_feature
    )
    activity: ActivityConfig = part(ActivityConfig, "examples threshold", "Activity")
    text_tokens: int = setting(100_000, "Tokens of the documents that are looked at.", min=1)
    generations: int = setting(
        0, "Look at the model's own answers to so many questions.", min=0, max=10**7
    )
    generation: GenerationConfig = part(GenerationConfig, "max_new_tokens", "Activity")

    def __post_init__(self) -> None:
        """Raise BadInputError where an engine would have nothing to generate."""
        if self.engine != "hf" and not self.generations:
            raise BadInputError(
                f"--engine {self.engine} generates, and nothing is: add --generations, or leave it "
                "out"
            )

    def check(self, ctx: Context) -> None:
        """Raise BadInputError for an absent engine, or answers longer than the model reads, too."""
        super().check(ctx)
        from resa_lens.evals.engines.choice import check_engine
        from resa_lens.stages.scores import check_new_tokens

        check_engine(self.engine)
        if self.generations:
            check_new_tokens(ctx.unloaded(self.model), self.generation.max_new_tokens)


@command("activity")
def activity(args: Activity) -> Outcome:
    """Tally every feature over documents, with examples.

    How often, how strongly, and in which phase it fires.

    Example: resa-lens activity --model tiny-reasoner --layers 1-10 --show 5:62
    """
    from resa_lens.stages.activity import activity_run, feature_page

    ctx, model = args.load()
    feature = parse_feature(args.show, model.n_layers) if args.show else None
    if args.plan:
        from resa_lens.stages.look_plans import plan_activity

        plan = plan_activity(
            ctx, model, args.corpus, args.activity, args.sae, layers=args.indices(model),
            tokens=args.text_tokens, max_new_tokens=args.generation.max_new_tokens,
            folder=args.saes, allow_mismatch=args.allow_site_mismatch,
            **args.pick("generations", "memory_limit_mb", "engine"),
        )  # fmt: skip
        return plan.to_dict(), plan_report(plan)
    saes = args.find(ctx, model)
    run = activity_run(
        ctx, model, saes, args.corpus, args.activity, layers=args.scope(model),
        tokens=args.text_tokens, max_new_tokens=args.generation.max_new_tokens,
        **args.pick("generations", "memory_limit_mb", "engine"),
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
class Falsify(ManyMachines, Planned, Counting, WithSaesAt):
    """How hard the counted features are tried."""

    rule: Rule | None = setting(
        None, "Counting rule; the features of all are tried, and this one's alone are shown."
    )
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
    is missing is trained, each set a job: several processes share them.

    Example: resa-lens falsify --model tiny-reasoner --json
    """
    from resa_lens.features.battery import error_rates
    from resa_lens.features.stimuli import PLAIN_TEXTS
    from resa_lens.stages.counts import count_run
    from resa_lens.stages.falsification import falsify_join, falsify_run, read_plain_texts
    from resa_lens.stages.job_stage import in_turn
    from resa_lens.stages.reports.jobs import share as share_report

    plain = read_plain_texts(args.plain_texts) if args.plain_texts else PLAIN_TEXTS
    ctx, model = args.load()
    if args.plan:
        from resa_lens.stages.look_plans import plan_falsify

        plan = plan_falsify(
            ctx, model, args.corpus, args.count, args.tests, args.sae, layers=args.indices(model),
            folder=args.saes, allow_mismatch=args.allow_site_mismatch, plain_texts=plain,
            **args.pick("other_seed", "random_weights"),
        )  # fmt: skip
        return plan.to_dict(), plan_report(plan)
    saes = in_turn(ctx, lambda: args.find(ctx, model))
    assert saes is not None
    counts = count_run(ctx, model, saes, args.count, args.scope(model))
    tests = args.pick("other_seed", "random_weights")
    values, lines = {}, []
    if args.join:
        share = falsify_join(ctx, model, saes, counts, args.tests, plain_texts=plain, **tests)
        values, lines = {"joined": share.to_dict()}, [share_report(share, "verdicts")]
        run = share.run
    else:
        run = falsify_run(
            ctx, model, saes, counts, args.tests, plain_texts=plain, cluster=args.cluster(), **tests
        )
    if run is None:
        return values, lines
    values |= {
        "features": [f for f in run.features if args.rule is None or args.rule in f["rules"]],
        "summary": run.summary, "trials": run.trials, "skipped": run.skipped,
        "battery": error_rates(),
        "model": model.name, "site": args.sae.site, "folder": str(run.artifact.path),
    }  # fmt: skip
    return values, chain(lines, reports.verdicts_of(values, model.slug, model.n_layers))


@options("Scores")
class ScoreFeatures(WithSaesAt):
    """The scores, and the texts between which they are taken."""

    scoring: ScoreConfig = part(
        ScoreConfig, "scores other tokens words draws correction top", "Scores"
    )
    count: CountConfig = part(CountConfig, "prompt", "Counting")


@command("score-features")
def score_features(args: ScoreFeatures) -> Outcome:
    """Score every feature between reasoning and other text.

    Every score has a permutation null.

    Example: resa-lens score-features --model tiny-reasoner --score cohens_d --score auc --top 10
    """
    from resa_lens.stages.feature_scores import check_text, score_run

    check_text(args.corpus, args.scoring.other)
    ctx, model = args.load()
    saes = args.find(ctx, model)
    config = replace(args.scoring, count=args.count)
    run = score_run(ctx, model, saes, args.corpus, config, args.scope(model))
    values = {"model": model.name, "site": args.sae.site, **run.summary}
    values["folder"] = str(run.artifact.path)
    return values, score_reports.scores(model.slug, model.n_layers, values)


@options("Matching")
class MatchFeatures(AtLayers, Counting, OnData):
    """The two runs, and the documents that both see."""

    run_a: str = argument("A folder of SAEs, a run's name in the workspace, or seed:0.")
    run_b: str = argument("The SAEs in which RUN_A's features are sought.")
    model_b: str | None = setting(
        None, "The model of RUN_B, of the same tokenizer; by default that of RUN_A.",
        check=check_path,
    )  # fmt: skip
    matching: MatchConfig = part(MatchConfig, "threshold tokens", "Matching")
    sae: SaeConfig = part(SaeConfig, "site", "SAEs")
    count: CountConfig = part(CountConfig, "prompt", "Counting")
    second_model = "model_b"


@command("match-features")
def match_features(args: MatchFeatures) -> Outcome:
    """Look for one run's features in another's, with nulls.

    By direction and by activation.

    Example: resa-lens match-features seed:0 seed:1 --model tiny-reasoner --layers 5,6
    """
    from resa_lens.stages.matching import Side, match_run, open_run

    ctx, model = args.load()
    other = model if args.model_b is None else ctx.model(args.model_b)
    layers, site = None if args.layers is None else args.indices(model), args.sae.site
    first, second = (
        Side(m, open_run(ctx, m, name, site, layers))
        for m, name in ((model, args.run_a), (other, args.run_b))
    )
    config = replace(args.matching, count=args.count)
    matches = match_run(ctx, first, second, args.corpus, config, layers)
    values = {
        "run_a": str(first.run.folder), "run_b": str(second.run.folder), "model": model.name,
        "model_b": other.name, "site": site, "threshold": config.threshold,
        "layers": matches.layers, "folder": str(matches.artifact.path),
    }  # fmt: skip
    return values, score_reports.matches_of(model.slug, values)
