"""How much a site's activations differ between two models on shared text, layer by layer.

    change = sum_t |x_target - x_source|^2 / sum_t |x_source - mean|^2

over the ordinary tokens (no BOS, EOS, padding), as FVU is of a reconstruction: 0 where the models
agree, 1 where the target is as far off as the source's mean.  Our own baseline for the choice of a
layer; plain comparisons of two models match model diffing elsewhere (arXiv 2602.10371).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.models.activations import ordinary, special_ids, stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model


def activation_change(
    source: Model,
    target: Model,
    batches: Iterable[Int[Tensor, "batch position"]],
    points: Sequence[Hookpoint],
) -> dict[int, tuple[float, float]]:
    """Return {0-based layer: (relative change, its standard error over sequences)}.

    Args:
        source: whose activations are the measure.
        target: of the same shape and vocabulary.
        batches: token ids, without padding, read by both models.
        points: one a layer.

    Raises:
        BadInputError: models of different shapes, fewer than two sequences, or activations that do
            not vary.
    """
    for name, first, second in (
        ("layers", source.n_layers, target.n_layers), ("width", source.d_model, target.d_model),
        ("vocabulary", source.model.config.vocab_size, target.model.config.vocab_size),
    ):  # fmt: skip
        if first != second:
            raise BadInputError(
                f"{source.name} has {name} {first}, {target.name} {second}: a change of "
                "activations is between models of one shape"
            )
    special = special_ids(source)
    sums = {point: _Sums() for point in points}
    both = list(batches)
    read = zip(
        stream_activations(source, both, points), stream_activations(target, both, points),
        strict=True,
    )  # fmt: skip
    for plain, changed in read:
        for row, ids in enumerate(plain.ids):
            kept = ordinary(ids[None], special)
            for point, tally in sums.items():
                # Where hooks leave the tensors: on the models' devices.
                tally.add(
                    plain.acts[point][row][kept].double().cpu(),
                    changed.acts[point][row][kept].double().cpu(),
                )
    return {point.layer: tally.ratio(point) for point, tally in sums.items()}


class _Sums:
    """Sums by sequence: tokens, activations, their squares and the squared change."""

    def __init__(self) -> None:
        self.n: list[int] = []
        self.x: list[Tensor] = []
        self.xx: list[float] = []
        self.error: list[float] = []

    def add(self, source: Tensor, target: Tensor) -> None:
        """Add a sequence, both [token, d_model]."""
        self.n.append(source.shape[0])
        self.x.append(source.sum(0))
        self.xx.append(float(source.pow(2).sum()))
        self.error.append(float((target - source).pow(2).sum()))

    def ratio(self, point: Hookpoint) -> tuple[float, float]:
        """Return the ratio of sums and its standard error (linearised, over sequences)."""
        count = len(self.n)
        if count < 2:
            raise BadInputError(
                f"{count} sequence to compare activations on: a standard error needs two or more; "
                "give more text"
            )
        n, xx, error = (torch.tensor(v, dtype=torch.double) for v in (self.n, self.xx, self.error))
        x = torch.stack(self.x)
        mean = x.sum(0) / n.sum()
        variance = xx - 2 * x @ mean + n * mean.pow(2).sum()
        total = float(variance.sum())
        if total <= 1e-12 * float(xx.sum()):
            raise BadInputError(f"the source's activations at layer {point.layer} do not vary")
        value = float(error.sum()) / total
        residual = (error - value * variance).pow(2).sum() * count / (count - 1)
        return value, float(residual.sqrt()) / total
