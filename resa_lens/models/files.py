"""A model on disk: its name's folder, its weight files and their hash, an adapter's base."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from resa_lens.errors import BadInputError
from resa_lens.files import named_path, parse_json, read_json, read_regular
from resa_lens.hashes import digest, file_hash
from resa_lens.resources import data_path

BUNDLED = ("tiny-reasoner", "tiny-reasoner-rl", "tiny-moe-reasoner")
CHECKPOINTS = "checkpoints"
"""Of a bundled model: the folder of its adapters on the way, named step-<update>."""
HUB_KERNELS = "RESA_LENS_HUB_KERNELS"
"""Variable that allows kernels of the hub."""
_QUANTISERS = {
    **{n: n for n in ("aqlm", "bitsandbytes", "fp_quant", "hqq", "quark", "torchao", "vptq")},
    "auto-round": "auto_round", "awq": "gptqmodel", "compressed-tensors": "compressed_tensors",
    "eetq": "kernels", "gptq": "gptqmodel", "higgs": "flute", "nvfp4": "kernels",
    "quanto": "optimum", "spqr": "spqr_quant",
}  # fmt: skip
"""The module that transformers reads a quantisation with."""
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
)  # fmt: skip
_NAMES_AND_VERSIONS = (
    "_name_or_path", "transformers_version", "base_model_name_or_path", "revision", "peft_version",
    "auto_mapping", "inference_mode",
)  # fmt: skip
"""Keys of a configuration that say where it came from: no part of what the model is."""


def hash_files(files: list[Path]) -> str:
    """Return the SHA-256 of a file, or of the names and hashes of several."""
    if len(files) == 1:
        return file_hash(files[0])
    return digest({file.name: file_hash(file) for file in files})


def hash_config(file: Path) -> str:
    """Return the SHA-256 of a JSON configuration's values, without names, paths and versions.

    Raises:
        DamagedError: missing or no JSON.
    """
    value = read_json(file)
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if key not in _NAMES_AND_VERSIONS}
        # PEFT writes sets, in the order that a process happens to give them.
        for key in ("target_modules", "modules_to_save"):
            if isinstance(value.get(key), list):
                value[key] = sorted(map(str, value[key]))
    return digest(value)


def folder_contents(folder: Path) -> dict[str, str]:
    """Return the hashes of what beside its weights makes a model folder what it is.

    Returns:
        `config` (the architecture and, where there is one, the defaults of generation) and
        `tokenizer`; the chat template is the loaded tokenizer's.

    Raises:
        DamagedError: a file is no JSON, or no regular file.
    """
    configs = {
        name: hash_config(folder / name)
        for name in ("config.json", "generation_config.json")
        if (folder / name).exists()
    }
    tokenizer = {n: file_hash(folder / n) for n in _TOKENIZER_FILES if (folder / n).exists()}
    return {"config": digest(configs), "tokenizer": digest(tokenizer)}


def context_of(config: Any) -> int | None:
    """Return how many tokens a model reads at most, by its configuration; None without a bound.

    Args:
        config: transformers' configuration of the model.
    """
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len",
             "seq_length")  # fmt: skip
    values = (getattr(text, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def check_config(folder: Path) -> None:
    """Refuse a model folder whose config.json asks for code that is not installed.

    Raises:
        BadInputError: a kernel that would be fetched from the hub and run, or a quantisation
            whose library is missing.
        DamagedError: it is missing or no JSON.
    """
    file = folder / "config.json"
    for key, value in _settings(read_json(file)):
        if key.removesuffix("_internal").endswith("_implementation"):
            for name in map(str, value.values() if isinstance(value, dict) else [value]):
                # Without its package flash attention is fetched, too.
                fetched = "/" in name or ("flash_" in name and find_spec("flash_attn") is None)
                if fetched and not hub_kernels_allowed():
                    raise BadInputError(
                        f"{file}: {key} {name[:80]!r} would be fetched from the hub and run; take "
                        f"the line out, or allow it with {HUB_KERNELS}=1"
                    )
        if key == "quantization_config" and isinstance(value, dict):
            bits = value.get("load_in_4bit") or value.get("load_in_8bit")
            method = str(value.get("quant_method") or ("bitsandbytes" if bits else ""))
            if (library := _QUANTISERS.get(method)) and find_spec(library) is None:
                raise BadInputError(
                    f"{folder} is quantised by {method}, and {library} is not installed; pass the "
                    "folder of the model that is not quantised"
                )


def hub_kernels_allowed() -> bool:
    """Return whether the user allows kernels that are fetched from the hub."""
    return os.environ.get(HUB_KERNELS, "0") not in ("", "0")


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of a configuration with its value, those of its parts too."""
    for key, item in value.items() if isinstance(value, dict) else ():
        yield key, item
        yield from _settings(item)


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


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, those of its index where it has one.

    Raises:
        BadInputError: none, one missing, or an index that is damaged or leads out of the folder.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            named = set(parse_json(read_regular(index), index)["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(
                f"{index} is damaged ({error}); copy or download it again"
            ) from error
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


def find_folder(name: str, *, fetch: bool = True) -> Path:
    """Return the folder or file that holds the model named by the user.

    Args:
        name: as a user gives it.
        fetch: download a hub id that is not in the cache.

    Raises:
        BadInputError: nothing of that name is here and it cannot be fetched.
    """
    if name in BUNDLED:
        return data_path(name)
    if name.split("/")[0] in BUNDLED and not Path(name).exists():
        return _bundled_checkpoint(name)
    if not name.strip():
        raise BadInputError(f"model {name!r} is empty; name a model, for example {BUNDLED[0]}")
    path = named_path(name, "model")
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
    except LocalEntryNotFoundError as error:
        if not fetch:
            raise BadInputError(
                f"model {name!r} is not in the local hub cache.\nRun `hf download {name}`, or pass "
                "the path of its folder or .gguf file."
            ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadInputError(
            f"model {name!r} is not in the local hub cache and could not be fetched "
            f"({type(error).__name__}).\nWhere there is a network run `hf download {name}`, "
            "copy the folder here and pass its path."
        ) from error


def bundled_checkpoints(name: str) -> list[Path]:
    """Return the adapters that a bundled model passed on its way, in the order of training."""
    folders = (data_path(name) / CHECKPOINTS).glob("step-*")
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def _bundled_checkpoint(name: str) -> Path:
    """Return the folder of `tiny-reasoner-rl/step-<update>`."""
    model, _, checkpoint = name.partition("/")
    folders = {folder.name: folder for folder in bundled_checkpoints(model)}
    if checkpoint not in folders:
        names = f"it has {', '.join(folders)}" if folders else "it has none"
        raise BadInputError(f"model {name!r}: {model} has no checkpoint {checkpoint!r}; {names}")
    return folders[checkpoint]


def _adapter_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    try:
        config = read_json(file)
    except BadInputError as error:
        raise BadInputError(f"{file} is not JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise BadInputError(f"{file} is not of a LoRA adapter; its peft_type must be LORA")
    return config


def trained_on(folder: Path) -> str | None:
    """Return the hash of the base's weights that an adapter's manifest holds.

    Raises:
        BadInputError: the manifest is damaged.
    """
    file = folder / "manifest.json"
    if not file.exists():
        return None
    try:
        value = read_json(file)
        base_hash = value.get("config", {}).get("base_hash")
    except (BadInputError, AttributeError) as error:
        raise BadInputError(f"{file} is damaged ({error}); pass the base with --base") from error
    return base_hash if isinstance(base_hash, str) else None


def resolve_base(folder: Path, base: str | None) -> Path:
    """Find an adapter's base model: as given, by its config, or by its weights' hash.

    Raises:
        BadInputError: not found, or the folder's config or manifest is damaged.
    """
    config = _adapter_config(folder)
    if base:
        return find_folder(base)
    named = config.get("base_model_name_or_path") or ""
    weights_hash = trained_on(folder)
    candidates = [named] if named else []
    candidates += list(BUNDLED)
    candidates += [str(p.parent) for p in sorted(folder.parent.glob("*/config.json"))]
    candidates += [str(p) for p in sorted(folder.parent.glob("*.gguf"))]
    for candidate in candidates:
        try:
            path = find_folder(candidate)
            if not (path / "config.json").exists() and path.suffix != ".gguf":
                continue
            files = [path] if path.is_file() else weight_files(path)
        except BadInputError:
            continue
        if weights_hash is None:
            if candidate == named:
                return path
        elif hash_files(files) == weights_hash:
            return path
    raise BadInputError(
        f"adapter {folder}: its base {named!r} was not found"
        + (f" (weights hash {weights_hash[:8]})" if weights_hash else "")
        + "; pass the base model with --base"
    )
