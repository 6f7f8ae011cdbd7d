"""Which latents are active: the encoder's product and the top-k, without sorting the rest.

    z = TopK(ReLU(W_enc (x - b_dec) + b_enc))          (paper, eq. 3, with sparsify's ReLU)

Two ways.  `exact` takes the product in the weights' own precision.  The other finds candidates by a
bfloat16 product, a margin more than k, and computes their values anew in full precision: on a CPU
with bfloat16 instructions the product costs a quarter, and what it may get wrong is a latent that
lies a margin of ranks away from the k-th.

On a CPU the k-th largest of each row comes from NumPy's partition, which is vectorised
(AVX-512 quickselect), after a pass over maxima of groups that leaves few latents to it
(`_reaching`).  bfloat16 numbers that are positive sort as their bit patterns do, so all of that
runs on 16-bit integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.machine import determinism
from resa_lens.machine.precision import full_products
from resa_lens.saes.kernels import native_bf16, pair_dots, row_starts

PRODUCT_BYTES = 32 * 2**20
"""Size of one piece of the encoder's product: pieces that stay in the cache are selected faster,
and memory does not grow with the batch."""
GROUPS = 512
"""Groups of latents whose maxima are looked at first, or four times the count if that is more."""


SMALLEST = np.nextafter(np.float32(0), np.float32(1))
"""Of the floats above zero."""


class Active(NamedTuple):
    """Active latents of some rows, row by row, values above zero."""

    rows: Int[Tensor, " active"]
    latents: Int[Tensor, " active"]
    values: Float[Tensor, " active"]


class Encoder(NamedTuple):
    """What the selection needs of a coder; `half` is the weights and bias in bfloat16 or None."""

    weight: Float[Tensor, "latent d_in"]
    bias: Float[Tensor, " latent"]
    half: tuple[Tensor, Tensor] | None = None


def prefers_half(device: str) -> bool:
    """Whether candidates are found in bfloat16: not on a CPU without its instructions."""
    return not device.startswith("cpu") or native_bf16()


def half_room(latents: int, d_in: int, device: str) -> Tensor | None:
    """Return room for an encoder in bfloat16, or None where it is not used."""
    if not prefers_half(device):
        return None
    return torch.empty(latents, d_in, dtype=torch.bfloat16, device=device)


def half_precision(
    weight: Float[Tensor, "latent d_in"],
    bias: Float[Tensor, " latent"],
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Return weights and bias in bfloat16, into `out` if given; None where that is not used."""
    if not prefers_half(weight.device.type):
        return None
    return (weight.bfloat16() if out is None else out.copy_(weight)), bias.bfloat16()


def margin(k: int) -> int:
    """Return how many candidates more than k the bfloat16 product has to name."""
    return max(16, k // 2)


def topk(encoder: Encoder, x: Float[Tensor, "row d_in"], k: int) -> Active:
    """Return the k largest latents of each row, those of them that are above zero.

    Args:
        encoder: weights and bias.
        x: activations less b_dec.
        k: of each row.
    """
    candidates = k if encoder.half is None else k + margin(k)
    parts = []
    for first, piece, pre in products(encoder, x):
        rows, latents, values = _largest(pre, min(candidates, pre.shape[1]))
        if encoder.half is not None:
            values = exact(encoder, piece, rows, latents)
        if rows.numel() > k * piece.shape[0] or encoder.half is not None:
            rows, latents, values = largest_of_each_row(rows, latents, values, piece.shape[0], k)
        parts.append(Active(rows + first, latents, values))
    return _join(parts, x)


def batch_topk(encoder: Encoder, x: Float[Tensor, "row d_in"], k: int) -> Active:
    """Return the k x rows largest latents of the whole batch (BatchTopK, arXiv 2412.06410).

    Ties at the last place come along: which of two equal rows is served must not depend on their
    order, or two processes would differ from one.
    """
    total = k * x.shape[0]
    kept: Active | None = None
    # A lower bound of the last place, from what was seen so far.
    limit = 0.0
    for first, piece, pre in products(encoder, x):
        off = rounding(encoder, piece, pre)
        sure = pre.float() if off is None else pre.float() - off
        limit = max(limit, _kth_of(sure, total))
        reach = sure if off is None else pre.float() + off
        rows, latents = ((reach >= limit) & (reach > 0)).nonzero(as_tuple=True)
        values = pre[rows, latents] if off is None else exact(encoder, piece, rows, latents)
        active = Active(rows + first, latents, values)
        kept = active if kept is None else _join([kept, active], x)
        last = kth_largest(kept.values, total)
        kept, limit = _at_least(kept, last), max(limit, last)
    if kept is None:
        return _join([], x)
    return _take(kept, (kept.values > 0).nonzero()[:, 0])


def _kth_of(values: Float[Tensor, "row latent"], k: int) -> float:
    """Return the k-th largest of a dense piece, minus infinity where there are not so many."""
    count = values.numel()
    if count <= k:
        return -float("inf")
    if not determinism.on_cpu(values):
        return kth_by_counting(values, k).item()
    return float(np.partition(values.reshape(-1).numpy(), count - k)[count - k])


def rounding(
    encoder: Encoder, x: Float[Tensor, "row d_in"], pre: Float[Tensor, "row latent"]
) -> Float[Tensor, "row latent"] | None:
    """Return how far bfloat16 pre-activations may be from the exact ones; None if they are exact.

    Both factors and the result are rounded, each by 2^-9 of itself; by Cauchy and Schwarz the sum
    of products moves by at most 2^-8 |x| |w|.  With it candidates hold every latent that counts,
    also where one token is far longer than the others.
    """
    if encoder.half is None:
        return None
    longest = encoder.weight.norm(dim=1).max()
    lengths = x.norm(dim=1, keepdim=True) * longest + encoder.bias.abs().max()
    return 1.01 * 2**-8 * (lengths + pre.float().abs())


def kth_by_counting(values: Float[Tensor, "*shape"], k: int) -> Float[Tensor, ""]:
    """Return the k-th largest value; 0 where fewer than k are above zero.

    Bit by bit: positive floats sort as their bit patterns do, so the pattern of the k-th is the
    largest that k values or more reach.  That reads the values 31 times (15 in bfloat16), moves
    none and looks at no result; `torch.topk` sorts them.
    """
    whole = torch.int16 if values.element_size() == 2 else torch.int32
    bits = values.contiguous().view(whole)
    limit = torch.zeros((), dtype=whole, device=values.device)
    for place in range(torch.iinfo(whole).bits - 2, -1, -1):
        higher = limit | (1 << place)
        limit = torch.where((bits >= higher).sum() >= k, higher, limit)
    return limit.view(values.dtype)


def kth_largest(values: Float[Tensor, " pair"], k: int) -> float:
    """Return the k-th largest value, minus infinity where there are not so many."""
    if values.numel() <= k:
        return -float("inf")
    return values.topk(k, sorted=False).values.min().item()


def _at_least(found: Active, limit: float) -> Active:
    return (
        found if limit == -float("inf") else _take(found, (found.values >= limit).nonzero()[:, 0])
    )


def above(
    encoder: Encoder, x: Float[Tensor, "row d_in"], threshold: float | Float[Tensor, " latent"]
) -> Active:
    """Return the latents above a threshold (BatchTopK at inference), or each above its own."""
    parts = []
    floor: Any = threshold.clamp_min(0) if isinstance(threshold, Tensor) else max(threshold, 0.0)
    for first, piece, pre in products(encoder, x):
        off = rounding(encoder, piece, pre)
        reach = pre.float() if off is None else pre.float() + off
        rows, latents = ((reach > threshold) & (reach > 0)).nonzero(as_tuple=True)
        if encoder.half is None:
            values = pre[rows, latents]
        else:
            values = exact(encoder, piece, rows, latents)
        kept = values > (floor[latents] if isinstance(floor, Tensor) else floor)
        parts.append(Active(rows[kept] + first, latents[kept], values[kept]))
    return _join(parts, x)


def products(
    encoder: Encoder, x: Float[Tensor, "row d_in"]
) -> Iterator[tuple[int, Float[Tensor, "piece d_in"], Float[Tensor, "piece latent"]]]:
    """Yield (first row, rows, pre-activations) in pieces; the last is overwritten by the next."""
    weight, bias = encoder.half or (encoder.weight, encoder.bias)
    rows = max(1, PRODUCT_BYTES // (weight.shape[0] * weight.element_size()))
    rows = min(rows, x.shape[0])
    if x.device.type != "cpu":
        rows = max(rows, min(x.shape[0], 4096))
    out = torch.empty(rows, weight.shape[0], dtype=weight.dtype, device=x.device)
    for first in range(0, x.shape[0], max(1, rows)):
        piece = x[first : first + rows]
        pre = out[: piece.shape[0]]
        with full_products():
            torch.addmm(bias, piece.to(weight.dtype), weight.mT, out=pre)
        yield first, piece, pre


def _largest(pre: Float[Tensor, "row latent"], count: int) -> Active:
    """Return at least the `count` largest of each row that are above zero; ties come along."""
    if not determinism.on_cpu(pre):
        values, latents = pre.topk(count, dim=1, sorted=False)
        rows, place = (values > 0).nonzero(as_tuple=True)
        return Active(rows, latents[rows, place], values[rows, place].float())
    if pre.dtype is torch.bfloat16:
        numbers, smallest = pre.view(torch.int16).numpy(), np.int16(1)
    else:
        numbers, smallest = pre.numpy(), SMALLEST
    flat = _reaching(numbers, count, smallest)
    rows = flat // numbers.shape[1]
    values = pre.view(-1).index_select(0, torch.from_numpy(flat)).float()
    latents = torch.from_numpy(flat - rows * numbers.shape[1])
    return Active(torch.from_numpy(rows), latents, values)


def _reaching(numbers: Any, count: int, smallest: Any) -> Any:
    """Return where numbers are the `count` largest of their row, with ties, or `smallest` or more.

    The `count`-th largest among the maxima of groups is no more than that of the row, and with
    four times as many groups hardly less: it leaves few numbers to be partitioned, and finding it
    is a pass of vectorised maxima (2 to 3 ms where partitioning 1,024 x 8,192 takes 53).
    """
    n_rows, latents = numbers.shape
    groups = max(GROUPS, 1 << (4 * count - 1).bit_length())
    size = latents // groups
    if size < 4:
        limit = np.partition(numbers, latents - count, axis=1)[:, latents - count]
        return _places(numbers >= np.maximum(limit, smallest)[:, None])
    # Latents behind the last whole group can only raise the limit that is looked for.
    best = numbers[:, : size * groups].reshape(n_rows, size, groups).max(axis=1)
    low = np.partition(best, groups - count, axis=1)[:, groups - count]
    flat = _places(numbers >= np.maximum(low, smallest)[:, None])
    rows, values = flat // latents, numbers.reshape(-1)[flat]
    counts = np.bincount(rows, minlength=n_rows)
    width = int(counts.max())
    if width <= count:
        return flat
    starts = np.cumsum(counts) - counts
    least = -np.inf if numbers.dtype == np.float32 else np.iinfo(numbers.dtype).min
    table = np.full((n_rows, width), least, numbers.dtype)
    table[rows, np.arange(len(flat)) - starts[rows]] = values
    limit = np.partition(table, width - count, axis=1)[:, width - count]
    return flat[values >= limit[rows]]


def _places(mask: Any) -> Any:
    """Return where a mask is true, as `np.flatnonzero`; by eights, in half its time where few are.

    Most eights are empty, and eight bytes are compared at once.
    """
    if mask.size % 8:
        return np.flatnonzero(mask)
    eights = mask.reshape(-1).view(np.uint64)
    some = np.flatnonzero(eights != 0)
    inside = np.flatnonzero(eights[some].view(bool))
    return (some[inside >> 3] << 3) + (inside & 7)


def exact(
    encoder: Encoder, x: Tensor, rows: Int[Tensor, " pair"], latents: Int[Tensor, " pair"]
) -> Float[Tensor, " pair"]:
    """Return the pre-activations of pairs, sorted by row, in the weights' own precision."""
    return exact_values(encoder, x, row_starts(rows, x.shape[0]), latents)


def exact_values(
    encoder: Encoder, x: Tensor, starts: Int[Tensor, " row+1"], latents: Int[Tensor, " pair"]
) -> Float[Tensor, " pair"]:
    """Return pre-activations in the weights' precision, of pairs sorted by row."""
    products = pair_dots(x.to(encoder.weight.dtype), encoder.weight, starts, latents)
    return products + encoder.bias[latents]


def largest_of_each_row(
    rows: Int[Tensor, " pair"],
    latents: Int[Tensor, " pair"],
    values: Float[Tensor, " pair"],
    n_rows: int,
    k: int,
) -> Active:
    """Keep the k largest of each row, above zero, in the order of their latents.

    On a CPU by NumPy's partition, in a fifth of the time; where the k-th of a row has equals, by
    torch's top-k, which chooses among them.
    """
    if determinism.on_cpu(values) and values.dtype is torch.float32:
        kept = _kept_of_each_row(rows.numpy(), values.numpy(), n_rows, k)
        if kept is not None:
            columns = (column.numpy().take(kept) for column in (rows, latents, values))
            return Active(*map(torch.from_numpy, columns))
    counts = torch.bincount(rows, minlength=n_rows)
    width = int(counts.max()) if counts.numel() else 0
    if width > k:
        starts = counts.cumsum(0) - counts
        place = torch.arange(rows.numel(), device=rows.device) - starts[rows]
        table = values.new_zeros(n_rows, width)
        table[rows, place] = values
        chosen = table.topk(k, dim=1, sorted=False).indices
        keep = torch.zeros(n_rows, width, dtype=torch.bool, device=rows.device)
        keep.scatter_(1, chosen, True)
        mask = keep[rows, place] & (values > 0)
    else:
        mask = values > 0
    return Active(rows[mask], latents[mask], values[mask])


def _kept_of_each_row(rows: Any, values: Any, n_rows: int, k: int) -> Any:
    """Return the places of the k largest of each row, above zero; None where ties make them more.

    Args:
        rows: of each pair, sorted, [pair] in int64.
        values: [pair] in float32.
        n_rows: how many rows there are.
        k: of each row.
    """
    counts = np.bincount(rows, minlength=n_rows)
    width = int(counts.max(initial=0))
    if width <= k:
        return np.flatnonzero(values > 0)
    table = np.zeros((n_rows, width), values.dtype)
    first = np.arange(n_rows) * width - (np.cumsum(counts) - counts)
    table.reshape(-1)[np.arange(len(rows)) + first[rows]] = values
    last = np.partition(table, width - k, axis=1)[:, width - k]
    # Not at least the smallest above zero: where such are flushed to zero, it would be zero.
    kept = np.flatnonzero((values >= last[rows]) & (values > 0))
    return kept if np.bincount(rows[kept], minlength=n_rows).max() <= k else None


def _take(found: Active, index: Tensor) -> Active:
    return Active(*(part[index] for part in found))


def _join(parts: list[Active], x: Tensor) -> Active:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        none = torch.zeros(0, dtype=torch.long, device=x.device)
        return Active(none, none, torch.zeros(0, device=x.device))
    return Active(*(torch.cat(column) for column in zip(*parts, strict=True)))
