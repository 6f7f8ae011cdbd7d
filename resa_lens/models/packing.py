"""Documents packed into one row: joined, as in the authors' code, or kept apart.

Packed documents attend to each other, and positions count on over the row: what a token's
activation holds depends on the documents before its own.  Kept apart, positions restart behind
each end-of-sequence token and attention does not reach over it, so that every document is read as
if it stood alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from resa_lens.errors import BadInputError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of logits, as a share of the largest: what kernels may differ by for rows of other lengths."""


def document_positions(
    ids: Int[Tensor, "batch position"], eos: int
) -> tuple[Int[Tensor, "batch position"], Bool[Tensor, "batch 1 query key"]]:
    """Return each token's position in its document, and which keys each query attends to.

    A document ends with its end-of-sequence token; the first one of a row may be the rest of one.
    """
    last = ids == eos
    document = last.cumsum(1) - last.long()
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = torch.ones_like(last)
    starts[:, 1:] = last[:, :-1]
    positions = place - (place * starts).cummax(1).values
    same = document[:, :, None] == document[:, None, :]
    return positions, (same & (place[:, :, None] >= place[:, None, :]))[:, None]


@contextmanager
def separate_documents(module: Any, eos: int) -> Iterator[None]:
    """Let a transformers model read the documents of each row apart, whoever calls it.

    The bridge and PEFT call the model's own forward; there positions and mask are put in.  A call
    with a cache goes on with one document and is left as it is.
    """

    def put_in(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        ids = args[0] if args else options.get("input_ids")
        if ids is None or options.get("past_key_values") is not None:
            return None
        positions, attends = document_positions(ids, eos)
        # Added to the scores: a form that every attention of transformers takes.
        mask = torch.zeros(attends.shape, dtype=module.dtype, device=ids.device)
        mask.masked_fill_(~attends, torch.finfo(module.dtype).min)
        return args, {**options, "position_ids": positions, "attention_mask": mask}

    handle = module.register_forward_pre_hook(put_in, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def end_of_documents(tokenizer: Any) -> int:
    """Return the token that ends a document.

    Raises:
        BadInputError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise BadInputError(
            "--packing separate: the tokenizer has no end-of-sequence token, so nothing stands "
            "between two documents; use --packing joined"
        )
    return int(tokenizer.eos_token_id)


@torch.no_grad()
def check_separate(
    forward: Callable[[Tensor], Tensor], module: Any, eos: int, sequence: int, name: str
) -> None:
    """Show on a few tokens that no logit depends on a neighbouring document.

    Args:
        forward: from ids to logits, inside of `separate_documents`.
        module: the transformers model behind it.
        eos: the end-of-sequence token.
        sequence: the longest row that will be read.
        name: the model's.

    Raises:
        BadInputError: the model's attention cannot be kept apart.
    """
    text = module.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True) and window < sequence:
        raise BadInputError(
            f"--packing separate: {name} attends within windows of {window} tokens, which its mask "
            f"for sequences of {sequence} would lose; use sequences of {window}, or --packing "
            "joined"
        )
    others = [i for i in range(min(text.vocab_size, 64)) if i != eos]
    own, one, two = others[:5], others[5:11], others[11:17]
    try:
        alone = _logits(forward, module, own)
        after = [_logits(forward, module, [*other, eos, *own])[-len(own) :] for other in (one, two)]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:120]
        raise BadInputError(
            f"--packing separate: {name} takes no positions and mask of documents ({reason}); use "
            "--packing joined"
        ) from error
    worst = max(float((logits - alone).abs().max()) for logits in after)
    if worst > TOLERANCE.get(module.dtype, 1e-4) * max(1.0, float(alone.abs().max())):
        raise BadInputError(
            f"--packing separate: in {name} a document's logits depend on the one before it (by "
            f"{worst:.2g}), so its attention cannot be kept apart; use --packing joined"
        )


def _logits(forward: Callable[[Tensor], Tensor], module: Any, ids: list[int]) -> Tensor:
    return forward(torch.tensor([ids], device=module.device))[0].float()
