"""The prompt lab's functions beside direct computation on the bundled model."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from resa_lens.errors import BadInputError
from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.evals.run import EvalConfig, evaluate
from resa_lens.evals.tasks import EvalItem, load_questions
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.saes.coder import encode, new_coder
from resa_lens.stages import lab, lab_changes
from resa_lens.texts import prompts
from resa_lens.texts.phases import PHASES, tag_phases

SHORT = GenerationConfig(max_new_tokens=40)
ASKED = lab.ask("What is 9+4?")
POINTS = (Hookpoint(3), Hookpoint(6))


@pytest.fixture(scope="module")
def engine(tiny):
    return HFEngine(tiny.model, tiny.tokenizer)


@pytest.fixture(scope="module")
def coders(tiny):
    """Untrained SAEs: of random directions everything is as computable as of trained ones."""
    return {
        point: new_coder(tiny.d_model, 256, 16, seed=point.layer).requires_grad_(False)
        for point in POINTS
    }


@pytest.fixture(scope="module")
def plain(tiny, engine):
    return lab.respond(tiny, engine, ASKED, SHORT)


@pytest.fixture(scope="module")
def named(tiny, coders, plain):
    """Features at each place, of middling strength: others come near them."""
    found = {}
    for point, coder in coders.items():
        acts = lab.activations(tiny, point, coder, plain.ids)
        mass = torch.bincount(acts.latents, acts.values, minlength=256)
        found[point] = tuple(mass.argsort(descending=True)[20:22].tolist())
    return found


def test_tokens_phases_and_answer(tiny, plain):
    assert "".join(plain.tokens) == ASKED.prompt + plain.text
    assert len(plain.ids) == len(plain.tokens) == len(plain.phases)
    assert plain.ids[: plain.prompt_tokens] == tuple(tiny.tokenizer(ASKED.prompt)["input_ids"])
    offsets, end = [], 0
    for token in plain.tokens:
        offsets.append((end, end := end + len(token)))
    wanted = tag_phases(ASKED.prompt + plain.text, offsets)
    assert plain.phases == tuple(PHASES[phase] for phase in wanted)
    assert set(plain.phases) == set(PHASES)
    assert plain.finished
    assert plain.answer is not None
    assert f"Answer: {plain.answer} " in plain.text
    assert plain.correct is None


def test_a_bundled_question_is_answered_as_evaluation_does(tiny, engine):
    item = load_questions("tiny", levels=(1,), limit=1)[0]
    sampled = GenerationConfig(max_new_tokens=48, temperature=1.0, seed=3)
    made = lab.respond(tiny, engine, lab.ask(item.question, question=item), sampled)
    row = evaluate(engine, [item], EvalConfig(generation=sampled)).samples[0]
    assert (made.text, made.answer) == (row["generation"], row["answer"])
    assert made.correct is row["correct"]
    right = EvalItem(item.id, item.question, str(made.answer))
    assert lab.respond(tiny, engine, lab.ask(item.question, question=right), sampled).correct


def test_a_raw_prompt_is_read_as_it_is(tiny, engine):
    text = prompts.direct_prompt("What is 2+3?")
    asked = lab.ask(text, raw=True)
    assert asked.prompt == text
    made = lab.respond(tiny, engine, asked, SHORT)
    assert made.phases[made.prompt_tokens] == "answer"
    assert made.answer is not None
    bare = lab.respond(tiny, engine, lab.ask("no tags", raw=True), GenerationConfig(4))
    assert set(bare.phases[: bare.prompt_tokens]) == {"prompt"}


def test_what_is_written_is_told_as_it_comes(tiny, engine, plain):
    told = []
    again = lab.respond(tiny, engine, ASKED, SHORT, written=lambda ids: told.append(tuple(ids)))
    assert again == plain
    assert told == [plain.written[:n] for n in range(len(plain.written))]
    assert not tiny.model._forward_pre_hooks


def test_activations_are_those_of_the_model_encoded(tiny, coders, plain):
    ids = torch.tensor([plain.ids])
    (read,) = stream_activations(tiny, [ids], list(POINTS))
    sums = torch.zeros(len(plain.ids))
    features = {POINTS[0]: (3, 5, 8), POINTS[1]: (1, 200)}
    for point, coder in coders.items():
        direct = encode(coder, read.acts[point][0])
        acts = lab.activations(tiny, point, coder, plain.ids)
        assert torch.equal(acts.latents, direct.latents)
        assert torch.equal(acts.values, direct.values)
        dense = torch.zeros(acts.n_rows, acts.d_sae)
        dense[direct.rows, direct.latents] = direct.values
        own = dense[:, list(features[point])].sum(1)
        assert torch.allclose(lab.feature_values(acts, features[point]), own)
        sums += own
    steps, loaded = [], []

    def load(point):
        loaded.append(point)
        return coders[point]

    total = lab.summed_values(
        tiny, features, load, plain.ids, lambda done, of: steps.append((done, of))
    )
    assert torch.allclose(total, sums, atol=1e-6)
    assert float(total.abs().sum()) > 0
    assert loaded == list(POINTS)
    assert steps == [(0, 2), (1, 2)]


def test_the_features_of_all_layers_at_a_token_are_ranked_by_their_share(tiny, coders, plain):
    place, steps = 12, []
    ids = plain.ids[: place + 1]
    found = lab.ranked(tiny, POINTS, coders.__getitem__, ids, 7, lambda *step: steps.append(step))
    every = []
    for point, coder in coders.items():
        # In the whole text: what comes behind a token changes nothing there.
        acts = lab.activations(tiny, point, coder, plain.ids)
        here = acts.rows == place
        values, latents = acts.values[here], acts.latents[here]
        for latent, value in zip(latents.tolist(), values.tolist(), strict=True):
            every.append((value / float(values.sum()), value, point.layer, latent))
    every.sort(reverse=True)
    assert [(one.layer, one.feature) for one in found] == [row[2:] for row in every[:7]]
    for one, (share, value, *_) in zip(found, every, strict=False):
        assert one.share == pytest.approx(share, rel=1e-4)
        assert one.value == pytest.approx(value, rel=1e-4)
    assert steps == [(0, 2), (1, 2)]


def test_a_written_text_is_read_as_it_was_written(tiny, plain):
    prompt = ASKED.prompt
    again = lab.read(tiny, prompt, "".join(plain.tokens[plain.prompt_tokens :]))
    assert (again.ids, again.tokens, again.phases) == (plain.ids, plain.tokens, plain.phases)
    assert again.prompt_tokens == plain.prompt_tokens
    with pytest.raises(BadInputError, match="tokens and tiny-reasoner reads"):
        lab.read(tiny, prompt, " 1" * 5000)


@pytest.mark.parametrize("kind", ["ablate", "scale", "steer"])
def test_strength_zero_changes_nothing(tiny, engine, coders, plain, named, kind):
    wanted = lab_changes.Change(named, kind, 0.0, value=1.0 if kind == "steer" else None)
    made = lab_changes.Trial(tiny, engine, ASKED, SHORT, plain, wanted, coders).changed()
    assert made.document == plain
    assert made.first is None
    assert made.moved["all"] == 0


def test_a_change_takes_the_features_out_of_the_activation(tiny, engine, coders, plain, named):
    """x' = x - 5 sum z_i d_i at the thoughts' tokens: by hand, through hooks of our own."""
    phases = ("think",)
    wanted = lab_changes.Change(named, "ablate", 5.0, phases)
    made = lab_changes.Trial(tiny, engine, ASKED, SHORT, plain, wanted, coders).changed()
    ids = torch.tensor([plain.ids])
    inside = torch.tensor([[phase in phases for phase in plain.phases]])

    def without(acts, hook=None, *, point):
        coder = coders[point]
        held = encode(coder, acts.flatten(0, 1))
        dense = torch.zeros(held.n_rows, held.d_sae)
        dense[held.rows, held.latents] = held.values
        index = list(named[point])
        taken = dense[:, index] @ coder.W_dec[index]
        return acts - 5 * taken.view_as(acts) * inside[..., None]

    def log_probability(hooks):
        with torch.no_grad(), tiny.bridge.hooks(fwd_hooks=hooks):
            logits = tiny.model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        return logits.gather(1, ids[0, 1:, None])[plain.prompt_tokens - 1 :, 0].double()

    hooks = [(point.transformer_lens, partial(without, point=point)) for point in POINTS]
    moved = log_probability(hooks) - log_probability([])
    assert made.moved["all"] == pytest.approx(float(moved.sum()), abs=1e-4)
    assert abs(made.moved["all"]) > 1e-3
    assert made.moved["think"] + made.moved["answer"] == pytest.approx(made.moved["all"])


def test_a_strong_change_moves_the_text_and_says_where(tiny, engine, coders, plain, named):
    wanted = lab_changes.Change(named, "steer", 1.0, ("think", "answer"), value=200.0)
    made = lab_changes.Trial(tiny, engine, ASKED, SHORT, plain, wanted, coders).changed()
    assert made.first is not None
    other = made.document.written
    assert other[: made.first] == plain.written[: made.first]
    assert other[made.first] != plain.written[made.first]
    assert made.moved["all"] < -1


def test_clamp_takes_its_value_from_the_text(tiny, engine, coders, plain, named):
    acts = {p: lab.activations(tiny, p, coders[p], plain.ids) for p in POINTS}
    means = {}
    for point in POINTS:
        for feature in named[point]:
            values = acts[point].values[acts[point].latents == feature]
            means[point, feature] = float(values.mean())
    one = lab_changes.Change({POINTS[0]: named[POINTS[0]][:1]}, "clamp")
    given = lab_changes.Change(one.features, "clamp", value=means[POINTS[0], named[POINTS[0]][0]])
    made = [
        lab_changes.Trial(tiny, engine, ASKED, SHORT, plain, w, coders).changed()
        for w in (one, given)
    ]
    assert made[0].moved["all"] == pytest.approx(made[1].moved["all"], abs=1e-5)
    assert abs(made[0].moved["all"]) > 1e-4


def test_random_features_differ_and_come_near(tiny, engine, coders, plain, named):
    wanted = lab_changes.Change({POINTS[1]: named[POINTS[1]]})
    steps = []
    made = lab_changes.Trial(tiny, engine, ASKED, SHORT, plain, wanted, coders).random(
        draws=2, progress=lambda done, of: steps.append((done, of))
    )
    drawn = [one.controls[POINTS[1]].features for one in made]
    assert len(set(drawn)) == len(drawn) == len(steps) >= 1
    for one in made:
        control = one.controls[POINTS[1]]
        assert not set(control.features) & set(named[POINTS[1]])
        assert lab_changes.FAIR[0] <= control.mass["all"] <= lab_changes.FAIR[1]
    alone = lab_changes.Trial(
        tiny, engine, ASKED, SHORT, plain, lab_changes.Change({POINTS[1]: drawn[0]}), coders
    ).changed()
    assert alone == made[0].changed


def test_random_features_are_refused_where_none_come_near(tiny, engine, coders, plain):
    acts = lab.activations(tiny, POINTS[0], coders[POINTS[0]], plain.ids)
    mass = torch.bincount(acts.latents, acts.values, minlength=256)
    silent = lab_changes.Change({POINTS[0]: (int(mass.argmin()),)})
    assert float(mass.min()) == 0
    with pytest.raises(BadInputError, match="never active at prompt, think, answer tokens"):
        lab_changes.Trial(tiny, engine, ASKED, SHORT, plain, silent, coders).random()
    stretched = new_coder(tiny.d_model, 256, 16, seed=3).requires_grad_(False)
    strongest = int(mass.argmax())
    stretched.W_dec[strongest] *= 100
    with pytest.raises(BadInputError, match="no random features come near"):
        lab_changes.Trial(
            tiny, engine, ASKED, SHORT, plain, lab_changes.Change({POINTS[0]: (strongest,)}),
            {POINTS[0]: stretched},
        ).random()  # fmt: skip


def test_texts_of_tokens_join_to_the_text(tiny):
    for text in ("plain words", "é 漢字 x", "two\nlines <think>", "🙂🙂"):
        ids = tiny.tokenizer(text)["input_ids"]
        made = lab.token_texts(tiny.tokenizer, ids)
        assert len(made) == len(ids)
        assert "".join(made) == text
    lone = lab.token_texts(tiny.tokenizer, [133] * 5)
    assert "".join(lone) == tiny.tokenizer.decode([133] * 5)
    assert lab.token_texts(tiny.tokenizer, []) == ()


def test_first_difference():
    assert lab_changes.first_difference([1, 2], [1, 2]) is None
    assert lab_changes.first_difference([1, 2], [1, 3]) == 1
    assert lab_changes.first_difference([1, 2], [1, 2, 3]) == 2
    assert lab_changes.first_difference([], [5]) == 0


def test_bad_input(tiny, engine, coders, plain):
    with pytest.raises(BadInputError, match="the prompt is empty"):
        lab.ask("  ")
    with pytest.raises(BadInputError, match="no feature was given"):
        lab_changes.Change({})
    with pytest.raises(BadInputError, match="kind 'ablate' takes no value"):
        lab_changes.Change({POINTS[0]: (1,)}, value=2.0)
    with pytest.raises(BadInputError, match="kind 'break' is unknown"):
        lab_changes.Change({POINTS[0]: (1,)}, "break")
    with pytest.raises(BadInputError, match="no phase was given"):
        lab_changes.Change({POINTS[0]: (1,)}, phases=())
    for point, feature, message in (
        (POINTS[0], 999, "feature 999 is out of range"),
        (Hookpoint(4), 1, "there is no SAE at layer 4"),
    ):
        wanted = lab_changes.Change({point: (feature,)})
        with pytest.raises(BadInputError, match=message):
            lab_changes.Trial(tiny, engine, ASKED, SHORT, plain, wanted, coders).changed()
    silent = lab.activations(tiny, POINTS[0], coders[POINTS[0]], plain.ids)
    dead = sorted(set(range(256)) - set(silent.latents.tolist()))[0]
    with pytest.raises(BadInputError, match="so clamp has no value to take"):
        lab_changes.Trial(
            tiny,
            engine,
            ASKED,
            SHORT,
            plain,
            lab_changes.Change({POINTS[0]: (dead,)}, "clamp"),
            coders,
        ).changed()
    longest = tiny.model.config.max_position_embeddings
    with pytest.raises(BadInputError, match=f"tiny-reasoner reads {longest} in all"):
        lab.respond(tiny, engine, lab.ask("7 " * longest), SHORT)
