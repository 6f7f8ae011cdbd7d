"""Which engine generates: checked, opened, and named in what it made."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from importlib import metadata
from typing import get_args

from resa_lens.errors import BadInputError
from resa_lens.evals.config import EngineName, GenerationConfig
from resa_lens.evals.engines.base import StreamingEngine
from resa_lens.evals.engines.hf import HFEngine
from resa_lens.evals.engines.vllm import Lora, VLLMEngine
from resa_lens.evals.judge import check_judge
from resa_lens.models.host import Model


def check_engine(name: str) -> None:
    """Raise BadInputError where an engine does not exist or is not installed."""
    if name not in get_args(EngineName):
        raise BadInputError(f"engine {name!r} is unknown; use {', '.join(get_args(EngineName))}")
    if name != "hf" and importlib.util.find_spec(name) is None:
        raise BadInputError(
            f"engine {name} is not installed; its packages do not fit beside ours:\n"
            f"run `benchmarks/install_engine.sh {name} .venv-{name}` in a checkout and use\n"
            f".venv-{name}/bin/resa-lens, or leave out --engine"
        )
    if name == "lighteval" and importlib.util.find_spec("math_verify") is None:
        check_judge()


@contextlib.contextmanager
def open_engine(
    model: Model, name: EngineName = "hf", *, lora: Lora = "request"
) -> Iterator[StreamingEngine]:
    """Open the engine of a name for a loaded model; vllm's process ends with the block.

    Args:
        model: the model, with its adapters.
        name: "hf", "vllm", or "lighteval", whose generations are hf's.
        lora: of engine vllm, how an adapter gets into it.

    Raises:
        BadInputError: as `VLLMEngine`.
        RunFailedError: as `VLLMEngine`.
    """
    if name == "vllm":
        with contextlib.closing(VLLMEngine(model, lora=lora)) as engine:
            yield engine
    else:
        yield HFEngine(model.model, model.tokenizer)


def generated_by(model: Model, config: GenerationConfig, engine: EngineName) -> str:
    """Say what decides an answer's last bits, and so some answers, besides model and questions."""
    package = "vllm" if engine == "vllm" else "transformers"
    parts = [f"{package} {metadata.version(package)}"]
    # In float32 the batch is below what a token's choice feels; vllm makes batches of its own.
    if engine != "vllm" and model.dtype != "float32":
        parts.append(f"batches of {config.batch_size}")
    if engine == "vllm":
        parts.append("tensor parallel over 1")
    return ", ".join(parts)


def engine_part(engine: EngineName) -> dict[str, EngineName]:
    """Return an engine's part of an identity: none for hf, so that what hf made keeps its own."""
    return {} if engine == "hf" else {"engine": engine}
