"""Which experts the tokens of documents use, and how much: the raw material of maps and rankings.

Documents are read one by one with their end, never joined; what is padding is routed too and counts
nowhere.  A token belongs to the prompt, the thoughts or the answer (`texts.phases`); a tag's token
is the last one of the tag's last occurrence in its document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.experts.config import LEAST_DOCUMENTS
from resa_lens.experts.routers import Router, read_output, recording
from resa_lens.models.host import Model
from resa_lens.progress import Advance
from resa_lens.texts.phases import tag_phases, tag_spans
from resa_lens.texts.prompts import PHASES, TAGS

Array = np.ndarray[Any, Any]
BATCH_TOKENS = 4096
"""Of one pass, padding included, unless a single document is longer."""


@dataclass(frozen=True)
class Texts:
    """Tokenised documents that lie end to end."""

    ids: Int[Array, " token"]
    phases: Int[Array, " token"]
    """Index into `PHASES`."""
    documents: Int[Array, " token"]
    """Number of the document."""
    marks: Mapping[str, Bool[Array, " token"]]
    """By tag, its one token in each document that has it."""
    pieces: Mapping[str, int] = field(default_factory=dict)
    """By tag, the most tokens that an occurrence has."""

    @property
    def count(self) -> int:
        """The number of documents."""
        return int(self.documents[-1]) + 1 if len(self.documents) else 0

    def mark(self, tag: str) -> Bool[Array, " token"]:
        """Return where a tag's token is.

        Raises:
            BadInputError: the tag is missing, or stands in too few documents.
        """
        marked = self.marks.get(tag)
        number = 0 if marked is None else int(marked.sum())
        if marked is None or not number:
            raise BadInputError(
                f"{tag!a:.40} stands in none of the {self.count} documents; name a tag or token "
                f"that does, or one of {', '.join(PHASES)}"
            )
        if number < LEAST_DOCUMENTS:
            raise BadInputError(
                f"{tag!a:.40} stands in {number} of {self.count} documents, and a target needs "
                f"{LEAST_DOCUMENTS}; give more --text-tokens"
            )
        return marked

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Yield each document's number and the range of its tokens."""
        ends = np.flatnonzero(np.diff(self.documents, append=-1)) + 1
        start = 0
        for number, end in enumerate(ends.tolist()):
            yield number, start, end
            start = end


def read_texts(
    tokenizer: Any,
    texts: Iterable[str],
    *,
    tokens: int,
    longest: int | None = None,
    tags: Sequence[str] = TAGS,
) -> Texts:
    """Tokenise documents, `tokens` in all or a few more, and mark phases and tags.

    Args:
        tokenizer: a fast one, for its offsets.
        texts: documents; no more are kept than are needed.
        tokens: stop once so many are there.
        longest: cut documents beyond this length.
        tags: what is marked.

    Raises:
        BadInputError: no document, or a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise BadInputError("the tokenizer gives no offsets; phases need a fast one")
    ids: list[int] = []
    phases: list[int] = []
    documents: list[int] = []
    places: dict[str, list[int]] = {tag: [] for tag in tags}
    pieces = dict.fromkeys(tags, 0)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for number, text in enumerate(texts):
        encoded = tokenizer(text, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        row = [*encoded["input_ids"], *end][:longest]
        for tag in tags:
            spans = tag_spans(text, tag, offsets)
            if spans and spans[-1] and spans[-1][-1] < len(row):
                places[tag].append(len(ids) + spans[-1][-1])
                pieces[tag] = max(pieces[tag], len(spans[-1]))
        phases += tag_phases(text, [*offsets, (len(text), len(text))])[: len(row)]
        ids += row
        documents += [number] * len(row)
        if len(ids) >= tokens:
            break
    if not ids:
        raise BadInputError("no document was given; a map of experts needs at least one")
    marks = {tag: np.zeros(len(ids), dtype=bool) for tag in tags}
    for tag, where in places.items():
        marks[tag][where] = True
    return Texts(
        np.array(ids, dtype=np.int64), np.array(phases, dtype=np.int64),
        np.array(documents, dtype=np.int64), marks, pieces,
    )  # fmt: skip


def padded_batches(
    texts: Texts, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[Int[Tensor, "row position"], Int[Tensor, "row position"]]]:
    """Yield ids padded on the right, and the place of each in the texts; -1 for padding.

    Nothing of a document sees what stands behind it, so padding there changes nothing.
    """
    rows = sorted(texts.rows(), key=lambda row: row[2] - row[1])
    while rows:
        size, longest = 0, 0
        while size < len(rows):
            longest = max(longest, rows[size][2] - rows[size][1])
            if size and longest * (size + 1) > batch_tokens:
                break
            size += 1
        some, rows = rows[:size], rows[size:]
        longest = max(end - start for _, start, end in some)
        places = torch.full((len(some), longest), -1)
        for at, (_, start, end) in enumerate(some):
            places[at, : end - start] = torch.arange(start, end)
        ids = torch.from_numpy(texts.ids)[places.clamp_min(0)]
        yield torch.where(places < 0, ids[:, :1], ids), places


@dataclass(frozen=True)
class Routing:
    """The experts of every token of some texts, layer by layer."""

    layers: tuple[int, ...]
    """0-based, of the layers that have experts."""
    count: int
    """E."""
    experts: Int[Array, "token layer k"]
    weights: Float[Array, "token layer k"]

    def tally(
        self,
        labels: Int[Array, " token"],
        count: int,
        values: Float[Array, " token"] | None = None,
        *,
        mass: bool = False,
    ) -> Float[Array, "label layer expert"]:
        """Return how often each expert is used at the tokens of each label.

        Args:
            labels: of each token; below 0 it counts nowhere.
            count: of labels.
            values: what a token counts; 1 by default.
            mass: count the experts' weights in place of their uses.
        """
        kept = np.flatnonzero(labels >= 0)
        n_layers, k = self.experts.shape[1:]
        shape = (count, n_layers, self.count)
        table = np.zeros(int(np.prod(shape)))
        step = max(1, 4_000_000 // (n_layers * k))
        for start in range(0, len(kept), step):
            part = kept[start : start + step]
            place = labels[part].astype(np.int64)[:, None, None] * n_layers
            place = (place + np.arange(n_layers)[None, :, None]) * self.count + self.experts[part]
            amount = self.weights[part] if mass else np.ones(self.experts[part].shape)
            if values is not None:
                amount = amount * values[part][:, None, None]
            table += np.bincount(place.ravel(), amount.ravel(), len(table))
        return table.reshape(shape)


@torch.no_grad()
def route(
    model: Model, routers: Mapping[int, Router], texts: Texts, advance: Advance = lambda n: None
) -> Routing:
    """Run the model over texts and return which experts each token uses.

    Args:
        model: the host; changes of experts that stand on it are seen.
        routers: of `routers.find_routers`.
        texts: the documents.
        advance: called with the number of documents of each pass.

    Raises:
        BadInputError: layers differ in the number of experts, or of those that a token uses.
    """
    plain: Any = model.model
    shapes = {(router.experts, router.k) for router in routers.values()}
    if len(shapes) != 1:
        raise BadInputError(f"layers have different mixtures ({sorted(shapes)}); one is expected")
    ((count, k),) = shapes
    layers = tuple(sorted(routers))
    experts = np.zeros((len(texts.ids), len(layers), k), dtype=np.int32)
    weights = np.zeros(experts.shape, dtype=np.float32)
    with recording({layer: routers[layer].module for layer in layers}) as outputs:
        for ids, places in padded_batches(texts):
            plain(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
            index = places.flatten()
            real = index >= 0
            for at, layer in enumerate(layers):
                output = outputs[layer]
                routed = read_output(output, routers[layer].name)
                chosen, own = output[routed.experts].cpu(), output[routed.weights].cpu()
                experts[index[real].numpy(), at] = chosen[real].numpy()
                weights[index[real].numpy(), at] = own[real].float().numpy()
            advance(len(ids))
    return Routing(layers, count, experts, weights)


@dataclass(frozen=True)
class Maps:
    """Use of the experts by phase and at the tags, documents as units."""

    use: dict[str, Float[Array, "layer expert"]]
    """Share of the tokens that use an expert, by phase, tag and "all"; with unit sum their number
    a document."""
    error: dict[str, Float[Array, "layer expert"]]
    """Standard error of the use, over documents."""
    mass: dict[str, Float[Array, "layer expert"]]
    """Mean weight a token, or with unit sum the sum a document."""
    documents: dict[str, int]
    """That have such tokens."""
    tokens: dict[str, int]


def document_maps(
    routing: Routing, texts: Texts, where: Bool[Array, " token"], *, unit: str = "mean",
    mass: bool = False,
) -> tuple[Float[Array, "document layer expert"], Int[Array, " document"]]:  # fmt: skip
    """Return the map of each document that has such tokens, and the documents' numbers.

    Args:
        routing: of the texts.
        texts: the documents.
        where: the tokens that count.
        unit: the mean over a document's tokens, or their sum.
        mass: weights in place of uses.
    """
    labels = np.where(where, texts.documents, -1)
    sizes = np.bincount(texts.documents[where], minlength=texts.count)
    numbers = np.flatnonzero(sizes)
    dense = np.full(texts.count, -1)
    dense[numbers] = np.arange(len(numbers))
    labels = np.where(labels >= 0, dense[labels], -1)
    table = routing.tally(labels, len(numbers), mass=mass)
    return (table / sizes[numbers][:, None, None] if unit == "mean" else table), numbers


def use_maps(routing: Routing, texts: Texts, *, unit: str = "mean") -> Maps:
    """Return the use of every expert at the tokens of each phase and at each tag.

    Args:
        routing: of the texts.
        texts: the documents.
        unit: what of a document's tokens makes its map.
    """
    places = {"all": np.ones(len(texts.ids), dtype=bool)}
    places |= {phase: texts.phases == at for at, phase in enumerate(PHASES)}
    places |= dict(texts.marks)
    maps = Maps({}, {}, {}, {}, {})
    for name, where in places.items():
        if not where.any():
            continue
        each, numbers = document_maps(routing, texts, where, unit=unit)
        maps.use[name] = each.mean(0)
        spread = each.std(0, ddof=1) if len(each) > 1 else np.zeros(each.shape[1:])
        maps.error[name] = spread / np.sqrt(len(each))
        mass, _ = document_maps(routing, texts, where, unit=unit, mass=True)
        maps.mass[name] = mass.mean(0)
        maps.documents[name], maps.tokens[name] = len(numbers), int(where.sum())
    return maps


def predicted_by_token(routing: Routing, texts: Texts) -> list[float]:
    """Return by layer the share of slots that the token alone predicts.

    For each token type the k experts that it uses most in one half of the documents; the share of
    the other half's slots that hold one of them.  A type that one half lacks predicts nothing.
    """
    half = texts.documents % 2
    _, types = np.unique(texts.ids, return_inverse=True)
    k = routing.experts.shape[2]
    shares = np.zeros(len(routing.layers))
    for side in (0, 1):
        table = routing.tally(np.where(half == side, types, -1), int(types.max()) + 1)
        best = np.argsort(-table, axis=2, kind="stable")[:, :, :k]
        known = np.take_along_axis(table, best, 2) > 0
        other = np.flatnonzero(half != side)
        guess = np.where(known, best, -1)[types[other]]
        hits = (routing.experts[other][:, :, :, None] == guess[:, :, None, :]).any(3)
        shares += hits.mean((0, 2)) / 2
    return shares.tolist()
