"""Functions of the front door that need no workspace: tables and SAEs in, results out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resa_lens.errors import BadInputError
from resa_lens.session.discovery import Audit, Mixture

if TYPE_CHECKING:
    import pandas as pd

    from resa_lens.layers.selectors import Recommendation as LayerChoice
    from resa_lens.saes.coder import SparseCoder


def fit_mixture(
    table: Mapping[int, float] | pd.Series | str | Path, column: str | None = None, **options: Any
) -> Mixture:
    """Fit Gaussians over layers and judge them against their nulls.

    >>> import resa_lens as rl
    >>> flat = rl.fit_mixture({layer: 6 for layer in range(1, 27)}, draws=50)
    >>> flat.verdict
    'not distinguishable from flat'

    Args:
        table: {0-based layer: count or score}, a pandas Series indexed by layer, or the path of a
            CSV with a column `layer` (0-based) or `layer_1_indexed`.
        column: the CSV's column of values; not needed for the other forms.
        options: recipe ("robust" or "paper"), kind, baseline, noise, components, draws, restarts
            and seed of `resa_lens.layers.mixture.fit_mixture`.

    Raises:
        BadInputError: no layers or more than 512, a value that is no finite number, or an unknown
            column or recipe.
    """
    from resa_lens.layers import read_table
    from resa_lens.layers.mixture import fit_mixture as fit

    if isinstance(table, str | Path):
        if column is None:
            raise BadInputError(f"{table}: name the column of values, fit_mixture(table, column)")
        values: dict[Any, Any] = {**read_table(table, column)}
    else:
        values = dict(table.items())
        if len(values) < len(table):
            raise BadInputError("a layer stands in the table twice: give one value per layer")
    return Mixture(fit(values, **options))


def recommend(
    table: Mapping[int, float] | pd.Series, *, n_layers: int | None = None, **options: Any
) -> LayerChoice:
    """Recommend layers from a table of feature counts; where they support none, the middle one.

    >>> import resa_lens as rl
    >>> choice = rl.recommend({layer: 6 for layer in range(1, 27)}, draws=50)
    >>> choice.recommended, choice.selector
    ((12,), 'middle')

    Args:
        table: {0-based layer: features}, or a pandas Series indexed by layer.
        n_layers: layers of the model; by default the last in the table and one more, which is left
            out as the first is.
        options: selector, recipe, quality, causal, insertion, draws and seed of
            `resa_lens.layers.selectors.recommend`.

    Raises:
        BadInputError: an unknown selector, or a layer that the model does not have.
    """
    from resa_lens.layers.selectors import recommend as choose

    counts: dict[Any, Any] = dict(table.items())
    return choose(counts, n_layers=n_layers or max(counts) + 2, **options)


def audit(
    table: pd.DataFrame | str | Path,
    *,
    group: str | None = None,
    questions: Mapping[str, int] | None = None,
    **options: Any,
) -> Audit:
    """Question a published table of checkpoints: layers, best-of bias, errors, exchanged columns.

    >>> import resa_lens as rl
    >>> from resa_lens.resources import data_path
    >>> paper = rl.audit(data_path("paper/tables36_61_layer_checkpoints.csv"), draws=20)
    >>> round(float(paper.table().loc["average", "f_statistic"]), 3)
    1.148

    Args:
        table: a .csv, .jsonl or .parquet file, or a pandas DataFrame, with a row a checkpoint and
            scores in percent.  A file keeps the digits as they were printed; give a DataFrame's
            scores as text where trailing zeros count.
        group: the column of the groups; layer, layer_1_indexed or model where not given.
        questions: the number of questions of benchmarks that are not known by name.
        options: discordance, baseline, draws and seed of `resa_lens.layers.audit.audit`.

    Raises:
        BadInputError: no group or benchmark column, or a score that is no percentage.
    """
    from resa_lens.layers import audit as audits
    from resa_lens.layers.checkpoints import checkpoint_table, read_checkpoints

    if isinstance(table, str | Path):
        read = read_checkpoints(table, group=group, questions=questions)
    else:
        rows = table.to_dict("records")
        read = checkpoint_table(rows, Path("the table"), group=group, questions=questions)
    return Audit(audits.audit(read, **options))


def possible_counts(percentage: str, questions: int) -> list[int]:
    """Return the numbers of right answers that print as a percentage, of so many questions.

    >>> import resa_lens as rl
    >>> rl.possible_counts("36.03", 272), rl.possible_counts("36.03", 198)
    ([98], [])

    Args:
        percentage: as it is printed; its digits count.
        questions: of the benchmark.

    Raises:
        BadInputError: it is no number.
    """
    from decimal import Decimal, InvalidOperation

    from resa_lens.layers.granularity import printed_counts

    try:
        value = Decimal(percentage)
    except InvalidOperation as error:
        raise BadInputError(f"percentage {percentage!r} is no number; give digits") from error
    return list(printed_counts(value, questions, len(percentage.partition(".")[2])))


def planted_checkpoints(
    layer_sd: float,
    exchanged: tuple[str, str] | None = None,
    *,
    layers: int = 12,
    checkpoints: int = 4,
    questions: Mapping[str, int] | None = None,
    seed: int = 1,
) -> pd.DataFrame:
    """Return a made-up table of checkpoints in which the truth is known, to try `audit` on.

    Args:
        layer_sd: standard deviation of the layers' true accuracies, in points; 0 for none.
        exchanged: two benchmarks whose columns are exchanged at every second layer.
        layers: how many layers.
        checkpoints: rows a layer.
        questions: {benchmark: questions}; four known benchmarks by default.
        seed: of the answers, which are drawn.

    Returns:
        A frame with columns `layer`, `checkpoint` and one a benchmark, in percent as they print.
    """
    import numpy as np
    import pandas as pd

    sizes = questions or {"amc23": 40, "math500": 500, "gpqa_diamond": 198, "minerva": 272}
    rng = np.random.default_rng(seed)
    rows = []
    for layer in range(layers):
        share = float(np.clip(0.5 + layer_sd * rng.standard_normal() / 100, 0, 1))
        for checkpoint in range(checkpoints):
            right = {name: rng.binomial(n, share) for name, n in sizes.items()}
            row = {name: f"{100 * right[name] / n:.2f}" for name, n in sizes.items()}
            if exchanged and layer % 2:
                one, other = exchanged
                row[one], row[other] = row[other], row[one]
            rows.append({"layer": layer, "checkpoint": checkpoint, **row})
    return pd.DataFrame(rows)


def load_sae(
    place: str | Path, layer: int | None = None, *, site: str = "mlp_out", **options: Any
) -> SparseCoder:
    """Load one SAE of sparsify, SAELens or dictionary_learning, frozen.

    Args:
        place: the folder of one SAE, a folder of several, or a hub id (owner/name) of sparsify's
            layout, of which only the SAE asked for is fetched.
        layer: which of several, 0-based.
        site: which of several, "mlp_out" or "resid_post".
        options: device, allow_pickle, cast and k of `resa_lens.saes.formats.load_coder`.

    Returns:
        A coder with `encoder.weight` [d_sae, d_in], `encoder.bias` [d_sae], `W_dec` [d_sae, d_in]
        and `b_dec` [d_in].

    Raises:
        BadInputError: no SAE of a known format there, several and no layer, or none at the layer.
    """
    from resa_lens.models.hookpoints import Hookpoint
    from resa_lens.saes.formats import by_hookpoint, find_coders, load_coder
    from resa_lens.saes.hub import find_sae_folder

    hookpoints = None if layer is None else [Hookpoint(layer, site)]
    folders = find_coders(find_sae_folder(str(place), hookpoints))
    if hookpoints is None and len(folders) == 1:
        return load_coder(next(iter(folders)), **options)
    named = by_hookpoint(folders)
    if hookpoints is None or hookpoints[0] not in named:
        listed = ", ".join(point.sparsify for point in sorted(named)) or "none that says its layer"
        problem = "several SAEs" if hookpoints is None else f"no SAE {hookpoints[0].sparsify}"
        raise BadInputError(f"{place} holds {problem}; name one with layer and site: {listed}")
    return load_coder(named[hookpoints[0]], **options)
