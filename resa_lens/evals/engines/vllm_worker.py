"""The process that generates with vLLM: JSON lines in, JSON lines out.

Run as a script by `vllm`, never imported by it: vLLM gives a GPU's memory back only when its
process ends, and must not count on memory that the caller's model and its allocator take.  Imports
nothing of resa-lens.

The first line in says what to load (`model`, `dtype`, `device`, `options`, `adapter`) and is
answered by `max_length`.  Every further line holds `requests` (`ids` and `params` each) and a
`timeout`; each request that ends is answered by its `index`, `ids`, `finished` and `timed_out`, and
the last of them by `done`.  What goes wrong is answered by `failed`, a package that cannot be
imported by `missing`.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SHARE = 0.9
"""Of the GPU's free memory that vLLM may take; the rest is for what it does not count."""


def listen(lines: queue.Queue[dict[str, Any]]) -> None:
    """Hand over what the caller asks, and end this process with the caller."""
    for line in sys.stdin:
        lines.put(json.loads(line))
    # Closed, or the caller was killed: whatever is being generated is for nobody.
    os._exit(0)


class Worker:
    """A model that vLLM has loaded.

    Args:
        vllm: the package.
        begin: the first line.
    """

    def __init__(self, vllm: Any, begin: dict[str, Any]) -> None:
        options, adapter = begin["options"], begin["adapter"]
        if begin["device"] != "cpu":
            # Read here, where the context of this process is taken off already.
            free, total = importlib.import_module("torch").cuda.mem_get_info()
            options["gpu_memory_utilization"] = round(SHARE * free / total, 3)
        self.vllm, self.lora = vllm, None
        if adapter is not None:
            request = importlib.import_module("vllm.lora.request").LoRARequest
            self.lora = request(adapter["name"], 1, adapter["folder"])
        self.llm = vllm.LLM(
            model=begin["model"],
            dtype=begin["dtype"],
            # The files' own: a default of 0.6 in generation_config.json is none of ours.
            generation_config="vllm",
            enforce_eager=begin["device"] == "cpu",
            enable_prefix_caching=False,
            disable_log_stats=True,
            **options,
        )
        self.max_length = int(self.llm.llm_engine.model_config.max_model_len)

    def generate(
        self,
        requests: list[dict[str, Any]],
        timeout: float | None,
        reply: Callable[[dict[str, Any]], None],
    ) -> None:
        """Answer requests, and reply to each as it ends."""
        engine = self.llm.llm_engine
        for index, one in enumerate(requests):
            engine.add_request(
                str(index),
                {"prompt_token_ids": one["ids"]},
                self.vllm.SamplingParams(**one["params"]),
                lora_request=self.lora,
            )
        waiting = {str(index) for index in range(len(requests))}
        # vLLM tells a request in work only by its first token, so its clock starts there.
        started: dict[str, float] = {}
        while waiting and engine.has_unfinished_requests():
            for output in engine.step():
                name, written = output.request_id, output.outputs[0]
                if name not in waiting:
                    continue
                late = time.monotonic() - started.setdefault(name, time.monotonic())
                timed_out = not output.finished and timeout is not None and late > timeout
                if timed_out:
                    engine.abort_request([name])
                elif not output.finished:
                    continue
                waiting.remove(name)
                finished = bool(output.finished) and written.finish_reason == "stop"
                reply({
                    "index": int(name), "ids": list(written.token_ids), "finished": finished,
                    "timed_out": timed_out,
                })  # fmt: skip


def main() -> None:
    """Serve the caller until it closes stdin."""
    # What vLLM and its libraries print is none of the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    lines: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=listen, args=(lines,), daemon=True).start()
    try:
        vllm = importlib.import_module("vllm")
    except (ImportError, RuntimeError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "vllm"
        reply({"missing": "" if absent else str(error) or type(error).__name__})
        return
    try:
        worker = Worker(vllm, lines.get())
        reply({"max_length": worker.max_length})
        while True:
            job = lines.get()
            worker.generate(job["requests"], job["timeout"], reply)
            reply({"done": True})
    except Exception as error:  # noqa: BLE001 - whatever a library raises, the caller is told
        reply({"failed": f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"})


if __name__ == "__main__":
    main()
