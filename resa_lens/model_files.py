"""A model on disk: its name's folder, its weight files and their hash, an adapter's base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from resa_lens.errors import BadInputError
from resa_lens.resources import data_path

BUNDLED = ("tiny-reasoner", "tiny-reasoner-rl")
CHECKPOINTS = "checkpoints"
"""Of a bundled model: the folder of its adapters on the way, named step-<update>."""
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


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


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, those of its index where it has one.

    Raises:
        BadInputError: none, one missing, or an index that is damaged or leads out of the folder.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
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
    model, _, wanted = name.partition("/")
    folders = {folder.name: folder for folder in bundled_checkpoints(model)}
    if wanted not in folders:
        held = f"it has {', '.join(folders)}" if folders else "it has none"
        raise BadInputError(f"model {name!r}: {model} has no checkpoint {wanted!r}; {held}")
    return folders[wanted]


def _adapter_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
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
        return json.loads(file.read_text()).get("config", {}).get("base_hash")
    except (ValueError, AttributeError) as error:
        raise BadInputError(f"{file} is damaged ({error}); pass the base with --base") from error


def resolve_base(folder: Path, base: str | None) -> Path:
    """Find an adapter's base model: as given, by its config, or by its weights' hash.

    Raises:
        BadInputError: not found, or the folder's config or manifest is damaged.
    """
    config = _adapter_config(folder)
    if base:
        return find_folder(base)
    named = config.get("base_model_name_or_path") or ""
    wanted = trained_on(folder)
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
        if wanted is None:
            if candidate == named:
                return path
        elif hash_files(files) == wanted:
            return path
    raise BadInputError(
        f"adapter {folder}: its base {named!r} was not found"
        + (f" (weights hash {wanted[:8]})" if wanted else "")
        + "; pass the base model with --base"
    )
