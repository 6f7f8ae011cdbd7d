"""Any model onto a TransformerLens host.

`load_model` takes `tiny-reasoner`, a hub id, a local folder, a `.gguf` file or a PEFT adapter
folder and returns a `Model`: the plain transformers model, and on first use of `.bridge` the same
module wrapped by TransformerBridge, so that a model nobody hooks costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import struct
from collections.abc import Iterator
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
    check_safetensors,
    find_folder,
    hash_files,
    resolve_base,
    weight_files,
)

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


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
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """Readable name and 8 hex digits of the weights' hash: the workspace's key."""
        path = Path(self.name)
        name = path.stem if path.suffix == ".gguf" else self.name.rstrip("/").split("/")[-1]
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
) -> Model:
    """Load a model by any of its names.

    Args:
        name: `tiny-reasoner`, hub id, folder, `.gguf` file or PEFT adapter folder.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16" or "float16".
        base: of an adapter folder, its base model; by default found from the adapter's
            config or by the weights' hash in its manifest.
        trainable: of an adapter folder, whether its weights require gradients.

    Raises:
        BadInputError: not found, damaged, or not a causal language model.
    """
    chosen_device, chosen_dtype, reason = choose_device(device, dtype)
    path = find_folder(name)
    peft = base_hash = None
    if path.is_dir() and (path / "adapter_config.json").exists():
        base_path = resolve_base(path, base)
        check_safetensors(path / "adapter_model.safetensors")
        model, tokenizer, base_hash = _load_plain(base_path, chosen_device, chosen_dtype)
        peft = attach_adapter(model, path, trainable=trainable)
        model = peft.base_model.model
        digest = hash_files([path / "adapter_model.safetensors"])
        digest = hashlib.sha256(f"{base_hash}{digest}".encode()).hexdigest()
    else:
        model, tokenizer, digest = _load_plain(path, chosen_device, chosen_dtype)
    return Model(
        name=name,
        model=model,
        tokenizer=tokenizer,
        folder=path,
        weights_hash=digest,
        device=chosen_device,
        dtype=str(chosen_dtype).removeprefix("torch."),
        reason=reason,
        base_hash=base_hash,
        peft=peft,
    )


def attach_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> Any:
    """Put a PEFT adapter onto a plain model, refusing one that would load nothing.

    Raises:
        BadInputError: no key of the adapter fits the model, or a shape differs.
    """
    from peft import PeftModel

    check_safetensors(folder / "adapter_model.safetensors")
    try:
        peft = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise BadInputError(f"adapter {folder} does not fit the model: {first}") from error
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stream:
        stored = {re.sub(r"\.default(?=\.)", "", key) for key in stream.keys()}  # noqa: SIM118
    own = {re.sub(r"\.default(?=\.)", "", n) for n, _ in peft.named_parameters() if "lora_" in n}
    if stored != own:
        raise BadInputError(
            f"adapter {folder} does not fit the model: {len(stored & own)} of {len(stored)} "
            "of its tensors have a place; use the model it was trained on"
        )
    return peft
