"""Attention of single queries in groups, so that padded rows do not repeat keys and values.

Models with fewer key heads than query heads share each key head among a group of queries.  With a
padding mask transformers repeats the keys and values for every query head, in every step of every
layer: for 16 rows of 32,768 tokens and the shape of DeepSeek-R1-Distill-Qwen-1.5B these are 90 GB
a step.  A step of generation has one query a head, so the heads of a group can stand where the
positions of a query stand, and the keys are read once, where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def grouped_attention(
    module: Any,
    query: Float[Tensor, "batch head position d_head"],
    key: Float[Tensor, "batch key_head key d_head"],
    value: Float[Tensor, "batch key_head key d_value"],
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch position head d_value"], None]:
    """Attend as transformers' own `sdpa` does; a masked single query reads each key head once.

    Whatever is not a single query under a mask that all heads share goes to transformers.
    """
    rows, heads, positions, width = query.shape
    shared = key.shape[1]
    single = (
        positions == 1 and shared < heads and position_bias is None and options.get("cache") is None
    )
    if not single or attention_mask is None or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            position_bias=position_bias, **options,
        )  # fmt: skip
    groups = heads // shared
    attended = scaled_dot_product_attention(
        query.reshape(rows, shared, groups, width),
        key,
        value,
        attn_mask=attention_mask.expand(-1, -1, groups, -1),
        dropout_p=dropout,
        scale=scaling,
    )
    return attended.reshape(rows, 1, heads, value.shape[-1]), None


@contextmanager
def grouped_queries() -> Iterator[None]:
    """Let every model whose attention is `sdpa` attend by groups in here."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = grouped_attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before
