"""What a model will need of a machine, from the headers of its files: no weight is read.

The arithmetic is that of the stages (tests hold it to theirs); what only a run can show, the
process itself and the passes' activations, is taken from docs/log.md and called an estimate.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from resa_lens.errors import BadInputError
from resa_lens.machine import MB
from resa_lens.model_files import find_folder, resolve_base, weight_files

PROCESS_MB = 600.0
"""Python with torch, transformers and TransformerLens loaded: the peak of small runs on a CPU."""
WIDE, LATENTS_WIDE, LATENTS_PER_WIDTH = 1024, 65_536, 16
"""The rule of `SaeConfig.for_width`."""
STATE_COPIES = 2
"""Weights and state of signum, as in `saes.optim`."""
RANK, SEQUENCE = 32, 256
"""Of the adapters and of a tuning sequence, as the defaults of `TuneConfig` and `CorpusConfig`."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""What preset paper adapts."""
_GGUF_TARGETS = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj",
                 "attn_output": "o_proj"}  # fmt: skip
_GGUF_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_GGUF_TEXT, _GGUF_ARRAY = 8, 9
LOGIT_MB = 48.0
"""Piece of logits of the chunked KL, of which three are held at once (`tuning.kl`)."""


@dataclass(frozen=True)
class Shape:
    """A model as the headers of its files tell it."""

    name: str
    layers: int
    width: int
    feed_forward: int
    vocabulary: int
    parameters: int
    dtype: str
    """Of the stored weights."""
    stored_mb: float
    adapted: int
    """Parameters of preset paper's adapters."""
    loading_mb: float = 0.0
    """Held besides while it is loaded: of a GGUF file, what is dequantised at the moment."""


@dataclass(frozen=True)
class Needs:
    """MB of memory and disk; memory is a process's peak."""

    shape: Shape
    device: str
    dtype: str
    """That the model is loaded in."""
    load_mb: float
    latents: int
    sae_mb: float
    """One SAE, in memory and on disk."""
    count_mb: float
    """The model and the encoders of all layers but the first and the last."""
    train_mb: float
    """SAEs of all layers but the first and the last at once."""
    train_one_mb: float
    """One layer at a time, which `train-saes` does by itself where memory is short."""
    tune_mb: float
    """Preset paper, one sequence at a time."""
    saes_disk_mb: float
    adapter_disk_mb: float
    available_mb: float
    free_disk_mb: float

    def fits(self) -> dict[str, bool]:
        """Say for each stage whether this machine has the room."""
        stages = {
            "load": self.load_mb,
            "count": self.count_mb,
            "train-saes": self.train_one_mb,
            "tune": self.tune_mb,
        }
        found = {stage: need <= self.available_mb for stage, need in stages.items()}
        return {**found, "disk": self.saes_disk_mb + self.adapter_disk_mb <= self.free_disk_mb}

    def to_dict(self) -> dict[str, Any]:
        """Return the values and which stages fit."""
        return {**asdict(self), "fits": self.fits()}


def read_shape(name: str, base: str | None = None) -> Shape:
    """Read a model's shape without its weights; of an adapter folder, that of its base.

    Raises:
        BadInputError: not at hand, damaged, or of no known form.
    """
    path = find_folder(name, fetch=False)
    if path.is_dir() and (path / "adapter_config.json").exists():
        path = resolve_base(path, base)
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadInputError(f"{path} is a file of no known kind; use a folder or a .gguf file")
        return _gguf(name, path)
    return _folder(name, path)


def _folder(name: str, path: Path) -> Shape:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
        text = config.get("text_config", config)
        layers, width = int(text["num_hidden_layers"]), int(text["hidden_size"])
        vocabulary = int(text["vocab_size"])
        feed_forward = int(text.get("intermediate_size") or 4 * width)
    except FileNotFoundError as error:
        raise BadInputError(
            f"{path} has no config.json; a model folder holds config.json, *.safetensors and a "
            "tokenizer"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(
            f"{file} does not give num_hidden_layers, hidden_size and vocab_size ({error}); use a "
            "causal language model"
        ) from error
    tensors = [tensor for part in weight_files(path) for tensor in _tensors(part)]
    kinds = {kind for _, _, kind in tensors}
    return Shape(
        name=name,
        layers=layers,
        width=width,
        feed_forward=feed_forward,
        vocabulary=vocabulary,
        parameters=sum(math.prod(shape) for _, shape, _ in tensors),
        dtype=", ".join(sorted(kinds)),
        stored_mb=sum(part.stat().st_size for part in weight_files(path)) / MB,
        adapted=_adapted((key, shape) for key, shape, _ in tensors),
    )


def _tensors(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of every tensor of a safetensors file, from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as stream:
            for key in stream.keys():  # noqa: SIM118 - not a dict
                held = stream.get_slice(key)
                yield key, tuple(held.get_shape()), str(held.get_dtype())
    except (SafetensorError, OSError) as error:
        raise BadInputError(
            f"{file} is corrupt or truncated ({error}); copy or download it again"
        ) from error


def _gguf(name: str, path: Path) -> Shape:
    from gguf import GGMLQuantizationType

    try:
        fields, tensors = _gguf_header(path.open("rb"), path.stat().st_size)
        architecture = fields["general.architecture"]
        layers = int(fields[f"{architecture}.block_count"])
        width = int(fields[f"{architecture}.embedding_length"])
        feed_forward = int(fields[f"{architecture}.feed_forward_length"])
        vocabulary = next(max(shape) for key, shape, _ in tensors if key.startswith("token_embd"))
        kinds = {GGMLQuantizationType(kind).name for _, _, kind in tensors}
    except (OSError, ValueError, KeyError, StopIteration, struct.error) as error:
        raise BadInputError(
            f"{path} is no readable GGUF file ({error or type(error).__name__}); copy or download "
            "it again"
        ) from error
    return Shape(
        name=name,
        layers=layers,
        width=width,
        feed_forward=feed_forward,
        vocabulary=vocabulary,
        parameters=sum(math.prod(shape) for _, shape, _ in tensors),
        dtype=", ".join(sorted(kinds)),
        stored_mb=path.stat().st_size / MB,
        adapted=_adapted((key, shape) for key, shape, _ in tensors),
        loading_mb=2 * max(math.prod(shape) for _, shape, _ in tensors) * 4 / MB,
    )


def _gguf_header(
    stream: BinaryIO, size: int
) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int]]]:
    """Return a GGUF file's scalar fields, and name, shape and type of its tensors.

    The package gguf makes an array of every token of the vocabulary, which takes seconds.
    """

    def number(form: str) -> Any:
        return struct.unpack(f"<{form}", stream.read(struct.calcsize(form)))[0]

    def length() -> int:
        # What it counts takes a byte at least: more of them is damage, and no memory is asked for.
        found = int(number("Q"))
        if found > size:
            raise ValueError(f"a length of {found} in a file of {size} bytes")
        return found

    def text() -> str:
        return stream.read(length()).decode()

    def value(kind: int) -> Any:
        if kind == _GGUF_TEXT:
            return text()
        if kind != _GGUF_ARRAY:
            return number(_GGUF_NUMBERS[kind])
        kind, count = number("I"), length()
        if kind in (_GGUF_TEXT, _GGUF_ARRAY):
            for _ in range(count):
                value(kind)
        else:
            stream.seek(count * struct.calcsize(_GGUF_NUMBERS[kind]), os.SEEK_CUR)
        return None

    with stream:
        if stream.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := number("I")) not in (2, 3):
            raise ValueError(f"version {version} is not read")
        many, held = number("Q"), number("Q")
        fields = {text(): value(number("I")) for _ in range(held)}
        tensors = []
        for _ in range(many):
            key = text()
            shape = tuple(number("Q") for _ in range(number("I")))
            tensors.append((key, shape, number("I")))
            number("Q")  # where it begins
        return fields, tensors


def _adapted(tensors: Iterator[tuple[str, tuple[int, ...]]]) -> int:
    """Parameters of a LoRA of rank `RANK` on the attention's projections."""
    total = 0
    for key, shape in tensors:
        found = re.search(r"(\w+)\.weight$", key)
        module = _GGUF_TARGETS.get(found[1], found[1]) if found else ""
        if module in TARGETS and len(shape) == 2:
            total += RANK * sum(shape)
    return total


def latents_of(width: int) -> int:
    """Return the latents that an SAE of a model of this width has by default."""
    return LATENTS_WIDE if width >= WIDE else LATENTS_PER_WIDTH * width


def activations_mb(shape: Shape, tokens: int, bytes_each: int) -> float:
    """Estimate what a tuning step holds: both passes' activations, and pieces of the logits.

    A layer keeps about twelve vectors of its width a token and four of its feed-forward's width.
    docs/log.md: 370 MB were measured with preset paper where this gives 304.
    """
    vectors = 12 * shape.width + 4 * shape.feed_forward
    piece = min(LOGIT_MB, tokens * shape.vocabulary * 4 / MB)
    return 2 * tokens * shape.layers * vectors * bytes_each / MB + 3 * piece


def needs_of(
    shape: Shape,
    *,
    device: str,
    available_mb: float,
    free_disk_mb: float,
    latents: int | None = None,
) -> Needs:
    """Work out what the stages need.

    Args:
        shape: of the model.
        device: "cpu" (float32) or "cuda" (bfloat16).
        available_mb: of the device's memory.
        free_disk_mb: where the workspace lies.
        latents: of an SAE; by default set by the width.
    """
    gpu = device.startswith("cuda")
    each = 2 if gpu else 4
    # On a GPU the process' own memory is the machine's, not the device's.
    held = (0.0 if gpu else PROCESS_MB) + shape.parameters * each / MB
    load = held + (0.0 if gpu else shape.loading_mb)
    count = latents_of(shape.width) if latents is None else latents
    sae = 2 * count * shape.width * 4 / MB
    trained = max(1, shape.layers - 2) if shape.layers > 2 else shape.layers
    # Beside weights and state a step holds one gradient, as large as the encoder, and half of it
    # again for the encoder's weights in bfloat16.
    batch = SEQUENCE * (16 if shape.width >= WIDE else 4)
    acts = batch * shape.width * 4 / MB
    step = 0.75 * sae
    adapters = shape.adapted * 4 * 4 / MB  # weights, gradients and AdamW's two averages
    return Needs(
        shape=shape,
        device=device,
        dtype="bfloat16" if gpu else "float32",
        load_mb=load,
        latents=count,
        sae_mb=sae,
        count_mb=max(load, held + trained * sae / 2),
        train_mb=max(load, held + trained * (STATE_COPIES * sae + acts) + step),
        train_one_mb=max(load, held + STATE_COPIES * sae + acts + step),
        tune_mb=max(load, held + sae + adapters + activations_mb(shape, SEQUENCE, each)),
        saes_disk_mb=trained * sae,
        adapter_disk_mb=shape.adapted * 4 / MB,
        available_mb=available_mb,
        free_disk_mb=free_disk_mb,
    )
