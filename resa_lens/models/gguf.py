"""A .gguf file's header, and the special tokens that it asks for."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from resa_lens.errors import BadInputError

_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9

Tensors = list[tuple[str, tuple[int, ...], int]]
"""Name, shape and type of each tensor."""


def read_header(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Return a GGUF file's scalar fields and its tensors.

    The package gguf makes an array of every token of the vocabulary, which takes seconds.

    Raises:
        BadInputError: it is no readable GGUF file.
    """
    try:
        return _header(path)
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise BadInputError(
            f"{path} is no readable GGUF file ({error or type(error).__name__}); copy or download "
            "it again"
        ) from error


def _header(path: Path) -> tuple[dict[str, Any], Tensors]:
    size = path.stat().st_size

    def number(form: str) -> Any:
        return struct.unpack(f"<{form}", stream.read(struct.calcsize(form)))[0]

    def length() -> int:
        # What it counts takes a byte at least: more of them is damage, and no memory is asked for.
        count = int(number("Q"))
        if count > size:
            raise ValueError(f"a length of {count} in a file of {size} bytes")
        return count

    def text() -> str:
        return stream.read(length()).decode()

    def value(kind: int) -> Any:
        if kind == _TEXT:
            return text()
        if kind != _ARRAY:
            return number(_NUMBERS[kind])
        kind, count = number("I"), length()
        if kind in (_TEXT, _ARRAY):
            for _ in range(count):
                value(kind)
        else:
            stream.seek(count * struct.calcsize(_NUMBERS[kind]), os.SEEK_CUR)
        return None

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := number("I")) not in (2, 3):
            raise ValueError(f"version {version} is not read")
        n_tensors, n_fields = number("Q"), number("Q")
        fields = {text(): value(number("I")) for _ in range(n_fields)}
        tensors = []
        for _ in range(n_tensors):
            key = text()
            shape = tuple(number("Q") for _ in range(number("I")))
            tensors.append((key, shape, number("I")))
            number("Q")  # where it begins
        return fields, tensors


def set_special_tokens(path: Path, tokenizer: Any, model: Any) -> dict[str, Any]:
    """Let a tokenizer begin and end texts as the file says; transformers leaves that out.

    Where the file is silent, a sentencepiece vocabulary begins with BOS, as llama.cpp has it.

    Returns:
        What was changed by it: nothing, or the ids that now stand around a text.
    """
    fields, _ = read_header(path)

    def field(name: str) -> Any:
        return fields.get(f"tokenizer.ggml.{name}")

    fields_by_name = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    stated = {name: field(key) for name, key in fields_by_name.items()}
    known = {n: int(i) for n, i in stated.items() if i is not None and 0 <= i < len(tokenizer)}
    for name, number in known.items():
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
        for config in (model.config.get_text_config(), model.config, model.generation_config):
            if config is not None:
                setattr(config, f"{name}_token_id", number)
    begins, ends = field("add_bos_token"), field("add_eos_token")
    begins = field("model") == "llama" if begins is None else begins
    around = {
        "bos": known.get("bos") if begins else None,
        "eos": known.get("eos") if ends else None,
    }
    if _around(tokenizer, known) == around:
        return {}
    from tokenizers import processors

    names = {name: tokenizer.convert_ids_to_tokens(i) for name, i in around.items()
             if i is not None}  # fmt: skip
    first, last = names.get("bos"), names.get("eos")
    single = " ".join(part for part in (first, "$A", last) if part)
    pair = " ".join(part for part in (first, "$A", last, first and f"{first}:1", "$B:1",
                                      last and f"{last}:1") if part)  # fmt: skip
    template = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(t, known[name]) for name, t in names.items()]
    )
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    if before is None or isinstance(before, processors.TemplateProcessing):
        backend.post_processor = template
    else:
        backend.post_processor = processors.Sequence([before, template])
    return around


def _around(tokenizer: Any, known: dict[str, int]) -> dict[str, int | None]:
    """Return the ids that a tokenizer puts before and behind a text."""
    ids = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if ids == plain:
        return {"bos": None, "eos": None}
    return {
        "bos": ids[0] if ids[0] == known.get("bos") else None,
        "eos": ids[-1] if ids[-1] == known.get("eos") else None,
    }
