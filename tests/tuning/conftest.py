"""A small random model on disk: every test loads its own, because PEFT changes it in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from resa_lens.models.host import Model, load_model
from resa_lens.resources import data_path


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of width 32, the bundled tokenizer, weights large enough to matter."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=576, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((data_path("tiny-reasoner") / name).read_bytes())
    return folder


@pytest.fixture
def small(small_folder: Path) -> Callable[[], Model]:
    return lambda: load_model(str(small_folder))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 500, (2, 24), generator=torch.Generator().manual_seed(0))
