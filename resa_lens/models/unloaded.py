"""What a model is before its weights are read: layers, width, context, tokenizer."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from resa_lens.errors import BadInputError
from resa_lens.models.bridge import quiet
from resa_lens.models.files import check_config, context_of, find_folder, resolve_base

_UNREADABLE = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, ArithmeticError, AttributeError,
    ImportError, struct.error, StrictDataclassError,
)  # fmt: skip
"""What transformers raises on files of other kinds or with other contents."""


def _unreadable(path: Path, error: BaseException) -> BadInputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in reason:
        reason = "its auto_map names Python code of its own, which is not run"
    return BadInputError(f"{path} cannot be loaded as a causal language model: {reason[:300]}")


def tokenizer_of(source: Path, options: Mapping[str, str]) -> Any:
    """Read the tokenizer of what `source_of` returns."""
    # The file is what the model was trained with.  For some architectures (qwen2) AutoTokenizer
    # puts its own pre-tokenizer in place of the file's and leaves out a beginning token.
    if not options and (source / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(source)
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)


@dataclass(frozen=True)
class UnloadedModel:
    """What a model's configuration and tokenizer say, before any of its weights is read."""

    name: str
    """What the user asked for."""
    path: Path
    """The folder or file; of an adapter those of its base."""
    n_layers: int
    d_model: int
    context: int | None
    """As `Model.context`."""
    config: Any = field(default=None, repr=False, compare=False)
    """The configuration, of transformers."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; BadInputError where it is damaged."""
        with reading(self.path):
            return tokenizer_of(*source_of(self.path))


def read_unloaded(name: str, base: str | None = None) -> UnloadedModel:
    """Read what a model is without its weights: layers, width, context, tokenizer.

    Args:
        name: as of `load_model`.
        base: of an adapter folder, its base model.

    Raises:
        BadInputError: not found, damaged, or no causal language model.
    """
    path = find_folder(name)
    if path.is_dir() and (path / "adapter_config.json").exists():
        path = resolve_base(path, base)
    source, options = source_of(path)
    with reading(path):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        text = config.get_text_config()
        layers, width = int(text.num_hidden_layers), int(text.hidden_size)
        return UnloadedModel(name, path, layers, width, context_of(config), config)


def source_of(path: Path) -> tuple[Path, dict[str, str]]:
    """Return the folder that transformers reads a model from, and the name of its .gguf file.

    Raises:
        BadInputError: neither a model folder nor a .gguf file.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadInputError(f"{path} is a file of no known kind; use a folder or a .gguf file")
        return path.parent, {"gguf_file": path.name}
    if not (path / "config.json").exists():
        raise BadInputError(
            f"{path} has no config.json; a model folder holds config.json, *.safetensors and a "
            "tokenizer"
        )
    check_config(path)
    return path, {}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what transformers raises on an odd file into a BadInputError that names the file."""
    try:
        with quiet():
            yield
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
