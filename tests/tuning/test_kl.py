"""KL through the head a few tokens at a time against the plain way: loss, gradients, room."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from resa_lens.models.bridge import boot
from resa_lens.tuning.kl import (
    COMPILED_RTOL,
    HEAD_INPUT,
    LOGIT_BYTES,
    CompiledSlopes,
    Head,
    chunked_cross_entropy,
    chunked_kl,
    find_head,
    find_plain_head,
    head_input,
    keep_head_input,
    piece_bytes,
)
from resa_lens.tuning.objective import kl_divergence

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 1.5, "softcap": 3.0},
}


def head(vocab: int = 300, width: int = 16, **options: Any) -> Head:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(vocab, generator=generator) if options.pop("bias", False) else None
    return Head(torch.randn(vocab, width, generator=generator), bias, **options)


def sides(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(2, 11, 16, generator=generator)
    q = p + 0.3 * torch.randn(2, 11, 16, generator=generator)
    return p.to(dtype), q.to(dtype)


def worst(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    assert a is not None
    assert b is not None
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
# One row a piece, a number that does not divide the 22 rows, and all at once.
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_loss_and_gradients_are_the_plain_ones(
    name: str, reduction: str, needs: tuple[bool, bool], rows: int
) -> None:
    made = head(**HEADS[name])
    ours = [x.clone().requires_grad_(n) for x, n in zip(sides(), needs, strict=True)]
    plain = [x.clone().requires_grad_(n) for x, n in zip(sides(), needs, strict=True)]
    loss = chunked_kl(*ours, made, reduction, logit_bytes=4 * 300 * rows)
    # A factor after the loss, as accumulation puts one there.
    (loss * 0.5).backward()
    expected = kl_divergence(*(made.logits(x) for x in plain), reduction)
    (expected * 0.5).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b, need in zip(ours, plain, needs, strict=True):
        if need:
            assert worst(a.grad, b.grad) < 1e-5
        else:
            assert a.grad is None


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_cross_entropy_and_its_gradient_are_the_plain_ones(name: str, rows: int) -> None:
    made, wanted = head(**HEADS[name]), torch.arange(22) * 13 % 300
    ours, plain = (sides()[0].flatten(0, 1).requires_grad_() for _ in range(2))
    loss = chunked_cross_entropy(ours, wanted, made, logit_bytes=4 * 300 * rows)
    (loss * 0.5).backward()
    expected = F.cross_entropy(made.logits(plain), wanted, reduction="sum")
    (expected * 0.5).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert worst(ours.grad, plain.grad) < 1e-5


def test_large_logits_do_not_overflow() -> None:
    made = head()
    p, q = (x * 100 for x in sides())
    q.requires_grad_()
    loss = chunked_kl(p, q, made)
    loss.backward()
    expected = kl_divergence(made.logits(p), made.logits(q)).item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())


def test_equal_sides_have_no_divergence_and_no_gradient() -> None:
    p = sides()[0]
    q = p.clone().requires_grad_()
    loss = chunked_kl(p, q, head())
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert q.grad is not None
    assert q.grad.abs().max() < 1e-6


def test_half_precision_is_that_of_the_plain_way() -> None:
    made = head()
    made = Head(made.weight.bfloat16())
    p, q = sides(torch.bfloat16)
    ours, plain = q.clone().requires_grad_(), q.clone().requires_grad_()
    loss = chunked_kl(p, ours, made)
    loss.backward()
    expected = kl_divergence(made.logits(p), made.logits(plain))
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert ours.grad is not None
    assert plain.grad is not None
    assert worst(ours.grad.float(), plain.grad.float()) < 1e-2


def test_no_graph_is_made_where_no_gradient_is_wanted() -> None:
    p, q = sides()
    q.requires_grad_()
    with torch.no_grad():
        assert not chunked_kl(p, q, head()).requires_grad
    assert not chunked_kl(*sides(), head()).requires_grad


def test_what_waits_for_the_way_back_is_hidden_states_and_not_logits() -> None:
    kept: list[int] = []
    p, q = (x.requires_grad_() for x in sides())
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        chunked_kl(p, q, head()).backward()
    assert kept == [p.numel(), q.numel()]


# Heads of models

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=8)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_head_of_a_model_gives_its_logits(name: str) -> None:
    model = MODELS[name]().requires_grad_(False).eval()
    bridge, _, _ = boot(model, None, name)
    found, reason = find_head(bridge)
    assert found is not None, reason
    assert found.softcap == (2.0 if name == "gemma2" else None)
    ids = torch.arange(10).view(2, 5)
    held: list[torch.Tensor] = []
    with bridge.hooks(fwd_hooks=[(HEAD_INPUT, keep_head_input(held))]):
        spared = bridge(ids)
    assert spared.shape == (2, 0, 64)
    torch.testing.assert_close(found.logits(held[0]), bridge(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_head_of_a_plain_model_gives_its_logits(name: str) -> None:
    model = MODELS[name]().requires_grad_(False).eval()
    found, reason = find_plain_head(model)
    assert found is not None, reason
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        ours, theirs = found.logits(head_input(model, ids)), model(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: out.sin())
    assert find_plain_head(model)[0] is None


def test_a_head_that_is_not_understood_is_said_to_be() -> None:
    model = MODELS["gemma2"]().requires_grad_(False).eval()
    bridge, _, _ = boot(model, None, "gemma2")
    # As if the configuration named its cap otherwise; only large logits show it.
    del model.config.final_logit_softcapping
    model.config.final_logit_softcapping = None
    found, _ = find_head(bridge)
    assert found is not None
    linear = bridge.unembed.original_component
    linear.register_forward_hook(lambda module, args, out: out.sin())
    found, reason = find_head(bridge)
    assert found is None
    assert "more than a matrix" in reason


def test_a_trained_head_goes_the_plain_way() -> None:
    bridge, _, _ = boot(MODELS["llama"](), None, "llama")
    found, reason = find_head(bridge)
    assert found is None
    assert reason == "the head is trained"


def test_a_piece_has_a_thousand_tokens_on_a_card_that_can_hold_them() -> None:
    card, vocab = torch.device("cuda"), 151_936
    rows = {
        gigabytes: piece_bytes(vocab, card, gigabytes * 2**30) // (4 * vocab)
        for gigabytes in (1, 8, 24, 80)
    }
    assert rows == {1: 82, 8: 441, 24: 1024, 80: 1024}
    assert piece_bytes(vocab, torch.device("cpu")) == LOGIT_BYTES


@pytest.mark.recorded  # a compiler takes half a minute
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler: torch.compile needs gcc")
def test_the_compiled_way_gives_the_same_loss_and_gradients() -> None:
    notes: list[str] = []
    slopes, made = CompiledSlopes(notes.append), head(softcap=3.0)
    for needs in ((True, True), (False, True)):
        # Twice: the first piece of each shape goes both ways.  The last of seven rows is shorter.
        for _ in range(2):
            both = []
            for way in (slopes, None):
                p, q = (x.clone().requires_grad_(n) for x, n in zip(sides(), needs, strict=True))
                loss = chunked_kl(p, q, made, logit_bytes=4 * 300 * 7, slopes=way)
                loss.backward()
                both.append((loss.item(), p.grad, q.grad))
            (ours, *our_grads), (plain, *plain_grads) = both
            assert ours == pytest.approx(plain, rel=COMPILED_RTOL)
            for a, b in zip(our_grads, plain_grads, strict=True):
                assert (a is None) == (b is None)
                assert a is None or worst(a, b) < COMPILED_RTOL
    assert (slopes.failure, notes) == (None, [])


def loss_and_gradients(slopes: Any) -> list[torch.Tensor]:
    p, q = (x.clone().requires_grad_() for x in sides())
    loss = chunked_kl(p, q, head(), logit_bytes=4 * 300 * 7, slopes=slopes)
    loss.backward()
    return [loss.detach(), *(x.grad for x in (p, q) if x.grad is not None)]


def test_a_compiler_that_fails_or_errs_leaves_the_plain_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(function: Any) -> Any:
        raise RuntimeError("not on\nthis Python")

    def fails_at_a_shape(function: Any) -> Any:
        def compiled(a: torch.Tensor, b: torch.Tensor, *needs: bool) -> torch.Tensor:
            if len(a) == 1:  # the last piece alone
                a += 1.0
                raise RuntimeError("out of resource")
            return function(a, b, *needs)

        return compiled

    def wrong(function: Any) -> Any:
        return lambda *args: function(*args) * 1.01

    plain = loss_and_gradients(None)
    for compiler, why in (
        (none, "not on this Python"),
        (fails_at_a_shape, "out of resource"),
        (wrong, "is wrong on this machine"),
    ):
        monkeypatch.setattr(torch, "compile", compiler)
        notes: list[str] = []
        slopes = CompiledSlopes(notes.append)
        for _ in range(3):
            for ours, expected in zip(loss_and_gradients(slopes), plain, strict=True):
                torch.testing.assert_close(ours, expected)
        assert len(notes) == 1
        assert why in notes[0]
        assert "\n" not in notes[0]
