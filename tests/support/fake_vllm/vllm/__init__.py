"""A package in vLLM's place with the part of its interface that we use, over transformers.

It decodes truly, a token of a request a step, so whatever is generated through it can be compared
with our own engine's.  It takes no argument that vLLM has not, and speaks on stdout as vLLM does.
`FAKE_VLLM` makes it fail: "start", "step", or "exit", with which the process is gone.
Libraries are loaded with the first token, so that what ends before takes no time.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

print("INFO: a line on stdout, where the replies go")


@dataclass
class SamplingParams:
    """How one request is drawn."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None
    stop: list[str]
    include_stop_str_in_output: bool
    stop_token_ids: list[int]
    skip_special_tokens: bool
    spaces_between_special_tokens: bool


@dataclass
class _Request:
    ids: list[int]
    params: SamplingParams
    cache: Any = None
    written: list[int] = field(default_factory=list)
    draws: Any = None


class LLM:
    """A model and its engine."""

    def __init__(
        self,
        model: str,
        dtype: str,
        generation_config: str,
        enforce_eager: bool,
        enable_prefix_caching: bool,
        disable_log_stats: bool,
        enable_lora: bool = False,
        max_lora_rank: int = 16,
        gpu_memory_utilization: float = 0.9,
    ) -> None:
        if os.environ.get("FAKE_VLLM") == "start":
            raise ValueError("No available memory\nfor the cache blocks")
        self.folder, self.dtype, self.loras = model, dtype, enable_lora
        self.model: Any = None
        self.tokenizer: Any = None
        self.adapter: str | None = None
        self.waiting: dict[str, _Request] = {}
        config = json.loads((Path(model) / "config.json").read_text())
        self.model_config = SimpleNamespace(max_model_len=config["max_position_embeddings"])
        self.llm_engine = self

    def add_request(
        self,
        request_id: str,
        prompt: dict[str, list[int]],
        params: SamplingParams,
        lora_request: LoRARequest | None = None,
    ) -> None:
        """Take a request."""
        if lora_request is not None:
            assert self.loras, "the adapter came without enable_lora"
            self.adapter = lora_request.lora_path
        self.waiting[request_id] = _Request(list(prompt["prompt_token_ids"]), params)

    def _load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=getattr(torch, self.dtype)
        )
        if self.adapter is not None:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, self.adapter)
        self.model.eval()

    def has_unfinished_requests(self) -> bool:
        """Return whether a request waits."""
        return bool(self.waiting)

    def abort_request(self, names: list[str]) -> None:
        """Forget requests."""
        for name in names:
            del self.waiting[name]

    def step(self) -> list[SimpleNamespace]:
        """Write a token of the first request."""
        if os.environ.get("FAKE_VLLM") == "step":
            raise RuntimeError("a kernel failed")
        if os.environ.get("FAKE_VLLM") == "exit":
            os._exit(3)
        import torch

        if self.model is None:
            self._load()
        name, request = next(iter(self.waiting.items()))
        params, new = request.params, request.written[-1:] or request.ids
        with torch.inference_mode():
            made = self.model(
                input_ids=torch.tensor([new]), past_key_values=request.cache, use_cache=True
            )
        request.cache, logits = made.past_key_values, made.logits[0, -1]
        if params.temperature == 0:
            token = int(logits.argmax())
        else:
            request.draws = request.draws or torch.Generator().manual_seed(params.seed or 0)
            probs = (logits.float() / params.temperature).softmax(-1)
            token = int(torch.multinomial(probs, 1, generator=request.draws))
        request.written.append(token)
        text = self.tokenizer.decode(request.written[-32:])
        stopped = token in params.stop_token_ids or any(word in text for word in params.stop)
        finished = stopped or len(request.written) >= params.max_tokens
        if finished:
            del self.waiting[name]
        reason = ("stop" if stopped else "length") if finished else None
        written = SimpleNamespace(token_ids=list(request.written), finish_reason=reason)
        return [SimpleNamespace(request_id=name, outputs=[written], finished=finished)]
