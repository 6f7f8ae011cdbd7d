"""Mixtures, and every selector's regret, in a table of layers that somebody published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resa_lens.errors import BadInputError
from resa_lens.layers import read_replicates, read_table
from resa_lens.layers.alignment import Alignment, align
from resa_lens.layers.mixture import MixtureFit, fit_mixture
from resa_lens.layers.regret import Regrets, Scores
from resa_lens.layers.selectors import Recommendation, regrets_of_selectors
from resa_lens.models.hookpoints import parse_layer


def mixtures_of_table(
    table: Path,
    column: str,
    *,
    baseline: float | None = None,
    noise: float | None = None,
    restarts: int = 200,
    against: str | None = None,
    against_baseline: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> tuple[MixtureFit, Alignment | None]:
    """Fit a mixture to a table's column, and compare its components with a second column's.

    Args:
        table: CSV with a row a layer.
        column: of the counts or scores.
        baseline: the untuned model's score; makes the values scores.
        noise: standard deviation of one score.
        restarts: seeds that recipe paper tries besides its own.
        against: the second column.
        against_baseline: the untuned model's score in it.
        seed: of everything that is drawn.
        settings: recipe, components and draws of `mixture.fit_mixture`, for both.

    Raises:
        BadInputError: a column that the table has not, or as `mixture.fit_mixture`.
    """
    fit = fit_mixture(
        read_table(table, column), baseline=baseline, noise=noise, restarts=restarts, seed=seed,
        **settings,
    )  # fmt: skip
    if against is None:
        return fit, None
    second = read_table(table, against)
    other = fit_mixture(second, baseline=against_baseline, seed=seed, **settings)
    return fit, align(fit, other, seed=seed)


def regrets_of_table(
    table: Path,
    column: str,
    *,
    layers: Sequence[str] = (),
    checkpoints: Path | None = None,
    n_layers: int | None = None,
    noise: float | None = None,
    counts_column: str | None = None,
    quality_column: str | None = None,
    effect_column: str | None = None,
    effect_se_column: str | None = None,
    **settings: Any,
) -> tuple[Regrets, dict[str, Recommendation], int]:
    """Return every selector's regret in a table, what each answered, and the model's layers.

    Args:
        table: CSV with a row a layer.
        column: of the scores.
        layers: further choices to compare with, as `parse_layer` reads them.
        checkpoints: CSV with several rows a layer, whose means are the scores instead.
        n_layers: of the model; by default the last in the table + 2.
        noise: standard deviation of one score.
        counts_column: what the selectors see, like the other columns.
        quality_column: see `regrets_of_selectors`.
        effect_column: see `regrets_of_selectors`.
        effect_se_column: standard errors of the effects.
        settings: recipe, seed and draws of `regrets_of_selectors`.

    Raises:
        BadInputError: fewer layers than the table has, or a column that it has not.
    """

    def values(name: str | None) -> dict[int, float] | None:
        return dict(read_table(table, name)) if name else None

    scores: Scores = (
        read_replicates(checkpoints, column) if checkpoints else read_table(table, column)
    )
    size = n_layers or max(scores) + 2
    if max(scores) >= size:
        raise BadInputError(
            f"--n-layers {size}: the table has layer {max(scores)} (0-based); give at least "
            f"{max(scores) + 1}"
        )
    effects: Any = values(effect_column)
    if effects and (errors := values(effect_se_column)):
        effects = {layer: (effect, errors[layer]) for layer, effect in effects.items()}
    costs, answers = regrets_of_selectors(
        scores, n_layers=size, counts=values(counts_column), quality=values(quality_column),
        causal=effects, chosen={f"layer {text}": parse_layer(text, size) for text in layers},
        se=None if noise is None else dict.fromkeys(scores, noise), **settings,
    )  # fmt: skip
    return costs, answers, size
