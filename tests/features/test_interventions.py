"""Interventions against a dense implementation, phases while generating, matched features."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config
from transformers.modeling_outputs import CausalLMOutput

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.features.interventions import (
    KINDS,
    FeatureMass,
    Intervention,
    Tracker,
    describe_controls,
    encode_batches,
    intervene,
    intervening,
    mass_of,
    matched_controls,
    sum_masses,
)
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes.coder import SparseCoder, encode, new_coder
from resa_lens.texts.phases import PHASES, phased_batches, tag_phases

POINT, DEEP = Hookpoint(4), Hookpoint(6, "resid_post")
FEATURES = (0, 3, 5, 11, 17, 29)
VALUES = (0.5, 1.5, 2.0, -1.0, 0.0, 3.0)


def made(kind: str, strength: float = 1.0, **fields: Any) -> Intervention:
    values = VALUES if kind in ("clamp", "steer") else ()
    return Intervention(
        fields.pop("point", POINT), FEATURES, kind, strength, values=values, **fields
    )


def coder_of(width: int = 128, latents: int = 48, seed: int = 0) -> SparseCoder:
    """Decoder rows of unequal norm and a bias: what a unit-norm SAE would hide."""
    coder = new_coder(width, latents, 8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        coder.W_dec.mul_(1 + torch.rand(latents, 1, generator=generator))
        coder.b_dec.normal_(0, 0.1, generator=generator)
        coder.encoder.bias.normal_(0, 0.1, generator=generator)
    return coder.requires_grad_(False)


def dense(x: torch.Tensor, coder: SparseCoder, wanted: Intervention) -> torch.Tensor:
    """The formulas of the module's docstring, with every latent of every row written out."""
    before = ((x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias).relu()
    kth = before.sort(dim=-1, descending=True).values[..., coder.cfg.k - 1 : coder.cfg.k]
    z = torch.where(before >= kth, before, 0.0)
    changed, s = z.clone(), wanted.strength
    push = torch.zeros(x.shape[-1])
    for place, feature in enumerate(wanted.features):
        own = z[..., feature]
        if wanted.kind == "ablate":
            changed[..., feature] = (1 - s) * own
        elif wanted.kind == "scale":
            changed[..., feature] = (1 + s) * own
        elif wanted.kind == "clamp":
            changed[..., feature] = (1 - s) * own + s * wanted.values[place]
        else:
            row = coder.W_dec[feature]
            push = push + s * wanted.values[place] * row / row.pow(2).sum().sqrt()
    error = x - (z @ coder.W_dec + coder.b_dec) if wanted.keep_error else 0.0
    return changed @ coder.W_dec + coder.b_dec + error + push


# One row at a time


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("strength", [0.25, 1.0, 2.0, -0.5])
def test_every_kind_is_its_formula(kind: str, keep_error: bool, strength: float) -> None:
    x, coder = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)), coder_of(16)
    wanted = made(kind, strength, keep_error=keep_error)
    found = intervene(x, coder, wanted)
    torch.testing.assert_close(found, dense(x, coder, wanted), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, x, atol=1e-3)


def test_known_answers_of_a_feature_along_each_axis() -> None:
    """Identity encoder and decoder: the latents are the coordinates, so x' can be read off."""
    coder = new_coder(4, 4, 2, seed=0)
    with torch.no_grad():
        coder.encoder.weight.copy_(torch.eye(4))
        coder.W_dec.copy_(2 * torch.eye(4))
        coder.encoder.bias.zero_()
        coder.b_dec.zero_()
    coder.requires_grad_(False)
    x = torch.tensor([[3.0, 2.0, 1.0, -5.0]])  # active: 3 and 2; SAE(x) = [6, 4, 0, 0]

    def changed(kind: str, feature: int, strength: float, *values: float, error: bool = True):
        wanted = Intervention(POINT, (feature,), kind, strength, keep_error=error, values=values)
        return intervene(x, coder, wanted)[0].tolist()

    assert changed("ablate", 0, 1.0) == [-3, 2, 1, -5]
    assert changed("ablate", 0, 0.5) == [0, 2, 1, -5]
    assert changed("ablate", 0, 1.0, error=False) == [0, 4, 0, 0]
    assert changed("ablate", 2, 1.0) == [3, 2, 1, -5]  # third: not among the top two
    assert changed("scale", 1, 1.0) == [3, 6, 1, -5]
    assert changed("clamp", 2, 1.0, 7.0) == [3, 2, 15, -5]
    assert changed("clamp", 0, 0.5, 1.0) == [1, 2, 1, -5]
    assert changed("steer", 3, 2.0, 1.5) == [3, 2, 1, -2]
    assert changed("ablate", 3, 0.0, error=False) == [6, 4, 0, 0]


def test_the_dtype_of_x_stays_and_untouched_rows_keep_every_bit() -> None:
    coder = coder_of(16)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = Intervention(POINT, (7,))
    found = intervene(x, coder, wanted)
    assert found.dtype == torch.bfloat16
    same = (found == x).all(1)
    assert 0 < int(same.sum()) < 64


# Generation

QUESTIONS = (
    "Problem: What is 12+30? <think>",
    "Problem: Eva has 38 shells. Eva loses 12 shells. How many shells are left? <think>",
    "Problem: Evaluate (8+2)*8. <think>",
    "See <think> </think>. Problem: Multiply 29 by 4. <think>",
)
ASKED = (*QUESTIONS[:2], QUESTIONS[3])
STEPS = 20


@contextmanager
def plain_hook(model: Any, wanted: Intervention, coder: SparseCoder, phases: list[int]):
    """A torch hook on the plain transformers module, for one document whose phases are known."""
    chosen = torch.tensor([PHASES[phase] in wanted.phases for phase in phases])

    def edit(_module: Any, _inputs: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = torch.where(chosen[None, :, None], dense(x, coder, wanted), x)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = model.get_submodule(wanted.point.huggingface).register_forward_hook(edit)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def plain() -> Model:
    """A second copy, whose bridge is never booted."""
    return load_model("tiny-reasoner")


def by_hand(plain: Model, prompt: str, wanted: Intervention, coder: SparseCoder) -> list[int]:
    """Greedy, a whole forward pass over the document for each token, phases by its tags."""
    tokenizer: Any = plain.tokenizer
    opens, closes = (tokenizer.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>"))
    ids = list(tokenizer(prompt)["input_ids"])
    start, begins = len(ids), len(ids) - 1 - ids[::-1].index(opens)
    for _ in range(STEPS):
        ended = next((i for i, t in enumerate(ids) if i > begins and t == closes), len(ids))
        phases = [0 if i <= begins else 1 if i <= ended else 2 for i in range(len(ids))]
        with torch.no_grad(), plain_hook(plain.model, wanted, coder, phases):
            logits: Any = plain.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
        if "</answer>" in tokenizer.decode(ids[start:]):
            break
    return ids[start:]


@pytest.mark.parametrize(
    "wanted",
    [
        made("ablate", 8.0, point=DEEP),
        made("scale", 8.0, phases=("think",), point=DEEP),
        made("clamp", 20.0, phases=("answer",), keep_error=False),
        made("steer", 60.0, phases=("think", "answer")),
        made("ablate", 0.0, keep_error=False, phases=("think",), point=DEEP),
        made("steer", 200.0, phases=("prompt",), point=DEEP),
    ],
    ids=lambda wanted: f"{wanted.kind}-{'-'.join(wanted.phases)}",
)
def test_generation_equals_a_dense_full_pass(
    tiny: Model, plain: Model, wanted: Intervention
) -> None:
    """Rows of unequal length, a cache, rows that leave: the same tokens as without any of it."""
    coder = coder_of()
    engine, config = HFEngine(tiny.model, tiny.tokenizer), GenerationConfig(STEPS)
    with intervening(tiny, [wanted], {wanted.point: coder}, Tracker()) as tracker:
        found = engine.generate(ASKED, config, hooks=tracker)
    expected = [by_hand(plain, prompt, wanted, coder) for prompt in ASKED]
    assert [list(g.token_ids) for g in found] == expected
    unhooked = engine.generate(ASKED, config)
    assert found != unhooked
    assert engine.generate(ASKED, config) == unhooked  # the hooks are gone


def test_only_tokens_from_the_phase_on_change(tiny: Model) -> None:
    """A push at answer tokens leaves every thought as it was, and changes what follows."""
    coder, engine = coder_of(), HFEngine(tiny.model, tiny.tokenizer)
    config = GenerationConfig(60)
    wanted = made("steer", 100.0, phases=("answer",), point=DEEP)
    before = engine.generate(QUESTIONS, config)
    with intervening(tiny, [wanted], {DEEP: coder}, Tracker()) as tracker:
        after = engine.generate(QUESTIONS, config, hooks=tracker)
    for one, two in zip(before, after, strict=True):
        assert two.text.startswith(one.text.split("</think>")[0] + "</think>")
    assert all(one != two for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_leaves_the_logits(tiny: Model, kind: str) -> None:
    ids = torch.tensor([tiny.tokenizer(QUESTIONS[1])["input_ids"]])
    wanted = made(kind, 0.0)
    with torch.no_grad():
        clean = tiny.bridge(ids)
        with intervening(tiny, [wanted], {POINT: coder_of()}, Tracker()):
            assert torch.equal(tiny.bridge(ids), clean)
        # Through the hook all the same, at a strength that rounds to nothing.
        nearly = made(kind, 1e-12)
        with intervening(tiny, [nearly], {POINT: coder_of()}, Tracker(torch.zeros_like(ids))):
            torch.testing.assert_close(tiny.bridge(ids), clean, atol=1e-5, rtol=0)


def test_two_interventions_act_in_order(tiny: Model) -> None:
    """Doubling and then removing is removing; the other way round there is nothing to double."""
    ids, coder = torch.tensor([tiny.tokenizer(QUESTIONS[0])["input_ids"]]), coder_of()
    tracker = Tracker(torch.zeros_like(ids))

    def logits(*wanted: Intervention) -> torch.Tensor:
        with torch.no_grad(), intervening(tiny, wanted, {POINT: coder}, tracker):
            return tiny.bridge(ids)

    push, pull = made("steer", 1.0), made("steer", -1.0)
    torch.testing.assert_close(logits(push, pull), tiny.bridge(ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(push), logits(pull), atol=1e-2)


# Phases while generating

SCRIPT = "Réd <think> 2+3=5 ünd </thin> 5 <thin>k </think> so </think> <answer> 5"


class Scripted(nn.Module):
    """Writes the rest of one text, whatever part of it is the prompt; a token is a byte."""

    def __init__(self, ids: list[int], vocabulary: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.ids, self.vocabulary = torch.tensor([*ids, 0]), vocabulary
        self.config = Qwen2Config(num_hidden_layers=1, vocab_size=vocabulary, eos_token_id=None)

    def forward(self, input_ids: Any, position_ids: Any, **_: Any) -> CausalLMOutput:
        following = self.ids[(position_ids + 1).clamp(max=len(self.ids) - 1)]
        return CausalLMOutput(
            logits=nn.functional.one_hot(following, self.vocabulary).float() * self.scale
        )


class Recorder:
    def __init__(self) -> None:
        self.seen: dict[int, dict[int, int]] = {}

    def before_forward(self, rows: Any, positions: torch.Tensor, phases: torch.Tensor) -> None:
        assert positions.shape == phases.shape
        for row, places, found in zip(rows, positions.tolist(), phases.tolist(), strict=True):
            held = self.seen.setdefault(row, {})
            for place, phase in zip(places, found, strict=True):
                if phase >= 0:
                    assert place not in held
                    held[place] = phase


def bytewise() -> PreTrainedTokenizerFast:
    """One token a byte: every tag is many tokens, and a letter may be two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_phases_of_tags_in_many_tokens_are_those_of_the_text() -> None:
    tokenizer = bytewise()
    encoded: Any = tokenizer(SCRIPT, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    opened, closed = SCRIPT.index("<think>"), SCRIPT.index("</think>")
    cuts = [
        opened - 2,  # the model opens the thoughts itself
        opened + 3,  # the prompt ends inside the tag
        opened + 7,  # with the tag
        opened + 12,
        closed + 4,
        closed + 8,  # the thoughts are over in the prompt
    ]
    recorder = Recorder()
    engine = HFEngine(Scripted(ids, len(tokenizer)), tokenizer)
    found = engine.generate(
        [SCRIPT[:cut] for cut in cuts],
        GenerationConfig(stop=("<answer>",)),
        hooks=recorder,
    )
    expected = list(tag_phases(SCRIPT, offsets))
    read = len(SCRIPT[: SCRIPT.index("<answer>") + 8].encode()) - 1  # the last is never read
    for row, cut in enumerate(cuts):
        assert found[row].finished, SCRIPT[:cut]
        told = [recorder.seen[row][i] for i in range(len(recorder.seen[row]))]
        assert told == expected[:read], SCRIPT[:cut]
    assert {0, 1, 2} == set(expected[:read])


def test_thoughts_can_open_anew_after_the_answer() -> None:
    """A system prompt with both tags, and a model that opens its thoughts itself."""
    text = "use <think> </think>. Q 1 <think> a <think> b </think> c"
    tokenizer = bytewise()
    ids: Any = tokenizer(text)["input_ids"]
    recorder = Recorder()
    prompt = text[: text.index(" Q 1")]
    engine = HFEngine(Scripted(ids, len(tokenizer)), tokenizer)
    engine.generate([prompt], GenerationConfig(len(text) - len(prompt)), hooks=recorder)
    found = [recorder.seen[0][i] for i in range(len(recorder.seen[0]))]
    opened = text.index("<think> a") + len("<think>")
    closed = text.index("</think> c") + len("</think>")
    assert set(found[text.index(" Q 1") : opened]) == {2}
    assert set(found[opened:closed]) == {1}
    assert set(found[closed:]) == {2}


def test_rows_are_named_by_prompt_and_padding_and_ended_rows_are_none(tiny: Model) -> None:
    """Each input of each document is told once, under its own prompt, whatever the batch does."""
    # The last one's thoughts are over, and their tag stands close before what the model writes.
    asked = (*QUESTIONS, "Problem: What is 12+30? <think> </think>")
    recorder, engine = Recorder(), HFEngine(tiny.model, tiny.tokenizer)
    found = engine.generate(asked, GenerationConfig(60, batch_size=3), hooks=recorder)
    for row, (prompt, generation) in enumerate(zip(asked, found, strict=True)):
        text = prompt + generation.text
        encoded: Any = tiny.tokenizer(text, return_offsets_mapping=True)
        # The last token is never read.
        expected = tag_phases(text, encoded["offset_mapping"])[:-1]
        assert [recorder.seen[row][i] for i in range(len(expected))] == list(expected)
        assert len(recorder.seen[row]) == len(expected)
    assert len({generation.tokens for generation in found}) > 1


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "zero"}, "kind 'zero' is unknown; use ablate, scale, clamp, steer"),
        ({"phases": ("thoughts",)}, "phase 'thoughts' is unknown; use prompt, think, answer"),
        ({"phases": ()}, "no phase"),
        ({"strength": float("nan")}, "strength nan is not finite"),
        ({"strength": float("inf")}, "strength inf is not finite"),
        ({"features": ()}, "no feature"),
        ({"features": (3, 3)}, "feature 3 stands twice"),
        ({"kind": "clamp"}, "takes 2 finite values for 2 features; got none"),
        ({"kind": "steer", "values": (1.0, float("nan"))}, "2 finite values"),
        ({"values": (1.0, 2.0)}, "takes 0 finite values"),
    ],
)
def test_interventions_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        Intervention(**{"point": POINT, "features": (1, 2), **fields})


def test_interventions_that_do_not_fit(tiny: Model) -> None:
    def enter(wanted: Intervention, coders: dict[Hookpoint, SparseCoder]) -> None:
        with intervening(tiny, [wanted], coders, Tracker()):
            pass

    wanted = Intervention(POINT, (1, 48))
    with pytest.raises(BadInputError, match=r"feature 48 is out of range.* features 0 to 47"):
        enter(wanted, {POINT: coder_of()})
    with pytest.raises(BadInputError, match=r"width 64, the model's is 128"):
        enter(wanted, {POINT: coder_of(64)})
    with pytest.raises(BadInputError, match=r"no SAE at layer 4 .* 4 \(resid_post\)"):
        enter(wanted, {Hookpoint(4, "resid_post"): coder_of()})
    with pytest.raises(BadInputError, match=r"layer 12 .* out of range"):
        enter(Intervention(Hookpoint(12), (1,)), {POINT: coder_of()})


def test_a_tracker_that_was_told_nothing_stops_the_run(tiny: Model) -> None:
    ids = torch.tensor([tiny.tokenizer(QUESTIONS[0])["input_ids"]])
    with (
        pytest.raises(RunFailedError, match="was told nothing; pass it to the engine as hooks"),
        intervening(tiny, [made("ablate")], {POINT: coder_of()}, Tracker()),
    ):
        tiny.bridge(ids)


# Random features of the same activation mass


def mass_of_rows(sums: list[list[float]], active: list[list[float]]) -> FeatureMass:
    """Masses by hand, [phase, feature]."""
    made = torch.tensor(sums, dtype=torch.float64)
    return FeatureMass(
        made, torch.tensor(active, dtype=torch.float64), torch.ones(made.shape[1]).double(),
        torch.tensor([10, 10, 10]),
    )  # fmt: skip


def test_masses_are_sums_by_phase_of_what_ablation_takes_away() -> None:
    coder = coder_of(16)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    phases = torch.tensor([0] * 20 + [1] * 25 + [2] * 5)
    found = mass_of(encode(coder, x), phases, coder.W_dec.norm(dim=1).double())
    alone = Intervention(POINT, (7,))
    gone = (x - intervene(x, coder, alone)).norm(dim=1)
    for phase in range(3):
        inside = phases == phase
        assert found.sums[phase, 7] == pytest.approx(float(gone[inside].sum()), rel=1e-5)
        assert found.active[phase, 7] == int((gone[inside] > 0).sum())
    assert found.tokens.tolist() == [20, 25, 5]
    both = found + found
    assert torch.equal(both.sums, 2 * found.sums)
    values = both.mean_active([7], ("prompt", "answer"))
    inside = phases != 1
    known = gone[inside].sum() / (gone[inside] > 0).sum() / coder.W_dec[7].norm()
    assert values == pytest.approx([float(known)], rel=1e-5)


@pytest.mark.parametrize("kind", ["ablate", "scale", "clamp", "steer"])
def test_rows_where_nothing_is_active(kind: str) -> None:
    """BatchTopK leaves whole rows, and whole batches, without an active latent."""
    coder = coder_of(16)
    with torch.no_grad():
        coder.encoder.bias.fill_(-1e6)
        coder.W_dec[2] = 0.0  # a dead latent's direction
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    values = (1.0, 1.0) if kind in ("clamp", "steer") else ()
    for keep in (True, False):
        found = intervene(
            x, coder, Intervention(POINT, (2, 7), kind, keep_error=keep, values=values)
        )
        base = x if keep else coder.b_dec.expand(5, -1)
        moved = (coder.W_dec[7] / (coder.W_dec[7].norm() if kind == "steer" else 1)) * bool(values)
        torch.testing.assert_close(found, base + moved)
    acts = encode(coder, x)
    assert acts.values.numel() == 0
    mass = mass_of(acts, torch.zeros(5, dtype=torch.long), coder.W_dec.norm(dim=1).double())
    assert mass.sums.sum() == mass.active.sum() == 0
    assert mass.mean_active([2, 7]) == [0.0, 0.0]


def test_controls_are_the_twins_of_the_features() -> None:
    """Each feature has twenty twins that nothing else comes near: a set takes one of each."""
    kinds = [(1.0, 2.0, 50.0), (40.0, 1.0, 5.0), (7.0, 90.0, 30.0)]  # prompt, think, active
    columns = [kinds[i % 3] for i in range(63)] + [(400.0 + i, 0.0, 900.0) for i in range(50)]
    zeros = [0.0] * len(columns)
    mass = mass_of_rows(
        [[c[0] for c in columns], [c[1] for c in columns], zeros],
        [[c[2] for c in columns], zeros, zeros],
    )
    sets = matched_controls(mass, (0, 1, 2), draws=6, seed=0)
    for drawn in sets:
        assert sorted(f % 3 for f in drawn) == [0, 1, 2]
        assert all(3 <= f < 63 for f in drawn)
    assert len(set(sets)) == 6
    assert matched_controls(mass, (0, 1, 2), draws=6, seed=0) == sets
    assert matched_controls(mass, (0, 1, 2), draws=2, seed=1) != sets[:2]


def test_controls_of_one_feature_differ() -> None:
    """The nearest one alone would be five times the same control."""
    mass = mass_of_rows([[100.0 + i for i in range(200)]] * 3, [[10.0] * 200] * 3)
    sets = matched_controls(mass, (50,), draws=5)
    assert len(set(sets)) == 5
    assert all(40 <= drawn[0] <= 60 for drawn in sets)


def test_controls_are_matched_at_the_chosen_phases_alone() -> None:
    """Features 1 to 20 are equal at prompt tokens, 21 to 40 at think tokens."""
    prompt = [5.0] * 21 + [80.0] * 20
    think = [3.0] + [60.0] * 20 + [3.0] * 20
    zeros = [0.0] * 41
    mass = mass_of_rows([prompt, think, zeros], [prompt, think, zeros])
    (first,) = matched_controls(mass, (0,), draws=1, phases=("prompt",))
    (second,) = matched_controls(mass, (0,), draws=1, phases=("think",))
    assert first[0] in range(1, 21)
    assert second[0] in range(21, 41)


def test_controls_never_hold_a_chosen_or_a_repeated_feature(tiny: Model) -> None:
    coder, chosen = coder_of(128, 400), tuple(range(0, 60, 2))
    batches = phased_batches(tiny.tokenizer, [q + " 1 </think> 2" for q in QUESTIONS])
    encoded = list(encode_batches(tiny, POINT, coder, batches))
    sets = matched_controls(sum_masses(encoded, coder), chosen, draws=5)
    for drawn in sets:
        assert len(set(drawn)) == len(chosen)
        assert not set(drawn) & set(chosen)
    described = describe_controls(encoded, coder, chosen, [*sets, chosen])
    # The chosen ones themselves match themselves.
    assert set(described[-1].mass.values()) == {1.0}
    assert (described[-1].active, described[-1].removed) == (1.0, 1.0)
    for one in described[:-1]:
        assert one.mass["all"] == pytest.approx(1.0, abs=0.1)


def test_features_that_are_never_active_have_no_ratio(tiny: Model) -> None:
    coder = coder_of(128, 40)
    with torch.no_grad():
        coder.encoder.bias[:20] = -1e6
    batches = phased_batches(tiny.tokenizer, QUESTIONS)
    encoded = list(encode_batches(tiny, POINT, coder, batches))
    mass = sum_masses(encoded, coder)
    (drawn,) = matched_controls(mass, (0, 1), draws=1)
    assert all(feature < 20 for feature in drawn)
    (one,) = describe_controls(encoded, coder, (0, 1), [drawn])
    assert (one.mass["all"], one.active, one.removed) == (None, None, None)
    assert mass.mean_active((0, 1)) == [0.0, 0.0]


def test_too_few_features_for_a_control(tiny: Model) -> None:
    mass = mass_of_rows([[1.0] * 5] * 3, [[1.0] * 5] * 3)
    with pytest.raises(BadInputError, match="3 of 5 features leave no 3 others"):
        matched_controls(mass, (0, 1, 2), draws=1)
    with pytest.raises(BadInputError, match="no document"):
        sum_masses([], coder_of())


# At the first generated token alone


def without_cache(model: Model, prompt: str, wanted: Intervention, coder: SparseCoder) -> list[int]:
    """Greedy tokens where every step reads the whole text again."""
    ids = list(model.tokenizer(prompt)["input_ids"])
    last = len(ids) - 1
    for _ in range(STEPS):
        text = torch.tensor([ids])
        first = torch.zeros_like(text, dtype=torch.bool)
        first[0, last] = True
        tracker = Tracker(torch.zeros_like(text), first)
        with torch.no_grad(), intervening(model, [wanted], {wanted.point: coder}, tracker):
            token = int(model.bridge(text)[0, -1].argmax())
        ids.append(token)
        if "</answer>" in model.tokenizer.decode(ids[last + 1 :]):
            break
    return ids[last + 1 :]


def test_the_first_token_alone_is_the_prompts_last_position(tiny: Model) -> None:
    """Rows of unequal length and a cache give what whole passes give; all tokens give another."""
    coder, engine = coder_of(), HFEngine(tiny.model, tiny.tokenizer)
    config = GenerationConfig(STEPS)
    texts = {}
    for at in ("first", "all"):
        wanted = made("steer", 600.0, point=DEEP, at=at)
        with intervening(tiny, [wanted], {DEEP: coder}, Tracker()) as tracker:
            texts[at] = [list(g.token_ids) for g in engine.generate(ASKED, config, hooks=tracker)]
    wanted = made("steer", 600.0, point=DEEP, at="first")
    assert texts["first"] == [without_cache(tiny, prompt, wanted, coder) for prompt in ASKED]
    assert texts["first"] != texts["all"]
    assert texts["first"] != [list(g.token_ids) for g in engine.generate(ASKED, config)]


def test_a_planted_feature_says_its_token_once_or_all_the_time(tiny: Model) -> None:
    """Behind the last block, along a token's row of the head: known from the head alone."""
    point = Hookpoint(tiny.n_layers - 1, "resid_post")
    plain: Any = tiny.model
    head, norm = plain.get_output_embeddings().weight.detach(), plain.model.norm.weight.detach()
    token = int(tiny.tokenizer("7", add_special_tokens=False)["input_ids"][-1])
    assert int((head @ head[token]).argmax()) == token
    coder = coder_of()
    with torch.no_grad():
        coder.W_dec[0] = head[token] / norm
    config, engine = GenerationConfig(STEPS), HFEngine(tiny.model, tiny.tokenizer)
    answers = {}
    for at in ("first", "all"):
        planted = Intervention(point, (0,), "steer", 1.0, values=(1e4,), at=at)
        with intervening(tiny, [planted], {point: coder}, Tracker()) as tracker:
            answers[at] = engine.generate(ASKED, config, hooks=tracker)
    assert [list(answer.token_ids) for answer in answers["all"]] == [[token] * STEPS] * len(ASKED)
    for prompt, answer in zip(ASKED, answers["first"], strict=True):
        ids = [*tiny.tokenizer(prompt)["input_ids"], token]
        for expected in answer.token_ids[1:]:
            with torch.no_grad():
                assert int(plain(torch.tensor([ids])).logits[0, -1].argmax()) == expected
            ids.append(expected)
        assert answer.token_ids[0] == token
        assert set(answer.token_ids[1:]) != {token}


def test_the_first_token_alone_leaves_every_other_position(tiny: Model) -> None:
    ids = torch.tensor([tiny.tokenizer(QUESTIONS[0])["input_ids"]])
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[0, 4] = True
    wanted = made("steer", 60.0, at="first")
    with torch.no_grad():
        clean = tiny.bridge(ids)
        with intervening(
            tiny, [wanted], {POINT: coder_of()}, Tracker(torch.zeros_like(ids), first)
        ):
            changed = tiny.bridge(ids)
    assert torch.equal(changed[:, :4], clean[:, :4])
    assert not torch.allclose(changed[:, 4], clean[:, 4], atol=1e-2)


def test_a_place_is_known_and_given(tiny: Model) -> None:
    with pytest.raises(BadInputError, match="place 'last' is unknown; use all or first"):
        made("ablate", at="last")
    ids = torch.tensor([tiny.tokenizer(QUESTIONS[0])["input_ids"]])
    wanted, tracker = made("ablate", at="first"), Tracker(torch.zeros_like(ids))
    with (
        intervening(tiny, [wanted], {POINT: coder_of()}, tracker),
        pytest.raises(RunFailedError, match="where the prompts end"),
    ):
        tiny.bridge(ids)
