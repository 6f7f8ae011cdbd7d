"""Any model onto a TransformerLens host.

`load_model` takes `tiny-reasoner`, `tiny-reasoner-rl` or one of its checkpoints, a hub id, a local
folder, a `.gguf` file or a PEFT adapter folder and returns a `Model`: the plain transformers model,
and on first use of `.bridge` the same module wrapped by TransformerBridge, so that a model nobody
hooks costs nothing.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from resa_lens.errors import BadInputError
from resa_lens.hashes import digest
from resa_lens.models.adapters import attach_adapter
from resa_lens.models.bounds import guard
from resa_lens.models.bridge import boot, names
from resa_lens.models.files import (
    BUNDLED,
    check_safetensors,
    context_of,
    find_folder,
    folder_contents,
    hash_config,
    hash_files,
    hub_kernels_allowed,
    resolve_base,
    trained_on,
    weight_files,
)
from resa_lens.models.gguf import set_special_tokens
from resa_lens.models.hookpoints import Names
from resa_lens.models.patterns import check_patterns
from resa_lens.models.twin import twin
from resa_lens.models.unloaded import reading, source_of, tokenizer_of

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST_SLUG = 80
"""Characters of a model's name in folder names, which hold more and have at most 255."""
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
    config_hash: str = ""
    """Of its adapter_config.json, without names and versions."""


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
    parts: dict[str, str] = field(default_factory=dict)
    """Hashes of what beside the weights makes the model: configuration and tokenizer."""
    extra: dict[str, Any] = field(default_factory=dict)
    tell: Callable[[str], None] = lambda text: None
    """Called with what only booting the bridge shows."""

    def __repr__(self) -> str:
        """Return the model's name, shape, adapters and place, in two lines."""
        kind = type(self.model).__name__
        adapters = f", {len(self.adapters)} adapters on it" if self.adapters else ""
        return (
            f"{self.name}: {kind}, {self.n_layers} layers x {self.d_model}, {self.dtype} on "
            f"{self.device}{adapters}\n{self.folder}"
        )

    @property
    def contents(self) -> dict[str, Any]:
        """What the model is, by hashes of contents: never a name, a path or a time."""
        adapters = [
            {"weights": a.weights_hash, "config": a.config_hash, "scale": a.scale}
            for a in self.adapters
        ]
        return {
            "weights": self.base_hash or self.weights_hash,
            **self.parts,
            # As it is now: a caller may have put another one in its place.
            "template": digest(getattr(self.tokenizer, "chat_template", None)),
            **({"adapters": adapters} if adapters else {}),
        }

    @property
    def slug(self) -> str:
        """Readable name and 8 hex digits of the weights' hash: the workspace's key."""
        path = Path(self.name)
        name = path.stem if path.suffix == ".gguf" else self.name.rstrip("/").split("/")[-1]
        if self.name.split("/")[0] in BUNDLED:
            name = self.name  # a checkpoint's with its model's
        plain = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:LONGEST_SLUG] or "model"
        return f"{plain}-{self.weights_hash[:8]}"

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def context(self) -> int | None:
        """Tokens that the model reads at most; None where its configuration sets no bound."""
        return context_of(self.model.config)

    @property
    def attention(self) -> str:
        """Return "native" (the model's own kernels) or "stock" (TransformerLens')."""
        _ = self.bridge
        return str(self.extra["attention"])

    @property
    def why_stock(self) -> str:
        """Return why attention is "stock"; empty where it is "native"."""
        _ = self.bridge
        return str(self.extra["why_stock"] or "")

    @cached_property
    def bridge(self) -> Any:
        """The TransformerBridge over `.model`; booting it changes the module in place."""
        bridge, self.extra["attention"], reason = boot(self.model, self.tokenizer, self.name)
        self.extra["why_stock"] = reason
        if reason:
            self.tell(
                f"{self.name}: TransformerLens' own attention is used, since the model's cannot be "
                f"hooked ({reason})"
            )
        return bridge

    @cached_property
    def names(self) -> Names:
        """How the architecture names its places."""
        return names(self.model, self.bridge)


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


def _load_plain(
    path: Path, device: str, dtype: torch.dtype
) -> tuple[Any, Any, str, dict[str, str]]:
    """Load a folder or .gguf file; return model, tokenizer and the hashes of what was loaded."""
    source, options = source_of(path)
    quantization: dict[str, Any] = {}
    if options:
        weights, quantization = [path], {"quantization_config": GgufConfig(dequantize=True)}
    else:
        # Without its files transformers makes an empty tokenizer and says nothing.
        if not any((path / file).exists() for file in _TOKENIZER_FILES):
            raise BadInputError(
                f"{path} has no tokenizer; add one of {', '.join(_TOKENIZER_FILES)}"
            )
        weights = weight_files(path)
        for file in weights:
            check_safetensors(file)
    with reading(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            output_loading_info=True,
            # Refused below, with the name and both shapes.
            ignore_mismatched_sizes=True,
            # Not None: then transformers asks, and waits for the answer.
            trust_remote_code=False,
            **({"allow_all_kernels": True} if hub_kernels_allowed() else {}),
            **options,
            **quantization,
        )
        model, info = loaded
        tokenizer = tokenizer_of(source, options)
    check_patterns(tokenizer, path)
    # transformers fills absent weights at random and only warns.
    if difference := _first_difference(model, info):
        raise BadInputError(
            f"{path}: the weights do not fit config.json: {difference}; "
            "check hidden_size and num_hidden_layers"
        )
    if not model.config.architectures:
        # A .gguf file does not say it, and TransformerLens goes by it.
        model.config.architectures = [type(model).__name__]
    # A .gguf file holds configuration and tokenizer too.
    parts = {} if path.is_file() else folder_contents(path)
    if path.is_file() and (changed := set_special_tokens(path, tokenizer, model)):
        parts = {"special": digest(changed)}
    guard(model, tokenizer, str(path))
    return model.to(device).eval(), tokenizer, hash_files(weights), parts


def _first_difference(model: Any, info: dict[str, Any]) -> str | None:
    """Say where weights and config differ first: what transformers only warns of."""
    if wrong := sorted(info["mismatched_keys"]):
        name, stored, expected = wrong[0]
        return f"{name} is {tuple(stored)}, the config needs {tuple(expected)}"
    if missing := sorted(set(info["missing_keys"]) - set(model.all_tied_weights_keys or {})):
        return f"{missing[0]} is missing"
    layers = int(model.config.get_text_config().num_hidden_layers)
    for name in sorted(info["unexpected_keys"]):
        match = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name)
        if match and int(match[1]) >= layers:
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
    weights_of: Model | None = None,
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
        weights_of: a loaded model; where it is the same base, on the same device and in the same
            dtype, the new one is a second module over its weights (`twin`) and takes no memory.

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
    loaded = None
    if weights_of is not None and (weights_of.folder, weights_of.device, weights_of.dtype) == (
        base_path, chosen_device, str(chosen_dtype).removeprefix("torch."),
    ):  # fmt: skip
        loaded = _twin_of(weights_of)
    model, tokenizer, base_hash, parts = loaded or _load_plain(
        base_path, chosen_device, chosen_dtype
    )
    weights_hash, peft = base_hash, None
    attached: list[Attached] = []
    for folder, factor in zip(folders, factors, strict=True):
        peft = attach_adapter(model, folder, trainable=trainable, onto=peft, scale=factor)
        own = hash_files([folder / "adapter_model.safetensors"])
        config = hash_config(folder / "adapter_config.json")
        attached.append(Attached(folder, own, factor, trained_on(folder), config))
    if peft is not None:
        model = peft.base_model.model
        # One adapter as trained keeps the plain form, which finished evaluations are keyed by.
        sums = [a.weights_hash + (f"*{a.scale!r}" if a.scale != 1 else "") for a in attached]
        weights_hash = hashlib.sha256(f"{base_hash}{'+'.join(sums)}".encode()).hexdigest()
    return Model(
        name=_adapted_name(names, attached) if attached else name,
        model=model,
        tokenizer=tokenizer,
        folder=path if len(folders) != 1 else folders[0],
        weights_hash=weights_hash,
        device=chosen_device,
        dtype=str(chosen_dtype).removeprefix("torch."),
        reason=reason,
        base_hash=base_hash if attached else None,
        peft=peft,
        adapters=tuple(attached),
        parts=parts,
        notes=tuple(
            f"adapter {a.folder.name} was trained on weights {a.trained_on[:8]} and is put onto "
            f"{base_path.name}, weights {base_hash[:8]}"
            for a in attached
            if a.trained_on is not None and a.trained_on != base_hash
        ),
    )


def _twin_of(model: Model) -> tuple[Any, Any, str, dict[str, str]] | None:
    """Return what `_load_plain` returns, over the weights of a loaded model; None if it cannot."""
    if model.peft is not None:
        return None
    path = model.folder
    source, options = source_of(path)
    with reading(path):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        second = twin(model.model, config)
        tokenizer = tokenizer_of(source, options)
    if second is None:
        return None
    if path.is_file():
        set_special_tokens(path, tokenizer, second)
    guard(second, tokenizer, str(path))
    return second, tokenizer, model.weights_hash, dict(model.parts)


def _adapter_folder(name: str) -> Path:
    path = find_folder(name)
    if not path.is_dir() or not (path / "adapter_config.json").exists():
        raise BadInputError(f"{name} is not a PEFT adapter: it has no adapter_config.json")
    return path


def _scales(scale: float | Sequence[float], adapters: int) -> list[float]:
    """Return one finite factor for each adapter."""
    numbers = [scale] if isinstance(scale, int | float) else list(scale)
    factors = numbers * adapters if len(numbers) == 1 else numbers
    if len(factors) != adapters:
        raise BadInputError(
            f"{len(numbers)} scales for {adapters} adapters; give one for all, or one each"
        )
    if not adapters and numbers not in ([], [1.0]):
        raise BadInputError(f"scale {numbers[0]} has no adapter to act on; name one with --adapter")
    if wrong := [factor for factor in factors if not math.isfinite(factor)]:
        raise BadInputError(f"scale {wrong[0]} is not a finite number; use 0 (off) to 1 (as it is)")
    return [float(factor) for factor in factors]


def _adapted_name(names: Sequence[str], attached: Sequence[Attached]) -> str:
    """Return the adapter's own name where it is the only one, as it was trained; else a sum."""
    if len(attached) == 1 and attached[0].scale == 1:
        return names[0]
    labels = [f"{a.scale:g}*{a.folder.name}" if a.scale != 1 else a.folder.name for a in attached]
    # It becomes a part of folder names, whose length is limited.
    return " + ".join(labels) if len(labels) < 3 else f"{labels[0]} + {len(labels) - 1} more"
