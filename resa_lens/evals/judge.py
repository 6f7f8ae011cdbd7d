r"""Equality as mathematics, decided by math-verify in a process of its own.

A model writes what it likes: `(1+x)^{10^6}` takes 2 GB and three seconds to be found wrong.  So the
comparison runs where memory and time are limited, and where it cannot harm the caller; and because
the process has a main thread, which math-verify's time-outs need, any thread may ask.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from resa_lens.errors import RunFailedError

MEMORY = 2 << 30
"""Bytes of address space that the process may take."""
TIMEOUT_S = 3
"""Seconds for each of math-verify's three steps: it gives up and the answer counts as wrong."""
PATIENCE_S = 4 * TIMEOUT_S
"""Seconds until a process that does not answer is ended, and the answer counts as wrong."""
START_S = 120
"""Seconds that the process may take to import math-verify; a second or two on a quiet machine."""


class Judge:
    """Starts the process with the first question, and again after one that it did not survive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()

    def equal(self, prediction: str, gold: str) -> bool:
        """Return whether two answers are equal as mathematics; what cannot be decided is not.

        Raises:
            RunFailedError: the process does not start.
        """
        with self._lock:
            if self._owner != os.getpid():  # forked: the process is the parent's
                self._process, self._owner = None, os.getpid()
            # One that something else ended says nothing of this answer.
            if self._process is not None and self._process.poll() is not None:
                self.close()
            process = self._process or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([prediction, gold]) + "\n")
                process.stdin.flush()
                reply = _read(process, PATIENCE_S)
            except BrokenPipeError:
                reply = None
            if not isinstance(reply, bool):
                self.close()
                return False
            return reply

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        process.wait()

    def _start(self) -> subprocess.Popen[str]:
        worker = Path(__file__).with_name("judge_worker.py")
        # -P: the folder of this file holds modules with the names of libraries.  A session of its
        # own: the interrupt of a terminal is the caller's.
        command = [sys.executable, "-P", str(worker), str(MEMORY), str(TIMEOUT_S)]
        self._process = process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        if _read(process, START_S) != "ready":
            code = process.poll()
            self.close()
            raise RunFailedError(
                f"the process that compares answers did not start (exit code {code}); "
                "is math-verify installed?  Reinstall resa-lens"
            )
        return process


def _read(process: subprocess.Popen[str], patience: float) -> bool | str | None:
    """Return the next reply, or None where none comes in time or the process is gone."""
    assert process.stdout is not None
    until = time.monotonic() + patience
    # One reply is one short line, written at once: what is ready is whole.
    while not select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
        if time.monotonic() >= until:
            return None
    line = process.stdout.readline()
    return json.loads(line) if line.endswith("\n") else None


JUDGE = Judge()
"""The one that grading asks."""
atexit.register(JUDGE.close)
