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
from typing import Any

from resa_lens.errors import BadInputError, RunFailedError

MATH_VERIFY = "math-verify 0.9.0"
"""The library and version whose verdicts are recorded; another one is refused."""
PYTHON = "RESA_LENS_JUDGE_PYTHON"
"""Variable that names a Python with that version, where this one has another."""
PYTHON_FILE = "judge-python"
"""File in an environment's folder that does the same: `benchmarks/install_engine.sh` writes it."""

MEMORY = 2 << 30
"""Bytes of address space that the process may take."""
TIMEOUT_S = 3
"""Seconds for each of math-verify's three steps: it gives up and the answer counts as wrong."""
PATIENCE_S = 4 * TIMEOUT_S
"""Seconds until a process that does not answer is ended, and the answer counts as wrong."""
START_S = 120
"""Seconds that the process may take to import math-verify; a second or two on a quiet machine."""


class UndecidedError(Exception):
    """A comparison that came to no end; its text says why."""


def judge_python() -> str:
    """Return the Python that runs the judging process."""
    file = Path(sys.prefix) / PYTHON_FILE
    recorded = file.read_text().strip() if file.is_file() else ""
    return os.environ.get(PYTHON) or recorded or sys.executable


def check_judge() -> None:
    """Raise BadInputError where the Python that is to run the judging process is not there."""
    if not Path(judge_python()).is_file() or judge_python() == sys.executable:
        raise BadInputError(
            f"answers are compared by {MATH_VERIFY}, which does not fit beside lighteval, and "
            f"{judge_python()} has it not:\nset {PYTHON} to the Python that resa-lens is installed "
            "for, or make this environment anew\nby `benchmarks/install_engine.sh lighteval FOLDER "
            "PYTHON_OF_RESA_LENS`"
        )


class Judge:
    """Starts the process with the first question, and again after one that it did not survive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()

    def equal(self, prediction: str, gold: str) -> bool:
        """Return whether two expressions are equal for all values of their variables.

        Raises:
            UndecidedError: it took too long, or too much memory.
            RunFailedError: the process does not start.
        """
        return bool(self._ask("equal", prediction, gold))

    def proportional(self, prediction: tuple[str, str], gold: tuple[str, str]) -> int:
        """Return the sign of the constant by which left minus right of two relations differ.

        It is 0 where there is no such constant.

        Raises:
            UndecidedError: it took too long, or too much memory.
            RunFailedError: the process does not start.
        """
        return int(self._ask("proportional", prediction, gold))

    def verify(self, prediction: str, gold: str) -> bool:
        """Return math-verify's verdict on two answers; what it cannot decide is not equal.

        Raises:
            RunFailedError: the process does not start.
        """
        with contextlib.suppress(UndecidedError):
            return bool(self._ask("verify", prediction, gold))
        return False

    def verify_text(self, text: str, gold: str) -> bool:
        """Return math-verify's verdict on a whole text, found by its own extraction.

        Raises:
            RunFailedError: the process does not start.
        """
        with contextlib.suppress(UndecidedError):
            return bool(self._ask("verify_text", text, gold))
        return False

    def extract(self, text: str, letters: str = "") -> str | None:
        """Return the answer that lighteval's patterns, kept in math-verify, find in a text.

        Args:
            text: a text without its thoughts.
            letters: the options, or "" where the answer is an expression.

        Raises:
            RunFailedError: the process does not start.
        """
        with contextlib.suppress(UndecidedError):
            return self._ask("extract", text, letters)
        return None

    def _ask(self, *request: Any) -> Any:
        with self._lock:
            if self._owner != os.getpid():  # forked: the process is the parent's
                self._process, self._owner = None, os.getpid()
            # One that something else ended says nothing of this answer.
            if self._process is not None and self._process.poll() is not None:
                self.close()
            process = self._process or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                reply = _read(process, PATIENCE_S)
            except BrokenPipeError:
                reply = None
            if reply is None:
                self.close()
                raise UndecidedError(f"took more than {PATIENCE_S} s, or too much memory")
            if "failed" in reply:
                raise UndecidedError(reply["failed"])
            return reply["value"]

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
        python = judge_python()
        command = [python, "-P", str(worker), str(MEMORY), str(TIMEOUT_S)]
        try:
            self._process = process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
        except OSError as error:
            raise RunFailedError(
                f"answers cannot be compared: {python} does not start ({error.strerror}); "
                f"set {PYTHON} to the Python of an environment that has {MATH_VERIFY}"
            ) from error
        reply = _read(process, START_S) or {}
        if (library := reply.get("value")) == MATH_VERIFY:
            return process
        code = process.poll()
        self.close()
        if library:
            raise RunFailedError(
                f"answers are compared by {MATH_VERIFY}, and {python} has {library}; reinstall "
                f"resa-lens, or set {PYTHON} to the Python of an environment that has it"
            )
        raise RunFailedError(
            f"the process that compares answers did not start (exit code {code}); "
            f"is math-verify installed in {python}?  Reinstall resa-lens"
        )


def _read(process: subprocess.Popen[str], patience: float) -> dict[str, Any] | None:
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
