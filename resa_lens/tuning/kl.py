"""KL between two passes, and cross entropy, without their logits: token by token through the head.

At a vocabulary of 151,936 the two sets of logits, their softmaxes and gradients are most of the
memory of a plain training step.  Here the model runs to the head's input, and the frozen head is
applied to a few tokens at a time: loss and gradients of these tokens are computed at once, and only
the gradients to the hidden states are kept.  The products are those of the plain way, in the same
precision; `objective.kl_divergence` is the plain way and what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LOGIT_BYTES = 48 * 2**20
"""Largest piece of one side's logits on a CPU, where a larger one is no faster."""
GPU_ROWS, GPU_SHARE = 1024, 1 / 32
"""On a GPU a piece has so many tokens, or fewer where one side's logits would take more than this
share of the card's memory.  Of all of it, not of what is free: a run that goes on after a kill must
cut the same pieces."""
CACHE_BYTES = 2**19
"""On a CPU the softmaxes go over so much of a piece at once: it stays in the cache."""
HEAD_INPUT = "unembed.hook_in"
COMPILED_RTOL = 1e-4
"""What the compiled and the plain way may differ by: their sums run in another order."""

Slopes = Callable[[Tensor, Tensor, bool, bool], Tensor]
"""Takes the float32 logits [row, vocab] of two sides, and whether each needs its gradient."""


@dataclass(frozen=True)
class Head:
    """What turns the final norm's output into logits: y = cap(scale (W h + b))."""

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    """Cohere's and Granite's factor on the logits."""
    softcap: float | None = None
    """Gemma's y = c tanh(z / c)."""

    def logits(self, hidden: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape vocab"]:
        """Return the logits in the dtype of the hidden states."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def keep_head_input(held: list[Tensor], scale: float | None = None) -> Callable[..., Tensor]:
    """Return a hook for `HEAD_INPUT` that keeps the hidden states and spares the head its work.

    Args:
        held: where the hidden states are put.
        scale: give the head the states times this, in place of no position at all.
    """

    def keep(hidden: Tensor, hook: object = None) -> Tensor:
        held.append(hidden)
        # No position is left for the head and for whatever follows it.
        return hidden[:, :0] if scale is None else hidden * scale

    return keep


@torch.no_grad()
def find_head(bridge: Any) -> tuple[Head | None, str]:
    """Read a model's head and hold it to the model's own logits.

    Returns:
        The head, or None and why the logits must be computed the plain way.
    """

    def run(ids: Tensor, inputs: list[Tensor], scale: float) -> Tensor:
        with bridge.hooks(fwd_hooks=[(HEAD_INPUT, keep_head_input(inputs, scale=scale))]):
            return bridge(ids, use_cache=False)

    return _read_head(
        getattr(bridge.unembed, "original_component", None), bridge.original_model.config, run
    )


@torch.no_grad()
def find_plain_head(model: Any) -> tuple[Head | None, str]:
    """Do as `find_head` for a model of transformers, plain or wrapped by PEFT."""

    def run(ids: Tensor, inputs: list[Tensor], scale: float) -> Tensor:
        with _at_head(model, keep_head_input(inputs, scale=scale)):
            return model(input_ids=ids, use_cache=False).logits

    return _read_head(model.get_output_embeddings(), model.config, run)


def head_input(
    model: Any, ids: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch position d_model"]:
    """Run a model of transformers to the input of its head, and spare the head its work."""
    inputs: list[Tensor] = []
    with _at_head(model, keep_head_input(inputs)):
        model(input_ids=ids, use_cache=False)
    return inputs[0]


@contextmanager
def _at_head(model: Any, hook: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (hook(args[0]),)
    )
    try:
        yield
    finally:
        handle.remove()


def _read_head(
    linear: Any, config: Any, run: Callable[[Tensor, list[Tensor], float], Tensor]
) -> tuple[Head | None, str]:
    if type(linear) is not nn.Linear:
        return None, f"the head is a {type(linear).__name__}, not a plain matrix"
    if linear.weight.requires_grad:
        return None, "the head is trained"
    config = config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    # The bridge gives every head a bias of zeros.
    bias = linear.bias if linear.bias is not None and bool(linear.bias.any()) else None
    head = Head(linear.weight, bias, scale, getattr(config, "final_logit_softcapping", None))
    ids = torch.arange(4, device=linear.weight.device)[None]
    held: list[Tensor] = []
    # Times a hundred, so that a cap which the configuration names otherwise would show.
    theirs = run(ids, held, 100.0)
    ours = head.logits(held[0] * 100.0)
    loose = 1e-4 if theirs.dtype == torch.float32 else 2e-2
    if not torch.allclose(ours, theirs, rtol=loose, atol=loose * theirs.abs().max().item()):
        return None, "the model's logits are more than a matrix and a known factor or cap"
    return head, ""


def piece_bytes(vocab: int, device: torch.device, memory: int | None = None) -> int:
    """Return how large a piece of one side's logits in float32 may be.

    Args:
        vocab: tokens of the head.
        device: where it is.
        memory: bytes of a GPU, by default what it says.
    """
    if device.type != "cuda":
        return LOGIT_BYTES
    memory = memory or torch.cuda.get_device_properties(device).total_memory
    return min(GPU_ROWS * 4 * vocab, max(LOGIT_BYTES, int(memory * GPU_SHARE)))


def chunked_kl(
    p_hidden: Float[Tensor, "batch position d_model"],
    q_hidden: Float[Tensor, "batch position d_model"],
    head: Head,
    reduction: str = "mean",
    *,
    logit_bytes: int | None = None,
    slopes: Slopes | None = None,
) -> Float[Tensor, ""]:
    """Return `objective.kl_divergence` of the logits that the head makes of two hidden states.

    Args:
        p_hidden: what goes into the head on the first side of D_KL(p || q).
        q_hidden: the second side.
        head: frozen: no gradient goes to its weights.
        reduction: "mean" over tokens, or the "sum" a sequence.
        logit_bytes: largest piece of one side's logits in float32; see `piece_bytes`.
        slopes: what takes a piece's logits, by default the plain way; see `CompiledSlopes`.
    """
    grad = torch.is_grad_enabled()
    vocab = head.weight.shape[0]
    largest = piece_bytes(vocab, p_hidden.device) if logit_bytes is None else logit_bytes
    total: Any = _ChunkedKl.apply(
        p_hidden,
        q_hidden,
        head,
        max(1, largest // (4 * vocab)),
        grad and p_hidden.requires_grad,
        grad and q_hidden.requires_grad,
        slopes or _kl_and_slopes,
    )
    batch, position = p_hidden.shape[:2]
    return total / (batch * position if reduction == "mean" else batch)


class _ChunkedKl(torch.autograd.Function):
    """The sum over tokens; the gradients are made on the way and wait for their factor."""

    @staticmethod
    def forward(
        ctx: Any,
        p: Tensor,
        q: Tensor,
        head: Head,
        rows: int,
        p_needs: bool,
        q_needs: bool,
        kl_and_slopes: Slopes,
    ) -> Tensor:
        p_flat, q_flat = p.flatten(0, -2), q.flatten(0, -2)
        p_grad = torch.empty_like(p_flat) if p_needs else None
        q_grad = torch.empty_like(q_flat) if q_needs else None
        total = torch.zeros((), device=p.device)
        for start in range(0, len(p_flat), rows):
            part = slice(start, start + rows)
            y_p, y_q = head.logits(p_flat[part]).float(), head.logits(q_flat[part]).float()
            caps = [None if grad is None else _cap_slope(head, y)
                    for y, grad in ((y_p, p_grad), (y_q, q_grad))]  # fmt: skip
            total += kl_and_slopes(y_p, y_q, p_needs, q_needs)
            for grad, dy, cap in ((p_grad, y_p, caps[0]), (q_grad, y_q, caps[1])):
                if grad is not None:
                    _through_head(head, dy, cap, grad[part])
        ctx.save_for_backward(p_grad, q_grad)
        ctx.shape = p.shape
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        made = [
            None if held is None else (held * grads[0]).view(ctx.shape)
            for held in ctx.saved_tensors
        ]
        return (*made, None, None, None, None, None)


def chunked_cross_entropy(
    hidden: Float[Tensor, "row d_model"],
    targets: Int[Tensor, " row"],
    head: Head,
    *,
    logit_bytes: int | None = None,
) -> Float[Tensor, ""]:
    """Return the sum over rows of the cross entropy of the logits that the head makes.

    Args:
        hidden: what goes into the head.
        targets: the token of each row.
        head: frozen: no gradient goes to its weights.
        logit_bytes: largest piece of the logits in float32; see `piece_bytes`.
    """
    vocab = head.weight.shape[0]
    largest = piece_bytes(vocab, hidden.device) if logit_bytes is None else logit_bytes
    total: Any = _ChunkedCrossEntropy.apply(hidden, targets, head, max(1, largest // (4 * vocab)))
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum over rows; the gradient is made on the way and waits for its factor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, rows: int) -> Tensor:
        grad = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            y = head.logits(hidden[part]).float()
            cap = _cap_slope(head, y)
            chosen = targets[part, None]
            # d/dy = softmax(y) - one at the target
            log_p = y.log_softmax(1)
            total -= log_p.gather(1, chosen).sum()
            dy = log_p.exp_()
            dy.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=dy.dtype))
            _through_head(head, dy, cap, grad[part])
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        return ctx.saved_tensors[0] * grads[0], None, None, None


def _cap_slope(head: Head, y: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"] | None:
    """Return the derivative of the soft cap at its outcome, None where there is no cap."""
    return None if head.softcap is None else 1 - (y / head.softcap) ** 2


def _through_head(head: Head, dy: Tensor, cap: Tensor | None, out: Tensor) -> None:
    """Put the gradient to the head's input in `out`; that to the logits is overwritten."""
    dz = dy if cap is None else dy.mul_(cap)
    if head.scale != 1.0:
        dz.mul_(head.scale)
    torch.mm(dz.to(head.weight.dtype), head.weight, out=out)


def _kl_and_slopes(
    y_p: Float[Tensor, "row vocab"], y_q: Float[Tensor, "row vocab"], p_needs: bool, q_needs: bool
) -> Float[Tensor, ""]:
    """Return sum over rows of D_KL(p || q); put d/dy_p and d/dy_q in the logits' place."""
    if y_p.device.type != "cpu":
        return _slopes(y_p, y_q, p_needs, q_needs)
    total = y_p.new_zeros(())
    step = max(1, CACHE_BYTES // (4 * y_p.shape[1]))
    for a, b in zip(y_p.split(step), y_q.split(step), strict=True):
        total += _slopes(a, b, p_needs, q_needs)
    return total


def _slopes(a: Tensor, b: Tensor, p_needs: bool, q_needs: bool) -> Tensor:
    """Do it for rows that are taken at once.

    d/dy_p = p (log p - log q - KL),  d/dy_q = q - p
    """
    a -= a.amax(1, keepdim=True)
    b -= b.amax(1, keepdim=True)
    p, q = a.exp(), b.exp()
    p_sum, q_sum = p.sum(1, keepdim=True), q.sum(1, keepdim=True)
    p /= p_sum
    a -= b
    a += (q_sum / p_sum).log_()
    kl = torch.bmm(p[:, None], a[:, :, None])[:, 0]
    if p_needs:
        a -= kl
        a *= p
    if q_needs:
        q /= q_sum
        torch.sub(q, p, out=b)
    return kl.sum()


class CompiledSlopes:
    """Takes a piece's logits compiled: they are read thrice, and not a dozen times.

    That a compiler is installed says little, and each shape has kernels of its own.  So the first
    piece of each shape goes both ways: its result is the plain one, and the compiled one is held to
    it; while it does, that piece's logits are in memory twice.  From the first failure on all goes
    the plain way.

    Args:
        note: called once with why there is nothing compiled.
    """

    def __init__(self, note: Callable[[str], None] = lambda text: None) -> None:
        self.note = note
        self.failure: str | None = None
        self._compiled: Slopes | None = None
        self._known: set[tuple[object, ...]] = set()

    def __call__(self, y_p: Tensor, y_q: Tensor, p_needs: bool, q_needs: bool) -> Tensor:
        """Do as `_kl_and_slopes` does."""
        shape = (*y_p.shape, p_needs, q_needs)
        if self.failure is None and self._compiled is not None and shape in self._known:
            return self._compiled(y_p, y_q, p_needs, q_needs)
        trial = None if self.failure else self._try(y_p, y_q, p_needs, q_needs)
        total = _kl_and_slopes(y_p, y_q, p_needs, q_needs)
        if trial is not None:
            sides = [(y, ours) for y, ours, needs in
                     ((y_p, trial[1], p_needs), (y_q, trial[2], q_needs)) if needs]  # fmt: skip
            if all(_alike(one, other) for one, other in ((total, trial[0]), *sides)):
                self._known.add(shape)
            else:
                self._fail("what it compiles is wrong on this machine")
        return total

    def _try(
        self, y_p: Tensor, y_q: Tensor, p_needs: bool, q_needs: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        try:
            self._compiled = self._compiled or torch.compile(_slopes)
            # Copies: one that fails half way has changed what it was given.
            ours_p, ours_q = y_p.clone(), y_q.clone()
            return self._compiled(ours_p, ours_q, p_needs, q_needs), ours_p, ours_q
        except Exception as error:  # noqa: BLE001 - compilers raise what they like
            text = " ".join(str(error).split()) or "no reason given"
            self._fail(f"{type(error).__name__}: {text[:160]}")
            return None

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self.note(f"KL as it stands, not compiled: {reason}")


def _alike(plain: Tensor, ours: Tensor) -> bool:
    """Whether two results differ by no more than `COMPILED_RTOL` of the largest."""
    return bool((plain - ours).abs().max() <= COMPILED_RTOL * plain.abs().max() + 1e-12)
