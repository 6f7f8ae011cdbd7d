"""The lab's methods that change a model and score it: insert, tune, eval, compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from resa_lens.errors import BadInputError
from resa_lens.models.host import Model
from resa_lens.session.discovery import Recommendation, SAEs
from resa_lens.session.insertion import Insertion
from resa_lens.session.options import filled
from resa_lens.session.scores import Comparison, Scores, Tuned
from resa_lens.session.workbench import Layers, Workbench, layers_of

if TYPE_CHECKING:
    import pandas as pd

    from resa_lens.evals.config import TextEngine
    from resa_lens.evals.run import EvalConfig
    from resa_lens.tuning.config import Control


class Scoring(Workbench):
    """Methods of the lab that insert, tune, score and compare."""

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
        from resa_lens.stages.scores import questions_for
        from resa_lens.texts.corpora import CorpusConfig

        ctx = self._context(options)
        evaluation = EvalConfig(limit=limit)
        config, corpus = filled(
            "insert", options, InsertionConfig(eval=evaluation, seed=ctx.seed),
            CorpusConfig(seed=ctx.seed),
        )  # fmt: skip
        run = insertion_run(
            ctx, model, saes.run, questions_for(model, tasks, evaluation), corpus, config,
            layers=None if layers is None else layers_of(layers, model), source=saes.model,
            tasks=tasks,
        )  # fmt: skip
        return Insertion(run, model)

    def starting_loss(
        self,
        model: Model,
        saes: SAEs,
        layer: int,
        *,
        controls: Sequence[Control] = ("none", "identity", "noise"),
        preset: str = "paper",
        tokens: int = 1024,
        **options: Any,
    ) -> pd.DataFrame:
        """Evaluate SAE-Tuning's loss before the first update, for the SAE and for its controls.

        >>> float(lab.starting_loss(model, saes, 5).loc["none", "KL"])
        0.0

        Args:
            model: the target; a copy of it gets adapters, whose second factor is zero.
            saes: the SAEs.
            layer: the layer, 0-based.
            controls: what stands in the SAE's place, as of `tune`.
            preset: "paper", "reference" or "distil".
            tokens: of the data that the loss is evaluated on.
            options: fields of `CorpusConfig`.

        Returns:
            A row for the SAE and each control: `FVU`, the fraction of variance that it leaves
            unexplained, and `KL`, the loss in nats a token.
        """
        import pandas as pd

        from resa_lens.stages.controls import starting_losses
        from resa_lens.texts.corpora import CorpusConfig
        from resa_lens.tuning.objective import preset as named

        ctx = self._context(options)
        (corpus,) = filled("starting_loss", options, CorpusConfig(seed=ctx.seed))
        objective = replace(named(preset), site=saes.site)
        rows = starting_losses(
            ctx, model, saes.sae(layer), layer, tuple(controls), objective, corpus, tokens
        )
        return pd.DataFrame.from_dict(rows, orient="index")

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
        tuning_thoughts: float = 0.0,
        start_check: bool = True,
        engine: TextEngine = "hf",
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
            tuning_thoughts: share of the documents that are tuned on with their worked steps;
                `thought_share` is that of the SAE's documents, if it is trained now.
            start_check: insert the SAE first and tune nothing, and warn where it carries no gain.
            engine: "hf" or "vllm": what generates the scored answers, and own samples.
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
            "tune", options, TuneConfig(seed=ctx.seed), named(preset),
            CorpusConfig(seed=ctx.seed, thought_share=None),
        )  # fmt: skip
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
            elicitation=replace(corpus, thought_share=tuning_thoughts, own_thoughts=0),
            sequence=options.get("sequence"),
            steps=steps,
            control=control,
            evaluation=EvalConfig(limit=limit),
            eval_source=tasks,
            start_check=start_check,
            engine=engine,
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
        replicates: int = 1,
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
            replicates: how often all is answered, to see the engine's own noise
                (`scores.manifest.results["replicates"]`).
            question_column: of a file of questions, where its name is not a usual one.
            answer_column: the same for the answer.
            options: fields of `EvalConfig` and `GenerationConfig`.
        """
        from resa_lens.evals.engines.choice import check_engine
        from resa_lens.stages.scores import eval_run, questions_for

        check_engine(engine)
        ctx = self._context(options)
        config = _eval_config(setting, ctx.seed, options)
        # Of a tuned model what it reads is known before it is loaded.
        reader = self._unloaded(model) if isinstance(model, Tuned) else model
        items = questions_for(
            reader, tasks, config, question_column=question_column, answer_column=answer_column
        )
        whole = self.model(model) if isinstance(model, Tuned) else model
        run = eval_run(
            ctx, whole, items, config, source=tasks,
            engine=engine,  # pyright: ignore[reportArgumentType]
            replicates=replicates,
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
        from resa_lens.evals.compare import compare_all
        from resa_lens.stages.comparison import open_runs

        scores = [item.scores if isinstance(item, Tuned) else item for item in (base, *others)]
        if len(scores) < 2:
            raise BadInputError("compare() needs two runs or more; the first is the base")
        if not 0 < margin < 1:
            raise BadInputError(f"margin {margin}: give a share above 0 and below 1")
        runs = open_runs(self.workspace, [str(item.path) for item in scores], self.context.reporter)
        if len({item.name for item in scores}) == len(scores):
            runs = [replace(run, name=s.name) for run, s in zip(runs, scores, strict=True)]
        return Comparison(compare_all(runs, margin=margin, seed=seed), margin)


def _eval_config(setting: str, seed: int, options: Mapping[str, Any]) -> EvalConfig:
    from resa_lens.evals.config import preset
    from resa_lens.texts.prompts import resolve_system_prompt

    chosen = preset(setting, seed)
    config = filled("eval", options, chosen.generation, chosen)[1]
    prompt = config.system_prompt
    return replace(config, system_prompt=resolve_system_prompt(prompt) if prompt else None)
