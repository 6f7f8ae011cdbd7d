"""The process that runs what needs a model: `python -m resa_lens.app.lab.worker`.

JSON lines in, JSON lines out, one request after the other:

    {"id": 1, "do": "respond", "with": {...}}
    {"id": 1, "progress": {"label": "...", "done": 3, "total": 160, "text": "..."}}
    {"id": 1, "result": {...}}    or    {"id": 1, "error": "one message"}
    {"cancel": 1}    a request that is not begun is skipped, without an answer

A request holds all that it needs, so a new process can answer it; this one keeps the model and the
SAEs between two of them.  It ends when its input does, whatever it is at: with the app, also where
that is killed.  Nothing is written to the workspace.

With `command ARGUMENTS ...` it is a `resa-lens` command that ends in the same way.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

from resa_lens.errors import ResaLensError
from resa_lens.stages.bench import Bench


def serve(requests: TextIO, replies: TextIO, bench: Bench) -> None:
    """Answer requests until they end; then the process ends, also in the middle of one."""
    inbox: queue.Queue[dict[str, Any]] = queue.Queue()
    cancelled: set[int] = set()

    def read() -> None:
        try:
            for line in requests:
                message = json.loads(line)
                if "cancel" in message:
                    cancelled.add(message["cancel"])
                else:
                    inbox.put(message)
        finally:
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        request = inbox.get()
        if request["id"] not in cancelled:
            _serve_one(request, replies, bench)
        cancelled.discard(request["id"])


def _serve_one(request: dict[str, Any], replies: TextIO, bench: Bench) -> None:
    number = request["id"]

    def say(**message: Any) -> None:
        replies.write(json.dumps({"id": number, **message}) + "\n")
        replies.flush()

    def tell(label: str, done: int = 0, total: int = 0, text: str = "") -> None:
        say(progress={"label": label, "done": done, "total": total, "text": text})

    try:
        result = bench.answer(request["do"], request["with"], tell)
    except ResaLensError as error:
        say(error=str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the page is told and goes on
        # The whole of it goes to the app's own log, the page gets one line.
        traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        say(error=f"the work failed ({type(error).__name__}: {reason}); the app's log has more")
    else:
        say(result=result)


def _watch_parent() -> None:
    """Interrupt this process when its input ends, as a person at a terminal would."""
    # A copy by `os.dup` is one that no other process inherits.
    stream = os.fdopen(os.dup(0), "rb")

    def watch() -> None:
        stream.read()
        with suppress(ProcessLookupError):
            os.killpg(os.getpid(), signal.SIGINT)
            time.sleep(10)
            os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str]) -> None:
    """Serve requests, or be a command that ends with its input."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    if arguments[:1] == ["command"]:
        from resa_lens.cli import main as command

        # Of an app in the background it is ignored, and handed down so: Stop would do nothing.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _watch_parent()
        os.dup2(nothing, 0)
        sys.argv = ["resa-lens", *arguments[1:]]
        command()
        return
    # Libraries print what they like, and their own processes read: none of it is the protocol's.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(nothing, 0)
    serve(requests, replies, Bench())


if __name__ == "__main__":
    main(sys.argv[1:])
