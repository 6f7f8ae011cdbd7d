"""The lab: one workspace, and the stages as methods that take and return objects."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resa_lens.artifacts.artifact import KINDS, Artifact
from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.evals.config import TextEngine
from resa_lens.models.host import Model
from resa_lens.progress import SILENT, ConsoleReporter, PrintedReporter
from resa_lens.session.discovery import Counts, Recommendation, SAEs
from resa_lens.session.experts import Experts
from resa_lens.session.features import Activity, Falsification
from resa_lens.session.options import filled
from resa_lens.session.probing import Probing
from resa_lens.session.scoring import Scoring
from resa_lens.session.sweeps import Sweep
from resa_lens.session.workbench import Layers, layers_of, one_of, place_of


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


class Lab(Scoring, Probing):
    """A workspace with the stages as methods; what is there already is read, not made again.

    >>> counts = lab.count_features(model, saes)
    >>> recommendation = lab.recommend(counts)
    >>> recommendation.layer, recommendation.verdict
    (5, 'not distinguishable from flat')

    Options are the fields of the configurations, by their names (`latents=512`); an unknown one is
    a `TypeError` that names the nearest.  Every method that makes something takes `seed` and
    `force` besides: `force=True` makes it anew.  What a stage refuses is a `BadInputError`.
    """

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
            "train_saes", options, SaeConfig(seed=ctx.seed),
            CorpusConfig(seed=ctx.seed, thought_share=None),
        )  # fmt: skip
        if sae.mode == "scratch":
            sae.check_pairs()
        run = train_run(
            ctx, model, layers_of(layers, model), sae, corpus, source=place_of(saes),
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
        sae, corpus = filled(
            "saes", options, SaeConfig(seed=ctx.seed),
            CorpusConfig(seed=ctx.seed, thought_share=None),
        )  # fmt: skip
        places = layers_of(layers, model)
        run = saes_for(
            ctx, model, places, sae, corpus, place_of(place), allow_mismatch=allow_mismatch,
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
        places = None if layers is None else layers_of(layers, model)
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
            selector: "mixture", "most-features", "middle", "quality", "causal", "blend",
                "insertion", "gradient-probe" or "activation-change"; from "quality" on they
                measure what they need.
            recipe: of the mixture, "robust" or "paper".
            target: the model that would be tuned; "activation-change" needs it, "insertion"
                inserts into it and "gradient-probe" measures on it, by default the counts' model.
            options: fields of `CorpusConfig`, for the measuring selectors.

        Raises:
            BadInputError: an unknown rule, selector or recipe, or no target where one is needed.
        """
        from resa_lens.errors import BadInputError
        from resa_lens.features.exclusive import check_rule
        from resa_lens.layers.selectors import SELECTORS
        from resa_lens.stages.attribution import measure_effects
        from resa_lens.stages.insertion import measure_gains
        from resa_lens.stages.layer_probes import measure_change, measure_gradient, worked
        from resa_lens.stages.recommendation import RECIPES, recommend_run, sae_quality
        from resa_lens.texts.corpora import CorpusConfig

        check_rule(rule)
        one_of("selector", selector, tuple(SELECTORS))
        one_of("recipe", recipe, RECIPES)
        if selector == "activation-change" and target is None:
            raise BadInputError(
                'selector "activation-change" compares two models: give target = the other one'
            )
        ctx = self._context(options)
        (corpus,) = filled("recommend", options, CorpusConfig(seed=ctx.seed, thought_share=None))
        model, saes = counts.model, counts.saes.run
        layers = [item.layer for item in counts.run.counts.layers]
        quality = effects = gains = gradient = change = None
        if selector in ("quality", "blend"):
            quality = sae_quality(model, saes, corpus, layers)
        if selector in ("causal", "blend"):
            effects = measure_effects(ctx, model, rule, corpus)(saes, counts.run)
        if selector == "insertion":
            gains = measure_gains(ctx, target or model, model, corpus)(saes, layers)
        if selector == "gradient-probe":
            gradient = measure_gradient(target or model, worked(corpus))(layers)
        if selector == "activation-change" and target is not None:
            change = measure_change(model, target, worked(corpus), saes.site)(layers)
        run = recommend_run(
            ctx, model, counts.run, rule=rule, selector=selector, recipe=recipe, site=saes.site,
            quality=quality, causal=effects, insertion=gains, gradient=gradient, change=change,
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
        """Measure what every counted feature depends on, and give it its verdict.

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
        engine: TextEngine = "hf",
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
            engine: "hf" or "vllm": what generates the answers.
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
            layers=None if layers is None else layers_of(layers, model), tokens=text_tokens,
            generations=generations, max_new_tokens=max_new_tokens, engine=engine,
            memory_limit_mb=memory_limit_mb,
        )  # fmt: skip
        return Activity(run, saes)

    @property
    def experts(self) -> Experts:
        """Experts of a mixture: `lab.experts.measure`, `.rank` and `.steer`."""
        return Experts(self)

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        """Return what the workspace holds, the newest first; nothing is made or changed.

        >>> lab.artifacts("counts")[0].manifest.kind
        'counts'

        Args:
            kind: "saes", "counts", "recommendation", "adapter", "eval", "sweep" or another kind;
                all by default.
        """
        kinds = tuple(KINDS)
        if kind is not None:
            one_of("kind", kind, kinds)
        return self.workspace.artifacts(None if kind is None else KINDS[kind])

    def sweeps(self) -> list[Sweep]:
        """Return the finished sweeps of the workspace, the one with the most layers first.

        >>> import resa_lens as rl
        >>> len(rl.open(rl.data_path("workspace"), quiet=True).sweeps()[0].table())
        12
        """
        sweeps = [Sweep(artifact) for artifact in self.artifacts("sweep")]
        return sorted(sweeps, key=lambda sweep: -len(sweep.tables.layers))
