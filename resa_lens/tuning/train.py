"""Stage II: LoRA adapters tuned through the frozen SAE (paper, section 2.1 and Table 7).

The SAE is removed afterwards; what remains is a plain PEFT adapter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.hookpoints import Hookpoint
from resa_lens.models import Model, boot, check_safetensors
from resa_lens.saes.baselines import Replacement
from resa_lens.saes.coder import SparseCoder
from resa_lens.tuning.objective import ATTENTION, MLP, Objective, tuning_loss


@dataclass(frozen=True)
class TuneConfig:
    """LoRA and optimizer; the defaults are the paper's Table 7."""

    rank: int = 32
    alpha: int = 128
    dropout: float = 0.05
    learning_rate: float = 1e-6
    batch: int = 1
    """Sequences a step."""
    min_rate_share: float = 0.1
    """Where the cosine ends, as a share of the learning rate (the paper gives no figure)."""
    seed: int = 0


@dataclass(frozen=True)
class TuneResult:
    """The course of one tuning."""

    steps: int
    tokens: int
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    trainable: int
    """Trainable parameters."""
    seconds: float


def lora_targets(model: torch.nn.Module, wanted: tuple[str, ...]) -> list[str]:
    """Return the module names that get adapters: the wanted ones, or a NeoX model's own.

    Raises:
        BadInputError: the model has none of them, or a name that is of no model's.
    """
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if unknown := [n for n in wanted if n not in present and n not in (*ATTENTION, *MLP)]:
        raise BadInputError(
            f"the model has no module named {unknown[0]!r} to adapt; "
            f"choose from {', '.join(n for n in (*ATTENTION, *MLP) if n in present) or 'its own'}"
        )
    if found := [name for name in wanted if name in present]:
        return found
    fused = {
        "q_proj": ("query_key_value", "c_attn"),
        "o_proj": ("dense", "c_proj"),
        "up_proj": ("dense_h_to_4h", "c_fc"),
        "down_proj": ("dense_4h_to_h",),
    }
    found = [n for key in wanted for n in fused.get(key, ()) if n in present]
    if not found:
        raise BadInputError(f"the model has no module named {', '.join(wanted)} to adapt")
    return found


def add_adapters(model: Model, objective: Objective, config: TuneConfig) -> tuple[Any, Any]:
    """Put fresh LoRA layers onto a plain model, then boot the bridge over it.

    Returns:
        The PeftModel and the bridge over its inner model.
    """
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        peft = get_peft_model(
            model.model,
            LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=lora_targets(model.model, objective.targets),
                task_type="CAUSAL_LM",
            ),
        )
    # After PEFT, so that its layers are inside what the bridge wraps.
    inner: Any = peft.base_model.model
    bridge, _ = boot(inner, model.tokenizer, model.name)
    return peft, bridge


def tune(
    model: Model,
    coder: SparseCoder | Replacement,
    point: Hookpoint,
    batches: Iterable[Int[Tensor, "batch position"]],
    steps: int,
    objective: Objective,
    config: TuneConfig,
    *,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[Any, TuneResult]:
    """Tune adapters on a freshly loaded, plain model.

    Returns:
        The PeftModel (the SAE is not part of it) and the course.

    Raises:
        BadInputError: the SAE does not fit the model, or no batch was given.
        RunFailedError: a loss or gradient norm that is not finite.
    """
    if isinstance(coder, SparseCoder) and coder.d_in != model.d_model:
        raise BadInputError(
            f"the SAE has width {coder.d_in}, {model.name} has {model.d_model}; source and target "
            "must have the same architecture and width"
        )
    if point.site != objective.site:
        raise BadInputError(
            f"the SAE's site is {point.site}, preset {objective.preset} uses {objective.site}"
        )
    began = time.monotonic()
    peft, bridge = add_adapters(model, objective, config)
    weights = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, betas=(0.9, 0.999))
    peft.train()
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(config.seed)
    losses: list[float] = []
    norms: list[float] = []
    tokens = 0
    try:
        for step, ids in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, steps, objective, config)
            loss = tuning_loss(bridge, peft, ids.to(model.device), point, coder, objective)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(weights, objective.clip_norm or math.inf)
            for what, value in (("loss", loss), ("gradient norm", norm)):
                if not torch.isfinite(value):
                    raise RunFailedError(
                        f"tuning at layer {point.layer}: the {what} is {value.item()} at step "
                        f"{step}; lower the learning rate (now {config.learning_rate:.3g})"
                    )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            norms.append(norm.item())
            tokens += ids.numel()
            advance(1)
    finally:
        torch.random.set_rng_state(generator_state)
    if not losses:
        raise BadInputError("the elicitation data gave no batch")
    # The last step's update was seen by no loss.
    if not all(bool(torch.isfinite(p).all()) for p in weights):
        raise RunFailedError(
            f"tuning at layer {point.layer}: the adapters are not finite after the last step; "
            f"lower the learning rate (now {config.learning_rate:.3g})"
        )
    peft.eval()
    trainable = sum(p.numel() for p in weights)
    result = TuneResult(
        len(losses), tokens, tuple(losses), tuple(norms), trainable, time.monotonic() - began
    )
    return peft, result


def _schedule(step: int, steps: int, objective: Objective, config: TuneConfig) -> float:
    if objective.schedule == "constant":
        return 1.0
    low = config.min_rate_share
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


def save_adapter(peft: Any, folder: Path, base: Path) -> None:
    """Save a plain PEFT adapter: keys without the infix that the bridge's wrapping adds.

    With the infix, PEFT loads nothing onto a plain model and says nothing.
    """
    peft.peft_config["default"].base_model_name_or_path = str(base)
    # Whether the vocabulary grew is asked of the base's folder, which a .gguf file has not; LoRA
    # on projections never holds embeddings.
    peft.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    file = folder / "adapter_model.safetensors"
    check_safetensors(file)
    renamed = {
        key.replace("._original_component", ""): value for key, value in load_file(file).items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
