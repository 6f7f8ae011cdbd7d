from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from resa_lens.errors import BadInputError
from resa_lens.models.activations import check_hookpoints, stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model

LAYERS, WIDTH, VOCABULARY = 4, 32, 50


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def neox() -> Any:
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48,
        num_hidden_layers=LAYERS, num_attention_heads=4, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def blocks(plain: Any) -> Any:
    return plain.gpt_neox.layers if isinstance(plain, GPTNeoXForCausalLM) else plain.model.layers


def pair(build: Any = llama) -> tuple[Model, Any]:
    """A host and an untouched copy of the same weights."""
    torch.manual_seed(0)
    plain = build().eval()
    host: Any = Model(
        name="random", model=copy.deepcopy(plain), tokenizer=None,  # pyright: ignore
        folder=None, weights_hash="0" * 64, device="cpu", dtype="float32", reason="test",  # pyright: ignore
    )  # fmt: skip
    return host, plain


def ids(rows: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def caught_by_torch_hooks(plain: Any, tokens: torch.Tensor) -> dict[Hookpoint, torch.Tensor]:
    """Every MLP's and every block's output, by plain torch hooks on plain transformers."""
    seen: dict[Hookpoint, torch.Tensor] = {}
    handles = []
    for number, block in enumerate(blocks(plain)):
        for site, module in (("mlp_out", block.mlp), ("resid_post", block)):

            def keep(_m, _i, output, point=Hookpoint(number, site)):  # noqa: B008
                seen[point] = output[0] if isinstance(output, tuple) else output

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        plain(tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("build", [llama, neox])
def test_activations_are_those_of_plain_transformers_at_every_layer_and_both_sites(build):
    host, plain = pair(build)
    tokens = ids()
    expected = caught_by_torch_hooks(plain, tokens)
    points = [Hookpoint(n, site) for n in range(LAYERS) for site in ("mlp_out", "resid_post")]
    (batch,) = stream_activations(host, [tokens], points)
    assert set(batch.acts) == set(points)
    assert torch.equal(batch.ids, tokens)
    for point in points:
        acts = batch.acts[point]
        assert acts.shape == (2, 9, WIDTH)
        assert not acts.requires_grad
        torch.testing.assert_close(acts, expected[point], atol=1e-5, rtol=1e-5)
    # The sites differ: one taken for the other would be seen.
    assert not torch.allclose(expected[points[0]], expected[points[1]], atol=1e-2)


def test_resid_post_is_the_next_layers_hidden_state():
    host, plain = pair()
    tokens = ids()
    with torch.no_grad():
        hidden = plain(tokens, output_hidden_states=True).hidden_states
    points = [Hookpoint(n, "resid_post") for n in range(LAYERS - 1)]
    (batch,) = stream_activations(host, [tokens], points)
    for point in points:
        torch.testing.assert_close(batch.acts[point], hidden[point.layer + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [llama, neox])
@pytest.mark.parametrize("deepest", range(LAYERS))
def test_later_blocks_and_the_head_are_not_run(build, deepest):
    host, _ = pair(build)
    calls = dict.fromkeys(range(LAYERS), 0)
    for number, block in enumerate(blocks(host.model)):
        block.mlp.register_forward_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    points = [Hookpoint(0), Hookpoint(deepest)]
    # Booting makes passes of its own.
    assert host.names.sites
    calls |= dict.fromkeys(calls, 0)
    list(stream_activations(host, [ids(), ids(seed=2)], points))
    assert calls == {n: 2 if n <= deepest else 0 for n in range(LAYERS)}


def test_batches_stream_one_at_a_time_and_hooks_are_gone_afterwards():
    host, plain = pair()
    drawn: list[int] = []

    def source():
        for seed in range(3):
            drawn.append(seed)
            yield ids(length=5 + seed, seed=seed)

    stream = stream_activations(host, source(), [Hookpoint(1)])
    assert drawn == []
    kept: list[tuple[Any, Any]] = []
    for seed in range(3):
        batch = next(stream)
        assert drawn == list(range(seed + 1))
        expected = caught_by_torch_hooks(plain, ids(length=5 + seed, seed=seed))
        torch.testing.assert_close(
            batch.acts[Hookpoint(1)], expected[Hookpoint(1)], atol=1e-5, rtol=1e-5
        )
        kept.append((batch.acts, batch.acts[Hookpoint(1)].clone()))
    assert next(stream, None) is None
    host.bridge(ids(seed=9))
    assert all(torch.equal(acts[Hookpoint(1)], before) for acts, before in kept)


def test_no_hookpoint_and_a_layer_beyond_the_model_are_refused():
    host, _ = pair()
    with pytest.raises(BadInputError, match="no hookpoint"):
        next(stream_activations(host, [ids()], []))
    with pytest.raises(BadInputError) as caught:
        next(stream_activations(host, [ids()], [Hookpoint(1), Hookpoint(LAYERS)]))
    assert "layer 4 (0-based; 5th of 4)" in str(caught.value)
    assert "0 to 3" in str(caught.value)
    check_hookpoints(host, [Hookpoint(LAYERS - 1)])
