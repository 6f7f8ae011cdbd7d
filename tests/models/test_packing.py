"""Documents packed into a row and kept apart: no logit depends on a neighbour."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from resa_lens.config import config_dict, result_fields
from resa_lens.errors import BadInputError
from resa_lens.models.host import Model, load_model
from resa_lens.models.packing import check_separate, document_positions, separate_documents
from resa_lens.resources import data_path
from resa_lens.stages.saes import packed
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.tuning.objective import preset
from resa_lens.tuning.train import TuneConfig, add_adapters

EOS = 0
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**SHAPE, "intermediate_size": 64},
}
"""Rotary positions, learned ones, and a fused matrix."""
ROW = [5, 6, 7, EOS, 9, 8, EOS, 11, 12, 13, 14]
STARTS = [0, 4, 7, 11]


def model_of(kind: str, **changed: Any) -> Model:
    """Return a small model of random weights, with the bundled tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**CONFIGS.get(kind, CONFIGS["qwen2"]), **changed})
    module: Any = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = load_model("tiny-reasoner").tokenizer
    return Model(kind, module, tokenizer, data_path("tiny-reasoner"), "", "cpu", "float32", "")


def paths(model: Model) -> list[Any]:
    """Return the model's own forward, then the bridge's, which changes the module in place."""
    return [
        lambda ids: model.model(input_ids=ids).logits,
        lambda ids: model.model(ids, use_cache=False).logits,
        lambda ids: model.bridge(ids),
        lambda ids: model.bridge(ids, use_cache=False),
    ]


def test_positions_restart_and_attention_stays_inside():
    positions, attends = document_positions(torch.tensor([ROW, ROW[::-1]]), EOS)
    assert positions[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]
    assert positions[1].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2]
    for query in range(len(ROW)):
        first = max(start for start in STARTS if start <= query)
        assert attends[0, 0, query].nonzero()[:, 0].tolist() == list(range(first, query + 1))


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_logit_depends_on_a_neighbour(kind):
    model = model_of(kind)
    with torch.no_grad():
        for forward in paths(model):
            joined = forward(torch.tensor([ROW]))
            alone = [forward(torch.tensor([ROW[a:b]]))[0] for a, b in itertools.pairwise(STARTS)]
            with separate_documents(model.model, EOS):
                apart = forward(torch.tensor([ROW, [*ROW[4:7], *ROW[:4], *ROW[7:]]]))
            # The same documents in another order, and each by itself.
            torch.testing.assert_close(apart[0], torch.cat(alone), atol=2e-5, rtol=1e-4)
            moved = torch.cat([apart[1, 3:7], apart[1, :3], apart[1, 7:]])
            torch.testing.assert_close(apart[0], moved, atol=2e-6, rtol=1e-5)
            assert (joined[0, 7:] - apart[0, 7:]).abs().max() > 1e-3
            # Behind the context documents are joined as before.
            assert torch.equal(forward(torch.tensor([ROW])), joined)
    assert model.attention == "native"


def test_no_gradient_reaches_a_neighbour():
    model = model_of("qwen2")
    embedded: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.model.get_input_embeddings().register_forward_hook(keep)
    with separate_documents(model.model, EOS):
        model.model(torch.tensor([ROW])).logits[0, 7:].sum().backward()
    gradient = embedded[0].grad
    assert gradient is not None
    assert not gradient[0, :7].any()
    assert gradient[0, 7:].any(1).all()


def test_adapters_on_the_bridge_read_documents_apart():
    model = model_of("qwen2")
    peft, bridge = add_adapters(model, preset("paper"), TuneConfig(rank=2))
    peft.eval()
    with torch.no_grad(), separate_documents(model.model, EOS):
        ids = torch.tensor([ROW, [*ROW[4:7], *ROW[:4], *ROW[7:]]])
        for forward in (lambda ids: peft(input_ids=ids, use_cache=False).logits, bridge):
            logits = forward(ids)
            torch.testing.assert_close(logits[0, 7:], logits[1, 7:], atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(logits[0, 7:], forward(ids[:1, 7:])[0], atol=2e-5, rtol=1e-4)


def test_a_call_with_a_cache_is_left_as_it_is():
    model = model_of("qwen2").model
    with torch.no_grad():
        plain = model(torch.tensor([ROW[:4]]), use_cache=True)
        expected = model(torch.tensor([ROW[4:5]]), past_key_values=plain.past_key_values).logits
        plain = model(torch.tensor([ROW[:4]]), use_cache=True)
        with separate_documents(model, EOS):
            found = model(torch.tensor([ROW[4:5]]), past_key_values=plain.past_key_values).logits
    assert torch.equal(found, expected)


def test_what_cannot_be_kept_apart_is_refused():
    model = model_of("mistral", sliding_window=8)
    with separate_documents(model.model, EOS):
        check_separate(paths(model)[0], model.model, EOS, 8, "m")
        with pytest.raises(BadInputError, match="windows of 8 tokens"):
            check_separate(paths(model)[0], model.model, EOS, 16, "m")
    plain = model_of("qwen2")
    with pytest.raises(BadInputError, match="logits depend on the one before"):
        check_separate(paths(plain)[0], plain.model, EOS, 16, "q")
    with pytest.raises(BadInputError, match="takes no positions"):
        check_separate(lambda ids: torch.add(ids), plain.model, EOS, 16, "q")  # type: ignore
    # State that runs along the row has no mask.
    state = model_of("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    with (
        separate_documents(state.model, EOS),
        pytest.raises(BadInputError, match="--packing separate: s"),
    ):
        check_separate(lambda ids: state.model(input_ids=ids).logits, state.model, EOS, 16, "s")


def test_a_corpus_says_how_its_documents_are_packed():
    with pytest.raises(BadInputError, match="packing 'apart' is unknown; use joined or separate"):
        CorpusConfig(packing="apart")
    model = load_model("tiny-reasoner")
    eos: Any = model.tokenizer.eos_token_id
    ids = torch.tensor([[20, 21, eos, 30, 31], [22, 23, eos, 30, 31]])
    with torch.no_grad():
        with packed(model, CorpusConfig(packing="separate")):
            apart = model.bridge(ids)
        with packed(model, CorpusConfig()):
            joined = model.bridge(ids)
    torch.testing.assert_close(apart[0, 3:], apart[1, 3:], atol=1e-5, rtol=1e-5)
    assert (joined[0, 3:] - joined[1, 3:]).abs().max() > 1e-3
    tokenizer: Any = SimpleNamespace(eos_token_id=None)
    model = replace(model, tokenizer=tokenizer)
    with (
        pytest.raises(BadInputError, match="no end-of-sequence token"),
        packed(model, CorpusConfig(packing="separate")),
    ):
        pass


def test_the_default_packing_makes_no_new_identity():
    assert "packing" not in result_fields(CorpusConfig())
    assert result_fields(CorpusConfig(packing="separate"))["packing"] == "separate"
    assert config_dict(CorpusConfig())["packing"] == "joined"
