"""Does an SAE fit the place it is put?  The check made whenever one is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.hookpoints import Hookpoint
from resa_lens.models import Model
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.train import measure_fvu

FVU_LIMIT = 1.0
"""An SAE that explains less than the mean does is at the wrong place."""


def check_fit(
    model: Model,
    coders: dict[Hookpoint, SparseCoder],
    probe: Sequence[Int[Tensor, "batch position"]],
    *,
    allow_mismatch: bool = False,
) -> tuple[dict[Hookpoint, float], list[str]]:
    """Measure each SAE's FVU on a probe text and refuse one that does not fit.

    Returns:
        FVU a hookpoint, and a warning for each misfit that was allowed.

    Raises:
        BadInputError: an FVU above 1, unless `allow_mismatch`.
    """
    measured = {point: fvu for point, (fvu, _) in measure_fvu(model, coders, probe).items()}
    warnings = []
    for point, fvu in measured.items():
        if fvu <= FVU_LIMIT:
            continue
        text = (
            f"the SAE for {point.describe(model.n_layers)}, site {point.site}, leaves an FVU of "
            f"{fvu:.2f} on a probe text: it was trained on another model, layer or site"
        )
        if not allow_mismatch:
            raise BadInputError(f"{text}.\nPass the right --site, or --allow-site-mismatch.")
        warnings.append(f"{text} (allowed by --allow-site-mismatch)")
    return measured, warnings
