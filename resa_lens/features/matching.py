"""Is a feature of one SAE there in another: of another seed, or of another model?"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.saes.stability import best_pairs


def best_matches(
    a: Float[Tensor, "m d"], b: Float[Tensor, "n d"]
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """Return each row's nearest row of b by cosine, and that cosine; memory is bounded by blocks.

    A row of zeros has the cosine 0 with every row, and its index says nothing.

    Raises:
        BadInputError: another width, or b has no row.
    """
    if a.shape[1] != b.shape[1]:
        raise BadInputError(
            f"directions of widths {a.shape[1]} and {b.shape[1]} have no cosine; SAEs of different "
            "width can be matched by the correlation of their activations alone"
        )
    if b.shape[0] == 0:
        raise BadInputError("the second SAE has no direction; nothing can match")
    return best_pairs(a, b)[0]
