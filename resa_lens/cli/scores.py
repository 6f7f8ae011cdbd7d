"""Features by their scores and their likeness: score-features, match-features."""

from __future__ import annotations

from dataclasses import replace

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import AtLayers, OnData, WithSaesAt
from resa_lens.cli.options import argument, command, options, part
from resa_lens.config import setting
from resa_lens.features.config import CountConfig
from resa_lens.files import check_path
from resa_lens.saes.config import SaeConfig
from resa_lens.stages.config import MatchConfig, ScoreConfig
from resa_lens.stages.reports import scores as reports


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
    return values, reports.scores(model.slug, model.n_layers, values)


@options("Matching")
class MatchFeatures(AtLayers, OnData):
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


@command("match-features")
def match_features(args: MatchFeatures) -> Outcome:
    """Look for one run's features in another's, with nulls.

    By direction and by activation.

    Example: resa-lens match-features seed:0 seed:1 --model tiny-reasoner --layers 5,6
    """
    from resa_lens.features.exclusive import tag_prompt
    from resa_lens.stages.matching import Side, match_run, open_run

    ctx, model = args.load()
    other = model if args.model_b is None else ctx.model(args.model_b)
    tag_prompt(model, args.count)
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
    return values, reports.matches_of(model.slug, values)
