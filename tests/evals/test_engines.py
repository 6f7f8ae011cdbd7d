from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.evals.engines.hf import probe_threads

PROMPTS = ["What is 3+4?", "x", "a much longer question, about 17 stones", "ab", "1+1", "<think>z"]
EOS, PAD = "<eos>", "<pad>"


def byte_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, and the tags as special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [EOS, PAD, "<think>", "</think>", "<answer>", "</answer>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    extra = {"pad_token": PAD} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, **extra)


def qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # decided logits: no ties for rounding to break
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attention_dropout=0.5,  # shows if dropout were left on
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def engine(tokenizer):
    return HFEngine(qwen2(), tokenizer)


def greedy_by_hand(model, tokenizer, prompt: str, steps: int) -> list[int]:
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids = [*ids, int(logits[0, -1].argmax())]
    return ids[start:]


def texts(generations) -> list[str]:
    return [g.text for g in generations]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_equals_a_loop_without_cache(engine, tokenizer, batch_size):
    config = GenerationConfig(max_new_tokens=12, batch_size=batch_size)
    found = engine.generate(PROMPTS, config)
    for prompt, generation in zip(PROMPTS, found, strict=True):
        expected = greedy_by_hand(engine.model, tokenizer, prompt, 12)
        assert list(generation.token_ids) == expected
        assert generation.text == tokenizer.decode(expected, skip_special_tokens=False)
        assert (generation.tokens, generation.finished) == (12, False)


def gpt_neox():
    config = GPTNeoXConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    return GPTNeoXForCausalLM(config)


def gpt2():
    config = GPT2Config(
        vocab_size=264,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("build", [gpt_neox, gpt2])  # GPT-2's positions are absolute
def test_greedy_on_other_architectures(tokenizer, build):
    torch.manual_seed(1)
    model = build().eval()
    found = HFEngine(model, tokenizer).generate(PROMPTS, GenerationConfig(max_new_tokens=8))
    expected = [greedy_by_hand(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert [list(g.token_ids) for g in found] == expected


def test_rows_that_end_leave_the_others_unchanged(engine, tokenizer):
    """Each row stops at its own first stop string while the batch shrinks around the rest."""
    by_hand = [greedy_by_hand(engine.model, tokenizer, p, 40) for p in PROMPTS]
    written = [tokenizer.decode(ids, skip_special_tokens=False) for ids in by_hand]
    # Strings of two tokens, each from the middle of another row's text.
    stop = (written[0][6:8], written[1][20:22], written[2][12:14])
    found = engine.generate(PROMPTS, GenerationConfig(max_new_tokens=40, stop=stop))
    lengths = set()
    for text, generation in zip(written, found, strict=True):
        ends = [text.find(s) + len(s) for s in stop if s in text]
        assert generation.text == (text[: min(ends)] if ends else text)
        assert generation.finished is bool(ends)
        lengths.add(generation.tokens)
    assert len(lengths) >= 3  # or nothing was tested


def test_end_of_sequence_ends_and_is_left_out(tokenizer):
    model = qwen2()
    first = greedy_by_hand(model, tokenizer, "x", 6)
    model.generation_config.eos_token_id = [first[4], 263]
    cut = first.index(first[4])
    (found,) = HFEngine(model, tokenizer).generate(["x"], GenerationConfig(max_new_tokens=30))
    assert list(found.token_ids) == first[:cut]
    assert (found.tokens, found.finished) == (cut + 1, True)


def test_special_tokens_stay_in_the_text_and_stop():
    """A model made to write one token for ever writes `</answer>` once."""
    tokenizer, model = byte_tokenizer(), qwen2()
    close = tokenizer.convert_tokens_to_ids("</answer>")

    def force(_module, _inputs, output):
        output = output.clone()
        output[..., close] = 1e4
        return output

    handle = model.lm_head.register_forward_hook(force)
    engine = HFEngine(model, tokenizer)
    (one,) = engine.generate(["x"], GenerationConfig())
    (many,) = engine.generate(["x"], GenerationConfig(stop=(), max_new_tokens=3))
    handle.remove()
    assert (one.text, one.tokens, one.finished) == ("</answer>", 1, True)
    assert (many.text, many.finished) == ("</answer>" * 3, False)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 0.8), (0.5, 0.01)])
def test_sampled_frequencies_are_the_models(engine, tokenizer, temperature, top_p):
    draws = 4000
    config = GenerationConfig(
        max_new_tokens=1, temperature=temperature, top_p=top_p, batch_size=1000, stop=()
    )
    found = engine.generate(["x"] * draws, config)
    ids = torch.tensor([tokenizer("x")["input_ids"]])
    with torch.no_grad():
        probs = (engine.model(ids).logits[0, -1].double() / temperature).softmax(-1).numpy()
    order = np.argsort(-probs)
    nucleus = order[: int((np.cumsum(probs[order]) < top_p).sum()) + 1]
    expected = np.zeros_like(probs)
    expected[nucleus] = probs[nucleus] / probs[nucleus].sum()
    eos = tokenizer.eos_token_id
    drawn = [g.token_ids[0] if g.token_ids else eos for g in found]
    counts = np.bincount(drawn, minlength=len(probs))
    assert counts[expected == 0].sum() == 0
    error = np.abs(counts / draws - expected)
    assert (error <= 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-3).all()


def test_a_documents_draws_do_not_depend_on_its_neighbours(engine):
    def sample(prompts, batch_size, streams=None, seed=3):
        config = GenerationConfig(
            max_new_tokens=10, temperature=1.0, top_p=0.95, batch_size=batch_size, seed=seed
        )
        return texts(engine.generate(prompts, config, streams=streams))

    together = sample(PROMPTS, 64)
    assert sample(PROMPTS, 64) == together
    assert sample(PROMPTS, 2) == together
    assert sample(PROMPTS[:3], 64) == together[:3]
    reverse = [(i, 0) for i in reversed(range(len(PROMPTS)))]
    assert sample(PROMPTS[::-1], 64, reverse) == together[::-1]
    assert sample(PROMPTS, 64, seed=4) != together
    assert len(set(sample(["x"] * 8, 64))) == 8


def test_hooks_work_during_generation(engine):
    config = GenerationConfig(max_new_tokens=8)
    before = texts(engine.generate(PROMPTS, config))
    shapes = []

    def push(_module, _inputs, output):
        shapes.append(tuple(output.shape))
        direction = torch.zeros(output.shape[-1])
        direction[3] = 25.0
        return output + direction

    handle = engine.model.model.layers[0].mlp.register_forward_hook(push)
    pushed = texts(engine.generate(PROMPTS, config))
    handle.remove()
    assert pushed != before
    assert len(shapes) == 8
    assert shapes[0][0] == len(PROMPTS)
    assert {shape[1] for shape in shapes[1:]} == {1}  # the cache is used
    assert texts(engine.generate(PROMPTS, config)) == before


def test_a_peft_adapter_counts(tokenizer):
    config = GenerationConfig(max_new_tokens=8)
    before = texts(HFEngine(qwen2(), tokenizer).generate(PROMPTS, config))
    wrapped = get_peft_model(qwen2(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    engine = HFEngine(wrapped, tokenizer)
    assert texts(engine.generate(PROMPTS, config)) == before  # B is zero
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value.data)
    assert texts(engine.generate(PROMPTS, config)) != before
    with wrapped.disable_adapter():
        assert texts(engine.generate(PROMPTS, config)) == before


def test_model_and_tokenizer_are_left_as_found():
    tokenizer, model = byte_tokenizer(pad=False), qwen2()
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    settings = copy.deepcopy(model.generation_config.to_dict())
    engine = HFEngine(model, tokenizer)
    found = engine.generate(PROMPTS, GenerationConfig(max_new_tokens=6))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.generation_config.to_dict() == settings
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == "right"
    assert torch.is_grad_enabled()
    assert all(p.requires_grad for p in model.parameters())
    model.eval()
    assert found == engine.generate(PROMPTS, GenerationConfig(max_new_tokens=6))


def test_the_training_mode_comes_back_after_an_error(tokenizer):
    model = qwen2()
    model.lm_head.weight.data[0, 0] = float("nan")
    model.train()
    with pytest.raises(RunFailedError, match="NaN"):
        HFEngine(model, tokenizer).generate(["x"], GenerationConfig())
    assert model.training


def test_progress_counts_documents(engine):
    seen = []
    engine.generate(PROMPTS, GenerationConfig(max_new_tokens=2, batch_size=4), seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_answers_are_handed_over_as_they_end(engine, tokenizer):
    by_hand = tokenizer.decode(greedy_by_hand(engine.model, tokenizer, PROMPTS[3], 20))
    config = GenerationConfig(max_new_tokens=20, stop=(by_hand[4:6],), batch_size=4)
    seen = {}
    found = engine.generate(PROMPTS, config, answered=seen.__setitem__)
    assert [seen[i] for i in range(len(PROMPTS))] == found
    # In the order of their ends, not of the prompts.
    assert list(seen) != sorted(seen)


def test_a_document_that_takes_too_long_is_cut(engine):
    (slow,) = engine.generate(["x"], GenerationConfig(max_new_tokens=10_000, stop=(), timeout=0.05))
    assert (slow.timed_out, slow.finished) == (True, False)
    assert 0 < slow.tokens < 10_000
    (quick,) = engine.generate(["x"], GenerationConfig(max_new_tokens=3, stop=(), timeout=60))
    assert (quick.timed_out, quick.finished, quick.tokens) == (False, False, 3)


@pytest.mark.parametrize(("slow", "expected"), [(1, 2), (2, 1)])
def test_the_probe_takes_the_faster_number_of_threads(engine, monkeypatch, slow, expected):
    now, threads = [0.0], [7]
    monkeypatch.setattr("resa_lens.evals.engines.hf.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.__setitem__(0, n))

    def generate(prompts, config):
        assert config.timeout == (None if threads[0] == 1 else 2 * (3.0 if slow == 1 else 1.0))
        now[0] += 3.0 if threads[0] == slow else 1.0

    monkeypatch.setattr(engine, "generate", generate)
    assert probe_threads(engine, PROMPTS, 2)[0] == expected
    assert threads == [7]


def test_bad_input(engine):
    with pytest.raises(BadInputError, match="no tokens"):
        engine.generate(["x", ""], GenerationConfig())
    with pytest.raises(BadInputError, match="1 streams for 2 prompts"):
        engine.generate(["x", "y"], GenerationConfig(), streams=[(0,)])
    assert engine.generate([], GenerationConfig()) == []


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"stop": "</answer>"},
        {"stop": ("",)},
        {"timeout": 0.0},
    ],
)
def test_bad_generation_config(values):
    with pytest.raises(BadInputError):
        GenerationConfig(**values)


def test_no_answer_goes_beyond_the_context(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=16,
                        eos_token_id=None, bos_token_id=None)  # fmt: skip
    engine = HFEngine(GPT2LMHeadModel(config).eval(), tokenizer)
    asked = GenerationConfig(max_new_tokens=12, stop=())
    short, long, both = (
        engine.generate(texts, asked) for texts in (["ab"], ["a" * 10], ["ab", "a" * 10])
    )
    assert [made.tokens for made in both] == [12, 6]
    assert both == [*short, *long]
    assert not any(made.finished for made in both)
    with pytest.raises(BadInputError, match="prompt 1 has 16 tokens and the model reads 16"):
        engine.generate(["ab", "a" * 16], asked)
