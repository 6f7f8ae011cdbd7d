"""What looking through SAEs will take: insertion, activity, falsification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from resa_lens.artifacts.stage import Context
from resa_lens.evals.config import EvalConfig, GenerationConfig, TextEngine
from resa_lens.evals.run import answerable, ask
from resa_lens.evals.tasks import EvalItem, load_questions
from resa_lens.features.activity import ActivityConfig
from resa_lens.features.config import CountConfig, FalsifyConfig
from resa_lens.features.responses import respond
from resa_lens.features.stimuli import PLAIN_TEXTS, trials
from resa_lens.machine.hardware import MB
from resa_lens.machine.plans import Part, Plan, Trial, duration, part_of, timed
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.plan import Meter
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.activity import try_activity
from resa_lens.stages.config import InsertionConfig
from resa_lens.stages.falsification import other_seeds
from resa_lens.stages.further_plans import known_random_model, plan_each, weighted
from resa_lens.stages.insertion import own_training
from resa_lens.stages.plans import (
    answer_levers,
    answers_part,
    documents_part,
    engine_notes,
    fitting_questions,
    missing_saes,
    plan_of,
)  # fmt: skip
from resa_lens.stages.sae_plan import plan_run
from resa_lens.stages.saes import SaeRun, find_saes, phased_corpus
from resa_lens.stages.trials import try_answers
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.texts.phases import phased_batches, phased_texts

TEXTS = 64
"""Of a falsification's that are tried."""


def plan_insert(
    ctx: Context,
    target: Model,
    items: Sequence[EvalItem],
    corpus: CorpusConfig,
    config: InsertionConfig,
    sae: SaeConfig,
    *,
    layers: Sequence[int],
    folder: str | None = None,
    source: Model | None = None,
    allow_mismatch: bool = False,
) -> Plan:
    """Return what an insertion test will take, from one batch with an SAE inserted.

    Args:
        ctx: the workspace, in which nothing is made.
        target: the model that answers.
        items: the questions.
        corpus: the documents.
        config: what is inserted, read and asked.
        sae: the SAEs that are looked for.
        layers: 0-based.
        folder: SAEs that the user has.
        source: the SAEs' model; the target by default.
        allow_mismatch: warn where SAEs do not fit.
    """
    other = source is not None and source is not target
    saes = missing_saes(
        ctx, source or target, layers, sae, corpus, folder, allow_mismatch=allow_mismatch
    )
    point = Hookpoint(layers[0], sae.site)
    questions, every = fitting_questions(target, items, config.eval)
    base = try_answers(target, questions, every)
    inserted = try_answers(target, questions, every, point, saes.coder)
    full, count = config.arms == "full", len(layers)
    # SAE and noise; PCA and both ablations; the target's own SAE and the source itself.
    arms = 2 + (3 + 2 * other if full else 0)
    documents = documents_part(
        "documents", target, point, saes.coder, corpus,
        tokens=config.tokens, readings=count * (3 if full else 2),
    )  # fmt: skip
    parts = list(saes.parts)
    work, notes = saes.work_disk_mb, []
    if full and other:
        known = saes.run.training() if saes.run else (sae, corpus)
        training = own_training(known, sae.site, saes.coder, corpus, config.seed)
        missing = [x for x in layers if find_saes(ctx, target, *training, [x]) is None]
        own = plan_each(ctx, target, missing, training, " of the target")
        parts += own.parts
        work = max(work, own.work_disk_mb)
        notes.append("the source beside the target is reckoned as an SAE in it")
    parts += [
        answers_part("answers of the target", questions, every, base),
        answers_part("answers with something inserted", questions, every, inserted, count * arms),
        documents,
    ]
    each = inserted.time.seconds * arms
    levers = [
        f"fewer --layers: each takes {duration(each)}",
        *answer_levers(questions, every, inserted, count * arms),
    ]
    if full:
        levers.append(f"--arms short: each layer takes {duration(2 * inserted.time.seconds)}")
    return plan_of(ctx, "insert", target, parts, levers, work_disk_mb=work, notes=notes)


def plan_activity(
    ctx: Context,
    model: Model,
    corpus: CorpusConfig,
    config: ActivityConfig,
    sae: SaeConfig,
    *,
    layers: Sequence[int],
    tokens: int,
    generations: int = 0,
    max_new_tokens: int = 160,
    engine: TextEngine = "hf",
    folder: str | None = None,
    allow_mismatch: bool = False,
    memory_limit_mb: float | None = None,
) -> Plan:
    """Return what tallying features will take, from the largest batch at one layer.

    Args:
        ctx: the workspace, in which nothing is made.
        model: the model.
        corpus: the documents.
        config: what is kept of each feature.
        sae: the SAEs that are looked for.
        layers: 0-based.
        tokens: of the documents.
        generations: the model's own answers in their place.
        max_new_tokens: of one generation.
        engine: what would generate; engine hf is tried.
        folder: SAEs that the user has.
        allow_mismatch: warn where SAEs do not fit.
        memory_limit_mb: what the process may take.
    """
    saes = missing_saes(ctx, model, layers, sae, corpus, folder, allow_mismatch=allow_mismatch)
    corpus = phased_corpus(corpus, model)
    parts: list[Part] = list(saes.parts)
    levers = [f"fewer --text-tokens: there are {tokens:,}"]
    if generations:
        items = load_questions(
            corpus.source, limit=generations, seed=corpus.seed,
            question_column=corpus.question_column, answer_column=corpus.answer_column,
            first=corpus.rows,
        )  # fmt: skip
        asking = EvalConfig(generation=GenerationConfig(max_new_tokens=max_new_tokens))
        questions, _ = answerable(ask(items, asking), model.tokenizer, model.context)
        answers = try_answers(model, questions, asking)
        parts.append(answers_part("answers", questions, asking, answers))
        levers = answer_levers(questions, asking, answers, option="--generations")
        # A prompt of a question is as long as its document without an answer.
        read: int = sum(map(len, model.tokenizer([one.prompt for one in questions])["input_ids"]))  # pyright: ignore
        tokens = read + answers.tokens
    batches = phased_batches(
        model.tokenizer, phased_texts(corpora.read_records(corpus), corpus), tokens=tokens,
        longest=corpus.sequence,
    )  # fmt: skip
    total = tokens if generations else sum(batch.ids.numel() for batch in batches)
    point = Hookpoint(layers[0], sae.site)
    largest = max(batches, key=lambda batch: batch.ids.numel())
    trial = try_activity(model, {point: saes.coder}, largest, config)
    top, available, groups = trial.groups(len(layers), memory_limit_mb)
    time = trial.time * (len(layers) * total)
    parts.append(
        part_of(
            f"activity of {len(layers)} layers", groups * total, "tokens", time, top,
            disk_mb=round(len(layers) * trial.layer_mb, 1), at_most=True,
        )
    )  # fmt: skip
    levers.append(f"fewer --layers: each takes {duration(time.seconds / len(layers))}")
    work = max(saes.work_disk_mb, 2 * -(-len(layers) // groups) * trial.layer_mb)
    notes = engine_notes(engine)
    plan = plan_of(ctx, "activity", model, parts, levers, work_disk_mb=work, notes=notes)
    return replace(plan, available_mb=round(available, 1), passes=groups)


def plan_falsify(
    ctx: Context,
    model: Model,
    corpus: CorpusConfig,
    count: CountConfig,
    config: FalsifyConfig,
    sae: SaeConfig,
    *,
    layers: Sequence[int],
    folder: str | None = None,
    allow_mismatch: bool = False,
    plain_texts: Sequence[str] = PLAIN_TEXTS,
    other_seed: bool = True,
    random_weights: bool = True,
) -> Plan:
    """Return what a falsification will take: its texts, and the SAEs that it trains.

    Args:
        ctx: the workspace, in which nothing is made.
        model: the model.
        corpus: what the SAEs are trained on.
        count: the prompt and its tags.
        config: how hard features are tried.
        sae: the SAEs that are looked for.
        layers: 0-based.
        folder: SAEs that the user has.
        allow_mismatch: warn where SAEs do not fit.
        plain_texts: sentences without reasoning.
        other_seed: whether another seed's SAEs are tried too.
        random_weights: whether a random-weights model's are.
    """
    saes = missing_saes(ctx, model, layers, sae, corpus, folder, allow_mismatch=allow_mismatch)
    training = (sae, corpus) if saes.run is None else saes.run.training()
    parts, sets = list(saes.parts), 1
    work = saes.work_disk_mb
    # The random-weights model stands beside the model.
    again = sum(weight.nbytes for weight in model.model.parameters()) / MB
    for name, included, extra_mb, there in (
        ("another seed's", other_seed, 0.0, _has_other_seed),
        ("random weights'", random_weights, again, _has_random_weights),
    ):
        if included and training:
            sets += 1
            if saes.run is None or not there(ctx, model, saes.run, layers):
                plan = plan_run(ctx, model, layers, *training)
                further = weighted({0: plan}, {0: 1.0}, f", {name}", extra_mb=extra_mb)
                parts += further.parts
                work = max(work, further.work_disk_mb)
    texts = trials(
        model, count, texts=config.texts, shuffles=config.shuffles, plain_texts=plain_texts,
        seed=config.seed,
    )  # fmt: skip
    some = texts[:: max(1, len(texts) // TEXTS)]
    # One layer is read at the last place, and the others on the way cost their encoders alone.
    places = [Hookpoint(layer, sae.site) for layer in sorted({layers[0], layers[-1]})]

    def read(points: Sequence[Hookpoint]) -> Trial:
        with timed(model.device) as trial:
            respond(model, dict.fromkeys(points, saes.coder), dict.fromkeys(points, (0,)), some)
        return trial[0]

    with Meter(model.device).peak() as peak:
        read(places)  # allocates and warms up
        one, both = read(places[-1:]), read(places)
    rise = Trial(max(0.0, both.seconds - one.seconds), max(0.0, both.cpu_seconds - one.cpu_seconds))
    share = len(texts) / len(some)
    time = (one + rise * (len(layers) - 1)) * (share * sets)
    encoder = sum(t.nbytes for t in saes.coder.encoder.parameters()) / MB
    parts.append(
        part_of("texts", sets * len(texts), "readings", time, peak[0] + (len(layers) - 1) * encoder)
    )
    levers = [
        f"fewer --layers: each of {len(layers)} is trained {sets} times",
        "--no-other-seed and --no-random-weights: their SAEs are not trained",
    ]
    return plan_of(ctx, "falsify", model, parts, levers, work_disk_mb=work)


def _has_other_seed(ctx: Context, model: Model, saes: SaeRun, layers: Sequence[int]) -> bool:
    return bool(other_seeds(ctx, model, saes, layers))


def _has_random_weights(ctx: Context, model: Model, saes: SaeRun, layers: Sequence[int]) -> bool:
    host, training = known_random_model(ctx, model, ctx.seed), saes.training()
    run = find_saes(ctx, host, *training, layers) if host and training else None
    return bool(run and run.artifact and run.artifact.manifest.config["layers"] == list(layers))
