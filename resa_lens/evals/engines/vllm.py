"""Generation with vLLM (package vllm, or vllm-cpu without a GPU), in process.

Prompts go in as the token ids of our tokenizer and come out as token ids that it decodes, so that
hf and vllm differ in nothing but the arithmetic.  Every document has a seed of its own: one
`SamplingParams` shared by all would give correlated draws.  Sampled answers are not those of
`HFEngine`, whose random streams are others; greedy ones are.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.evals.engines.base import Answered, Generation, GenerationConfig, Progress
from resa_lens.evals.engines.text import end_ids, finish
from resa_lens.models.files import hash_files, weight_files
from resa_lens.models.host import Model

INSTALL = (
    "engine vllm is not installed; it needs an environment of its own:\n"
    "run `benchmarks/install_engine.sh vllm .venv-vllm` and use .venv-vllm/bin/resa-lens,\n"
    'or with a GPU `pip install "resa-lens[vllm]"` into a new one'
)
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in process: quick to start, and no spawn guard
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or its threads fight for the first cores
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

Lora = Literal["request", "merged"]


class VLLMEngine:
    """Generates with vLLM from the files of a loaded model.

    Args:
        model: a folder of weights, or an adapter on one.
        lora: whether an adapter goes with the requests, or into a copy of the weights.

    Raises:
        BadInputError: vLLM is not installed, the model has no folder of safetensors, or the
            adapter's rank is more than requests may have.
        RunFailedError: vLLM does not start with this model.
    """

    def __init__(self, model: Model, *, lora: Lora = "request") -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        self._vllm = _import()
        self.tokenizer: Any = model.tokenizer
        self._ends = end_ids(model.model, model.tokenizer)
        self._request: Any = None
        self._merged: tempfile.TemporaryDirectory[str] | None = None
        options: dict[str, Any] = {}
        folder = model.folder
        if model.peft is not None:
            base = _base_folder(model) if lora == "request" else None
            # A scaled or summed adapter is none of the files that a request can name.
            if base is not None and len(model.adapters) == 1 and model.adapters[0].scale == 1:
                adapter = model.adapters[0].folder
                (lora_config,) = model.peft.peft_config.values()
                options = {"enable_lora": True, "max_lora_rank": _rank(lora_config.r)}
                lora_request = importlib.import_module("vllm.lora.request").LoRARequest
                self._request = lora_request(adapter.name, 1, str(adapter))
                folder = base
            else:
                self._merged = tempfile.TemporaryDirectory(prefix="resa-lens-merged-")
                folder = _save_merged(model, Path(self._merged.name))
        if folder.is_file():
            raise BadInputError(
                f"engine vllm reads no {folder.suffix} file ({folder}); use --engine hf, or a "
                "folder with safetensors"
            )
        if model.device.startswith("cuda"):
            # The loaded model lies there already.
            free, total = torch.cuda.mem_get_info()
            options["gpu_memory_utilization"] = round(0.9 * free / total, 3)
        try:
            self._llm = self._vllm.LLM(
                model=str(folder),
                dtype=model.dtype,
                # The files' own: a default of 0.6 in generation_config.json is none of ours.
                generation_config="vllm",
                enforce_eager=model.device == "cpu",
                enable_prefix_caching=False,
                disable_log_stats=True,
                **options,
            )
        except Exception as error:  # of whatever kind: too little memory, a model it has not
            reason = " ".join(str(error).split()) or "no message"
            raise RunFailedError(
                f"engine vllm does not start with {model.slug} "
                f"({type(error).__name__}: {reason[:300]}).\n"
                "Leave out --engine to score with hf"
            ) from error
        self.max_length = int(self._llm.llm_engine.model_config.max_model_len)

    def generate(
        self,
        prompts: Sequence[str],
        config: GenerationConfig,
        progress: Progress | None = None,
        *,
        streams: Sequence[tuple[int, ...]] | None = None,
        answered: Answered | None = None,
    ) -> list[Generation]:
        """Return one generation a prompt, in the prompts' order.

        Args:
            prompts: the texts to continue.
            config: lengths, sampling, stop strings; the batch is vLLM's own.
            progress: called with the number of finished documents whenever it grows.
            streams: what names each document's seed besides the seed; its index by default.
            answered: called with each document's index and generation as it ends.

        Raises:
            BadInputError: a prompt without tokens or longer than the model allows, or the numbers
                of prompts and streams differ.
        """
        names = [(i,) for i in range(len(prompts))] if streams is None else list(streams)
        if len(names) != len(prompts):
            raise BadInputError(f"{len(names)} streams for {len(prompts)} prompts; give one each")
        encoded = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        for prompt, ids in zip(prompts, encoded, strict=True):
            if not 0 < len(ids) < self.max_length:
                raise BadInputError(
                    f"a prompt has {len(ids)} tokens; the model takes 1 to {self.max_length - 1}: "
                    f"{prompt[:60]!r}"
                )
        engine = self._llm.llm_engine
        # vLLM tells a request in work only by its first token, so its clock starts there.
        started: dict[str, float] = {}
        results: dict[int, Generation] = {}
        waiting: dict[str, int] = {}

        def end(name: str, ids: Sequence[int], finished: bool, timed_out: bool = False) -> None:
            index = waiting.pop(name)
            results[index] = finish(
                self.tokenizer, ids, self._ends, config.stop,
                finished=finished, timed_out=timed_out,
            )  # fmt: skip
            if answered is not None:
                answered(index, results[index])
            if progress is not None:
                progress(len(results))

        for index, (ids, stream) in enumerate(zip(encoded, names, strict=True)):
            name = str(index)
            waiting[name] = index
            engine.add_request(
                name,
                {"prompt_token_ids": ids},
                self._params(config, stream, self.max_length - len(ids)),
                lora_request=self._request,
            )
        try:
            while waiting and engine.has_unfinished_requests():
                for output in engine.step():
                    name, written = output.request_id, output.outputs[0]
                    if name not in waiting:
                        continue
                    started.setdefault(name, time.monotonic())
                    ids = list(written.token_ids)
                    if output.finished:
                        end(name, ids, written.finish_reason == "stop")
                    elif config.timeout and time.monotonic() - started[name] > config.timeout:
                        engine.abort_request([name])
                        end(name, ids, False, timed_out=True)
        finally:
            if waiting:
                engine.abort_request(list(waiting))
        return [results[i] for i in range(len(prompts))]

    def _params(self, config: GenerationConfig, stream: tuple[int, ...], room: int) -> Any:
        return self._vllm.SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=min(config.max_new_tokens, room),
            seed=None if config.temperature == 0 else document_seed(config.seed, stream),
            stop=list(config.stop),
            include_stop_str_in_output=True,
            stop_token_ids=self._ends,
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
        )


def _import() -> Any:
    try:
        return importlib.import_module("vllm")
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
            raise BadInputError(INSTALL) from error
        reason = str(error).splitlines()[0][:200]
        raise BadInputError(
            f"engine vllm is installed and cannot be imported ({reason});\n"
            "`benchmarks/install_engine.sh vllm .venv-vllm` makes an environment in which it can"
        ) from error


def document_seed(seed: int, stream: Sequence[int]) -> int:
    """Return 63 bits named by the seed and the document's stream; a trailing 0 changes nothing."""
    names = list(stream)
    while names and names[-1] == 0:
        names.pop()
    text = "/".join(map(str, [seed, *names]))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _base_folder(model: Model) -> Path | None:
    """Return the folder of an adapted model's base, if its weights are the ones loaded."""
    folder = Path(str(model.model.config._name_or_path))
    if not (folder / "config.json").exists():
        return None
    return folder if hash_files(weight_files(folder)) == model.base_hash else None


def _rank(rank: int) -> int:
    """Return the smallest rank that vLLM has room for and that holds the adapter's."""
    for size in _RANKS:
        if size >= rank:
            return size
    raise BadInputError(
        f"the adapter has rank {rank}, a request to vllm at most {_RANKS[-1]}; use --merge"
    )


def _save_merged(model: Model, folder: Path) -> Path:
    """Write the weights with the adapters in them, and the tokenizer, to a folder."""
    import copy

    merged = copy.deepcopy(model.peft).merge_and_unload()
    merged.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder
