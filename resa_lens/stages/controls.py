"""What stands in the SAE's place, and what is imitated in place of SAE-Tuning (spec, section 7)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from resa_lens.artifacts.stage import Context, Draft
from resa_lens.errors import BadInputError
from resa_lens.evals.config import EvalConfig, GenerationConfig, TextEngine
from resa_lens.evals.engines import Generation
from resa_lens.evals.engines.choice import check_engine, open_engine
from resa_lens.evals.grading import is_correct
from resa_lens.evals.resume import AnswerLog, answer_all
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes.baselines import (
    Blend,
    Noise,
    Replacement,
    baselines,
    fvu_on,
    random_weights_model,
)
from resa_lens.saes.checkpoint import machine
from resa_lens.saes.coder import SparseCoder, new_coder
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.sae_training import saes_for
from resa_lens.stages.saes import fit_corpus, packed
from resa_lens.stages.scores import expect_answers
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig, Record
from resa_lens.tuning.config import Objective, TuneConfig
from resa_lens.tuning.objective import tuning_loss
from resa_lens.tuning.sft import KINDS, Example, OwnConfig, OwnSamples, examples, own_samples
from resa_lens.tuning.train import add_adapters

SANITY = ("none", "identity")
"""With these the two sides of the KL are one distribution: nothing may train."""
MATCHED = ("noise", "pca", "shuffled", "random", "random-weights")
"""These leave as much variance unexplained as the SAE does on the target's activations."""
CONTROLS = (*SANITY, *MATCHED)
OWN_QUESTIONS = 1000
"""Of own samples, so many of the records are asked at most."""
RANDOM_WEIGHTS = "matched"
"""The random model's weights have the trained ones' mean and spread, as in the falsification."""


class Nothing:
    """No SAE at all: the activations themselves go on."""

    def __call__(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_in"]:
        """Return x, the same tensor."""
        return x


def identity_coder(d_in: int, device: str = "cpu") -> SparseCoder:
    """Return an SAE that reconstructs to the bit: a latent for each coordinate and each sign.

    Unlike `Nothing` it goes through the whole machinery: encoder, top-k, decoder.
    """
    made = new_coder(d_in, 2 * d_in, d_in, seed=0)
    eye = torch.eye(d_in)
    assert made.W_dec is not None
    with torch.no_grad():
        made.encoder.weight.copy_(torch.cat([eye, -eye]))
        made.encoder.bias.zero_()
        made.W_dec.copy_(torch.cat([eye, -eye]))
        made.b_dec.zero_()
    return made.to(device).requires_grad_(False)


def check_control(name: str | None) -> None:
    """Raise BadInputError if there is no such control; None is the SAE itself."""
    if name not in (None, *CONTROLS):
        raise BadInputError(f"control {name!r} is unknown; use {', '.join(CONTROLS)}")


def replacement_for(
    ctx: Context,
    model: Model,
    point: Hookpoint,
    coder: SparseCoder,
    control: str,
    corpus: CorpusConfig,
    records: Sequence[Record],
    *,
    trained: tuple[SaeConfig, CorpusConfig] | None = None,
) -> SparseCoder | Replacement:
    """Return a control in the SAE's place, and say how well it is matched.

    Args:
        ctx: seed, workspace (SAEs of the random-weights model are found there, or trained) and who
            to tell.
        model: the target.
        point: the SAE's place.
        coder: the SAE.
        control: a name of `CONTROLS`.
        corpus: the elicitation data; its activations are what the control is matched on.
        records: of these data.
        trained: how the SAE was trained (`SaeRun.training`), so that the random-weights model's
            SAE is trained alike; without it only size, k and place are the same.

    Raises:
        BadInputError: there is no such control, or it cannot be matched.
    """
    check_control(control)
    if control in SANITY:
        ctx.reporter.note(f"control {control} in the SAE's place: nothing may train")
        return Nothing() if control == "none" else identity_coder(model.d_model, model.device)
    null = None
    if control == "random-weights":
        null = _random_weights_coder(ctx, model, point, coder, trained)
    corpus = fit_corpus(corpus, model)
    # PCA needs several times as many tokens as dimensions.
    tokens = 8 * max(model.d_model, corpus.sequence)
    ids = corpora.batches(model.tokenizer, records, corpus, tokens=tokens, batch=2)
    with packed(model, corpus):
        rows = [b.acts[point].flatten(0, 1) for b in stream_activations(model, ids, [point])]
    sample = torch.cat(rows)
    chosen = baselines(coder, sample, ctx.seed, random_weights=null)[control.replace("-", "_")]
    scale = ""
    if isinstance(chosen, Blend):
        scale = f"; its error {'lengthened' if chosen.exaggerates else 'shortened'} to "
        scale += f"{chosen.scale:.3g} times"
    ctx.reporter.note(
        f"control {control} in the SAE's place: FVU {fvu_on(chosen, sample):.4f} on "
        f"{len(sample)} tokens, the SAE's {fvu_on(coder, sample):.4f}{scale}"
    )
    if isinstance(chosen, Noise):
        # The loop seeds this one for every batch, so a resumed run draws the same noise.
        chosen.generator = torch.default_generator
    return chosen


def _random_weights_coder(
    ctx: Context,
    model: Model,
    point: Hookpoint,
    coder: SparseCoder,
    trained: tuple[SaeConfig, CorpusConfig] | None,
) -> SparseCoder:
    config, corpus = trained or (SaeConfig(), CorpusConfig())
    config = replace(config, site=point.site, latents=coder.num_latents, k=coder.cfg.k)
    host = random_weights_model(model, ctx.seed, weights=RANDOM_WEIGHTS)
    ctx.reporter.note(f"an SAE of a model with random weights ({host.slug}):")
    # --force is about the tuning.
    run = saes_for(replace(ctx, force=False), host, [point.layer], config, corpus)
    return run.coders(host, [point.layer])[point]


def sft_examples(
    ctx: Context,
    draft: Draft,
    model: Model,
    kind: str,
    records: Sequence[Record],
    *,
    own: OwnConfig | None = None,
    questions: int = OWN_QUESTIONS,
    generation: GenerationConfig | None = None,
    engine: TextEngine = "hf",
) -> tuple[list[Example], OwnSamples | None]:
    """Return what a fine-tuning in place of SAE-Tuning imitates.

    Args:
        ctx: who to tell.
        draft: in its folder own samples are kept as they come; those that a killed run left there
            are not drawn again.
        model: the target; of own samples, the model that answers.
        kind: a name of `tuning.sft.KINDS`.
        records: the elicitation data.
        own: of own samples, how many and which.
        questions: of own samples, at most so many of the records are asked, drawn by `own.seed`.
        generation: of own samples; by default `own_generation`.
        engine: of own samples, what generates them.

    Returns:
        The examples, and of own samples what they were chosen from.

    Raises:
        BadInputError: no data, empty answers, no steps where they are needed, no right answer.
    """
    if kind not in KINDS:
        raise BadInputError(f"objective {kind!r} is unknown; use {', '.join(KINDS)}")
    if kind != "own-samples":
        return examples(records, kind), None
    own = own or OwnConfig()
    generation = generation or own_generation(own)
    asked = list(records)
    if len(asked) > questions:
        asked = random.Random(f"own/{own.seed}").sample(asked, questions)
    found = sample_answers(ctx, draft, model, asked, own, generation, engine)
    ctx.reporter.note(
        f"own samples: {found.right} of {found.answers} answers right, {found.solved} of "
        f"{found.questions} questions solved at least once; {len(found.examples)} to imitate"
    )
    return list(found.examples), found


def own_generation(own: OwnConfig) -> GenerationConfig:
    """Return how own samples are drawn: at temperature 1, as the model is."""
    return GenerationConfig(temperature=1.0, seed=own.seed)


@dataclass(frozen=True)
class _Sample:
    """One sample of one record's question."""

    prompt: str
    stream: tuple[int, int]
    """The record's number and the sample's."""

    @property
    def key(self) -> tuple[str, int]:
        """The record's number, as text, and the sample's."""
        return str(self.stream[0]), self.stream[1]


def sample_answers(
    ctx: Context,
    draft: Draft,
    model: Model,
    records: Sequence[Record],
    config: OwnConfig,
    generation: GenerationConfig,
    engine: TextEngine = "hf",
) -> OwnSamples:
    """Let a model answer questions and keep its right answers, with a bar.

    All answers are in the draft's folder: a tuning that goes on must imitate what it began with,
    and an engine need not give the same answers twice.

    Raises:
        BadInputError: as `own_samples`, or an engine that is not installed.
        RunFailedError: the engine failed.
    """
    check_engine(engine)

    def answers(texts: Sequence[str], names: Sequence[tuple[int, int]]) -> list[Generation]:
        samples = [_Sample(text, name) for text, name in zip(texts, names, strict=True)]
        expect_answers(
            draft, model, samples, EvalConfig(generation=generation),
            fewer="Fewer --data-rows take less.",
        )  # fmt: skip
        log = AnswerLog(draft.work / "answers.jsonl", machine(model.device))
        # An engine may take minutes to open.
        if any(one.key not in log.answers for one in samples):
            if log.answers:
                ctx.reporter.note(f"{len(log.answers)} of {len(samples)} own answers are there")
            with (
                open_engine(model, engine) as generator,
                log,
                ctx.bar(f"{model.name}: own answers", len(samples)) as advance,
            ):
                answer_all(generator, samples, generation, log, advance)
        return [log.answers[one.key] for one in samples]

    return own_samples(records, answers, is_correct, config)


def starting_losses(
    ctx: Context,
    model: Model,
    coder: SparseCoder,
    layer: int,
    controls: Sequence[str],
    objective: Objective,
    corpus: CorpusConfig,
    tokens: int,
) -> dict[str, dict[str, float]]:
    """Return FVU and loss of the SAE and of controls in its place, with adapters at zero.

    Args:
        ctx: as of `replacement_for`.
        model: the target, which is left as it is: the loss is that of a copy.
        coder: the SAE.
        layer: its layer, 0-based.
        controls: names of `CONTROLS`.
        objective: what the loss is.
        corpus: the data.
        tokens: of the batch.
    """
    point = Hookpoint(layer, objective.site)
    records = corpora.read_records(corpus)
    inserted: dict[str, SparseCoder | Replacement] = {"SAE": coder}
    for control in controls:
        inserted[control] = replacement_for(ctx, model, point, coder, control, corpus, records)
    ids = next(corpora.batches(model.tokenizer, records, corpus, tokens=tokens, batch=4))
    (batch,) = stream_activations(model, [ids], [point])
    rows = batch.acts[point].flatten(0, 1)
    fresh = load_model(model.name, device=model.device, dtype=model.dtype)
    peft, bridge = add_adapters(fresh, objective, TuneConfig())
    losses: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for name, inner in inserted.items():
            loss = float(tuning_loss(bridge, peft, ids, point, inner, objective))
            losses[name] = {"FVU": fvu_on(inner, rows), "KL": loss}
    return losses
