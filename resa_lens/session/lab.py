"""The lab: one workspace, and the stages as methods that take and return objects."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import parse_layers
from resa_lens.models.host import Model
from resa_lens.progress import SILENT, ConsoleReporter, PrintedReporter
from resa_lens.session.discovery import Counts, Recommendation, SAEs
from resa_lens.session.features import Activity, Falsification
from resa_lens.session.insertion import Insertion
from resa_lens.session.options import COMMON, filled
from resa_lens.session.scores import Comparison, Scores, Tuned

if TYPE_CHECKING:
    from resa_lens.evals.run import EvalConfig
    from resa_lens.tuning.config import Control

Layers = str | int | Sequence[int] | None
"""Layers as "1-10", "3,5,13th", 5 or [3, 5], 0-based, or None for the default."""


def open_lab(
    workspace: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    threads: int | None = None,
    deterministic: bool = False,
    quiet: bool = False,
) -> Lab:
    """Open a workspace: the folder that holds all results, made with the first of them.

    Args:
        workspace: the folder; by default RESA_LENS_WORKSPACE, else ./resa-workspace.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16" or "float16".
        seed: of everything that is drawn, unless a call has another one.
        threads: of the CPU; one for narrow models by default.
        deterministic: promise the same bits on CUDA too.
        quiet: say nothing while working.

    Raises:
        BadInputError: the path is a file.
    """
    reporter = SILENT if quiet else ConsoleReporter() if sys.stderr.isatty() else PrintedReporter()
    place = Workspace(workspace)
    reporter.note(f"workspace: {place.root}")
    return Lab(Context(place, reporter, seed, device, dtype, False, threads, deterministic))


class Lab:
    """A workspace with the stages as methods; what is there already is read, not made again.

    >>> counts = lab.count_features(model, saes)
    >>> recommendation = lab.recommend(counts)
    >>> recommendation.layer, recommendation.verdict
    (5, 'not distinguishable from flat')

    Options are the fields of the configurations, by their names (`latents=512`); an unknown one is
    a `TypeError` that names the nearest.  Every method that makes something takes `seed` and
    `force` besides: `force=True` makes it anew.  What a stage refuses is a `BadInputError`.
    """

    def __init__(self, context: Context) -> None:
        """Work in a context: its workspace, device and seed."""
        self.context = context

        self.workspace = context.workspace

    def __repr__(self) -> str:
        """Say where the results lie."""
        return f"Lab in {self.workspace.root}"

    def _context(self, options: dict[str, Any]) -> Context:
        """Take seed and force from the options of a call."""
        own = {name: options.pop(name) for name in COMMON if name in options}
        return replace(self.context, **own)

    def model(
        self,
        model: str | Path | Tuned = "tiny-reasoner",
        *,
        base: str | None = None,
        adapters: Sequence[str | Path] = (),
        scale: float | Sequence[float] = 1.0,
    ) -> Model:
        """Load a model onto its host; a second call returns the same object.

        >>> lab.model("tiny-reasoner").n_layers
        12

        Args:
            model: a bundled name, a hub id, a folder, a .gguf file, a PEFT adapter folder, or what
                `tune` returned.
            base: the base model of an adapter folder that does not say it.
            adapters: adapter folders to put onto the model.
            scale: a factor on the adapters, or one for each.

        Raises:
            BadInputError: no such model, or one that is damaged or not supported.
        """
        name = str(model)
        if isinstance(model, Tuned):
            name, base = str(model.path), base or model.run.model.name
        folders = [str(adapter) for adapter in adapters]
        return self.context.model(name, base, adapters=folders, scale=scale)

    def train_saes(
        self,
        model: Model,
        layers: Layers = None,
        *,
        saes: str | Path | SAEs | None = None,
        memory_limit_mb: float | None = None,
        **options: Any,
    ) -> SAEs:
        """Train an SAE at every layer in one pass over the data; a killed run goes on.

        >>> saes = lab.train_saes(model, layers="4-6", latents=256, tokens=4096)
        >>> saes.layers, saes.sae(5).W_dec.shape
        ([4, 5, 6], torch.Size([256, 128]))

        Args:
            model: the model whose activations are learned.
            layers: "1-10", "3,5,13th", 5 or [3, 5], 0-based; all but the first and the last.
            saes: the SAEs that modes "finetune" and "pretrained" begin with.
            memory_limit_mb: what the process may take; by default what is free.
            options: fields of `SaeConfig` and `CorpusConfig`.
        """
        from resa_lens.saes.train import SaeConfig
        from resa_lens.stages.sae_training import train_run
        from resa_lens.texts.corpora import CorpusConfig

        ctx = self._context(options)
        sae, corpus = filled(
            "train_saes", options, SaeConfig(seed=ctx.seed), CorpusConfig(seed=ctx.seed)
        )
        run = train_run(
            ctx, model, _layers(layers, model), sae, corpus, source=_place(saes),
            memory_limit_mb=memory_limit_mb,
        )  # fmt: skip
        return SAEs(run, model)

    def saes(
        self,
        model: Model,
        place: str | Path | None = None,
        layers: Layers = None,
        *,
        allow_mismatch: bool = False,
        **options: Any,
    ) -> SAEs:
        """Return SAEs of a model: from a place, else the workspace's newest, else trained now.

        Args:
            model: the model they are put into.
            place: a folder of SAEs or a hub id; their fit to the model is checked.
            layers: as of `train_saes`; of a place all that it has by default.
            allow_mismatch: warn where they do not fit, in place of refusing.
            options: fields of `SaeConfig` and `CorpusConfig`, to look for or to train.
        """
        from resa_lens.saes.train import SaeConfig
        from resa_lens.stages.sae_training import saes_for
        from resa_lens.texts.corpora import CorpusConfig

        ctx = self._context(options)
        sae, corpus = filled("saes", options, SaeConfig(seed=ctx.seed), CorpusConfig(seed=ctx.seed))
        places = _layers(layers, model)
        run = saes_for(
            ctx, model, places, sae, corpus, _place(place), allow_mismatch=allow_mismatch,
            only=None if layers is None else places, anew=ctx.force,
        )  # fmt: skip
        return SAEs(run, model)

    def count_features(
        self,
        model: Model,
        saes: SAEs,
        layers: Layers = None,
        *,
        control: str | None = None,
        **options: Any,
    ) -> Counts:
        """Count the features that fire at the think tags of a prompt and nowhere else in it.

        >>> lab.count_features(model, saes, control="random").table().columns.tolist()
        ['all', 'any', 'either', 'active']

        Args:
            model: the model that reads the prompt.
            saes: the SAEs whose latents are counted.
            layers: as of `train_saes`; all that the SAEs have by default.
            control: "random" counts on random directions in the SAEs' place.
            options: fields of `CountConfig`.
        """
        from resa_lens.features.exclusive import CountConfig
        from resa_lens.stages.counts import count_run

        ctx = self._context(options)
        (config,) = filled("count_features", options, CountConfig())
        places = None if layers is None else _layers(layers, model)
        run = count_run(ctx, model, saes.run, config, places, control=control)
        return Counts(run, model, saes)

    def recommend(
        self,
        counts: Counts,
        *,
        rule: str = "all",
        selector: str = "mixture",
        recipe: str = "robust",
        target: Model | None = None,
        **options: Any,
    ) -> Recommendation:
        """Recommend layers to tune from counts, with a verdict; never without a layer.

        Args:
            counts: the counted features.
            rule: whose counts decide: "all" (strict), "any" or "either".
            selector: "mixture", "most-features", "middle", "quality", "causal", "blend" or
                "insertion"; the last four measure what they need.
            recipe: of the mixture, "robust" or "paper".
            target: of the selector "insertion", the model that the SAEs are inserted into.
            options: fields of `CorpusConfig`, for the measuring selectors.
        """
        from resa_lens.features.exclusive import check_rule
        from resa_lens.layers.selectors import SELECTORS
        from resa_lens.stages.attribution import measure_effects
        from resa_lens.stages.insertion import measure_gains
        from resa_lens.stages.recommendation import RECIPES, recommend_run, sae_quality
        from resa_lens.texts.corpora import CorpusConfig

        check_rule(rule)
        _one_of("selector", selector, tuple(SELECTORS))
        _one_of("recipe", recipe, RECIPES)
        ctx = self._context(options)
        (corpus,) = filled("recommend", options, CorpusConfig(seed=ctx.seed))
        model, saes = counts.model, counts.saes.run
        layers = [item.layer for item in counts.run.counts.layers]
        quality = effects = gains = None
        if selector in ("quality", "blend"):
            quality = sae_quality(model, saes, corpus, layers)
        if selector in ("causal", "blend"):
            effects = measure_effects(ctx, model, rule, corpus)(saes, counts.run)
        if selector == "insertion":
            gains = measure_gains(ctx, target or model, model, corpus)(saes, layers)
        run = recommend_run(
            ctx, model, counts.run, rule=rule, selector=selector, recipe=recipe, site=saes.site,
            quality=quality, causal=effects, insertion=gains,
        )  # fmt: skip
        return Recommendation(run, counts)

    def falsify(
        self,
        model: Model,
        saes: SAEs,
        counts: Counts,
        *,
        plain_texts: Sequence[str] | None = None,
        other_seed: bool = True,
        random_weights: bool = True,
        **options: Any,
    ) -> Falsification:
        """Try to refute every counted feature: token detector, prompt artefact, or survives.

        Args:
            model: the model that was counted in.
            saes: the SAEs that were counted.
            counts: the counted features.
            plain_texts: texts to put the tags into, in place of ours.
            other_seed: look for each feature in the SAEs of another seed, trained if missing.
            random_weights: put a random-weights model's SAEs to the same tests, trained if missing.
            options: fields of `FalsifyConfig`.
        """
        from resa_lens.features.falsify import FalsifyConfig
        from resa_lens.features.stimuli import PLAIN_TEXTS
        from resa_lens.stages.falsification import falsify_run

        ctx = self._context(options)
        (config,) = filled("falsify", options, FalsifyConfig(seed=ctx.seed))
        run = falsify_run(
            ctx, model, saes.run, counts.run, config, plain_texts=plain_texts or PLAIN_TEXTS,
            other_seed=other_seed, random_weights=random_weights,
        )  # fmt: skip
        return Falsification(run, counts)

    def activity(
        self,
        model: Model,
        saes: SAEs,
        layers: Layers = None,
        *,
        text_tokens: int = 100_000,
        generations: int = 0,
        max_new_tokens: int = 256,
        memory_limit_mb: float | None = None,
        **options: Any,
    ) -> Activity:
        """Tally every feature over documents: how often, how strongly, in which phase.

        Args:
            model: the host.
            saes: one SAE a layer.
            layers: as of `train_saes`; all that the SAEs have by default.
            text_tokens: tokens of the documents, at most.
            generations: answer so many questions, and look at these documents instead.
            max_new_tokens: of one answer.
            memory_limit_mb: what the process may take; by default what is free.
            options: fields of `ActivityConfig` and `CorpusConfig`.
        """
        from resa_lens.features.activity import ActivityConfig
        from resa_lens.stages.activity import activity_run
        from resa_lens.texts.corpora import CorpusConfig

        ctx = self._context(options)
        config, corpus = filled("activity", options, ActivityConfig(), CorpusConfig(seed=ctx.seed))
        run = activity_run(
            ctx, model, saes.run, corpus, config,
            layers=None if layers is None else _layers(layers, model), tokens=text_tokens,
            generations=generations, max_new_tokens=max_new_tokens, memory_limit_mb=memory_limit_mb,
        )  # fmt: skip
        return Activity(run, saes)

    def insert(
        self,
        model: Model,
        saes: SAEs,
        layers: Layers = None,
        *,
        tasks: str = "tiny",
        limit: int | None = 500,
        **options: Any,
    ) -> Insertion:
        """Insert SAEs while the model answers, tuning nothing: what could they teach?

        >>> test = lab.insert(model, saes, layers=5, limit=8, arms="short")
        >>> test.verdicts
        {5: 'cost only'}

        Args:
            model: the model that answers.
            saes: the SAEs that are inserted, of this model or of another one of its shape.
            layers: as of `train_saes`; all that the SAEs have by default.
            tasks: the questions, as of `eval`.
            limit: questions at most; None for all.
            options: fields of `InsertionConfig` and `CorpusConfig`; `arms="short"` leaves noise
                alone beside the SAE.
        """
        from resa_lens.evals.run import EvalConfig
        from resa_lens.stages.insertion import InsertionConfig, insertion_run
        from resa_lens.stages.scores import load_eval_items
        from resa_lens.texts.corpora import CorpusConfig

        ctx = self._context(options)
        evaluation = EvalConfig(limit=limit)
        config, corpus = filled(
            "insert", options, InsertionConfig(eval=evaluation, seed=ctx.seed),
            CorpusConfig(seed=ctx.seed),
        )  # fmt: skip
        run = insertion_run(
            ctx, model, saes.run, load_eval_items(tasks, evaluation), corpus, config,
            layers=None if layers is None else _layers(layers, model), source=saes.model,
            asked=tasks,
        )  # fmt: skip
        return Insertion(run, model)

    def tune(
        self,
        model: Model,
        saes: SAEs | None = None,
        *,
        layer: Recommendation | int | str | None = None,
        control: Control | None = None,
        preset: str = "paper",
        tasks: str = "tiny",
        limit: int | None = 500,
        steps: int | None = None,
        start_check: bool = True,
        **options: Any,
    ) -> Tuned:
        """Tune LoRA adapters through a layer's frozen SAE, and score the model before and after.

        Args:
            model: the target.
            saes: the SAEs to tune through; those that the recommendation was counted on.
            layer: a recommendation, a layer ("13th" is 1-based, 12 is 0-based), or nothing for a
                control that needs no SAE.
            control: what stands in the SAE's place, with its FVU: "noise", "pca", "shuffled",
                "random", "random-weights", or "none" and "identity", with which nothing trains; or
                what is done instead: "cot-free", "cot", "own-samples".
            preset: "paper", "reference" for the authors' code, or "distil" for a frozen teacher
                with the SAE; at the SAEs' site in any case.
            tasks: the questions that are scored, as of `eval`.
            limit: questions to score before and after; None for all.
            steps: updates; by default two epochs for wide models, 100 below width 1,024.
            start_check: insert the SAE first and tune nothing, and warn where it carries no gain.
            options: fields of `TuneConfig`, `Objective`, and of `CorpusConfig` for the data.
        """
        from resa_lens.evals.run import EvalConfig
        from resa_lens.stages.tune_job import TuneJob
        from resa_lens.stages.tuning import tune_run
        from resa_lens.texts.corpora import CorpusConfig
        from resa_lens.tuning.loop import TuneConfig
        from resa_lens.tuning.objective import preset as named
        from resa_lens.tuning.sft import KINDS

        ctx = self._context(options)
        lora, objective, corpus = filled(
            "tune", options, TuneConfig(seed=ctx.seed), named(preset), CorpusConfig(seed=ctx.seed)
        )
        if isinstance(layer, Recommendation) and saes is None:
            saes = layer.counts.saes
        if saes is not None:
            if options.get("site", saes.site) != saes.site:
                raise BadInputError(
                    f"site {options['site']!r} is not that of the SAEs in {saes.path}, {saes.site}"
                )
            objective = replace(objective, site=saes.site)
        if layer is None and control not in KINDS:
            raise BadInputError(
                "tune() needs a layer: what recommend() returned, or a layer such as layer=5"
            )
        chosen = layer.artifact if isinstance(layer, Recommendation) else None
        job = TuneJob(
            model=model.name,
            layer="auto" if chosen or layer is None else str(layer),
            objective=named(preset, **vars(objective)),
            lora=lora,
            trigger=corpus,
            elicitation=corpus,
            steps=steps,
            control=control,
            evaluation=EvalConfig(limit=limit),
            eval_source=tasks,
            start_check=start_check,
        )
        ctx.models.setdefault(f"{model.name}|", model)
        run = tune_run(ctx, job, saes.run if saes else None, chosen)
        return Tuned(run, control)

    def eval(
        self,
        model: Model | Tuned,
        tasks: str = "tiny",
        *,
        setting: str = "greedy",
        engine: str = "hf",
        question_column: str | None = None,
        answer_column: str | None = None,
        **options: Any,
    ) -> Scores:
        """Score a model on verified questions; a killed run goes on with those that are left.

        >>> scores = lab.eval(model, limit=8)
        >>> scores.n, len(scores.answers())
        (8, 8)

        Args:
            model: a model, or what `tune` returned.
            tasks: "tiny", benchmarks such as "math500", or a file of questions, comma-separated.
            setting: what the options default to: "greedy", or "paper" (sampled, 32,768 new tokens).
            engine: "hf", "vllm" or "lighteval".
            question_column: of a file of questions, where its name is not a usual one.
            answer_column: the same for the answer.
            options: fields of `EvalConfig` and `GenerationConfig`.
        """
        from resa_lens.stages.scores import check_engine, eval_run, load_eval_items

        check_engine(engine)
        ctx = self._context(options)
        config = _eval_config(setting, ctx.seed, options)
        items = load_eval_items(
            tasks, config, question_column=question_column, answer_column=answer_column
        )
        whole = self.model(model) if isinstance(model, Tuned) else model
        run = eval_run(
            ctx, whole, items, config, source=tasks,
            engine=engine,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        return Scores(run, model.name)

    def compare(
        self, base: Scores | Tuned, *others: Scores | Tuned, margin: float = 0.02, seed: int = 0
    ) -> Comparison:
        """Compare runs question by question: others minus base, with interval and p-value.

        Args:
            base: what `eval` or `tune` returned; of `tune` the scores with the adapter.
            others: one run, or several; p-values of several are corrected.
            margin: differences within it, a share of the questions, count as equally good.
            seed: of bootstrap and permutations.

        Raises:
            BadInputError: no other run, the same one twice, or runs on other questions.
        """
        from resa_lens.evals.compare import check_paired, compare_many, compare_runs
        from resa_lens.stages.comparison import open_runs

        scores = [item.scores if isinstance(item, Tuned) else item for item in (base, *others)]
        if len(scores) < 2:
            raise BadInputError("compare() needs two runs or more; the first is the base")
        if not 0 < margin < 1:
            raise BadInputError(f"margin {margin}: give a share above 0 and below 1")
        runs = open_runs(self.workspace, [str(item.path) for item in scores], self.context.reporter)
        if len({item.name for item in scores}) == len(scores):
            runs = [replace(run, name=s.name) for run, s in zip(runs, scores, strict=True)]
        check_paired(runs)
        if len(runs) == 2:
            return Comparison(compare_runs(*runs, margin=margin, seed=seed), margin)
        return Comparison(compare_many(runs[0], runs[1:], margin=margin, seed=seed), margin)


def _layers(layers: Layers, model: Model) -> list[int]:
    return parse_layers([layers] if isinstance(layers, int) else layers, model.n_layers)


def _place(saes: str | Path | SAEs | None) -> str | None:
    return None if saes is None else str(saes.path if isinstance(saes, SAEs) else saes)


def _one_of(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise BadInputError(f"{what} {value!r} is unknown; use {', '.join(known)}")


def _eval_config(setting: str, seed: int, options: Mapping[str, Any]) -> EvalConfig:
    from resa_lens.evals.engines import GenerationConfig
    from resa_lens.evals.run import SETTINGS, EvalConfig
    from resa_lens.texts.prompts import resolve_system_prompt

    _one_of("setting", setting, tuple(SETTINGS))
    default = SETTINGS[setting]
    generation = GenerationConfig(
        default.max_new_tokens, default.temperature, default.top_p, seed=seed
    )
    plain = EvalConfig(
        generation=generation, samples=default.samples, chat_template=default.chat_template
    )
    config = filled("eval", options, generation, plain)[1]
    prompt = config.system_prompt
    return replace(config, system_prompt=resolve_system_prompt(prompt) if prompt else None)
