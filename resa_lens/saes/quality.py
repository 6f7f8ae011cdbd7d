"""Does an SAE fit the place it is put?  The check made whenever one is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.hookpoints import SITES, Hookpoint
from resa_lens.models import Model
from resa_lens.saes.coder import SparseCoder, reconstruct
from resa_lens.saes.train import measure_fvu

FVU_LIMIT = 1.0
"""An SAE that explains less than the mean does is at the wrong place."""


def check_fit(
    model: Model,
    coders: dict[Hookpoint, SparseCoder],
    probe: Sequence[Int[Tensor, "batch position"]],
    *,
    allow_mismatch: bool = False,
    known: bool = False,
) -> tuple[dict[Hookpoint, float], list[str]]:
    """Measure each SAE's FVU on a probe text and refuse one that does not fit.

    It does not fit where it leaves more variance than there is, or less at another site of the
    same layer: on templated text the wrong site's FVU can stay below 1.

    Args:
        model: where the SAEs are put.
        coders: by the place where they are put.
        probe: sequences of token ids.
        allow_mismatch: warn where one does not fit.
        known: the manifest says that they were trained at these places of this model; a bad FVU
            then means that they have learnt too little, which is said and not refused.

    Returns:
        FVU a hookpoint, and a warning for each one that is bad and was not refused.

    Raises:
        BadInputError: an SAE that does not fit, unless `allow_mismatch`.
    """
    rivals = {
        point: [Hookpoint(point.layer, site) for site in SITES if site != point.site]
        for point in coders
    }
    places = {other: coder for point, coder in coders.items() for other in rivals[point]}
    found = {p: fvu for p, (fvu, _) in measure_fvu(model, {**places, **coders}, probe).items()}
    warnings = []
    for point in coders:
        fvu = found[point]
        # An asked-for rival was measured with its own SAE.
        better = [o for o in rivals[point] if o not in coders and found[o] < min(fvu, FVU_LIMIT)]
        if fvu <= FVU_LIMIT and (known or not better):
            continue
        if known:
            warnings.append(
                f"the SAE for {point.describe(model.n_layers)}, site {point.site}, explains less "
                f"than the mean (FVU {fvu:.2f} on a probe text): train it on more (--tokens)"
            )
            continue
        best = min(better, key=lambda other: found[other], default=None)
        where = "another model, layer or site" if best is None else f"site {best.site}"
        at_best = "" if best is None else f" and {found[best]:.2f} at {best.site}"
        text = (
            f"the SAE for {point.describe(model.n_layers)}, site {point.site}, leaves an FVU of "
            f"{fvu:.2f} on a probe text{at_best}: it was trained on {where}"
        )
        if not allow_mismatch:
            raise BadInputError(f"{text}.\nPass the right --site, or --allow-site-mismatch.")
        warnings.append(f"{text} (allowed by --allow-site-mismatch)")
    return {point: found[point] for point in coders}, warnings


@torch.no_grad()
def loss_change(
    model: Model,
    coders: dict[Hookpoint, SparseCoder],
    batches: Sequence[Int[Tensor, "batch position"]],
) -> dict[Hookpoint, float]:
    """Return, for each SAE, the change of the next-token loss when its reconstruction is inserted.

    In nats a token, over all the batches; the lowest is the SAE that the model notices least.
    """
    plain = sum(_loss(model.bridge(ids.to(model.device)), ids) for ids in batches)
    changes = {}
    for point, coder in coders.items():
        hook = (point.transformer_lens, partial(_insert, coder))
        with model.bridge.hooks(fwd_hooks=[hook]):
            inserted = sum(_loss(model.bridge(ids.to(model.device)), ids) for ids in batches)
        changes[point] = (inserted - plain) / max(1, len(batches))
    return changes


def _insert(
    coder: SparseCoder, acts: Float[Tensor, "batch position d_model"], hook: object = None
) -> Float[Tensor, "batch position d_model"]:
    return reconstruct(coder, acts)


def _loss(
    logits: Float[Tensor, "batch position vocab"], ids: Int[Tensor, "batch position"]
) -> float:
    targets = ids[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets).item()
