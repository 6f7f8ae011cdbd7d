"""Generation behind one interface: `hf` in process, `vllm` where it is installed."""

from __future__ import annotations

from resa_lens.evals.engines.base import (
    Answered,
    Engine,
    Generation,
    GenerationConfig,
    GenerationHooks,
    Progress,
    StreamingEngine,
)
from resa_lens.evals.engines.hf import HFEngine

__all__ = [
    "Answered",
    "Engine",
    "Generation",
    "GenerationConfig",
    "GenerationHooks",
    "HFEngine",
    "Progress",
    "StreamingEngine",
]
