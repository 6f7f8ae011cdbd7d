"""Does an SAE fit the model, and has it the features that are asked for: said in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import Hookpoint, describe_layer
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseCoder


def check_features(
    model: Model,
    point: Hookpoint,
    features: Sequence[int],
    coders: Mapping[Hookpoint, SparseCoder],
) -> None:
    """Raise BadInputError where there is no SAE that fits the place, or no such feature."""
    where = f"{describe_layer(point.layer, model.n_layers)}, site {point.site}"
    if point not in coders:
        held = ", ".join(f"{p.layer} ({p.site})" for p in sorted(coders)) or "none"
        raise BadInputError(f"there is no SAE at {where}; there are SAEs at layers {held}")
    coder = coders[point]
    if coder.d_in != model.d_model:
        raise BadInputError(
            f"the SAE at {where} has width {coder.d_in}, the model's is {model.d_model}"
        )
    if outside := [f for f in features if not 0 <= f < coder.num_latents]:
        raise BadInputError(
            f"feature {outside[0]} is out of range: the SAE at {where} has features 0 to "
            f"{coder.num_latents - 1}"
        )
