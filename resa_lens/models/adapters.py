"""PEFT adapters put onto a model: alone, stacked and scaled."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from resa_lens.errors import BadInputError
from resa_lens.models.files import check_safetensors


def attach_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    trainable: bool = False,
    onto: Any = None,
    scale: float = 1.0,
) -> Any:
    """Put a PEFT adapter onto a model, refusing one that would load nothing.

    Several are several active adapters of one PeftModel: that is their exact sum, at every rank
    and kind of scaling, which PEFT's own combinations are not (an rsLoRA's is scaled wrongly).

    Args:
        model: the plain model; with `onto`, the one inside it.
        folder: the adapter.
        trainable: whether its weights require gradients.
        onto: the PeftModel that holds the adapters before it.
        scale: factor on its LoRA scaling.

    Raises:
        BadInputError: a tensor has no place in the model, or a shape differs, or the adapter is
            more than a LoRA (DoRA, whole modules, biases): scaled by 0 it would not be the base.
    """
    from peft import PeftModel

    file = folder / "adapter_model.safetensors"
    check_safetensors(file)
    with safe_open(file, framework="pt") as stream:
        shapes = {
            re.sub(r"\.default(?=\.)", "", key): tuple(stream.get_slice(key).get_shape())
            for key in stream.keys()  # noqa: SIM118 - not a dict
        }
    whole: list[tuple[Tensor, Tensor]] = []
    for key in sorted(key for key in shapes if not re.search(r"\.lora_(embedding_)?[AB]\b", key)):
        # PEFT saves the whole embeddings where the vocabulary grew or an adapter is on them.
        if (own := _own_weight(model, file, key)) is None:
            raise BadInputError(
                f"adapter {folder} holds {key}, which is no LoRA matrix and not the base's own; "
                "only plain LoRA is read: merge it with PEFT (merge_and_unload), save the model "
                "and pass its folder"
            )
        whole.append((own, own.detach().clone()))
        del shapes[key]
    refused = f"adapter {folder} does not fit the model"
    if misfit := _misfit(model, shapes):
        raise BadInputError(f"{refused}: {misfit}; use a model of the shape it was trained on")
    label = "default" if onto is None else f"adapter_{len(onto.peft_config)}"
    peft: Any = onto
    try:
        with warnings.catch_warnings():
            # Tensors without a place, which are refused below.
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            config = _config(folder, shapes)
            if onto is None:
                peft = PeftModel.from_pretrained(
                    model, str(folder), is_trainable=trainable, config=config
                )
            else:
                config.inference_mode = not trainable
                peft.add_adapter(label, config)
                peft.load_adapter(str(folder), label, is_trainable=trainable)
    except BadInputError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        first = next((line for line in lines if "size mismatch" in line), lines[0])
        raise BadInputError(f"{refused}: {first.strip()[:300]}") from error
    for weight, before in whole:
        # The adapter's may be rounded.
        weight.data.copy_(before)
    own = {
        name.replace(f".{label}.", ".").removesuffix(f".{label}")
        for name, _ in peft.named_parameters()
        if "lora_" in name and re.search(rf"\.{label}(\.|$)", name)
    }
    if absent := sorted(own.symmetric_difference(shapes)):
        where = "the adapter" if absent[0] in own else "the model"
        raise BadInputError(f"{refused}: {where} has no tensor {absent[0]}")
    if onto is not None:
        peft.base_model.set_adapter(list(peft.peft_config), inference_mode=not trainable)
    lora: list[Any] = [layer for layer in peft.modules() if hasattr(layer, "set_scale")]
    for layer in lora if scale != 1 else ():
        layer.set_scale(label, scale)
    return peft


def _own_weight(model: PreTrainedModel, file: Path, key: str) -> Tensor | None:
    """Return the model's weight that a tensor of an adapter's file repeats, rounded or not."""
    named = re.fullmatch(r"base_model\.model\.(.+?)(?:\.base_layer)?\.(weight|bias)", key)
    if named is None:
        return None
    modules = dict(model.named_modules())
    module = modules.get(f"{named[1]}.base_layer") or modules.get(named[1])
    ends = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part]
    if not any(module is part or module is getattr(part, "base_layer", None) for part in ends):
        return None
    weight = getattr(module, named[2], None)
    with safe_open(file, framework="pt") as stream:
        stored = stream.get_tensor(key)
    if not isinstance(weight, Tensor) or weight.shape != stored.shape:
        return None
    narrow = min(stored.dtype, weight.dtype, key=lambda kind: kind.itemsize)
    return weight if torch.equal(stored.to(narrow), weight.to("cpu", narrow)) else None


def _config(folder: Path, tensors: Iterable[str]) -> Any:
    """Return an adapter's configuration; its tensors say which modules its patterns mean.

    PEFT matches patterns against every module's name, and some regular expressions never end.

    Raises:
        BadInputError: a pattern that the tensors do not decide repeats or chooses.
    """
    from peft import LoraConfig

    config: Any = LoraConfig.from_pretrained(str(folder))
    for field in ("rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save"):
        value = getattr(config, field) or ()
        for pattern in [value] if isinstance(value, str) else value:
            if re.search(r"[*+?{(|\[]", str(pattern)):
                raise BadInputError(
                    f"{folder / 'adapter_config.json'}: {field} has the pattern "
                    f"{str(pattern)[:80]!r}, which is not matched; write out the modules' names"
                )
    if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
        modules = (re.split(r"\.lora_", key)[0] for key in tensors)
        config.target_modules = {key.removeprefix("base_model.model.") for key in modules}
        config.exclude_modules = None
    return config


def _misfit(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Say which LoRA matrix has no place in the model, or another width than its module."""
    modules = dict(model.named_modules())
    for key, shape in sorted(shapes.items()):
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if match is None:
            continue
        # With an adapter on it, the weight is the layer's inside.
        module = modules.get(f"{match[1]}.base_layer") or modules.get(match[1])
        weight = getattr(module, "weight", None)
        if weight is None:
            return f"tensor {key} {shape} has no place, the model has no module {match[1]}"
        # GPT-2's Conv1D holds its weight as [in, out].
        rows, columns = tuple(weight.shape)[:: -1 if type(module).__name__ == "Conv1D" else 1][:2]
        needed = (shape[0], columns) if match[2] == "A" else (rows, *shape[1:])
        if shape != needed:
            return f"tensor {key} is {shape}, the model needs {needed}"
    return None
