"""Any model onto a TransformerLens host.

`load_model` takes `tiny-reasoner`, `tiny-reasoner-rl` or one of its checkpoints, a hub id, a local
folder, a `.gguf` file or a PEFT adapter folder and returns a `Model`: the plain transformers model,
and on first use of `.bridge` the same module wrapped by TransformerBridge, so that a model nobody
hooks costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from resa_lens.errors import BadInputError
from resa_lens.model_files import (
    BUNDLED,
    check_safetensors,
    find_folder,
    hash_files,
    resolve_base,
    trained_on,
    weight_files,
)

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Attached:
    """An adapter that was put onto a model."""

    folder: Path
    weights_hash: str
    """Of the adapter's own file."""
    scale: float
    """Factor on its LoRA scaling: 0 is the base, 1 as trained."""
    trained_on: str | None
    """Hash of the weights it was trained on, where its manifest holds it."""


@dataclass
class Model:
    """A loaded model; `.model` is plain transformers until `.bridge` is first used."""

    name: str
    """What the user asked for."""
    model: PreTrainedModel
    """The module that computes logits: an adapter's base with its LoRA layers inside."""
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    """The folder or file that was loaded."""
    weights_hash: str
    device: str
    dtype: str
    reason: str
    """Why this device and dtype."""
    base_hash: str | None = None
    """Of an adapter: the hash of the base's weights."""
    peft: Any = None
    """The PeftModel around `.model`, or None."""
    adapters: tuple[Attached, ...] = ()
    """What was put onto the base, in order."""
    notes: tuple[str, ...] = ()
    """What the user is to be told: an adapter that was trained on another base."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """Readable name and 8 hex digits of the weights' hash: the workspace's key."""
        path = Path(self.name)
        name = path.stem if path.suffix == ".gguf" else self.name.rstrip("/").split("/")[-1]
        if self.name.split("/")[0] in BUNDLED:
            name = self.name  # a checkpoint's with its model's
        return (
            f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-.') or 'model'}-{self.weights_hash[:8]}"
        )

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def attention(self) -> str:
        """Return "native" (the model's own kernels) or "stock" (TransformerLens')."""
        _ = self.bridge
        return str(self.extra["attention"])

    @cached_property
    def bridge(self) -> Any:
        """The TransformerBridge over `.model`; booting it changes the module in place."""
        bridge, self.extra["attention"] = boot(self.model, self.tokenizer, self.name)
        return bridge


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep other projects' import messages and bars off the terminal; errors still come."""
    import io

    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        yield


def boot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str
) -> tuple[Any, str]:
    """Wrap a transformers model by TransformerBridge, with the model's own attention if it can be.

    The stock adapters re-implement attention with scores of T x T; the native path calls the
    model's own kernel, so logits stay equal and long sequences stay cheap.

    Returns:
        The bridge and "native" or "stock".
    """
    with quiet():
        from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
        from transformer_lens.model_bridge.sources._hf_format import (
            determine_architecture_from_hf_config,
        )

    kept = model.config._attn_implementation
    path = ["stock"]

    def use_native(adapter: Any) -> None:
        blocks = adapter.component_mapping.get("blocks")
        stock = getattr(blocks, "submodules", {}).get("attn")
        # Exact subclass types with a fused projection keep the stock path: their parts are
        # split by the adapter and native hooks on them would not fire.
        if stock is None or type(stock).__name__ != "PositionEmbeddingsAttentionBridge":
            return
        blocks.submodules["attn"] = AttentionBridge(
            name=stock.name,
            config=adapter.cfg,
            submodules=dict(stock.submodules),
            maintain_native_attention=True,
            requires_position_embeddings=True,
            requires_attention_mask=True,
        )
        path[0] = "native"

    with quiet():
        bridge = build_bridge_from_module(
            model,
            determine_architecture_from_hf_config(model.config),
            hf_config=model.config,
            tokenizer=tokenizer,
            model_name=name,
            post_adapter_hook=use_native,
        )
    if path[0] == "native":
        model.set_attn_implementation(kept or "sdpa")
    return bridge, path[0]


def choose_device(device: str = "auto", dtype: str = "auto") -> tuple[str, torch.dtype, str]:
    """Choose the device and dtype, and say why.

    Raises:
        BadInputError: the device is absent or the dtype unknown.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        why = "a CUDA device is present" if device == "cuda" else "no CUDA device is present"
    else:
        why = "as asked"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BadInputError(f"device {device!r} is not present; use --device cpu")
        if device.split(":")[0] not in ("cpu", "cuda"):
            raise BadInputError(f"device {device!r} is unknown; use cpu, cuda or auto")
    if dtype == "auto":
        chosen = torch.bfloat16 if device.startswith("cuda") else torch.float32
        why += (
            "; bfloat16 for the model on a GPU"
            if chosen is torch.bfloat16
            else "; float32, so that results are exact and repeatable on a CPU"
        )
    elif dtype in DTYPES:
        chosen, why = DTYPES[dtype], f"{why}; {dtype} as asked"
    else:
        raise BadInputError(f"dtype {dtype!r} is unknown; use {', '.join(DTYPES)} or auto")
    return device, chosen, why


def _load_plain(path: Path, device: str, dtype: torch.dtype) -> tuple[Any, Any, str]:
    """Load a folder or .gguf file; return model, tokenizer and the hash of the weights."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadInputError(f"{path} is a file of no known kind; use a folder or a .gguf file")
        source, options, weights = path.parent, {"gguf_file": path.name}, [path]
        quantization: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)}
    else:
        if not (path / "config.json").exists():
            raise BadInputError(
                f"{path} has no config.json; a model folder holds config.json, "
                "*.safetensors and a tokenizer"
            )
        source, options, quantization = path, {}, {}
        # Without its files transformers makes an empty tokenizer and says nothing.
        if not any((path / file).exists() for file in _TOKENIZER_FILES):
            raise BadInputError(
                f"{path} has no tokenizer; add one of {', '.join(_TOKENIZER_FILES)}"
            )
        weights = weight_files(path)
        for file in weights:
            check_safetensors(file)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                output_loading_info=True,
                # Refused below, with the name and both shapes.
                ignore_mismatched_sizes=True,
                **options,
                **quantization,
            )
        model, info = loaded
        # The file is what the model was trained with.  For some architectures (qwen2) AutoTokenizer
        # puts its own pre-tokenizer in place of the file's and leaves out a beginning token.
        as_saved = not options and (source / "tokenizer.json").exists()
        reader: Any = PreTrainedTokenizerFast if as_saved else AutoTokenizer
        tokenizer = reader.from_pretrained(source, **options)
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        ArithmeticError,
        struct.error,
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInputError(
            f"{path} cannot be loaded as a causal language model: {reason[:300]}"
        ) from error
    # transformers fills absent weights at random and only warns.
    if difference := _first_difference(model, info):
        raise BadInputError(
            f"{path}: the weights do not fit config.json: {difference}; "
            "check hidden_size and num_hidden_layers"
        )
    return model.to(device).eval(), tokenizer, hash_files(weights)


def _first_difference(model: Any, info: dict[str, Any]) -> str | None:
    """Say where weights and config differ first: what transformers only warns of."""
    if wrong := sorted(info["mismatched_keys"]):
        name, stored, expected = wrong[0]
        return f"{name} is {tuple(stored)}, the config needs {tuple(expected)}"
    if missing := sorted(set(info["missing_keys"]) - set(model.all_tied_weights_keys or {})):
        return f"{missing[0]} is missing"
    layers = int(model.config.get_text_config().num_hidden_layers)
    for name in sorted(info["unexpected_keys"]):
        found = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name)
        if found and int(found[1]) >= layers:
            return f"{name} has no place in {layers} layers"
    return None


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    base: str | None = None,
    trainable: bool = False,
    adapters: Sequence[str] = (),
    scale: float | Sequence[float] = 1.0,
) -> Model:
    """Load a model by any of its names, with the adapters that are put onto it.

    Several adapters act together: their changes of a weight are summed.

    Args:
        name: `tiny-reasoner`, `tiny-reasoner-rl`, `tiny-reasoner-rl/step-N`, hub id, folder,
            `.gguf` file or PEFT adapter folder.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16" or "float16".
        base: of an adapter folder, its base model; by default found from the adapter's
            config or by the weights' hash in its manifest.
        trainable: whether the adapters' weights require gradients.
        adapters: PEFT adapter folders to put onto the model; it may be another of the same shape
            than they were trained on, which `Model.notes` say.
        scale: factor on the adapters' LoRA scaling, one for all or one each.

    Raises:
        BadInputError: not found, damaged, not a causal language model, or an adapter that does
            not fit it.
    """
    chosen_device, chosen_dtype, reason = choose_device(device, dtype)
    path = find_folder(name)
    base_path, names = path, list(adapters)
    if path.is_dir() and (path / "adapter_config.json").exists():
        base_path = resolve_base(path, base)
        names = [name, *names]
    folders = [_adapter_folder(adapter) for adapter in names]
    factors = _scales(scale, len(folders))
    for folder in folders:
        check_safetensors(folder / "adapter_model.safetensors")
    model, tokenizer, base_hash = _load_plain(base_path, chosen_device, chosen_dtype)
    digest, peft = base_hash, None
    attached: list[Attached] = []
    for folder, factor in zip(folders, factors, strict=True):
        peft = attach_adapter(model, folder, trainable=trainable, onto=peft, scale=factor)
        own = hash_files([folder / "adapter_model.safetensors"])
        attached.append(Attached(folder, own, factor, trained_on(folder)))
    if peft is not None:
        model = peft.base_model.model
        # One adapter as trained keeps the plain form, which finished evaluations are keyed by.
        parts = [a.weights_hash + (f"*{a.scale!r}" if a.scale != 1 else "") for a in attached]
        digest = hashlib.sha256(f"{base_hash}{'+'.join(parts)}".encode()).hexdigest()
    return Model(
        name=_adapted_name(names, attached) if attached else name,
        model=model,
        tokenizer=tokenizer,
        folder=path if len(folders) != 1 else folders[0],
        weights_hash=digest,
        device=chosen_device,
        dtype=str(chosen_dtype).removeprefix("torch."),
        reason=reason,
        base_hash=base_hash if attached else None,
        peft=peft,
        adapters=tuple(attached),
        notes=tuple(
            f"adapter {a.folder.name} was trained on weights {a.trained_on[:8]} and is put onto "
            f"{base_path.name}, weights {base_hash[:8]}"
            for a in attached
            if a.trained_on is not None and a.trained_on != base_hash
        ),
    )


def _adapter_folder(name: str) -> Path:
    path = find_folder(name)
    if not path.is_dir() or not (path / "adapter_config.json").exists():
        raise BadInputError(f"{name} is not a PEFT adapter: it has no adapter_config.json")
    return path


def _scales(scale: float | Sequence[float], adapters: int) -> list[float]:
    """Return one finite factor for each adapter."""
    given = [scale] if isinstance(scale, int | float) else list(scale)
    factors = given * adapters if len(given) == 1 else given
    if len(factors) != adapters:
        raise BadInputError(
            f"{len(given)} scales for {adapters} adapters; give one for all, or one each"
        )
    if not adapters and given not in ([], [1.0]):
        raise BadInputError(f"scale {given[0]} has no adapter to act on; name one with --adapter")
    if wrong := [factor for factor in factors if not math.isfinite(factor)]:
        raise BadInputError(f"scale {wrong[0]} is not a finite number; use 0 (off) to 1 (as it is)")
    return [float(factor) for factor in factors]


def _adapted_name(names: Sequence[str], attached: Sequence[Attached]) -> str:
    """Return the adapter's own name where it is the only one, as it was trained; else a sum."""
    if len(attached) == 1 and attached[0].scale == 1:
        return names[0]
    shown = [f"{a.scale:g}*{a.folder.name}" if a.scale != 1 else a.folder.name for a in attached]
    # It becomes a part of folder names, whose length is limited.
    return " + ".join(shown) if len(shown) < 3 else f"{shown[0]} + {len(shown) - 1} more"


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
    if other := sorted(key for key in shapes if not re.search(r"\.lora_(embedding_)?[AB]\b", key)):
        raise BadInputError(
            f"adapter {folder} holds {other[0]}, which is no LoRA matrix; only plain LoRA is read"
        )
    refused = f"adapter {folder} does not fit the model"
    if misfit := _misfit(model, shapes):
        raise BadInputError(f"{refused}: {misfit}; use a model of the shape it was trained on")
    label = "default" if onto is None else f"adapter_{len(onto.peft_config)}"
    peft: Any = onto
    try:
        with warnings.catch_warnings():
            # Tensors without a place, which are refused below.
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            if onto is None:
                peft = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
            else:
                peft.load_adapter(str(folder), label, is_trainable=trainable)
    except (RuntimeError, ValueError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        first = next((line for line in lines if "size mismatch" in line), lines[0])
        raise BadInputError(f"{refused}: {first.strip()[:300]}") from error
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


def _misfit(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Say which LoRA matrix has no place in the model, or another width than its module."""
    modules = dict(model.named_modules())
    for key, shape in sorted(shapes.items()):
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if found is None:
            continue
        # With an adapter on it, the weight is the layer's inside.
        module = modules.get(f"{found[1]}.base_layer") or modules.get(found[1])
        weight = getattr(module, "weight", None)
        if weight is None:
            return f"tensor {key} {shape} has no place, the model has no module {found[1]}"
        # GPT-2's Conv1D holds its weight as [in, out].
        rows, columns = tuple(weight.shape)[:: -1 if type(module).__name__ == "Conv1D" else 1][:2]
        needed = (shape[0], columns) if found[2] == "A" else (rows, *shape[1:])
        if shape != needed:
            return f"tensor {key} is {shape}, the model needs {needed}"
    return None
