"""Every stage as a call of small ingredients: what it is made from, and how each can be changed.

A stage that is called by `named` stops where it has named its artifact: nothing is computed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from resa_lens.artifacts.artifact import Artifact, Kind, Parent
from resa_lens.artifacts.kinds.ablation import Ablation
from resa_lens.artifacts.kinds.activity import Activity
from resa_lens.artifacts.kinds.adapter import Adapter
from resa_lens.artifacts.kinds.attribution import Attribution
from resa_lens.artifacts.kinds.counts import Counts
from resa_lens.artifacts.kinds.effects import Effects
from resa_lens.artifacts.kinds.eval import Eval
from resa_lens.artifacts.kinds.falsification import Falsification
from resa_lens.artifacts.kinds.insertion import Insertion
from resa_lens.artifacts.kinds.matches import Matches
from resa_lens.artifacts.kinds.quality import Quality
from resa_lens.artifacts.kinds.ranking import Ranking
from resa_lens.artifacts.kinds.recommendation import Recommendation
from resa_lens.artifacts.kinds.routing import Routing
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.kinds.scores import Scores
from resa_lens.artifacts.kinds.stability import Stability
from resa_lens.artifacts.kinds.steering import Steering
from resa_lens.artifacts.kinds.sweep import Sweep
from resa_lens.artifacts.manifest import Manifest
from resa_lens.artifacts.stage import Context, Stage
from resa_lens.artifacts.workspace import Workspace
from resa_lens.config import roles
from resa_lens.evals.engines import GenerationConfig
from resa_lens.evals.run import EvalConfig
from resa_lens.experts.config import RankConfig, SteerConfig, UseConfig
from resa_lens.features.activity import ActivityConfig
from resa_lens.features.exclusive import RULES, CountConfig, FeatureCounts, LayerCount
from resa_lens.features.falsify import FalsifyConfig
from resa_lens.hashes import digest
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.resources import data_path
from resa_lens.saes.coder import new_coder
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.ablation import AblationConfig, ablate_run
from resa_lens.stages.activity import activity_run
from resa_lens.stages.adapters import adapter_run
from resa_lens.stages.attribution import attribute_run, effects_run
from resa_lens.stages.counts import CountRun, count_run
from resa_lens.stages.falsification import falsify_run
from resa_lens.stages.feature_scores import ScoreConfig, score_run
from resa_lens.stages.insertion import InsertionConfig, insertion_run
from resa_lens.stages.matching import MatchConfig, Side, match_run
from resa_lens.stages.ranking import ranking_run
from resa_lens.stages.recommendation import recommend_run, sae_quality
from resa_lens.stages.routing import routing_run
from resa_lens.stages.sae_quality import quality_run
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.saes import SaeRun
from resa_lens.stages.scores import eval_run, load_eval_items
from resa_lens.stages.stability import stability_run
from resa_lens.stages.steering import steering_run
from resa_lens.stages.sweep import sweep_run
from resa_lens.stages.sweep_jobs import SweepConfig
from resa_lens.stages.tune_job import TuneJob
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.tuning.loop import TuneConfig
from resa_lens.tuning.objective import Objective

COUNTS = Parent(digest("counts"), "counts/m/run")
RECOMMENDATION = Parent(digest("recommendation"), "recommendations/m/run")
SITE, LAYERS, LAYER = "mlp_out", (3, 4, 5), 4


@dataclass(frozen=True)
class Ingredients:
    """All that a stage may be made from, and all that it may not depend on."""

    workspace: Path
    model: Path
    records: Path
    saes: Path
    source_saes: Path
    second: Path
    """Another model, whose SAEs are `source_saes`."""
    adapters: tuple[Path, ...] = ()
    scale: float = 1.0
    dtype: str = "float32"
    seed: int = 0
    counts: Parent = COUNTS
    recommendation: Parent = RECOMMENDATION
    options: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the case's own options."""
    execution: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that change no result."""
    threads: int | None = None


MODELS: dict[tuple[Any, ...], Model] = {}


def host(given: Ingredients) -> Model:
    """Load a model once; its files are hashed at each place."""
    key = (given.model, given.adapters, given.scale, given.dtype)
    if key not in MODELS:
        MODELS[key] = load_model(
            str(given.model), dtype=given.dtype, adapters=[str(a) for a in given.adapters],
            scale=given.scale,
        )  # fmt: skip
    return MODELS[key]


def run_of(folder: Path) -> SaeRun:
    """Describe the coders of a folder, which no run of a workspace made."""
    points = tuple(Hookpoint(layer, SITE) for layer in LAYERS)
    return SaeRun(folder, points, {}, 0, 0.0, False, relative=str(folder))


def artifact_of(parent: Parent, kind: type[Kind], **results: Any) -> Artifact:
    """Return an artifact of an identity that lies nowhere."""
    manifest = Manifest(kind=kind.name, identity=parent.identity, config={}, results=results)
    return Artifact(Path(parent.path), parent.path, manifest)


class _NamedError(Exception):
    """A stage has named its artifact."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage


def call_of(case: Case, given: Ingredients) -> Call:
    """Return what a case calls its stage with."""
    model = host(given)
    ctx = Context(Workspace(given.workspace), seed=given.seed, dtype=given.dtype)
    ctx.threads = given.threads
    ctx.models = {f"{given.model}|": model}
    return Call(ctx, model, given, {**case.options, **given.options})


def named(case: Case, given: Ingredients) -> Stage:
    """Call a stage up to where it has named its artifact, and return what it named."""
    plain = Context.stage

    def stage(ctx: Context, kind: type[Kind], *args: Any, **options: Any) -> Stage:
        told = plain(ctx, kind, *args, **options)
        if kind is case.kind:
            raise _NamedError(told)
        return told

    with patch.object(Context, "stage", stage):
        try:
            case.call(call_of(case, given))
        except _NamedError as error:
            return error.stage
    raise AssertionError(f"{case.name} named no artifact of kind {case.kind.name}")


@dataclass(frozen=True)
class Call:
    """What a case calls its stage with."""

    ctx: Context
    model: Model
    given: Ingredients
    options: dict[str, Any]

    @property
    def run(self) -> SaeRun:
        return run_of(self.given.saes)

    @property
    def corpus(self) -> CorpusConfig:
        """The case's corpus on the given records."""
        corpus = self.options.pop("corpus")
        default = corpus.source == CorpusConfig().source
        return replace(corpus, source=str(self.given.records)) if default else corpus


PARTS = (
    "adapter", "saes", "source", "second", "data", "questions", "groups", "seed", "counts",
    "recommendation",
)  # fmt: skip
"""Ingredients besides model, dtype and options: the model may be one with an adapter; data are
whole records, questions their texts and answers, groups what scores are split by."""


@dataclass(frozen=True)
class Case:
    """A stage, with small options."""

    name: str
    kind: type[Kind]
    function: Callable[..., Any]
    call: Callable[[Call], Any]
    options: Mapping[str, Any]
    """Configurations and other values that decide the result, by the stage's arguments."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Another value of each option that is no configuration."""
    execution: Mapping[str, Any] = field(default_factory=dict)
    """Another value of each argument that decides nothing."""
    parts: frozenset[str] = frozenset()
    """What else it is made from: names in `PARTS`."""
    fixed: frozenset[str] = frozenset()
    """Fields of its configurations that follow from something else here."""


# Calls


def _train(call: Call) -> Any:
    options, corpus = call.options, call.corpus
    return train_run(
        call.ctx, call.model, options["layers"], options["config"], corpus, **call.given.execution
    )


def _finetune(call: Call) -> Any:
    source = run_of(call.given.source_saes)
    with patch("resa_lens.stages.sae_job.open_saes", lambda *_, **__: source):
        return train_run(
            call.ctx, call.model, LAYERS, call.options["config"], call.corpus, source="anywhere"
        )


def _count(call: Call) -> Any:
    options = call.options
    return count_run(
        call.ctx, call.model, call.run, options["config"], options["layers"],
        control=options["control"],
    )  # fmt: skip


def _recommend(call: Call) -> Any:
    options = dict(call.options)
    quality = None
    if options["selector"] == "quality":
        quality = sae_quality(call.model, call.run, call.corpus, LAYERS)
    options.pop("corpus", None)
    return recommend_run(call.ctx, call.model, counted(call), site=SITE, quality=quality, **options)


def _stability(call: Call) -> Any:
    options = dict(call.options)
    count = options.pop("count")

    def counted(_ctx: Context, _model: Model, run: SaeRun, config: CountConfig, layers: Any) -> Any:
        given = replace(call.given, options={"config": config, "layers": layers})
        identity = named(CASES["counts"], given).identity
        return CountRun(artifact_of(Parent(identity, "counts/m/run"), Counts), _NoCounts())

    with ExitStack() as stack:
        stack.enter_context(patch("resa_lens.stages.stability.count_run", counted))
        stack.enter_context(patch("resa_lens.stages.stability.saes_for", lambda *_, **__: call.run))
        # The inner counts are named by the plain skeleton.
        return stability_run(
            call.ctx, call.model, sae=SaeConfig(), corpus=CorpusConfig(), count=count, **options
        )


class _NoCounts:
    """A feature a layer."""

    counts: Any = None

    def table(self, rule: str) -> dict[int, int]:
        return dict.fromkeys(LAYERS, 1)


def _quality(call: Call) -> Any:
    return quality_run(call.ctx, call.model, call.run, call.corpus, call.options["tokens"])


def job_of(given: Ingredients, options: Mapping[str, Any]) -> TuneJob:
    """Return a tuning of options, on the given model and records."""
    read = {"elicitation", "trigger"} & set(options)
    data = {name: replace(options[name], source=str(given.records)) for name in read}
    return TuneJob(**{"model": str(given.model), **options, **data, **given.execution})


def _tune(call: Call) -> Any:
    return adapter_run(call.ctx, job_of(call.given, call.options), call.run)


def _tune_recommended(call: Call) -> Any:
    results = {"recommended": [LAYER], "selector": "middle", "reason": "none"}
    artifact = artifact_of(call.given.recommendation, Recommendation, **results)
    job = job_of(call.given, {**call.options, "layer": "auto"})
    with patch("resa_lens.stages.tune_job.recommended_saes", lambda *_: call.run):
        return adapter_run(call.ctx, job, None, artifact)


def _evaluate(call: Call) -> Any:
    items = load_eval_items(str(call.given.records), EvalConfig())
    return eval_run(call.ctx, call.model, items, **call.options, **call.given.execution)


def _activity(call: Call) -> Any:
    options = dict(call.options)
    config = options.pop("config")
    options.pop("corpus")
    return activity_run(
        call.ctx, call.model, call.run, call.corpus, config, **options, **call.given.execution
    )


def _attribute(call: Call) -> Any:
    options = dict(call.options)
    point = Hookpoint(options.pop("layer"), SITE)
    options.pop("corpus")
    return attribute_run(call.ctx, call.model, call.run, point, call.corpus, **options)


def counted(call: Call) -> CountRun:
    """Return counts of one feature a layer, which are the given parent."""
    layers = [LayerCount(layer, dict.fromkeys(RULES, (1,)), 1) for layer in LAYERS]
    prompt: Any = None
    counts = FeatureCounts(prompt, tuple(layers), COUNT)
    return CountRun(artifact_of(call.given.counts, Counts), counts)


def _effects(call: Call) -> Any:
    options = dict(call.options)
    options.pop("corpus")
    rule = options.pop("rule")
    return effects_run(
        call.ctx, call.model, call.run, counted(call), rule, call.corpus, **options
    )  # fmt: skip


def _falsify(call: Call) -> Any:
    options = dict(call.options)
    config = options.pop("config")
    return falsify_run(call.ctx, call.model, call.run, counted(call), config, **options)


def _falsify_trained(call: Call) -> Any:
    training = SaeConfig(latents=16, k=4), CORPUS
    with (
        patch("resa_lens.stages.falsification.other_seeds", lambda *_: {}),
        patch.object(SaeRun, "training", lambda _: training),
    ):
        return _falsify(call)


def _score(call: Call) -> Any:
    options = call.options
    return score_run(
        call.ctx, call.model, call.run, call.corpus, options["config"], options["layers"]
    )


def _match(call: Call) -> Any:
    options, given = call.options, call.given
    # Features are matched on the same tokens.
    other = given.model if given.model.name == "model-tokenizer" else given.second
    second = Side(host(replace(given, model=other)), run_of(given.source_saes))
    return match_run(
        call.ctx, Side(call.model, call.run), second, call.corpus, options["config"],
        options["layers"],
    )  # fmt: skip


def _ablate(call: Call) -> Any:
    items = load_eval_items(str(call.given.records), EvalConfig())
    return ablate_run(
        call.ctx, call.model, call.run, items, call.options["config"], **call.given.execution
    )


def _insert(call: Call) -> Any:
    items = load_eval_items(str(call.given.records), EvalConfig())
    options = dict(call.options)
    options.pop("corpus")
    config = options.pop("config")
    return insertion_run(
        call.ctx, call.model, call.run, items, call.corpus, config, **options,
        **call.given.execution,
    )  # fmt: skip


def _route(call: Call) -> Any:
    """The model here is dense: what it would be refused for is left out."""
    with patch("resa_lens.stages.routing.find_routers", lambda _: {}):
        return routing_run(call.ctx, call.model, call.corpus, call.options["config"])


def _rank(call: Call) -> Any:
    with patch("resa_lens.stages.ranking.find_routers", lambda _: {}):
        return ranking_run(call.ctx, call.model, call.corpus, call.options["config"])


def _steer(call: Call) -> Any:
    items = load_eval_items(str(call.given.records), EvalConfig())
    with (
        patch("resa_lens.stages.steering.find_routers", lambda _: {}),
        patch("resa_lens.stages.steering.check_steering", lambda *_: None),
    ):
        return steering_run(
            call.ctx, call.model, items, call.corpus, call.options["config"],
            **call.given.execution,
        )  # fmt: skip


def _sweep(call: Call) -> Any:
    options = dict(call.options)
    own = ("layers", "seeds", "controls", "control_layers", "rule", "effects", "start_check",
           "probes")  # fmt: skip
    sweep = {name: options.pop(name) for name in own}
    options["eval_source"] = str(call.given.records)
    with (
        patch("resa_lens.stages.sweep.saes_for", lambda *_, **__: call.run),
        patch("resa_lens.stages.adapters.check_engine"),
    ):
        return sweep_run(call.ctx, SweepConfig(job_of(call.given, options), **sweep))


MODEL = frozenset({"adapter"})
COUNT, CORPUS = CountConfig(), CorpusConfig(sequence=64)
TUNING = {
    "layer": str(LAYER),
    "objective": Objective(),
    "lora": TuneConfig(rank=2),
    "elicitation": CORPUS,
    "sequence": None,
    "steps": 3,
    "control": None,
}
OTHER_TUNING = {"layer": "5", "sequence": 32, "steps": 4, "control": "noise"}
UNREAD = {
    "selector": "another", "reason": "another", "sae": SaeConfig(k=7), "allow_mismatch": True,
    "evaluation": EvalConfig(limit=3), "eval_source": "elsewhere", "trigger": CorpusConfig(seed=9),
    "saes": "/elsewhere", "engine": "vllm",
}  # fmt: skip
"""Of a tuning through SAEs that are at hand: what says why, and what is asked afterwards."""
EVAL = EvalConfig(generation=GenerationConfig(8, temperature=0.5))
PHASED = frozenset({"thought_share", "own_thoughts"})
"""Of stages whose documents hold every record's steps: the share is of what SAEs train on."""

CASES = {
    case.name: case
    for case in (
        Case(
            "saes", Saes, train_run, _train,
            {"layers": LAYERS, "config": SaeConfig(latents=64, k=4, tokens=512), "corpus": CORPUS},
            {"layers": (3, 4)},
            {"memory_limit_mb": 4000.0, "spread_layers": True, "report": True},
            MODEL | {"data"},
            frozenset({"mode"}),
        ),
        Case(
            "saes-finetune", Saes, train_run, _finetune,
            {"config": SaeConfig(mode="finetune", tokens=512), "corpus": CORPUS},
            parts=MODEL | {"data", "source"},
            fixed=frozenset({"latents", "k", "activation", "mode"}),
        ),
        Case(
            "counts", Counts, count_run, _count,
            {"config": COUNT, "layers": LAYERS, "control": None},
            {"layers": (3, 4), "control": "random"},
            parts=MODEL | {"saes"},
        ),
        Case(
            "counts-random", Counts, count_run, _count,
            {"config": COUNT, "layers": LAYERS, "control": "random"},
            {"layers": (3, 4), "control": None},
            parts=MODEL | {"saes", "seed"},
        ),
        Case(
            "recommendation", Recommendation, recommend_run, _recommend,
            {"rule": "all", "selector": "mixture", "recipe": "robust", "causal": None,
             "insertion": None, "gradient": None, "change": None},
            {"rule": "any", "selector": "middle", "recipe": "paper", "causal": {3: 0.5},
             "insertion": {3: (0.1, 0.02)}, "gradient": {3: (0.1, 0.02)},
             "change": {3: (0.1, 0.02)}},
            parts=MODEL | {"counts", "seed"},
        ),
        Case(
            "recommendation-quality", Recommendation, recommend_run, _recommend,
            {"rule": "all", "selector": "quality", "recipe": "robust", "corpus": CORPUS},
            {"rule": "any", "selector": "middle", "recipe": "paper"},
            parts=MODEL | {"counts", "seed", "data"},
        ),
        Case(
            "recommendation-causal", Recommendation, recommend_run, _recommend,
            {"rule": "all", "selector": "causal", "recipe": "robust",
             "causal": {3: (0.5, 0.1, 3.0)}},
            {"rule": "any", "selector": "blend", "recipe": "paper",
             "causal": {3: (0.5, 0.1, 4.0)}},
            parts=MODEL | {"counts", "seed"},
        ),
        Case(
            "stability", Stability, stability_run, _stability,
            {"count": COUNT, "layers": LAYERS, "prompts": ("r1", "short"), "rules": ("all", "any"),
             "selector": "mixture", "recipe": "robust"},
            {"layers": (3, 4), "prompts": ("r1",), "rules": ("all",), "selector": "most-features",
             "recipe": "paper"},
            parts=MODEL | {"saes", "seed"},
            fixed=frozenset({"prompt"}),
        ),
        Case(
            "quality", Quality, quality_run, _quality,
            {"corpus": CORPUS, "tokens": 256}, {"tokens": 257},
            parts=MODEL | {"saes", "data"}, fixed=PHASED,
        ),
        Case(
            "adapter", Adapter, adapter_run, _tune, TUNING, OTHER_TUNING, UNREAD,
            frozenset({"saes", "data"}),
        ),
        Case(
            "adapter-auto", Adapter, adapter_run, _tune_recommended,
            {k: v for k, v in TUNING.items() if k != "layer"},
            {k: v for k, v in OTHER_TUNING.items() if k != "layer"},
            {"selector": "another", "evaluation": EvalConfig(limit=3), "engine": "vllm"},
            frozenset({"saes", "data", "recommendation"}),
        ),
        Case(
            "adapter-noise", Adapter, adapter_run, _tune, {**TUNING, "control": "noise"},
            {**OTHER_TUNING, "control": "pca"}, UNREAD, frozenset({"saes", "data", "seed"}),
        ),
        Case(
            "adapter-cot", Adapter, adapter_run, _tune,
            {**{k: v for k, v in TUNING.items() if k != "layer"}, "control": "cot"},
            {"sequence": 32, "steps": 4, "control": "own-samples"}, {**UNREAD, "layer": "5"},
            frozenset({"data"}),
            # What is no part of a loss on texts.
            frozenset({"preset", "site", "reference", "reference_gradient", "direction",
                       "sae_gradient", "reduction", "teacher"}),
        ),
        Case(
            "adapter-own-samples", Adapter, adapter_run, _tune,
            {**{k: v for k, v in TUNING.items() if k != "layer"}, "control": "own-samples",
             "engine": "hf"},
            {"sequence": 32, "steps": 4, "control": "cot", "engine": "vllm"},
            {**{k: v for k, v in UNREAD.items() if k != "engine"}, "layer": "5"},
            frozenset({"data"}),
            frozenset({"preset", "site", "reference", "reference_gradient", "direction",
                       "sae_gradient", "reduction", "teacher"}),
        ),
        Case(
            "eval", Eval, eval_run, _evaluate, {"config": EVAL, "engine": "hf", "replicates": 1},
            {"engine": "lighteval", "replicates": 2},
            {"source": "another", "label": "another"}, MODEL | {"questions", "groups"},
        ),
        Case(
            "sweep", Sweep, sweep_run, _sweep,
            {"layers": LAYERS, "seeds": 2, "controls": ("noise",), "control_layers": (LAYER,),
             "rule": "all", "effects": True, "start_check": False, "probes": False,
             "objective": Objective(), "lora": TuneConfig(rank=2),
             "trigger": CORPUS, "elicitation": CORPUS, "evaluation": EVAL, "sequence": None,
             "steps": 3, "engine": "hf"},
            {"layers": (3, 4), "seeds": 1, "controls": ("pca",), "control_layers": (5,),
             "rule": "any", "effects": False, "start_check": True, "probes": True, "sequence": 32,
             "steps": 4, "engine": "vllm"},
            {"selector": "another", "reason": "another", "sae": SaeConfig(k=7),
             "allow_mismatch": True, "saes": "/elsewhere", "layer": "5"},
            frozenset({"saes", "data", "seed"}),
            # It draws another order.
            frozenset({"limit"}),
        ),
        Case(
            "activity", Activity, activity_run, _activity,
            {"config": ActivityConfig(), "corpus": CORPUS, "layers": LAYERS, "tokens": 300},
            {"layers": (3, 4), "tokens": 301},
            {"memory_limit_mb": 4000.0, "max_new_tokens": 9},
            MODEL | {"saes", "data"}, PHASED,
        ),
        Case(
            "activity-generations", Activity, activity_run, _activity,
            {"config": ActivityConfig(), "corpus": CORPUS, "layers": LAYERS, "generations": 4,
             "max_new_tokens": 8, "engine": "hf"},
            {"layers": (3, 4), "generations": 5, "max_new_tokens": 9, "engine": "vllm"},
            {"memory_limit_mb": 4000.0, "tokens": 9},
            MODEL | {"saes", "questions"}, PHASED,
        ),
        Case(
            "attribution", Attribution, attribute_run, _attribute,
            {"corpus": CORPUS, "layer": LAYER, "metric": "loss", "features": None, "top": 5,
             "tokens": 300},
            {"layer": 5, "metric": "think", "features": (1, 2), "top": 6, "tokens": 301},
            {}, MODEL | {"saes", "data", "seed"}, PHASED,
        ),
        Case(
            "effects", Effects, effects_run, _effects,
            {"corpus": CORPUS, "rule": "all", "tokens": 300, "controls": 3},
            {"rule": "any", "tokens": 301, "controls": 4},
            {}, MODEL | {"saes", "data", "seed", "counts"}, PHASED,
        ),
        Case(
            "ablation", Ablation, ablate_run, _ablate,
            {"config": AblationConfig(Hookpoint(LAYER, SITE), (1, 2), kind="clamp", value=2.0,
                                      eval=EVAL)},
            {}, {"source": "another"}, MODEL | {"saes", "questions"},
            frozenset({"site", "limit"}),
        ),
        Case(
            "insertion", Insertion, insertion_run, _insert,
            {"config": InsertionConfig("short", 300, eval=EVAL), "corpus": CORPUS,
             "layers": (LAYER,)},
            {"layers": (5,)}, {"tasks": "another"}, MODEL | {"saes", "data", "questions"},
            PHASED | {"limit"},
        ),
        Case(
            "routing", Routing, routing_run, _route,
            {"config": UseConfig(tokens=300), "corpus": CORPUS}, {}, {}, MODEL | {"data"}, PHASED,
        ),
        Case(
            "ranking", Ranking, ranking_run, _rank,
            {"config": RankConfig(by="npmi"), "corpus": CORPUS}, {}, {}, MODEL | {"data"},
            # By its name, or the contents of its files: tested apart.
            PHASED | {"classes"},
        ),
        Case(
            "steering", Steering, steering_run, _steer,
            {"config": SteerConfig(sizes=(1, 2), eval=EVAL), "corpus": CORPUS}, {},
            {"source": "another"}, MODEL | {"data", "questions"},
            # A factor goes with one way alone.
            PHASED | {"classes", "beta", "limit"},
        ),
        Case(
            "falsification", Falsification, falsify_run, _falsify,
            {"config": FalsifyConfig(texts=2, shuffles=2), "plain_texts": ("a b c", "d e f"),
             "other_seed": True, "random_weights": True},
            {"plain_texts": ("a b c", "d e g"), "other_seed": False, "random_weights": False},
            {}, MODEL | {"saes", "counts"},
        ),
        Case(
            "falsification-trained", Falsification, falsify_run, _falsify_trained,
            {"config": FalsifyConfig(texts=2, shuffles=2), "other_seed": True,
             "random_weights": True},
            {"other_seed": False, "random_weights": False},
            {}, frozenset({"saes", "counts", "seed"}),
        ),
        Case(
            "scores", Scores, score_run, _score,
            {"config": ScoreConfig(tokens=300, draws=10), "corpus": CORPUS, "layers": LAYERS},
            {"layers": (3, 4)}, {}, MODEL | {"saes", "data", "seed"},
            # Fewer are shown than were kept; the other text is tested apart.
            PHASED | {"top", "other"},
        ),
        Case(
            "matches", Matches, match_run, _match,
            {"config": MatchConfig(tokens=300), "corpus": CORPUS, "layers": LAYERS},
            {"layers": (3, 4)}, {}, frozenset({"saes", "source", "second", "data", "seed"}), PHASED,
        ),
    )
}  # fmt: skip


# Other values


OTHER: dict[tuple[str, str], Any] = {
    ("TuneConfig", "adapter_layers"): "middle",
    ("SaeConfig", "site"): "resid_post",
    ("SaeConfig", "learning_rate"): 0.125,
    ("SaeConfig", "batch"): 3,
    ("SaeConfig", "optimizer"): "adam",
    ("SaeConfig", "activation"): "batchtopk",
    ("SaeConfig", "allocation"): "zipf",
    ("SaeConfig", "aux"): "zipf",
    ("SaeConfig", "schedule"): "linear",
    ("SaeConfig", "mode"): "pretrained",
    ("CorpusConfig", "system_prompt"): "short",
    ("CorpusConfig", "question_column"): "question",
    ("CorpusConfig", "answer_column"): "answer",
    ("CorpusConfig", "steps_column"): "steps",
    ("CorpusConfig", "rows"): 10**6,
    ("CorpusConfig", "packing"): "separate",
    ("CountConfig", "prompt"): "short",
    ("CountConfig", "open_tag"): "<answer>",
    ("CountConfig", "close_tag"): "</answer>",
    ("TuneConfig", "dropout"): 0.5,
    ("TuneConfig", "checkpoint_every"): 2,
    ("Objective", "preset"): "reference",
    ("Objective", "site"): "resid_post",
    ("Objective", "reference"): "base",
    ("Objective", "teacher"): "base",
    ("Objective", "direction"): "reference||sae",
    ("Objective", "reduction"): "sum",
    ("Objective", "targets"): ("q_proj",),
    ("Objective", "schedule"): "constant",
    ("Objective", "clip_norm"): 1.0,
    ("TuneConfig", "compile"): "off",
    ("EvalConfig", "prompt_style"): "direct",
    ("EvalConfig", "system_prompt"): "Think.",
    ("EvalConfig", "limit"): 1000,
    ("EvalConfig", "levels"): (1, 2, 3, 4),
    ("EvalConfig", "extraction"): "boxed",
    ("ScoreConfig", "scores"): ("auc",),
    ("ScoreConfig", "words"): ("hence",),
    ("ScoreConfig", "window"): (3, 4),
    ("ScoreConfig", "correction"): "holm",
    ("MatchConfig", "threshold"): 0.5,
    ("FalsifyConfig", "fires"): 0.25,
    ("InsertionConfig", "arms"): "full",
    ("AblationConfig", "features"): (1, 3),
    ("AblationConfig", "rule"): "all",
    ("AblationConfig", "kind"): "steer",
    ("AblationConfig", "at"): "first",
    ("AblationConfig", "doses"): (0.5,),
    ("AblationConfig", "phases"): ("think",),
    ("UseConfig", "unit"): "sum",
    ("RankConfig", "by"): "rd",
    ("RankConfig", "target"): "think",
    ("SteerConfig", "experts"): "1:2",
    ("SteerConfig", "how"): "zero",
    ("SteerConfig", "where"): "think",
    ("SteerConfig", "sizes"): (1,),
    ("GenerationConfig", "top_p"): 0.5,
    ("GenerationConfig", "stop"): ("\n",),
    ("GenerationConfig", "timeout"): 9.0,
}
"""Another value of each field that is no number and no switch."""


def other_value(config: Any, name: str) -> Any:
    """Return another value of a configuration's field.

    Raises:
        AssertionError: a new field that is neither a number nor a switch needs one in `OTHER`.
    """
    if (key := (type(config).__name__, name)) in OTHER:
        return OTHER[key]
    value = getattr(config, name)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 or 0.25  # a share stays one
    raise AssertionError(f"name another value of {key} in OTHER")


def leaves(
    config: Any, role: str, fixed: frozenset[str], path: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield path and changed whole for each field of a role, those of nested configurations too."""
    known = roles(config)
    for item in fields(config):
        value = getattr(config, item.name)
        here = f"{path}{item.name}"
        if is_dataclass(value):
            for below, changed in leaves(value, role, fixed, f"{here}."):
                yield below, replace(config, **{item.name: changed})
        # A column of whole texts makes other records of the same rows.
        elif known[item.name] == role and item.name not in {"source", "text_column", *fixed}:
            yield here, replace(config, **{item.name: other_value(config, item.name)})


def option_changes(case: Case, role: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a name and changed options for each option of a role."""
    for name, value in case.options.items():
        if is_dataclass(value):
            for path, changed in leaves(value, role, case.fixed):
                yield f"{name}.{path}", {name: changed}
        elif role == "result":
            yield name, {name: case.others[name]}


# Other contents


ADAPTER = "tiny-reasoner-rl/checkpoints/step-35"


class Materials:
    """Tiny copies of models, adapters, records and SAEs, and copies that differ in one thing."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.plain = Ingredients(
            place / "workspace",
            data_path("tiny-reasoner"),
            self.records("records"),
            self.saes("saes", 0),
            self.saes("source", 1),
            data_path("tiny-reasoner"),
        )

    def records(self, name: str, *, ids: bool = True, **changed: Any) -> Path:
        """Write six records; the third one may differ."""
        lines = data_path("tiny/test.jsonl").read_text().splitlines()[:6]
        rows = [json.loads(line) for line in lines]
        rows = [{"id": f"q{n}", **row} for n, row in enumerate(rows)] if ids else rows
        rows[2].update(changed)
        # One name: an identity by the file's name would pass for one by its contents.
        file = self.place / name / "records.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    def other(self, name: str) -> Path:
        """Write the records with one value changed."""
        return self.records(f"other-{name}", **{name: OTHER_RECORD[name]})

    def saes(self, name: str, seed: int) -> Path:
        """Write a small coder for each layer."""
        folder = self.place / name
        for layer in LAYERS:
            coder = new_coder(128, 16, 4, seed=seed + layer)
            coder.save_to_disk(folder / Hookpoint(layer, SITE).sparsify)
        return folder

    def copy(
        self, source: Path, name: str, change: Callable[[Path], None] = lambda target: None
    ) -> Path:
        """Copy a file or a folder and change the copy; the second call returns the first's."""
        target = self.place / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
            change(target)
        return target

    def model(self, what: str) -> Path:
        """Copy the model with one of `MODEL_CHANGES`, or as it is."""
        change = MODEL_CHANGES.get(what, lambda folder: None)
        return self.copy(data_path("tiny-reasoner"), f"model-{what}", change)

    def adapter(self, what: str) -> Path:
        """Copy an adapter with one of `ADAPTER_CHANGES`, or as it is."""
        change = ADAPTER_CHANGES.get(what, lambda folder: None)
        return self.copy(data_path(ADAPTER), f"adapter-{what}", change)

    def changed_saes(self, folder: Path, what: str) -> Path:
        """Copy SAEs with one of `SAE_CHANGES` at the layer that all stages read."""
        place = Hookpoint(LAYER, SITE).sparsify
        return self.copy(
            folder, f"{folder.name}-{what}", lambda target: SAE_CHANGES[what](target / place)
        )

    def changes(self, case: Case) -> Iterator[tuple[str, Callable[[], Ingredients]]]:
        """Yield each ingredient of a case with what makes a changed one, lazily."""
        plain, parts = self.plain, case.parts
        for what in MODEL_CHANGES:
            yield f"model {what}", lambda what=what: replace(plain, model=self.model(what))
        yield "dtype", lambda: replace(plain, dtype="bfloat16")
        if "adapter" in parts:
            yield "adapter", lambda: replace(plain, adapters=(self.adapter("same"),))
            for what in ADAPTER_CHANGES:
                yield (
                    f"adapter {what}",
                    lambda what=what: replace(plain, adapters=(self.adapter(what),)),
                )
            yield (
                "adapter scale",
                lambda: replace(plain, adapters=(self.adapter("same"),), scale=0.5),
            )
        for name in dict.fromkeys(name for part in READ for name in READ[part] if part in parts):
            yield f"data {name}", lambda name=name: replace(plain, records=self.other(name))
        for part, attribute in (("saes", "saes"), ("source", "source_saes")):
            if part in parts:
                for what in SAE_CHANGES:
                    yield (
                        f"{part} {what}",
                        lambda what=what, attribute=attribute: replace(
                            plain,
                            **{attribute: self.changed_saes(getattr(plain, attribute), what)},
                        ),
                    )
        if "second" in parts:
            yield "second model", lambda: replace(plain, second=self.model("weights"))
        for part in ("counts", "recommendation"):
            if part in parts:
                parent = Parent(digest(f"other {part}"), getattr(plain, part).path)
                yield f"parent {part}", lambda p=part, to=parent: replace(plain, **{p: to})
        if "seed" in parts:
            yield "seed", lambda: replace(plain, seed=1)
        for name, options in option_changes(case, "result"):
            yield f"option {name}", lambda options=options: replace(plain, options=options)

    def sames(self, case: Case) -> Iterator[tuple[str, Callable[[], Ingredients]]]:
        """Yield each change of a name, a place or an execution option, lazily."""
        plain, parts = self.plain, case.parts
        yield "workspace", lambda: replace(plain, workspace=self.place / "elsewhere" / "workspace")
        yield "model's place", lambda: replace(plain, model=self.model("same"))
        yield "second model's place", lambda: replace(plain, second=self.model("same"))
        yield "threads", lambda: replace(plain, threads=2)
        if "seed" not in parts:
            yield "seed", lambda: replace(plain, seed=1)
        if parts & set(READ):
            yield (
                "data's name",
                lambda: replace(plain, records=self.copy(plain.records, "another-name.jsonl")),
            )
        for attribute in ("saes", "source_saes"):
            yield (
                attribute,
                lambda a=attribute: replace(
                    plain, **{a: self.copy(getattr(plain, a), f"moved/{a}")}
                ),
            )
        for part in ("counts", "recommendation"):
            parent = replace(getattr(plain, part), path="elsewhere")
            yield f"{part}'s place", lambda p=part, to=parent: replace(plain, **{p: to})
        for name, value in case.execution.items():
            yield f"{name}", lambda n=name, v=value: replace(plain, execution={n: v})
        for role in ("execution", "source"):
            for name, options in option_changes(case, role):
                yield f"{role} {name}", lambda options=options: replace(plain, options=options)


OTHER_RECORD = {
    "question": "What is 1+1?",
    "answer": "1234",
    "steps": "1+1=2",
    "family": "another",
    "level": 9,
}
"""Another value of each part of a record."""
READ = {
    "data": tuple(OTHER_RECORD),
    "questions": ("question", "answer"),
    "groups": ("family", "level"),
}
"""What of the records a stage reads."""


def flip(file: Path) -> None:
    """Change the last bit of the mantissa of the last value of a safetensors file."""
    data = bytearray(file.read_bytes())
    # Little-endian: the low byte of a bfloat16 is the last but one, of a float32 the last but 3.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    last = max(
        (v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"]
    )
    data[-2 if last["dtype"] in ("BF16", "F16") else -4] ^= 1
    file.write_bytes(data)


def edit(file: Path, **changed: Any) -> None:
    """Change values of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}, indent=2))


def swap_tokens(file: Path) -> None:
    """Exchange the numbers of two tokens of a tokenizer's vocabulary."""
    value = json.loads(file.read_text())
    vocabulary = value["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    file.write_text(json.dumps(value, ensure_ascii=False))


def _multiply_alpha(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    edit(folder / "adapter_config.json", lora_alpha=3_000_000 * config["lora_alpha"])


def _lengthen_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


Change = Callable[[Path], None]
MODEL_CHANGES: dict[str, Change] = {
    "weights": lambda folder: flip(folder / "model.safetensors"),
    "config": lambda folder: edit(folder / "config.json", rms_norm_eps=1e-5),
    "generation defaults": lambda folder: edit(
        folder / "generation_config.json", repetition_penalty=1.1
    ),
    "tokenizer": lambda folder: swap_tokens(folder / "tokenizer.json"),
    "tokenizer's options": lambda folder: edit(
        folder / "tokenizer_config.json", clean_up_tokenization_spaces=True
    ),
    "template": _lengthen_template,
}
ADAPTER_CHANGES: dict[str, Change] = {
    "weights": lambda folder: flip(folder / "adapter_model.safetensors"),
    "config": _multiply_alpha,
}
SAE_CHANGES: dict[str, Change] = {
    "tensor": lambda folder: flip(folder / "sae.safetensors"),
    "cfg": lambda folder: edit(folder / "cfg.json", k=3),
}
