"""The lab's methods that look closer at features: ablate, attribute, trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resa_lens.models.hookpoints import Hookpoint, parse_layer
from resa_lens.session.interventions import Ablation, Attribution, Trials
from resa_lens.session.options import filled
from resa_lens.session.workbench import Workbench

if TYPE_CHECKING:
    from resa_lens.models.host import Model
    from resa_lens.session.discovery import Counts, SAEs


class Probing(Workbench):
    """Methods of the lab that change, weigh and try features."""

    def ablate(
        self,
        model: Model,
        saes: SAEs,
        layer: int | str,
        features: Sequence[int],
        *,
        rule: str | None = None,
        tasks: str = "tiny",
        limit: int | None = 500,
        **options: Any,
    ) -> Ablation:
        """Change features while the model answers, beside random features of the same mass.

        Args:
            model: the model that answers.
            saes: the SAEs whose latents are changed.
            layer: 0-based, or "13th".
            features: the latents.
            rule: the rule that counted them, where one did.
            tasks: the questions, as of `eval`.
            limit: questions at most; None for all.
            options: fields of `AblationConfig`, for example `kind`, `doses` and `controls`.
        """
        from resa_lens.evals.run import EvalConfig
        from resa_lens.stages.ablation import AblationConfig, ablate_run
        from resa_lens.stages.scores import questions_for

        ctx, evaluation = self._context(options), EvalConfig(limit=limit)
        point = Hookpoint(parse_layer(layer, model.n_layers), saes.site)
        (config,) = filled("ablate", options, AblationConfig(
            point, tuple(features), rule, seed=ctx.seed, eval=evaluation
        ))  # fmt: skip
        items = questions_for(model, tasks, evaluation)
        return Ablation(ablate_run(ctx, model, saes.run, items, config, source=tasks))

    def attribute(
        self,
        model: Model,
        saes: SAEs,
        layer: int | str,
        features: Sequence[int] | None = None,
        *,
        metric: str = "loss",
        top: int = 20,
        text_tokens: int = 4096,
        **options: Any,
    ) -> Attribution:
        """Weigh features by what they do to the loss, by gradient and by taking them out.

        Args:
            model: the host.
            saes: the SAEs.
            layer: 0-based, or "13th".
            features: the latents; the `top` most active ones by default.
            metric: "loss" over thoughts and answers, "think" or "answer".
            top: how many, where none are named.
            text_tokens: tokens of the documents that are looked at.
            options: fields of `CorpusConfig`.
        """
        from resa_lens.stages.attribution import attribute_run
        from resa_lens.texts.corpora import CorpusConfig

        ctx = self._context(options)
        (corpus,) = filled("attribute", options, CorpusConfig(seed=ctx.seed))
        point = Hookpoint(parse_layer(layer, model.n_layers), saes.site)
        named = None if features is None else tuple(features)
        return Attribution(attribute_run(
            ctx, model, saes.run, point, corpus, metric=metric, features=named, top=top,
            tokens=text_tokens,
        ))  # fmt: skip

    def trials(
        self, model: Model, counts: Counts, layer: int, feature: int, **options: Any
    ) -> Trials:
        """Put one feature, counted or not, to the trials of `falsify`; nothing is stored.

        >>> "injected" in lab.trials(model, counts, 5, 0, texts=2, shuffles=1).table().index
        True

        Args:
            model: the host.
            counts: the prompt, the tags and the SAEs.
            layer: 0-based.
            feature: the latent.
            options: fields of `FalsifyConfig`.
        """
        from resa_lens.features.dependences import Share
        from resa_lens.features.falsify import FalsifyConfig
        from resa_lens.features.responses import respond
        from resa_lens.features.stimuli import trials

        ctx = self._context(options)
        (config,) = filled("trials", options, FalsifyConfig(seed=ctx.seed))
        counting, saes = counts.run.counts.config, counts.saes
        texts = trials(
            model, counting, texts=config.texts, shuffles=config.shuffles, seed=config.seed
        )
        point = Hookpoint(layer, saes.site)
        (coder,) = saes.run.coders(model, [layer]).values()
        values = respond(model, {point: coder}, {point: (feature,)}, texts).values[point][:, :, 0]
        # Of a counted feature only the tags at which it was counted.
        at_tags = values[0] > counting.threshold
        shares = {}
        for kind in dict.fromkeys(trial.kind for trial in texts):
            of_kind = values[[trial.kind == kind for trial in texts]][:, at_tags]
            shares[kind] = Share.of((of_kind > counting.threshold).any(1).numpy())
        return Trials(shares, {t.kind: t.text for t in reversed(texts)}, config.fires)
