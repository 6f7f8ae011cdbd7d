"""Stage II: LoRA adapters tuned through the frozen SAE (paper, section 2.1 and Table 7).

The SAE is removed afterwards; what remains is a plain PEFT adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from resa_lens.config import config_dict
from resa_lens.errors import BadInputError
from resa_lens.models.bridge import boot, plain_modules, plain_name
from resa_lens.models.files import check_safetensors
from resa_lens.models.hookpoints import Hookpoint, adapted_layers, module_layer
from resa_lens.models.host import Model
from resa_lens.saes.baselines import Replacement
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.world import ALONE, World
from resa_lens.tuning.collapse import CollapseWatch, document_loss
from resa_lens.tuning.kl import find_plain_head
from resa_lens.tuning.loop import LossOf, TuneConfig, TuneResult, fit
from resa_lens.tuning.lora import AdapterSwitch, shorten_lora
from resa_lens.tuning.norms import shorten_norms
from resa_lens.tuning.objective import MLP, PRESETS, Objective
from resa_lens.tuning.passes import Passes, checkpoint_blocks
from resa_lens.tuning.rotary import shorten_rotary
from resa_lens.tuning.sft import sft_loss

__all__ = [
    "TuneConfig",
    "TuneResult",
    "add_adapters",
    "add_lora",
    "lora_targets",
    "save_adapter",
    "tune",
]


EQUIVALENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "q_proj": (("q_a_proj", "q_b_proj"), ("query_key_value",), ("attn.c_attn",), ("qkv_proj",)),
    "k_proj": (("kv_a_proj_with_mqa", "kv_b_proj"), ("query_key_value",), ("attn.c_attn",),
               ("qkv_proj",)),
    "o_proj": (("attn.c_proj",), ("dense",), ("out_proj",)),
    "up_proj": (("gate_up_proj",), ("dense_h_to_4h",), ("c_fc",), ("fc1",), ("fc_in",)),
    "down_proj": (("dense_4h_to_h",), ("mlp.c_proj",), ("c_proj",), ("fc2",), ("fc_out",)),
}  # fmt: skip
"""What other architectures call the modules of a Llama shape, of which the presets speak."""
FUSED_MLP = ("gate_up_proj",)
EQUIVALENTS["v_proj"] = EQUIVALENTS["k_proj"]
# Where nothing is gated there is only the way up.
EQUIVALENTS["gate_proj"] = (("up_proj",), *EQUIVALENTS["up_proj"])


def lora_targets(model: torch.nn.Module, wanted: tuple[str, ...]) -> list[str]:
    """Return the module names that get adapters: those of a preset by what the model calls them.

    Args:
        model: a transformers model, with a bridge over it or plain.
        wanted: names, or whole endings of names with dots.

    Raises:
        BadInputError: the model has no module of a name, which is given with those that it has.
    """
    modules = adaptable(model)

    def present(name: str) -> bool:
        return any(module == name or module.endswith(f".{name}") for module in modules)

    of_preset = any(wanted == preset.targets for preset in PRESETS.values())
    chosen: list[str] = []
    for name in wanted:
        named = [(name,), *(EQUIVALENTS.get(name, ()) if of_preset else ())]
        found = next((names for names in named if all(map(present, names))), None)
        if found is None:
            has = sorted({module.rsplit(".", 1)[-1] for module in modules} - {"lm_head"})
            experts = (
                " (its experts are stacked in one tensor a layer, which LoRA leaves alone, and so "
                "it does with routers and what PEFT takes for experts by its name)"
            )
            raise BadInputError(
                f"the model has no module named {name!r} to adapt"
                f"{experts if has_experts(model) else ''}; choose --targets from {', '.join(has)}"
            )
        chosen += found
    return list(dict.fromkeys(chosen))


def has_experts(model: torch.nn.Module) -> bool:
    """Return whether a model is a mixture whose experts are stacked in one tensor a layer."""
    blocks = (getattr(module, "experts", None) for module in model.modules())
    return any(
        isinstance(block, torch.nn.Module) and any(p.ndim == 3 for p in block.parameters())
        for block in blocks
    )


def left_out(model: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """Return what an adapter does not reach of a mixture's MLPs, in a sentence, or nothing.

    Names of MLP modules mean those of dense layers and of shared experts there.
    """
    named = [name for name in targets if name in (*MLP, *chain(*EQUIVALENTS["up_proj"]))]
    if not named or not has_experts(model):
        return []
    return [
        f"warning: {', '.join(named)} are adapted in dense layers and shared experts alone; the "
        "routed experts are stacked in one tensor a layer, which LoRA leaves alone"
    ]


def adaptable(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules that LoRA can be put onto, by their names without a bridge's."""
    from transformers.pytorch_utils import Conv1D

    kinds = torch.nn.Linear, Conv1D
    modules = {n: m for n, m in plain_modules(model).items() if isinstance(m, kinds)}
    left = _names_left(model, {name.rsplit(".", 1)[-1] for name in modules})
    return {n: m for n, m in modules.items() if n.rsplit(".", 1)[-1] not in left}


def _names_left(model: torch.nn.Module, names: set[str]) -> set[str]:
    """Return the names that PEFT refuses, or takes for those of routed experts.

    Kernels of Mamba's family read some weights themselves, around an adapter.  And since
    transformers stacks experts, PEFT rewrites an adapter's targets for many mixtures, when it makes
    the adapter and again when it reads one: `down_proj` then means all routed experts and no shared
    one, and no other spelling of the target means anything else.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    left = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            _check_lora_target_modules_mamba(config, model, name)
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # of an expert's: the name alone is half of a fused tensor
            left.add(name)
        else:
            left |= {name} if config.target_parameters else set()
    return left


def modules_in(model: torch.nn.Module, targets: Sequence[str], layers: str) -> dict[str, Any]:
    """Return the modules that get adapters, by their whole names without a bridge's.

    Args:
        model: a transformers model, with a bridge over it or plain.
        targets: as `lora_targets` returns them.
        layers: `TuneConfig.adapter_layers`; where it is all, modules outside of layers are in it.

    Raises:
        BadInputError: a layer outside the model, or layers that have no such module.
    """
    endings = tuple(f".{name}" for name in targets)
    named = {n: m for n, m in adaptable(model).items() if f".{n}".endswith(endings)}
    if layers == "all":
        return named
    config: Any = model.config
    adapted = {*adapted_layers(layers, config.get_text_config().num_hidden_layers)}
    placed = {name: module for name, module in named.items() if module_layer(name) in adapted}
    if not placed:
        raise BadInputError(f"--adapter-layers {layers}: none of {', '.join(targets)} is in them")
    for name in targets:
        alike = [module for module in named if f".{module}".endswith(f".{name}")]
        if not any(module_layer(module) is not None for module in alike):
            raise BadInputError(
                f"--adapter-layers {layers}: {name} is in no layer; leave one of the two out"
            )
    return placed


def add_lora(
    model: Any, targets: Sequence[str], config: TuneConfig, *, shortened: bool = True
) -> Any:
    """Put fresh LoRA layers onto a plain transformers model; return the PeftModel.

    PEFT gets the bare names where they mean just the modules that `modules_in` returns, so that an
    adapter's configuration stays short.

    Their weights are in float32 whatever the model's dtype (PEFT's rule): at a learning rate of
    1e-6 a bfloat16 weight would round most updates away.  With `shortened` they compute the same in
    fewer operations (`lora.shorten_lora`).
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = modules_in(model, targets, config.adapter_layers)
    endings = tuple(f".{name}" for name in targets)
    named = {name for name, _ in model.named_modules() if f".{name}".endswith(endings)}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        peft = get_peft_model(
            model,
            LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=list(targets if named == modules.keys() else modules),
                task_type="CAUSAL_LM",
            ),
        )
    inner: Any = peft.base_model.model
    # How PEFT reads targets is its own matter, and has changed with its versions.
    adapted = {name for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}
    if adapted != modules.keys():
        raise BadInputError(
            f"PEFT reads the targets otherwise, at {sorted(adapted ^ modules.keys())[0]}; choose "
            "others with --targets"
        )
    if shortened:
        shorten_lora(peft)
    return peft


def add_adapters(
    model: Model, objective: Objective, config: TuneConfig, *, shortened: bool = True
) -> tuple[Any, Any]:
    """Put fresh LoRA layers onto a plain model, then boot the bridge over it.

    Args:
        model: changed in place.
        objective: which modules get them.
        config: rank, scale and dropout.
        shortened: let LoRA, norms and rotations compute the same in fewer operations; without it
            they are PEFT's, the bridge's and transformers'.

    Returns:
        The PeftModel and the bridge over its inner model.

    Raises:
        BadInputError: a module is to be adapted that the bridge's own attention or MLP goes around.
    """
    targets = lora_targets(model.model, objective.targets)
    modules = modules_in(model.model, targets, config.adapter_layers)
    peft = add_lora(model.model, targets, config, shortened=shortened)
    # After PEFT, so that its layers are inside what the bridge wraps.
    inner: Any = peft.base_model.model
    bridge, _, reason = boot(inner, model.tokenizer, model.name)
    check_called(model.name, modules, lambda: reason)
    # The bridge makes copies of its own of some weights, and these would be trained too.
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if shortened:
        shorten_norms(bridge)
        shorten_rotary(bridge)
    return peft, bridge


def check_called(name: str, modules: Iterable[str], why_stock: Callable[[], str]) -> None:
    """Check that no adapter is on a module that the bridge's own attention and MLP go around.

    Args:
        name: the model's.
        modules: whole names of the modules that get adapters.
        why_stock: says why the model's own are not used, empty where they are; since that takes
            a pass of the model, it is called only where a target could be gone around.

    Raises:
        BadInputError: one is.
    """
    fused = tuple(f".{part}" for part in (*chain(*EQUIVALENTS["q_proj"]), *FUSED_MLP))
    cut = [module for module in modules if f".{module}".endswith(fused)]
    if cut and (reason := why_stock()):
        raise BadInputError(
            f"{name}: TransformerLens' own attention and MLP are used ({reason}), which go "
            f"around an adapter on {cut[0]}; choose others with --targets"
        )


def prepare_sft(
    model: Any,
    targets: tuple[str, ...],
    config: TuneConfig,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Any, LossOf]:
    """Put fresh LoRA layers onto a plain transformers model that will be fine-tuned on texts.

    Args:
        model: changed in place.
        targets: of the objective.
        config: LoRA and optimizer.
        note: called with what a user should know.

    Returns:
        The PeftModel, and the loss of a batch (`sft.sft_loss`) for `loop.fit`.
    """
    peft = add_lora(model, lora_targets(model, targets), config)
    if config.gradient_checkpointing:
        checkpoint_blocks(model)
    head, reason = find_plain_head(model)
    if head is None:
        note(f"logits of all learned tokens at once, which takes more memory: {reason}")
    return peft, lambda batch: sft_loss(peft, batch, head)


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
    folder: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    world: World = ALONE,
    trackers: Sequence[Callable[[dict[str, Any]], None]] = (),
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Any, TuneResult]:
    """Tune adapters on a freshly loaded, plain model.

    Args:
        model: changed in place by PEFT and the bridge.
        coder: the frozen SAE, or a control in its place.
        point: where it is inserted.
        batches: token ids, `steps` x accumulation batches.
        steps: updates.
        objective: what is compared with what.
        config: LoRA and optimizer.
        advance: called with the updates done.
        folder: for state, log and adapters on the way (`loop.fit`); None keeps nothing.
        identity: what else makes the run what it is: data, SAE.
        world: the processes that tune together (`loop.join_processes`).
        trackers: called with each line of the log.
        note: called with what a user should know.

    Returns:
        The PeftModel (the SAE is not part of it) and the course.

    Raises:
        BadInputError: the SAE does not fit the model, no batch was given, or the folder holds
            another run's state.
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
    peft, bridge = add_adapters(model, objective, config)
    first, batches = _peek(batches)
    # Only where both sides may move is there nothing to hold them.
    anchored = "base" in (objective.reference, objective.teacher)
    watch = None
    if first is not None and first.ndim == 2 and not anchored:
        probe = first.to(model.device)
        with AdapterSwitch(peft).off():
            base = document_loss(bridge, probe)
        watch = CollapseWatch(lambda: document_loss(bridge, probe), base)
    # To compile or not decides the last digits, and whether a compiler works is the machine's.
    exact = torch.are_deterministic_algorithms_enabled()
    compiled = config.compile == "on" or (
        config.compile == "auto" and model.device.startswith("cuda")
    )
    if exact and config.compile == "on":
        note("--deterministic: KL as it stands, not compiled")
    passes = Passes(
        bridge, peft, point, coder, objective,
        gradient_checkpointing=config.gradient_checkpointing,
        compiled=compiled and not exact, note=note,
    )  # fmt: skip
    result = fit(
        peft,
        batches,
        steps,
        lambda ids: passes(ids.to(model.device)),
        config,
        schedule=objective.schedule,
        clip_norm=objective.clip_norm,
        doing=f"tuning at layer {point.layer}",
        device=model.device,
        folder=folder,
        save=lambda place: save_adapter(peft, place, model.folder),
        identity={
            "objective": config_dict(objective),
            "site": point.site,
            "layer": point.layer,
            **(identity or {}),
        },
        world=world,
        advance=advance,
        trackers=trackers,
        watch=watch,
    )
    if watch is not None and result.collapsed_at:
        note(
            f"warning: collapsed at step {result.collapsed_at}: without the SAE the loss on "
            f"documents is {watch.seen:.2f} nats a token, the base's {watch.base:.2f}; the adapter "
            f"of step {result.kept_step} is kept. Lower the learning rate "
            f"(now {config.learning_rate:.3g})"
        )
    return peft, result


def _peek(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Return the first batch, None where there is none, and all of them again."""
    rest = iter(batches)
    first = next(rest, None)
    return first, chain([] if first is None else [first], rest)


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
    renamed = {plain_name(key): value for key, value in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
