"""How an SAE is trained: the configuration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from resa_lens.config import Config, setting
from resa_lens.errors import BadInputError
from resa_lens.files import named_path
from resa_lens.models.hookpoints import DEFAULT_SITE, SITES

PAPER_LATENTS = 65_536
WIDE = 1024
"""From this width on the paper's sizes are the defaults; below it, a budget for a CPU."""
Mode = Literal["scratch", "finetune", "pretrained"]
Activation = Literal["topk", "batchtopk", "mutual-choice", "feature-choice"]


@dataclass(frozen=True)
class SaeConfig(Config):
    """Training of one SAE a layer; None means the default of `for_width`."""

    site: str = setting(DEFAULT_SITE, "Place in the layer.", choices=SITES)
    latents: int | None = setting(
        None, "SAE latents; 65536 from width 1024 on, 16 x the width below.", min=1, max=2**24
    )
    """65,536: paper, Table 7."""
    k: int = setting(
        32, "Active SAE latents a token; on average unless topk.", "--k", min=1, max=2**16
    )
    optimizer: Literal["signum", "adam"] = setting("signum", "Signum (Table 7) or adam.")
    learning_rate: float | None = setting(
        None, "2.5e-4 from width 1024 on; by the latents below it.", over=0, max=1e38
    )
    """2.5e-4: Table 7.  Below, sparsify's automatic rule 5e-3 / sqrt(latents / 16384) (adam: 2e-4
    in place of 5e-3)."""
    tokens: int | None = setting(
        None, "SAE training tokens; 5.9 million from width 1024 on, 200000 below.", min=1
    )
    """5.9 M: the authors' code."""
    batch: int | None = setting(
        None, "Sequences a step; 16 from width 1024 on, 4 below.", min=1, max=2**16
    )
    dead_threshold: int = setting(
        1_000_000,
        "Tokens without firing after which a latent is dead; at most half the run.",
        min=1,
    )
    """Table 7; a longer window than the run could never be reached."""
    seed: int = setting(0, "Seed of everything that is drawn.", min=0, max=2**32 - 1)
    activation: Activation = setting("topk", "What keeps the k latents.")
    """Each token's k largest, the k x N largest of a batch of N tokens (batchtopk, and under its
    other name mutual-choice), or the largest tokens of each latent (feature-choice)."""
    allocation: Literal["even", "zipf"] = setting(
        "even", "Tokens of each latent of feature-choice: as many, or by Zipf's law.", later=True
    )
    auxk_alpha: float = setting(
        0.0, "Weight of the AuxK loss, which revives dead latents; 0 is off.", min=0
    )
    aux: Literal["auxk", "zipf"] = setting(
        "auxk", "What that loss revives: dead latents, or those used less than Zipf's law says.",
        later=True,
    )  # fmt: skip
    multi_topk: bool = setting(
        False, "Add the FVU of a second reconstruction, from the top 4k, at 1/8."
    )
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "Of the learning rate; linear and cosine end at zero."
    )
    warmup: int = setting(0, "Steps over which the learning rate rises.", min=0, max=10**9)
    include_special: bool = setting(
        False, "Train on BOS, EOS and padding too, and take them into the FVU."
    )
    """At a block's output their norms are outliers, on which signum diverges."""
    mode: Mode = setting(
        "scratch", "From scratch, finetune (from --saes) or pretrained (--saes as they are)."
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadInputError: an impossible value.
        """
        super().__post_init__()
        if self.latents is not None and self.k > self.latents:
            raise BadInputError(
                f"k {self.k} with {self.latents} latents: k must be 1 to the latents"
            )

    def check_pairs(self) -> None:
        """Refuse an option that does nothing without another.

        Raises:
            BadInputError: an allocation without feature-choice, or an auxiliary loss of weight 0.
        """
        if self.allocation != "even" and self.activation != "feature-choice":
            raise BadInputError(
                f"allocation {self.allocation!r} is of feature-choice, not of {self.activation}; "
                "add --activation feature-choice"
            )
        if self.aux != "auxk" and not self.auxk_alpha:
            raise BadInputError(
                f"aux {self.aux!r} has the weight 0; give one, for example --auxk-alpha 0.03125"
            )

    def for_width(self, d_model: int) -> SaeConfig:
        """Return the configuration with every default filled in for a model of this width.

        Raises:
            BadInputError: more active latents than there are.
        """
        wide = d_model >= WIDE
        latents = self.latents or (PAPER_LATENTS if wide else 16 * d_model)
        scale = 5e-3 if self.optimizer == "signum" else 2e-4
        return replace(
            self,
            latents=latents,
            learning_rate=self.learning_rate
            or (2.5e-4 if wide else scale / math.sqrt(latents / 2**14)),
            tokens=self.tokens or (5_900_000 if wide else 200_000),
            batch=self.batch or (16 if wide else 4),
        )


def check_saes(name: str) -> None:
    """Raise BadInputError where SAEs of this name can neither be here nor on the hub."""
    path, parts = named_path(name, "SAEs"), name.split("/")
    if path.is_file() or not (path.exists() or (len(parts) == 2 and all(parts) and
                                               parts[0].strip("."))):  # fmt: skip
        raise BadInputError(
            f"SAEs {name!r} are no folder that is here; give one that holds layers.N.mlp/ folders, "
            "or a hub id (owner/name)"
        )
