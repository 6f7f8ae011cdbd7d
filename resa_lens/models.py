"""Any model onto a TransformerLens host.

`load_model` takes `tiny-reasoner`, a hub id, a local folder, a `.gguf` file or a PEFT adapter
folder and returns a `Model`: the plain transformers model, and on first use of `.bridge` the same
module wrapped by TransformerBridge, so that a model nobody hooks costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from resa_lens.errors import BadInputError
from resa_lens.resources import data_path

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

BUNDLED = ("tiny-reasoner",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


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
    """Keep other projects' import messages off stdout, which belongs to --json."""
    import io

    with contextlib.redirect_stdout(io.StringIO()):
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


def hash_files(files: list[Path]) -> str:
    """Return the SHA-256 of the files' contents in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda path: path.name):
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def check_safetensors(file: Path) -> None:
    """Read the header and every tensor's extent; raise BadInputError on a damaged file."""
    try:
        with safe_open(file, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118 - not a dict
                stream.get_slice(key).get_shape()
    except (SafetensorError, OSError) as error:
        raise BadInputError(
            f"{file} is corrupt or truncated ({error}); copy or download it again"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text())["weight_map"].values())
        if escaping := [name for name in named if Path(name).name != name]:
            raise BadInputError(f"{index} names {escaping[0]!r} outside its folder; refused")
        if missing := sorted(named - {file.name for file in files}):
            raise BadInputError(f"{folder} lacks {missing[0]}, which its index names")
        files = [folder / name for name in sorted(named)]
    if not files:
        raise BadInputError(
            f"{folder} has no *.safetensors file; save the model as safetensors "
            "(pickled weights are not read)"
        )
    return files


def find_folder(name: str) -> Path:
    """Return the folder or file that holds the model named by the user.

    Raises:
        BadInputError: nothing of that name is here and it cannot be fetched.
    """
    if name in BUNDLED:
        return data_path(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise BadInputError(
            f"model {name!r} not found: no such file or folder.\n"
            f"Use {BUNDLED[0]}, a hub id (owner/name), a local folder, a .gguf file or an adapter."
        )
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=_HUB_PATTERNS))
    except HFValidationError as error:
        raise BadInputError(f"model {name!r} is not a valid hub id: {error}") from error
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadInputError(
            f"model {name!r} is not in the local hub cache and could not be fetched "
            f"({type(error).__name__}).\nWhere there is a network run `hf download {name}`, "
            "copy the folder here and pass its path."
        ) from error


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
        weights = _weight_files(path)
        for file in weights:
            check_safetensors(file)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **options, **quantization
            )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()
        raise BadInputError(
            f"{path} cannot be loaded as a causal language model: "
            f"{(first[0] if first else type(error).__name__)[:300]}"
        ) from error
    # transformers fills absent weights at random and only warns.
    missing = sorted(set(info["missing_keys"]) - set(model.all_tied_weights_keys or {}))
    if missing or info["mismatched_keys"]:
        what = missing[0] if missing else str(sorted(info["mismatched_keys"])[0])
        raise BadInputError(
            f"{path}: the weights do not fit config.json (first difference: {what}); "
            "check hidden_size and num_hidden_layers"
        )
    return model.to(device).eval(), tokenizer, hash_files(weights)


def _resolve_base(folder: Path, base: str | None) -> tuple[Path, str | None]:
    """Find an adapter's base model: as given, by its config, or by its weights' hash."""
    if base:
        return find_folder(base), None
    config = json.loads((folder / "adapter_config.json").read_text())
    named = config.get("base_model_name_or_path") or ""
    manifest = folder / "manifest.json"
    wanted = None
    if manifest.exists():
        wanted = json.loads(manifest.read_text()).get("config", {}).get("base_hash")
    candidates = [named] if named else []
    candidates += list(BUNDLED)
    candidates += [str(p.parent) for p in sorted(folder.parent.glob("*/config.json"))]
    for candidate in candidates:
        try:
            path = find_folder(candidate)
            if not (path / "config.json").exists() and path.suffix != ".gguf":
                continue
            files = [path] if path.is_file() else _weight_files(path)
        except BadInputError:
            continue
        if wanted is None:
            if candidate == named:
                return path, None
        elif hash_files(files) == wanted:
            return path, wanted
    raise BadInputError(
        f"adapter {folder}: its base {named!r} was not found"
        + (f" (weights hash {wanted[:8]})" if wanted else "")
        + "; pass the base model with --base"
    )


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
        base_path, _ = _resolve_base(path, base)
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
