"""How features respond to trials: their largest activation at each place of each text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from resa_lens.features.checks import check_features
from resa_lens.features.stimuli import Trial
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseActs, SparseCoder, encode

PLACES = ("open", "close")
"""Where a feature may have been counted; the order of `Trial.places`."""
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Responses:
    """Largest activation of each listed feature at each place of each trial."""

    trials: Sequence[Trial]
    values: Mapping[Hookpoint, Float[Tensor, "trial place feature"]]
    """0 where a feature is not active; the last axis is that of `features`."""
    features: Mapping[Hookpoint, tuple[int, ...]]


def respond(
    model: Model,
    coders: Mapping[Hookpoint, SparseCoder],
    features: Mapping[Hookpoint, Sequence[int]],
    trials: Sequence[Trial],
    advance: Callable[[int], None] | None = None,
) -> Responses:
    """Run the trials through the model and read the listed features at their places.

    Args:
        model: the host.
        coders: an SAE for each place in the model.
        features: the indices that are looked at, by place in the model.
        trials: what `stimuli.trials` makes.
        advance: called with the number of finished trials, if given.

    Raises:
        BadInputError: an SAE of another width, or an index beyond its latents.
    """
    columns = {point: tuple(features.get(point, ())) for point in sorted(coders)}
    for point, listed in columns.items():
        check_features(model, point, listed, coders)
    values = {p: torch.zeros(len(trials), len(PLACES), len(f)) for p, f in columns.items()}
    points = [point for point, listed in columns.items() if listed]
    if not points:
        return Responses(tuple(trials), values, columns)
    batches = list(_batches(trials))
    ids = (torch.tensor([trials[rows[0]].ids for rows in batch]) for batch in batches)
    for batch, acts in zip(batches, stream_activations(model, ids, points), strict=True):
        places = [
            (number, place, text, list(trials[number].places[place]))
            for text, rows in enumerate(batch)
            for number in rows
            for place in range(len(PLACES))
        ]
        sizes = torch.tensor([len(positions) for *_, positions in places])
        owner = torch.repeat_interleave(torch.arange(len(places)), sizes)
        text = torch.tensor([text for _, _, text, at in places for _ in at], dtype=torch.long)
        position = torch.tensor([p for *_, at in places for p in at], dtype=torch.long)
        number = torch.tensor([number for number, *_ in places])
        index = torch.tensor([place for _, place, *_ in places])
        for point in points:
            tensor = acts.acts[point]
            x = tensor[text.to(tensor.device), position.to(tensor.device)].float()
            active = encode(coders[point], x)
            values[point][number, index] = _largest(active, columns[point], owner, len(places))
        if advance is not None:
            advance(sum(map(len, batch)))
    return Responses(tuple(trials), values, columns)


def _batches(trials: Sequence[Trial]) -> Iterator[list[list[int]]]:
    """Yield batches of texts of one length, each text as the trials that read it."""
    readers: dict[tuple[int, ...], list[int]] = {}
    for number, trial in enumerate(trials):
        readers.setdefault(trial.ids, []).append(number)
    by_length: dict[int, list[list[int]]] = {}
    for ids, rows in readers.items():
        by_length.setdefault(len(ids), []).append(rows)
    for length, texts in sorted(by_length.items()):
        step = max(1, BATCH_TOKENS // length)
        for start in range(0, len(texts), step):
            yield texts[start : start + step]


def _largest(
    acts: SparseActs, features: Sequence[int], owner: Tensor, places: int
) -> Float[Tensor, "place feature"]:
    """Return each feature's largest value over the rows of each place; `owner` is a row's place."""
    order = torch.tensor(sorted(features))
    rows, latents, values = acts.rows.cpu(), acts.latents.cpu(), acts.values.float().cpu()
    index = torch.searchsorted(order, latents).clamp(max=len(order) - 1)
    hit = order[index] == latents
    cells = owner[rows[hit]] * len(order) + index[hit]
    top = torch.zeros(places * len(order)).scatter_reduce_(0, cells, values[hit], "amax")
    return top.view(places, -1)[:, torch.searchsorted(order, torch.tensor(list(features)))]
