"""Adapters merged into a whole model folder."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig

from resa_lens.artifacts.kinds.model import MergedModel
from resa_lens.artifacts.manifest import Manifest
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.files import named_path
from resa_lens.hashes import digest
from resa_lens.machine.hardware import MB
from resa_lens.machine.limits import check_disk, memory_errors
from resa_lens.models.bridge import quiet
from resa_lens.models.files import find_folder, hash_files, resolve_base, weight_files
from resa_lens.models.host import DTYPES, Model, load_model
from resa_lens.publishing import put_back

_TOKENIZER_PATTERNS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "additional_chat_templates", "*.model", "*.tiktoken",
    "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What a merged folder takes from its base as it is."""
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Rounding:
    """What storing the merged weights in their dtype does to the adapters' change."""

    lost: float
    """Size of the rounding error over the size of the change, both as Frobenius norms."""
    unchanged: float
    """Share of the weights under an adapter that come out as the base's own, changed or not."""
    weights: int
    """Weights under an adapter."""


@dataclass(frozen=True)
class Merged:
    """A whole model that was written."""

    folder: Path
    dtype: str
    rounding: Rounding
    manifest: Manifest
    notes: tuple[str, ...]
    """What the user is to be told."""

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that the command line promises."""
        config = self.manifest.config
        return {
            "model": str(self.folder), "base": config["base"], "base_hash": config["base_hash"],
            "adapters": config["adapters"], "dtype": self.dtype,
            "weights_hash": self.manifest.hashes["weights"], "rounding": asdict(self.rounding),
            "notes": list(self.notes),
        }  # fmt: skip


@memory_errors("merging", MergedModel.lighter)
def merge_model(
    name: str,
    adapters: Sequence[str],
    out: Path,
    *,
    scale: float | Sequence[float] = 1.0,
    dtype: str = "base",
    base: str | None = None,
    force: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> Merged:
    """Write a model with its adapters' changes added to the weights, whole or not at all.

    The sum is formed in float32 and rounded once, to the dtype that is stored.

    Args:
        name: any model's name, see `load_model`; an adapter folder is the first adapter.
        adapters: further adapter folders.
        out: the folder to make.
        scale: as of `load_model`.
        dtype: of the stored weights: "base" for the base's own (float32 of a .gguf file),
            "float32", "bfloat16" or "float16".
        base: of an adapter folder given as `name`, its base model.
        force: replace a folder that an earlier merge made.
        note: is told what is going on.

    Raises:
        BadInputError: no adapter, one that does not fit, or a place that is taken.
        RunFailedError: the merged weights are not finite, or the disk is full.
    """
    if dtype != "base" and dtype not in DTYPES:
        raise BadInputError(f"dtype {dtype!r} is unknown; use base, {', '.join(DTYPES)}")
    source = _base_of(name, base)
    _check_out(out, source, [Path(a) for a in (name, *adapters)], force)
    stored = _stored_dtype(source) if dtype == "base" else dtype
    model = load_model(
        name, device="cpu", dtype="float32", base=base, adapters=adapters, scale=scale
    )
    if model.peft is None:
        raise BadInputError(f"{name} has no adapter to merge; name one with --adapter")
    for line in model.notes:
        note(line)
    parameters = sum(p.numel() for n, p in model.model.named_parameters() if "lora_" not in n)
    size = parameters * DTYPES[stored].itemsize
    note(
        f"merging {len(model.adapters)} adapter{'s' if len(model.adapters) > 1 else ''} into "
        f"{model.base_hash[:8] if model.base_hash else name}: about "
        f"{max(1, round(6 * parameters / 2**20))} MB of memory, {max(1, round(size / 2**20))} MB "
        f"of disk as {stored}"
    )
    check_disk(out.absolute().parent, size / MB, "merging")
    whole, rounding = _merge(model, DTYPES[stored])
    warnings = _warnings(stored, rounding)
    for line in warnings:
        note(line)
    notes = (*model.notes, *warnings)
    ingredients = {
        "kind": MergedModel.name,
        "recipe": MergedModel.recipe,
        "model": model.contents,
        "config": {"dtype": stored},
    }
    manifest = Manifest(
        kind=MergedModel.name,
        identity=digest(ingredients),
        ingredients=ingredients,
        config={
            "model": name,
            "base": source.name,
            "base_hash": model.base_hash,
            "adapters": [{**asdict(a), "folder": str(a.folder)} for a in model.adapters],
            "dtype": stored,
        },
        results={"rounding": asdict(rounding), "notes": list(notes)},
        parents=[str(a.folder) for a in model.adapters],
        hashes={"attached": model.weights_hash},
        dtype=stored,
    )
    place = Workspace(out.absolute().parent)
    with place.artifact(out.absolute(), manifest) as temporary:
        if (source / "generation_config.json").exists():
            # The base's file is copied as it is; saving its values would refuse some of them.
            whole.generation_config = GenerationConfig()
        with quiet():
            whole.save_pretrained(temporary)
        if source.is_file():
            model.tokenizer.save_pretrained(temporary)
        else:
            _copy_files(source, temporary)
        manifest.hashes["weights"] = hash_files(weight_files(temporary))
    return Merged(out, stored, rounding, manifest, notes)


def _base_of(name: str, base: str | None) -> Path:
    path = find_folder(name)
    is_adapter = path.is_dir() and (path / "adapter_config.json").exists()
    return resolve_base(path, base) if is_adapter else path


def _check_out(out: Path, base: Path, adapters: Sequence[Path], force: bool) -> None:
    place = named_path(out, "folder").absolute()
    put_back(place)
    for read in (base, *adapters):
        if read.exists() and read.resolve().is_relative_to(place.resolve()):
            raise BadInputError(f"{out} holds {read}, which is read; choose another folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BadInputError(f"{out} is no folder; choose another place")
    if out.exists() and any(out.iterdir()):
        if not force:
            raise BadInputError(f"{out} exists; choose another folder, or replace it with --force")
        artifact = Workspace(place.parent).read(place)
        if artifact is None or artifact.manifest.kind != MergedModel.name:
            raise BadInputError(
                f"{out} was not made by merge; --force replaces merged models alone, choose "
                "another folder"
            )
    above = next(p for p in place.parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BadInputError(f"{out}: {above} is no folder that can be written to; choose another")


def _stored_dtype(source: Path) -> str:
    """Return the dtype that most of a folder's weights are stored in; float32 of a .gguf file."""
    if source.is_file():
        return "float32"
    held: Counter[str] = Counter()
    for file in weight_files(source):
        with safe_open(file, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118 - not a dict
                part = stream.get_slice(key)
                held[part.get_dtype()] += math.prod(part.get_shape())
    most = held.most_common(1)[0][0] if held else "F32"
    if most not in _STORED:
        raise BadInputError(f"{source} is stored as {most}; say --dtype {' or '.join(DTYPES)}")
    return _STORED[most]


@torch.no_grad()
def _merge(model: Model, dtype: torch.dtype) -> tuple[Any, Rounding]:
    """Add the adapters' changes to the weights, round, and measure what the rounding did."""
    layers: list[Any] = [m for m in model.peft.modules() if hasattr(m, "get_delta_weight")]
    # A tied weight is one parameter that two modules hold.
    uses = Counter(id(p) for m in model.peft.modules() for p in m._parameters.values())
    change = error = 0.0
    same = count = 0
    for layer in layers:
        inside = layer.get_base_layer()
        if uses[id(inside.weight)] > 1:
            raise BadInputError(
                "an adapter is on the embeddings, whose weights are tied to the output's: merged "
                "it would change both; attach it instead (eval --adapter)"
            )
        before = inside.weight.detach().clone()
        try:
            layer.merge(safe_merge=True)
        except ValueError as failure:
            raise RunFailedError(f"the merged weights are not finite: {failure}") from failure
        after = inside.weight.detach()
        rounded = after.to(dtype).float()
        if not bool(rounded.isfinite().all()):
            raise RunFailedError(f"the merged weights do not fit {dtype}; use --dtype float32")
        change += float((after - before).double().square().sum())
        error += float((rounded - after).double().square().sum())
        same += int((rounded == before.to(dtype).float()).sum())
        count += before.numel()
    whole = model.peft.unload()
    lost = math.sqrt(error / change) if change else 0.0
    return whole.to(dtype), Rounding(lost, same / max(1, count), count)


def _warnings(dtype: str, rounding: Rounding) -> tuple[str, ...]:
    if rounding.lost < 0.1:
        return ()
    return (
        f"warning: rounding to {dtype} errs by {100 * rounding.lost:.0f} % of the adapters' change "
        f"({100 * rounding.unchanged:.0f} % of the weights under them stay the base's); "
        "--dtype float32 keeps it",
    )


def _copy_files(source: Path, target: Path) -> None:
    for pattern in _TOKENIZER_PATTERNS:
        for file in source.glob(pattern):
            if file.is_dir():
                shutil.copytree(file, target / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, target / file.name)
