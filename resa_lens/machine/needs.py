"""What a model will need of a machine, from the headers of its files: no weight is read.

The arithmetic is that of the stages (tests hold it to theirs); what only a run can show, the
process itself and the passes' activations, is taken from docs/log.md and called an estimate.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resa_lens.errors import BadInputError
from resa_lens.machine.hardware import MB
from resa_lens.models.bounds import check_tags, prompt_tokens, tag_ids
from resa_lens.models.files import check_config, find_folder, resolve_base, weight_files
from resa_lens.models.gguf import read_header

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
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""What the token embedding is called."""
POSITIONS = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight")
LOGIT_MB = 48.0
"""Piece of logits of the chunked KL, of which three are held at once (`tuning.kl`)."""
LOGIT_ROWS = 1024
"""Tokens of a piece on a GPU."""


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
    positions: int | None = None
    """Learned ones: no text may be longer."""
    prompt: int | None = None
    """Tokens of the prompt that features are counted on."""


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
    """The model, an encoder, and the next one while it is loaded."""
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
        room = {stage: need <= self.available_mb for stage, need in stages.items()}
        return {**room, "disk": self.saes_disk_mb + self.adapter_disk_mb <= self.free_disk_mb}

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
    if file.exists():
        check_config(path)
    try:
        config = json.loads(file.read_text())
        text = config.get("text_config", config)
        # GPT-2's family says it by the second names.
        layers, width = (
            int(text[name] if name in text else text.get(second) or text[name])
            for name, second in (("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd"))
        )
        vocabulary = int(text["vocab_size"])
        feed_forward = int(text.get("intermediate_size") or text.get("n_inner") or 4 * width)
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
    rows = [shape[0] for key, shape, _ in tensors if key.endswith(EMBEDDINGS)]
    check_tags(str(path), tag_ids(path), max(rows, default=vocabulary))
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
        positions=next((shape[0] for key, shape, _ in tensors if key.endswith(POSITIONS)), None),
        prompt=prompt_tokens(path),
    )


def _tensors(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of every tensor of a safetensors file, from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as stream:
            for key in stream.keys():  # noqa: SIM118 - not a dict
                piece = stream.get_slice(key)
                yield key, tuple(piece.get_shape()), str(piece.get_dtype())
    except (SafetensorError, OSError) as error:
        raise BadInputError(
            f"{file} is corrupt or truncated ({error}); copy or download it again"
        ) from error


def _gguf(name: str, path: Path) -> Shape:
    from gguf import GGMLQuantizationType

    fields, tensors = read_header(path)
    try:
        architecture = fields["general.architecture"]
        layers = int(fields[f"{architecture}.block_count"])
        width = int(fields[f"{architecture}.embedding_length"])
        feed_forward = int(fields[f"{architecture}.feed_forward_length"])
        vocabulary = next(max(shape) for key, shape, _ in tensors if key.startswith("token_embd"))
        kinds = {GGMLQuantizationType(kind).name for _, _, kind in tensors}
    except (ValueError, KeyError, StopIteration) as error:
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


def _adapted(tensors: Iterator[tuple[str, tuple[int, ...]]]) -> int:
    """Parameters of a LoRA of rank `RANK` on the attention's projections."""
    total = 0
    for key, shape in tensors:
        match = re.search(r"(\w+)\.weight$", key)
        module = _GGUF_TARGETS.get(match[1], match[1]) if match else ""
        if module in TARGETS and len(shape) == 2:
            total += RANK * sum(shape)
    return total


def latents_of(width: int) -> int:
    """Return the latents that an SAE of a model of this width has by default."""
    return LATENTS_WIDE if width >= WIDE else LATENTS_PER_WIDTH * width


def activations_mb(shape: Shape, tokens: int, bytes_each: int, *, gpu: bool = False) -> float:
    """Estimate what a tuning step holds: both passes' activations, and pieces of the logits.

    A layer keeps about twelve vectors of its width a token and four of its feed-forward's width.
    docs/log.md: 370 MB were measured with preset paper where this gives 304.
    """
    vectors = 12 * shape.width + 4 * shape.feed_forward
    row = shape.vocabulary * 4 / MB
    piece = min(max(LOGIT_MB, LOGIT_ROWS * row) if gpu else LOGIT_MB, tokens * row)
    return 2 * tokens * shape.layers * vectors * bytes_each / MB + 3 * piece


def generation_mb(config: Any, rows: int, tokens: int, bytes_each: int) -> float:
    """Estimate what answering takes besides the model: keys, values, and logits of one step.

    Args:
        config: of the transformers model.
        rows: answers in a batch.
        tokens: of the longest prompt and answer together.
        bytes_each: of the model's dtype.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    cached = 2 * text.num_hidden_layers * size
    cached *= getattr(text, "num_key_value_heads", None) or heads
    # Beside the logits stand their probabilities and sums in double precision.
    return rows * (tokens * cached * bytes_each + 20 * text.vocab_size) / MB


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
    model_mb = (0.0 if gpu else PROCESS_MB) + shape.parameters * each / MB
    load = model_mb + (0.0 if gpu else shape.loading_mb)
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
        count_mb=max(load, model_mb + sae),
        train_mb=max(load, model_mb + trained * (STATE_COPIES * sae + acts) + step),
        train_one_mb=max(load, model_mb + STATE_COPIES * sae + acts + step),
        tune_mb=max(
            load, model_mb + sae + adapters + activations_mb(shape, SEQUENCE, each, gpu=gpu)
        ),
        saes_disk_mb=trained * sae,
        adapter_disk_mb=shape.adapted * 4 / MB,
        available_mb=available_mb,
        free_disk_mb=free_disk_mb,
    )
