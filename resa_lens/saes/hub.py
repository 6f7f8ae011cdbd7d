"""SAEs by name: a local folder, or a hub repository of which only what is asked for is fetched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from resa_lens.errors import BadInputError
from resa_lens.files import named_path
from resa_lens.models.hookpoints import Hookpoint


def find_sae_folder(name: str, points: Sequence[Hookpoint] | None = None) -> Path:
    """Return the folder of SAEs that the user named.

    Of a hub repository in sparsify's layout (EleutherAI/sae-DeepSeek-R1-Distill-Qwen-1.5B-65k: a
    folder a hookpoint, 806 MB each) only the hookpoints asked for are fetched.

    Args:
        name: a folder, or owner/repository.
        points: what is needed of it; None for what is at hand, or else the whole repository.

    Raises:
        BadInputError: no such folder, or the repository is not at hand and cannot be fetched.
    """
    path = named_path(name, "SAEs")
    # Path("") is the current folder.
    if name.strip() and path.exists():
        if not path.is_dir():
            raise BadInputError(f"SAEs {name} are a file; pass the folder that holds them")
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        raise BadInputError(
            f"SAEs {name!r} not found: no such folder; it should hold layers.N.mlp/ folders, or be "
            "a hub id (owner/name)"
        )
    patterns = None
    if points is not None:
        patterns = [
            f"{p.sparsify}/{file}" for p in points for file in ("cfg.json", "*.safetensors")
        ]
    reason, lacking = "offline", [p.sparsify for p in points or ()]
    # What is at hand first: a cache must serve without a network.
    for local in (True, False):
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local))
        except HFValidationError as error:
            raise BadInputError(f"SAEs {name!r} are not a valid hub id: {error}") from error
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = type(error).__name__
            continue
        # A snapshot may come back that lacks what was asked for, or half of it.
        lacking = [p.sparsify for p in points or () if not _whole(folder / p.sparsify)]
        if not lacking:
            return folder
        reason = f"{lacking[0]} is not there"
    option = f" --include '{lacking[0]}/*'" if lacking else ""
    raise BadInputError(
        f"SAEs {name!r} are not in the local hub cache and could not be fetched ({reason}).\n"
        f"Where there is a network run `hf download {name}{option}`, copy the folder here and pass "
        "its path."
    )


def _whole(folder: Path) -> bool:
    return (folder / "cfg.json").exists() and any(folder.glob("*.safetensors"))
