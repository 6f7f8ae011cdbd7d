"""Token ids to text, and where a text ends: the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resa_lens.evals.engines.base import Generation


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the end-of-sequence ids of the tokenizer, the model and its generation config."""
    ends: list[int] = []
    sources = (
        tokenizer.eos_token_id,
        getattr(model.config, "eos_token_id", None),
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
    )
    for value in sources:
        ids = value if isinstance(value, list | tuple) else [value]
        ends += [i for i in ids if i is not None and i not in ends]
    return ends


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of token ids with its special tokens, as it was written."""
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def stopped(tokenizer: Any, ids: Sequence[int], stop: tuple[str, ...]) -> bool:
    """Return whether the end of the text holds a stop string."""
    # Twice the bytes: some tokens decode to nothing.
    tail = text_of(tokenizer, ids[-2 * max(len(text.encode()) for text in stop) :])
    return any(text in tail for text in stop)


def finish(
    tokenizer: Any,
    ids: Sequence[int],
    ends: Sequence[int],
    stop: tuple[str, ...],
    *,
    finished: bool,
    timed_out: bool = False,
) -> Generation:
    """Return the generation of the tokens: without end-of-sequence, cut after its stop string."""
    kept = ids[:-1] if len(ids) and ids[-1] in ends else ids
    text = text_of(tokenizer, kept)
    cuts = [text.find(s) + len(s) for s in stop if s in text]
    return Generation(
        text[: min(cuts)] if cuts else text, tuple(kept), len(ids), finished, timed_out
    )
