"""What SAE-Tuning minimises, and how its adapters are trained: the configurations alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from resa_lens.config import Config, check_value, execution, setting
from resa_lens.errors import BadInputError
from resa_lens.files import named_path
from resa_lens.models.hookpoints import (
    DEFAULT_SITE,
    SITES,
    Hookpoint,
    check_adapted_layers,
    inside,
    module_layer,
)

Schedule = Literal["cosine", "constant"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
Control = Literal[
    "none", "identity", "noise", "pca", "shuffled", "random", "random-weights", "cot-free", "cot",
    "own-samples",
]  # fmt: skip


@dataclass(frozen=True)
class TuneConfig(Config):
    """LoRA and optimizer; the defaults are the paper's Table 7."""

    rank: int = setting(32, "LoRA rank.", min=1, max=2**16)
    alpha: int = setting(128, "LoRA alpha.", min=1, max=10**6)
    dropout: float = setting(0.05, "LoRA dropout.", min=0, max=0.99)
    learning_rate: float = setting(
        1e-6,
        "Learning rate of the tuning (AdamW); 1e-6 is for models of a billion weights.",
        min=0,
        max=1e38,
    )
    batch: int = setting(1, "Sequences a batch.", min=1, max=2**16)
    min_rate_share: float = setting(
        0.1, "Where the cosine ends, as a share of the learning rate.", min=0, max=1
    )
    """The paper gives no figure."""
    seed: int = setting(0, "Seed of everything that is drawn.", min=0, max=2**32 - 1)
    accumulation: int = setting(1, "Batches an update, over all processes.", min=1, max=2**20)
    gradient_checkpointing: bool = execution(
        False, "Compute activations again on the way back: less memory, more time."
    )
    compile: Literal["auto", "on", "off"] = execution(
        "auto",
        "Compile the KL's passes over the vocabulary (torch.compile), the same but for the last "
        "digits; auto: on a GPU. Never with --deterministic.",
    )
    checkpoint_every: int | None = setting(
        None, "Keep the adapter after every so many updates, as step-<update>.", min=1
    )
    weight_decay: float = setting(0.01, "AdamW's.", min=0)
    """torch's own default, since Table 7 names none."""
    adapter_layers: str = setting(
        "all",
        "Layers that get adapters, 0-based: all, middle (20 to 80 % of the depth) or 3-8,10.",
        layers=check_adapted_layers,
        later=True,
    )


@dataclass(frozen=True)
class Objective(Config):
    """What is compared with what, and where gradients flow."""

    preset: str = "paper"
    site: str = setting(DEFAULT_SITE, "Place in the layer.", choices=SITES)
    reference: Literal["adapted", "base"] = setting(
        "adapted", "The distribution without the SAE: of the adapted model, or with adapters off."
    )
    reference_gradient: bool = setting(
        True, "Let gradients flow through the reference (argmin over both sides).",
        "--reference-gradient/--detach-reference",
    )  # fmt: skip
    direction: Literal["sae||reference", "reference||sae"] = setting(
        "sae||reference", "KL(first || second)."
    )
    sae_gradient: bool = setting(
        True, "Let gradients flow through the SAE to the adapters below the hook."
    )
    reduction: Literal["mean", "sum"] = setting(
        "mean", "Over tokens: the mean, or the sum divided by the sequences of the batch."
    )
    targets: tuple[str, ...] = setting(ATTENTION, "Modules that get LoRA adapters, by commas.")
    """Names of Llama-shaped models."""
    schedule: Schedule = setting(
        "cosine", "Of the learning rate: cosine to a tenth of it, or constant."
    )
    # A negative norm would turn every gradient around.
    clip_norm: float | None = setting(None, "Clip the gradient norm to this.", over=0)
    teacher: Literal["adapted", "base"] = setting(
        "adapted",
        "The distribution with the SAE: of the adapted model, or with adapters off.",
        later=True,
    )
    """`base` is a frozen teacher, which the adapters approach (preset distil)."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadInputError: a value that is none of the choices, or two distributions that no
                gradient could change.
        """
        super().__post_init__()
        if self.teacher == "base" and (self.reference == "base" or not self.reference_gradient):
            raise BadInputError(
                "with --teacher base the distribution without the SAE must be the adapted model's "
                "and have a gradient, or nothing trains; use --reference adapted "
                "--reference-gradient"
            )

    @property
    def reference_learns(self) -> bool:
        """Whether the distribution without the SAE has a gradient in the adapters."""
        return self.reference == "adapted" and self.reference_gradient

    def check_reach(self, layer: int, adapted: Iterable[str]) -> None:
        """Check that a gradient can reach an adapter.

        Args:
            layer: where the SAE is inserted, 0-based.
            adapted: whole names of the modules that get adapters.

        Raises:
            BadInputError: none of them is behind the SAE or beside it, and nothing else has a
                gradient.
        """
        point = Hookpoint(layer, self.site)
        if not any(self.learns(module, point) for module in adapted):
            raise BadInputError(
                f"layer {layer} (0-based), {self.site}, with preset {self.preset}: no gradient "
                "passes the SAE, and no adapter is behind or beside it; use an earlier layer, "
                "later --adapter-layers, other --targets, or --sae-gradient"
            )

    def learns(self, module: str, point: Hookpoint) -> bool:
        """Return whether an adapter has a gradient, as far as its module's name tells.

        Without a gradient through the SAE, or through the distribution without it, adapters learn
        behind the SAE, and before it by what leads around it: the residual stream, which passes
        attention and MLP but not the block.

        Args:
            module: the adapted module's whole name.
            point: where the SAE is inserted.
        """
        if self.sae_gradient or self.reference_learns:
            return True
        other = module_layer(module)
        if other is None or other == point.layer:
            return not inside(module, point)
        return other > point.layer or point.site != "resid_post"


PRESETS: dict[str, Objective] = {
    "paper": Objective(),
    "reference": Objective(
        preset="reference",
        site="resid_post",
        reference="base",
        reference_gradient=False,
        direction="reference||sae",
        sae_gradient=False,
        reduction="sum",
        targets=(*ATTENTION, *MLP),
        schedule="constant",
        clip_norm=1.0,
    ),
    "distil": Objective(preset="distil", teacher="base", sae_gradient=False),
}
"""`paper` is the paper's text, `reference` its authors' code (spec, section 7).  `distil` is what
"elicit" says when it is written down: KL(frozen model with the SAE || adapted model without it).

Where inserting the SAE changes the model by some effect, `paper` and `distil` can hand that effect
on to the adapters.  `reference` asks that the adapted model WITH the SAE equal the base; taken away
again, the SAE leaves the base MINUS its effect, so what helps when it is inserted must hurt."""


def preset(name: str, **changes: Any) -> Objective:
    """Return a named preset with single options changed; None leaves the preset's value.

    Raises:
        BadInputError: unknown preset or value.
    """
    if name not in PRESETS:
        raise BadInputError(f"preset {name!r} is unknown; use {', '.join(PRESETS)}")
    return replace(PRESETS[name], **{k: v for k, v in changes.items() if v is not None})


def check_adapter(name: str) -> None:
    """Raise BadInputError where a folder is no PEFT adapter."""
    if not (named_path(name, "adapter") / "adapter_config.json").exists():
        raise BadInputError(f"{name!a:.80} is not a PEFT adapter: it has no adapter_config.json")


def check_scales(adapters: Sequence[str] | None, scales: Sequence[float] | None) -> None:
    """Raise BadInputError where scales have no adapters, or are neither one nor one each."""
    if scales and not adapters:
        raise BadInputError(f"--scale {scales[0]:g} without an adapter: give --adapter FOLDER")
    if scales and adapters and len(scales) not in (1, len(adapters)):
        raise BadInputError(
            f"{len(scales)} scales for {len(adapters)} adapters; give --scale once, or once each"
        )


def check_controls(name: str) -> None:
    """Raise BadInputError where controls are neither all nor names of `tune --control`."""
    if name != "all":
        check_value("--controls", name, Control, {})
